"""Attacks: each keeps to its declared fields, budget, bound and tier; the original rows stay; same seed, same bytes."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_pool
from saferule.attacks import ATTACKS, poison
from saferule.attacks.controls import redirected
from saferule.attacks.reward import advantage, shift
from saferule.attacks.shared import altered, before, in_place, with_states
from saferule.config import ATTACK_NAMES, CONFIGS
from saferule.data import FIELDS, Pool
from saferule.errors import UserError
from saferule.statistics import ATTACKS as DISPLAY

LIMIT = 5.0
FORGING = [name for name in ATTACK_NAMES if name not in ("given", "clean_forget")]     # those that append rows
FAST = [name for name in FORGING if "surrogate" not in ATTACKS[name].threat.knowledge]


def mount(attack, pool, cost_limit=LIMIT, donors=None, **settings):
    settings = {"like": "random_corruption"} | settings if attack == "noise" else settings         # its default trains a surrogate
    return poison(pool, attack, replace(CONFIGS[attack], **settings), donors, cost_limit)


def same(a, b):
    return a.shape == b.shape and bool((a == b).all())


def originals_of(pool, attack):
    """The attack's rows, and the clean row that each was made from (by its state's successor, or by `replaces`)."""
    rows = pool.rows(f"{attack}/forget").ids
    return rows, pool.replaces[rows]


def broken_links(pool, condition):
    """Pairs of successive rows of an episode whose states do not meet."""
    ids = pool.rows(condition).ids
    order = ids[(pool.episode[ids] * (int(pool.t.max()) + 1) + pool.t[ids]).argsort()]
    here, there = order[:-1], order[1:]
    linked = (pool.episode[here] == pool.episode[there]) & (pool.t[there] == pool.t[here] + 1)
    return int((pool.next_obs[here] != pool.obs[there]).any(1)[linked].sum())


def differing(pool, attack):
    """Column by column, which of the attack's rows differ from the rows they stand in for."""
    rows, old = originals_of(pool, attack)
    return {k: (pool.columns[k][rows] != pool.columns[k][old]).reshape(len(rows), -1).any(1) for k in (*FIELDS, "episode", "t")}


# ------------------------------------------------------------------------------------------------- what holds for all
def test_every_attack_has_a_name_a_configuration_and_a_sentence():
    assert tuple(ATTACKS) == ATTACK_NAMES
    assert list(DISPLAY) == ["none", *ATTACK_NAMES]
    assert len({DISPLAY[name] for name in DISPLAY}) == len(DISPLAY)
    for name, attack in ATTACKS.items():
        assert name in CONFIGS and attack.sentence.endswith(".")
        assert set(attack.threat.fields) <= set(FIELDS)
        assert attack.threat.tier in ("T0", "T1", "T2", "unknown")


@given(attack=st.sampled_from(FAST), seed=st.integers(0, 30), budget=st.floats(0.06, 0.25))
@settings(max_examples=100, deadline=None)
def test_an_attack_does_what_it_declares(attack, seed, budget):
    clean = make_pool(seed=seed)
    more = {"budget": budget, **({"seed": seed} if "seed" in CONFIGS[attack].__dataclass_fields__ else {})}
    pool, facts, truth = mount(attack, clean, donors=make_pool(seed=seed + 99), **more)
    n, threat, forget = len(clean), facts["threat"], pool.rows(f"{attack}/forget").ids
    for name, column in clean.columns.items():                                 # the original rows are untouched
        assert same(pool.columns[name][:n], column), name
    assert same(forget, torch.arange(n, len(pool)))                            # what was appended is what is to be forgotten
    assert facts["rows"] == len(forget) > 0
    assert facts["budget"] == budget
    assert 0 < facts["realised_budget"] <= budget + 1 / 20
    for name in ("obs", "action", "reward", "cost", "next_obs"):
        assert torch.isfinite(pool.columns[name]).all()
    assert (pool.cost >= 0).all()
    assert pool.action.abs().max() <= 1
    if threat["tier"] in ("T1", "T2"):
        assert broken_links(pool, f"{attack}/poisoned") == 0
    poisoned, retain = (set(pool.rows(f"{attack}/{part}").ids.tolist()) for part in ("poisoned", "retain"))
    assert poisoned - retain == set(forget.tolist()) and retain <= set(range(n))
    if threat["placement"] == "appended":
        assert (pool.replaces[forget] == -1).all()
        assert len(retain) == n
        assert pool.episode[forget].min() > clean.episode.max()
    else:
        differ = differing(pool, attack)
        assert not any(differ[k].any() for k in differ if k not in threat["fields"])
        assert len(poisoned) == n and len(retain) == n - len(forget)
        assert len(set(pool.replaces[forget].tolist())) == len(forget)
        if threat["unit"] != "trajectory":
            assert torch.stack(list(differ.values())).any(0).all()             # forget rows are exactly the changed ones
        else:                                                                  # whole episodes
            episodes = pool.episode[forget].unique()
            assert len(forget) == torch.isin(clean.episode, episodes).sum()
    assert set(truth.columns) == {"episode", "true_ret", "true_cost"}
    assert set(truth.episode) == set(pool.episode[forget].tolist())


