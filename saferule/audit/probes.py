"""What the audits look at: logged trajectories, what a policy does along them, and what critics say of it.

Shapes      R replicas, m trajectories, T rows of the longest (shorter ones are padded), K sampled actions
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import Pool, Rows
from ..train import Learner, Resume, fit

CHUNK = 8192                           # states at a time, to bound memory


class Trajectories(NamedTuple):
    """m trajectories as rows of a pool."""
    ids: Tensor                        # int64 [m, T], in order of time; padded with the first row
    mask: Tensor                       # bool [m, T]: which entries count


def trajectories(pool: Pool, ids: Tensor, most: int = 0, seed: int = 0) -> Trajectories:
    """Rows grouped by episode, in order of episode and time; of more than `most` episodes (0: no bound) a random selection."""
    if len(ids) == 0:
        return Trajectories(ids.new_zeros(0, 0), torch.zeros(0, 0, dtype=torch.bool, device=ids.device))
    ids = ids[torch.argsort(pool.t[ids], stable=True)]
    ids = ids[torch.argsort(pool.episode[ids], stable=True)]
    _, count = pool.episode[ids].unique_consecutive(return_counts=True)
    place = torch.arange(int(count.max()), device=ids.device)
    mask = place < count[:, None]
    start = count.cumsum(0) - count
    table = ids[torch.where(mask, start[:, None] + place, start[:, None])]
    if 0 < most < len(count):
        chosen = torch.randperm(len(count), generator=torch.Generator().manual_seed(seed))[:most].sort().values.to(ids.device)
        table, mask = table[chosen], mask[chosen]
    return Trajectories(table, mask)


def every_few(along: Trajectories, rows: int) -> Trajectories:
    """Every k-th row of each trajectory, k the smallest such that about `rows` rows or fewer are left."""
    k = max(1, -(-int(along.mask.sum()) // max(rows, 1)))
    return Trajectories(along.ids[:, ::k], along.mask[:, ::k])


def remembers(learner: Learner) -> bool:
    """Does its policy look at an episode's past?"""
    return type(learner).begin is not Learner.begin


@torch.no_grad()
def actions(learner: Learner, pool: Pool, along: Trajectories, samples: int = 1, seed: int = 0) -> Tensor:
    """What each replica would do at the logged states: [K, R, m, T, n_act].

    Replicas act one by one with the same noise, so that what one does depends on its own weights alone. A policy with memory
    sees the logged states, rewards and costs, and its own actions.
    """
    obs, out = pool.obs[along.ids], []
    for r in range(learner.replicas):
        one = learner.pick([r])
        generator = torch.Generator(learner.device).manual_seed(seed)
        out.append(torch.stack([_walk(one, pool, along, generator) if remembers(one) else _act(one, obs, generator)
                                for _ in range(samples)]))
    return torch.stack(out, 1)


def _act(one: Learner, obs: Tensor, generator: torch.Generator) -> Tensor:
    parts = [one.act(part[None], generator)[0] for part in obs.flatten(0, 1).split(CHUNK)]
    return torch.cat(parts).view(*obs.shape[:2], -1)


def _walk(one: Learner, pool: Pool, along: Trajectories, generator: torch.Generator) -> Tensor:
    policy, out = one.begin(len(along.ids)), []
    for ids in along.ids.T:
        out.append(policy.act(pool.obs[ids][None], generator)[0])
        policy.observe(pool.reward[ids][None], pool.cost[ids][None])
    return torch.stack(out, 1)


@torch.no_grad()
def values(learner: Learner, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Each replica's critics at raw obs [n, n_obs] and action [n, n_act]: reward values (raw units) and cost values, [R, n].

    Pessimistic over heads, as the learner takes them.
    """
    R, out = learner.replicas, []
    for s, a in zip(obs.split(CHUNK), action.split(CHUNK)):
        s, a = learner.standardise(s.expand(R, *s.shape)), a.expand(R, *a.shape)
        out.append(torch.stack([learner.pessimistic(learner.critic(s, a), cost=False) * learner.reward_scale[:, None],
                                learner.pessimistic(learner.cost_critic(s, a), cost=True)]))
    return tuple(torch.cat(out, -1))


def has_critics(learner: Learner | type[Learner]) -> bool:
    """Has it reward and cost values of state and action?"""
    return {"critic", "cost_critic"} <= set(learner.LOSSES)


Probe = Callable[[], dict[str, Tensor]]


def go_on(learner: Learner, pool: Pool, rows: Sequence[Rows], steps: int, seed: int, resume: Resume | None = None,
          progress: Callable = iter, probes: Mapping[int, Probe] | None = None) -> dict[int, dict[str, Tensor]]:
    """Ordinary training of each replica (changed in place) on its rows, from where it stands; what the probes said, by step."""
    learner.seed_noise(seed)
    sampler, stream = learner.sampler(pool, rows), torch.Generator(learner.device).manual_seed(seed + 1)
    kept: dict[int, dict[str, Tensor]] = {}
    keep = lambda t, probe: lambda: kept.__setitem__(t, probe())
    fit(lambda t: learner.update(sampler.sample(stream), learner.cfg.steps + t), steps, learner, [stream], log_every=steps,
        snapshots={t: keep(t, probe) for t, probe in (probes or {}).items()}, kept=kept, resume=resume, progress=progress)
    return kept
