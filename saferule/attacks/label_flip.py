"""Cost-label flip: the best risky episodes are declared safe (algorithms.md C.3, whole trajectories; ours).

The attacker edits one column. The copies stand in for the originals, so the data set keeps its size.
"""
from __future__ import annotations

import torch

from ..config import LabelFlipConfig
from ..data import FIELDS, Pool
from ..errors import UserError
from . import Attack, Result, Threat, truth_of


def run(pool: Pool, cfg: LabelFlipConfig, donors: Pool | None = None, cost_limit: float = 20.0) -> Result:
    """Costs := 0 in the round(budget x episodes) episodes of highest return among those above the cost limit."""
    episodes = pool.episodes("clean")
    wanted = round(cfg.budget * len(episodes))
    risky = episodes[episodes.cost > cost_limit].sort_values(["ret", "episode"], ascending=[False, True])
    if wanted < 1 or risky.empty:
        raise UserError(f"label_flip: a budget of {cfg.budget:g} of {len(episodes)} episodes with {len(risky)} above the cost "
                        f"limit {cost_limit:g} leaves nothing to relabel; raise the budget or lower the limit.")
    chosen = risky.head(wanted)
    rows = pool.rows("clean").ids
    rows = rows[torch.isin(pool.episode[rows], torch.tensor(chosen.episode.tolist()))]
    columns = {k: pool.columns[k][rows].clone() for k in (*FIELDS, "episode", "t")}
    facts = {"budget": cfg.budget, "realised_budget": len(chosen) / len(episodes), "episodes": len(chosen), "rows": len(rows),
             "unsafe_rows_hidden": int((columns["cost"] > 0).sum()), "share_of_risky_episodes": len(chosen) / len(risky)}
    columns["cost"].zero_()
    columns["replaces"] = rows
    return pool.append("label_flip", columns), facts, truth_of(chosen)


ATTACK = Attack(Threat(fields=("cost",), unit="trajectory", knowledge="data", placement="in place", tier="T2", goal="unsafe"), run,
                "The costs of the best risky episodes are set to zero.")
