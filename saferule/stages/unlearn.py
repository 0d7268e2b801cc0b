"""04_unlearn: one method repairs the poisoned models of every attack and seed, as one stacked run."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ..artifacts import Artifact, load, save
from ..config import CONFIGS, CURVE, resolve, with_overrides
from ..errors import UserError
from ..learners import restore
from ..tasks import Task
from ..train import Resume, prepare_process
from ..unlearning import unlearn as run_unlearning
from .poison import check_same_data, load_pool
from .train import rows_of


def unlearn(task: Task, learner: str, attacks: Sequence[str], method: str, seeds: Sequence[int], profile: str, root: Path,
            device: str = "cpu", overrides: Mapping[str, Any] | None = None, progress: Callable = iter,
            on_log: Callable | None = None, suffix: str = "") -> Artifact:
    """Unlearn the forget rows of each attack from its poisoned models.

    Files: state.safetensors (weights at the end of the budget), snapshots.safetensors ('<step>/<name>', along the budget and
    as many further ordinary steps on the retain rows), history.csv. No simulator is used, nor needed. The artefact is called
    <task>-<learner>-<method><suffix>.
    """
    prepare_process()
    name = f"{task.name}-{learner}-{method}{suffix}"
    config = resolve(profile, "unlearn", task.name, learner, attacks, method, seeds, overrides)
    trained = load("train", f"{task.name}-{learner}", root)
    pool, inputs = load_pool(task, attacks, root)
    check_same_data(trained, inputs["data"])
    found = [i for i, line in enumerate(trained.replicas) if line["method"] == "poisoned"]
    victims = [i for a in attacks for i in found if trained.replicas[i]["attack"] == a and trained.replicas[i]["seed"] in seeds]
    lines = [trained.replicas[i] for i in victims]
    there = {(line["attack"], line["seed"]) for line in lines}
    if missing := [pair for pair in product(attacks, seeds) if pair not in there]:
        raise UserError(f"train {trained.name} holds no model poisoned by '{missing[0][0]}' with seed {missing[0][1]}; "
                        f"run notebooks/03_train.ipynb with these attacks and seeds first.")
    model = restore(trained, task, device).pick(victims)
    table = [{"attack": line["attack"], "method": method, "condition": f"{line['attack']}/retain", "seed": line["seed"],
              "cost_limit": line["cost_limit"]} for line in lines]
    pool = pool.to(device)
    cfg = with_overrides(CONFIGS[method], {k: v for k, v in config.items() if k in CONFIGS[method].__dataclass_fields__}, method)
    forged = ["cost" in inputs[f"poison:{a}"].json("facts.json")["threat"]["fields"] for a in (line["attack"] for line in lines)]
    resume = Resume.beside(root, f"unlearn-{name}", config, {"train": trained, **inputs})
    retain = model.select_rows(pool, rows_of(pool, [line["condition"] for line in table]), model.cfg,
                               [line["cost_limit"] for line in table])
    done = run_unlearning(
        model, pool, retain, rows_of(pool, [f"{line['attack']}/forget" for line in lines]), method, cfg,
        seed=20_000 + (seeds[0] if seeds else 0), forged_costs=forged, later_steps=cfg.steps,
        snapshots_at=sorted({round(f * cfg.steps) for f in CURVE}), log_every=max(cfg.steps // 40, 1), resume=resume,
        progress=progress, on_log=on_log)
    snapshots = {f"{t}/{name}": value for t, weights in done.snapshots.items() for name, value in weights.items()}
    artifact = save("unlearn", name,
                    {"state.safetensors": done.snapshots[cfg.steps], "snapshots.safetensors": snapshots,
                     "history.csv": done.history.frame(table)},
                    config, {"train": trained, **inputs}, table, root=root, seconds=done.history.seconds_at(cfg.steps))
    resume.done()
    return artifact
