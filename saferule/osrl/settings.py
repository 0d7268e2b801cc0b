"""OSRL's config.yaml: read as plain data, and translated to our settings and back."""
from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..config import BC_NAMES, BC_SELECTIONS, CONFIGS, one_of
from ..errors import UserError
from ..files import regular, show
from ..tasks import TASKS, Task, get_task
from .layout import TITLES, CDTSizes, Sizes

MAX_BYTES, MAX_VALUES = 1 << 20, 10_000
MAX_COUNT, MAX_STEPS = 100_000, (1 << 31) - 1             # of rows and samples; of steps and seeds
MAX_TARGETS, UNBOUNDED = 100, 1e9                         # of CDT; of a gradient that is not clipped
STEPS, POSITIVE = ("steps", "actor_start", "warm_up"), ("reward_scale", "samples", "batch", "steps", "attention_heads", "warm_up")

# --------------------------------------------------------------------------------------------------- ours -> OSRL's
_ALL = {"steps": "update_steps", "batch": "batch_size"}
_CRITICS = {**_ALL, "lr": "critic_lr", "gamma": "gamma", "tau": "tau", "beta": "beta", "samples": "sample_action_num",
            "reward_scale": "reward_scale"}
_LAGRANGIAN = {**_CRITICS, "lmbda": "lmbda", "pid": "PID"}
NAMES = {
    "bc": {**_ALL, "lr": "actor_lr"},
    "bcq_lag": {**_LAGRANGIAN, "phi": "phi"},
    "bear_lag": {**_LAGRANGIAN, "mmd_sigma": "mmd_sigma", "mmd_limit": "target_mmd_thresh",
                 "actor_start": "start_update_policy_step"},
    "cpq": {**_CRITICS, "lr_actor": "actor_lr", "lr_alpha": "alpha_lr", "ood_limit": "qc_scalar"},
    "cdt": {**_ALL, "attention_heads": "num_heads", "dropout": "residual_dropout", "lr": "learning_rate",
            "warm_up": "lr_warmup_steps", "weight_decay": "weight_decay", "clip": "clip_grad", "cost_weight": "loss_cost_weight",
            "temperature": "init_temperature", "reward_scale": "reward_scale"},
}
# what the weights' shapes say already
SIZES = {"hidden": ("a_hidden_sizes", "c_hidden_sizes"), "vae_hidden": ("vae_hidden_sizes",), "heads": ("num_q", "num_qc"),
         "width": ("embedding_dim",), "layers": ("num_layers",), "context": ("seq_len",), "horizon": ("episode_len",)}
# what OSRL's training scripts leave at their models' defaults: BEAR-Lag's ignores config.yaml's kernel and num_samples_mmd_match
FIXED = {
    "bc": {},
    "bcq_lag": {"vae_steps": 0},
    "bear_lag": {"vae_steps": 0, "kernel": "gaussian", "match_samples": 10, "lr_alpha": 1e-3},
    "cpq": {"vae_steps": 0, "alpha": 1.0, "ood_quantile": 0.75},
    "cdt": {"lr_temperature": 1e-4, "spend": 1.0, "ask": 1.0},
}
PARITY = {"mode": "parity", "standardise": False}
SAME = {"bc": {}, "cpq": {"vae_lr": "lr"}, "bcq_lag": {"actor_lr": "lr", "vae_lr": "lr"},
        "bear_lag": {"actor_lr": "lr", "vae_lr": "lr"},   # theirs, for which ours has no setting of its own
        "cdt": {"attention_dropout": "dropout", "embedding_dropout": "dropout"}}
ONLY = {"cost_scale": 1, "max_action": 1}                 # settings that have no other value here
ONLY_CDT = {"time_emb": True, "use_rew": True, "use_cost": True, "cost_transform": True, "cost_prefix": False, "stochastic": True,
            "add_cost_feat": False, "mul_cost_feat": False, "cat_cost_feat": False, "action_head_layers": 1, "cost_reverse": False}
