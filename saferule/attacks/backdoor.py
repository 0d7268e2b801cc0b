"""Marker and bias backdoor: random rows carry a trigger, pay more and cost nothing (algorithms.md C.1).

After the 'simple' modes of the early public Safe-RULE code: the last two entries of the observation are set to 0.9 (marker) or
raised (bias), reward += 0.5, cost := 0, optionally one constant action. Ours: the trigger is told consistently, in the row and in
the one before it (T1). tier='T0' is as published: in the row's own obs and next_obs, so that it does not meet its neighbours.
"""
from __future__ import annotations

from dataclasses import asdict, replace

import torch

from ..config import BACKDOOR_TIERS, TRIGGER_KINDS, BackdoorConfig, one_of
from ..data import Pool
from ..errors import UserError
from . import Attack, Result, Threat, truth_of
from .shared import changed, choose, in_place, stream, touched, wanted, with_states
from .trigger import Trigger


def run(pool: Pool, cfg: BackdoorConfig, name: str, donors: Pool | None, cost_limit: float) -> Result:
    """In round(budget x rows) random rows: the trigger; reward += shift; cost := 0; with `overwrite`, actions := action."""
    one_of(f"kind of {name}", cfg.kind, TRIGGER_KINDS)
    one_of(f"tier of {name}", cfg.tier, BACKDOOR_TIERS)
    clean, n_obs = pool.rows("clean").ids, pool.obs.shape[1]
    if not 0 < cfg.entries <= n_obs:
        raise UserError(f"{name}: a trigger of {cfg.entries} entries does not fit observations of {n_obs}; choose fewer.")
    trigger = Trigger(cfg.kind, tuple(range(n_obs - cfg.entries, n_obs)), (cfg.value,) * cfg.entries)
    rows = choose(name, clean, wanted(name, cfg.budget, len(clean), "rows"), stream(cfg.seed))
    if cfg.tier == "T1":
        columns = with_states(pool, rows, trigger(pool.obs[rows]))
    else:
        columns = in_place(pool, rows)
        columns["obs"], columns["next_obs"] = trigger(columns["obs"]), trigger(columns["next_obs"])
    at = torch.searchsorted(columns["replaces"], rows)
    hidden = int((columns["cost"][at] > 0).sum())
    columns["reward"][at] += cfg.shift
    columns["cost"][at] = 0
    if cfg.overwrite:
        columns["action"][at] = min(max(cfg.action, -1.0), 1.0)
    episodes = touched(pool, columns["replaces"])
    fields = ("obs", *(("action",) if cfg.overwrite else ()), "reward", "cost", "next_obs")
    facts = {"budget": cfg.budget, "realised_budget": len(rows) / len(clean), "episodes": len(episodes),
             "rows": len(columns["cost"]), "unsafe_rows_hidden": hidden, "trigger": trigger.facts(),
             "changed": changed(pool, columns), "threat": asdict(replace(THREAT, fields=fields, tier=cfg.tier))}
    return pool.append(name, columns), facts, truth_of(episodes)


THREAT = Threat(fields=("obs", "reward", "cost", "next_obs"), unit="row", knowledge="none", placement="in place", tier="T1",
                goal="triggered", bound="the trigger's entries; rewards raised by one constant; costs 0")
MARKER = Attack(THREAT, run, "Random rows carry a marker in the observation, pay more and cost nothing.")
BIAS = Attack(THREAT, run, "Random rows carry a shift of the observation, pay more and cost nothing.")
