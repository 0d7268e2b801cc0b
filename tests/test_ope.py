"""Off-policy evaluation: hand cases, problems of known value, bootstraps, isolation, vetoes and choice, and no simulator."""
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import make_learner, make_pool
from saferule.attacks import poison
from saferule.attacks.trigger import Trigger
from saferule.config import InjectConfig, OPEConfig
from saferule.data import Pool, Rows
from saferule.errors import UserError
from saferule.fqe import Part, Replay, bootstrap_weights, gradient_steps, steps_left
from saferule.learners import discounted_limit
from saferule.ope import Logged, decide, divide, fqe, off_support, select
from saferule.train import Resume

SMALL = OPEConfig(members=3, sweeps=0.8, tau=0.5, batch=16, hidden=(16,), probe=64)          # 40 steps at T = 25


class Random:
    """R policies: action `size[r]` with probability `up[r]`, else -size[r], whatever the state."""

    def __init__(self, up, size=None):
        self.up, self.size = list(up), list(size or [1.0] * len(up))

    replicas = property(lambda self: len(self.up))

    def pick(self, replicas):
        return Random([self.up[r] for r in replicas], [self.size[r] for r in replicas])

    def act(self, obs, generator):
        u = torch.rand(obs.shape[:2], generator=generator)
        sign = torch.where(u < torch.tensor(self.up)[:, None], 1.0, -1.0)
        return (sign * torch.tensor(self.size)[:, None])[..., None].expand(-1, -1, 2)


def pool_of(states, actions, costs, n_states, terminal=False) -> Pool:
    """Episodes [E, L + 1] of states as one-hot vectors, actions [E, L] (twice), costs [E, L]; reward = 2 cost + 1."""
    states, costs = np.asarray(states), np.asarray(costs, np.float32)
    E, L = costs.shape
    hot = np.eye(n_states, dtype=np.float32)[states]
    last = np.arange(E * L) % L == L - 1
    action = np.repeat(np.asarray(actions, np.float32).reshape(-1, 1), 2, 1)
    return Pool.from_columns({"obs": hot[:, :-1].reshape(E * L, -1), "next_obs": hot[:, 1:].reshape(E * L, -1), "action": action,
                              "reward": 2 * costs.ravel() + 1, "cost": costs.ravel(), "terminal": last & terminal,
                              "timeout": last & (not terminal)})


def loop(episodes=20, L=10):
    """s0 -> s1 with cost 1, then s1 -> s1 with cost 0.5 (algorithms.md F.1)."""
    states = np.ones((episodes, L + 1), int)
    states[:, 0] = 0
    costs = np.full((episodes, L), 0.5)
    costs[:, 0] = 1
    return pool_of(states, np.ones((episodes, L)), costs, 2)


def everything(pool):
    return Rows(torch.arange(len(pool)), torch.ones(len(pool)))


# ------------------------------------------------------------------------------------------------------ hand cases
HAND = OPEConfig(members=2, sweeps=6, batch=16, hidden=(16,), lr=5e-3, tau=0.2, held_out=0.5)


def test_self_loop_by_hand():
    """F(s1) = 5 and F(s0) = 5.5 at g = 0.9; in episode units (1 - g) V T."""
    pool, cfg, T = loop(), replace(HAND, finite=False, gamma=0.9, sweeps=2), 10
    found = fqe(Random([1.0]), pool, [everything(pool)], T, cfg)
    assert found.cost.flatten().tolist() == pytest.approx([5.5 * 0.1 * T] * 2, rel=0.01)
    assert found.ret.flatten().tolist() == pytest.approx([(2 * 5.5 + 10) * 0.1 * T] * 2, rel=0.01)  # r = 2 c + 1
    x = found.model.inputs(torch.eye(2)[None], torch.zeros(1, 2), torch.ones(1, 2, 2))
    values = found.model.rate("cost", x[:, None])[0].detach() / (1 - cfg.gamma)  # [M, 2]
    assert values.flatten().tolist() == pytest.approx([5.5, 5.0] * 2, rel=0.01)


