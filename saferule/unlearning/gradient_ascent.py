"""Gradient ascent: the Bellman error of both critics goes up on forget rows (algorithms.md D.3).

Source      the early public Safe-RULE code (revision a7cecef) combines the critics' losses like this, with weights 1 and 1
Deviations  1. actor, VAE and multiplier take ordinary steps on retain rows (the early code moved the actor the wrong way)
            2. the learner's own learning rates and Adam moments (there: a tenth of the rate, fresh moments)
            3. forget rows are drawn in proportion to their weights
No guard (the default): the loss is unbounded below, which is the point of showing it. guards=True (ours): the gradient of the
ascent has a norm of at most `clip` per replica, and the ascent of a critic ends for good once its mean |Q - y| on forget rows
exceeds `stop` times what it was in the checkpoint.
"""
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..config import GradientAscentConfig
from ..data import Batch
from ..learners.shared import Targets
from ..train import Learner
from . import Memory, Phase
from .bounds import bounded

NEEDS = "critic", "cost_critic"        # losses of the learner


@torch.no_grad()
def errors(learner: Learner, batch: Batch, target: Targets) -> dict[str, Tensor]:
    """Mean |Q - y| of each critic over heads and rows: [R] each."""
    return {name: (getattr(learner, name)(batch.obs, batch.action) - y[:, None]).abs().mean((-1, -2))
            for name, y in zip(NEEDS, (target.reward, target.cost))}


def phases(learner: Learner, memory: Memory, cfg: GradientAscentConfig, forged_costs: Sequence[bool]) -> Iterator[Phase]:
    still_on = memory.carried
    if cfg.guards:
        probe, _ = memory.forget_drawn()
        at_first = errors(learner, probe, learner.targets(probe))
        still_on.update({name: torch.ones(learner.replicas, device=learner.device) for name in NEEDS})

    def ascend(t: int):
        retain, (forget, trust) = memory.retain(), memory.forget_drawn()
        target = learner.targets(forget)
        push = {"critic": lambda: -cfg.beta * trust * learner.critic_loss(forget, target),
                "cost_critic": lambda: -cfg.beta * trust * learner.cost_critic_loss(forget, target)}
        if cfg.guards:
            for name, error in errors(learner, forget, target).items():
                still_on[name].mul_(error <= cfg.stop * at_first[name])
            guarded = lambda name, loss: lambda: still_on[name] * bounded(loss(), getattr(learner, name).parameters(), cfg.clip)
            push = {name: guarded(name, loss) for name, loss in push.items()}
        return learner.update(retain, learner.cfg.steps + t, extra=push)

    yield Phase("ascend", cfg.ascent_steps, ascend)
    yield Phase("relearn", cfg.steps - cfg.ascent_steps, memory.ordinary)
