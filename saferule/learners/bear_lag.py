"""BEAR with a Lagrangian cost constraint (BEAR-Lag).

Paper       Kumar, Fu, Tucker & Levine 2019 (arXiv 1906.00949), algorithm 1; the constrained form is OSRL's (revision 03a4586)
Parity      mode='parity' follows OSRL: two groups of `heads` nets per critic, mixture lmbda min + (1 - lmbda) max of the
            groups, largest mixture over the sampled actions in both targets, separate draws, MMD between actions before
            their tanh (Gaussian kernel, mmd_sigma=50), PID multiplier, squashed mean when acting, latents clipped to +-0.5;
            before `actor_start` the actor ignores Q but not the cost
Deviations  (mode='default'; each is ours unless noted)
            1. one candidate serves both targets and the acting: the one with the largest Q - lam Qc (BEAR's arg-max)
            2. Q is the min, Qc the max over heads: pessimistic about both (OSRL takes the min of Qc)
            3. both targets stop at terminal rows and bootstrap through time-outs (OSRL: reward at both, cost never)
            4. projected dual ascent with a cap instead of a PID without one
            5. the VAE is fitted alone for the first `vae_steps` steps; until `actor_start` the actor only matches it
            6. standardised observations, rewards divided by their 98% quantile
            7. MMD between squashed actions, which all have one scale, with a width that tells them apart
Shapes      R replicas, B batch, E heads, K candidates, M matched samples; every batch field is [R, B, ...]
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import BEARLagConfig
from ..data import Batch, Units
from ..nets import SquashedGaussian
from ..train import Extra
from .shared import Lagrangian, Targets, repeated


class PolicyTerms(NamedTuple):
    """Online critics' Q and Qc of one action per state, and the distance of the policy from the data: [R, B] each."""
    q: Tensor
    qc: Tensor
    mmd: Tensor


def kernel_mean(u: Tensor, v: Tensor, sigma: float, kernel: str, diagonal: bool = True) -> Tensor:
    """Mean over pairs of samples u and v [R, B, M, n] of exp(-d / (2 sigma)) -> [R, B]; without `diagonal` over pairs i != j.

    d is the squared Euclidean (gaussian) or the L1 distance (laplacian).
    """
    d = u[..., :, None, :] - v[..., None, :, :]
    k = (-(d.square() if kernel == "gaussian" else d.abs()).sum(-1) / (2 * sigma)).exp()
    M = k.shape[-1]
    return k.mean((-2, -1)) if diagonal else (k.sum((-2, -1)) - M) / (M * (M - 1))       # k(u_i, u_i) = 1


def mmd(x: Tensor, y: Tensor, sigma: float, kernel: str) -> Tensor:
    """OSRL's maximum mean discrepancy of x and y [R, B, M, n] -> [R, B]; with the diagonal, hence biased upwards."""
    k = partial(kernel_mean, sigma=sigma, kernel=kernel)
    return (k(x, x) + k(y, y) - 2 * k(x, y) + 1e-6).sqrt()


def mmd_squared(x: Tensor, y: Tensor, sigma: float, kernel: str) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy of x and y [R, B, M, n] -> [R, B]; zero on average if equal."""
    k = partial(kernel_mean, sigma=sigma, kernel=kernel)
    return k(x, x, diagonal=False) + k(y, y, diagonal=False) - 2 * k(x, y)


class BEARLag(Lagrangian):

    def __init__(self, cfg: BEARLagConfig, units: Units, qc_limit: Tensor, seeds: Sequence[int], n_act: int, horizon: int = 1000):
        super().__init__(cfg, units, qc_limit, seeds, n_act, horizon)
        self.boundaries = (cfg.vae_steps, cfg.actor_start)
        self.register_buffer("log_alpha", torch.zeros(self.replicas, 1))                 # multiplier of the MMD constraint

    def make_actor(self, gens: Sequence[torch.Generator]) -> SquashedGaussian:
        return SquashedGaussian(gens, self.n_obs, self.n_act, self.cfg.hidden)

    # ------------------------------------------------------------------------------------------------ the policy
    def sample_raw(self, actor: SquashedGaussian, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One random action per row before its tanh, reparametrised."""
        mean, std = actor(obs)
        return mean + std * self.randn(*mean.shape, generator=generator)

    def sample(self, actor: SquashedGaussian, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.sample_raw(actor, obs, generator).tanh()

    @torch.no_grad()
    def act(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        obs = self.standardise(obs)
        if self.parity:
            return self.actor(obs)[0].tanh()
        return self.best(obs, self.cfg.act_samples, target=False, generator=generator)[0]

    # ------------------------------------------------------------------------- the losses (critics and VAE: shared.py)
    def policy_terms(self, obs: Tensor) -> PolicyTerms:
        """Of M actions of the policy: their distance to M decoded ones, and the values of the first; gradient reaches the actor."""
        (R, B, _), M = obs.shape, self.cfg.match_samples
        many = repeated(obs, M)
        with torch.no_grad():
            data = self.vae.decode_raw(many, self.prior(many)).view(R, B, M, -1)
        raw = self.sample_raw(self.actor, many).view(R, B, M, -1)
        actions = raw.tanh()
        width = self.cfg.mmd_sigma, self.cfg.kernel
        distance = mmd(data, raw, *width) if self.parity else mmd_squared(data.tanh(), actions, *width)
        first = actions[:, :, 0]
        return PolicyTerms(self.pessimistic(self.critic(obs, first), cost=False),
                           self.pessimistic(self.cost_critic(obs, first), cost=True), distance)

    def actor_loss(self, batch: Batch, terms: PolicyTerms | None = None, improve: bool = True) -> Tensor:
        """-Q + alpha (MMD - limit) + lam (Qc - limit); without `improve` the policy only matches the data (parity: and cost)."""
        q, qc, distance = terms or self.policy_terms(batch.obs)
        loss = self.log_alpha.exp() * (distance - self.cfg.mmd_limit)
        if improve:
            loss = loss - q
        if improve or self.parity:
            loss = loss + self.lam * (qc - self.qc_limit)
        return loss.mean(-1)

    # ------------------------------------------------------------------------------------------------ the update
    @torch.no_grad()
    def ascend_alpha(self, distance: Tensor) -> None:                # distance [R, B]
        error = distance.mean(-1, keepdim=True) - self.cfg.mmd_limit
        self.log_alpha.add_(self.cfg.lr_alpha * self.log_alpha.exp() * error).clamp_(-5, 5)

    def update(self, batch: Batch, t: int, target: Targets | None = None, extra: Extra | None = None) -> dict[str, Tensor]:
        out = {"vae": self.minimise("vae", self.vae_loss(batch), extra)}
        if t < self.cfg.vae_steps:
            return out
        target = target or self.targets(batch)
        out["critic"] = self.minimise("critic", self.critic_loss(batch, target), extra)
        out["cost_critic"] = self.minimise("cost_critic", self.cost_critic_loss(batch, target), extra)
        q, qc, distance = terms = self.policy_terms(batch.obs)
        if self.parity:
            self.ascend_lam(qc)
        out["actor"] = self.minimise("actor", self.actor_loss(batch, terms, improve=t >= self.cfg.actor_start), extra)
        self.ascend_alpha(distance.detach())
        if not self.parity:                                        # of the arg-max policy, not of one sampled action
            self.ascend_lam(target.next_qc)
        self.polyak("critic", "cost_critic", "actor")
        return {**out, "q": q.detach().mean(-1), "qc": qc.detach().mean(-1), "lam": self.lam[:, 0].clone(),
                "mmd": distance.detach().mean(-1), "alpha": self.log_alpha[:, 0].exp()}