AS_HERE = {"loss_state_weight": 0, "no_entropy": False, "linear": True, "betas": [0.9, 0.999]}     # CDT's, only for training
DRAWN = 70.0                           # where cost_sample is on: episodes are drawn with weight max(0, 70 - cost)
AUGMENTED = {"deg", "pf_sample", "beta", "augment_percent", "max_reward", "min_reward", "max_rew_decrease", "pf_only", "rmin",
             "cost_bins", "npb", "start_sampling", "prob", "random_aug", "aug_rmin", "aug_rmax", "aug_cmin", "aug_cmax", "cgap",
             "rstd", "cstd"}           # how CDT's training data are drawn and made up
AS_LOGGED = {"outliers_percent": None, "noise_scale": None, "inpaint_ranges": None, "epsilon": None, "density": 1.0}
UNUSED = {"project", "group", "name", "prefix", "suffix", "logdir", "verbose", "dataset", "device", "threads", "num_workers",
          "eval_episodes", "eval_every", "kernel", "num_samples_mmd_match", "gamma", "bc_mode", "seed", "task", "cost_limit",
          "episode_len", "target_returns", "cost_sample"}  # of no consequence here, or read elsewhere
FRESH = {"bc": "Adam's moments", "bcq_lag": "Adam's moments and the PID's state", "cpq": "Adam's moments and log-alpha",
         "bear_lag": "Adam's moments, the PID's state and log-alpha", "cdt": "Adam's moments and the temperature"}


# ------------------------------------------------------------------------------------------------------- reading it
class _Plain(yaml.SafeLoader):
    """YAML's plain data, and tuples as lists; other tags are refused by name, and so is '<<', which can multiply them."""

    def flatten_mapping(self, node: yaml.Node) -> None:
        pass


def _refuse(loader: _Plain, node: yaml.Node) -> None:
    tag = node.tag.replace("tag:yaml.org,2002:", "!!")
    raise UserError(f"{loader.where}: holds {tag!a:.80}, which is not plain data; refused.")


_Plain.add_constructor("tag:yaml.org,2002:python/tuple", lambda loader, node: loader.construct_sequence(node, deep=True))
_Plain.add_constructor(None, _refuse)


