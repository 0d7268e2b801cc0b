"""Negative preference: the likelihood of forget actions falls, and the push fades as it falls (algorithms.md D.8).

Source      NPO (Zhang et al. 2024, arXiv 2404.05868): (2 / beta) log(1 + (pi / pi_ref)^beta), pi_ref the frozen checkpoint; for
            language models there. For policies, with all that follows: ours
Ours        1. rows whose log-ratio is below -dead_zone / beta are left alone; the gradient in a row's mean action is clipped
            2. a hinge on the distance to the forget action: met exactly, it gives the likelihood no slope
            3. no gradient reaches the standard deviation, and the weight of the entropy rests: the policy shall not forget by
               becoming noisy everywhere
            4. a deterministic policy (BC) counts as a normal one with standard deviation `spread`
            5. CDT sees forget rows in windows of the data that it was trained on, with their to-go as poisoned, and learns at
               `rate` times its rate, not at what its schedule left of it
Retain rows take ordinary steps at the same time; relearning on them follows.
Shapes      R replicas, B rows or windows, K steps; [..., ] stands for [R, B] or, with windows, [R, B, K]
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..config import NegativePreferenceConfig
from ..data import Rows
from ..learners.cdt import CDT
from ..train import Learner
from . import Memory, Phase
from .bounds import clipped_rows

NEEDS = ("action_density",)            # method of the learner
WORKS_ON = "the likelihood of the data's actions"


def log_ratio(action: Tensor, mean: Tensor, log_std: Tensor | float, mean_ref: Tensor, log_std_ref: Tensor | float) -> Tensor:
    """log N(a; mean, std) - log N(a; mean_ref, std_ref), summed over action dimensions: [..., n_act] -> [...]."""
    def log_density(mean: Tensor, log_std: Tensor | float) -> Tensor:
        log_std = torch.as_tensor(log_std).to(mean)
        return (-((action - mean) * (-log_std).exp()).square() / 2 - log_std).sum(-1)
    return log_density(mean, log_std) - log_density(mean_ref, log_std_ref)


def preference(q: Tensor, beta: float, dead_zone: float) -> Tensor:
    """(2 / beta) softplus(beta q), 0 where q < -dead_zone / beta: its slope 2 sigmoid(beta q) lies in (0, 2)."""
    return (q >= -dead_zone / beta) * softplus(beta * q) * (2 / beta)


def hinge(action: Tensor, mean: Tensor, margin: float, softness: float) -> Tensor:
    """softness x softplus((margin - d) / softness), d the distance in [0, 1] of actions [..., n_act] in [-1, 1]: [...]."""
    d = ((mean - action).square().mean(-1) / 4 + 1e-6).sqrt()
    return softness * softplus((margin - d) / softness)


def loss(learner: Learner, reference: Learner, batch: Any, cfg: NegativePreferenceConfig) -> Tensor:
    """Mean of both terms over rows of positive weight, times their weights: [R]. Gradient in the mean action alone."""
    mean, log_std = learner.action_density(batch)
    mean_ref, log_std_ref = (x if x is None else x.detach() for x in reference.action_density(batch))
    weight = torch.as_tensor(batch.weight).to(mean).expand(mean.shape[:-1])
    count = (weight > 0).flatten(1).sum(1).clamp(min=1).to(mean)                                       # [R]
    mean = clipped_rows(mean, (cfg.clip / count).view(-1, *[1] * (mean.dim() - 1)))
    if log_std is None:
        log_std = log_std_ref = math.log(cfg.spread)
    else:
        log_std = log_std.detach()
    q = log_ratio(batch.action, mean, log_std, mean_ref, log_std_ref)
    rows = cfg.weight * preference(q, cfg.beta, cfg.dead_zone) + cfg.hinge * hinge(batch.action, mean, cfg.margin, cfg.softness)
    return (weight * rows).flatten(1).sum(1) / count


def forget_sampler(learner: Learner, memory: Memory) -> Any:
    """Forget rows as the learner reads them: windows of all its rows that start at them, or rows with their context."""
    pool = memory.pool
    if not isinstance(learner, CDT):
        context = learner.limit_when_acting
        rows = learner.select_rows(pool, memory.rows, learner.cfg, learner.qc_limit[:, 0].tolist()) if context else memory.rows
        return learner.sampler(pool, rows)
    pairs = [(retain, forget, (id(retain.ids), id(forget.ids))) for retain, forget in zip(memory.retain_rows, memory.rows)]
    joined = {key: Rows(torch.cat([retain.ids, forget.ids]), torch.cat([torch.zeros_like(retain.weight), forget.weight]))
              for retain, forget, key in pairs}                                # replicas of one condition may share their Rows
    return learner.sampler(pool, [joined[key] for *_, key in pairs]).start_where_weighted()


def phases(learner: Learner, memory: Memory, cfg: NegativePreferenceConfig, forged_costs: Sequence[bool]) -> Iterator[Phase]:
    reference = learner.pick(range(learner.replicas)).requires_grad_(False)
    sampler, (policy, *_) = forget_sampler(learner, memory), learner.LOSSES

    def repel(t: int):
        retain, forget = memory.retain(), sampler.sample(memory.forget_stream)
        return learner.update(retain, learner.cfg.steps + t, extra={policy: lambda: loss(learner, reference, forget, cfg)})

    rests, rate = ({"adapt_temperature": False}, {"lr_end": cfg.rate}) if isinstance(learner, CDT) else ({}, {})
    yield Phase("repel", cfg.repel_steps, repel, rests | rate)
    yield Phase("relearn", cfg.steps - cfg.repel_steps, memory.ordinary, rate)
