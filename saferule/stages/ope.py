"""14_off_policy: estimates of return and cost of every model, from the logged rows that its defender may use."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..artifacts import Artifact, load, save
from ..attacks.trigger import trigger_of
from ..config import OPEConfig, resolve, with_overrides
from ..errors import UserError
from ..learners import restore, restored_snapshots, stack
from ..ope import fqe, quiet
from ..tasks import Task
from ..train import Learner, Resume, prepare_process
from .poison import check_same_data, load_pool
from .train import rows_of

KEYS = ["task", "learner", "attack", "method", "seed", "cost_limit", "stage", "step", "fold"]
Models = list[tuple[Learner, list[dict[str, Any]]]]


def estimate(task: Task, learner: str, methods: Sequence[str], profile: str, root: Path, device: str = "cpu",
             overrides: Mapping[str, Any] | None = None, **more: Any) -> Artifact:
    """Estimates of the trained models and of the repaired ones at the end of their budget: ope/<task>-<learner>."""
    trained, unlearned = _loaded(task, learner, methods, root)
    end = {"stage": "final", "step": trained.config["steps"]}
    models: Models = [(restore(trained, task), [{**line, **end} for line in trained.replicas])]
    for artifact in unlearned.values():
        end = {"stage": "final", "step": artifact.config["steps"]}
        models.append((restored_snapshots(artifact, trained, task)[end["step"]], [{**line, **end} for line in artifact.replicas]))
    name = f"{task.name}-{learner}"
    return _made(task, learner, name, models, (-1,), trained, unlearned, profile, root, device, overrides, **more)


def candidates(task: Task, learner: str, method: str, profile: str, root: Path, device: str = "cpu",
               overrides: Mapping[str, Any] | None = None, attacks: Sequence[str] = (), seeds: Sequence[int] = (),
               **more: Any) -> Artifact:
    """Two estimates, from one half of the trajectories each, of every snapshot within the budget of one method.

    `ope.select` chooses by fold 0 among the steps of one attack and seed; fold 1 tells what the chosen one is worth. attacks,
    seeds: some of the models only. The artefact: ope/<task>-<learner>-<method>.
    """
    trained, unlearned = _loaded(task, learner, (method,), root)
    artifact, models = unlearned[method], []
    wanted = [i for i, x in enumerate(artifact.replicas) if x["attack"] in (attacks or [x["attack"]])
              and x["seed"] in (seeds or [x["seed"]])]
    if not wanted:
        raise UserError(f"unlearn {artifact.name} holds no model of attacks {list(attacks)} and seeds {list(seeds)}.")
    for step, model in restored_snapshots(artifact, trained, task).items():
        if step <= artifact.config["steps"]:
            models.append((model.pick(wanted), [{**artifact.replicas[i], "stage": "curve", "step": step} for i in wanted]))
    name = f"{task.name}-{learner}-{method}"
    return _made(task, learner, name, models, (0, 1), trained, unlearned, profile, root, device, overrides, **more)


def _loaded(task: Task, learner: str, methods: Sequence[str], root: Path) -> tuple[Artifact, dict[str, Artifact]]:
    trained = load("train", f"{task.name}-{learner}", root)
    unlearned = {m: load("unlearn", f"{task.name}-{learner}-{m}", root) for m in methods}
    for method, artifact in unlearned.items():
        if artifact.manifest["inputs"]["train"]["id"] != trained.id:
            raise UserError(f"unlearn {artifact.name} was made from another training run than the present {trained.name}; "
                            f"run notebooks/04_unlearn.ipynb with method='{method}' again.")
    return trained, unlearned


def _made(task: Task, learner: str, name: str, models: Models, folds: Sequence[int], trained: Artifact,
          unlearned: Mapping[str, Artifact], profile: str, root: Path, device: str, overrides: Mapping[str, Any] | None,
          progress: Callable = quiet, on_log: Callable | None = None) -> Artifact:
    """Files: estimates.csv (KEYS and `Estimates.frame`; fold -1: no fold), members.safetensors (ret, cost [lines, M]).

    triggered_cost and its bounds: with the trigger in the policy's observations, where its attack has one.
    """
    prepare_process()
    started, config = time.monotonic(), resolve(profile, "ope", task.name, learner, overrides=overrides)
    cfg = with_overrides(OPEConfig(), {k: v for k, v in config.items() if k in OPEConfig.__dataclass_fields__}, "ope")
    attacks = trained.config["attacks"]
    pool, inputs = load_pool(task, attacks, root)
    check_same_data(trained, inputs["data"])
    pool = pool.to(device)
    lines = [{"task": task.name, "learner": learner, **line} for _, own in models for line in own]
    known = {a: trigger_of(inputs[f"poison:{a}"].json("facts.json")) for a in attacks}
    shown = [i for i, line in enumerate(lines) if known.get(line["attack"])]               # these a second time, under the trigger
    asked = [*range(len(lines)), *shown]
    policy = stack([model for model, _ in models]).to(device).pick(asked)
    rows = rows_of(pool, ["clean" if lines[i]["attack"] == "none" else f"{lines[i]['attack']}/retain" for i in asked])
    triggers = [None] * len(lines) + [known[lines[i]["attack"]] for i in shown]
    inputs = {"train": trained, **{f"unlearn:{m}": a for m, a in unlearned.items()}, **inputs}
    frames, members = [], {"ret": [], "cost": []}
    for fold in folds:
        resume = Resume.beside(root, f"ope-{name}-{fold}", {**config, "lines": lines, "fold": fold}, inputs)
        found = fqe(policy, pool, rows, task.horizon, cfg, config["seed"], triggers, fold=None if fold < 0 else fold, resume=resume,
                    progress=progress, on_log=on_log)
        frame, R = found.frame(cfg.z), len(lines)
        for column in ("cost", "cost_low", "cost_high") if shown else ():
            frame[f"triggered_{column}"] = pd.Series(frame[column].to_numpy()[R:], index=shown)
        frames.append(pd.concat([pd.DataFrame(lines).assign(fold=fold)[KEYS], frame.iloc[:R]], axis=1))
        for key, values in members.items():
            values.append(getattr(found, key)[:R].cpu())
        resume.done()
    files = {"estimates.csv": pd.concat(frames, ignore_index=True),
             "members.safetensors": {key: torch.cat(values) for key, values in members.items()}}
    return save("ope", name, files, config, inputs, root=root, seconds=time.monotonic() - started)
