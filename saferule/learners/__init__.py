"""Offline safe RL learners, one file each; every one stacks R replicas."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..artifacts import Artifact
from ..config import BC_NAMES, CONFIGS, LEARNER_NAMES, one_of, with_overrides
from ..data import Units
from ..errors import UserError
from ..tasks import Task
from ..train import Learner
from .bc import BC
from .bcq_lag import BCQLag
from .bear_lag import BEARLag
from .cdt import CDT
from .coptidice import COptiDICE
from .cpq import CPQ

LEARNERS: dict[str, type[Learner]] = {"bcq_lag": BCQLag, "bear_lag": BEARLag, "cpq": CPQ, "coptidice": COptiDICE, "cdt": CDT,
                                      **dict.fromkeys(BC_NAMES, BC)}
assert tuple(LEARNERS) == LEARNER_NAMES


def discounted_limit(cost_limit: float, gamma: float, horizon: int) -> float:
    """The discounted sum of a constant per-step cost limit / T over T steps: l (1 - g^T) / ((1 - g) T) (algorithms.md A.5)."""
    return cost_limit if gamma == 1 else cost_limit * (1 - gamma**horizon) / ((1 - gamma) * horizon)


def configuration(config: Mapping[str, Any]) -> Any:
    """The learner's dataclass from the resolved dictionary that a training artefact carries."""
    defaults = CONFIGS[one_of("learner", config["learner"], LEARNERS)]
    known = {k: v for k, v in config.items() if k in defaults.__dataclass_fields__}
    return with_overrides(defaults, known, config["learner"])


def built(state: Mapping[str, Tensor], config: Mapping[str, Any], task: Task, seeds: Sequence[int],
          device: str = "cpu") -> Learner:
    """A learner with the given weights, and moments if they are there.

    Raises UserError if they belong to another task, learner or architecture.
    """
    n_obs = state["obs_mean"].shape[-1] if "obs_mean" in state else -1
    if config["task"] != task.name or n_obs != task.n_obs:
        raise UserError(f"checkpoint is for {config['task']} with {n_obs} observations, not for {task.name} with {task.n_obs}.")
    R = len(seeds)
    blank = Units(torch.zeros(R, n_obs), torch.ones(R, n_obs), torch.ones(R))
    model = LEARNERS[config["learner"]](configuration(config), blank, torch.zeros(R), seeds, task.n_act, task.horizon)
    model = model.to(device).ready()
    model.load_full_state({k: v.to(device) for k, v in state.items()})
    return model


def restore(artifact: Artifact, task: Task, device: str = "cpu") -> Learner:
    """The learner of a 'train' artefact, with its optimiser moments."""
    seeds = [line["init_seed"] for line in artifact.replicas]
    return built(artifact.tensors("state.safetensors"), artifact.config, task, seeds, device)


def restored_snapshots(artifact: Artifact, trained: Artifact, task: Task) -> dict[int, Learner]:
    """Step -> learner, from an 'unlearn' artefact; `trained` is the artefact that it started from."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in artifact.tensors("snapshots.safetensors").items():
        step, name = key.split("/", 1)
        states.setdefault(int(step), {})[name] = value
    seeds = [line["seed"] for line in artifact.replicas]
    return {step: built(states[step], trained.config, task, seeds) for step in sorted(states)}


def stack(learners: Sequence[Learner]) -> Learner:
    """Several learners of one configuration as one, replicas side by side in the given order (weights only)."""
    first = learners[0]
    states = [m.weights() for m in learners]
    state = {k: torch.cat([s[k] for s in states]) for k in states[0]}
    units = Units(*(state[k] for k in Units._fields))
    out = type(first)(first.cfg, units, state["qc_limit"], [s for m in learners for s in m.seeds], first.n_act,
                      first.horizon)
    out.load_weights(state)
    return out
