"""How soon does the poison come back if a model is trained on it again? (algorithms.md E.3; ours)

Every model goes on with ordinary training on the forget rows alone, with fresh optimisers: on the whole poisoned data the same
takes several times as long. What is watched is behaviour, an attack success rate without steps: how far on the way from the
retrained models' actions to the poisoned ones', at forget states, the model's own actions are. k* is the first probe at which it
is half. A model that only hides the poison gets it back sooner than one that never had it; a poisoned one has it, k* = 0.
Shapes      R replicas, n probed rows, P probes
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..data import Pool, Rows
from ..train import Learner, Resume
from .probes import go_on


@torch.no_grad()
def acted(learner: Learner, pool: Pool, rows: Sequence[Tensor], seed: int = 0) -> Tensor:
    """What replica r would do at the states of rows[r] (pool ids, equally many for each), always with the same noise:
    [R, n, n_act]."""
    return learner.act(pool.obs[torch.stack(list(rows))], torch.Generator(learner.device).manual_seed(seed))


def relearn(learner: Learner, pool: Pool, forget: Sequence[Rows], rows: Sequence[Tensor], steps: int, every: int, seed: int = 0,
            resume: Resume | None = None, progress: Callable = iter) -> tuple[list[int], np.ndarray]:
    """Trains each replica (changed in place; its optimisers must be fresh) on its forget rows.

    Returns the steps of the probes and the actions there, [P, R, n, n_act].
    """
    probe = lambda: {"actions": acted(learner, pool, rows, seed)}
    kept = go_on(learner, pool, forget, steps, seed, resume, progress, {t: probe for t in range(0, steps + 1, every)})
    return sorted(kept), np.stack([kept[t]["actions"].double().cpu().numpy() for t in sorted(kept)])


def way_to_poison(actions: np.ndarray, poisoned: Sequence[int], retrained: Sequence[int]) -> np.ndarray:
    """How far along the line from the retrained models' mean actions at the first probe to the poisoned ones' they are.

    actions [P, R, n, n_act] -> [P, R]: sum over states of (a - a_R) . (a_P - a_R), over that of |a_P - a_R|^2. The retrained models
    start at 0 on average, the poisoned ones at 1.
    """
    gold, bad = (actions[0, list(which)].mean(0) for which in (retrained, poisoned))
    line = bad - gold
    return ((actions - gold) * line).sum((-1, -2)) / np.square(line).sum()


def separated(poisoned: np.ndarray, retrained: np.ndarray) -> bool:
    """Does every poisoned model start above one half, every retrained one below?"""
    return bool(np.min(poisoned) > 0.5 > np.max(retrained))


def first_time(steps: Sequence[int], curve: np.ndarray, share: float) -> tuple[int, bool]:
    """The first probe at which a curve is at `share` or above, and whether it ever was; if not, the last step: k* is censored."""
    reached = np.flatnonzero(np.asarray(curve) >= share)
    return (steps[reached[0]], True) if len(reached) else (steps[-1], False)
