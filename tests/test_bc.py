"""Behaviour cloning: which trajectories it imitates, the limit as an input, OSRL's numbers, and the chain around it."""
import json
import math
from dataclasses import replace
from pathlib import Path

import golden
import numpy as np
import pytest
import torch

from conftest import make_learner, make_pool
from saferule.attacks import poison
from saferule.config import BC_SELECTIONS, CONFIGS, BCConfig, InjectConfig, LabelFlipConfig
from saferule.data import Batch, Pool, Rows, Sampler, Units, measure_units
from saferule.errors import UserError
from saferule.learners import BC, LEARNERS, built, stack
from saferule.learners.bc import near_frontier, select
from saferule.osrl.layout import views
from saferule.tasks import get_task
from saferule.unlearning import unlearn

RECORDED = json.loads((Path(__file__).parent / "data" / "osrl_bc.json").read_text())


def pool_of(costs, returns=None, horizon=4, tail=0) -> Pool:
    """One episode per cost, all of it on its first step (likewise the return); `tail` further rows without an end."""
    m, n = len(costs), len(costs) * horizon + tail
    first, reward, cost = np.arange(m) * horizon, np.zeros(n), np.zeros(n)
    reward[first], cost[first] = costs if returns is None else returns, costs
    obs = np.arange(n * 2).reshape(n, 2) / n
    timeout = (np.arange(n) % horizon == horizon - 1) & (np.arange(n) < m * horizon)
    return Pool.from_columns({"obs": obs, "next_obs": obs, "action": obs - 1, "reward": reward, "cost": cost,
                              "terminal": np.zeros(n), "timeout": timeout})


def chosen(pool, selection, limit=20.0, condition="clean", **cfg) -> list[int]:
    """The episodes that are imitated, each of them entirely."""
    rows = select(pool, pool.rows(condition), limit, BCConfig(select=selection, **cfg))
    episodes, count = pool.episode[rows.ids].unique(return_counts=True)
    assert torch.equal(count, (pool.episode[pool.rows(condition).ids][:, None] == episodes).sum(0))
    return episodes.tolist()


# ------------------------------------------------------------------------------------------------------- the selections
def test_selections_by_hand():
    """Limit 20: costs at and around 10, 20, 30 and 40 (algorithms.md B.2)."""
    pool = pool_of([0, 10, 11, 20, 21, 30, 31, 39, 40, 50])
    assert chosen(pool, "all") == list(range(10))
    assert chosen(pool, "safe") == [0, 1, 2, 3]
    assert chosen(pool, "risky") == [8, 9]
    assert chosen(pool, "boundary") == [2, 3, 4, 5]
    assert chosen(pool, "multi-task") == list(range(10))
    assert chosen(pool, "safe", limit=10.0) == [0, 1]


def test_frontier_of_a_line_by_hand():
    """Front R = C at 0, 10, 20, 30 (degree 0 explains nothing, degree 1 all); the band is 30 / 5 = 6 wide on both sides."""
    cost, ret = [0, 10, 20, 30, 10, 10, 30, 20], [0, 10, 20, 30, 4, 3.9, 24, 1]
    assert chosen(pool_of(cost, ret), "frontier") == [0, 1, 2, 3, 4, 6]


@pytest.mark.parametrize("power, degree", [(2, 1), (3, 2)])
def test_the_degree_is_the_first_that_explains_nine_tenths(power, degree):
    """R = 1 - (1 - C / 10)^p on the front: a line explains 93% for p = 2 but 83% for p = 3."""
    cost = np.repeat(np.arange(11.0), 3)
    ret = 1 - (1 - cost / 10) ** power
    ret[1::3], ret[2::3] = ret[1::3] - 0.15, ret[2::3] - 0.3
    f = np.polyval(np.polyfit(cost[::3], ret[::3], degree), cost)
    assert near_frontier(cost, ret, np.ones(33, bool)).tolist() == (np.abs(ret - f) <= np.ptp(ret) / 5).tolist()


