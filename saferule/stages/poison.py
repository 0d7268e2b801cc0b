"""02_poison: the rows that one attack adds, its forget set, and what it did."""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..artifacts import Artifact, load, save
from ..attacks import poison
from ..config import ATTACK_NAMES, CONFIGS, one_of, resolve, with_overrides
from ..data import Pool, check_columns, forget_rows
from ..errors import UserError
from ..tasks import Task
from ..train import prepare_process


def make_poison(task: Task, attack: str, profile: str, root: Path, overrides: Mapping[str, Any] | None = None) -> Artifact:
    """Mount one attack on the task's data.

    Files: rows.safetensors (the appended rows), forget.csv (row ids into the data followed by these rows, weights),
    facts.json (threat model and realised budget), poisoned_episodes.csv (ret and cost as the poisoned labels have them;
    for forged episodes also true_ret and true_cost, what really happened, where it is known).
    """
    prepare_process()                                         # an attack may train a surrogate: the same bytes need one thread
    started, data = time.monotonic(), load("data", task.name, root)
    config = resolve(profile, "poison", task.name, attacks=(attack,), overrides=overrides)
    config["cost_limit"] = data.config["cost_limit"]          # the one that the data were made with, also where it is the user's
    clean = Pool.from_tensors(data.tensors("pool.safetensors"))
    donors = Pool.from_tensors(data.tensors("donors.safetensors")) if "donors.safetensors" in data.manifest["files"] else None
    settings = {k: v for k, v in config.items() if k not in ("task", "attack", "cost_limit")}
    pool, facts, truth = poison(clean, attack, with_overrides(CONFIGS[attack], settings, attack), donors, config["cost_limit"])
    episodes = pool.episodes(f"{attack}/poisoned").merge(truth, on="episode", how="left")
    forget = pool.rows(f"{attack}/forget")
    mine = (pool.origin == 1).nonzero().squeeze(-1)
    rows = {k: v[mine] for k, v in pool.columns.items() if k != "origin"}
    forget_frame = pd.DataFrame({"row": forget.ids.numpy(), "weight": forget.weight.numpy()})
    files = {"rows.safetensors": rows, "forget.csv": forget_frame, "facts.json": facts,
             "poisoned_episodes.csv": episodes}
    if "forget_file" in config:
        config["forget_file"] = Path(config["forget_file"]).name
    return save("poison", f"{task.name}-{attack}", files, config, {"data": data}, root=root, seconds=time.monotonic() - started)


def load_pool(task: Task, attacks: Sequence[str], root: Path) -> tuple[Pool, dict[str, Artifact]]:
    """The task's pool with the rows of several attacks behind it, and the artefacts that it came from."""
    data = load("data", task.name, root)
    pool, inputs = Pool.from_tensors(data.tensors("pool.safetensors")), {"data": data}
    for attack in attacks:
        one_of("attack", attack, ATTACK_NAMES)
        artifact = load("poison", f"{task.name}-{attack}", root)
        check_same_data(artifact, data)
        frame, rows = artifact.table("forget.csv"), artifact.tensors("rows.safetensors")
        in_place = None
        if len(rows["reward"]) == 0:                          # the forget rows are among the data's own
            n_rows = int((pool.origin == 0).sum())
            in_place = forget_rows(frame["row"].to_list(), n_rows, frame["weight"].to_list(), f"poison {artifact.name}")
        pool = pool.append(attack, rows, in_place)
        inputs[f"poison:{attack}"] = artifact
    check_columns(pool.columns, f"data and attacks of {task.name}")
    return pool, inputs


def check_same_data(artifact: Artifact, data: Artifact) -> None:
    """Raises UserError if an artefact was made from other data than those that lie beside it now."""
    if artifact.manifest["inputs"]["data"]["id"] != data.id:
        raise UserError(f"{artifact.kind} {artifact.name} was made from other data than the present {data.name} ({data.short}); "
                        f"run the notebooks after 01_data again, in order.")
