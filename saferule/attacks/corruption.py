"""Corruption of random rows: at random, or by turning labels round, which needs no surrogate (algorithms.md C.0, C.7; ours).

After the corruption models of robust offline RL (Yang et al. 2023, arXiv 2310.12955): there, noise of size radius x std on
observations and actions, rewards drawn anew, or -scale x reward. Ours: rewards get noise as the rest does, costs are handed round
among the rows (at random) or become c_max - c (turned round), and states change consistently in both rows that hold them.
"""
from __future__ import annotations

from dataclasses import asdict, replace

import torch

from ..config import CORRUPTIBLE, TURNABLE, AdversarialCorruptionConfig, RandomCorruptionConfig, one_of
from ..data import Pool
from . import Attack, Result, Threat, truth_of
from .shared import changed, choose, in_place, obs_std, only_changed, stream, touched, unit_cost, wanted, with_states


def at_random(pool: Pool, cfg: RandomCorruptionConfig, name: str, donors: Pool | None, cost_limit: float) -> Result:
    """In round(budget x rows) random rows: obs, action, reward += radius x std x U(-1, 1); cost := that of another of them."""
    for field in cfg.fields:
        one_of(f"field of {name}", field, CORRUPTIBLE)
    clean, generator = pool.rows("clean").ids, stream(cfg.seed)
    rows = choose(name, clean, wanted(name, cfg.budget, len(clean), "rows"), generator)
    noise = lambda *shape: cfg.radius * (2 * torch.rand(shape, generator=generator) - 1)
    columns = in_place(pool, rows)
    if "obs" in cfg.fields:
        columns = with_states(pool, rows, pool.obs[rows] + obs_std(pool) * noise(*pool.obs[rows].shape))
    at = torch.searchsorted(columns["replaces"], rows)
    if "action" in cfg.fields:
        action, std = columns["action"][at], pool.action[clean].std(0, correction=0)
        columns["action"][at] = (action + std * noise(*action.shape)).clamp(-1, 1)
    if "reward" in cfg.fields:
        columns["reward"][at] += pool.reward[clean].std(correction=0) * noise(len(rows))
    if "cost" in cfg.fields:
        columns["cost"][at] = pool.cost[rows[torch.randperm(len(rows), generator=generator)]]
    return finish(pool, name, columns, cfg, rows, RANDOM.threat)


def turned_round(pool: Pool, cfg: AdversarialCorruptionConfig, name: str, donors: Pool | None, cost_limit: float) -> Result:
    """In round(budget x rows) random rows: reward := -scale x reward; cost := the data's largest - cost."""
    for field in cfg.fields:
        one_of(f"field of {name}", field, TURNABLE)
    clean = pool.rows("clean").ids
    rows = choose(name, clean, wanted(name, cfg.budget, len(clean), "rows"), stream(cfg.seed))
    columns = in_place(pool, rows)
    if "reward" in cfg.fields:
        columns["reward"] *= -cfg.scale
    if "cost" in cfg.fields:
        columns["cost"] = unit_cost(pool) - columns["cost"]
    return finish(pool, name, columns, cfg, rows, ADVERSARIAL.threat)


def finish(pool: Pool, name: str, columns: dict, cfg: RandomCorruptionConfig | AdversarialCorruptionConfig, rows: torch.Tensor,
           threat: Threat) -> Result:
    columns = only_changed(name, pool, columns)
    states = int(torch.isin(rows, columns["replaces"]).sum())
    episodes = touched(pool, columns["replaces"])
    fields = tuple(f for f in threat.fields if f in cfg.fields or (f == "next_obs" and "obs" in cfg.fields))
    tier = "T1" if {"obs", "action"} & set(fields) else "T2"
    facts = {"budget": cfg.budget, "realised_budget": states / len(pool.rows("clean").ids), "episodes": len(episodes),
             "rows": len(columns["cost"]), "changed": changed(pool, columns),
             "threat": asdict(replace(threat, fields=fields, tier=tier))}
    return pool.append(name, columns), facts, truth_of(episodes)


RANDOM = Attack(Threat(fields=("obs", "action", "reward", "cost", "next_obs"), unit="row", knowledge="data", placement="in place",
                       tier="T1", goal="reward-drop",
                       bound="radius x standard deviation per entry; actions in the box; costs of the data"), at_random,
                "Random rows get noise on observations, actions and rewards, and each other's costs.")
ADVERSARIAL = Attack(Threat(fields=("reward", "cost"), unit="row", knowledge="data", placement="in place", tier="T2", goal="unsafe",
                            bound="scale x |reward|; costs between 0 and the data's largest"), turned_round,
                     "Random rows get rewards of the opposite sign, and costs where there are none and none where there are.")
