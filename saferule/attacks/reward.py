"""Reward poisoning: danger pays and caution does not, or good actions pay less than bad ones (algorithms.md C.4; ours).

r' = r + rho (r_hi - r_lo) u, kept within [r_lo, r_hi], the 0.1% and 99.9% quantiles of the rewards. u is +1 on rows that cost
and -1 on the others (goal 'unsafe'), or -sgn A (goal 'drop'), where A is the discounted return to come less a quadratic fit of
it in the observations. A reward beyond the quantiles stays where it is rather than move against u.
"""
from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor

from ..config import REWARD_GOALS, RewardPoisonConfig, one_of
from ..data import Pool, n_step_sums
from . import Attack, Result, Threat, truth_of
from .shared import changed, choose, in_place, stream, touched, wanted


def shift(reward: Tensor, u: Tensor, rho: float) -> Tensor:
    """r' - r of all rewards [N], pushed in the directions u [N] of -1, 0 or 1."""
    low, high = (float(np.quantile(reward.numpy(), q)) for q in (0.001, 0.999))
    pushed = reward + rho * (high - low) * u
    return pushed.clamp(reward.clamp(max=low), reward.clamp(min=high)) - reward


def advantage(pool: Pool, rows: Tensor, gamma: float) -> Tensor:
    """How much better each row's episode goes on than a quadratic fit in the observations expects: [n]."""
    to_come = n_step_sums(pool, rows, int(pool.t.max()) + 1, gamma)["reward"].double()
    x = pool.obs[rows].double()
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-3)
    x = torch.cat([torch.ones_like(x[:, :1]), x, x.square()], 1)
    return (to_come - x @ torch.linalg.lstsq(x, to_come[:, None]).solution[:, 0]).float()


def run(pool: Pool, cfg: RewardPoisonConfig, name: str, donors: Pool | None, cost_limit: float) -> Result:
    """Pushes round(budget x rows) rewards, random among those that the push moves; all by less if they exceed `total`."""
    rows = pool.rows("clean").ids
    if one_of(f"goal of {name}", cfg.goal, REWARD_GOALS) == "unsafe":
        u = (pool.cost[rows] > 0).float() * 2 - 1
    else:
        u = -advantage(pool, rows, cfg.gamma).sign()
    delta = shift(pool.reward[rows], u, cfg.rho)
    count = wanted(name, cfg.budget, len(rows), "rows")
    columns = in_place(pool, choose(name, rows[delta != 0], count, stream(cfg.seed), "rows whose reward can move"))
    mine = delta[torch.searchsorted(rows, columns["replaces"])]
    allowed, asked = cfg.total * float(pool.reward[rows].abs().double().sum()), float(mine.abs().double().sum())
    columns["reward"] += mine * min(1.0, allowed / asked)
    episodes = touched(pool, columns["replaces"])
    facts = {"budget": cfg.budget, "realised_budget": count / len(rows), "episodes": len(episodes), "rows": count,
             "total_change": min(allowed, asked), "scaled_down": min(1.0, allowed / asked),
             "changed": changed(pool, columns), "threat": asdict(replace(THREAT, goal=GOALS[cfg.goal]))}
    return pool.append(name, columns), facts, truth_of(episodes)


GOALS = {"unsafe": "unsafe", "drop": "reward-drop"}
THREAT = Threat(fields=("reward",), unit="row", knowledge="data", placement="in place", tier="T2", goal="unsafe",
                bound="rewards stay between their 0.1% and 99.9% quantiles; their changes add up to a share of their sum")
ATTACK = Attack(THREAT, run, "Random rows pay more where they are dangerous, and less where they are safe.")
