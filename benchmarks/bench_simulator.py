"""Speed and memory of collection and evaluation: `python benchmarks/bench_simulator.py [--episodes N] [--workers W]`.

Prints one line per task: steps per second of collection with its controllers, then of 9 policies x 10 episodes with a
learner of the quick profile's size; peak memory of this process and of its largest child.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from saferule import simulator
from saferule.collect import PLANS, collect
from saferule.config import BCQLagConfig
from saferule.evaluate import evaluate
from saferule.learners.bcq_lag import BCQLag
from saferule.tasks import get_task
from saferule.train import Units


def learner(task, R: int) -> BCQLag:
    units = Units(torch.zeros(R, task.n_obs), torch.ones(R, task.n_obs), torch.ones(R))
    return BCQLag(BCQLagConfig(), units, torch.zeros(R), list(range(R)), n_act=task.n_act).ready()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=40, help="collected per task")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--tasks", nargs="*", default=list(PLANS))
    args = parser.parse_args()
    print(f"{args.workers or simulator.cores()} processes")
    for name in args.tasks:
        task = get_task(name)
        start = time.perf_counter()
        steps = len(collect(task, args.episodes, seed=0, workers=args.workers, progress=False)["reward"])
        collected = time.perf_counter() - start
        start = time.perf_counter()
        played = evaluate(learner(task, 9), task, 10, workers=args.workers, progress=False).length.sum()
        evaluated = time.perf_counter() - start
        print(f"{name:12s} collect {args.episodes} episodes {collected:6.1f} s {steps / collected:7.0f} steps/s   "
              f"evaluate 9 x 10 {evaluated:6.1f} s {played / evaluated:7.0f} steps/s", flush=True)
    for who, label in ((resource.RUSAGE_SELF, "this process"), (resource.RUSAGE_CHILDREN, "largest child")):
        print(f"peak memory of {label}: {resource.getrusage(who).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
