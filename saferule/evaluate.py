"""Rollouts in the simulator, for reporting only: no method may choose anything by them.

Episode e starts from the same seed for every policy, in a new environment. A policy's numbers depend on its weights,
the seed and the number of episodes alone: not on the policies stacked beside it, nor on the number of processes. So
a job is one replica and a fixed block of episodes, with a noise generator seeded by (seed, block).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from saferule import simulator
from saferule.errors import UserError
from saferule.tasks import Task, get_task

BLOCK = 16  # episodes that a process simulates at once: about 35 MB each


class Returns(NamedTuple):
    """Undiscounted sums over R replicas x E episodes."""

    ret: np.ndarray  # [R, E] float64
    cost: np.ndarray  # [R, E] float64
    length: np.ndarray  # [R, E] int64, steps


class Policy(Protocol):
    """What `evaluate` needs. A learner's `pick([r])` is used if it has one, so that only one replica computes."""

    replicas: int

    def act(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """Raw observations [R, E, n_obs] -> actions [R, E, n_act]."""
        ...


class Begun(Protocol):
    """A policy amid E episodes: what its `begin(E)` returns, if it has one and remembers; else the policy itself."""

    def act(self, obs: Tensor, generator: torch.Generator) -> Tensor: ...

    def observe(self, reward: Tensor, cost: Tensor) -> None:
        """What the last action brought, [R, E] each; 0 in episodes that are over."""
        ...


def _begun(policy: Policy, episodes: int) -> Begun:
    return policy.begin(episodes) if hasattr(policy, "begin") else _Forgetful(policy)


class _Forgetful:
    """A policy without memory."""

    def __init__(self, policy: Policy):
        self.act = policy.act

    def observe(self, reward: Tensor, cost: Tensor) -> None:
        pass


class _One:
    """Replica r of a policy that cannot `pick`."""

    def __init__(self, policy: Policy, r: int):
        self.policy, self.r = policy, r

    def act(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        return self.policy.act(obs.expand(self.policy.replicas, -1, -1), generator)[self.r : self.r + 1]


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)


def _replica(policy: Policy, r: int) -> Policy:
    if policy.replicas == 1:
        return policy
    return policy.pick([r]) if hasattr(policy, "pick") else _One(policy, r)


def _actions(policy: Begun, obs: np.ndarray, generator: torch.Generator, r: int, n_act: int) -> np.ndarray:
    """obs [E, n_obs] -> actions [E, n_act] in [-1, 1]. Raises UserError if they are not finite or have another shape."""
    with torch.no_grad():
        action = policy.act(torch.from_numpy(obs)[None], generator)
    if tuple(action.shape) != (1, len(obs), n_act):
        raise UserError(f"policy (replica {r}) returned actions of shape {list(action.shape)} for "
                        f"{[1, *obs.shape]} observations; the task wants {[1, len(obs), n_act]}.")
    action = action[0].numpy()
    if not np.isfinite(action).all():
        raise UserError(f"policy (replica {r}) returned NaN or infinite actions; its training has diverged.")
    return action.clip(-1, 1)


def _block(task: Task, r: int, episodes: list[int], block: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some episodes of one replica, side by side: ret, cost, length [len(episodes)]."""
    policy = _begun(_replica(simulator.shared(), r), len(episodes))
    generator = torch.Generator().manual_seed(_seed(seed, 1, block))
    envs = [simulator.make(task, _seed(seed, 0, e)) for e in episodes]
    obs = np.stack([env.reset()[0] for env in envs]).astype(np.float32)
    ret, cost, length = np.zeros(len(envs)), np.zeros(len(envs)), np.zeros(len(envs), np.int64)
    alive = list(range(len(envs)))
    while alive:  # ended episodes stay in the batch, so that the noise of the others does not shift
        action = _actions(policy, obs, generator, r, task.n_act)
        step = np.zeros((2, len(envs)))  # reward, cost
        for i in list(alive):
            obs[i], step[0, i], terminated, truncated, info = envs[i].step(action[i])
            step[1, i] = info["cost"]
            length[i] += 1
            if terminated or truncated:
                alive.remove(i)
        ret, cost = ret + step[0], cost + step[1]
        policy.observe(*torch.from_numpy(step).float()[:, None])
    for env in envs:
        env.close()
    return ret, cost, length


def _on_cpu(policy: Policy) -> Policy:
    """The policy, or a copy of it, on the CPU: forked processes cannot use a GPU."""
    on_gpu = isinstance(policy, torch.nn.Module) and any(v.is_cuda for v in policy.state_dict().values())
    return policy.pick(range(policy.replicas)).cpu() if on_gpu else policy


def evaluate(policy: Policy, task: str | Task, episodes: int, seed: int = 0, workers: int | None = None,
             progress: bool = True) -> Returns:
    """Roll out every replica of `policy` for `episodes` episodes, on all cores.

    Raises UserError for no episodes and for actions that are not finite or of the wrong shape.
    """
    task = get_task(task)
    if episodes < 1:
        raise UserError(f"evaluate needs at least 1 episode, got {episodes}.")
    blocks = np.array_split(np.arange(episodes), -(-episodes // BLOCK))
    jobs = [(task, r, b.tolist(), i, seed) for r in range(policy.replicas) for i, b in enumerate(blocks)]
    parts = simulator.parallel(_block, jobs, workers, f"evaluate {task.name}", progress, _on_cpu(policy))
    return Returns(*(np.concatenate(column).reshape(policy.replicas, episodes) for column in zip(*parts)))


def rollout_frames(policy: Policy, replica: int, task: str | Task, seed: int = 0, episode: int = 0,
                   every: int = 2) -> np.ndarray:
    """Every `every`-th view along one episode, uint8 [frames, height, width, 3].

    The start is that of episode `episode` of `evaluate`; the policy's own noise is not the same.
    """
    task, policy = get_task(task), _begun(_replica(_on_cpu(policy), replica), 1)
    generator = torch.Generator().manual_seed(_seed(seed, 1, episode))
    env = simulator.make(task, _seed(seed, 0, episode), visual=True)
    obs, ended, frames, t = env.reset()[0], False, [], 0
    while not ended:
        if t % every == 0:
            frames.append(simulator.render(env))
        action = _actions(policy, obs[None].astype(np.float32), generator, replica, task.n_act)
        obs, reward, terminated, truncated, info = env.step(action[0])
        policy.observe(*torch.tensor([reward, info["cost"]]).float()[:, None, None])
        ended, t = terminated or truncated, t + 1
    env.close()
    return np.stack(frames)