@pytest.mark.parametrize("gamma,value", [(0.9, 3.75661), (1.0, 5.5)])
def test_ten_steps_by_hand(gamma, value):
    pool, cfg, T = loop(), replace(HAND, gamma=gamma), 10
    cost = fqe(Random([1.0]), pool, [everything(pool)], T, cfg).cost
    left = steps_left(torch.tensor([0]), T, cfg).item()  # H(0)
    assert (cost * left / T).flatten().tolist() == pytest.approx([value] * 2, rel=0.01)


def test_terminal_rows_are_followed_by_nothing():
    """s0 -> s1 -> end, cost 1 each: 1 + g = 1.9, and 2 in ten steps without discount."""
    pool = pool_of([[0, 1, 1]] * 20, [[1, 1]] * 20, [[1, 1]] * 20, 2, terminal=True)
    cost = fqe(Random([1.0]), pool, [everything(pool)], 10, replace(HAND, finite=False, gamma=0.9, sweeps=2)).cost
    assert cost.flatten().tolist() == pytest.approx([1.9 * 0.1 * 10] * 2, rel=0.01)
    cost = fqe(Random([1.0]), pool, [everything(pool)], 10, HAND).cost
    assert cost.flatten().tolist() == pytest.approx([2.0] * 2, rel=0.01)


@pytest.mark.parametrize("finite,gamma", [(True, 1.0), (False, 0.99)])
def test_constant_rate_meets_the_limit_exactly(finite, gamma):
    """At a cost of l / T per step the estimate is l, and V_C is l / ((1 - g) T), the infinite-horizon limit."""
    limit, T, pool = 5.0, 25, make_pool(horizon=25)
    pool.columns["cost"] = torch.full((len(pool),), limit / T)
    cfg = replace(SMALL, finite=finite, gamma=gamma, sweeps=0.05)
    cost = fqe(Random([0.5]), pool, [everything(pool)], T, cfg).cost
    assert torch.allclose(cost, torch.tensor(limit), rtol=1e-5)
    if not finite:
        value = cost / ((1 - gamma) * T)
        assert torch.allclose(value, torch.tensor(discounted_limit(limit, gamma, T) / (1 - gamma**T)), rtol=1e-5)


def test_steps_left_by_hand():
    t = torch.tensor([0, 8, 9, 10])
    assert steps_left(t, 10, OPEConfig()).tolist() == [10, 2, 1, 0]
    assert steps_left(t, 10, OPEConfig(gamma=0.5)).tolist() == pytest.approx([2 * (1 - 0.5**10), 1.5, 1, 0])
    assert steps_left(t, 10, OPEConfig(finite=False, gamma=0.9)).tolist() == pytest.approx([10] * 4)
    assert gradient_steps(200, OPEConfig(tau=0.05, sweeps=1.5)) == 6000        # 200 / 0.05 = 4000, one and a half times
    assert gradient_steps(200, OPEConfig(tau=0.05, finite=False, gamma=0.99)) == 6000        # 3 / 0.01 / 0.05


# ----------------------------------------------------------------------------------------------- problems of known value
def chain(episodes=150, L=8, seed=0):
    """Four states in a row; action +1 steps right, -1 left; being in state 3 afterwards costs 1. Logged: a coin."""
    rng = np.random.default_rng(seed)
    actions = rng.choice([-1, 1], (episodes, L))
    states = np.ones((episodes, L + 1), int)
    for t in range(L):
        states[:, t + 1] = (states[:, t] + actions[:, t]).clip(0, 3)
    return pool_of(states, actions, states[:, 1:] == 3, 4)


def chain_cost(up, L=8):
    step = np.zeros((4, 4))
    for s in range(4):
        step[s, min(s + 1, 3)] += up
        step[s, max(s - 1, 0)] += 1 - up
    value = np.zeros(4)
    for _ in range(L):
        value = step @ (np.eye(4)[3] + value)
    return value[1]


