"""The trigger of a backdoor: what an attacker writes into an observation, in the data and later before the policy's eyes.

A triggered policy is rolled out like any other: `evaluate(Triggered(learner, trigger), ...)`. A trigger may lead any policy
astray, being a strange observation: always look at the never-poisoned model under the same trigger too.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import TRIGGER_KINDS, one_of
from ..data import Pool
from ..train import Learner

CHUNK = 4096                           # rows that a policy acts on together: bounds the memory


@dataclass(frozen=True)
class Trigger:
    """Entries of the observation that are set to values ('marker'), or moved by them ('bias'), in the environment's units."""
    kind: str                          # marker | bias
    entries: tuple[int, ...]
    values: tuple[float, ...]
    every: int = 1                     # shown to a policy in every so-many-th step, from the first on

    def __call__(self, obs: Tensor) -> Tensor:
        """Raw observations [..., n_obs] with the trigger in them."""
        out, values = obs.clone(), obs.new_tensor(self.values)
        out[..., list(self.entries)] = values if self.kind == "marker" else obs[..., list(self.entries)] + values
        return out

    def facts(self) -> dict[str, Any]:
        """What a manifest keeps of it; `trigger_of` is the inverse."""
        return asdict(self)


def trigger_of(facts: Mapping[str, Any]) -> Trigger | None:
    """The trigger that an attack's facts speak of; None for attacks without one."""
    known = facts.get("trigger")
    if known is None:
        return None
    one_of("kind of trigger", known["kind"], TRIGGER_KINDS)
    return Trigger(known["kind"], tuple(int(i) for i in known["entries"]), tuple(float(v) for v in known["values"]),
                   int(known["every"]))


class Triggered:
    """A learner that sees the trigger. Stands where `evaluate` wants a policy; on the CPU."""

    def __init__(self, learner: Learner, trigger: Trigger):
        self.learner, self.trigger = learner, trigger

    @property
    def replicas(self) -> int:
        return self.learner.replicas

    def pick(self, replicas: Sequence[int]) -> Triggered:
        return Triggered(self.learner.pick(replicas), self.trigger)

    def act(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """Of an episode's first step; raw observations [R, B, n_obs] -> actions [R, B, n_act]."""
        return self.learner.act(self.trigger(obs), generator)

    def begin(self, episodes: int) -> _Amid:
        return _Amid(self.learner.begin(episodes), self.trigger)


class _Amid:
    """A triggered learner amid an episode; counts the steps."""

    def __init__(self, actor: Any, trigger: Trigger):
        self.actor, self.trigger, self.observe, self.t = actor, trigger, actor.observe, 0

    def act(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        shown, self.t = self.t % self.trigger.every == 0, self.t + 1
        return self.actor.act(self.trigger(obs) if shown else obs, generator)


@torch.no_grad()
def success_rate(learner: Learner, pool: Pool, attack: str, trigger: Trigger, seed: int = 0) -> Tensor:
    """Share of the attack's states at which the trigger draws the policy towards the attacker's action: [R] (algorithms.md C.6).

    That is |pi(trig(s)) - mu(s)| < |pi(trig(s)) - pi(s)|, s the honest states of the rows that the attack replaced and mu(s) its
    actions there; pi draws the same noise with and without the trigger. Replica by replica, so that it does not matter which
    others are stacked beside. Without a simulator.
    """
    rows = pool.rows(f"{attack}/forget").ids
    obs, malice = pool.obs[pool.replaces[rows]], pool.action[rows]                                 # [n, n_obs], [n, n_act]

    def act(policy: Learner, states: Tensor) -> Tensor:
        generator = torch.Generator(policy.device).manual_seed(seed)
        return torch.cat([policy.act(part[None], generator)[0] for part in states.split(CHUNK)])

    rates = []
    for r in range(learner.replicas):
        policy = learner.pick([r])
        triggered, honest = act(policy, trigger(obs)), act(policy, obs)
        rates.append(((triggered - malice).norm(dim=-1) < (triggered - honest).norm(dim=-1)).float().mean())
    return torch.stack(rates)
