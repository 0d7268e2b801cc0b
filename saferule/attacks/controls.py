"""Controls: what an attack does must not come from changing rows as such, nor unlearning's effect from forgetting as such
(algorithms.md C.7; ours).

noise         the rows of another attack, changed by as much as there, in a random direction
clean_forget  nothing is changed; honest rows are to be forgotten, which should change next to nothing
noop          the same rows, replaced by copies that are equal to them
"""
from __future__ import annotations

from dataclasses import asdict, replace

import torch
from torch import Tensor

from ..config import CONFIGS, FORGET_UNITS, CleanForgetConfig, NoiseConfig, one_of, with_overrides
from ..data import FIELDS, Pool, Rows
from . import ATTACKS, Attack, Result, Threat, poison, truth_of
from .shared import changed, choose, in_place, obs_std, only_changed, rows_of_episodes, stream, touched, wanted, with_states


def redirected(delta: Tensor, generator: torch.Generator) -> Tensor:
    """Vectors [n, k] of the same norms in random directions."""
    other = torch.randn(delta.shape, generator=generator)
    return other * (delta.norm(dim=1, keepdim=True) / other.norm(dim=1, keepdim=True))


def noise(pool: Pool, cfg: NoiseConfig, name: str, donors: Pool | None, cost_limit: float) -> Result:
    """Mounts attack `like` with this budget and seed, then turns what it did to every row into noise of the same size.

    Observations (norm in units of their standard deviations; told consistently) and actions (kept in the box) move in random
    directions; rewards and costs are handed round among the attack's rows. Rows that come out unchanged are left alone.
    """
    possible = [a for a, other in ATTACKS.items() if other.threat.placement == "in place" and other.threat.goal != "control"
                and a != "given"]
    one_of(f"attack that {name} is a control of", cfg.like, possible)
    common = {k: getattr(cfg, k) for k in ("budget", "seed", "surrogate_steps") if hasattr(CONFIGS[cfg.like], k)}
    like = with_overrides(CONFIGS[cfg.like], {**common, **cfg.settings}, cfg.like)
    honest = Pool({k: v[pool.origin == 0] for k, v in pool.columns.items()})
    attacked, facts, _ = poison(honest, cfg.like, like, donors, cost_limit)
    rows = attacked.rows(f"{cfg.like}/forget").ids
    originals, generator, std = attacked.replaces[rows], stream(cfg.seed), obs_std(pool)
    moved = (attacked.obs[rows] != pool.obs[originals]).any(1)
    delta = (attacked.obs[rows] - pool.obs[originals])[moved] / std
    columns = with_states(pool, originals[moved], pool.obs[originals[moved]] + redirected(delta, generator) * std, originals)
    at = torch.searchsorted(columns["replaces"], originals)
    delta = redirected(attacked.action[rows] - pool.action[originals], generator)
    columns["action"][at] = (pool.action[originals] + delta).clamp(-1, 1)
    shuffled = originals[torch.randperm(len(originals), generator=generator)]
    for field in {"reward", "cost"} & set(facts["threat"]["fields"]):
        columns[field][at] = pool.columns[field][shuffled]
    columns = only_changed(name, pool, columns)
    episodes = touched(pool, columns["replaces"])
    used = {k: v for k, v in asdict(like).items() if k not in ("budget", "seed")}
    threat = replace(NOISE.threat, fields=tuple(facts["threat"]["fields"]), unit=facts["threat"]["unit"],
                     tier="T1" if bool(moved.any()) else facts["threat"]["tier"])
    return pool.append(name, columns), {
        "budget": cfg.budget, "realised_budget": facts["realised_budget"], "episodes": len(episodes), "rows": len(columns["cost"]),
        "like": cfg.like, "settings": used, "changed": changed(pool, columns), "threat": asdict(threat)}, truth_of(episodes)


def chosen(pool: Pool, cfg: CleanForgetConfig, name: str) -> tuple[Tensor, float]:
    """Rows of random episodes, or random rows, and the share of all that they are."""
    rows, generator = pool.rows("clean").ids, stream(cfg.seed)
    if one_of(f"unit of {name}", cfg.unit, FORGET_UNITS) == "row":
        count = wanted(name, cfg.budget, len(rows), "rows")
        return choose(name, rows, count, generator), count / len(rows)
    episodes = pool.episode[rows].unique()
    count = wanted(name, cfg.budget, len(episodes), "episodes")
    return rows_of_episodes(pool, choose(name, episodes, count, generator)), count / len(episodes)


def clean_forget(pool: Pool, cfg: CleanForgetConfig, name: str, donors: Pool | None, cost_limit: float) -> Result:
    """Marks round(budget x episodes) random episodes (or rows) as rows to forget."""
    rows, share = chosen(pool, cfg, name)
    facts = {"budget": cfg.budget, "realised_budget": share, "episodes": len(touched(pool, rows)), "rows": len(rows),
             "threat": asdict(replace(CLEAN_FORGET.threat, unit=cfg.unit))}
    return pool.append(name, {}, Rows(rows, torch.ones(len(rows)))), facts, truth_of(pool.episodes("clean").head(0))


def noop(pool: Pool, cfg: CleanForgetConfig, name: str, donors: Pool | None, cost_limit: float) -> Result:
    """The rows that `clean_forget` marks with the same seed, replaced by copies that are equal to them."""
    rows, share = chosen(pool, cfg, name)
    episodes = touched(pool, rows)
    facts = {"budget": cfg.budget, "realised_budget": share, "episodes": len(episodes), "rows": len(rows),
             "threat": asdict(replace(NOOP.threat, unit=cfg.unit))}
    return pool.append(name, in_place(pool, rows)), facts, truth_of(episodes)


NOISE = Attack(Threat(fields=tuple(f for f in FIELDS if f not in ("terminal", "timeout")), unit="row", knowledge="none",
                      placement="in place", tier="T1", goal="control", bound="the norms of the attack that it is a control of"),
               noise, "The rows of another attack are changed as much as there, in random directions.")
CLEAN_FORGET = Attack(Threat(fields=(), unit="trajectory", knowledge="none", placement="in place", tier="T2", goal="control",
                             bound="nothing is changed"), clean_forget, "Nothing is changed: honest rows are to be forgotten.")
NOOP = Attack(CLEAN_FORGET.threat, noop, "Rows are replaced by copies that are equal to them.")