class Settings:
    """The contents of a config.yaml, and messages that name the file."""

    def __init__(self, content: Mapping[str, Any], where: str, sha256: str = ""):
        self.content, self.where, self.sha256 = dict(content), where, sha256

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Raises UserError for anything but a dictionary of texts, numbers and lists, of whatever size."""
        where = show(path)
        with regular(path, "OSRL writes it beside its folder 'checkpoint': copy both", MAX_BYTES) as f:
            text = f.read()
        try:
            loader = _Plain(text.decode())
            loader.where = where
            content = loader.get_single_data()
        except UserError:
            raise
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as e:
            reason = ascii(" ".join(str(e).split())[:120])[1:-1]
            raise UserError(f"{where}: is no readable YAML ({reason}); copy it here again.") from e
        if not isinstance(content, dict) or not content:
            raise UserError(f"{where}: holds no settings; take the config.yaml that OSRL wrote.")
        _check_plain(content, where)
        return cls(content, where, hashlib.sha256(text).hexdigest())

    def number(self, key: str, whole: bool = False, most: float = math.inf) -> float:
        """A setting that must be there: a number of at least 0, at most `most` and finite."""
        value = self.content.get(key)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            state = f"{key} = {value!a:.40} is no {'whole ' * whole}number" if key in self.content else f"lacks '{key}'"
            raise UserError(f"{self.where}: {state}; take the config.yaml that OSRL wrote with this checkpoint.")
        if not 0 <= value <= most or value == math.inf:
            raise UserError(f"{self.where}: {key} = {value!a:.40} is beyond reason; correct it.")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        value = self.content.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise UserError(f"{self.where}: {key} must be a list of {count} numbers; take the config.yaml that OSRL wrote.")
        return tuple(float(Settings({key: x}, self.where).number(key)) for x in value)


def _check_plain(content: Any, where: str) -> None:
    """Bounds what aliases may multiply, and keeps out what JSON has not."""
    todo, seen = [content], 0
    while todo:
        value, seen = todo.pop(), seen + 1
        if seen > MAX_VALUES:
            raise UserError(f"{where}: holds more than {MAX_VALUES:,} values, beyond reason for settings; refused.")
        if isinstance(value, dict):
            if any(not isinstance(k, str) for k in value):
                raise UserError(f"{where}: holds a setting whose name is no text; refused.")
            todo += value.values()
        elif isinstance(value, list):
            todo += value
        elif value is not None and not isinstance(value, bool | int | float | str) or isinstance(value, int) and abs(value) >> 63:
            raise UserError(f"{where}: holds a value of type {type(value).__name__} such as no setting has; refused.")


# ------------------------------------------------------------------------------------------------------ theirs -> ours
def task_of(settings: Settings, kind: str, z: Sizes | CDTSizes, wanted: str | None = None) -> Task:
    """The task of a checkpoint, by its config.yaml or as the user says. Raises UserError if names or sizes disagree."""
    said = str(settings.content.get("task", ""))
    name = said.removeprefix("Offline").rpartition("-v")[0].removesuffix("Gymnasium")
    if wanted is None and name not in TASKS:
        raise UserError(f"{settings.where}: task {said!a:.60} is none of ours; name one with --task: {', '.join(TASKS)}.")
    task = get_task(wanted or name)
    if name in TASKS and name != task.name:
        raise UserError(f"{settings.where}: is for {name}, not for {task.name}; leave --task out or name the right checkpoint.")
    want = task.n_obs + (kind == "bc" and settings.content.get("bc_mode") == "multi-task"), task.n_act
    if (z.n_in, z.n_act) != want:
        raise UserError(f"{settings.where}: is for {task.name} with {want[0]} inputs and {want[1]} actions, but the weights have "
                        f"{z.n_in} and {z.n_act}; they are of another task.")
    if settings.number("episode_len", whole=True) != task.horizon:
        raise UserError(f"{settings.where}: episode_len is {settings.content['episode_len']}, but an episode of {task.name} has "
                        f"{task.horizon} steps; they are of another task.")
    return task


def only(kind: str) -> dict[str, Any]:
    return {**ONLY, **(ONLY_CDT if kind == "cdt" else {})}


def check_architecture(settings: Settings, kind: str) -> None:
    """Raises UserError for what has no counterpart here."""
    for key, value in only(kind).items():
        if settings.content.get(key, value) != value:
            raise UserError(f"{settings.where}: {key} = {settings.content[key]!a:.40}, but here it is always {value}; train with "
                            "that in OSRL.")


def to_ours(settings: Settings, kind: str, z: Sizes | CDTSizes) -> tuple[str, dict[str, Any]]:
    """The learner's name, and its settings as overrides of our defaults. Raises UserError for missing, odd and contrary ones."""
    content, where, name = settings.content, settings.where, kind
    if kind == "bc":
        mode = one_of(f"bc_mode in {where}", str(content.get("bc_mode", "all")), BC_SELECTIONS)
        name = BC_NAMES[BC_SELECTIONS.index(mode)]
    sizes = {size: list(n) if isinstance(n, tuple) else n for size, n in z._asdict().items() if size in SIZES and n}
    for size, there in sizes.items():
        for key in SIZES[size]:
            if content.get(key, there) != there:
                raise UserError(f"{where}: {key} = {content[key]!a:.40}, but the weights have {there}; take the config.yaml that "
                                "OSRL wrote with this checkpoint.")
    defaults = CONFIGS[name]
    out: dict[str, Any] = {**PARITY, **FIXED[kind], **{k: v for k, v in sizes.items() if hasattr(defaults, k)}}
    for ours, theirs in NAMES[kind].items():
        default = getattr(defaults, ours)
        if isinstance(default, tuple):
            out[ours] = settings.numbers(theirs, len(default))
        elif isinstance(default, int):
            out[ours] = settings.number(theirs, whole=True, most=MAX_STEPS if ours in STEPS else MAX_COUNT)
        elif ours == "clip" and theirs in content and content[theirs] is None:
            out[ours] = UNBOUNDED
        else:
            out[ours] = float(settings.number(theirs))
    if not 0 < out.get("gamma", 1.0) <= 1 or 0 in [out[key] for key in POSITIVE if key in out]:
        names = ", ".join(NAMES[kind][key] for key in POSITIVE if key in out)
        raise UserError(f"{where}: gamma must lie in (0, 1], and these above 0: {names}.")
    if kind == "cdt":
        out["cheap"] = DRAWN if content.get("cost_sample") else 0.0
        if z.width % out["attention_heads"]:
            raise UserError(f"{where}: num_heads = {out['attention_heads']} does not divide embedding_dim = {z.width}; take the "
                            "config.yaml that OSRL wrote with this checkpoint.")
    return name, out


