"""Milliseconds per replica-step of training and unlearning at the quick profile's sizes: `python benchmarks/bench_learners.py`.

One process, one torch thread. Prints one line per (what, R): the median over repetitions, and the ratio to R = 1.
"""
from __future__ import annotations

import argparse
import resource
import statistics
import time

import numpy as np
import torch

from saferule.config import LEARNER_NAMES, UNLEARNER_NAMES, configured
from saferule.data import Pool, Rows, Sampler, measure_units
from saferule.learners import LEARNERS, discounted_limit
from saferule.tasks import get_task
from saferule.train import prepare_process
from saferule.unlearning import UNLEARNERS, Memory, missing_losses


def pool_of(task, rows: int) -> Pool:
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(rows + 1, task.n_obs)).astype(np.float32)
    return Pool.from_columns({
        "obs": obs[:-1], "next_obs": obs[1:], "action": rng.uniform(-1, 1, (rows, task.n_act)).astype(np.float32),
        "reward": rng.uniform(0, 1, rows), "cost": rng.random(rows) < 0.2, "terminal": np.zeros(rows, bool),
        "timeout": np.arange(rows) % task.horizon == task.horizon - 1})


def milliseconds(step, repetitions: int, steps: int = 20) -> float:
    for t in range(5):
        step(t)
    out = []
    for _ in range(repetitions):
        start = time.perf_counter()
        for t in range(steps):
            step(t)
        out.append((time.perf_counter() - start) / steps * 1e3)
    return statistics.median(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, 3, 9, 15])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rows", type=int, default=100_000)
    args = parser.parse_args()
    prepare_process()
    task = get_task("BallCircle")
    pool = pool_of(task, args.rows)
    forget = Rows(torch.arange(args.rows // 10), torch.ones(args.rows // 10))
    pool = pool.append("given", {}, forget)
    for name in LEARNER_NAMES:
        for what in ("training", *(m for m in UNLEARNER_NAMES if not missing_losses(m, LEARNERS[name]))):
            base = None
            for R in args.replicas:
                cfg = configured(name, "quick", task.name, {"vae_steps": 0} if "vae" in LEARNERS[name].LOSSES else {})
                rows = LEARNERS[name].select_rows(pool, [pool.rows("given/retain")] * R, cfg, [1e9] * R)
                units = measure_units(pool, rows)
                limit = torch.full((R,), discounted_limit(20.0, cfg.gamma, task.horizon))
                learner = LEARNERS[name](cfg, units, limit, list(range(R)), n_act=task.n_act).ready()
                learner.seed_noise(0)
                if what == "training":
                    sampler, stream = Sampler(pool, rows, cfg.batch, units), torch.Generator().manual_seed(0)
                    step = lambda t, m=learner, s=sampler, g=stream: m.update(s.sample(g), t)
                else:
                    memory = Memory(learner, pool, rows, [forget] * R, 0, n_step=10)
                    learner.update(memory.retain(), 0)                     # optimiser state exists, as after training
                    phase = next(iter(UNLEARNERS[what].phases(learner, memory, configured(what, "quick", task.name), [True] * R)))
                    step = phase.step
                took = milliseconds(step, args.repetitions) / R
                base = base or took
                ratio = f"{base / took:4.2f} x R={args.replicas[0]}"
                print(f"{name:10s} {what:16s} R={R:<3d} {took:6.2f} ms per replica-step   {ratio}", flush=True)
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
