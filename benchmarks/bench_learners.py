"""Milliseconds per replica-step of training and unlearning at the quick profile's sizes: `python benchmarks/bench_learners.py`.

One process, one torch thread. Prints one line per (what, R): the median over repetitions, and the ratio to R = 1. With
`--osrl PATH` instead one line per (learner, mode, R) beside OSRL's learner of the same sizes, in turns with it: OSRL's own
`train_one_step` on a ready-made batch; ours draws its batches. OSRL's critics have as many nets as our parity mode's.
"""
from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record_osrl import load_osrl

from saferule.config import LEARNER_NAMES, UNLEARNER_NAMES, configured
from saferule.data import Pool, Rows, measure_units
from saferule.learners import LEARNERS, discounted_limit
from saferule.tasks import get_task
from saferule.train import Learner, prepare_process
from saferule.unlearning import UNLEARNERS, Memory, missing_losses

LIMIT = 20.0                           # per episode
NAMES = [name for i, name in enumerate(LEARNER_NAMES) if LEARNERS[name] not in map(LEARNERS.get, LEARNER_NAMES[:i])]   # no presets


def pool_of(task, rows: int) -> Pool:
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(rows + 1, task.n_obs)).astype(np.float32)
    return Pool.from_columns({
        "obs": obs[:-1], "next_obs": obs[1:], "action": rng.uniform(-1, 1, (rows, task.n_act)).astype(np.float32),
        "reward": rng.uniform(0, 1, rows), "cost": rng.random(rows) < 0.2, "terminal": np.zeros(rows, bool),
        "timeout": np.arange(rows) % task.horizon == task.horizon - 1})


def milliseconds(sides: Sequence[Callable[[int], Any]], repetitions: int, steps: int = 20) -> list[float]:
    """Per step of each side, the median over its turns."""
    for step in sides:
        for t in range(5):
            step(t)
    out: list[list[float]] = [[] for _ in sides]
    for _ in range(repetitions):
        for step, took in zip(sides, out):
            start = time.perf_counter()
            for t in range(steps):
                step(t)
            took.append((time.perf_counter() - start) / steps * 1e3)
    return [statistics.median(took) for took in out]


def osrl_step(path: Path, name: str, cfg: Any, task: Any, batch: Any) -> Callable[[int], None]:
    """One update of OSRL's learner of that name, on the first replica of one of our batches."""
    sizes, hidden = (task.n_obs, task.n_act, 1.0), list(getattr(cfg, "hidden", ()))
    episode = {"cost_limit": LIMIT, "episode_len": task.horizon}
    b = type(batch)(*(x[0] if isinstance(x, torch.Tensor) else x for x in batch))
    if name in ("bcq_lag", "bear_lag", "cpq"):
        kind = {"bcq_lag": "BCQL", "bear_lag": "BEARL", "cpq": "CPQ"}[name]
        more = {"start_update_policy_step": 0, "num_samples_mmd_match": cfg.match_samples} if name == "bear_lag" else {}
        module = load_osrl(path, f"algorithms.{kind.lower()}")
        model = getattr(module, kind)(*sizes, hidden, hidden, cfg.vae_hidden, cfg.samples, num_q=cfg.heads, num_qc=cfg.heads,
                                      **episode, **more)
        rows = b.obs, b.next_obs, b.action, b.reward, b.cost, b.done
    elif name == "coptidice":
        kind, module = "COptiDICE", load_osrl(path, "algorithms.coptidice")
        spread = np.ones((1, task.n_obs), np.float32), np.ones((1, task.n_act), np.float32)
        model = module.COptiDICE(*sizes, cfg.divergence, 1 / task.horizon, *spread, hidden, hidden, cfg.gamma, cfg.alpha,
                                 cfg.kl_limit, cfg.heads, cfg.heads, **episode)
        rows = ((b.obs, b.next_obs, b.action, b.reward, b.cost, b.done, b.first),)
    elif name == "cdt":
        kind, module = "CDT", load_osrl(path, "algorithms.cdt")
        model = module.CDT(*sizes, cfg.context, task.horizon, cfg.width, cfg.layers, cfg.attention_heads, cfg.dropout, cfg.dropout,
                           cfg.dropout, use_rew=True, use_cost=True, cost_transform=True, stochastic=True,
                           target_entropy=-task.n_act)
        rows = b.obs, b.action, b.ret, b.cost_to_go, b.t, b.mask, None, b.cost
    else:
        kind, module = "BC", load_osrl(path, "algorithms.bc")
        model, rows = module.BC(*sizes, hidden, task.horizon), (b.obs, b.action)
    trainer = getattr(module, kind + "Trainer")(model, env=None)
    return lambda t: trainer.train_one_step(*rows)


