"""Constraints Penalized Q-Learning (CPQ).

Paper       Xu, Zhan & Zhu 2022 (arXiv 2107.09003), algorithm 1
Parity      mode='parity' follows OSRL (revision 03a4586): min over the heads of both critics, unsafe actions are worth 0, done
            includes time-outs in the reward target and is ignored in the cost target, strange actions are the quarter of
            the actor's own that has the largest KL. Their term is computed without gradient and from unsquashed actions:
            it moves alpha and nothing else. The target actor is left out: OSRL keeps one, and never uses it
Deviations  (mode='default'; each is ours unless noted)
            1. the term of strange actions has its gradient, as in the paper, and pushes the online cost critic up no
               further than their limit; the actions are squashed to [-1, 1] as those acted are
            2. strange is a KL above the 90% quantile of the data's own: a clone of the data is not called strange
            3. Qc is the max over heads where an action is judged: pessimistic (OSRL: min); the target of the cost critic takes
               their mean, since a max that is backed up calls two fifths of a safe policy's states unsafe
            4. an unsafe action is worth `worst`, the worst reward of the data for ever, where that is below 0: with
               negative rewards 0 would be a premium
            5. where an action looks unsafe the actor descends Qc (OSRL: no gradient there, so it can never come back)
            6. the actor keeps near the data by `clone` times their likelihood: without it, it climbs to actions whose
               values and costs the critics make up, and the term of strange actions alone does not hold it
            7. both targets stop at terminal rows, bootstrap through time-outs, and take the mean action, the one acted
               (OSRL: a sample each): a policy as wide as the data looks unsafe by its own noise
            8. for the first `vae_steps` steps the VAE is fitted, and the actor to the data; standardised units
            9. a Polyak average of the actor's weights acts (OSRL: the last ones): the last ones jump from safe to
               unsafe and back
Shapes      R replicas, B batch, E heads, K sampled actions; every batch field is [R, B, ...]
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import CPQConfig
from ..data import Batch, Units
from ..nets import VAE, Critic, SquashedGaussian, generators, kl_to_standard_normal
from ..train import Extra, Learner
from .shared import Targets, regression, repeated, vae_loss


def quantile(x: Tensor, q: float) -> Tensor:
    """Linearly interpolated q-quantile of each row: [R, n] -> [R, 1], of any size (torch.quantile has a limit)."""
    x = x.sort(-1).values
    at = q * (x.shape[1] - 1)
    return torch.lerp(x[:, math.floor(at), None], x[:, math.ceil(at), None], at % 1)


class CPQ(Learner):
    LOSSES = "vae", "critic", "cost_critic", "actor"               # order of the steps

    def __init__(self, cfg: CPQConfig, units: Units, qc_limit: Tensor, seeds: Sequence[int], n_act: int, horizon: int = 1000):
        super().__init__(cfg, units, qc_limit, seeds, n_act, horizon)
        self.boundaries = (cfg.vae_steps,)
        gens = generators(seeds)
        self.own("vae", VAE(gens, self.n_obs, n_act, cfg.vae_hidden), target=False)
        self.own("critic", Critic(gens, self.n_obs, n_act, cfg.hidden, cfg.heads))
        self.own("cost_critic", Critic(gens, self.n_obs, n_act, cfg.hidden, cfg.heads))
        self.own("actor", SquashedGaussian(gens, self.n_obs, n_act, cfg.hidden), target=not self.parity)
        self.averaged = ("critic", "cost_critic") + ("actor",) * (not self.parity)
        self.register_buffer("log_alpha", torch.full((self.replicas, 1), math.log(cfg.alpha)))     # weight of the strange term
        self.register_buffer("worst", torch.zeros(self.replicas, 1))                               # value of an unsafe action

    def ready(self) -> CPQ:
        self.optimisers(**{name: self.cfg.lr_actor if name == "actor" else self.cfg.lr for name in self.LOSSES})
        return self

    # ------------------------------------------------------------------------------------------------ the policy
    def unsquashed(self, obs: Tensor, samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """K draws u of the actor per state, an action being tanh(u): [R, B K, n_act], row b K + k."""
        mean, std = self.actor(obs)                                                      # [R, B, n_act]
        noise = self.randn(mean.shape[0], samples, *mean.shape[1:], generator=generator).transpose(1, 2)
        return (mean[:, :, None] + std[:, :, None] * noise).flatten(1, 2)

    def pessimistic(self, q: Tensor, cost: bool) -> Tensor:
        """One value per row from the heads [R, E, B]: min for reward; max for cost (parity: min for both)."""
        return q.amax(1) if cost and not self.parity else q.amin(1)

    def penalised(self, q: Tensor, qc: Tensor) -> Tensor:          # the paper's 1[Qc <= limit] Q
        return torch.where(qc <= self.qc_limit, q, self.worst)

    def merit(self, q: Tensor, qc: Tensor) -> Tensor:
        """What the policy climbs [R, B]: the penalised value and, where an action looks unsafe, less cost."""
        value = self.penalised(q, qc)
        return value if self.parity else value - self.cfg.retreat * (qc - self.qc_limit).clamp(min=0)

    @torch.no_grad()
    def act(self, obs: Tensor, generator: torch.Generator) -> Tensor:          # the squashed mean, of the averaged actor
        actor = self.actor if self.parity else self.actor_target
        return actor(self.standardise(obs))[0].tanh()

    @torch.no_grad()
    def value(self, obs: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Target networks' reward and cost value of the action acted at standardised obs (parity: of a sample): [R, B] each."""
        a = (self.unsquashed(obs, generator=generator) if self.parity else self.actor(obs)[0]).tanh()
        return (self.pessimistic(self.critic_target(obs, a), cost=False),
                self.pessimistic(self.cost_critic_target(obs, a), cost=True))

    # ------------------------------------------------------------------------------------------------ the losses
    def vae_loss(self, batch: Batch) -> Tensor:
        return vae_loss(self.vae, batch, self.cfg.beta, self.randn)

    @torch.no_grad()
    def targets(self, batch: Batch) -> Targets:                    # y = r + gamma^m (1 - d) 1[Qc' <= limit] Q', y_c = c + ...
        if self.parity:                                            # another draw for the cost target
            v = self.penalised(*self.value(batch.next_obs))
            vc = self.value(batch.next_obs)[1]
        else:
            a = self.actor(batch.next_obs)[0].tanh()
            heads = self.cost_critic_target(batch.next_obs, a)                           # [R, E, B]
            v = self.pessimistic(self.critic_target(batch.next_obs, a), cost=False)
            v, vc = self.penalised(v, self.pessimistic(heads, cost=True)), heads.mean(1)
        discount, alive = self.cfg.gamma ** batch.steps, 1 - batch.done
        return Targets(batch.reward + discount * alive * v,
                       batch.cost + discount * (1.0 if self.parity else alive) * vc, vc)

    def critic_loss(self, batch: Batch, target: Targets | None = None) -> Tensor:
        return regression(self.critic(batch.obs, batch.action), (target or self.targets(batch)).reward)

    @torch.no_grad()
    def strange(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """K of the actor's actions per state, and which of them the VAE finds strange: obs, action [R, B K, .], 1 or 0 [R, B K].

        Strange are the largest KLs of the encoder, per replica, against those of the data's actions (parity: of their own).
        """
        obs, a = repeated(batch.obs, self.cfg.samples), self.unsquashed(batch.obs, self.cfg.samples)
        a = a if self.parity else a.tanh()
        kl = kl_to_standard_normal(*self.vae.encode(obs, a)).mean(-1)
        if self.parity:
            return obs, a, (kl >= quantile(kl, self.cfg.ood_quantile)).float()
        usual = kl_to_standard_normal(*self.vae.encode(batch.obs, batch.action)).mean(-1)
        return obs, a, (kl > quantile(usual, self.cfg.ood_quantile)).float()

    def strange_term(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The term of strange actions in the cost critic's loss, and by how much their cost falls short of its limit: [R] each."""
        obs, a, ood = self.strange(batch)
        limit = self.cfg.ood_limit * self.qc_limit
        if self.parity:                                            # without gradient; the mean counts all others as 0
            short = limit[:, 0] - (ood * self.pessimistic(self.cost_critic_target(obs, a), cost=True).detach()).mean(-1)
            return self.log_alpha.exp()[:, 0] * short, short
        gap = ood * (limit - self.cost_critic(obs, a).mean(1))
        return self.log_alpha.exp()[:, 0] * gap.clamp(min=0).mean(-1), (gap.sum(-1) / ood.sum(-1).clamp(min=1)).detach()

    def cost_critic_loss(self, batch: Batch, target: Targets | None = None, term: Tensor | None = None) -> Tensor:
        loss = regression(self.cost_critic(batch.obs, batch.action), (target or self.targets(batch)).cost)
        return loss + (self.strange_term(batch)[0] if term is None else term)

    def policy_values(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Online critics' Q and Qc [R, B] of one action per state; gradient reaches the actor."""
        a = self.unsquashed(obs).tanh()
        return self.pessimistic(self.critic(obs, a), cost=False), self.pessimistic(self.cost_critic(obs, a), cost=True)

    def actor_loss(self, batch: Batch, values: tuple[Tensor, Tensor] | None = None) -> Tensor:     # -1[Qc <= limit] Q
        loss = -self.merit(*(values or self.policy_values(batch.obs))).mean(-1)
        return loss if self.parity else loss + self.cfg.clone * self.clone_loss(batch)

    def clone_loss(self, batch: Batch) -> Tensor:                  # -log-likelihood of the data's actions before squashing
        mean, std = self.actor(batch.obs)
        u = batch.action.clamp(-0.99, 0.99).atanh()
        return (((u - mean) / std).square() / 2 + std.log()).mean((-1, -2))

    # ------------------------------------------------------------------------------------------------ the update
    @torch.no_grad()
    def watch(self, reward: Tensor) -> None:                       # reward [R, B]: a moving average of its low quantile
        if not self.parity:
            self.worst.lerp_((quantile(reward, self.cfg.worst_quantile) / (1 - self.cfg.gamma)).clamp(max=0), self.cfg.tau)

    @torch.no_grad()
    def ascend_alpha(self, short: Tensor) -> None:                 # short [R]
        if self.cfg.adapt_lam:
            self.log_alpha.add_(self.cfg.lr_alpha * self.log_alpha.exp() * short[:, None]).clamp_(-5, 5)

    def update(self, batch: Batch, t: int, target: Targets | None = None, extra: Extra | None = None) -> dict[str, Tensor]:
        out = {"vae": self.minimise("vae", self.vae_loss(batch), extra)}
        self.watch(batch.reward)
        if t < self.cfg.vae_steps:
            return {**out, "actor": self.minimise("actor", self.clone_loss(batch), extra)}
        target = target or self.targets(batch)
        out["critic"] = self.minimise("critic", self.critic_loss(batch, target), extra)
        term, short = self.strange_term(batch)
        out["cost_critic"] = self.minimise("cost_critic", self.cost_critic_loss(batch, target, term), extra)
        self.ascend_alpha(short)
        q, qc = values = self.policy_values(batch.obs)
        out["actor"] = self.minimise("actor", self.actor_loss(batch, values), extra)
        self.polyak(*self.averaged)
        return {**out, "q": q.detach().mean(-1), "qc": qc.detach().mean(-1), "short": short,
                "safe": (qc <= self.qc_limit).float().mean(-1), "alpha": self.log_alpha[:, 0].exp()}
