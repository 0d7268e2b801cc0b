"""A checkpoint of OSRL becomes a training artefact, and a model of an artefact becomes a checkpoint of OSRL."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import yaml
from torch import Tensor

from ..artifacts import Artifact, load, save, verify
from ..config import one_of, resolve
from ..data import Units
from ..errors import UserError
from ..files import replacing, show
from ..learners import LEARNERS, built, configuration, discounted_limit
from ..tasks import Task, get_task
from ..torchfile import read_torch
from ..train import Learner
from .layout import KIND, TITLES, Sizes, check_layout, kind_among, places, sizes_among, view, views
from .settings import MAX_STEPS, Settings, check_architecture, notices, targets, task_of, to_ours, to_theirs


class Checkpoint(NamedTuple):
    """An OSRL run as it was found, its tensors checked against the layout of its kind."""
    tensors: dict[str, Tensor]
    settings: Settings
    kind: str
    sizes: Sizes
    where: str                         # its weights' file, for messages
    sha256: str                        # of that file
    others: list[str]                  # keys beside 'model_state'


# ------------------------------------------------------------------------------------------------------------- import
def read_checkpoint(path: str | Path, best: bool = False) -> Checkpoint:
    """A folder that OSRL wrote, or a model.pt in one. The path itself may be a link; what lies below it may not.

    Raises UserError for whatever is not the whole and well-shaped checkpoint of a known learner.
    """
    model, config = _files(Path(path).expanduser(), best)
    where, (tensors, others, digest) = show(model), read_torch(model, "model_state")
    kind, settings = kind_among(tensors, where), Settings.read(config)
    check_architecture(settings, kind)
    sizes = sizes_among(kind, tensors, where)
    check_layout(kind, sizes, tensors, where)
    return Checkpoint(tensors, settings, kind, sizes, where, digest, others)


def _files(path: Path, best: bool) -> tuple[Path, Path]:
    """The weights and the settings of a run."""
    if not path.exists():
        raise UserError(f"{show(path)}: is missing; name the folder in which OSRL left config.yaml and checkpoint/model.pt.")
    path = path.resolve()
    below = path / "checkpoint"
    if below.is_symlink():
        raise UserError(f"{show(below)}: is a link, not a folder; copy the checkpoint here.")
    model = path if path.is_file() else (below if below.is_dir() else path) / ("model_best.pt" if best else "model.pt")
    home = model.parent.parent if model.parent.name == "checkpoint" else model.parent
    return model, home / "config.yaml"


def learner_from(found: Checkpoint, task: Task, config: Mapping[str, Any]) -> Learner:
    """One replica in parity mode, in identity units, with the weights of a checkpoint; config: as of a training artefact."""
    cfg, name = configuration(config), config["learner"]
    units = Units(torch.zeros(1, task.n_obs), torch.ones(1, task.n_obs), torch.tensor([1 / cfg.reward_scale]))
    limit = discounted_limit(config["cost_limit"], cfg.gamma, task.horizon)
    learner = LEARNERS[name](cfg, units, torch.tensor([limit]), config["seeds"], task.n_act, task.horizon).ready()
    for key, own in views(learner).items():
        own.copy_(found.tensors[key])
    if found.kind == "cdt":
        learner.best_return.copy_(torch.tensor([targets(found.settings, task.horizon)]))
    return learner


def import_checkpoint(path: str | Path, profile: str, root: Path, task: str | None = None, learner: str | None = None,
                      attack: str = "given", seed: int | None = None, best: bool = False) -> Artifact:
    """An OSRL checkpoint as the artefact train/<task>-<learner>: one replica, as 03_train would have made it.

    attack: 'given' for a poisoned model, whose log (01_data) and forget set (02_poison, attack 'given') lie in `root`; 'none' for
    a clean one. seed: the replica's name in later stages (default: OSRL's). best: read model_best.pt.
    Files: state.safetensors (weights), history.csv (empty). config['imported'] keeps OSRL's own settings, the files' sha256 and
    the notices. Raises UserError for a checkpoint that does not fit, and where a training run of ours would be replaced.
    """
    found = read_checkpoint(path, best)
    settings = found.settings
    chosen = task_of(settings, found.kind, found.sizes, task)
    name, ours = to_ours(settings, found.kind, found.sizes)
    if learner not in (None, name):
        raise UserError(f"{found.where}: is a checkpoint of {TITLES[found.kind]} ({name}), not of {learner}; leave --learner out.")
    if seed is None:
        seed = settings.number("seed", whole=True, most=MAX_STEPS) if "seed" in settings.content else 0
    limit = float(settings.number("cost_limit"))
    notes = [f"'{key}' in {Path(found.where).name} was ignored." for key in found.others]
    notes += notices(settings, found.kind, ours)
    line = {"attack": "none", "method": "clean", "condition": "clean"}
    inputs, attacks = {}, ()
    if one_of("attack of an imported model", attack, ("given", "none")) == "given":
        from ..stages.poison import load_pool
        inputs, attacks = load_pool(chosen, (attack,), root)[1], (attack,)
        line = {"attack": attack, "method": "poisoned", "condition": f"{attack}/poisoned"}
        if (other := inputs["data"].config["cost_limit"]) != limit:
            notes.append(f"the cost limit is {limit:g}, as in {Path(settings.where).name}; 01_data was run with {other:g}.")
    config = resolve(profile, "train", chosen.name, name, attacks, seeds=(seed,), overrides=ours)
    config |= {"cost_limit": limit, "imported": {
        "source": Path(found.where).name, "sha256": found.sha256, "config_sha256": settings.sha256, "osrl": settings.content,
        "notes": notes}}
    artefact, table = f"{chosen.name}-{name}", [{**line, "seed": seed, "init_seed": seed, "cost_limit": limit}]
    if (root / "artifacts" / "train" / artefact).is_dir() and "imported" not in load("train", artefact, root).config:
        raise UserError(f"train {artefact} was trained here and would be replaced; import into another --profile, or delete "
                        f"{show(root / 'artifacts' / 'train' / artefact)} first.")
    model = learner_from(found, chosen, config)
    files = {"state.safetensors": model.full_state(), "history.csv": pd.DataFrame(columns=["step", "replica", "name", "value"])}
    return save("train", artefact, files, config, inputs, table, root=root, seconds=0.0)


# ------------------------------------------------------------------------------------------------------------- export
def state_for(learner: Learner, replica: int = 0) -> OrderedDict[str, Tensor]:
    """OSRL's state dictionary of one replica. Raises UserError for a learner that acts as no model of OSRL does."""
    there, units = places(learner), learner.units
    scaled = bool(units.obs_mean[replica].any() or (units.obs_std[replica] != 1).any())
    if not learner.parity or scaled:
        form = f"mode '{learner.cfg.mode}'{' with standardised observations' * scaled}"
        raise UserError(f"{type(learner).__name__} in {form} acts as no model of OSRL does; train it with "
                        "overrides={'mode': 'parity', 'standardise': False}.")
    return OrderedDict((name, view(learner, place, replica).clone().contiguous()) for name, place in there.items())


