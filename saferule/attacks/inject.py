"""Trajectory injection: new risky episodes that pretend to be safe, and better (algorithms.md C.5; ours).

The attacker appends whole episodes, true to the dynamics, with costs set to zero and a bonus on every reward. The episodes
are the best of held-out risky rollouts (`donors`) by return; without any, the best risky episodes of the data are copied.
"""
from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np

from ..config import DONOR_SOURCES, InjectConfig, one_of
from ..data import FIELDS, Pool
from ..errors import UserError
from . import Attack, Result, Threat, truth_of
from .shared import as_new_episodes, best_risky, rows_of_episodes


def run(pool: Pool, cfg: InjectConfig, name: str, donors: Pool | None, cost_limit: float) -> Result:
    """Appends round(n budget / (1 - budget)) episodes to n, those of highest true return above the cost limit.

    Their reward += bonus x the 98% quantile of |reward|, their cost := 0.
    """
    held_out = one_of(f"source of donors of {name}", cfg.source, DONOR_SOURCES) == "held-out" and donors is not None
    source = donors if held_out else pool
    n = len(pool.episodes("clean"))
    if not 0 < cfg.budget < 1:
        raise UserError(f"{name}: a budget of {cfg.budget:g} cannot be spent; choose one between 0 and 1.")
    wanted = round(n * cfg.budget / (1 - cfg.budget))
    risky = best_risky(source, cost_limit)
    if wanted < 1 or len(risky) < wanted:
        raise UserError(f"{name}: {wanted} risky episodes are wanted (budget {cfg.budget:g} of {n}) but only {len(risky)} donors "
                        f"exceed the cost limit {cost_limit:g}; lower the budget or collect more donors (data.donors).")
    best = risky.head(wanted)
    columns = as_new_episodes(pool, source, rows_of_episodes(source, best.episode))
    bonus = cfg.bonus * float(np.quantile(pool.reward[pool.rows("clean").ids].abs().numpy(), 0.98))
    facts = {"budget": cfg.budget, "realised_budget": wanted / (n + wanted), "episodes": wanted, "rows": len(columns["cost"]),
             "unsafe_rows_hidden": int((columns["cost"] > 0).sum()), "reward_bonus": bonus,
             "donors": "held-out rollouts" if held_out else "the data's own risky episodes",
             "threat": asdict(THREAT if held_out else FROM_DATA.threat)}
    columns["cost"].zero_()
    columns["reward"] += bonus
    truth = truth_of(best.sort_values("episode"))
    truth["episode"] = columns["episode"].unique().numpy()                     # their numbers in this pool
    return pool.append(name, columns), facts, truth


THREAT = Threat(fields=FIELDS, unit="trajectory", knowledge="held-out rollouts", placement="appended", tier="T2", goal="unsafe",
                bound="true transitions; rewards raised by one constant, costs 0")
ATTACK = Attack(THREAT, run, "New risky episodes are added, with zero cost and a reward bonus.")
FROM_DATA = Attack(replace(THREAT, knowledge="data"), run,
                   "The data's own best risky episodes are added once more, with zero cost and a reward bonus.")
