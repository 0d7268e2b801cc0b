"""Trajectory injection: new risky episodes that pretend to be safe, and better (algorithms.md C.5; ours).

The attacker appends whole episodes, true to the dynamics, with costs set to zero and a bonus on every reward. The episodes
are the best of held-out risky rollouts (`donors`) by return; without any, the best risky episodes of the data are copied.
"""
from __future__ import annotations

import numpy as np
import torch

from ..config import InjectConfig
from ..data import FIELDS, Pool
from ..errors import UserError
from . import Attack, Result, Threat, truth_of


def run(pool: Pool, cfg: InjectConfig, donors: Pool | None = None, cost_limit: float = 20.0) -> Result:
    """Appends round(n budget / (1 - budget)) episodes to n, those of highest true return above the cost limit.

    Their reward += bonus x the 98% quantile of |reward|, their cost := 0.
    """
    n = len(pool.episodes("clean"))
    wanted = round(n * cfg.budget / (1 - cfg.budget))
    source = donors if donors is not None else pool
    episodes = source.episodes("clean")
    risky = episodes[episodes.cost > cost_limit]
    if wanted < 1 or len(risky) < wanted:
        raise UserError(f"inject: {wanted} risky episodes are wanted (budget {cfg.budget:g} of {n}) but only {len(risky)} donors "
                        f"exceed the cost limit {cost_limit:g}; lower the budget or collect more donors (data.donors).")
    best = risky.sort_values(["ret", "episode"], ascending=[False, True]).head(wanted)
    chosen = torch.tensor(sorted(best.episode))
    rows = torch.isin(source.episode, chosen).nonzero().squeeze(-1)
    columns = {k: source.columns[k][rows].clone() for k in (*FIELDS, "episode", "t")}
    bonus = cfg.bonus * float(np.quantile(pool.reward[pool.rows("clean").ids].abs().numpy(), 0.98))
    facts = {"budget": cfg.budget, "realised_budget": wanted / (n + wanted), "episodes": wanted, "rows": len(rows),
             "unsafe_rows_hidden": int((columns["cost"] > 0).sum()), "reward_bonus": bonus,
             "donors": "held-out rollouts" if donors is not None else "the data's own risky episodes"}
    columns["cost"].zero_()
    columns["reward"] += bonus
    columns["episode"] = int(pool.episode.max()) + 1 + torch.searchsorted(chosen, columns["episode"])
    columns["replaces"] = torch.full((len(rows),), -1, dtype=torch.int64)
    truth = truth_of(best.sort_values("episode"))
    truth["episode"] = columns["episode"].unique().numpy()                     # their numbers in this pool
    return pool.append("inject", columns), facts, truth


ATTACK = Attack(Threat(fields=FIELDS, unit="trajectory", knowledge="held-out rollouts", placement="appended", tier="T2",
                       goal="unsafe"), run,
                "New risky episodes are added, with zero cost and a reward bonus.")
