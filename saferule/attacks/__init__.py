"""Attacks on offline data. Each appends rows to a pool and says what it may touch; see `Threat`."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..config import one_of
from ..data import Pool


@dataclass(frozen=True)
class Threat:
    """What an attacker can do (algorithms.md C.0); written into the manifest and enforced by tests."""
    fields: tuple[str, ...]            # columns that may differ from honest data
    unit: str                          # what the budget counts: row | trajectory
    knowledge: str                     # none | data | held-out rollouts
    placement: str                     # in place (stands in for original rows) | appended
    tier: str                          # T0 naive, T1 chain-consistent, T2 dynamics-consistent
    goal: str                          # unsafe | reward-drop | over-conservative | triggered


@dataclass(frozen=True)
class Attack:
    threat: Threat
    run: Callable[..., tuple[Pool, dict[str, Any]]]     # (pool, cfg, donors=, cost_limit=) -> (pool with the rows, facts)
    sentence: str                                       # what it does, for a reader


def poison(pool: Pool, attack: str, cfg: Any, donors: Pool | None = None, cost_limit: float = 20.0) -> tuple[Pool, dict[str, Any]]:
    """Append the rows of `attack` to `pool`.

    Returns the new pool and a dictionary of facts: threat model, realised budget, number of rows and episodes touched.
    Raises UserError if the attack is unknown or cannot be mounted on these data.
    """
    chosen = ATTACKS[one_of("attack", attack, ATTACKS)]
    poisoned, facts = chosen.run(pool, cfg, donors=donors, cost_limit=cost_limit)
    return poisoned, {"attack": attack, "threat": asdict(chosen.threat), **facts}


from . import given, inject, label_flip  # noqa: E402  (they need Attack and Threat)

ATTACKS: dict[str, Attack] = {"inject": inject.ATTACK, "label_flip": label_flip.ATTACK, "given": given.ATTACK}