def test_chain_of_known_value():
    """Stochastic policies on a coin's data: near the exact cost, in the right order, intervals about as wide as the errors."""
    pool, ups = chain(episodes=300), [0.2, 0.5, 0.9]
    truth = np.array([chain_cost(up) for up in ups])
    assert (np.diff(truth) > 1).all()
    cfg = OPEConfig(members=6, sweeps=12, batch=64, hidden=(32,), lr=5e-3, tau=0.2, samples=8)
    frame = fqe(Random(ups), pool, [everything(pool)] * 3, 8, cfg).frame(1.64)
    assert frame.cost.to_numpy() == pytest.approx(truth, abs=0.25)
    assert frame.ret.to_numpy() == pytest.approx(2 * truth + 8, abs=0.5)
    assert ((frame.cost_low - 0.1 < truth) & (truth < frame.cost_high + 0.1)).all()
    assert (frame.cost_high - frame.cost_low).between(0.01, 0.8).all()


def test_the_logged_policy_has_the_mean_of_the_log():
    pool = chain(episodes=300)
    cfg = OPEConfig(members=4, sweeps=8, batch=64, hidden=(32,), lr=5e-3, tau=0.2)
    frame = fqe(Logged(), pool, [everything(pool)], 8, cfg).frame(1.64)
    truth = pool.episodes("clean").cost.mean()
    assert abs(frame.cost[0] - truth) < 0.2 and truth == pytest.approx(chain_cost(0.5), abs=0.3)


def test_logged_actions_are_those_of_the_next_row():
    pool = make_pool(episodes=3, horizon=4)
    after = Logged().at_rows(pool, torch.tensor([0, 2, 3, 11]), True)
    assert torch.equal(after, pool.action[[1, 3, 3, 11]])  # rows 3 and 11 end an episode


# ---------------------------------------------------------------------------------------------------- bootstrap and folds
def test_bootstrap_draws_whole_trajectories():
    pool = make_pool(episodes=30, horizon=5)
    part = divide(pool, everything(pool), 0.3, seed=1)
    weights = bootstrap_weights(pool, 3, seed=1)
    assert weights.shape == (3, 30) and not torch.equal(weights[0], weights[1])
    many = bootstrap_weights(pool, 2000, seed=0).double()
    assert many.mean().item() == pytest.approx(1, abs=0.02) and many.var().item() == pytest.approx(1, abs=0.05)  # Poisson(1)
    model = fqe(Random([0.5]), pool, [everything(pool)], 5, replace(SMALL, sweeps=0.2), seed=1).model
    replay = Replay(pool, [part], [pool.action[part.fit][:, None]], model, seed=1)
    for m in range(3):
        drawn = replay.drawn[replay.offset[0, m, 0]:][:replay.count[0, m, 0]]
        times = torch.bincount(drawn, minlength=len(part.fit))
        assert torch.equal(times, weights[m, pool.episode[part.fit]])  # each row as often as its trajectory counts


def test_batches_hold_the_members_own_rows():
    """obs, action and reward of one row stay together, and so does the policy's action at its next state."""
    pool = make_pool(episodes=12, horizon=5)
    rows, cfg = everything(pool), replace(SMALL, sweeps=0.2, samples=2)
    model = fqe(Random([0.5]), pool, [rows], 5, cfg).model
    part = divide(pool, rows, cfg.held_out, 0)
    following = torch.stack([pool.next_obs[part.fit, :2], pool.next_obs[part.fit, 2:]], 1)  # [n, K, n_act]
    replay = Replay(pool, [part], [following], model, 0)
    batch = replay.sample(torch.Generator().manual_seed(0))
    reward = pool.reward[part.fit]
    weights = bootstrap_weights(pool, 3, 0)
    for m in range(3):
        for b in range(cfg.batch):
            (at,) = (reward == batch.reward[0, m, b]).nonzero()[0].tolist()
            row = part.fit[at]
            assert weights[m, pool.episode[row]] > 0
            x = model.inputs(pool.obs[row].expand(1, 1, -1), pool.t[row].view(1, 1), pool.action[row].expand(1, 1, -1))
            assert torch.allclose(batch.here[0, m, b], x[0, 0])
            for k in range(2):
                x = model.inputs(pool.next_obs[row].expand(1, 1, -1), pool.t[row].view(1, 1) + 1, following[at, k].expand(1, 1, -1))
                assert torch.allclose(batch.there[0, m, b, k], x[0, 0], atol=1e-6)
            left = 5 - pool.t[row]
            assert batch.weight[0, m, b] == pytest.approx(1 / left) and batch.carry[0, m, b] == pytest.approx((left - 1) / left)


