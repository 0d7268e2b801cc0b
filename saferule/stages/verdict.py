"""07_verdict: the rollouts and, where there are any, the audits of some tasks and learners become a verdict on one method."""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from ..artifacts import Artifact, load, save
from ..config import configured, resolve
from ..errors import UserError
from ..statistics import later_table, main_table
from ..tasks import Task
from ..verdict import remediation_verdict
from ..verdict_page import markdown


def judge_models(tasks: Sequence[Task], learners: Sequence[str], method: str, profile: str, root: Path,
                 overrides: Mapping[str, Any] | None = None) -> Artifact:
    """The verdict on a method as an artefact 'verdict/<method>'. Files: verdict.json, and verdict.md. As `verdict_of`."""
    started, config = time.monotonic(), resolve(profile, "verdict", tasks[0].name, method=method, overrides=overrides)
    document = verdict_of(tasks, learners, method, profile, root, overrides)
    inputs = {f"{a.kind}:{a.name}": a for a in measured(tasks, learners, root)}
    return save("verdict", method, {"verdict.json": document, "verdict.md": markdown(document)},
                {**config, "tasks": [task.name for task in tasks], "learners": list(learners)}, inputs, root=root,
                seconds=time.monotonic() - started)


def verdict_of(tasks: Sequence[Task], learners: Sequence[str], method: str, profile: str, root: Path,
               overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The verdict on a method over some tasks and learners; writes nothing.

    Every poisoned model of the training runs counts: what has not been repaired, rolled out or audited is not measured.
    overrides: of config.VerdictThresholds; they are part of the verdict. Raises UserError where something that it rests on is
    missing, damaged or was made from other artefacts than the present ones.
    """
    found = measured(tasks, learners, root)
    tidy, later, audits = tables(found)
    if method not in set(tidy["method"]):
        raise UserError(f"no model repaired by '{method}' was rolled out; run notebooks 04_unlearn with -p method {method} and "
                        f"05_evaluate with -p methods {method} first.")
    thresholds = configured("verdict", profile, tasks[0].name, overrides)
    return remediation_verdict(tidy, later, audits, thresholds, method, victims=victims(tasks, learners, root),
                               rests_on=evidence(found, root), profile=profile)


def measured(tasks: Sequence[Task], learners: Sequence[str], root: Path) -> list[Artifact]:
    """The rollouts of each task and learner, and the audits of those that have been audited."""
    names = [f"{task.name}-{learner}" for task, learner in product(tasks, learners)]
    audited = [name for name in names if (root / "artifacts" / "audit" / name).is_dir()]
    return [load("evaluate", name, root) for name in names] + [load("audit", name, root) for name in audited]


def tables(found: Sequence[Artifact]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame | None]:
    """Of `measured` artefacts: tidy tables of the final models and after further training; audits, None where there are none."""
    parts = [(a.table("episodes.csv"), a.table("runs.csv")) for a in found if a.kind == "evaluate"]
    tidy, later = (pd.concat([table(*part) for part in parts], ignore_index=True) for table in (main_table, later_table))
    audits = [a.table("audits.csv") for a in found if a.kind == "audit"]
    return tidy, later, pd.concat(audits, ignore_index=True) if audits else None


def victims(tasks: Sequence[Task], learners: Sequence[str], root: Path) -> pd.DataFrame:
    """Every poisoned model that was trained: task, learner, attack, cost_limit, seed."""
    lines = [{"task": task.name, "learner": learner, **{k: line[k] for k in ("attack", "cost_limit", "seed")}}
             for task, learner in product(tasks, learners) for line in load("train", f"{task.name}-{learner}", root).replicas
             if line["method"] == "poisoned"]
    return pd.DataFrame(lines, columns=["task", "learner", "attack", "cost_limit", "seed"])


def evidence(artifacts: Sequence[Artifact], root: Path) -> list[dict[str, str]]:
    """Kind, name and id of these artefacts and of all that they were made from, every file verified.

    UserError unless each was made from what lies there now: two runs mixed up are no evidence.
    """
    found: dict[tuple[str, str], Artifact] = {}

    def visit(artifact: Artifact) -> None:
        found[artifact.kind, artifact.name] = artifact
        for ref in artifact.manifest["inputs"].values():
            key = ref["kind"], ref["name"]
            if key not in found:
                visit(load(*key, root))
            if found[key].id != ref["id"]:
                raise UserError(f"{artifact.kind} {artifact.name} was made from another {' '.join(key)} than the present one "
                                f"({found[key].short}); run the notebooks that come after it again, in order.")

    for artifact in artifacts:
        visit(artifact)
    return [{"kind": a.kind, "name": a.name, "id": a.id} for a in found.values()]
