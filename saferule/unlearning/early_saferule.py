"""The early public Safe-RULE code: critics by ascent, actor by advantage gaps, then ordinary training (algorithms.md D.6).

Source      revision a7cecef. Per step, on retain batch k and forget batch f: both critics' error on k minus that on f; an actor
            step on -G_r + lam G_c, G = A(k) - A(f), A(s, a) = Q(s, a) - mean over K policy actions, Q the min over heads;
            target networks follow. VAE and multiplier stay. lam: "fixed"; "gradnorm", the ratio of the gradients' norms;
            "dual" (its default), ascent of G_c - target. Fresh Adam moments and a tenth of the learning rates
Flaw        only the means over policy actions depend on the actor: descent lowers Q and raises Qc where it should retain, and
            the opposite where it should forget. `mended` turns both: -E_pi Q + lam E_pi Qc on k and, by eta, on f, and its dual
            ascent follows E_pi Qc on k beyond the discounted limit
Deviations  1. forget rows are drawn in proportion to their weights, and the mean weight multiplies their terms
            2. rewards in the learner's own units (there: ten times those of the training)
            3. the last step is taken by schedule (there: the best by cost in the environment)
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..config import EarlySafeRULEConfig, one_of
from ..data import Batch
from ..learners.shared import repeated
from ..train import Learner
from . import Memory, Phase
from .bounds import gradient_norm

NEEDS = "critic", "cost_critic"        # losses of the learner
MOVED = "critic", "cost_critic", "actor"


def policy_values(learner: Learner, obs: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Mean over K actions of the policy of the smallest head's Q and Qc, [R, B] each; gradient reaches the actor."""
    many = repeated(obs, samples)
    a = learner.sample(learner.actor, many) if hasattr(learner, "sample") else learner.unsquashed(many).tanh()
    return tuple(critic(many, a).amin(1).unflatten(-1, (-1, samples)).mean(-1) for critic in (learner.critic, learner.cost_critic))


def advantages(learner: Learner, batch: Batch, samples: int) -> tuple[Tensor, Tensor]:
    """A_r and A_c of the batch's actions, mean over rows: [R] each."""
    values = policy_values(learner, batch.obs, samples)
    return tuple((critic(batch.obs, batch.action).amin(1) - v).mean(-1)
                 for critic, v in zip((learner.critic, learner.cost_critic), values))


def actor_terms(learner: Learner, retain: Batch, forget: Batch, trust: Tensor | float,
                cfg: EarlySafeRULEConfig) -> tuple[Tensor, Tensor, Tensor]:
    """What the actor climbs, what it descends by lam, and by how much the latter is too large (dual): [R] each."""
    if cfg.mended:
        (q, qc), (q_f, qc_f) = ([v.mean(-1) for v in policy_values(learner, b.obs, cfg.samples)] for b in (retain, forget))
        return q + cfg.eta * trust * q_f, qc + cfg.eta * trust * qc_f, qc - learner.qc_limit[:, 0]
    (a, ac), (a_f, ac_f) = (advantages(learner, b, cfg.samples) for b in (retain, forget))
    return a - trust * a_f, ac - trust * ac_f, ac - trust * ac_f - cfg.target


@contextmanager
def slowed(learner: Learner, names: Sequence[str], share: float) -> Iterator[None]:
    """The networks' learning rates times `share`, for a while."""
    groups = [group for name in names for group in learner.optim[name].param_groups]
    before = [group["lr"] for group in groups]
    try:
        for group, lr in zip(groups, before):
            group["lr"] = share * lr
        yield
    finally:
        for group, lr in zip(groups, before):
            group["lr"] = lr


def phases(learner: Learner, memory: Memory, cfg: EarlySafeRULEConfig, forged_costs: Sequence[bool]) -> Iterator[Phase]:
    one_of("weight of the cost", cfg.lam, ("dual", "gradnorm", "fixed"))
    lam = memory.carried["lam"] = torch.full((learner.replicas,), cfg.lam_start, device=learner.device)
    for name in MOVED:
        learner.reset_optimiser(name)

    def step(t: int):
        retain, (forget, trust) = memory.retain(), memory.forget_drawn()
        kept, lost, out = learner.targets(retain), learner.targets(forget), {}
        for name in NEEDS:
            loss = getattr(learner, name + "_loss")
            out[name] = learner.minimise(name, loss(retain, kept) - trust * loss(forget, lost))
        gain, price, excess = actor_terms(learner, retain, forget, trust, cfg)
        if cfg.lam == "gradnorm":
            params = list(learner.actor.parameters())
            lam.copy_((gradient_norm(gain, params) / gradient_norm(price, params).clamp(min=1e-12)).clamp(0, cfg.lam_max))
        out["actor"] = learner.minimise("actor", -gain + lam.clone() * price)
        if cfg.lam == "dual":
            lam.add_(cfg.lr_lam * excess.detach()).clamp_(0, cfg.lam_max)
        learner.polyak(*(name for name in MOVED if hasattr(learner, name + "_target")))
        return {**out, "gain": gain.detach(), "price": price.detach(), "lam": lam.clone()}

    def unlearn(t: int):
        with slowed(learner, MOVED, cfg.rate):
            return step(t)

    yield Phase("unlearn", cfg.unlearn_steps, unlearn)
    yield Phase("relearn", cfg.steps - cfg.unlearn_steps, memory.ordinary)
