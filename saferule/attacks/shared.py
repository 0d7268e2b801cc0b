"""What several attacks share: budgets, seeded choices, copies that stand in for rows, and what was changed.

Shapes      N rows of the clean data, n rows of an attack
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..data import FIELDS, Pool
from ..errors import UserError


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wanted(attack: str, budget: float, total: int, unit: str) -> int:
    """round(budget x total). Raises UserError for a budget outside (0, 1) and for one that amounts to nothing or everything."""
    count = round(budget * total)
    if not 0 < budget < 1 or not 0 < count < total:
        raise UserError(f"{attack}: a budget of {budget:g} of {total:,} {unit} cannot be spent; choose one between 0 and 1 that "
                        f"comes to at least one, and not to all.")
    return count


def choose(attack: str, candidates: Tensor, count: int, generator: torch.Generator, what: str = "rows") -> Tensor:
    """`count` of the candidates, each equally likely, without repetition, ascending. Raises UserError if there are fewer."""
    if count > len(candidates):
        raise UserError(f"{attack}: {count:,} {what} are wanted but the data have {len(candidates):,}; lower the budget.")
    return candidates[torch.randperm(len(candidates), generator=generator)[:count]].sort().values


def rows_of_episodes(pool: Pool, episodes: Any) -> Tensor:
    """The clean rows of some episodes, ascending."""
    rows = pool.rows("clean").ids
    return rows[torch.isin(pool.episode[rows], torch.as_tensor(list(episodes), dtype=torch.int64))]


def best_risky(pool: Pool, cost_limit: float) -> pd.DataFrame:
    """Clean episodes above the cost limit, best return first."""
    episodes = pool.episodes("clean")
    return episodes[episodes.cost > cost_limit].sort_values(["ret", "episode"], ascending=[False, True])


def unit_cost(pool: Pool) -> float:
    """What a dangerous step costs: the largest cost in the data, or 1 where nothing costs."""
    return float(pool.cost[pool.rows("clean").ids].max()) or 1.0


def in_place(pool: Pool, rows: Tensor) -> dict[str, Tensor]:
    """Copies of original rows that stand in for them: columns as `Pool.append` takes them."""
    return {**{k: pool.columns[k][rows].clone() for k in (*FIELDS, "episode", "t")}, "replaces": rows}


def as_new_episodes(pool: Pool, source: Pool, rows: Tensor) -> dict[str, Tensor]:
    """Copies of rows of `source` (whole episodes) as further episodes of `pool`, numbered in the order of their old numbers."""
    columns = {k: source.columns[k][rows].clone() for k in (*FIELDS, "episode", "t")}
    columns["episode"] = int(pool.episode.max()) + 1 + columns["episode"].unique(return_inverse=True)[1]
    columns["replaces"] = torch.full((len(rows),), -1, dtype=torch.int64)
    return columns


def before(pool: Pool, rows: Tensor) -> Tensor:
    """For each of some clean rows the clean row one step earlier in its episode, -1 at its start: [n] int64."""
    clean = pool.rows("clean").ids
    span = int(pool.t.max()) + 2                                      # so that t - 1 = -1 meets no row of the episode before
    key = lambda ids: pool.episode[ids] * span + pool.t[ids]
    sorted_keys, order = key(clean).sort()
    at = torch.searchsorted(sorted_keys, key(rows) - 1).clamp(max=len(clean) - 1)
    return torch.where(sorted_keys[at] == key(rows) - 1, clean[order[at]], -1)


def with_states(pool: Pool, rows: Tensor, obs: Tensor, also: Tensor | None = None) -> dict[str, Tensor]:
    """Other states obs [n, n_obs] at some clean rows, told consistently (tier T1): also as the rows before them end.

    Returns in-place copies of the rows, of those before them and of the rows `also`, ascending.
    """
    earlier = before(pool, rows)
    has = earlier >= 0
    columns = in_place(pool, torch.cat([rows, earlier[has], rows[:0] if also is None else also]).unique())
    columns["obs"][torch.searchsorted(columns["replaces"], rows)] = obs
    columns["next_obs"][torch.searchsorted(columns["replaces"], earlier[has])] = obs[has]
    return columns


def only_changed(attack: str, pool: Pool, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """In-place copies without those that equal their originals. Raises UserError if none is left."""
    old = columns["replaces"]
    differs = torch.stack([(columns[k] != pool.columns[k][old]).reshape(len(old), -1).any(1) for k in FIELDS]).any(0)
    if not bool(differs.any()):
        raise UserError(f"{attack}: no row comes out changed; choose other fields, a larger budget or larger changes.")
    return {k: v[differs] for k, v in columns.items()}


def obs_std(pool: Pool) -> Tensor:
    """Standard deviation of every observation entry over the clean rows, at least 1e-3: [n_obs], the unit of radii."""
    return pool.obs[pool.rows("clean").ids].double().std(0, correction=0).clamp(min=1e-3).float()


def changed(pool: Pool, columns: dict[str, Tensor], source: Tensor | None = None) -> dict[str, Any]:
    """Perturbation statistics by field: rows that differ from the original, mean and largest L2 norm of the difference over them.

    source: the original of each row; default: the row it stands in for. Observations in units of their standard deviation.
    """
    source, out = columns["replaces"] if source is None else source, {}
    for name in FIELDS:
        delta = columns[name].float() - pool.columns[name][source].float()
        delta = (delta / obs_std(pool) if name in ("obs", "next_obs") else delta)[:, None].flatten(1).norm(dim=1)
        moved = delta[delta > 0]
        if len(moved):
            out[name] = {"rows": len(moved), "mean": float(moved.mean()), "largest": float(moved.max())}
    return out


def perturbation(pool: Pool, attack: str, facts: Mapping[str, Any]) -> pd.DataFrame:
    """`changed` as a table, one line per column that an attack touched: rows, mean, largest.

    From the attack's facts, or else measured on the rows that it replaced. Empty if nothing differs, or nothing can be compared.
    """
    rows = pool.rows(f"{attack}/forget").ids
    rows = rows[pool.replaces[rows] >= 0]
    found = facts.get("changed") or changed(pool, {k: pool.columns[k][rows] for k in (*FIELDS, "replaces")})
    return pd.DataFrame(found, index=["rows", "mean", "largest"]).T.rename_axis("column").astype({"rows": int})


def touched(pool: Pool, rows: Tensor) -> pd.DataFrame:
    """Clean episodes that hold any of some rows."""
    episodes = pool.episodes("clean")
    return episodes[episodes.episode.isin(pool.episode[rows].unique().tolist())]


def altered(pool: Pool, attack: str) -> pd.DataFrame:
    """Episodes of which an attack replaced rows, most altered first.

    Columns: episode, rows (replaced), ret and cost (added to the episode's sums), change (mean L2 norm over these rows of what was
    added to obs, action, reward and cost, each entry in units of its standard deviation). No lines for episodes that were added.
    """
    rows = pool.rows(f"{attack}/forget").ids
    rows = rows[pool.replaces[rows] >= 0]
    clean, old, parts = pool.rows("clean").ids, pool.replaces[rows], {}
    for name in ("obs", "action", "reward", "cost"):
        column = pool.columns[name].view(len(pool), -1)
        parts[name] = (column[rows] - column[old]) / column[clean].std(0, correction=0).clamp(min=1e-3)
    frame = pd.DataFrame({"episode": pool.episode[rows].numpy(), "ret": (pool.reward[rows] - pool.reward[old]).double().numpy(),
                          "cost": (pool.cost[rows] - pool.cost[old]).double().numpy(),
                          "change": torch.cat(list(parts.values()), 1).norm(dim=1).double().numpy()})
    table = frame.groupby("episode", sort=True).agg(rows=("ret", "size"), ret=("ret", "sum"), cost=("cost", "sum"),
                                                    change=("change", "mean")).reset_index()
    return table.sort_values(["change", "episode"], ascending=[False, True], ignore_index=True)
