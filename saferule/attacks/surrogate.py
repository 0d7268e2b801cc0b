"""A policy of the attacker's own, learned offline from the data: BCQ-Lag with its usual settings (ours)."""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..config import CONFIGS
from ..data import Pool, Rows, measure_units
from ..errors import UserError
from ..learners import discounted_limit
from ..learners.bcq_lag import BCQLag
from ..train import fit
from .shared import stream

CHUNK = 4096                           # rows that a surrogate looks at together: bounds the memory, changes no number


def train_surrogate(attack: str, pool: Pool, rows: Tensor, steps: int, cost_limit: float, seed: int,
                    reward: Tensor | None = None) -> BCQLag:
    """One replica trained on some rows of the pool, its weights fixed; the first fifth of the steps fits the VAE alone.

    reward: [N] what it learns to seek instead of the pool's rewards; it then heeds no cost limit. Raises UserError for no steps.
    """
    if steps < 1:
        raise UserError(f"{attack}: its surrogate needs at least 1 step of training, got {steps}; set surrogate_steps.")
    cfg = replace(CONFIGS["bcq_lag"], steps=steps, vae_steps=steps // 5, adapt_lam=reward is None)
    pool, mine = pool if reward is None else Pool({**pool.columns, "reward": reward}), [Rows(rows, torch.ones(len(rows)))]
    units, horizon = measure_units(pool, mine), int(pool.t[rows].max()) + 1
    if reward is not None:                                            # a rare cost has a quantile of 0
        units = units._replace(reward_scale=torch.maximum(units.reward_scale, 0.1 * reward[rows].abs().max()))
    limit = torch.tensor([discounted_limit(cost_limit, cfg.gamma, horizon)])
    learner = BCQLag(cfg, units, limit, [seed], pool.action.shape[1], horizon).ready()
    learner.seed_noise(seed)
    sampler, draws = learner.sampler(pool, mine), stream(seed + 1)
    fit(lambda t: learner.update(sampler.sample(draws), t), steps, learner, log_every=steps)
    return learner.requires_grad_(False)