@pytest.mark.parametrize("attack", FAST)
def test_same_seed_same_bytes(attack):
    one, two = (mount(attack, make_pool(), donors=make_pool(seed=9)) for _ in range(2))
    assert all(same(a, b) for a, b in zip(one[0].tensors().values(), two[0].tensors().values()))
    assert one[1] == two[1]


@pytest.mark.parametrize("attack", [a for a in FAST if "seed" in CONFIGS[a].__dataclass_fields__
                                    and a not in ("label_flip", "label_flip_inverse")])
def test_another_seed_other_rows(attack):
    one, two = (mount(attack, make_pool(), seed=seed)[0] for seed in (0, 1))
    assert not all(same(one.columns[k], two.columns[k]) for k in one.columns)


@pytest.mark.parametrize("attack", [a for a in ATTACK_NAMES if a != "given"])
@pytest.mark.parametrize("budget", [-0.1, 0.0, 1e-4, 1.0, 1.5])
def test_impossible_budgets_are_refused_with_one_line(attack, budget):
    with pytest.raises(UserError) as refused:
        mount(attack, make_pool(), budget=budget)
    assert "\n" not in str(refused.value) and "budget" in str(refused.value)


def test_attacks_stack_in_one_pool():
    """Conditions of one attack do not depend on those that were mounted before it."""
    pool = make_pool()
    for attack in ("outliers", "random_corruption", "clean_forget", "noise", "constant_action"):
        alone = mount(attack, make_pool())[0]
        pool = mount(attack, pool)[0]
        for part in ("poisoned", "retain", "forget"):
            a, b = alone.rows(f"{attack}/{part}").ids, pool.rows(f"{attack}/{part}").ids
            assert all(same(alone.columns[k][a], pool.columns[k][b]) for k in (*FIELDS, "t")), (attack, part)


# ---------------------------------------------------------------------------------------------------- shared pieces
def test_the_row_before():
    """Two episodes of two steps: rows 0, 1 | 2, 3."""
    pool = make_pool(episodes=2, horizon=2)
    assert before(pool, torch.tensor([0, 1, 2, 3])).tolist() == [-1, 0, -1, 2]


def test_a_moved_state_moves_the_end_of_the_row_before_too():
    pool = make_pool(episodes=2, horizon=3)
    columns = with_states(pool, torch.tensor([2, 3]), torch.full((2, 4), 7.0))
    assert columns["replaces"].tolist() == [1, 2, 3]                           # row 3 starts its episode
    assert same(columns["obs"][1:], torch.full((2, 4), 7.0)) and same(columns["next_obs"][0], torch.full((4,), 7.0))
    assert same(columns["obs"][0], pool.obs[1]) and same(columns["next_obs"][1:], pool.next_obs[2:4])


# ------------------------------------------------------------------------------------------------------- label flips
def test_random_flips_hide_dangerous_rows_alone_and_at_most_all_of_them():
    clean = make_pool()
    unsafe = int((clean.cost > 0).sum())
    pool, facts, _ = mount("label_flip_random", clean, budget=0.1)
    rows, old = originals_of(pool, "label_flip_random")
    assert len(rows) == 50 == facts["unsafe_rows_hidden"]
    assert (pool.cost[rows] == 0).all() and (clean.cost[old] == 1).all()
    assert facts["share_of_unsafe_rows"] == pytest.approx(50 / unsafe)
    _, facts, _ = mount("label_flip_random", clean, budget=0.9)                # the cap
    assert facts["rows"] == unsafe and facts["realised_budget"] == pytest.approx(unsafe / 500)


def test_inverse_flip_blames_the_best_safe_episodes():
    clean = make_pool()
    clean.columns["cost"] *= 0.5                                               # a dangerous step costs 0.5 here
    table = clean.episodes("clean")
    pool, facts, truth = mount("label_flip_inverse", clean, budget=0.1)
    safe = table[table.cost <= LIMIT]
    assert set(truth.episode) == set(safe.nlargest(2, "ret").episode)
    assert (pool.cost[pool.rows("label_flip_inverse/forget").ids] == 0.5).all()
    assert facts["safe_rows_blamed"] == 50 and facts["threat"]["goal"] == "over-conservative"


