"""How soon does the poison come back if a model is trained on it again? (algorithms.md E.3; ours)

Every model goes on with ordinary training on the forget rows alone, with fresh optimisers: on the whole poisoned data the same
takes several times as long. What is watched is behaviour: how near a model's actions at forget states are to the poisoned models',
0 as the retrained models are on average before, 1 as the poisoned ones are themselves. k* is the first probe at which it is half
way back. A model that only hides the poison gets it back sooner than one that never had it; a poisoned one has it, k* = 0.
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


def regained(actions: np.ndarray, poisoned: Sequence[int], retrained: Sequence[int]) -> np.ndarray:
    """How much nearer to the poisoned models' behaviour than the retrained ones: (D_R - D) / (D_R - D_P), NaN where D_R <= D_P.

    actions [P, R, n, n_act] -> [P, R]. D is the mean distance from the poisoned models' mean action at the first probe; D_R and D_P
    are the means over the retrained and the poisoned models there. A model that acts at random is further off than either: below 0.
    """
    distance = np.linalg.norm(actions - actions[0, list(poisoned)].mean(0), axis=-1).mean(-1)                # [P, R]
    gold, bad = distance[0, list(retrained)].mean(), distance[0, list(poisoned)].mean()
    return (gold - distance) / (gold - bad) if gold > bad else np.full_like(distance, np.nan)


def separated(poisoned: np.ndarray, retrained: np.ndarray) -> bool:
    """Does every poisoned model start above one half, every retrained one below?"""
    return bool(np.min(poisoned) > 0.5 > np.max(retrained))


def first_time(steps: Sequence[int], curve: np.ndarray, share: float) -> tuple[int, bool]:
    """The first probe at which a curve is at `share` or above, and whether it ever was; if not, the last step: k* is censored."""
    reached = np.flatnonzero(np.asarray(curve) >= share)
    return (steps[reached[0]], True) if len(reached) else (steps[-1], False)
