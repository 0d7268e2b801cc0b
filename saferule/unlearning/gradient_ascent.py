"""Gradient ascent: the Bellman error of both critics goes up on forget rows (algorithms.md D.3).

Source      the early public Safe-RULE code (revision a7cecef) combines the critics' losses like this, with weights 1 and 1
Deviations  1. actor, VAE and multiplier take ordinary steps on retain rows (the early code moved the actor the wrong way)
            2. the learner's own learning rates and Adam moments (there: a tenth of the rate, fresh moments)
No guard: the loss is unbounded below, which is the point of showing it.
"""
from collections.abc import Iterator, Sequence

from ..config import GradientAscentConfig
from ..train import Learner
from . import Memory, Phase

NEEDS = "critic", "cost_critic"        # losses of the learner


def phases(learner: Learner, memory: Memory, cfg: GradientAscentConfig, forged_costs: Sequence[bool]) -> Iterator[Phase]:
    def ascend(t: int):
        retain, forget = memory.retain(), memory.forget()
        target = learner.targets(forget)
        return learner.update(retain, learner.cfg.steps + t, extra={
            "critic": lambda: -cfg.beta * learner.critic_loss(forget, target),
            "cost_critic": lambda: -cfg.beta * learner.cost_critic_loss(forget, target)})

    yield Phase("ascend", cfg.ascent_steps, ascend)
    yield Phase("relearn", cfg.steps - cfg.ascent_steps, memory.ordinary)
