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

import torch
from torch import Tensor

from ..data import Batch
from ..nets import Perturbation
from ..train import Extra
from .shared import Lagrangian, Targets


class BCQLag(Lagrangian):

    def make_actor(self, gens: Sequence[torch.Generator]) -> Perturbation:
        return Perturbation(gens, self.n_obs, self.n_act, self.cfg.hidden, self.cfg.phi)

    # ------------------------------------------------------------------------------------------------ the policy
    def decode(self, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """An action the data would take: decoded from a clipped prior sample."""
        return self.vae.decode(obs, self.prior(obs, generator))

    def sample(self, actor: Perturbation, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return actor(obs, self.decode(obs, generator))

    @torch.no_grad()
    def act(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        obs = self.standardise(obs)
        if self.parity:
            return self.sample(self.actor, obs, generator)
        return self.best(obs, self.cfg.act_samples, target=False, generator=generator)[0]

    # ------------------------------------------------------------------------- the losses (critics and VAE: shared.py)
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
