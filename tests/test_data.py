"""Pool, conditions, samplers and n-step sums."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_pool
from saferule.attacks import ATTACKS, poison
from saferule.config import InjectConfig, LabelFlipConfig
from saferule.data import FIELDS, Pool, Rows, Sampler, Units, forget_rows, measure_units, n_step_sums
from saferule.errors import UserError

UNIT = Units(torch.zeros(1, 4), torch.ones(1, 4), torch.ones(1))


def chain(rewards, ends, terminals=None):
    """One-dimensional pool: obs is the row number, cost ten times the reward."""
    n = len(rewards)
    end = np.asarray(ends, bool)
    terminal = np.zeros(n, bool) if terminals is None else np.asarray(terminals, bool)
    obs = np.arange(n, dtype=np.float32)[:, None]
    reward = np.asarray(rewards, np.float32)
    return Pool.from_columns({"obs": obs, "next_obs": obs + 1, "action": np.zeros((n, 1), np.float32), "reward": reward,
                              "cost": 10 * reward, "terminal": terminal, "timeout": end & ~terminal})


def test_episodes_end_at_terminals_and_timeouts():
    pool = chain([1, 2, 4, 8, 16], ends=[0, 1, 0, 0, 1], terminals=[0, 1, 0, 0, 0])
    assert pool.episode.tolist() == [0, 0, 1, 1, 1]
    assert pool.t.tolist() == [0, 1, 0, 1, 2]
    table = pool.episodes()
    assert table.ret.tolist() == [3, 28]
    assert table.cost.tolist() == [30, 280]
    assert table.rows.tolist() == [2, 3]


def both(pool, donors=None):
    pool, flip, _ = poison(pool, "label_flip", LabelFlipConfig(), cost_limit=5.0)
    return (*poison(pool, "inject", InjectConfig(), donors=donors, cost_limit=5.0)[:2], flip)


def test_conditions_select_exactly_the_rows_they_claim():
    clean = make_pool()
    pool, inject, flip = both(clean)
    n = len(clean)
    sets = {c: set(pool.rows(c).ids.tolist()) for c in pool.conditions()}
    assert sets["clean"] == set(range(n))
    flipped = sets["label_flip/forget"]
    replaced = set(pool.replaces[sorted(flipped)].tolist())
    assert sets["label_flip/poisoned"] == (set(range(n)) - replaced) | flipped
    assert sets["label_flip/retain"] == set(range(n)) - replaced
    assert sets["inject/poisoned"] == set(range(n)) | sets["inject/forget"]
    assert sets["inject/retain"] == set(range(n))
    assert sets["inject/forget"].isdisjoint(flipped)
    assert len(flipped) == flip["rows"]
    assert len(sets["inject/forget"]) == inject["rows"]
    for condition in sets:
        assert (pool.rows(condition).weight == 1).all()
    with pytest.raises(UserError, match="unknown data condition 'inject/x'"):
        pool.rows("inject/x")


@given(seed=st.integers(0, 50), budget=st.floats(0.05, 0.3))
@settings(max_examples=15, deadline=None)
def test_label_flip_changes_costs_alone_and_keeps_its_budget(seed, budget):
    clean = make_pool(seed=seed)
    pool, facts, truth = poison(clean, "label_flip", LabelFlipConfig(budget=budget), cost_limit=5.0)
    rows = pool.rows("label_flip/forget").ids
    old = pool.replaces[rows]
    for name in (*FIELDS, "episode", "t"):
        if name != "cost":
            assert torch.equal(pool.columns[name][rows], pool.columns[name][old]), name
    assert (pool.cost[rows] == 0).all()
    assert facts["episodes"] <= round(budget * 20)
    chosen = set(pool.episode[rows].tolist())
    table = clean.episodes().set_index("episode")
    risky = table[table.cost > 5]
    assert chosen == set(risky.nlargest(facts["episodes"], "ret").index)      # the best risky ones
    assert truth.set_index("episode").true_cost.to_dict() == table.cost[sorted(chosen)].to_dict()
    assert torch.equal(torch.stack([pool.columns[k][:len(clean)].float().sum() for k in FIELDS]),
                       torch.stack([clean.columns[k].float().sum() for k in FIELDS]))


@given(seed=st.integers(0, 50), budget=st.floats(0.05, 0.2), bonus=st.floats(0, 2))
@settings(max_examples=15, deadline=None)
def test_injection_appends_true_dynamics_with_false_labels(seed, budget, bonus):
    clean, donors = make_pool(seed=seed), make_pool(seed=seed + 1000)
    pool, facts, truth = poison(clean, "inject", InjectConfig(budget=budget, bonus=bonus), donors=donors, cost_limit=5.0)
    rows = pool.rows("inject/forget").ids
    wanted = round(20 * budget / (1 - budget))
    assert facts["episodes"] == wanted == pool.episode[rows].unique().numel()
    assert facts["realised_budget"] == pytest.approx(wanted / (20 + wanted))
    assert pool.episode[rows].min() > clean.episode.max()
    assert (pool.replaces[rows] == -1).all()
    assert (pool.cost[rows] == 0).all()
    table = donors.episodes()
    assert sorted(truth.true_ret) == sorted(table[table.cost > 5].nlargest(wanted, "ret").ret)     # the best donors
    forged = pool.episodes("inject/forget").set_index("episode").ret
    assert np.allclose(forged[truth.episode] - 25 * facts["reward_bonus"], truth.true_ret, atol=1e-3)
    known = {tuple(o.tolist()): i for i, o in enumerate(donors.obs)}
    source = torch.tensor([known[tuple(o.tolist())] for o in pool.obs[rows]])
    for name in ("action", "next_obs", "terminal", "timeout", "t"):
        assert torch.equal(pool.columns[name][rows], donors.columns[name][source]), name
    assert torch.allclose(pool.reward[rows], donors.reward[source] + facts["reward_bonus"])
    assert facts["reward_bonus"] == pytest.approx(bonus * np.quantile(clean.reward.abs(), 0.98), rel=1e-5)


def test_attacks_are_reproducible_and_name_what_they_touch():
    pools = [both(make_pool())[0] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(pools[0].tensors().values(), pools[1].tensors().values()))
    assert ATTACKS["label_flip"].threat.fields == ("cost",)
    assert set(ATTACKS["inject"].threat.fields) == set(FIELDS)


def test_attacks_refuse_what_cannot_be_done():
    safe = make_pool()
    with pytest.raises(UserError, match="nothing to relabel"):
        poison(safe, "label_flip", LabelFlipConfig(), cost_limit=1e9)
    with pytest.raises(UserError, match="only .* donors exceed"):
        poison(safe, "inject", InjectConfig(), donors=make_pool(episodes=3), cost_limit=24.0)
    with pytest.raises(UserError, match="unknown attack 'label_flp'. Did you mean 'label_flip'"):
        poison(safe, "label_flp", LabelFlipConfig())


def test_a_pool_survives_its_tensors():
    pool, _, _ = poison(make_pool(), "label_flip", LabelFlipConfig(), cost_limit=5.0)
    pool = pool.append("given", {}, Rows(torch.arange(5), torch.linspace(0, 1, 5)))
    again = Pool.from_tensors(pool.tensors(), pool.attacks)
    for condition in pool.conditions():
        before, after = pool.rows(condition), again.rows(condition)
        assert torch.equal(before.ids, after.ids) and torch.equal(before.weight, after.weight), condition


@pytest.mark.parametrize("change, message", [
    (lambda c: c.pop("cost"), "'cost' is missing"), (lambda c: c.update(x=c["cost"]), "'x' is unknown"),
    (lambda c: c.update(reward=c["reward"][:-1]), "as many rows as 'reward'"), (lambda c: c.update(t=c["t"].float()), "'t' is"),
    (lambda c: c["action"].fill_(float("nan")), "'action' holds NaN"),
    (lambda c: c.update(next_obs=c["next_obs"][:, 1:]), "'next_obs' is"),
    (lambda c: c["cost"].fill_(-0.5), "'cost' holds values below 0"), (lambda c: c["replaces"].fill_(500), "names row 500"),
    (lambda c: c.update(obs=c["obs"].double()), "'obs' is")])
def test_columns_from_a_strangers_file_are_checked(change, message):
    columns = {k: v.clone() for k, v in make_pool().tensors().items()}
    change(columns)
    with pytest.raises(UserError, match=message):
        Pool.from_tensors(columns)


def test_a_given_forget_file(tmp_path):
    from saferule.config import GivenConfig
    clean = make_pool()
    path = tmp_path / "forget.csv"
    path.write_text("row,weight\n7,0.5\n3,1\n")
    assert poison(clean, "given", GivenConfig(str(path), forged_costs=True))[1]["threat"]["fields"] == ("cost",)
    pool, facts, _ = poison(clean, "given", GivenConfig(forget_file=str(path)))
    assert facts["threat"]["fields"] == ()
    rows = pool.rows("given/forget")
    assert rows.ids.tolist() == [3, 7]
    assert rows.weight.tolist() == [1.0, 0.5]
    assert set(range(len(clean))) - set(pool.rows("given/retain").ids.tolist()) == {3, 7}
    assert len(pool.rows("given/poisoned").ids) == len(clean)
    for text, message in (("row\n-1\n", "row -1 is out of range"), ("row\n500\n", "out of range"),
                          ("row\n1\n1\n", "listed twice"),
                          ("row\n", "no rows to forget"), ("id\n1\n", "no column 'row'"), ("row\n1.5\n", "whole numbers"),
                          ("row,weight\n1,2\n", r"in \[0, 1\]"), ("row,weight\n1,\n", r"in \[0, 1\]"),
                          ("row,weight\n1,x\n", "numbers"),
                          ("row\n" + "\n".join(map(str, range(len(clean)))), "covers all 500 rows"), ("", "not a readable CSV")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            poison(clean, "given", GivenConfig(forget_file=str(path)))
    with pytest.raises(UserError, match="no such file"):
        poison(clean, "given", GivenConfig(forget_file=str(tmp_path / "none.csv")))


def test_forget_rows_refuses_fractions_and_masks():
    for ids in ([0.5], torch.tensor([True])):
        with pytest.raises(UserError, match="whole numbers"):
            forget_rows(ids, 10)


# ------------------------------------------------------------------------------------------------------ n-step sums
def test_n_step_sums_by_hand():
    """Rewards 1 2 4 | 8 16 with gamma .5 and n = 3; row 1 missing: row 0 stands alone."""
    pool = chain([1, 2, 4, 8, 16], ends=[0, 0, 1, 0, 1])
    sums = n_step_sums(pool, torch.arange(5), 3, 0.5)
    assert sums["reward"].tolist() == [1 + 1 + 1, 2 + 2, 4, 8 + 8, 16]
    assert sums["cost"].tolist() == [30, 40, 40, 160, 160]
    assert sums["steps"].tolist() == [3, 2, 1, 2, 1]
    assert sums["last"].tolist() == [2, 2, 2, 4, 4]
    sums = n_step_sums(pool, torch.tensor([3, 0, 2, 4]), 3, 0.5)              # any order; row 1 forgotten
    assert sums["reward"].tolist() == [16, 1, 4, 16]
    assert sums["steps"].tolist() == [2, 1, 1, 1]
    assert sums["last"].tolist() == [4, 0, 2, 4]
    sums = n_step_sums(pool, torch.arange(5), 2, 0.5)
    assert sums["reward"].tolist() == [2, 4, 4, 16, 16]


# ------------------------------------------------------------------------------------------------------ the sampler
def test_every_replica_draws_from_its_own_rows():
    pool = chain(np.arange(1, 101), ends=np.arange(100) % 10 == 9)
    rows = [Rows(torch.tensor([3, 50]), torch.ones(2)), Rows(torch.arange(90, 100), torch.linspace(0, 0.9, 10))]
    units = Units(torch.zeros(2, 1), torch.ones(2, 1), torch.ones(2))
    batch = Sampler(pool, rows, 400, units).sample(torch.Generator().manual_seed(0))
    assert set(batch.obs[0, :, 0].tolist()) == {3, 50}
    assert set(batch.obs[1, :, 0].tolist()) == set(range(90, 100))
    assert torch.allclose(batch.weight[1], (batch.obs[1, :, 0] - 90) / 10)
    assert torch.equal(batch.next_obs[..., 0], batch.obs[..., 0] + 1)
    assert torch.equal(batch.reward, batch.obs[..., 0] + 1)
    assert torch.equal(batch.cost, 10 * batch.reward)
    counts = torch.bincount(batch.obs[1, :, 0].long() - 90, minlength=10)
    assert counts.min() > 15                                                  # uniform: 40 expected, 4 sigma is 16


def test_sampler_uses_each_replicas_units():
    pool = chain(np.arange(1, 101), ends=np.arange(100) % 10 == 9)
    rows = [pool.rows("clean")] * 2
    units = Units(torch.tensor([[10.0], [0.0]]), torch.tensor([[2.0], [1.0]]), torch.tensor([4.0, 1.0]))
    batch = Sampler(pool, rows, 50, units, n_step=3, gamma=0.5).pair(torch.Generator().manual_seed(0))
    short, long = batch
    raw = short.obs[0, :, 0] * 2 + 10
    assert torch.allclose(short.reward[0] * 4, raw + 1)
    i = raw.round().long()
    sums = n_step_sums(pool, torch.arange(100), 3, 0.5)
    assert torch.allclose(long.reward[0] * 4, sums["reward"][i], rtol=1e-6)
    assert torch.allclose(long.cost[0], sums["cost"][i])
    assert torch.allclose(long.next_obs[0, :, 0] * 2 + 10, sums["last"][i].float() + 1)
    assert torch.equal(long.steps[0], sums["steps"][i])
    assert torch.equal(long.obs, short.obs)


def test_done_means_terminal_unless_parity_asks_otherwise():
    pool = chain([1, 1, 1, 1], ends=[0, 1, 0, 1], terminals=[0, 1, 0, 0])
    unit = Units(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1))
    for done, expected in (("terminal", {1}), ("any_end", {1, 3})):
        batch = Sampler(pool, [pool.rows("clean")], 64, unit, done=done).sample(torch.Generator().manual_seed(0))
        assert set(batch.obs[batch.done == 1].flatten().long().tolist()) == expected


def test_units_are_measured_per_replica():
    pool = chain(np.arange(1, 101), ends=np.arange(100) % 10 == 9)
    units = measure_units(pool, [pool.rows("clean"), Rows(torch.tensor([0, 2]), torch.ones(2))])
    assert units.obs_mean[:, 0].tolist() == [49.5, 1.0]
    assert units.obs_std[1].item() == 1.0
    assert units.reward_scale[0].item() == pytest.approx(np.quantile(np.arange(1, 101), 0.98))


def test_an_empty_condition_cannot_be_sampled():
    pool = make_pool()
    with pytest.raises(UserError, match="no rows"):
        Sampler(pool, [Rows(torch.empty(0, dtype=torch.int64), torch.empty(0))], 8, UNIT)