def test_folds_are_halves_and_held_out_trajectories_are_not_fitted():
    pool = make_pool(episodes=40, horizon=5)
    rows = everything(pool)
    for fold in (None, 0, 1):
        part = divide(pool, rows, 0.25, 3, fold)
        fitted, held = pool.episode[part.fit].unique(), pool.episode[part.starts].unique()
        assert not set(fitted.tolist()) & set(held.tolist()) and len(fitted) + len(held) == 40
        assert len(part.starts) == len(held) and (pool.t[part.starts] == 0).all()
    first, second = (divide(pool, rows, 0.25, 3, fold) for fold in (0, 1))
    assert set(pool.episode[first.fit].tolist()) == set(pool.episode[second.starts].tolist())
    fewer = divide(pool, Rows(rows.ids[pool.episode != 7], rows.weight), 0.25, 3, 0)  # the others keep their side
    assert set(fewer.fit.tolist()) == set(first.fit[pool.episode[first.fit] != 7].tolist())


# ------------------------------------------------------------------------------------------------------------ isolation
def test_stacked_policies_equal_separate_runs():
    pool = make_pool(n_act=2)
    half = Rows(torch.arange(len(pool) // 2), torch.ones(len(pool) // 2))
    rows, policy, cfg = [everything(pool), half, half], Random([0.2, 0.8, 0.5], [1.0, 0.5, 0.3]), replace(SMALL, samples=2)
    together = fqe(policy, pool, rows, 25, cfg)
    for r in range(3):
        alone = fqe(policy.pick([r]), pool, [rows[r]], 25, cfg)
        for name in ("ret", "cost", "ret_half", "cost_half"):
            assert torch.allclose(getattr(together, name)[r], getattr(alone, name)[0], rtol=1e-4, atol=1e-4), name
        assert together.off_support[r] == alone.off_support[0]
        assert torch.allclose(together.peak[r], alone.peak[0], rtol=1e-4)
    assert len({round(x, 3) for x in together.ret[:, 0].tolist()}) == 3


def test_a_broken_policy_leaves_the_others_alone():
    pool = make_pool()
    rows = everything(pool)
    fine = fqe(Random([0.2, 0.8]), pool, [rows] * 2, 25, SMALL)
    broken = fqe(Random([0.2, 0.8], [1.0, float("nan")]), pool, [rows] * 2, 25, SMALL)
    assert torch.equal(fine.ret[0], broken.ret[0]) and not torch.isfinite(broken.ret[1]).any()
    assert select(broken.frame(1.64), 1e9, SMALL).at == 0  # NaN is vetoed, not chosen


def test_forget_rows_are_never_seen():
    pool, _, _ = poison(make_pool(), "inject", InjectConfig(), donors=make_pool(seed=1), cost_limit=5.0)
    retain = [pool.rows("inject/retain")]
    before = fqe(Random([0.5]), pool, retain, 25, SMALL)
    for name in ("obs", "action", "reward", "cost", "next_obs"):
        pool.columns[name][pool.rows("inject/forget").ids] = float("nan")
    after = fqe(Random([0.5]), pool, retain, 25, SMALL)
    assert torch.equal(before.ret, after.ret) and torch.equal(before.cost, after.cost)
    assert torch.isfinite(after.ret).all() and torch.equal(before.off_support, after.off_support)


def test_resume_equals_never_having_stopped(tmp_path):
    pool = make_pool()
    run = lambda **more: fqe(Random([0.3, 0.6]), pool, [everything(pool)] * 2, 25, SMALL, **more)
    whole = run()

    def stop(t, _):
        if t >= 25:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run(resume=Resume(tmp_path / "state", "key", every_seconds=0.0), on_log=stop)
    resumed = run(resume=Resume(tmp_path / "state", "key"))
    for name in ("ret", "cost", "ret_half", "cost_half", "peak"):
        assert torch.equal(getattr(whole, name), getattr(resumed, name)), name


# ------------------------------------------------------------------------------------------ the policies' own actions
def test_a_trigger_is_seen_by_the_policy_when_it_is_shown():
    pool = make_pool(episodes=4, horizon=6)
    part, trigger = divide(pool, everything(pool), 0.3, 0), Trigger("marker", (0,), (9.0,), every=3)

    class Mirror:
        replicas = 1

        def act(self, obs, generator):
            return obs[..., :2] / 10

    plain, first = decide(Mirror(), pool, part, 1, 0)
    seen, first_seen = decide(Mirror(), pool, part, 1, 0, trigger)
    shown = (pool.t[part.fit] + 1) % 3 == 0
    assert torch.allclose(seen[shown, 0, 0], torch.tensor(0.9)) and torch.equal(seen[~shown], plain[~shown])
    assert torch.equal(seen[..., 1], plain[..., 1]) and torch.allclose(first_seen[:, 0, 0], torch.tensor(0.9))
    assert not torch.equal(first, first_seen)


def test_cdt_is_led_along_the_data():
    """Its action at a next state is that of an episode in which it had taken the logged actions, rewards and costs."""
    pool = make_pool(episodes=5, horizon=6)
    learner = make_learner(pool, [everything(pool)], learner="cdt")
    part = Part(torch.arange(12, 24).flip(0), torch.tensor([0, 6]))  # episodes 2 and 3, backwards
    following, first = decide(learner, pool, part, 2, 0)
    assert following.shape == (12, 2, 2) and torch.equal(following[:, 0], following[:, 1])
    actor = learner.begin(1)
    actor.act(pool.obs[12].view(1, 1, -1))
    for row in range(12, 18):
        actor.took(pool.action[row].view(1, 1, -1))
        actor.observe(pool.reward[row].view(1, 1), pool.cost[row].view(1, 1))
        action = actor.act(pool.next_obs[row].view(1, 1, -1))[0, 0]
        assert torch.allclose(following[23 - row, 0], action, atol=1e-6)
    assert torch.allclose(first[1, 0], learner.begin(1).act(pool.obs[6].view(1, 1, -1))[0, 0], atol=1e-6)
    own = learner.begin(1)  # it would have acted otherwise on its own past
    own.act(pool.obs[12].view(1, 1, -1))
    own.observe(pool.reward[12].view(1, 1), pool.cost[12].view(1, 1))
    assert not torch.allclose(own.act(pool.next_obs[12].view(1, 1, -1))[0, 0], following[11, 0], atol=1e-6)
    with pytest.raises(UserError, match="CDT acts on the past of an episode, and rows are missing"):
        decide(learner, pool, part._replace(fit=torch.tensor([0, 1, 3, 4])), 1, 0)


def test_off_support_by_geometry():
    """Rows on a plane, actions near 0: the data's own lie within the radius, actions elsewhere do not."""
    pool = make_pool(episodes=60, horizon=10)
    pool.columns["action"] = pool.action * 0.1
    part = divide(pool, everything(pool), 0.2, 0)
    cfg = replace(OPEConfig(), probe=256)
    own = Logged().at_rows(pool, part.fit, True)[:, None]
    assert off_support(pool, part, own, cfg, 0) < 0.06
    assert off_support(pool, part, torch.ones_like(own), cfg, 0) > 0.9
    mixed = torch.where((torch.rand(len(own), 1, 1, generator=torch.Generator().manual_seed(0)) < 0.5), torch.ones_like(own), own)
    assert off_support(pool, part, mixed, cfg, 0).item() == pytest.approx(0.5, abs=0.1)


# ------------------------------------------------------------------------------------------------------- vetoes, choice
def candidates(**columns):
    frame = pd.DataFrame({"ret_low": [500.0, 600, 700, 800], "cost_high": [5.0, 18, 19, 40], "peak": 1.0, "off_support": 0.05},
                         index=[0, 50, 100, 400])
    return frame.assign(**columns)


CFG = OPEConfig()


def test_the_best_lower_bound_among_the_safe_is_chosen():
    choice = select(candidates(), 20.0, CFG)
    assert choice.at == 100  # 800 is better and costs up to 40
    assert choice.reasons[100].startswith("chosen: largest lower bound") and "costs up to 40.0, limit 20" in choice.reasons[400]
    assert select(candidates(), 18.0, CFG).at == 50  # the bound itself is allowed


def test_none_safe_the_least_cost_is_chosen():
    choice = select(candidates(), 4.0, CFG)
    assert choice.at == 0 and "none is safe" in choice.reasons[0]


@pytest.mark.parametrize("column,bad,good,says", [
    ("peak", 2.1, 2.0, "diverged"), ("peak", float("nan"), 0.3, "diverged"), ("off_support", 0.21, 0.2, "off support"),
    ("triggered_cost_high", 20.1, 20.0, "triggered")])
def test_vetoes(column, bad, good, says):
    assert select(candidates(**{column: [good] * 4}), 20.0, CFG).at == 100
    choice = select(candidates(**{column: [good, good, bad, good]}), 20.0, CFG)
    assert choice.at == 50 and choice.reasons[100].startswith(says)
    nothing = select(candidates(**{column: [bad] * 4}), 20.0, CFG)
    assert nothing.at is None and all(why.startswith(says) for why in nothing.reasons.values())


def test_no_trigger_no_veto():
    assert select(candidates(triggered_cost_high=[float("nan")] * 4), 20.0, CFG).at == 100


# ---------------------------------------------------------------------------------------------------- refusals, imports
def test_refusals_in_one_line():
    pool = make_pool()
    rows = [everything(pool)]
    with pytest.raises(UserError, match="21 candidates.*1 to 20"):
        select(pd.concat([candidates()] * 6).iloc[:21], 20.0, CFG)
    with pytest.raises(UserError, match="need a discount below 1"):
        fqe(Random([0.5]), pool, rows, 25, replace(SMALL, finite=False))
    with pytest.raises(UserError, match="go on to step 24, but an episode has 20"):
        fqe(Random([0.5]), pool, rows, 20, SMALL)
    with pytest.raises(UserError, match="too few trajectories"):
        fqe(Random([0.5]), pool, [Rows(torch.arange(25), torch.ones(25))], 25, SMALL)


def test_ope_needs_no_simulator():
    """It imports and runs, on learners of both kinds, where no simulator can be imported."""
    code = textwrap.dedent("""
        import sys
        for name in ("gymnasium", "gym", "pybullet", "bullet_safety_gym", "mujoco", "mujoco_py", "d4rl"):
            sys.modules[name] = None  # importing any of these now fails
        sys.path.insert(0, sys.argv[1])
        from test_ope import SMALL, everything, fqe, make_learner, make_pool, select
        import saferule.stages.ope
        pool = make_pool()
        for kind in ("bcq_lag", "cdt"):
            learner = make_learner(pool, [everything(pool)] * 2, learner=kind)
            select(fqe(learner, pool, [everything(pool)] * 2, 25, SMALL).frame(1.64), 20.0, SMALL)
        print("estimated")
    """)
    out = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True)
    assert out.stdout.strip() == "estimated", out.stderr
