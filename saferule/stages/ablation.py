"""13_ablation: Safe-RULE with one part changed at a time, from the same poisoned models; and how all of these drive."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..artifacts import Artifact, load, plain, save
from ..config import ABLATIONS, ablated, resolve
from ..evaluate import evaluate as rollouts
from ..learners import restore, restored_snapshots
from ..tasks import Task
from . import is_current
from .evaluate import MODEL, episode_frame, model_lines, side_by_side
from .unlearn import unlearn

METHOD = "saferule"


def ablate(task: Task, learner: str, attacks: Sequence[str], seeds: Sequence[int], profile: str, root: Path, device: str = "cpu",
           overrides: Mapping[str, Any] | None = None, progress: Callable = iter) -> dict[str, Artifact]:
    """Variant of ABLATIONS -> its 'unlearn' artefact <task>-<learner>-saferule+<variant>, in their order.

    The full method is 04's own artefact, if that comes from the present training run and has these settings.
    overrides: settings of every variant. progress: wraps the list of variants.
    """
    made = {}
    for variant in progress(list(ABLATIONS)):
        settings = ablated(variant, profile, task.name, overrides)
        config = resolve(profile, "unlearn", task.name, learner, attacks, METHOD, seeds, settings)
        made[variant] = (known(task, learner, config, root) if variant == "full" else None) or unlearn(
            task, learner, attacks, METHOD, seeds, profile, root, device, settings, suffix=f"+{variant}")
    return made


def known(task: Task, learner: str, config: Mapping[str, Any], root: Path) -> Artifact | None:
    """04's artefact of the method, if it comes from the present training run and has exactly these settings."""
    name, trained = f"{task.name}-{learner}-{METHOD}", load("train", f"{task.name}-{learner}", root)
    found = load("unlearn", name, root) if is_current("unlearn", name, root, train=trained) else None
    return found if found and found.config == plain(config) else None


def evaluate_ablation(task: Task, learner: str, variants: Mapping[str, Artifact], profile: str, root: Path,
                      overrides: Mapping[str, Any] | None = None, progress: bool = True) -> Artifact:
    """Roll out every variant at the end of its budget and after as many ordinary steps, and the models that they are compared with.

    The artefact <task>-<learner>+ablation, with the files of `evaluate` and a column `variant`: 'none' for the clean, the poisoned
    and the retrained models. For reporting only.
    """
    started, config = time.monotonic(), resolve(profile, "evaluate", task.name, learner, overrides=overrides)
    trained = load("train", f"{task.name}-{learner}", root)
    repaired = next(iter(variants.values())).replicas
    attacks, seeds = {"none", *(line["attack"] for line in repaired)}, {line["seed"] for line in repaired}
    at = [i for i, line in enumerate(trained.replicas) if line["attack"] in attacks and line["seed"] in seeds]
    lines = [{**trained.replicas[i], "variant": "none"} for i in at]
    runs = model_lines(trained, lines)
    parts = [(restore(trained, task).pick(at), [{**line, "stage": "final", "step": trained.config["steps"]} for line in lines])]
    for variant, artifact in variants.items():
        snapshots, budget = restored_snapshots(artifact, trained, task), artifact.config["steps"]
        lines = [{**line, "variant": variant} for line in artifact.replicas]
        runs += model_lines(artifact, lines)
        parts += [(snapshots[step], [{**line, "stage": stage, "step": step} for line in lines])
                  for stage, step in (("final", budget), ("later", 2 * budget))]
    (model, lines), head = side_by_side(parts), {"task": task.name, "learner": learner}
    result = rollouts(model, task, config["episodes"], seed=config["seed"], progress=progress)
    episodes = episode_frame(result, [{**head, **line} for line in lines], [*MODEL, "variant", "stage", "step"])
    took = pd.DataFrame([{**head, **line} for line in runs])[[*MODEL, "variant", "steps", "train_seconds", "artefact"]]
    inputs = {"train": trained, **{f"unlearn:{variant}": artifact for variant, artifact in variants.items()}}
    return save("evaluate", f"{task.name}-{learner}+ablation", {"episodes.csv": episodes, "runs.csv": took}, config, inputs,
                root=root, seconds=time.monotonic() - started)
