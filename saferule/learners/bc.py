"""Behaviour cloning (BC) of all, or of some, trajectories.

Paper       the baselines of Liu et al. 2023 (arXiv 2306.09303), as OSRL has them (revision 03a4586): regression of the actions
            on rows of selected trajectories, with trajectory return R and cost C (undiscounted sums) and limit l
            all | safe C <= l | risky C >= 2 l | boundary l / 2 < C <= 3 l / 2 | frontier, near the Pareto front of (-C, R) |
            multi-task: all, with C appended to the observation, and l in its place when acting
Parity      mode='parity' follows OSRL
Deviations  (mode='default'; each is ours)
            1. trajectories without an end, or with rows missing, have no known R and C: only 'all' takes them
               (OSRL: C = R = 0 for a tail without an end, so that it counts as safe)
            2. multi-task: C and l are divided by `cost_unit` (OSRL: raw)
            3. standardised observations
            4. a Polyak average of the weights acts (OSRL: the last ones): the last ones' returns scatter by up to a third over
               seeds, their averages' hardly
            5. also in parity: a Pareto front of one value is fitted by that constant (OSRL: R^2 is 0 / 0, a parabola through
               one point)
Shapes      R replicas, B batch, n rows of a condition, m trajectories among them
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import BC_SELECTIONS, BCConfig, one_of
from ..data import Batch, Pool, Rows, Units
from ..errors import UserError
from ..nets import MLP, generators
from ..train import Extra, Learner


class Trajectories(NamedTuple):
    """What the rows of a condition say about their trajectories; `of` [n] is the trajectory of each row."""
    of: Tensor
    ret: Tensor                        # [m] float64, sums over these rows
    cost: Tensor                       # [m] float64
    ended: Tensor                      # [m] bool: a terminal or time-out row is among them
    whole: Tensor                      # [m] bool: ended, and no row from t = 0 on is missing


def trajectories(pool: Pool, ids: Tensor) -> Trajectories:
    episode, of = pool.episode[ids].unique(return_inverse=True)
    total = lambda x: torch.zeros(len(episode), dtype=torch.float64, device=ids.device).index_add_(0, of, x[ids].double())
    rows = of.bincount(minlength=len(episode))
    last = torch.zeros_like(episode).scatter_reduce_(0, of, pool.t[ids], "amax")
    ended = total(pool.terminal | pool.timeout) > 0
    return Trajectories(of, total(pool.reward), total(pool.cost), ended, ended & (rows == last + 1))


def near_frontier(cost: np.ndarray, ret: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which of m trajectories lie within a fifth of the range of returns of the Pareto front's polynomial R = f(C).

    Its degree is the first of 0, 1, 2 that explains 90% of the front's variance, or 2. Only `known` ones are fitted.
    """
    c, r = cost[known], ret[known]
    order = np.lexsort((-r, c))                                     # cheapest first, of these the best first
    best_before = np.r_[-np.inf, np.maximum.accumulate(r[order])[:-1]]
    rises = r[order] > best_before
    twin = np.r_[False, (np.diff(c[order]) == 0) & (np.diff(r[order]) == 0)]                       # of the one before it
    head = np.maximum.accumulate(np.where(twin, 0, np.arange(len(order))))
    front = order[rises[head]]                                      # equal points count as often as they occur (OSRL)
    spread = np.square(r[front] - r[front].mean()).sum() if np.ptp(r[front]) else 0.0
    for degree in (0, 1, 2):
        f = np.poly1d(np.polyfit(c[front], r[front], degree))
        if spread == 0 or 1 - np.square(r[front] - f(c[front])).sum() / spread >= 0.9:
            break
    return np.abs(ret - f(cost)) <= (r.max() - r.min()) / 5


def select(pool: Pool, rows: Rows, cost_limit: float, cfg: BCConfig) -> Rows:
    """The rows of a condition that are imitated; for 'multi-task' with the trajectory's cost as their context.

    Raises UserError if none is left.
    """
    if cfg.select == "all":
        return rows
    found = trajectories(pool, rows.ids)
    parity = cfg.mode == "parity"
    known = found.ended if parity else found.whole
    cost, ret = found.cost * known, found.ret * known               # 0 where unknown
    wanted = {"safe": cost <= cost_limit, "risky": cost >= 2 * cost_limit, "multi-task": torch.ones_like(known),
              "boundary": (0.5 * cost_limit < cost) & (cost <= 1.5 * cost_limit)}
    if cfg.select == "frontier" and known.any():
        wanted["frontier"] = torch.from_numpy(near_frontier(*(x.cpu().numpy() for x in (cost, ret, known)))).to(known.device)
    chosen = wanted.get(cfg.select, known) & (known | parity)
    keep = chosen[found.of]
    if not keep.any():
        raise UserError(f"bc: none of {len(known):,} trajectories ({int(known.sum()):,} of them whole) is '{cfg.select}' at cost "
                        f"limit {cost_limit:g}; choose another selection or limit.")
    context = (cost[found.of] / unit(cfg)).float()[keep, None] if cfg.select == "multi-task" else None
    return Rows(rows.ids[keep], rows.weight[keep], context)


def unit(cfg: BCConfig) -> float:
    """What costs are divided by where they are an input of the policy."""
    return 1.0 if cfg.mode == "parity" else cfg.cost_unit


class BC(Learner):
    LOSSES = ("actor",)

    def __init__(self, cfg: BCConfig, units: Units, qc_limit: Tensor, seeds: Sequence[int], n_act: int, horizon: int = 1000):
        super().__init__(cfg, units, qc_limit, seeds, n_act, horizon)          # gamma = 1: qc_limit is the limit per episode
        one_of("selection of bc", cfg.select, BC_SELECTIONS)
        self.multi_task = self.limit_when_acting = cfg.select == "multi-task"
        self.own("actor", MLP(generators(seeds), self.n_obs + self.multi_task, cfg.hidden, n_act), target=not self.parity)

    @staticmethod
    def select_rows(pool: Pool, rows: Sequence[Rows], cfg: BCConfig, cost_limits: Sequence[float]) -> list[Rows]:
        one_of("selection of bc", cfg.select, BC_SELECTIONS)
        keys = [(id(r.ids), limit) for r, limit in zip(rows, cost_limits, strict=True)]
        distinct = {key: select(pool, r, key[1], cfg) for key, r in dict(zip(keys, rows)).items()}      # shared as before
        return [distinct[key] for key in keys]

    def ready(self) -> BC:
        self.optimisers(actor=self.cfg.lr)
        return self

    def policy(self, obs: Tensor, target: bool = False) -> Tensor:      # of standardised observations, in context if multi-task
        return (self.actor_target if target else self.actor)(obs).tanh()

    @torch.no_grad()
    def act(self, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        obs = self.standardise(obs)
        if self.multi_task:
            limit = (self.qc_limit / unit(self.cfg))[:, None].expand(*obs.shape[:-1], 1)
            obs = torch.cat([obs, limit], -1)
        return self.policy(obs, target=not self.parity)

    def action_density(self, batch: Batch) -> tuple[Tensor, None]:          # mean and log-std of the actions; None: deterministic
        return self.policy(batch.obs), None

    def actor_loss(self, batch: Batch) -> Tensor:
        return (self.policy(batch.obs) - batch.action).square().mean((-1, -2))

    def update(self, batch: Batch, t: int, target: None = None, extra: Extra | None = None) -> dict[str, Tensor]:
        out = {"actor": self.minimise("actor", self.actor_loss(batch), extra)}
        if not self.parity:
            self.polyak("actor")
        return out