def made(name: str, task: Any, pool: Pool, R: int, **overrides: Any) -> tuple[Learner, list[Rows]]:
    """R replicas at the quick profile's sizes, each on the retain rows, past the steps in which only a part of it trains."""
    settings = {k: 0 for k in ("vae_steps", "actor_start") if hasattr(configured(name, "quick", task.name), k)}
    cfg = configured(name, "quick", task.name, {**settings, **overrides})
    rows = LEARNERS[name].select_rows(pool, [pool.rows("given/retain")] * R, cfg, [1e9] * R)
    units = measure_units(pool, rows)
    limit = torch.full((R,), discounted_limit(LIMIT, cfg.gamma, task.horizon))
    learner = LEARNERS[name](cfg, units, limit, list(range(R)), task.n_act, task.horizon).ready()
    learner.measure(pool, rows)
    learner.seed_noise(0)
    return learner, rows


def training(learner: Learner, pool: Pool, rows: list[Rows]) -> Callable[[int], Any]:
    sampler, stream = learner.sampler(pool, rows), torch.Generator().manual_seed(0)
    return lambda t: learner.update(sampler.sample(stream), t)


def beside_osrl(path: Path, task: Any, pool: Pool, replicas: Sequence[int], repetitions: int) -> None:
    for name in NAMES:
        for mode in ("parity", "default"):
            for R in replicas:
                learner, rows = made(name, task, pool, R, mode=mode)
                batch = learner.sampler(pool, rows).sample(torch.Generator().manual_seed(0))
                theirs = osrl_step(path, name, learner.cfg, task, batch)
                ours, osrl = milliseconds([training(learner, pool, rows), theirs], repetitions)
                print(f"{name:10s} {mode:8s} R={R:<3d} {ours / R:6.2f} ms per replica-step   OSRL {osrl:6.2f} ms   "
                      f"{osrl * R / ours:5.2f} x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="*", help="default: 1 3 9 15, beside OSRL 1 9")
    parser.add_argument("--osrl", type=Path, help="a checkout of OSRL to compare with")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rows", type=int, default=100_000)
    args = parser.parse_args()
    prepare_process()
    task = get_task("BallCircle")
    pool = pool_of(task, args.rows)
    forget = Rows(torch.arange(args.rows // 10), torch.ones(args.rows // 10))
    pool = pool.append("given", {}, forget)
    if args.osrl:
        return beside_osrl(args.osrl, task, pool, args.replicas or [1, 9], args.repetitions)
    replicas = args.replicas or [1, 3, 9, 15]
    for name in NAMES:
        for what in ("training", *(m for m in UNLEARNER_NAMES if not missing_losses(m, LEARNERS[name]))):
            base = None
            for R in replicas:
                learner, rows = made(name, task, pool, R)
                if what == "training":
                    step = training(learner, pool, rows)
                else:
                    memory = Memory(learner, pool, rows, [forget] * R, 0, n_step=10)
                    learner.update(memory.retain(), 0)                     # optimiser state exists, as after training
                    phase = next(iter(UNLEARNERS[what].phases(learner, memory, configured(what, "quick", task.name), [True] * R)))
                    step = phase.step
                (took,) = milliseconds([step], args.repetitions)
                took /= R
                base = base or took
                ratio = f"{base / took:4.2f} x R={replicas[0]}"
                print(f"{name:10s} {what:16s} R={R:<3d} {took:6.2f} ms per replica-step   {ratio}", flush=True)
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
