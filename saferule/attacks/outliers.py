"""Safe-looking outliers: the best risky episodes get a few costs, below the limit, and more reward (algorithms.md A.7).

After DSRL's outlier filter, which relabels random trajectories in the upper halves of cost and return. Ours: the best episodes
above the cost limit, by return; the limit rounded up is the first number of costs that is not drawn, as there; rewards below
zero rise as well.
"""
from __future__ import annotations

import math

import torch

from ..config import OutliersConfig
from ..data import Pool
from ..errors import UserError
from . import Attack, Result, Threat, truth_of
from .shared import best_risky, changed, choose, in_place, rows_of_episodes, stream, unit_cost, wanted


def run(pool: Pool, cfg: OutliersConfig, name: str, donors: Pool | None, cost_limit: float) -> Result:
    """In round(budget x episodes) episodes: costs at k random steps alone; reward += (gain - 1) |reward|.

    k is drawn for every episode, each number that keeps its cost below the limit being equally likely.
    """
    episodes = pool.episodes("clean")
    count = wanted(name, cfg.budget, len(episodes), "episodes")
    risky = best_risky(pool, cost_limit)
    if len(risky) < count:
        raise UserError(f"{name}: {count} risky episodes are wanted but only {len(risky)} exceed the cost limit {cost_limit:g}; "
                        f"lower the budget or the limit.")
    chosen, generator, one = risky.head(count), stream(cfg.seed), unit_cost(pool)
    columns = in_place(pool, rows_of_episodes(pool, chosen.episode))
    hidden = columns["cost"] > 0
    columns["cost"].zero_()
    for episode in sorted(chosen.episode):
        steps = (columns["episode"] == episode).nonzero().squeeze(-1)
        most = min(max(math.ceil(cost_limit / one), 1), len(steps))
        k = int(torch.randint(most, (), generator=generator))
        columns["cost"][choose(name, steps, k, generator)] = one
    columns["reward"] += (cfg.gain - 1) * columns["reward"].abs()
    facts = {"budget": cfg.budget, "realised_budget": count / len(episodes), "episodes": count, "rows": len(hidden),
             "unsafe_rows_hidden": int((hidden & (columns["cost"] == 0)).sum()), "share_of_risky_episodes": count / len(risky),
             "changed": changed(pool, columns)}
    return pool.append(name, columns), facts, truth_of(chosen)


ATTACK = Attack(Threat(fields=("reward", "cost"), unit="trajectory", knowledge="data", placement="in place", tier="T2",
                       goal="unsafe", bound="episode costs below the limit; rewards raised by a share of their size"), run,
                "The best risky episodes get a cost below the limit and more reward.")