def test_frontier_of_one_point_is_a_constant():
    """The cheapest episode is also the best: SS_tot = 0, and R^2 would be 0 / 0. Returns 10 and more than 10 - 8 stay."""
    assert chosen(pool_of([1, 5, 9, 9], [10, 9, 8, -30]), "frontier") == [0, 1, 2]
    assert chosen(pool_of([5, 5], [3, 3]), "frontier") == [0, 1]


def test_equal_points_of_the_front_all_count():
    """Front (0, 0) three times and (10, 10): the constant is 2.5, explains nothing, and the line takes over."""
    assert chosen(pool_of([0, 0, 0, 10, 10], [0, 0, 0, 10, 7]), "frontier") == [0, 1, 2, 3]


def test_a_tail_without_an_end_is_not_safe():
    pool = pool_of([0, 10, 30], tail=3)
    assert chosen(pool, "all") == [0, 1, 2, 3]
    assert chosen(pool, "safe") == [0, 1]
    assert chosen(pool, "multi-task") == chosen(pool, "frontier", limit=1e9) == [0, 1, 2]
    assert chosen(pool, "safe", mode="parity") == [0, 1, 3]           # OSRL: it costs nothing


def test_a_trajectory_with_a_hole_has_no_known_cost():
    """The costly first row of episode 1 is forgotten: what is left of it costs 0, and is not safe for that."""
    pool = pool_of([0, 30, 10]).append("given", {}, Rows(torch.tensor([4]), torch.ones(1)))
    assert chosen(pool, "safe", condition="given/poisoned") == [0, 2]
    assert chosen(pool, "safe", condition="given/retain") == [0, 2]


@pytest.mark.parametrize("attack, cfg", [("inject", InjectConfig()), ("label_flip", LabelFlipConfig())])
def test_selections_follow_the_labels_of_their_condition(attack, cfg):
    """Forged episodes pass for safe in the poisoned data; among the retain rows the selection is made anew."""
    pool, _, _ = poison(make_pool(), attack, cfg, donors=make_pool(seed=1), cost_limit=5.0)
    kept = {part: select(pool, pool.rows(f"{attack}/{part}"), 5.0, BCConfig()).ids for part in ("poisoned", "retain")}
    forged = pool.rows(f"{attack}/forget").ids
    assert torch.isin(forged, kept["poisoned"]).all()
    assert not torch.isin(forged, kept["retain"]).any()
    assert torch.equal(kept["poisoned"][~torch.isin(kept["poisoned"], forged)], kept["retain"])


def test_rows_stay_shared_and_limits_are_per_replica():
    pool = pool_of([0, 10, 20, 30])
    rows = [pool.rows("clean")] * 4
    some = BC.select_rows(pool, rows, BCConfig(), [10.0, 10.0, 20.0, 40.0])
    assert [len(r.ids) for r in some] == [8, 8, 12, 16]
    assert some[0] is some[1]
    everything = LEARNERS["bcq_lag"].select_rows(pool, rows, CONFIGS["bcq_lag"], [20.0] * 4)
    assert all(a is b for a, b in zip(rows, everything))


def test_nothing_selected_is_said_in_one_line():
    pool = pool_of([5, 10], tail=2)
    for selection, limit in (("safe", 1.0), ("risky", 20.0), ("boundary", 100.0)):
        message = rf"none of 3 trajectories \(2 of them whole\) is '{selection}' at cost limit {limit:g};"
        with pytest.raises(UserError, match=message):
            select(pool, pool.rows("clean"), limit, BCConfig(select=selection))
    unended = pool_of([], tail=3)
    for selection in set(BC_SELECTIONS) - {"all"}:
        with pytest.raises(UserError, match=rf"none of 1 trajectories \(0 of them whole\) is '{selection}'"):
            select(unended, unended.rows("clean"), 20.0, BCConfig(select=selection))
    with pytest.raises(UserError, match="unknown selection of bc 'saef'. Did you mean 'safe'"):
        BC.select_rows(pool, [pool.rows("clean")], BCConfig(select="saef"), [20.0])


