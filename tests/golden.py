"""Weights, batches and noise by fixed formulas, in OSRL's layout: what the recorder and the golden tests both start from."""
from __future__ import annotations

import math
import zlib
from collections import OrderedDict

import torch
from torch import Tensor

SIZES = {"n_obs": 5, "n_act": 2, "hidden": (16, 12), "vae_hidden": 14, "heads": 2, "batch": 16, "samples": 3, "horizon": 50,
         "cost_limit": -10.0, "gamma": 0.95, "tau": 0.1, "lr": 3e-3, "steps": 3}

BEAR = {"mmd_sigma": 2.0, "mmd_limit": 0.05, "match_samples": 4, "actor_start": 1, "lr_alpha": 0.5}       # BEAR-Lag's further ones
CPQ = {"lr_actor": 1e-3, "lr_alpha": 0.5, "ood_limit": 1.5, "ood_quantile": 0.75, "alpha": 1.0}     # and those of CPQ
CPQ_COST_LIMIT = -1.2                  # some actions look safe, some do not
COPTIDICE = {"lr_actor": 1e-3, "lr_scalar": 2e-2, "alpha": 0.5, "kl_limit": 0.01, "divergence": "softchi"}   # and COptiDICE's
COPTIDICE_COST_LIMIT = 1.0

CDT = {"width": 8, "layers": 2, "attention_heads": 2, "context": 4, "lr": 3e-3, "warm_up": 2, "weight_decay": 0.05, "clip": 0.25,
       "cost_weight": 0.2, "temperature": 0.5}                                                              # and those of CDT


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter of OSRL's model by name: waves of amplitude 1 / sqrt(fan_in); [out, in] or [out]."""
    numel, phase = math.prod(shape), zlib.crc32(name.encode()) % 997 / 100
    wave = torch.sin(phase + 0.7 * torch.arange(numel, dtype=torch.float64) ** 1.1)
    return (wave / math.sqrt(shape[-1])).view(shape).float()


def batch(step: int, rows: int, n_obs: int, n_act: int) -> dict[str, Tensor]:
    wave = lambda shape, speed: torch.sin(step + speed * torch.arange(math.prod(shape), dtype=torch.float64)).view(shape).float()
    return {"obs": wave((rows, n_obs), 0.37), "action": 0.9 * wave((rows, n_act), 0.53), "reward": wave((rows,), 0.71),
            "cost": (wave((rows,), 0.91) > 0.2).float(), "next_obs": wave((rows, n_obs), 0.41),
            "done": (wave((rows,), 1.3) > 0.8).float()}


def starts(step: int, rows: int) -> Tensor:
    """Which rows of `batch` start an episode, 1 or 0 [rows]."""
    return (torch.sin(step + 1.9 * torch.arange(rows, dtype=torch.float64)) > 0.6).float()


def windows(step: int, windows: int, steps: int, n_obs: int, n_act: int) -> dict[str, Tensor]:
    """Windows of `steps` steps, some of them padded with zeros: [windows, steps, ...]."""
    rows = {k: v.view(windows, steps, *v.shape[1:]) for k, v in batch(step, windows * steps, n_obs, n_act).items()}
    k, which = torch.arange(steps), torch.arange(windows)[:, None]
    mask = (k < steps - which % 3).float()
    to_go = {"ret": 3 + 2 * rows["reward"] - 0.1 * k, "cost_to_go": 40 * (1 + rows["obs"][..., 0])}
    found = {"obs": rows["obs"], "action": rows["action"], **to_go, "cost": rows["cost"]}
    padded = {name: v * mask.view(*mask.shape, *[1] * (v.dim() - 2)) for name, v in found.items()}
    return {**padded, "t": 5 * which % 37 + k, "mask": mask}


def measured(n_obs: int, n_act: int) -> dict[str, float | list[float]]:
    """What COptiDICE knows of its data: the share of rows that start an episode, std of observations and of actions."""
    return {"p0": 0.3, "obs_spread": [0.5 + 0.1 * i for i in range(n_obs)], "action_spread": [0.4 + 0.2 * i for i in range(n_act)]}


TAIL = 3                               # rows of `trajectories` that no end follows


def trajectories(episodes: int = 40) -> dict[str, Tensor]:
    """Columns of a data set of short episodes, from cheap and poor to dear and good, and a tail without an end."""
    length = [5 + k % 4 for k in range(episodes)]
    k = torch.repeat_interleave(torch.arange(episodes + 1), torch.tensor([*length, TAIL])).double()
    n, wave = len(k), torch.sin(0.9 * torch.arange(len(k), dtype=torch.float64))
    end = torch.zeros(n)
    end[torch.tensor(length).cumsum(0) - 1] = 1
    obs, level = batch(0, n, 3, 2), k / episodes
    return {**{name: obs[name] for name in ("obs", "action", "next_obs")}, "cost": (4 * level * (1 + wave)).floor().float(),
            "reward": (level.sqrt() + 0.4 * torch.sin(1.7 * k)).float(),
            "terminal": end * (k % 5 == 0), "timeout": end * (k % 5 != 0)}


def episode(n_obs: int, steps: int = 7) -> dict[str, Tensor]:
    """What a script says in an episode: obs [steps + 1, n_obs], reward [steps], cost [steps]."""
    said = batch(5, steps + 1, n_obs, 1)
    return {"obs": said["obs"], "reward": said["reward"][:-1] + 3, "cost": said["cost"][:-1]}


def state(layout: list[tuple[str, list[int], str]]) -> OrderedDict[str, Tensor]:
    """A state dictionary of OSRL's by formula: every weight has its own numbers; masks are OSRL's own."""
    made = OrderedDict()
    for name, shape, dtype in layout:
        made[name] = ~torch.ones(shape, dtype=torch.bool).tril() if dtype == "bool" else weight(name, tuple(shape))
    return made


class Noise:
    """Stands in for torch.randn: the n-th call gives a fixed wave of the asked shape."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *shape, generator=None, device=None) -> Tensor:
        if len(shape) == 1 and not isinstance(shape[0], int):
            shape = tuple(shape[0])
        self.calls += 1
        return (1.3 * torch.sin(1.7 * self.calls + 0.9 * torch.arange(math.prod(shape), dtype=torch.float64))).view(shape).float()


def checksums(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    """Sum and sum of squares in float64, by name."""
    doubles = {name: t.detach().double() for name, t in sorted(tensors.items())}
    return {name: [float(t.sum()), float(t.square().sum())] for name, t in doubles.items()}
