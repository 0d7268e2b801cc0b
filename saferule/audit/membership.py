"""Membership inference: can the forget trajectories be told from ones like them that nobody trained on? (algorithms.md E.2; ours)

The score of a trajectory is minus its mean squared TD error, of either critic against its own targets; the AUC is the chance that a
member (a forget trajectory) scores higher than a non-member (a held-out trajectory, forged in the same way). An AUC of 0.5 is
not what forgetting should give, the AUC of the retrained models is: the trajectories may differ in more than membership. Far
below that, they stand out as unnaturally badly fitted, which tells them as well.
Shapes      R replicas, m members, n non-members
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..data import Batch, Pool
from ..train import Learner
from .probes import CHUNK, Trajectories


@torch.no_grad()
def scores(learner: Learner, pool: Pool, along: Trajectories, seed: int = 0) -> Tensor:
    """Minus the mean squared TD error of reward critic (raw units) and cost critic, mean over heads: [2, R, m].

    Replicas are scored one by one with the same noise in their targets.
    """
    out = []
    for r in range(learner.replicas):
        one = learner.pick([r])
        one.seed_noise(seed)
        parts = [_errors(one, pool, ids) for ids in along.ids.flatten().split(CHUNK)]
        out.append(-torch.cat(parts, -1).view(2, *along.mask.shape).mul(along.mask).sum(-1) / along.mask.sum(-1))
    return torch.stack(out, 1)


def _errors(one: Learner, pool: Pool, ids: Tensor) -> Tensor:
    """Squared TD errors of one replica at some rows: [2, rows]."""
    scale, end = one.reward_scale[:, None], pool.terminal | pool.timeout if one.parity else pool.terminal
    batch = Batch(one.standardise(pool.obs[ids][None]), pool.action[ids][None], pool.reward[ids][None] / scale,
                  pool.cost[ids][None], one.standardise(pool.next_obs[ids][None]), end[ids][None].float())
    target = one.targets(batch)
    error = lambda q, y, unit: ((q - y[:, None]) * unit).square().mean(1)[0]
    return torch.stack([error(one.critic(batch.obs, batch.action), target.reward, scale),
                        error(one.cost_critic(batch.obs, batch.action), target.cost, 1.0)])


def features(pool: Pool, along: Trajectories) -> np.ndarray:
    """What trajectories are matched by: sums of reward and cost as labelled, and rows, [m, 3]."""
    total = lambda column: (column[along.ids].double() * along.mask).sum(-1)
    return torch.stack([total(pool.reward), total(pool.cost), along.mask.double().sum(-1)], -1).cpu().numpy()


def match(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a member and a non-member that are alike: features [m, k] and [n, k] -> indices of min(m, n) pairs.

    The pairs' total Euclidean distance is the smallest there is, features in units of their standard deviation over both.
    """
    from scipy.optimize import linear_sum_assignment
    both = np.concatenate([members, others])
    scale = np.where(both.std(0) > 0, both.std(0), 1.0)
    return linear_sum_assignment(np.linalg.norm((members[:, None] - others[None]) / scale, axis=-1))


def resampled_auc(member: np.ndarray, other: np.ndarray, reps: int, seed: int) -> np.ndarray:
    """The AUC of `reps` bootstrap samples of members and of non-members: [..., m] and [..., n] -> [reps, ...].

    The samples are the same for every model and every call with the same seed, so that differences are those of pairs.
    """
    rng, m, n = np.random.default_rng(seed), member.shape[-1], other.shape[-1]
    times = lambda k: np.stack([np.bincount(rng.integers(k, size=k), minlength=k) for _ in range(reps)]) / k       # [reps, k]
    a, b = times(m), times(n)
    gap = member[..., :, None] - other[..., None, :]
    wins = (gap > 0) + 0.5 * (gap == 0)                                               # [..., m, n]
    return np.einsum("xm,...mn,xn->x...", a, wins, b, optimize=True)