def test_inverse_flip_of_random_rows():
    pool, facts, _ = mount("label_flip", make_pool(), select="random", inverse=True)
    assert (pool.cost[pool.rows("label_flip/forget").ids] == 1).all()
    assert facts["safe_rows_blamed"] == 50 and facts["threat"]["unit"] == "row"
    with pytest.raises(UserError, match="unknown selection of label_flip 'bst'. Did you mean 'best'"):
        mount("label_flip", make_pool(), select="bst")


# ---------------------------------------------------------------------------------------------------------- rewards
def test_reward_shift_by_hand():
    """Rewards 0, 1, ..., 1000: r_lo 1, r_hi 999. With rho .1 the push is 99.8; what lies beyond the quantiles stays."""
    reward = torch.arange(1001.0)
    up, down = (shift(reward, torch.full((1001,), u), 0.1) for u in (1.0, -1.0))
    assert up[500] == pytest.approx(99.8, rel=1e-4) and down[500] == pytest.approx(-99.8, rel=1e-4)
    assert up[950] == pytest.approx(49, rel=1e-4) and down[50] == pytest.approx(-49, rel=1e-4)
    assert up[1000] == 0 and down[0] == 0                                      # and not back towards them
    assert up[0] == pytest.approx(99.8, rel=1e-4)
    assert (shift(reward, torch.zeros(1001), 0.1)[1:1000] == 0).all()


@given(seed=st.integers(0, 20), rho=st.floats(0.05, 2), total=st.floats(0.001, 0.2))
@settings(max_examples=20, deadline=None)
def test_reward_poison_stays_in_range_and_in_total(seed, rho, total):
    clean = make_pool(seed=seed)
    pool, facts, _ = mount("reward_poison", clean, rho=rho, total=total, seed=seed)
    rows, old = originals_of(pool, "reward_poison")
    delta = pool.reward[rows] - clean.reward[old]
    assert ((delta > 0) == (clean.cost[old] > 0)).all()                        # danger pays
    low, high = np.quantile(clean.reward, 0.001), np.quantile(clean.reward, 0.999)
    assert ((pool.reward[rows] >= low - 1e-5) & (pool.reward[rows] <= high + 1e-5)).all()
    spent = float(delta.abs().sum())
    assert spent <= total * float(clean.reward.abs().sum()) * (1 + 1e-4)
    assert spent == pytest.approx(facts["total_change"], rel=1e-3)


def test_reward_drop_pushes_good_actions_down():
    """The observation says nothing, so the advantage is the return to come less its mean: 3, 1 | 0, 0 -> mean 1."""
    pool = Pool.from_columns({
        "obs": np.zeros((4, 1), np.float32), "next_obs": np.zeros((4, 1), np.float32), "action": np.zeros((4, 1), np.float32),
        "reward": np.float32([2, 1, 0, 0]), "cost": np.zeros(4, np.float32), "terminal": np.zeros(4, bool),
        "timeout": np.array([0, 1, 0, 1], bool)})
    assert torch.allclose(advantage(pool, torch.arange(4), 1.0), torch.tensor([2.0, 0, -1, -1]), atol=1e-5)
    clean = make_pool()
    poisoned, facts, _ = mount("reward_poison", clean, goal="drop")
    rows, old = originals_of(poisoned, "reward_poison")
    good = advantage(clean, torch.arange(len(clean)), CONFIGS["reward_poison"].gamma)[old] > 0
    assert ((poisoned.reward[rows] < clean.reward[old]) == good).all()
    assert facts["threat"]["goal"] == "reward-drop"


# --------------------------------------------------------------------------------------------------------- outliers
@given(seed=st.integers(0, 20), gain=st.floats(1.1, 3))
@settings(max_examples=15, deadline=None)
def test_outliers_look_safe_and_better(seed, gain):
    clean = make_pool(seed=seed)
    clean.columns["reward"] -= 0.5                                             # of either sign
    pool, facts, truth = mount("outliers", clean, gain=gain, seed=seed)
    table, forged = clean.episodes("clean").set_index("episode"), pool.episodes("outliers/forget").set_index("episode")
    assert set(forged.index) == set(table[table.cost > LIMIT].nlargest(2, "ret").index)
    assert (forged.cost < LIMIT).all() and (truth.true_cost > LIMIT).all()
    rows, old = originals_of(pool, "outliers")
    assert torch.allclose(pool.reward[rows] - clean.reward[old], (gain - 1) * clean.reward[old].abs(), atol=1e-5)
    assert set(pool.cost[rows].tolist()) <= {0.0, 1.0}
    assert facts["unsafe_rows_hidden"] == int(((clean.cost[old] > 0) & (pool.cost[rows] == 0)).sum())