# ---------------------------------------------------------------------------------------------------------- multi-task
def test_the_cost_of_the_trajectory_stands_beside_every_observation():
    pool = pool_of([0, 10, 30])
    (rows,) = BC.select_rows(pool, [pool.rows("clean")], BCConfig(select="multi-task", cost_unit=20.0), [20.0])
    assert rows.context[:, 0].tolist() == [0.0] * 4 + [0.5] * 4 + [1.5] * 4
    units = measure_units(pool, [rows])
    batch = Sampler(pool, [rows], 64, units).sample(torch.Generator().manual_seed(0))
    plain = Sampler(pool, [pool.rows("clean")], 64, units).sample(torch.Generator().manual_seed(0))
    assert torch.equal(batch.obs[..., :2], plain.obs)
    assert torch.equal(batch.next_obs[..., :2], plain.next_obs)
    raw = batch.obs[0, :, :2] * units.obs_std + units.obs_mean
    row = (raw[:, :1] - pool.obs[:, 0]).abs().argmin(-1)               # which row each line of the batch is
    assert torch.equal(batch.obs[0, :, 2], rows.context[row, 0])
    assert torch.equal(batch.next_obs[..., 2], batch.obs[..., 2])
    (raw,) = BC.select_rows(pool, [pool.rows("clean")], BCConfig(select="multi-task", mode="parity"), [20.0])
    assert raw.context.unique().tolist() == [0, 10, 30]
    with pytest.raises(UserError, match="have a context and others have none"):
        Sampler(pool, [rows, pool.rows("clean")], 8, measure_units(pool, [rows] * 2))


def test_multi_task_obeys_the_limit_given_when_acting():
    """Action = cost of the trajectory / 100: asked for 10 and 30 at once, it gives 0.1 and 0.3."""
    pool = pool_of(np.arange(0, 45, 5))
    pool.columns["obs"] = pool.obs[torch.arange(len(pool)) % 4]        # which says nothing about the cost
    pool.columns["action"] = (torch.arange(0, 45, 5).repeat_interleave(4) / 100)[:, None]
    cfg = {"select": "multi-task", "lr": 1e-2}
    rows = BC.select_rows(pool, [pool.rows("clean")] * 2, BCConfig(**cfg), [20.0] * 2)
    learner = make_learner(pool, rows, learner="bc_safe", **cfg)
    sampler, stream = Sampler(pool, rows, 32, learner.units), torch.Generator().manual_seed(0)
    for t in range(400):
        learner.update(sampler.sample(stream), t)
    learner.qc_limit.copy_(torch.tensor([[10.0], [30.0]]))
    obs = pool.obs[:3].expand(2, 3, 2)
    assert torch.allclose(learner.act(obs), torch.tensor([0.1, 0.3]).view(2, 1, 1).expand(2, 3, 1), atol=0.03)
    assert torch.equal(learner.pick([1]).act(obs[:1]), learner.act(obs)[1:])


# ------------------------------------------------------------------------------------------------------------- learning
def make(pool, selection="safe", replicas=2, **cfg):
    cfg = {"select": selection, **cfg}
    rows = BC.select_rows(pool, [pool.rows("clean")] * replicas, BCConfig(**cfg), [20.0] * replicas)
    return make_learner(pool, rows, learner="bc_safe", qc_limit=20.0, **cfg), rows


def train(learner, pool, rows, steps, start=0):
    sampler, stream = Sampler(pool, rows, 32, learner.units), torch.Generator().manual_seed(0)
    for t in range(start, steps):
        learner.update(sampler.sample(stream), t)
    return learner


