"""Local data: reproducible, well formed, spread in return and cost, never past the reference maximum."""

import dataclasses
import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from saferule.collect import PLANS, collect, deal, run_episode
from saferule.errors import UserError
from saferule.tasks import TASKS, get_task


def digest(columns):
    return {key: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest() for key, value in columns.items()}


def episodes(columns):
    ends = np.flatnonzero(columns["terminal"] | columns["timeout"]) + 1
    spans = list(zip(np.r_[0, ends[:-1]], ends))
    ret = np.array([columns["reward"][a:b].sum(dtype=np.float64) for a, b in spans])
    cost = np.array([columns["cost"][a:b].sum() for a, b in spans])
    return ret, cost, np.diff(np.r_[0, ends])


def test_same_bytes_whatever_the_workers():
    one = collect("CarRun", 3, seed=5, workers=1, progress=False)
    assert digest(one) == digest(collect("CarRun", 3, seed=5, workers=3, progress=False))
    assert digest(one) == digest(collect("CarRun", 3, seed=5, workers=1, progress=False))
    assert digest(one) != digest(collect("CarRun", 3, seed=6, workers=1, progress=False))
    assert digest(one) != digest(collect("CarRun", 3, seed=5, workers=1, progress=False, mix="risky"))


@pytest.mark.parametrize("name", PLANS)
def test_schema_and_chain(name):
    task = get_task(name)
    d = collect(task, 2, seed=0, workers=1, progress=False)
    n = len(d["reward"])
    assert d["obs"].shape == d["next_obs"].shape == (n, task.n_obs) and d["action"].shape == (n, task.n_act)
    assert all(d[k].shape == (n,) for k in ("reward", "cost", "terminal", "timeout"))
    assert all(d[k].dtype == np.float32 for k in ("obs", "action", "reward", "cost", "next_obs"))
    assert d["terminal"].dtype == d["timeout"].dtype == bool
    assert all(np.isfinite(v).all() for v in d.values())
    assert np.abs(d["action"]).max() <= 1 and set(np.unique(d["cost"])) <= {0, 1}
    ends = d["terminal"] | d["timeout"]
    assert ends.sum() == 2 and ends[-1] and not (d["terminal"] & d["timeout"]).any()
    inside = ~ends[:-1]
    assert np.array_equal(d["next_obs"][:-1][inside], d["obs"][1:][inside])
    _, _, length = episodes(d)
    assert np.all(length[d["timeout"][np.cumsum(length) - 1]] == task.horizon)


def test_all_bullet_tasks_have_controllers_with_quotas_summing_to_one():
    assert set(PLANS) == {t.name for t in TASKS.values() if t.source == "bullet"}
    for _, _, kinds in PLANS.values():
        assert sum(quota for quota, _ in kinds.values()) == pytest.approx(1) and "risky" in kinds


def test_deal_keeps_the_quota():
    quota = {"safe": 0.6, "mid": 0.2, "risky": 0.15, "drift": 0.05}
    dealt = deal(quota, 100, np.random.default_rng(0))
    assert {k: dealt.count(k) for k in quota} == {"safe": 60, "mid": 20, "risky": 15, "drift": 5}
    for n in (1, 2, 7, 33):
        dealt = deal(quota, n, np.random.default_rng(0))
        assert len(dealt) == n and all(abs(dealt.count(k) - q * n) < 1 for k, q in quota.items())
    assert deal(quota, 40, np.random.default_rng(1)) != deal(quota, 40, np.random.default_rng(2))


def test_an_episode_past_the_reference_maximum_is_drawn_again():
    task = get_task("BallRun")
    free = run_episode(task, "risky", (0, 0, 0, 0))["reward"].sum()
    capped = dataclasses.replace(task, return_max=float(free) - 1)
    assert run_episode(capped, "risky", (0, 0, 0, 0))["reward"].sum() <= capped.return_max


def spread(name, n):
    task = get_task(name)
    ret, cost, _ = episodes(collect(task, n, seed=0, progress=False))
    assert np.mean(cost <= 20) >= 0.25 and np.mean(cost > 40) >= 0.25
    assert ret.max() <= task.return_max
    assert ret.max() > 0.5 * task.return_max or task.extended
    safe, risky = ret[cost <= 20].max(), ret[cost > 40].max()
    assert safe > 0.25 * task.return_max and risky > safe * 0.9


@pytest.mark.parametrize("name", ["BallRun", "BallCircle"])
def test_spread(name):
    spread(name, 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PLANS if not name.startswith("Ball")])
def test_spread_of_the_slower_tasks(name):
    spread(name, 100)


def test_risky_mix_is_risky():
    _, cost, _ = episodes(collect("BallCircle", 6, seed=0, mix="risky", progress=False))
    assert cost.min() > 20


def test_bad_input():
    with pytest.raises(UserError, match="HopperVelocity has no local controllers"):
        collect("HopperVelocity", 3, seed=0)
    with pytest.raises(UserError, match="unknown mix 'wild'; known: default, risky"):
        collect("BallRun", 3, seed=0, mix="wild")
    with pytest.raises(UserError, match="at least 1 episode"):
        collect("BallRun", 0, seed=0)


@pytest.mark.skipif(sys.platform != "linux", reason="relies on Linux's parent-death signal")
def test_a_killed_collection_leaves_no_process_behind():
    """kill -9 of the process that collects also ends the processes that simulate."""
    code = "from saferule.collect import collect; collect('CarCircle', 400, 0, workers=2, progress=False)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    workers: list[str] = []
    for _ in range(600):
        time.sleep(0.05)
        if len(workers := children.read_text().split()) == 2:
            break
    assert len(workers) == 2
    time.sleep(0.5)                                                            # past the fork, in the simulator
    parent.kill()
    parent.wait()
    for _ in range(200):
        if not any(Path(f"/proc/{pid}").exists() for pid in workers):
            return
        time.sleep(0.05)
    raise AssertionError(f"still running: {workers}")
