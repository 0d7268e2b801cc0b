"""05_evaluate: rollouts of every model of one task and learner. For reporting only; nothing is chosen with them."""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..artifacts import Artifact, load, save
from ..config import resolve
from ..errors import UserError
from ..evaluate import evaluate as rollouts
from ..learners import restore, restored_snapshots, stack
from ..tasks import Task

KEYS = ["task", "learner", "attack", "method", "seed", "cost_limit", "stage", "step"]


def evaluate(task: Task, learner: str, methods: Sequence[str], profile: str, root: Path,
             overrides: Mapping[str, Any] | None = None, progress: bool = True, suffix: str = "",
             acting_limits: Sequence[float] = ()) -> Artifact:
    """Roll out the trained models, the repaired ones at the end of their budget and later, and snapshots on the way.

    Every policy meets the same start states. Files: episodes.csv (one line per episode), runs.csv (one line per model:
    steps, train_seconds, artefact, gold_steps). suffix: of the names of the artefacts.
    acting_limits: instead, the trained models alone, each under all of these; for learners that take their cost limit when acting.
    """
    started, config = time.monotonic(), resolve(profile, "evaluate", task.name, learner, overrides=overrides)
    trained = load("train", f"{task.name}-{learner}{'' if acting_limits else suffix}", root)
    config["cost_limit"] = trained.config["cost_limit"]
    unlearned = {m: load("unlearn", f"{task.name}-{learner}-{m}", root) for m in methods}
    for method, artifact in unlearned.items():
        if artifact.manifest["inputs"]["train"]["id"] != trained.id:
            raise UserError(f"unlearn {artifact.name} was made from another training run than the present {trained.name}; "
                            f"run notebooks/04_unlearn.ipynb with method='{method}' again.")
    gold_steps, head = trained.config["steps"], {"task": task.name, "learner": learner}
    model, lines, curves = restore(trained, task), trained.replicas, []
    if acting_limits:
        models = [model.at_limit([limit] * model.replicas) for limit in acting_limits]
        model, lines = stack(models), [{**line, "cost_limit": limit} for limit in acting_limits for line in lines]
    finals = [(model, [{**line, "stage": "final", "step": gold_steps} for line in lines])]
    if trained.config.get("learning_curve") and not acting_limits:
        for step, model in restored_snapshots(trained, trained, task).items():
            curves.append((model, [{**line, "stage": "curve", "step": step} for line in trained.replicas]))
    runs = model_lines(trained, lines)
    for artifact in unlearned.values():
        budget = artifact.config["steps"]
        for step, model in restored_snapshots(artifact, trained, task).items():
            stage = {budget: "final", 2 * budget: "later"}.get(step)
            lines = [{**line, "step": step} for line in artifact.replicas]
            curves.append((model, [{**line, "stage": "curve"} for line in lines]))
            if stage:
                finals.append((model, [{**line, "stage": stage} for line in lines]))
        runs += model_lines(artifact, artifact.replicas)
    frames = []
    for part, episodes in ((finals, config["episodes"]), (curves, config["curve_episodes"])):
        if part and episodes:
            model, lines = stack([m for m, _ in part]), [line for _, more in part for line in more]
            result = rollouts(model, task, episodes, seed=config["seed"], progress=progress)
            frames.append(episode_frame(result, [{**head, **line} for line in lines]))
    runs_frame = pd.DataFrame([{**head, **line, "gold_steps": gold_steps} for line in runs])
    keep = ["task", "learner", "attack", "method", "seed", "cost_limit", "steps", "train_seconds", "artefact", "gold_steps"]
    files = {"episodes.csv": pd.concat(frames, ignore_index=True), "runs.csv": runs_frame[keep]}
    inputs = {"train": trained, **{f"unlearn:{m}": a for m, a in unlearned.items()}}
    return save("evaluate", f"{task.name}-{learner}{suffix}", files, config, inputs, root=root, seconds=time.monotonic() - started)


def model_lines(artifact: Artifact, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of a replica table with what each model took: its steps, and its share of the stacked run's seconds."""
    took = {"steps": artifact.config["steps"], "train_seconds": artifact.manifest["seconds"] / len(artifact.replicas)}
    return [{**line, **took, "artefact": artifact.short} for line in lines]


def episode_frame(result: Any, lines: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Returns [R, E] as one line per (replica, episode)."""
    R, E = result.ret.shape
    frame = pd.DataFrame([{k: line[k] for k in KEYS} for line in lines for _ in range(E)])
    return frame.assign(episode=list(range(E)) * R, ret=result.ret.ravel(), cost=result.cost.ravel(), length=result.length.ravel())