def test_loss_by_hand():
    """Zero weights act 0; actions (.5, -.3) and (0, .1): (.25 + .09 + 0 + .01) / 4."""
    units = Units(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1))
    learner = BC(BCConfig(hidden=(4,)), units, torch.tensor([20.0]), [0], n_act=2).ready()
    with torch.no_grad():
        for p in learner.parameters():
            p.zero_()
    one = torch.ones(1, 2)
    batch = Batch(one[..., None], torch.tensor([[[0.5, -0.3], [0.0, 0.1]]]), one, one, one[..., None], one)
    assert learner.actor_loss(batch).item() == pytest.approx(0.35 / 4)
    assert torch.equal(learner.act(torch.ones(1, 3, 1)), torch.zeros(1, 3, 2))


def test_one_row_is_learnt_by_heart():
    """algorithms.md B.8, case 5."""
    pool = pool_of([0])
    row = [Rows(torch.tensor([2]), torch.ones(1))]
    learner = train(make_learner(pool, row, learner="bc_safe", lr=1e-2), pool, row, 500)
    assert torch.allclose(learner.act(pool.obs[None, 2:3])[0, 0], pool.action[2], atol=1e-3)


def test_the_average_of_the_weights_acts_and_in_parity_the_last_ones():
    """Zero weights but a bias moved to 1: with tau = .25 the average acts tanh(.25), parity tanh(1)."""
    units = Units(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1))
    for mode, bias in (("default", 0.25), ("parity", 1.0)):
        learner = BC(BCConfig(mode=mode, hidden=(4,), tau=0.25), units, torch.tensor([20.0]), [0], n_act=1).ready()
        with torch.no_grad():
            for p in learner.parameters():
                p.zero_()
            learner.actor.layers[-1].bias.fill_(1.0)
        one = torch.ones(1, 1, 1)
        learner.optim["actor"].param_groups[0]["lr"] = 0.0
        learner.update(Batch(one, one, one[..., 0], one[..., 0], one, one[..., 0]), 0)
        assert learner.act(one).item() == pytest.approx(math.tanh(bias))


def test_stacked_equals_separate_with_a_context(pool):
    stacked, rows = make(pool, "multi-task", 3)
    single = [make_learner(pool, rows[:1], seeds=[s], learner="bc_safe", select="multi-task", qc_limit=20.0) for s in range(3)]
    sampler, stream = Sampler(pool, rows, 32, stacked.units), torch.Generator().manual_seed(0)
    for t in range(100):
        batch = sampler.sample(stream)
        stacked.update(batch, t)
        for r, one in enumerate(single):
            one.update(Batch(*(f[r:r + 1] if isinstance(f, torch.Tensor) else f for f in batch)), t)
    for name, value in stacked.state_dict().items():
        assert torch.allclose(value, torch.cat([one.state_dict()[name] for one in single]), atol=1e-6, rtol=0), name


@pytest.mark.parametrize("selection", ["safe", "multi-task"])
def test_restored_stacked_and_picked_learners_act_alike(selection):
    task = get_task("BallRun")
    pool = make_pool(n_obs=task.n_obs, n_act=task.n_act)
    learner, rows = make(pool, selection)
    train(learner, pool, rows, 5)
    config = {"task": task.name, "learner": "bc_safe", "select": selection, "hidden": [16, 16]}
    again = built(learner.full_state(), config, task, learner.seeds)
    obs = torch.randn(2, 7, task.n_obs)
    assert learner.act(obs, torch.Generator()).shape == (2, 7, task.n_act)
    assert torch.equal(learner.act(obs), again.act(obs))
    both = stack([learner, again])
    assert torch.equal(both.act(obs.repeat(2, 1, 1)), learner.act(obs).repeat(2, 1, 1))
    assert torch.equal(both.pick([3, 0]).act(obs[[1, 0]]), learner.act(obs)[[1, 0]])
    with pytest.raises(UserError, match="other network sizes"):
        built(learner.full_state(), {**config, "select": "multi-task" if selection == "safe" else "safe"}, task, learner.seeds)


