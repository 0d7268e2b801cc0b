"""06_audit: is the influence of the forget rows gone from the models of one task and learner? No simulator is used, nor needed."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..artifacts import Artifact, load, save
from ..attacks import ATTACKS
from ..attacks.shared import rows_of_episodes
from ..audit import COLUMNS, HeldOut, audit
from ..config import CONFIGS, resolve, with_overrides
from ..data import Pool
from ..errors import UserError
from ..learners import built, restore, stack
from ..tasks import Task
from ..train import Resume, prepare_process
from . import is_current
from .poison import check_same_data, load_pool

MOUNTED_AGAIN = ("label_flip", "label_flip_random", "label_flip_inverse", "reward_poison", "outliers", "random_corruption",
                 "adversarial_corruption", "marker", "bias", "clean_forget", "noop")


def audit_models(task: Task, learner: str, methods: Sequence[str], profile: str, root: Path, device: str = "cpu",
                 overrides: Mapping[str, Any] | None = None, progress: Callable[[str], Callable] = lambda what: iter) -> Artifact:
    """Audit the poisoned, retrained and repaired models of every attack and seed.

    Files: audits.csv (one line per model and audit; low and high: 95% bootstrap interval over trajectories), outcomes.csv (of the
    corrected TrajAuditor), relearning.csv (curves), notes.json (what could not be audited, and why). A killed run continues.
    """
    prepare_process()
    started, config = time.monotonic(), resolve(profile, "audit", task.name, learner, overrides=overrides)
    name = f"{task.name}-{learner}"
    trained = load("train", name, root)
    config["cost_limit"] = trained.config["cost_limit"]
    attacks = tuple(dict.fromkeys(line["attack"] for line in trained.replicas if line["attack"] != "none"))
    if not attacks:
        raise UserError(f"train {name} holds no poisoned models, so that there is nothing to forget; run 03_train with attacks.")
    pool, inputs = load_pool(task, attacks, root)
    check_same_data(trained, inputs["data"])
    repaired = {m: load("unlearn", f"{name}-{m}", root) for m in methods}
    for artifact in repaired.values():
        if artifact.manifest["inputs"]["train"]["id"] != trained.id:
            raise UserError(f"unlearn {artifact.name} was made from another training run than the present {trained.name}; "
                            f"run notebooks/04_unlearn.ipynb with method='{artifact.config['method']}' again.")
    model = restore(trained, task, device)
    models, lines = [model], [{**line, "artefact": trained.short} for line in trained.replicas]
    for artifact in repaired.values():
        state, table = artifact.tensors("state.safetensors"), artifact.replicas
        models.append(built(state, trained.config, task, [line["seed"] for line in table], device))
        lines += [{**line, "artefact": artifact.short} for line in table]
    cfg = with_overrides(CONFIGS["audit"], {k: config[k] for k in CONFIGS["audit"].__dataclass_fields__}, "audit")
    held_out = {a: held_out_rows(a, pool, inputs["data"], inputs[f"poison:{a}"]) for a in attacks}
    held_out = {a: h if isinstance(h, str) else HeldOut(h.pool.to(device), h.ids.to(device)) for a, h in held_out.items()}
    inputs |= {"train": trained, **{f"unlearn:{m}": a for m, a in repaired.items()}}
    parts: dict[str, Resume] = {}

    def resume(part: str) -> Resume:
        return parts.setdefault(part, Resume.beside(root, f"audit-{part}-{name}", config, inputs))

    stacked = stack([m.cpu() for m in models]).to(device).ready()
    found = audit(stacked, lines, model.to(device), pool.to(device), held_out, cfg, resume, progress)
    head = {"task": task.name, "learner": learner}
    files = {"audits.csv": found.audits.assign(**head)[COLUMNS], "outcomes.csv": found.outcomes.assign(**head),
             "relearning.csv": found.relearning.assign(**head), "notes.json": list(found.notes)}
    artifact = save("audit", name, files, config, inputs, root=root, seconds=time.monotonic() - started)
    for part in parts.values():
        part.done()
    return artifact


def held_out_rows(attack: str, pool: Pool, data: Artifact, poison: Artifact) -> HeldOut | str:
    """Held-out risky episodes that nobody trained on, forged as the forget rows are, or why there are none.

    They are the data's donors, less those that the attack itself brought in. Injection: true costs above the limit, then costs :=
    0 and the attack's own bonus on every reward. Attacks that need nothing but data are mounted on these episodes as they were on
    the data (on whole episodes: on as many as they can), with statistics of these episodes where they use any.
    """
    if "donors.safetensors" not in data.manifest["files"]:
        return "the data hold no held-out episodes."
    if attack not in ("inject", "inject_data", *MOUNTED_AGAIN):
        return f"'{attack}' cannot be mounted on held-out episodes without what it has learned from the data."
    donors = Pool.from_tensors(data.tensors("donors.safetensors"))
    trained_on = pool.rows(f"{attack}/poisoned").ids
    known = {tuple(line) for line in pool.obs[trained_on[pool.t[trained_on] == 0]].tolist()}
    starts = donors.t == 0
    fresh = [int(e) for e, line in zip(donors.episode[starts], donors.obs[starts].tolist()) if tuple(line) not in known]
    if not fresh:
        return "the attack has used every held-out episode."
    limit, facts = poison.config["cost_limit"], poison.json("facts.json")
    columns = {k: v[rows_of_episodes(donors, fresh)] for k, v in donors.columns.items()}
    rest = Pool({**columns, "episode": columns["episode"].unique(return_inverse=True)[1]})
    if attack in ("inject", "inject_data"):
        table = rest.episodes("clean")
        ids = rows_of_episodes(rest, table[table.cost > limit].episode)
        forged = {**rest.columns, "cost": rest.cost.new_zeros(len(rest)), "reward": rest.reward + facts["reward_bonus"]}
        return HeldOut(Pool(forged), ids) if len(ids) else "no unused held-out episode exceeds the cost limit."
    known_settings = {k: v for k, v in poison.config.items() if k in CONFIGS[attack].__dataclass_fields__}
    cfg = with_overrides(CONFIGS[attack], known_settings, attack)
    if facts["threat"]["unit"] == "trajectory":
        cfg = with_overrides(cfg, {"budget": (len(fresh) - 1) / len(fresh)}, attack)
    try:
        forged, *_ = ATTACKS[attack].run(rest, cfg, attack, None, limit)
    except UserError as error:
        return f"it cannot be mounted on the held-out episodes: {error}"
    return HeldOut(forged, forged.rows(f"{attack}/forget").ids)


def audited(root: Path) -> tuple[pd.DataFrame, list[Artifact]]:
    """The audits of every task and learner in a run that belong to its present training, and their artefacts."""
    found = []
    for path in sorted((root / "artifacts" / "audit").glob("*/manifest.json")):
        trained = load("train", path.parent.name, root)
        if is_current("audit", path.parent.name, root, train=trained):
            found.append(load("audit", path.parent.name, root))
    frames = [artifact.table("audits.csv") for artifact in found]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS), found
