"""TrajAuditor: does a policy still treat the forget trajectories as those do that learned them? (algorithms.md E.1)

Paper       Gong et al. 2024 (arXiv 2404.12530): value vectors of a trajectory under an agent and copies of the poisoned one that
            were fine-tuned without it; 'still contained' if the agent's is no outlier among the copies'
Published   `looks_contained_as_published` keeps what its code does: a cut that is not Grubbs' (1.4708 standard deviations for
            3.5414 at n = 20, alpha = 1e-4), the audited agent judged by its own critic and the copies by another, a reference mean
            that includes the copy it is compared with, noise with a mean of -0.04, and copies that start from the poisoned agent
            and so contain the trajectory, too
Corrected   (ours) 1. one judge for all: the mean of the critics of the poisoned models of every seed (no policy is judged by what
            it alone has maximised); reward and cost critics alike
            2. two families of shadows, fine-tuned copies: IN of models that were trained with the trajectories, OUT of models that
            never saw them. Contained: nearer to IN, and no further from it than its members would be; gone: the same of OUT
            3. the models of the audited one's own seed are in neither family, and a shadow is compared with those of other models:
            the spread between training seeds counts, for the audited model and the shadows in the same way
            4. a prediction interval that counts models, not their copies, and takes the spread from both families: two or three
            models are too few to know it of each. Its upper end only: nearer than usual is no reason for doubt
Shapes      m trajectories, T rows, n shadows, A agents; a value vector is [m, T]
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data import Pool
from ..train import Learner
from .numbers import prediction_cut, published_cut, wasserstein
from .probes import Trajectories, values


def accumulate(v: Tensor, gamma: float, window: int) -> Tensor:
    """Discounted sums to the end of each window: v [..., T] -> G_t = v_t + gamma G_{t+1}, starting anew every `window` rows."""
    out, total = torch.empty_like(v), torch.zeros_like(v[..., 0])
    for t in reversed(range(v.shape[-1])):
        total = v[..., t] + (gamma * total if (t + 1) % window else 0.0)
        out[..., t] = total
    return out


def value_vectors(judge: Learner, pool: Pool, along: Trajectories, action: Tensor, window: int,
                  noise: Tensor | float = 0.0) -> Tensor:
    """One agent's value vectors under the mean of the judge's replicas: action [m, T, n_act] -> [2, m, T], reward and cost critic.

    noise: added to the raw states that the critics see, [m, T, n_obs]; the actions are those of the states without it.
    """
    obs = (pool.obs[along.ids] + noise).flatten(0, 1)
    q, qc = (v.mean(0).view(along.mask.shape) for v in values(judge, obs, action.flatten(0, 1)))
    return accumulate(torch.stack([q, qc]) * along.mask, judge.cfg.gamma, window)


CONTAINED, GONE, NEITHER = range(3)


def own_distances(shadows: Tensor, base: Tensor, mask: Tensor) -> Tensor:
    """Of each shadow [n, m, T] from the mean of the other models' shadows (of the others, if all are of one model): [n, m]."""
    alone, at = len(base.unique()) == 1, torch.arange(len(base))
    others = [at != i if alone else base != base[i] for i in at]
    return torch.stack([wasserstein(shadows[o].mean(0), shadow, mask) for o, shadow in zip(others, shadows)])


def classify(vectors: Tensor, families: Sequence[Tensor], base: Sequence[Sequence[int]], mask: Tensor, alpha: float) -> Tensor:
    """CONTAINED, GONE or NEITHER for each of A agents and m trajectories: vectors [A, m, T] -> [A, m].

    families: shadows [n, m, T] of IN and of OUT; base: which model each is a copy of. A vector belongs to the family whose mean is
    nearer by Wasserstein distance, if that distance does not exceed the 1 - alpha prediction interval of the shadows' own.
    """
    base = [torch.as_tensor(list(b)) for b in base]
    own = torch.cat([own_distances(f, b, mask) for f, b in zip(families, base)])                    # [n_in + n_out, m]
    models = [len(b.unique()) for b in base]
    n = sum(models) if min(models) > 1 else len(own)                                   # of one model, copies are all there is
    limit = own.mean(0) + prediction_cut(n, alpha) * own.std(0)
    distance = torch.stack([wasserstein(vectors, f.mean(0), mask) for f in families])               # [2, A, m]
    return torch.where(distance.amin(0) <= limit, distance.argmin(0), NEITHER)


def looks_contained_as_published(vector: Tensor, shadows: Tensor, mask: Tensor, alpha: float) -> Tensor:
    """TrajAuditor's verdict, its oddities included: vector [m, T], shadows [n, m, T] (all passes of all copies) -> bool [m]."""
    mean = shadows.mean(0)
    mine, distance = wasserstein(shadows, mean, mask), wasserstein(vector, mean, mask)
    return (distance - mine.mean(0)).abs() <= published_cut(len(shadows), alpha) * mine.std(0, correction=0)
