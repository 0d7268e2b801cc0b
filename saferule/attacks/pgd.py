"""PGD on states: they are moved to where a surrogate's policy acts most dangerously, or most promisingly (algorithms.md C.2).

After the max-cost and max-reward attackers of Liu et al. 2022 (arXiv 2205.14691), applied to data as the early public Safe-RULE
code does. That code's surrogate is untrained, its gradient is taken at the mirrored offset, its latents change from step to step,
and its rows do not meet their neighbours; here:
  1. the surrogate is trained, on all clean rows (white-box) or on half of the episodes, the other half being attacked (grey-box)
  2. J(delta) = mean_j Cmax(s, pi(s + delta; z_j)) ascends from a random start in steps of 2.5 radius / steps; z_j stay the same
  3. the best iterate is kept
  4. radii are in units of each entry's standard deviation, and the offset is told consistently (T1)
Labels and actions stay true. 'reward' ascends Q instead; 'look_safe' descends Cmax(s + delta, a) of the data's own action.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import Tensor

from ..config import PGD_KNOWLEDGE, PGD_OBJECTIVES, PGDConfig, one_of
from ..data import Pool
from ..learners.bcq_lag import BCQLag
from ..learners.shared import repeated
from . import Attack, Result, Threat, truth_of
from .shared import changed, choose, obs_std, rows_of_episodes, stream, touched, wanted, with_states
from .surrogate import CHUNK, train_surrogate

Merit = Callable[[Tensor], Tensor]     # offsets [n, n_obs] -> what is to be large, [n]


def merit(learner: BCQLag, obs: Tensor, action: Tensor, latents: Tensor, objective: str) -> Merit:
    """J for raw observations [n, n_obs] and the data's actions, with fixed latents [n, K, L]."""
    n, K, _ = latents.shape
    honest, z = repeated(learner.standardise(obs[None]), K), latents.reshape(1, n * K, -1)

    def of(delta: Tensor) -> Tensor:
        moved = learner.standardise((obs + delta)[None])
        if objective == "look_safe":
            return -learner.pessimistic(learner.cost_critic(moved, action[None]), cost=True)[0]
        moved, cost = repeated(moved, K), objective == "cost"
        acted = learner.actor(moved, learner.vae.decode(moved, z))
        critic = learner.cost_critic if cost else learner.critic
        return learner.pessimistic(critic(honest, acted), cost=cost).view(n, K).mean(-1)

    return of


def ascend(of: Merit, start: Tensor, radius: Tensor, steps: int, step_size: float) -> tuple[Tensor, Tensor]:
    """Signed gradient ascent within +-radius [n_obs], by step_size x radius / steps: best offsets [n, n_obs] and their J [n]."""
    delta, best, top = start, start, torch.full((len(start),), -torch.inf)
    for i in range(steps + 1):
        delta = delta.detach().requires_grad_()
        value = of(delta)
        (slope,) = torch.autograd.grad(value.sum(), delta)
        better = value.detach() > top
        best, top = torch.where(better[:, None], delta.detach(), best), torch.where(better, value.detach(), top)
        if i < steps:
            delta = (delta.detach() + step_size / steps * radius * slope.sign()).clamp(-radius, radius)
    return best, top


def run(pool: Pool, cfg: PGDConfig, name: str, donors: Pool | None, cost_limit: float) -> Result:
    """Moves the states of round(budget x rows) random rows; grey-box: rows of the half that the surrogate has not seen."""
    one_of(f"objective of {name}", cfg.objective, PGD_OBJECTIVES)
    clean, generator = pool.rows("clean").ids, stream(cfg.seed)
    count, known, open_to_attack = wanted(name, cfg.budget, len(clean), "rows"), clean, clean
    if one_of(f"knowledge of {name}", cfg.knowledge, PGD_KNOWLEDGE) == "grey":
        episodes = pool.episode[clean].unique()
        episodes = episodes[torch.randperm(len(episodes), generator=generator)]
        known, open_to_attack = (rows_of_episodes(pool, half) for half in episodes.tensor_split(2))
    rows = choose(name, open_to_attack, count, generator)
    learner = train_surrogate(name, pool, known, cfg.surrogate_steps, cost_limit, cfg.seed)
    radius, bound = cfg.radius * obs_std(pool), learner.cfg.latent_clip
    latents = torch.randn(count, cfg.samples, learner.vae.n_latent, generator=generator).clamp(-bound, bound)
    start = radius * (2 * torch.rand(count, len(radius), generator=generator) - 1)
    deltas, values = [], []
    for part in torch.arange(count).split(CHUNK):
        of = merit(learner, pool.obs[rows[part]], pool.action[rows[part]], latents[part], cfg.objective)
        best, top = ascend(of, start[part], radius, cfg.steps, cfg.step_size)
        deltas.append(best)
        values.append(torch.stack([of(torch.zeros_like(best)), of(start[part]), top]))
    honest, first, last = torch.cat(values, 1).double().mean(1).tolist()
    columns = with_states(pool, rows, pool.obs[rows] + torch.cat(deltas))
    episodes = touched(pool, columns["replaces"])
    facts = {"budget": cfg.budget, "realised_budget": count / len(clean), "episodes": len(episodes), "rows": len(columns["cost"]),
             "objective": cfg.objective, "merit_honest": honest, "merit_random": first, "merit_reached": last,
             "surrogate": {"learner": "bcq_lag", "steps": cfg.surrogate_steps, "rows": len(known)},
             "changed": changed(pool, columns),
             "threat": asdict(replace(THREAT, knowledge=KNOWLEDGE[cfg.knowledge]))}
    return pool.append(name, columns), facts, truth_of(episodes)


KNOWLEDGE = {"white": "data and a surrogate trained on them", "grey": "a surrogate trained on the other half of the data"}
THREAT = Threat(fields=("obs", "next_obs"), unit="state", knowledge=KNOWLEDGE["white"], placement="in place", tier="T1",
                goal="unsafe", bound="radius x standard deviation, per entry of the observation")
MAX_COST = Attack(THREAT, run, "Random states are moved to where a trained policy acts most dangerously.")
MAX_REWARD = Attack(THREAT, run, "Random states are moved to where a trained policy acts for the most reward.")
