"""Attacks on offline data. Each appends rows to a pool and says what it may touch; see `Threat`."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from ..config import ATTACK_NAMES, TRIGGERED_ATTACKS, one_of
from ..data import Pool

Result = tuple[Pool, dict[str, Any], pd.DataFrame]     # what `poison` returns


@dataclass(frozen=True)
class Threat:
    """What an attacker can do (algorithms.md C.0); written into the manifest and enforced by tests."""
    fields: tuple[str, ...]            # columns that may differ from honest data
    unit: str                          # what the budget counts: row | state | trajectory
    knowledge: str                     # none | data | held-out rollouts | surrogate
    placement: str                     # in place (stands in for original rows) | appended
    tier: str                          # T0 naive, T1 chain-consistent, T2 dynamics-consistent
    goal: str                          # unsafe | reward-drop | over-conservative | triggered | control
    bound: str = "none"                # how far a changed value may lie from the honest one


@dataclass(frozen=True)
class Attack:
    threat: Threat
    run: Callable[..., Result]         # (pool, cfg, name, donors, cost_limit), returns as `poison`
    sentence: str                                       # what it does, for a reader


def poison(pool: Pool, attack: str, cfg: Any, donors: Pool | None = None,
           cost_limit: float = 20.0) -> Result:
    """Append the rows of `attack` to `pool`.

    Returns the new pool; a dictionary of facts (threat model, realised budget, number of rows and episodes touched); and what
    really happened in the forged episodes: episode, true_ret, true_cost. Nothing downstream but drawings may use the last.
    Raises UserError if the attack is unknown or cannot be mounted on these data.
    """
    chosen = ATTACKS[one_of("attack", attack, ATTACKS)]
    poisoned, facts, truth = chosen.run(pool, cfg, attack, donors, cost_limit)
    return poisoned, {"attack": attack, "threat": asdict(chosen.threat), **facts}, truth


def truth_of(episodes: pd.DataFrame) -> pd.DataFrame:
    """Episodes of honest labels as the third return value of `poison`."""
    return episodes[["episode", "ret", "cost"]].rename(columns={"ret": "true_ret", "cost": "true_cost"}).reset_index(drop=True)


ATTACKS: dict[str, Attack] = {}                        # filled below: the controls look others up in it

from . import (  # noqa: E402  (they need the above)
    backdoor,
    baffle,
    constant_action,
    controls,
    corruption,
    given,
    inject,
    label_flip,
    outliers,
    pgd,
    reward,
)

ATTACKS |= {
    "inject": inject.ATTACK, "inject_data": inject.FROM_DATA,
    "label_flip": label_flip.ATTACK, "label_flip_random": label_flip.RANDOM, "label_flip_inverse": label_flip.INVERSE,
    "reward_poison": reward.ATTACK, "outliers": outliers.ATTACK,
    "random_corruption": corruption.RANDOM, "adversarial_corruption": corruption.ADVERSARIAL,
    "constant_action": constant_action.ATTACK, "marker": backdoor.MARKER, "bias": backdoor.BIAS,
    "pgd_cost": pgd.MAX_COST, "pgd_reward": pgd.MAX_REWARD,
    "baffle_return": baffle.RETURN, "baffle_cost": baffle.COST,
    "noise": controls.NOISE, "clean_forget": controls.CLEAN_FORGET, "noop": controls.NOOP,
    "given": given.ATTACK,
}
assert tuple(ATTACKS) == ATTACK_NAMES
assert tuple(a for a in ATTACKS if ATTACKS[a].threat.goal == "triggered") == TRIGGERED_ATTACKS