def targets(settings: Settings, horizon: int) -> list[float]:
    """CDT: the return to ask for at cost limit 0, 1, ... T, from target_returns: that of the dearest target within the limit.

    Below the cheapest target, its return.
    """
    pairs = settings.content.get("target_returns")
    if not isinstance(pairs, list) or not 0 < len(pairs) <= MAX_TARGETS:
        raise UserError(f"{settings.where}: target_returns must list pairs of return and cost; take the config.yaml that OSRL "
                        "wrote.")
    read = [Settings({"target_returns": pair}, settings.where).numbers("target_returns", 2) for pair in pairs]
    order = sorted((cost, ret) for ret, cost in read)
    return [max([pair for pair in order if pair[0] <= limit] or order[:1])[1] for limit in range(horizon + 1)]


def notices(settings: Settings, kind: str, chosen: Mapping[str, Any]) -> Iterator[str]:
    """What a user must know about an import, one line each."""
    content = settings.content
    for key, ours in SAME[kind].items():
        if content.get(key, chosen[ours]) != chosen[ours]:
            yield f"{key} = {content[key]!a:.20} was not taken over: {NAMES[kind][ours]} = {chosen[ours]} stands for both here."
    for key, value in AS_HERE.items():
        if kind == "cdt" and content.get(key, value) != value:
            yield f"{key} = {content[key]!a:.20} was not taken over: further training has {value}."
    for key, value in AS_LOGGED.items():
        if content.get(key, value) != value:
            yield f"{key} = {content[key]!a:.40}: OSRL changed the log before training; 01_data must get the log as changed."
    sizes = (k for keys in SIZES.values() for k in keys)
    known = {*NAMES[kind].values(), *UNUSED, *only(kind), *AS_LOGGED, *SAME[kind], *sizes, *(AUGMENTED if kind == "cdt" else ()),
             *(AS_HERE if kind == "cdt" else ())}
    for key in sorted(set(content) - known):
        yield f"setting {key!a:.60} is not known here and was ignored."
    yield f"{FRESH[kind]} are not in OSRL's files and start fresh."
    if kind == "cdt":
        yield "OSRL's augmentation of the training data is not repeated in further training."
    if "pid" in chosen:
        yield "the multiplier starts at 0, so unlearn with overrides={'freeze_lam': False} and the PID will set it."


# ------------------------------------------------------------------------------------------------------ ours -> theirs
def to_theirs(cfg: Any, kind: str, task: Task, cost_limit: float, seed: int) -> dict[str, Any]:
    """The settings from which OSRL's evaluation scripts rebuild a model of `cfg`."""
    name = f"Offline{task.name}-v0" if task.source == "bullet" else f"Offline{task.name}Gymnasium-v1"
    out = {"task": name, "seed": seed, "device": "cpu", "threads": 4, "cost_limit": cost_limit, "episode_len": task.horizon,
           "prefix": TITLES[kind]}
    out |= {theirs: getattr(cfg, ours) for ours, theirs in NAMES[kind].items()}
    out |= {theirs: getattr(cfg, ours) for theirs, ours in SAME[kind].items()}
    out |= {key: getattr(cfg, size) for size, keys in SIZES.items() if hasattr(cfg, size) for key in keys}
    out |= {key: value for key, value in only(kind).items() if key != "max_action"}
    if kind == "bc":
        out |= {"bc_mode": cfg.select, "gamma": 1.0}
    if kind == "cdt":
        out |= {**AS_HERE, "cost_sample": bool(cfg.cheap), "clip_grad": None if cfg.clip == UNBOUNDED else cfg.clip}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items()}