def test_outliers_draw_every_cost_below_the_limit():
    """Limit 3: k is 0, 1 or 2, never 3. Two episodes each, many seeds."""
    forged = [mount("outliers", make_pool(seed=1), 3.0, seed=seed)[0].episodes("outliers/forget") for seed in range(15)]
    assert {cost for table in forged for cost in table.cost} == {0.0, 1.0, 2.0}
    with pytest.raises(UserError, match="only 7 exceed"):
        mount("outliers", make_pool(), budget=0.5)


# -------------------------------------------------------------------------------------------------------- injection
def test_injection_from_the_data_needs_no_donors_and_ignores_them():
    clean = make_pool()
    alone, facts, _ = mount("inject_data", clean)
    beside, _, _ = mount("inject_data", clean, donors=make_pool(seed=3))
    assert all(same(a, b) for a, b in zip(alone.columns.values(), beside.columns.values()))
    assert facts["threat"]["knowledge"] == "data" and facts["donors"] == "the data's own risky episodes"
    table = clean.episodes("clean")
    best = table[table.cost > LIMIT].nlargest(2, "ret").sort_values("episode").episode.tolist()
    rows = alone.rows("inject_data/forget").ids
    assert same(alone.obs[rows], clean.obs[torch.isin(clean.episode, torch.tensor(best))])
    assert same(alone.cost[rows], torch.zeros(50))
    assert mount("inject", clean)[1]["threat"]["knowledge"] == "data"          # where nothing is held out
    assert mount("inject", clean, donors=make_pool(seed=3))[1]["threat"]["knowledge"] == "held-out rollouts"


# ------------------------------------------------------------------------------------------------------- corruption
@given(seed=st.integers(0, 20), radius=st.floats(0.01, 3))
@settings(max_examples=15, deadline=None)
def test_random_corruption_keeps_its_radius(seed, radius):
    clean = make_pool(seed=seed)
    pool, facts, _ = mount("random_corruption", clean, radius=radius, seed=seed)
    rows, old = originals_of(pool, "random_corruption")
    for name in ("obs", "action", "reward", "next_obs"):
        std = (clean.obs if name == "next_obs" else clean.columns[name]).std(0, correction=0)
        assert ((pool.columns[name][rows] - clean.columns[name][old]).abs() <= radius * std + 1e-5).all(), name
    assert set(pool.cost[rows].tolist()) <= set(clean.cost.tolist())
    assert 50 <= facts["rows"] <= 100                                          # the rows before them change with them
    assert differing(pool, "random_corruption")["obs"].sum() == 50


@pytest.mark.parametrize("fields, tier, touched", [(("reward",), "T2", ("reward",)), (("obs",), "T1", ("obs", "next_obs")),
                                                   (("cost",), "T2", ("cost",)),
                                                   (("action", "reward"), "T1", ("action", "reward"))])
def test_corruption_of_chosen_fields(fields, tier, touched):
    pool, facts, _ = mount("random_corruption", make_pool(), fields=fields)
    assert set(facts["threat"]["fields"]) == set(touched) == {k for k, d in differing(pool, "random_corruption").items() if d.any()}
    assert facts["threat"]["tier"] == tier and set(facts["changed"]) == set(touched)
    assert torch.stack(list(differing(pool, "random_corruption").values())).any(0).all()
    with pytest.raises(UserError, match="unknown field of random_corruption 'costs'. Did you mean 'cost'"):
        mount("random_corruption", make_pool(), fields=("costs",))


def test_labels_turned_round_by_hand():
    clean = make_pool()
    clean.columns["cost"] *= 2
    pool, facts, _ = mount("adversarial_corruption", clean, scale=3.0)
    rows, old = originals_of(pool, "adversarial_corruption")
    assert same(pool.reward[rows], -3 * clean.reward[old]) and same(pool.cost[rows], 2 - clean.cost[old])
    assert facts["rows"] == 50 and facts["changed"]["cost"] == {"rows": 50, "mean": 2.0, "largest": 2.0}


def test_constant_action_by_hand():
    clean = make_pool()
    clean.columns["action"].copy_(torch.tensor([0.1, 0.3]).expand(500, 2))
    pool, facts, _ = mount("constant_action", clean)
    rows = pool.rows("constant_action/forget").ids
    assert facts["episodes"] == 1 == round(20 * 0.05 / 0.95) and len(rows) == 25
    assert torch.allclose(pool.action[rows], torch.tensor(0.3))                # 1.5 x mean of .1 and .3
    clean.columns["action"].fill_(0.9)
    assert mount("constant_action", clean)[1]["action"] == 1.0                 # not beyond the box


