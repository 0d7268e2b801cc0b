"""Unlearning: from a poisoned learner and its forget rows to a repaired one, without retraining and without the environment.

Every method is a list of phases; a phase recombines the learner's own losses on retain and forget batches. Nothing here
imports a simulator, and nothing is selected with one: schedules are fixed.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import UNLEARNER_NAMES, one_of
from ..data import Batch, Pool, Rows
from ..errors import UserError
from ..train import History, Learner, Resume, fit


@dataclass(frozen=True)
class Phase:
    """`steps` calls of `step(t)`, t counted from the phase's start, with the learner tuned by `settings`.

    frozen: networks of the learner that do not change in this phase.
    """
    name: str
    steps: int
    step: Callable[[int], dict[str, Tensor]]
    settings: dict[str, Any] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()


class Memory:
    """What an unlearner sees: retain and forget minibatches, from generators of their own.

    Two streams, so that methods which never look at a forget batch draw the same retain batches as those which do.
    """

    def __init__(self, learner: Learner, pool: Pool, retain: Sequence[Rows], forget: Sequence[Rows], seed: int, n_step: int = 1):
        self.learner, self.pool, self.rows = learner, pool, forget
        self.retain_rows, self.seed = list(retain), seed
        self.retain_stream = torch.Generator(learner.device).manual_seed(seed)
        self.forget_stream = torch.Generator(learner.device).manual_seed(seed + 1)
        self._retain = learner.sampler(pool, retain, n_step)
        self._forget: Any = None                       # made when first asked for: fine-tuning never asks, and CDT may have no
                                                       # windows in rows that lack an episode's end
        self._drawn: Any = None
        self.carried: dict[str, Tensor] = {}           # what a method's steps change in place, beside the learner

    def retain(self) -> Batch:
        return self._retain.sample(self.retain_stream)

    def retain_pair(self) -> tuple[Batch, Batch]:
        return self._retain.pair(self.retain_stream)

    def forget(self) -> Batch:
        if self._forget is None:
            self._forget = self.learner.sampler(self.pool, self.rows)
        return self._forget.sample(self.forget_stream)

    def forget_drawn(self) -> tuple[Batch, Tensor | float]:
        """Forget rows drawn in proportion to their weights, for losses that know none, and the mean positive weight [R]."""
        if self._drawn is None:
            self._drawn = self.learner.sampler(self.pool, self.rows).draw_by_weight()
        batch = self._drawn.sample(self.forget_stream)
        return batch, batch.weight[:, 0] if isinstance(batch.weight, Tensor) else batch.weight

    def ordinary(self, t: int) -> dict[str, Tensor]:
        """One step of ordinary training on retain rows."""
        return self.learner.update(self.retain(), self.learner.cfg.steps + t)

    def weigh_forget(self, gate: Sequence[Tensor]) -> None:
        """Multiply the forget weights by one factor per row: gate[r] [n_r] for replica r."""
        rows = [r._replace(ids=r.ids.clone(), weight=r.weight * g.to(r.weight)) for r, g in zip(self.rows, gate)]
        self._forget = self.learner.sampler(self.pool, rows)


class Unlearned(NamedTuple):
    learner: Learner
    history: History
    snapshots: dict[int, dict[str, Tensor]]            # step -> weights, along the budget and the later steps
    phases: tuple[tuple[str, int], ...]


from . import (  # noqa: E402  (they need Phase and Memory)
    early_saferule,
    finetune,
    finetune_nstep,
    gradient_ascent,
    negative_preference,
    random_relabel,
    saferule,
    trajdeleter,
)

UNLEARNERS: dict[str, Any] = {"finetune": finetune, "finetune_nstep": finetune_nstep, "gradient_ascent": gradient_ascent,
                              "random_relabel": random_relabel, "trajdeleter": trajdeleter, "early_saferule": early_saferule,
                              "negative_preference": negative_preference, "saferule": saferule}
assert tuple(UNLEARNERS) == UNLEARNER_NAMES


def missing_losses(method: str, learner: Learner | type[Learner]) -> tuple[str, ...]:
    """What a method needs and a learner does not have, losses mostly: methods that push critics cannot repair one without."""
    return tuple(name for name in getattr(UNLEARNERS[method], "NEEDS", ())
                 if name not in learner.LOSSES and not hasattr(learner, name))


def possible(methods: Sequence[str], learner: Learner | type[Learner]) -> tuple[str, ...]:
    """Those of the methods that can repair such a learner."""
    return tuple(method for method in methods if not missing_losses(method, learner))


def unlearn(learner: Learner, pool: Pool, retain: Sequence[Rows], forget: Sequence[Rows], method: str, cfg: Any, seed: int = 0,
            forged_costs: Sequence[bool] | None = None, later_steps: int = 0, snapshots_at: Sequence[int] = (),
            resume: Resume | None = None, **loop: Any) -> Unlearned:
    """Make each replica of `learner` (changed in place) forget its rows.

    retain, forget: one Rows per replica. cfg: the method's dataclass. forged_costs: per replica, may the cost labels
    of its forget rows be false (default: yes)? later_steps: ordinary steps on the retain rows after the budget, the relapse
    test. snapshots_at: step counts at which weights are kept. Further arguments go to `train.fit`. Raises UserError for an
    unknown method, and for one that needs losses which the learner does not have.
    """
    chosen = UNLEARNERS[one_of("method", method, UNLEARNERS)]
    if absent := missing_losses(method, learner):
        matter = getattr(chosen, "WORKS_ON", "a learner's critics")
        raise UserError(f"method '{method}' works on {matter}, but {type(learner).__name__} has no {absent[0]}; use 'finetune'.")
    learner.seed_noise(seed + 2)
    long_targets = getattr(cfg, "n_step_mix", 0) > 0
    memory = Memory(learner, pool, retain, forget, seed, n_step=cfg.n_step if long_targets else 1)
    phases = list(chosen.phases(learner, memory, cfg, list(forged_costs or [True] * learner.replicas)))
    phases.append(Phase("later", later_steps, memory.ordinary))
    starts = [sum(p.steps for p in phases[:i]) for i in range(len(phases))]
    kept: dict[int, dict[str, Tensor]] = {}

    def step(t: int) -> dict[str, Tensor]:
        if t == 0:
            learner.measure(pool, retain)                # what CDT asks for shall be what the retain rows make possible
        i = max(i for i, start in enumerate(starts) if start <= t and phases[i].steps)
        learner.frozen = phases[i].frozen
        with learner.tuned(**phases[i].settings):
            return phases[i].step(t - starts[i])

    def keep(t: int) -> Callable[[], None]:
        return lambda: kept.__setitem__(t, learner.weights())

    history = fit(step, starts[-1] + later_steps, learner, [memory.retain_stream, memory.forget_stream],
                  snapshots={t: keep(t) for t in snapshots_at}, boundaries=starts, resume=resume, kept=kept, carried=memory.carried,
                  **loop)
    learner.frozen = frozenset()
    return Unlearned(learner, history, kept, tuple((p.name, p.steps) for p in phases))
