"""What several learners share: repeated states, regression of critic heads, the VAE's loss, and the Lagrangian learner."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import Batch, Units
from ..nets import VAE, Critic, generators, kl_to_standard_normal
from ..train import Learner


class Targets(NamedTuple):
    """Regression targets [R, B] of the two critics, and the cost value of the policy at the next state."""
    reward: Tensor
    cost: Tensor
    next_qc: Tensor


def repeated(obs: Tensor, samples: int) -> Tensor:
    """obs [R, B, n_obs] -> [R, B * samples, n_obs], row b * samples + k being state b (b-major)."""
    R, B, n = obs.shape
    return obs[:, :, None].expand(R, B, samples, n).reshape(R, B * samples, n)


def regression(q: Tensor, y: Tensor) -> Tensor:
    """Squared error of heads q [R, E, B] to y [R, B]: mean over B, sum over E -> [R]."""
    return (q - y[:, None]).square().mean(-1).sum(1)


def vae_loss(vae: VAE, batch: Batch, beta: float, randn: Callable[..., Tensor]) -> Tensor:
    """MSE(decoded, a) + beta KL -> [R]; both are means over rows and dimensions (OSRL)."""
    mean, std = vae.encode(batch.obs, batch.action)
    decoded = vae.decode(batch.obs, mean + std * randn(*mean.shape))
    kl = kl_to_standard_normal(mean, std).mean((-1, -2))
    return (decoded - batch.action).square().mean((-1, -2)) + beta * kl


class Lagrangian(Learner):
    """VAE, two critics and a multiplier: BCQ-Lag and BEAR-Lag without their actors.

    Subclasses give `sample`: the actor's random actions for standardised states.
    """
    LOSSES = "vae", "critic", "cost_critic", "actor"               # order of the steps

    def __init__(self, cfg: Any, units: Units, qc_limit: Tensor, seeds: Sequence[int], n_act: int, horizon: int = 1000):
        super().__init__(cfg, units, qc_limit, seeds, n_act, horizon)
        self.boundaries = (cfg.vae_steps,)
        gens, heads = generators(seeds), cfg.heads * (2 if self.parity else 1)
        self.own("vae", VAE(gens, self.n_obs, n_act, cfg.vae_hidden), target=False)
        self.own("critic", Critic(gens, self.n_obs, n_act, cfg.hidden, heads))
        self.own("cost_critic", Critic(gens, self.n_obs, n_act, cfg.hidden, heads))
        self.own("actor", self.make_actor(gens))
        for name in ("lam", "pid_error", "pid_integral"):
            self.register_buffer(name, torch.zeros(self.replicas, 1))

    def make_actor(self, gens: Sequence[torch.Generator]) -> torch.nn.Module:
        raise NotImplementedError

    def sample(self, actor: torch.nn.Module, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One random action per row of obs [R, B, n_obs]: [R, B, n_act]."""
        raise NotImplementedError

    def ready(self) -> Lagrangian:
        self.optimisers(**{name: self.cfg.lr for name in self.LOSSES})
        return self

    # ------------------------------------------------------------------------------------------------ the policy
    def prior(self, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents [R, B, L] from the clipped prior (parity: clipped at 0.5)."""
        clip = 0.5 if self.parity else self.cfg.latent_clip
        return self.randn(*obs.shape[:-1], self.vae.n_latent, generator=generator).clamp_(-clip, clip)

    def pessimistic(self, q: Tensor, cost: bool) -> Tensor:
        """One value per row from the heads [R, E, B]: min for reward; max for cost (parity: min for both)."""
        return q.amax(1) if cost and not self.parity else q.amin(1)

    def merit(self, q: Tensor, qc: Tensor) -> Tensor:
        """What the policy climbs, Q - lam Qc: [R, B]."""
        return q - self.lam * qc

    def best(self, obs: Tensor, samples: int, target: bool,
             generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Among `samples` candidates per state the one with the largest Q - lam Qc: action [R, B, n_act], Q and Qc [R, B]."""
        actor, critic, cost_critic = (getattr(self, n + "_target" * target) for n in ("actor", "critic", "cost_critic"))
        R, B, _ = obs.shape
        many = repeated(obs, samples)
        a = self.sample(actor, many, generator)
        q = self.pessimistic(critic(many, a), cost=False).view(R, B, samples)
        qc = self.pessimistic(cost_critic(many, a), cost=True).view(R, B, samples)
        j = (q - self.lam[..., None] * qc).argmax(-1, keepdim=True)                      # [R, B, 1]
        a = a.view(R, B, samples, -1).gather(2, j[..., None].expand(-1, -1, -1, a.shape[-1]))
        return a.squeeze(2), q.gather(-1, j).squeeze(-1), qc.gather(-1, j).squeeze(-1)

    @torch.no_grad()
    def value(self, obs: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Target networks' reward and cost value of the policy's own action at standardised obs: [R, B] each."""
        if not self.parity:
            return self.best(obs, self.cfg.samples, target=True, generator=generator)[1:]
        return self._mixture("critic", obs, generator), self._mixture("cost_critic", obs, generator)

    def _mixture(self, name: str, obs: Tensor, generator: torch.Generator | None) -> Tensor:
        """OSRL: max over K sampled actions of lmbda min(q1, q2) + (1 - lmbda) max(q1, q2), q1 and q2 the groups' minima."""
        R, B, _ = obs.shape
        many = repeated(obs, self.cfg.samples)
        q = getattr(self, name + "_target")(many, self.sample(self.actor_target, many, generator))
        q = q.view(R, 2, self.cfg.heads, -1).amin(2)                                     # [R, 2, B K]
        mixed = self.cfg.lmbda * q.amin(1) + (1 - self.cfg.lmbda) * q.amax(1)
        return mixed.view(R, B, self.cfg.samples).amax(-1)

    # ------------------------------------------------------------------------------------------------ the losses
    @torch.no_grad()
    def targets(self, batch: Batch) -> Targets:                    # y = r + gamma^m (1 - d) V'(s')
        v, vc = self.value(batch.next_obs)
        discount = self.cfg.gamma ** batch.steps
        alive = 1 - batch.done
        return Targets(batch.reward + discount * alive * v,
                       batch.cost + discount * (1.0 if self.parity else alive) * vc, vc)

    def vae_loss(self, batch: Batch) -> Tensor:
        return vae_loss(self.vae, batch, self.cfg.beta, self.randn)

    def critic_loss(self, batch: Batch, target: Targets | None = None) -> Tensor:
        return regression(self.critic(batch.obs, batch.action), (target or self.targets(batch)).reward)

    def cost_critic_loss(self, batch: Batch, target: Targets | None = None) -> Tensor:
        return regression(self.cost_critic(batch.obs, batch.action), (target or self.targets(batch)).cost)

    # -------------------------------------------------------------------------------------------- the multiplier
    @torch.no_grad()
    def ascend_lam(self, qc: Tensor) -> None:
        """Move the multiplier by cost values qc [R, B]: projected dual ascent with a cap (parity: PID, without one)."""
        if not self.cfg.adapt_lam:
            return
        error = qc.mean(-1, keepdim=True) - self.qc_limit
        if not self.parity:
            self.lam.add_(self.cfg.lr_lam * error).clamp_(0, self.cfg.lam_max)
            return
        kp, ki, kd = self.cfg.pid
        rise = (error - self.pid_error).clamp_(min=0)
        self.pid_integral.add_(error).clamp_(min=0)
        self.pid_error.copy_(error)
        self.lam.copy_((kp * error.clamp(min=0) + ki * self.pid_integral + kd * rise).clamp_(min=0))
