"""Windows: K consecutive steps of an episode with what is still to come, the minibatches of sequence learners.

Windows are made of each replica's own rows, sorted by (episode, t). They never bridge a gap where rows were removed.

To-go    The return-to-go and cost-to-go of a row are undiscounted sums over its episode's rows of the condition from there on.
         A removed row counts as the mean of those that are left ahead of it, so that a forget set of scattered rows does not
         make every episode look cheaper. An episode whose last row is missing (removed, or a tail that was never ended) has no
         known future and is left out.
Shapes   R replicas, B windows, K steps, N rows of the pool, n rows of a condition, U distinct conditions
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .data import Pool, Rows, Units
from .errors import UserError


class Windows(NamedTuple):
    """K steps each, padded with zeros on the right: obs [R, B, K, n_obs], action [R, B, K, n_act], all others [R, B, K]."""
    obs: Tensor                        # in the learner's units
    action: Tensor
    ret: Tensor                        # return-to-go, divided by the learner's reward scale
    cost_to_go: Tensor                 # raw
    cost: Tensor                       # of the step, raw
    t: Tensor                          # int64, time step in the episode (goes on counting where padded)
    mask: Tensor                       # float: 1, or 0 where padded
    weight: Tensor | float = 1.0       # trust in a forget row, in [0, 1]


class Track(NamedTuple):
    """The usable rows of a condition in the order of time, [n] each."""
    ids: Tensor                        # int64, pool rows
    weight: Tensor                     # float32
    ret: Tensor                        # float64, return-to-go
    cost: Tensor                       # float64, cost-to-go
    left: Tensor                       # int64, rows until the next gap or the episode's end, this one included
    of: Tensor                         # int64, which episode, counted from 0


def track(pool: Pool, rows: Rows) -> Track:
    """Raises UserError if no episode of the rows has its end."""
    order = (pool.episode[rows.ids] * (int(pool.t.max()) + 1) + pool.t[rows.ids]).argsort()
    ids, weight = rows.ids[order], rows.weight[order]
    episode, of, count = pool.episode[ids].unique_consecutive(return_inverse=True, return_counts=True)
    last = count.cumsum(0) - 1                                                 # position of each episode's last row
    ended = (pool.terminal | pool.timeout)[ids[last]][of]
    if not ended.any():
        raise UserError(f"none of {len(episode):,} episodes has its end (a terminal or time-out row) among the rows; "
                        f"what was still to come is unknown in all of them.")
    t, n = pool.t[ids], len(ids)
    position = torch.arange(n, device=ids.device)
    ahead = last[of] - position + 1                                            # rows that are there, this one included
    stretch = (t[last][of] - t + 1).double() / ahead                           # 1 where nothing is missing

    def to_go(x: Tensor) -> Tensor:
        total = x.double().cumsum(0)
        return (total[last][of] - total + x) * stretch

    breaks = torch.ones(n, dtype=torch.bool, device=ids.device)                # does nothing follow this row?
    breaks[:-1] = (of[1:] != of[:-1]) | (t[1:] != t[:-1] + 1)
    ends = position[breaks]
    left = ends[torch.searchsorted(ends, position)] - position + 1
    found = Track(ids, weight, to_go(pool.reward[ids]), to_go(pool.cost[ids]), left, of)
    found = Track(*(column[ended] for column in found))
    return found._replace(of=found.of.unique_consecutive(return_inverse=True)[1])


def episodes(found: Track) -> tuple[Tensor, Tensor, Tensor]:
    """Of each episode: rows int64 [m], return and cost float64 [m], to-go from its first row."""
    rows = found.of.bincount()
    first = rows.cumsum(0) - rows
    return rows, found.ret[first], found.cost[first]


def distinct(rows: Sequence[Rows]) -> tuple[list[Rows], list[int]]:
    """Replicas of one condition may share one Rows: the different ones, and which of them each replica has."""
    seen: dict[int, int] = {}
    which = [seen.setdefault(id(r.ids), len(seen)) for r in rows]
    return [rows[which.index(u)] for u in range(len(seen))], which


class WindowSampler:
    """Windows that start at any row, drawn with replacement, replica r from its own rows, on the pool's device.

    cheap: if positive, an episode is drawn with weight max(0, cheap - its cost) (OSRL: 70), then its start uniformly;
    otherwise every row is as likely as any other to start a window.
    """

    def __init__(self, pool: Pool, rows: Sequence[Rows], batch: int, steps: int, units: Units, cheap: float = 0.0):
        if any(len(r.ids) == 0 for r in rows):
            raise UserError("a data condition has no rows; nothing can be sampled from it.")
        device = pool.obs.device
        self.batch, self.steps, self.split = batch, torch.arange(steps, device=device), [pool.obs.shape[1], pool.action.shape[1], 1]
        self.packed = torch.cat([pool.obs, pool.action, pool.cost[:, None]], 1).contiguous()                      # [N, D]
        self.mean, self.std, self.scale = (u.to(device)[:, None, None] for u in units)                            # [R, 1, 1, ...]
        different, which = distinct(rows)
        tracks = [track(pool, r) for r in different]
        width = max(len(found.ids) for found in tracks)
        flat = lambda columns: torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in columns]).flatten()
        self.ids, self.left, self.ret, self.cost, self.weight = (
            flat([getattr(found, name) for found in tracks]) for name in ("ids", "left", "ret", "cost", "weight"))    # [U n] each
        self.t, self.ret, self.cost = pool.t[self.ids], self.ret.float(), self.cost.float()
        self.weighted = bool((torch.cat([found.weight for found in tracks]) != 1).any())
        chance = torch.stack([torch.nn.functional.pad(chances(found, cheap), (0, width - len(found.ids))) for found in tracks])
        which = torch.tensor(which, device=device)
        self.offset = which[:, None] * width                                                                      # [R, 1]
        self.upto = chance.cumsum(1)[which].contiguous()                                                          # [R, n]
        self.last = torch.tensor([len(found.ids) - 1 for found in tracks], device=device)[which][:, None]

    def start_where_weighted(self) -> WindowSampler:
        """From now on every row of positive weight is as likely as any other to start a window. Returns itself.

        Raises UserError if a replica has none in an episode whose end is known.
        """
        width = self.upto.shape[1]
        self.upto = (self.weight > 0).double().view(-1, width).cumsum(1)[self.offset[:, 0] // width].contiguous()
        if not bool((self.upto[:, -1] > 0).all()):
            raise UserError("no row of positive weight lies in an episode whose end (a terminal or time-out row) is known.")
        return self

    def sample(self, generator: torch.Generator) -> Windows:
        u = torch.rand(len(self.offset), self.batch, generator=generator, device=self.packed.device, dtype=torch.float64)
        start = torch.searchsorted(self.upto, u * self.upto[:, -1:], right=True).clamp(max=self.last) + self.offset   # [R, B]
        mask = (self.steps < self.left[start][..., None]).float()                                                 # [R, B, K]
        at = (start[..., None] + self.steps).clamp(max=len(self.ids) - 1)
        obs, action, cost = self.packed[self.ids[at]].split(self.split, -1)
        obs = (obs - self.mean) / self.std
        return Windows(obs * mask[..., None], action * mask[..., None], self.ret[at] / self.scale * mask, self.cost[at] * mask,
                       cost[..., 0] * mask, self.t[start][..., None] + self.steps, mask,
                       self.weight[at] * mask if self.weighted else 1.0)


def chances(found: Track, cheap: float) -> Tensor:
    """Weights [n], float64, with which the rows start a window. Raises UserError if all are 0."""
    if cheap <= 0:
        return torch.ones(len(found.ids), dtype=torch.float64, device=found.ids.device)
    rows, _, cost = episodes(found)
    weight = (cheap - cost).clamp(min=0)
    if not weight.any():
        raise UserError(f"every episode costs {cheap:g} or more, so that none would be drawn; raise 'cheap' or set it to 0.")
    return (weight / rows)[found.of]
