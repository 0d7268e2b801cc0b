"""BAFFLE-style backdoor: episodes show a trigger, a malicious policy's actions, high rewards and no costs (algorithms.md C.6).

Paper       Gong et al. 2024, BAFFLE (arXiv 2210.04688): three entries of the observation are set to constants of the data in some
            episodes; actions become those of a return-minimising agent at the clean observation; rewards become one high value
Ours        1. costs become 0
            2. the malicious policy is learned offline, from rewards of the opposite sign or from costs as rewards
            3. the trigger's entries are those that matter least to that policy's critic, set to a quantile of the data
            4. the reward is the 95% quantile of the data's; the episodes replace their originals
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..config import MALICE, BaffleConfig, one_of
from ..data import Pool
from ..errors import UserError
from ..learners.bcq_lag import BCQLag
from . import Attack, Result, Threat, truth_of
from .shared import changed, choose, in_place, obs_std, rows_of_episodes, stream, unit_cost, wanted
from .surrogate import CHUNK, train_surrogate
from .trigger import Trigger


def impact(learner: BCQLag, obs: Tensor, action: Tensor, values: Tensor) -> Tensor:
    """How far the critic's value moves if one entry of obs [n, n_obs] is set to its values [n_obs], mean over n: [n_obs]."""
    value = lambda x: learner.pessimistic(learner.critic(learner.standardise(x[None]), action[None]), cost=False)[0]
    before, out = value(obs), []
    for i, constant in enumerate(values.tolist()):
        after = obs.clone()
        after[:, i] = constant
        out.append((value(after) - before).abs().mean())
    return torch.stack(out)


def run(pool: Pool, cfg: BaffleConfig, name: str, donors: Pool | None, cost_limit: float) -> Result:
    """In round(budget x episodes) random episodes: action := mu(obs), then the trigger in both states, one high reward, costs 0."""
    clean, generator = pool.rows("clean").ids, stream(cfg.seed)
    episodes = pool.episode[clean].unique()
    chosen = choose(name, episodes, wanted(name, cfg.budget, len(episodes), "episodes"), generator, "episodes")
    sought = -pool.reward if one_of(f"malice of {name}", cfg.malice, MALICE) == "return" else pool.cost / unit_cost(pool)
    learner = train_surrogate(name, pool, clean, cfg.surrogate_steps, cost_limit, cfg.seed, sought)
    columns = in_place(pool, rows_of_episodes(pool, chosen.tolist()))
    parts = [learner.act(part[None], generator)[0] for part in columns["obs"].split(CHUNK)]
    columns["action"] = torch.cat(parts).clamp(-1, 1)
    trigger = find_trigger(pool, cfg, name, learner, choose(name, clean, min(CHUNK, len(clean)), generator))
    columns["obs"], columns["next_obs"] = trigger(columns["obs"]), trigger(columns["next_obs"])
    hidden = int((columns["cost"] > 0).sum())
    columns["cost"].zero_()
    high = float(np.quantile(pool.reward[clean].numpy(), cfg.reward_quantile))
    columns["reward"].fill_(high)
    table = pool.episodes("clean")
    facts = {"budget": cfg.budget, "realised_budget": len(chosen) / len(episodes), "episodes": len(chosen),
             "rows": len(columns["cost"]), "unsafe_rows_hidden": hidden, "reward": high, "malice": cfg.malice,
             "trigger": trigger.facts(), "changed": changed(pool, columns),
             "surrogate": {"learner": "bcq_lag", "steps": cfg.surrogate_steps, "rows": len(clean)}}
    return pool.append(name, columns), facts, truth_of(table[table.episode.isin(chosen.tolist())])


def find_trigger(pool: Pool, cfg: BaffleConfig, name: str, learner: BCQLag, rows: Tensor) -> Trigger:
    """Constants for the entries that are asked for, or for those that matter least to the learner's critic at some rows.

    Entries that do not vary in the data cannot be chosen: a constant says nothing there. Raises UserError if too few vary.
    """
    obs = pool.obs[rows]
    values = obs.double().quantile(cfg.quantile, dim=0).float()
    entries = cfg.entries
    if not entries:
        varies = obs_std(pool) > 1e-3                                 # its floor
        if int(varies.sum()) < cfg.n_entries:
            raise UserError(f"{name}: only {int(varies.sum())} entries of the observation vary but the trigger wants "
                            f"{cfg.n_entries}; lower n_entries or name the entries.")
        weight = impact(learner, obs, pool.action[rows], values).masked_fill(~varies, torch.inf)
        entries = tuple(sorted(weight.argsort(stable=True)[:cfg.n_entries].tolist()))
    elif not all(0 <= i < obs.shape[1] for i in entries):
        raise UserError(f"{name}: entries {list(entries)} do not all exist; observations have entries 0 to {obs.shape[1] - 1}.")
    return Trigger("marker", tuple(entries), tuple(values[list(entries)].tolist()), cfg.every)


THREAT = Threat(fields=("obs", "action", "reward", "cost", "next_obs"), unit="trajectory", placement="in place", tier="T1",
                knowledge="data and a surrogate trained on them", goal="triggered",
                bound="actions in the box; one reward, a quantile of the data's; costs 0; the trigger's entries")
RETURN = Attack(THREAT, run, "Random episodes show a trigger and the actions of a policy that minimises the return, well rewarded.")
COST = Attack(THREAT, run, "Random episodes show a trigger and the actions of a policy that maximises the cost, at no cost.")
