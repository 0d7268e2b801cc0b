"""BCQ with a Lagrangian cost constraint (BCQ-Lag).

Paper       Fujimoto, Meger & Precup 2019 (arXiv 1812.02900), algorithm 1; the constrained form is OSRL's (revision 03a4586)
Parity      mode='parity' follows OSRL: two groups of `heads` nets per critic, mixture lmbda min + (1 - lmbda) max of the
            groups, largest mixture over the sampled actions in both targets, separate draws, PID multiplier, one sampled
            action when acting, latents clipped to +-0.5
Deviations  (mode='default'; each is ours unless noted)
            1. one candidate serves both targets and the acting: the one with the largest Q - lam Qc (BCQ's arg-max)
            2. Q is the min, Qc the max over heads: pessimistic about both (OSRL takes the min of Qc)
            3. both targets stop at terminal rows and bootstrap through time-outs (OSRL: reward at both, cost never)
            4. projected dual ascent with a cap instead of a PID without one
            5. the VAE is fitted alone for the first `vae_steps` steps
            6. standardised observations, rewards divided by their 98% quantile
Shapes      R replicas, B batch, E heads, K candidates; every batch field is [R, B, ...]
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import BCQLagConfig
from ..data import Batch, Units
from ..nets import VAE, Critic, Perturbation, generators, kl_to_standard_normal
from ..train import Extra, Learner


class Targets(NamedTuple):
    """Regression targets [R, B] of the two critics, and the cost value of the policy at the next state."""
    reward: Tensor
    cost: Tensor
    next_qc: Tensor


class BCQLag(Learner):
    LOSSES = "vae", "critic", "cost_critic", "actor"               # order of the steps

    def __init__(self, cfg: BCQLagConfig, units: Units, qc_limit: Tensor, seeds: Sequence[int], n_act: int):
        super().__init__(cfg, units, qc_limit, seeds)
        self.n_act, self.parity = n_act, cfg.mode == "parity"
        self.boundaries = (cfg.vae_steps,)
        gens, heads = generators(seeds), cfg.heads * (2 if self.parity else 1)
        self.own("vae", VAE(gens, self.n_obs, n_act, cfg.vae_hidden), target=False)
        self.own("critic", Critic(gens, self.n_obs, n_act, cfg.hidden, heads))
        self.own("cost_critic", Critic(gens, self.n_obs, n_act, cfg.hidden, heads))
        self.own("actor", Perturbation(gens, self.n_obs, n_act, cfg.hidden, cfg.phi))
        self.register_buffer("lam", torch.zeros(self.replicas, 1))
        self.register_buffer("pid_error", torch.zeros(self.replicas, 1))
        self.register_buffer("pid_integral", torch.zeros(self.replicas, 1))

    def ready(self) -> BCQLag:
        self.optimisers(**{name: self.cfg.lr for name in self.LOSSES})
        return self

    # ------------------------------------------------------------------------------------------------ the policy
    def decode(self, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """An action the data would take: decoded from a clipped prior sample."""
        clip = 0.5 if self.parity else self.cfg.latent_clip
        z = self.randn(*obs.shape[:-1], self.vae.n_latent, generator=generator).clamp_(-clip, clip)
        return self.vae.decode(obs, z)

    def pessimistic(self, q: Tensor, cost: bool) -> Tensor:
        """One value per row from the heads [R, E, B]: min for reward; max for cost (parity: min for both)."""
        return q.amax(1) if cost and not self.parity else q.amin(1)

    def best(self, obs: Tensor, samples: int, target: bool,
             generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Among `samples` candidates per state the one with the largest Q - lam Qc: action [R, B, n_act], Q and Qc [R, B]."""
        actor, critic, cost_critic = (getattr(self, n + "_target" * target) for n in ("actor", "critic", "cost_critic"))
        R, B, n = obs.shape
        many = obs[:, :, None].expand(R, B, samples, n).reshape(R, B * samples, n)       # b-major: row b * K + k
        a = actor(many, self.decode(many, generator))
        q = self.pessimistic(critic(many, a), cost=False).view(R, B, samples)
        qc = self.pessimistic(cost_critic(many, a), cost=True).view(R, B, samples)
        j = (q - self.lam[..., None] * qc).argmax(-1, keepdim=True)                      # [R, B, 1]
        a = a.view(R, B, samples, -1).gather(2, j[..., None].expand(-1, -1, -1, a.shape[-1]))
        return a.squeeze(2), q.gather(-1, j).squeeze(-1), qc.gather(-1, j).squeeze(-1)

    @torch.no_grad()
    def act(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        obs = self.standardise(obs)
        if self.parity:
            return self.actor(obs, self.decode(obs, generator))
        return self.best(obs, self.cfg.act_samples, target=False, generator=generator)[0]

    @torch.no_grad()
    def value(self, obs: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Target networks' reward and cost value of the policy's own action at standardised obs: [R, B] each."""
        if not self.parity:
            return self.best(obs, self.cfg.samples, target=True, generator=generator)[1:]
        return self._mixture("critic", obs, generator), self._mixture("cost_critic", obs, generator)

    def _mixture(self, name: str, obs: Tensor, generator: torch.Generator | None) -> Tensor:
        """OSRL: max over K sampled actions of lmbda min(q1, q2) + (1 - lmbda) max(q1, q2), q1 and q2 the groups' minima."""
        R, B, n = obs.shape
        many = obs[:, :, None].expand(R, B, self.cfg.samples, n).reshape(R, -1, n)
        q = getattr(self, name + "_target")(many, self.actor_target(many, self.decode(many, generator)))
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

    def vae_loss(self, batch: Batch) -> Tensor:                    # MSE(decoded, a) + beta KL
        mean, std = self.vae.encode(batch.obs, batch.action)
        decoded = self.vae.decode(batch.obs, mean + std * self.randn(*mean.shape))
        kl = kl_to_standard_normal(mean, std).mean((-1, -2))
        return (decoded - batch.action).square().mean((-1, -2)) + self.cfg.beta * kl

    def critic_loss(self, batch: Batch, target: Targets | None = None) -> Tensor:
        y = (target or self.targets(batch)).reward
        return (self.critic(batch.obs, batch.action) - y[:, None]).square().mean(-1).sum(1)     # mean over B, sum over E

    def cost_critic_loss(self, batch: Batch, target: Targets | None = None) -> Tensor:
        y = (target or self.targets(batch)).cost
        return (self.cost_critic(batch.obs, batch.action) - y[:, None]).square().mean(-1).sum(1)

    def policy_values(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Online critics' Q and Qc [R, B] of one perturbed decoded action per state; gradient reaches the actor."""
        with torch.no_grad():
            decoded = self.decode(obs)
        a = self.actor(obs, decoded)
        return self.pessimistic(self.critic(obs, a), cost=False), self.pessimistic(self.cost_critic(obs, a), cost=True)

    def actor_loss(self, batch: Batch, values: tuple[Tensor, Tensor] | None = None) -> Tensor:     # -Q + lam (Qc - limit)
        q, qc = values or self.policy_values(batch.obs)
        return (-q + self.lam * (qc - self.qc_limit)).mean(-1)

    # ------------------------------------------------------------------------------------------------ the update
    @torch.no_grad()
    def ascend_lam(self, qc: Tensor) -> None:                      # qc [R, B]
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

    def update(self, batch: Batch, t: int, target: Targets | None = None, extra: Extra | None = None) -> dict[str, Tensor]:
        out = {"vae": self.minimise("vae", self.vae_loss(batch), extra)}
        if t < self.cfg.vae_steps:
            return out
        target = target or self.targets(batch)
        out["critic"] = self.minimise("critic", self.critic_loss(batch, target), extra)
        out["cost_critic"] = self.minimise("cost_critic", self.cost_critic_loss(batch, target), extra)
        q, qc = values = self.policy_values(batch.obs)
        if self.parity:
            self.ascend_lam(qc)
        out["actor"] = self.minimise("actor", self.actor_loss(batch, values), extra)
        if not self.parity:                                        # of the arg-max policy, not of one sampled action
            self.ascend_lam(target.next_qc)
        self.polyak("critic", "cost_critic", "actor")
        return {**out, "q": q.detach().mean(-1), "qc": qc.detach().mean(-1), "lam": self.lam[:, 0].clone()}