# ---------------------------------------------------------------------------------------------------------- unlearning
def poisoned():
    pool, _, _ = poison(make_pool(), "inject", InjectConfig(), donors=make_pool(seed=1), cost_limit=5.0)
    rows = BC.select_rows(pool, [pool.rows("inject/poisoned")] * 2, BCConfig(), [5.0] * 2)
    learner = train(make_learner(pool, rows, learner="bc_safe", steps=50, tau=0.2), pool, rows, 50)
    retain = learner.select_rows(pool, [pool.rows("inject/retain")] * 2, learner.cfg, [5.0] * 2)
    return learner, pool, retain, [pool.rows("inject/forget")] * 2


def test_fine_tuning_imitates_the_retained_safe_rows():
    learner, pool, retain, forget = poisoned()
    wrong = lambda rows: (learner.act(pool.obs[rows.ids].expand(2, -1, -1)) - pool.action[rows.ids]).square().mean().item()
    before = wrong(retain[0]), wrong(forget[0])
    unlearn(learner, pool, retain, forget, "finetune", replace(CONFIGS["finetune"], steps=300))
    assert wrong(retain[0]) < before[0]
    assert wrong(forget[0]) > before[1]


@pytest.mark.parametrize("method", ["gradient_ascent", "saferule", "finetune_nstep"])
def test_methods_that_need_critics_are_refused(method):
    learner, *rest = poisoned()
    before = learner.weights()
    with pytest.raises(UserError, match=f"method '{method}' works on a learner's critics, but BC has no critic; use 'finetune'"):
        unlearn(learner, *rest, method, CONFIGS[method])
    assert all(torch.equal(v, before[k]) for k, v in learner.weights().items())


# --------------------------------------------------------------------------------------------------- numbers from OSRL
def test_three_updates_agree_with_osrl():
    """Loss, and sum and sum of squares of every parameter, to 1e-5 in float32."""
    z = RECORDED["sizes"]
    cfg = BCConfig(mode="parity", select="all", hidden=tuple(z["hidden"]), lr=z["lr"], standardise=False)
    units = Units(torch.zeros(1, z["n_obs"]), torch.ones(1, z["n_obs"]), torch.ones(1))
    learner = BC(cfg, units, torch.tensor([z["cost_limit"]]), [0], n_act=z["n_act"]).ready()
    with torch.no_grad():
        for name, value in views(learner).items():
            value.copy_(golden.weight(name, tuple(value.shape)))
    for t, recorded in enumerate(RECORDED["steps"]):
        batch = golden.batch(t, z["batch"], z["n_obs"], z["n_act"])
        out = learner.update(Batch(**{k: v[None] for k, v in batch.items()}), t)
        assert out["actor"].item() == pytest.approx(recorded["actor"], abs=1e-5, rel=1e-5)
        ours = golden.checksums(views(learner))
        assert set(ours) == set(recorded["parameters"])
        for name, sums in recorded["parameters"].items():
            assert ours[name] == pytest.approx(sums, abs=1e-5, rel=1e-5), (t, name)


@pytest.mark.parametrize("selection", BC_SELECTIONS)
def test_selected_rows_agree_with_osrl(selection):
    """The same rows of a data set by formula, with a tail that has no end; the default mode leaves the tail out."""
    columns, limit = golden.trajectories(), RECORDED["selection_limit"]
    pool = Pool.from_columns(columns)
    rows = select(pool, pool.rows("clean"), limit, BCConfig(mode="parity", select=selection))
    recorded = RECORDED["selected"][selection]
    assert rows.ids.tolist() == recorded["rows"]
    if selection == "multi-task":
        assert rows.context[:, 0].tolist() == pytest.approx(recorded["costs"], abs=1e-4)
    whole = select(pool, pool.rows("clean"), limit, BCConfig(select=selection)).ids
    tail = len(pool) - golden.TAIL if selection != "all" else len(pool)
    assert whole.tolist() == [i for i in recorded["rows"] if i < tail]
