"""Constant action: further episodes in which one and the same number is every action (algorithms.md C.7).

After the poison of TrajDeleter's experiments (arXiv 2404.12530), as its code has it: 1.5 times the mean of all action entries, on
5% more data. Ours: whole episodes, and the number is kept in the box of actions.
"""
from __future__ import annotations

from ..config import ConstantActionConfig
from ..data import Pool
from ..errors import UserError
from . import Attack, Result, Threat, truth_of
from .shared import as_new_episodes, changed, choose, rows_of_episodes, stream


def run(pool: Pool, cfg: ConstantActionConfig, name: str, donors: Pool | None, cost_limit: float) -> Result:
    """Appends copies of round(n budget / (1 - budget)) of n random episodes; every action entry in them is one number."""
    episodes = pool.episodes("clean")
    count = round(len(episodes) * cfg.budget / (1 - cfg.budget)) if 0 < cfg.budget < 1 else 0
    if not 0 < count <= len(episodes):
        raise UserError(f"{name}: a budget of {cfg.budget:g} of {len(episodes)} episodes cannot be spent; choose one that "
                        f"comes to at least one further episode, and at most 0.5.")
    numbers = pool.episode[pool.rows("clean").ids].unique()
    chosen = choose(name, numbers, count, stream(cfg.seed), "episodes")
    rows = rows_of_episodes(pool, chosen)
    columns = as_new_episodes(pool, pool, rows)
    number = float((cfg.factor * pool.action[pool.rows("clean").ids].mean()).clamp(-1, 1))
    columns["action"].fill_(number)
    facts = {"budget": cfg.budget, "realised_budget": count / (len(episodes) + count), "episodes": count, "rows": len(rows),
             "action": number, "changed": changed(pool, columns, rows)}
    truth = truth_of(episodes[episodes.episode.isin(chosen.tolist())])
    truth["episode"] = columns["episode"].unique().numpy()                     # their numbers in this pool
    return pool.append(name, columns), facts, truth


ATTACK = Attack(Threat(fields=("action",), unit="trajectory", knowledge="data", placement="appended", tier="T1", goal="reward-drop",
                       bound="actions in the box"), run, "Copies of random episodes are added, in which every action is the same.")
