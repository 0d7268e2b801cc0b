"""How far is a model from the retrained ones, in units of how far they are from one another? (algorithms.md E.4; ours)

Probed at forget rows: actions by half the energy distance over the diagonal of the action space; critics at the forged action by
the RMS difference over the standard deviation of the retrained one's values. 1 means: as far from a retrained model as another
seed of it.
Shapes      A agents, K sampled actions, m trajectories, T rows
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .numbers import energy


def action_distances(actions: Tensor, gold: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """actions [K, A, m, T, n_act], gold [K, G, m, T, n_act] -> sums over the rows of each trajectory [A, G, m], rows [m]."""
    diagonal = 2 * actions.shape[-1] ** 0.5
    apart = lambda a, g: (energy(actions[:, a], gold[:, g]) * mask).sum(-1) / diagonal
    sums = [torch.stack([apart(a, g) for g in range(gold.shape[1])]) for a in range(actions.shape[1])]
    return torch.stack(sums), mask.sum(-1)


def value_distances(values: Tensor, gold: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """values [A, m, T], gold [G, m, T] -> squared differences over gold's variance, summed per trajectory [A, G, m]; rows [m]."""
    spread = torch.stack([g[mask].double().std(correction=0) for g in gold]).float().clamp(min=1e-9)
    gap = (values[:, None] - gold[None]) / spread[:, None, None]
    return (gap.square() * mask).sum(-1), mask.sum(-1)


def to_retrained(sums: np.ndarray, rows: np.ndarray, gold: Sequence[int], root: bool, index: np.ndarray) -> np.ndarray:
    """Mean distance of each agent to the retrained ones but itself, over that between two of them: sums [A, G, m] -> [reps, A].

    gold: which agents are retrained, in the order of the second axis. root: the sums are squares. index: trajectories that count,
    [reps, k]. The mean over the retrained agents is 1.
    """
    found = sums[..., index].sum(-1) / rows[index].sum(-1)                             # [A, G, reps]
    found = np.sqrt(found) if root else found
    other = np.arange(len(sums))[:, None] != np.asarray(gold)[None]                    # [A, G]
    mean = (found * other[..., None]).sum(1) / other.sum(1)[:, None]                   # [A, reps]
    return (mean / mean[list(gold)].mean(0)).T


def closures(distances: np.ndarray, poisoned: Sequence[int]) -> np.ndarray:
    """1 - (D - 1) / (D_p - 1) of each agent, D_p the mean over the poisoned ones: [reps, A]; NaN where D_p <= 1."""
    gap = distances[:, list(poisoned)].mean(1, keepdims=True) - 1 if len(poisoned) else np.full((len(distances), 1), np.nan)
    return np.where(gap > 0, 1 - (distances - 1) / np.where(gap > 0, gap, 1.0), np.nan)
