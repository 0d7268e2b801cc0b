"""05_evaluate: rollouts of every model of one task and learner. For reporting only; nothing is chosen with them."""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..artifacts import Artifact, load, save
from ..attacks.trigger import Trigger, Triggered, success_rate, trigger_of
from ..config import TRIGGERED_ATTACKS, resolve
from ..errors import UserError
from ..evaluate import evaluate as rollouts
from ..learners import restore, restored_snapshots, stack
from ..tasks import Task
from ..train import Learner
from .poison import load_pool

MODEL = ["task", "learner", "attack", "method", "seed", "cost_limit"]
KEYS = [*MODEL, "stage", "step", "trigger"]


def evaluate(task: Task, learner: str, methods: Sequence[str], profile: str, root: Path,
             overrides: Mapping[str, Any] | None = None, progress: bool = True, suffix: str = "",
             acting_limits: Sequence[float] = ()) -> Artifact:
    """Roll out the trained models, the repaired ones at the end of their budget and later, and snapshots on the way.

    Every policy meets the same start states. Files: episodes.csv (one line per episode), runs.csv (one line per model:
    steps, train_seconds, artefact, gold_steps). suffix: of the names of the artefacts.
    acting_limits: instead, the trained models alone, each under all of these; for learners that take their cost limit when acting.

    Where an attack has a trigger, its final models and the clean ones drive once more under that trigger: in episodes.csv stage
    'triggered', and `trigger` names the attack (empty elsewhere). triggers.csv then has, for each of these models, the share of
    the attack's states at which the trigger draws it to the attacker's action (`success_rate`; empty if the attack forges none).
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
    planted = {} if acting_limits else triggers(task, trained, root)
    drives = [(*side_by_side(part), config[episodes])
              for part, episodes in ((finals, "episodes"), (curves, "curve_episodes")) if part]
    for attack, (_, trigger) in planted.items():
        model, lines = concerned(attack, *drives[0][:2])
        drives.append((Triggered(model, trigger), lines, config["episodes"]))
    frames = [episode_frame(rollouts(policy, task, episodes, seed=config["seed"], progress=progress),
                            [{**head, **line} for line in lines]) for policy, lines, episodes in drives if episodes]
    runs_frame = pd.DataFrame([{**head, **line, "gold_steps": gold_steps} for line in runs])
    files = {"episodes.csv": pd.concat(frames, ignore_index=True),
             "runs.csv": runs_frame[[*MODEL, "steps", "train_seconds", "artefact", "gold_steps"]]}
    if planted:
        rates = [{**head, **line} for attack, plant in planted.items()
                 for line in success_lines(attack, *plant, *concerned(attack, *drives[0][:2]), task, root)]
        files["triggers.csv"] = pd.DataFrame(rates)[[*MODEL, "trigger", "success_rate"]]
    inputs = {"train": trained, **{f"unlearn:{m}": a for m, a in unlearned.items()},
              **{f"poison:{a}": poisoned for a, (poisoned, _) in planted.items()}}
    return save("evaluate", f"{task.name}-{learner}{suffix}", files, config, inputs, root=root, seconds=time.monotonic() - started)


def triggers(task: Task, trained: Artifact, root: Path) -> dict[str, tuple[Artifact, Trigger]]:
    """Attack -> its artefact and trigger, of those attacks in a training run that plant one.

    Raises UserError if an attack was made again since.
    """
    found = {}
    for attack in [a for a in TRIGGERED_ATTACKS if f"poison:{a}" in trained.manifest["inputs"]]:
        poisoned = load("poison", f"{task.name}-{attack}", root)
        if poisoned.id != trained.manifest["inputs"][f"poison:{attack}"]["id"]:
            raise UserError(f"poison {poisoned.name} ({poisoned.short}) is not the one that train {trained.name} learned from; "
                            f"run notebooks/03_train.ipynb again.")
        if trigger := trigger_of(poisoned.json("facts.json")):
            found[attack] = poisoned, trigger
    return found


def concerned(attack: str, model: Learner, lines: Sequence[Mapping[str, Any]]) -> tuple[Learner, list[dict[str, Any]]]:
    """The final models that an attack's trigger is shown to: clean ones and those of the attack; and their lines."""
    at = [i for i, line in enumerate(lines) if line["stage"] == "final" and line["attack"] in ("none", attack)]
    return model.pick(at), [{**lines[i], "stage": "triggered", "trigger": attack} for i in at]


def success_lines(attack: str, poisoned: Artifact, trigger: Trigger, model: Learner, lines: Sequence[Mapping[str, Any]],
                  task: Task, root: Path) -> list[dict[str, Any]]:
    """The lines with success_rate: the share of the attack's states at which a model follows its trigger; None if it forges no
    actions to be followed."""
    rates = [None] * len(lines)
    if "action" in poisoned.json("facts.json")["threat"]["fields"]:
        rates = success_rate(model, load_pool(task, [attack], root)[0], attack, trigger).tolist()
    return [{**line, "success_rate": rate} for line, rate in zip(lines, rates)]


def side_by_side(parts: Sequence[tuple[Learner, Sequence[Mapping[str, Any]]]]) -> tuple[Learner, list[Mapping[str, Any]]]:
    """Several learners and their lines as one."""
    return stack([model for model, _ in parts]), [line for _, lines in parts for line in lines]


def model_lines(artifact: Artifact, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of a replica table with what each model took: its steps, and its share of the stacked run's seconds."""
    took = {"steps": artifact.config["steps"], "train_seconds": artifact.manifest["seconds"] / len(artifact.replicas)}
    return [{**line, **took, "artefact": artifact.short} for line in lines]


def episode_frame(result: Any, lines: Sequence[Mapping[str, Any]], keys: Sequence[str] = KEYS) -> pd.DataFrame:
    """Returns [R, E] as one line per (replica, episode), with these keys of the replicas' lines."""
    R, E = result.ret.shape
    frame = pd.DataFrame([{k: line.get(k, "") for k in keys} for line in lines for _ in range(E)])
    return frame.assign(episode=list(range(E)) * R, ret=result.ret.ravel(), cost=result.cost.ravel(), length=result.length.ravel())