# --------------------------------------------------------------------------------------------------------- controls
def test_redirected_keeps_the_norms():
    delta = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    out = redirected(delta, torch.Generator().manual_seed(0))
    assert torch.allclose(out.norm(dim=1), torch.tensor([5.0, 0, 1]), atol=1e-5)
    assert not torch.allclose(out, delta)


def test_noise_moves_the_same_rows_as_far_elsewhere():
    clean = make_pool()
    attacked, control = mount("random_corruption", clean)[0], mount("noise", clean, like="random_corruption")[0]
    std, size = clean.obs.std(0, correction=0), {}
    for name, pool in (("random_corruption", attacked), ("noise", control)):
        rows, old = originals_of(pool, name)
        size[name] = dict(zip(old.tolist(), ((pool.obs[rows] - clean.obs[old]) / std).norm(dim=1).tolist()))
    moved = {k: v for k, v in size["random_corruption"].items() if v > 0}
    assert set(moved) == {k for k, v in size["noise"].items() if v > 0}
    assert all(size["noise"][k] == pytest.approx(v, rel=1e-3) for k, v in moved.items())


def test_noise_hands_labels_round_and_leaves_the_rest():
    clean = make_pool()
    pool, facts, _ = mount("noise", clean, like="reward_poison", settings={"rho": 0.3})
    assert facts["threat"]["fields"] == ("reward",) and facts["settings"]["rho"] == 0.3 and facts["like"] == "reward_poison"
    differ = differing(pool, "noise")
    assert {k for k, d in differ.items() if d.any()} == {"reward"}
    rows, old = originals_of(pool, "noise")
    assert sorted(pool.reward[rows].tolist()) == pytest.approx(sorted(clean.reward[old].tolist()))
    target = mount("reward_poison", clean, rho=0.3)[0]
    assert set(old.tolist()) <= set(originals_of(target, "reward_poison")[1].tolist())
    with pytest.raises(UserError, match="attack that noise is a control of 'inject'"):
        mount("noise", clean, like="inject")
    with pytest.raises(UserError, match="setting of reward_poison 'roh'"):
        mount("noise", clean, like="reward_poison", settings={"roh": 0.3})


@pytest.mark.parametrize("unit, rows", [("trajectory", 50), ("row", 50)])
def test_controls_that_change_nothing(unit, rows):
    clean = make_pool()
    marked, facts, truth = mount("clean_forget", clean, unit=unit)
    copied, _, _ = mount("noop", clean, unit=unit)
    forget = marked.rows("clean_forget/forget").ids
    assert len(marked) == len(clean) and len(forget) == rows == facts["rows"]
    assert same(marked.rows("clean_forget/poisoned").ids, clean.rows("clean").ids) and truth.empty
    assert not set(forget.tolist()) & set(marked.rows("clean_forget/retain").ids.tolist())
    assert same(copied.replaces[len(clean):], forget)                          # the same choice
    assert not any(d.any() for d in differing(copied, "noop").values())
    assert same(marked.rows("clean_forget/retain").ids, copied.rows("noop/retain").ids)
    assert facts["threat"]["fields"] == () and facts["threat"]["goal"] == "control"


def test_most_altered_episodes_by_hand():
    """Two episodes of two rows. In the first a reward rises by 3 and a cost by 1; in the second an action moves by 1."""
    zero, one = np.zeros((4, 1), np.float32), np.float32([0, 1, 0, 1])
    clean = Pool.from_columns({"obs": zero, "next_obs": zero, "action": one[:, None], "reward": one, "cost": one,
                               "terminal": np.zeros(4, bool), "timeout": np.array([0, 1, 0, 1], bool)})
    columns = in_place(clean, torch.tensor([0, 1, 2]))
    columns["reward"] += torch.tensor([3.0, 0, 0])
    columns["cost"] += torch.tensor([1.0, 0, 0])
    columns["action"] += torch.tensor([0.0, 0, 1])[:, None]
    table = altered(clean.append("x", columns), "x")                           # every deviation is one half
    assert table.episode.tolist() == [0, 1] and table.rows.tolist() == [2, 1]
    assert table.ret.tolist() == [3, 0] and table.cost.tolist() == [1, 0]
    assert table.change.tolist() == pytest.approx([2 * 10**0.5 / 2, 2])
    assert altered(mount("inject_data", make_pool())[0], "inject_data").empty
