"""Cost-label flip: risky rows are declared safe, or safe ones risky (algorithms.md C.3; ours).

The attacker edits one column. The copies stand in for the originals, so the data set keeps its size.
"""
from __future__ import annotations

from dataclasses import asdict, replace

import torch

from ..config import FLIP_SELECTIONS, LabelFlipConfig, one_of
from ..data import Pool
from ..errors import UserError
from . import Attack, Result, Threat, truth_of
from .shared import best_risky, choose, in_place, rows_of_episodes, stream, touched, unit_cost, wanted


def run(pool: Pool, cfg: LabelFlipConfig, name: str, donors: Pool | None, cost_limit: float) -> Result:
    """Costs := 0 in the round(budget x episodes) episodes of highest return among those above the cost limit.

    select='random': in round(budget x rows) random rows that cost something, wherever they are.
    inverse: costs := the data's largest cost, in the best episodes at or under the limit, or in random rows that cost nothing.
    """
    if one_of(f"selection of {name}", cfg.select, FLIP_SELECTIONS) == "random":
        return random_rows(pool, cfg, name)
    episodes = pool.episodes("clean")
    count = round(cfg.budget * len(episodes))
    safe = episodes[episodes.cost <= cost_limit].sort_values(["ret", "episode"], ascending=[False, True])
    candidates, kind = (safe, "safe") if cfg.inverse else (best_risky(pool, cost_limit), "risky")
    if not 0 < cfg.budget < 1 or count < 1 or candidates.empty:
        raise UserError(f"{name}: a budget of {cfg.budget:g} of {len(episodes)} episodes with {len(candidates)} "
                        f"{'at or under' if cfg.inverse else 'above'} the cost limit {cost_limit:g} leaves nothing to relabel; "
                        f"{'lower' if cfg.inverse else 'raise'} the budget or {'raise' if cfg.inverse else 'lower'} the limit.")
    chosen = candidates.head(count)
    columns = in_place(pool, rows_of_episodes(pool, chosen.episode))
    facts = {"budget": cfg.budget, "realised_budget": len(chosen) / len(episodes), "episodes": len(chosen),
             "rows": len(columns["cost"]), **flip(pool, columns, cfg.inverse),
             f"share_of_{kind}_episodes": len(chosen) / len(candidates)}
    return pool.append(name, columns), facts | threat(cfg), truth_of(chosen)


def random_rows(pool: Pool, cfg: LabelFlipConfig, name: str) -> Result:
    rows = pool.rows("clean").ids
    count = wanted(name, cfg.budget, len(rows), "rows")
    unsafe = pool.cost[rows] > 0
    candidates, kind = (rows[~unsafe], "safe") if cfg.inverse else (rows[unsafe], "unsafe")
    if not len(candidates):
        raise UserError(f"{name}: the data hold no {kind} rows, so that no cost label can be turned; choose other data.")
    columns = in_place(pool, choose(name, candidates, min(count, len(candidates)), stream(cfg.seed)))
    chosen = touched(pool, columns["replaces"])
    count = len(columns["cost"])
    facts = {"budget": cfg.budget, "realised_budget": count / len(rows), "episodes": len(chosen), "rows": count,
             **flip(pool, columns, cfg.inverse), f"share_of_{kind}_rows": count / len(candidates)}
    return pool.append(name, columns), facts | threat(cfg), truth_of(chosen)


def flip(pool: Pool, columns: dict[str, torch.Tensor], inverse: bool) -> dict[str, int]:
    """Overwrites the costs, and says how many labels were turned."""
    dear = int((columns["cost"] > 0).sum())
    columns["cost"].fill_(unit_cost(pool) if inverse else 0.0)
    return {"safe_rows_blamed": len(columns["cost"]) - dear} if inverse else {"unsafe_rows_hidden": dear}


def threat(cfg: LabelFlipConfig) -> dict[str, dict]:
    """The threat model of this configuration, to take the place of the default's."""
    return {"threat": asdict(replace(THREAT, unit="row" if cfg.select == "random" else "trajectory",
                                     goal="over-conservative" if cfg.inverse else "unsafe"))}


THREAT = Threat(fields=("cost",), unit="trajectory", knowledge="data", placement="in place", tier="T2", goal="unsafe",
                bound="costs are 0 or the data's largest cost")
ATTACK = Attack(THREAT, run, "The costs of the best risky episodes are set to zero.")
RANDOM = Attack(replace(THREAT, unit="row"), run, "The costs of random dangerous rows are set to zero.")
INVERSE = Attack(replace(THREAT, goal="over-conservative"), run, "The best safe episodes are declared dangerous at every step.")