def export_checkpoint(path: str | Path, out: str | Path, replica: int | None = None) -> Path:
    """A model of a 'train' or 'unlearn' artefact as a folder for OSRL's evaluation scripts: config.yaml, checkpoint/model.pt.

    replica: which model, if there are several. CPQ's target actor, which OSRL never uses, is a copy of its actor.
    Raises UserError for a learner in default mode, and if `out` is there already.
    """
    artifact, out = verify(Path(path)), Path(out).absolute()
    trained = _trained(artifact)
    lines = artifact.replicas
    if replica is None and len(lines) == 1:
        replica = 0
    if replica is None or not 0 <= replica < len(lines):
        listed = "; ".join(f"{i}: {line['attack']}, {line['method']}, seed {line['seed']}" for i, line in enumerate(lines))
        raise UserError(f"{show(artifact.path)}: holds {len(lines)} models, choose one with --replica ({listed}).")
    if out.exists() or out.is_symlink():
        raise UserError(f"{show(out)}: is there already; name a new folder.")
    config, line = trained.config, lines[replica]
    task, seeds = get_task(config["task"]), [x.get("init_seed", x["seed"]) for x in lines]
    learner = built(artifact.tensors("state.safetensors"), config, task, seeds)
    state, kind = state_for(learner, replica), KIND[config["learner"]]
    settings = to_theirs(configuration(config), kind, task, line["cost_limit"], line["seed"])
    if kind == "cdt":
        settings["target_returns"] = [[float(learner.cfg.ask * learner.best_return[replica, int(limit)]), learner.cfg.spend * limit]
                                      for limit in sorted({*task.cost_limits, line["cost_limit"]}) if limit <= task.horizon]
    if "imported" in config:
        settings = config["imported"]["osrl"]
    try:
        with replacing(out) as folder:
            (folder / "checkpoint").mkdir()
            torch.save({"model_state": state}, folder / "checkpoint" / "model.pt")
            text = yaml.safe_dump(settings, default_flow_style=False, indent=4, sort_keys=False)
            (folder / "config.yaml").write_text(text, encoding="utf-8")
    except OSError as e:
        raise UserError(f"cannot write {show(out)}: {e.strerror or e}; name another folder.") from e
    return out


def _trained(artifact: Artifact) -> Artifact:
    """The training run whose configuration an artefact's models have. Raises UserError if it is not there any more."""
    if artifact.kind == "train":
        return artifact
    if artifact.kind != "unlearn":
        raise UserError(f"{show(artifact.path)}: is of kind '{artifact.kind}'; models are in artefacts of kind train and unlearn.")
    source = artifact.manifest["inputs"]["train"]
    trained = load("train", source["name"], artifact.path.absolute().parents[2])
    if trained.id != source["id"]:
        raise UserError(f"{show(artifact.path)}: was made from another training run than the present {trained.name}; run "
                        "notebooks/04_unlearn.ipynb again.")
    return trained
