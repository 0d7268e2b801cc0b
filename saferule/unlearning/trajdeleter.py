"""TrajDeleter: forget trajectories are made to look worthless, then the rest converges towards the original (algorithms.md D.5).

Source      Gong et al. (TrajDeleter), as its public code has it: rounds of a block of ordinary updates on retain rows and a block
            on forget rows with negated rewards, everything in an update included; then critics regress on retain rows, by
            `anchor_weight` also on targets of a frozen copy of the original
Deviations  1. costs of forget rows become c_max - c, with c_max the largest cost among the replica's rows (flip_costs=False: as
               they are; there: no costs)
            2. the anchor holds the reward critic only; anchor="far" takes only the half of the retain rows that lies
               farthest from the forget rows, because the original is poisoned ("off": no anchor)
            3. blocks in proportion to the budget; the learner's own learning rates, Adam moments and counters
            4. the actor's loss is not scaled on forget rows (there by 1)
            5. forget rows are drawn in proportion to their weights; the weights' mean does not matter here
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..config import TrajDeleterConfig, one_of
from ..data import Batch, Rows
from ..errors import UserError
from ..train import Learner
from . import Memory, Phase

NEEDS = "critic", "cost_critic"        # losses of the learner
CHUNK, REFERENCES = 8192, 1024         # rows at a time, and forget rows looked at, when distances are measured


def worthless(batch: Batch, c_max: Tensor | None) -> Batch:
    """Rewards negated; with c_max [R, 1] also costs c_max - c."""
    batch = batch._replace(reward=-batch.reward)
    return batch if c_max is None else batch._replace(cost=c_max - batch.cost)


def far(learner: Learner, memory: Memory) -> list[Rows]:
    """Of each replica's retain rows those whose distance to the nearest forget row is above the median of these distances.

    Distances are Euclidean in standardised observation and action, to at most REFERENCES forget rows at equal intervals.
    """
    pool, found = memory.pool, {}

    def place(ids: Tensor, spread: Tensor) -> Tensor:
        return torch.cat([pool.obs[ids] / spread, pool.action[ids]], 1)

    for retain, forget in zip(memory.retain_rows, memory.rows):
        key = id(retain.ids), id(forget.ids)            # replicas of one condition may share their Rows
        if key not in found:
            spread = pool.obs[retain.ids].std(0).clamp(min=1e-3)
            known = forget.ids[forget.weight > 0]
            if not len(known):
                raise UserError("trajdeleter: every row of a forget set has weight 0; there is nothing to forget.")
            known = place(known[::-(-len(known) // REFERENCES)], spread)
            nearest = torch.cat([torch.cdist(place(part, spread), known).amin(1) for part in retain.ids.split(CHUNK)])
            keep = ~(nearest <= nearest.median())
            if not keep.any():
                raise UserError("trajdeleter: no retain row is farther from the forget rows than the others; use anchor='off'.")
            found[key] = Rows(retain.ids[keep], retain.weight[keep])
    return [found[id(r.ids), id(f.ids)] for r, f in zip(memory.retain_rows, memory.rows)]


def phases(learner: Learner, memory: Memory, cfg: TrajDeleterConfig, forged_costs: Sequence[bool]) -> Iterator[Phase]:
    one_of("anchor of trajdeleter", cfg.anchor, ("original", "far", "off"))
    rest = cfg.steps - 2 * cfg.rounds * cfg.block
    if rest < 0:
        raise UserError(f"trajdeleter: {cfg.rounds} rounds of 2 x {cfg.block} steps do not fit into {cfg.steps}; shorten 'block'.")
    c_max = None
    if cfg.flip_costs:
        c_max = torch.stack([memory.pool.cost[torch.cat([r.ids, f.ids])].max() for r, f in zip(memory.retain_rows, memory.rows)])
        c_max = c_max.to(learner.device)[:, None]

    def remove(t: int):
        return learner.update(worthless(memory.forget_drawn()[0], c_max), learner.cfg.steps + t)

    for n in range(1, cfg.rounds + 1):
        yield Phase(f"retain {n}", cfg.block, memory.ordinary)
        yield Phase(f"remove {n}", cfg.block, remove)
    if cfg.anchor == "off" or not cfg.anchor_weight:
        yield Phase("converge", rest, memory.ordinary)
        return
    original = learner.pick(range(learner.replicas)).requires_grad_(False)
    original.noise = learner.noise                                 # one stream, which is saved and resumed
    sampler = learner.sampler(memory.pool, far(learner, memory)) if cfg.anchor == "far" else None

    def converge(t: int):
        retain = memory.retain()
        at = sampler.sample(memory.retain_stream) if sampler else retain
        target = original.targets(at)
        return learner.update(retain, learner.cfg.steps + t, extra={
            "critic": lambda: cfg.anchor_weight * learner.critic_loss(at, target)})

    yield Phase("converge", rest, converge)
