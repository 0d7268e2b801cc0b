"""A checkpoint of OSRL becomes a training artefact, and a model of an artefact becomes a checkpoint of OSRL."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
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
from ..learners import LEARNERS, built, configuration, discounted_limit, stack
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

    @property
    def cost_limit(self) -> float:
        return float(self.settings.number("cost_limit"))


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


def learner_from(found: Checkpoint, task: Task, config: Mapping[str, Any], seed: int) -> Learner:
    """One replica in parity mode, in identity units, with the weights of a checkpoint; config: as of a training artefact."""
    cfg, name = configuration(config), config["learner"]
    units = Units(torch.zeros(1, task.n_obs), torch.ones(1, task.n_obs), torch.tensor([1 / cfg.reward_scale]))
    limit = discounted_limit(found.cost_limit, cfg.gamma, task.horizon)
    learner = LEARNERS[name](cfg, units, torch.tensor([limit]), [seed], task.n_act, task.horizon).ready()
    for key, own in views(learner).items():
        own.copy_(found.tensors[key])
    if found.kind == "cdt":
        learner.best_return.copy_(torch.tensor([targets(found.settings, task.horizon)]))
    return learner


def import_checkpoints(paths: Sequence[str | Path], profile: str, root: Path, task: str | None = None, learner: str | None = None,
                       attack: str = "given", seeds: Sequence[int] = (), best: bool = False) -> Artifact:
    """OSRL checkpoints of one learner and one set of settings as the artefact train/<task>-<learner>, one replica each.

    attack: 'given' for poisoned models, whose log (01_data) and forget set (02_poison, attack 'given') lie in `root`; 'none' for
    clean ones. seeds: the replicas' names in later stages (default: OSRL's). best: read model_best.pt.
    Files: state.safetensors (weights), history.csv (empty). config['imported'] keeps OSRL's own settings, the files' sha256 and
    the notices. Raises UserError for checkpoints that do not fit, and where a training run of ours would be replaced.
    """
    found = [read_checkpoint(path, best) for path in paths]
    chosen, name, ours = _common(found, task, learner)
    seeds = _seeds(found, seeds)
    notes = [f"'{key}' in {x.where} was ignored." for x in found for key in x.others]
    notes += dict.fromkeys(note for x in found for note in notices(x.settings, x.kind, ours))
    line = {"attack": "none", "method": "clean", "condition": "clean"}
    inputs, attacks = {}, ()
    if one_of("attack of an imported model", attack, ("given", "none")) == "given":
        from ..stages.poison import load_pool
        inputs, attacks = load_pool(chosen, (attack,), root)[1], (attack,)
        line = {"attack": attack, "method": "poisoned", "condition": f"{attack}/poisoned"}
        if (other := inputs["data"].config["cost_limit"]) not in [x.cost_limit for x in found]:
            notes.append(f"the cost limit is {found[0].cost_limit:g}, as in config.yaml; 01_data was run with {other:g}.")
    config = resolve(profile, "train", chosen.name, name, attacks, seeds=seeds, overrides=ours)
    sources = [{"source": Path(x.where).name, "sha256": x.sha256, "config_sha256": x.settings.sha256, "osrl": x.settings.content}
               for x in found]
    config |= {"cost_limit": found[0].cost_limit, "learning_curve": (),
               "imported": {"sources": dict(zip(map(str, seeds), sources)), "notes": notes}}
    artefact = f"{chosen.name}-{name}"
    table = [{**line, "seed": seed, "init_seed": seed, "cost_limit": x.cost_limit} for x, seed in zip(found, seeds)]
    if (root / "artifacts" / "train" / artefact).is_dir() and "imported" not in load("train", artefact, root).config:
        raise UserError(f"train {artefact} was trained here and would be replaced; import into another --profile, or delete "
                        f"{show(root / 'artifacts' / 'train' / artefact)} first.")
    model = stack([learner_from(x, chosen, config, seed) for x, seed in zip(found, seeds)])
    files = {"state.safetensors": model.weights(), "history.csv": pd.DataFrame(columns=["step", "replica", "name", "value"])}
    return save("train", artefact, files, config, inputs, table, root=root, seconds=0.0)


def _common(found: Sequence[Checkpoint], task: str | None, learner: str | None) -> tuple[Task, str, dict[str, Any]]:
    """Task, learner and settings, which all checkpoints share."""
    read = [(task_of(x.settings, x.kind, x.sizes, task), *to_ours(x.settings, x.kind, x.sizes)) for x in found]
    first, same, settings = read[0]
    for x, (chosen, name, ours) in zip(found, read):
        if learner not in (None, name):
            raise UserError(f"{x.where}: is a checkpoint of {TITLES[x.kind]} ({name}), not of {learner}; leave --learner out.")
        alike = (chosen, name) == (first, same)
        if odd := [k for k in ours if ours[k] != settings[k]] if alike else [f"being of {name} on {chosen.name}"]:
            raise UserError(f"{x.where}: differs from {found[0].where} in {odd[0]}; runs imported at once may differ in seed and "
                            "cost limit only.")
    return read[0]


def _seeds(found: Sequence[Checkpoint], seeds: Sequence[int]) -> tuple[int, ...]:
    """One name per replica."""
    own = tuple(seeds) or tuple(x.settings.number("seed", whole=True, most=MAX_STEPS) if "seed" in x.settings.content else 0
                                for x in found)
    if len(own) != len(found) or len(set(own)) != len(own):
        raise UserError(f"{len(found)} checkpoints need as many different seeds, not {', '.join(map(str, own))}; give them with "
                        "--seeds.")
    return own


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
        settings = config["imported"]["sources"][str(line["seed"])]["osrl"]
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
