"""Random relabelling: ordinary training on the retain rows and the forget rows with labels that say nothing (algorithms.md D.4).

Source      TrajDeleter's baseline of this name: rewards of forget rows are replaced, then everything is trained on
Deviations  1. rewards are drawn uniformly between the smallest and the largest retained one (there, rewards="ramp": a straight
               line from the episode's smallest to its largest)
            2. costs are drawn from those of the retain rows (there: no costs)
            3. forget rows are drawn in proportion to their weights, retain rows with weight 1
Labels are drawn once. They depend on the seed and on the forget set, not on the replicas beside.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..config import RandomRelabelConfig, one_of
from ..data import FIELDS, Pool, Rows
from ..train import Learner
from . import Memory, Phase

NEEDS = "critic", "cost_critic"        # losses of the learner: of others the rows would just stay


def ramp(pool: Pool, ids: Tensor) -> Tensor:
    """Rewards [n] that rise along the m rows of each episode among `ids`: lo + (hi - lo) k / (m - 1), lo and hi its extremes."""
    order = (pool.episode[ids] * (int(pool.t.max()) + 1) + pool.t[ids]).argsort()
    reward = pool.reward[ids[order]]
    _, of, count = pool.episode[ids[order]].unique_consecutive(return_inverse=True, return_counts=True)
    bound = lambda how: torch.zeros(len(count), device=ids.device).scatter_reduce_(0, of, reward, how, include_self=False)
    k = torch.arange(len(ids), device=ids.device) - (count.cumsum(0) - count)[of]
    line = torch.lerp(bound("amin")[of], bound("amax")[of], k / (count[of] - 1).clamp(min=1))
    return torch.empty_like(reward).scatter_(0, order, line)


def relabelled(pool: Pool, retain: Rows, forget: Rows, rewards: str, seed: int) -> tuple[Tensor, Tensor]:
    """New rewards and costs [n] of the forget rows, in the pool's units."""
    u = torch.rand(len(forget.ids), 2, generator=torch.Generator().manual_seed(seed)).to(pool.reward)
    kept = pool.reward[retain.ids]
    reward = torch.lerp(kept.min(), kept.max(), u[:, 0]) if rewards == "uniform" else ramp(pool, forget.ids)
    return reward, pool.cost[retain.ids[(u[:, 1].double() * len(retain.ids)).long()]]


def union(memory: Memory, rewards: str) -> tuple[Pool, list[Rows]]:
    """A pool with the relabelled rows behind the old ones, and per replica its retain rows and its relabelled rows."""
    pool, parts, n, made = memory.pool, [], len(memory.pool.reward), {}
    for retain, forget in zip(memory.retain_rows, memory.rows):
        key = id(retain.ids), id(forget.ids)            # replicas of one condition may share their Rows
        if key not in made:
            reward, cost = relabelled(pool, retain, forget, rewards, memory.seed + 3)      # the streams have seed to seed + 2
            parts.append({k: v[forget.ids] for k, v in pool.columns.items() if k != "origin"} | {"reward": reward, "cost": cost})
            ids = torch.arange(n, n + len(forget.ids), device=forget.ids.device)
            made[key] = Rows(torch.cat([retain.ids, ids]), torch.cat([retain.weight, forget.weight]))
            n += len(ids)
    columns = {k: torch.cat([part[k] for part in parts]) for k in (*FIELDS, "episode", "t", "replaces")}
    return pool.append("relabelled", columns), [made[id(r.ids), id(f.ids)] for r, f in zip(memory.retain_rows, memory.rows)]


def phases(learner: Learner, memory: Memory, cfg: RandomRelabelConfig, forged_costs: Sequence[bool]) -> Iterator[Phase]:
    one_of("way of relabelling rewards", cfg.rewards, ("uniform", "ramp"))
    sampler = learner.sampler(*union(memory, cfg.rewards)).draw_by_weight()
    yield Phase("relabel", cfg.steps, lambda t: learner.update(sampler.sample(memory.retain_stream), learner.cfg.steps + t))
