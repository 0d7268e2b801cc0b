"""11_learners and 12_cost_limits: learners on clean data, trained and rolled out on the spot where that has not been done."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..artifacts import Artifact, load
from ..learners import restore
from ..tasks import Task
from . import is_current
from .evaluate import evaluate
from .train import train


class CleanRun(NamedTuple):
    trained: Artifact
    evaluated: Artifact


def clean_run(task: Task, learner: str, seeds: Sequence[int], profile: str, root: Path, device: str = "cpu",
              progress: Callable = iter) -> CleanRun:
    """A learner on clean data with these seeds; its models may stand among others in the artefacts."""
    name, data = f"{task.name}-{learner}", load("data", task.name, root)
    trained = load("train", name, root) if is_current("train", name, root, data=data) else None
    if trained is None or not set(seeds) <= {line["seed"] for line in trained.replicas if line["method"] == "clean"}:
        trained = train(task, learner, (), seeds, profile, root, device, progress=progress)
    known = is_current("evaluate", name, root, train=trained)
    return CleanRun(trained, load("evaluate", name, root) if known else evaluate(task, learner, (), profile, root, progress=False))


def limits_run(task: Task, learner: str, cost_limits: Sequence[float], seeds: Sequence[int], profile: str, root: Path,
               device: str = "cpu", progress: Callable = iter) -> CleanRun:
    """A learner under several cost limits per episode: one stacked run for all; or the clean run's, if the limit is set in acting.

    The evaluation is called <task>-<learner>-limits.
    """
    trained, kind = clean_run(task, learner, seeds, profile, root, device, progress).trained, {"suffix": "-limits"}
    if restore(trained, task).limit_when_acting:
        kind["acting_limits"] = tuple(cost_limits)
    else:
        trained = train(task, learner, (), seeds, profile, root, device, progress=progress, cost_limits=cost_limits, **kind)
    return CleanRun(trained, evaluate(task, learner, (), profile, root, progress=False, **kind))
