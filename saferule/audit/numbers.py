"""The statistics of the audits: distances, outlier rules, ranks and ratios. Pure functions of numbers; hand cases in the tests."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor


def wasserstein(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """1-D Wasserstein distance between the multisets of entries of x and y [..., n] (broadcast) -> [...].

    Between equally many numbers it is the mean |difference| of the sorted ones. mask [..., n]: entries that count, the same in
    both. (algorithms.md E.1: {0, 1, 3} and {5, 6, 8} are 5 apart.)
    """
    if mask is None:
        return (x.sort(-1).values - y.sort(-1).values).abs().mean(-1)
    last = lambda v: v.masked_fill(~mask, torch.inf).sort(-1).values                  # what does not count comes last in both
    count = mask.sum(-1, keepdim=True)
    kept = torch.arange(mask.shape[-1], device=mask.device) < count
    return torch.where(kept, (last(x) - last(y)).abs().nan_to_num(0.0), 0.0).sum(-1) / count[..., 0]


def published_cut(n: int, alpha: float) -> float:
    """TrajAuditor's outlier cut, in population standard deviations, as its code has it: t sqrt((n-1) / (n (n-2))).

    t is the 1 - alpha / 2n quantile with n - 2 degrees of freedom. It looks like Grubbs', and is not: 1.4708 for 3.5414 at n = 20.
    """
    return float(stats.t.ppf(1 - alpha / (2 * n), n - 2) * np.sqrt((n - 1) / (n * (n - 2))))


def grubbs_cut(n: int, alpha: float) -> float:
    """Grubbs' two-sided critical value: (n-1) / sqrt(n) sqrt(t^2 / (n-2+t^2)), t as in `published_cut`."""
    t = stats.t.ppf(1 - alpha / (2 * n), n - 2)
    return float((n - 1) / np.sqrt(n) * np.sqrt(t**2 / (n - 2 + t**2)))


def prediction_cut(n: int, alpha: float) -> float:
    """How many standard deviations (n - 1 in the denominator) a new value may lie from the mean of n: t sqrt(1 + 1/n)."""
    return float(stats.t.ppf(1 - alpha / 2, n - 1) * np.sqrt(1 + 1 / n))


def auc(member: np.ndarray, other: np.ndarray) -> float:
    """P(a member scores higher than another), ties count half (Mann-Whitney)."""
    member, other = np.asarray(member, float), np.sort(np.asarray(other, float))
    below, upto = np.searchsorted(other, member, "left"), np.searchsorted(other, member, "right")
    return float((below + upto).mean() / (2 * len(other)))


def gaussian_kl(mean1: Tensor, std1: Tensor, mean2: Tensor, std2: Tensor) -> Tensor:
    """KL(N(mean1, std1) || N(mean2, std2)), per entry."""
    return (std2 / std1).log() + (std1.square() + (mean1 - mean2).square()) / (2 * std2.square()) - 0.5


def energy(x: Tensor, y: Tensor) -> Tensor:
    """Half the energy distance of two policies at each state, from K actions each [K, ..., n_act] -> [...].

    E|X - Y| - E|X - X'| / 2 - E|Y - Y'| / 2. Draws of one number are not compared (they may share their noise), so that the
    estimate is unbiased, and of a policy with itself 0. Of two deterministic policies it is |x - y|.
    """
    K = len(x)
    if K == 1:
        return (x - y)[0].norm(dim=-1)
    mean = lambda a, b: sum((a - b.roll(k, 0)).norm(dim=-1).mean(0) for k in range(1, K)) / (K - 1)
    return mean(x, y) - mean(x, x) / 2 - mean(y, y) / 2


def interval(statistic: Callable[[np.ndarray], np.ndarray], n: int, reps: int, seed: int) -> tuple[float, float]:
    """95% percentile bootstrap over n trajectories: statistic maps indices [reps, n] to values [reps]."""
    low, high = np.quantile(statistic(np.random.default_rng(seed).integers(n, size=(reps, n))), [0.025, 0.975])
    return float(low), float(high)
