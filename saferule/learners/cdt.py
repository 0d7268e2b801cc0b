"""Constrained decision transformer (CDT).

Paper       Liu et al. 2023 (arXiv 2302.07351): a causal transformer reads return-to-go, cost-to-go, observation and action of
            the last K steps and predicts the action, asked for a return R* at a cost l; R and C fall by what each step brings
Parity      mode='parity' follows OSRL (revision 03a4586): token 50 - C; likelihood and entropy averaged over action dimensions
            against the target -n_act; log-std without bounds; costs cut to integers as classes, their loss averaged over
            padding too; a head for the next observation, whose loss has weight 0; cheap episodes drawn more often; AdamW
            with decay on everything; raw observations, returns times `reward_scale`
Deviations  (mode='default'; each is ours)
            1. log-std clamped to [-5, 2], the bounds that OSRL declares and does not apply
            2. likelihood and entropy summed over action dimensions, the unit of the target -n_act
            3. cost classes are c = 0 and c > 0, their loss a mean over the steps that are there
            4. no prediction of the next observation
            5. weight decay on matrices only, not on biases, gains and tables
            6. windows start at any row, each as likely as any other
            7. tokens of R and C are what is to come per step that is left, T - t, which is known as well: the policy need not
               learn to divide. C is not asked to be below 0
            8. a share `spend` of the limit is asked for: what comes about lies around what is asked
            9. the learning rate falls linearly after its warm-up; matrices start as nn.Linear's do; standardised observations
            (also in parity)
            10. R* is the best return in the replica's own data among episodes that cost at most what is asked, times `ask`
               (OSRL: a number per task, found with the simulator)
            11. no augmentation (OSRL: a fifth of further trajectories, copies of data nearest to a point beyond the Pareto front
               of their returns and costs, relabelled as if they had reached it)
            12. the warm-up follows the optimiser's own count, so that unlearning does not warm up again
            13. classes of costs of 2 and more are 1 (OSRL: an index error)
            14. returns and costs to go across removed rows as windows.py says
Shapes      R replicas, B windows, K steps, E episodes, W width of a token; every batch field is [R, B, K, ...]
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import CDTConfig
from ..data import Pool, Rows, Units
from ..nets import Generators, Linear, generators
from ..train import Extra, Learner
from ..transformer import Dense, Drop, Table, Transformer, clip_norm
from ..windows import Windows, WindowSampler, distinct, episodes, track


class Prediction(NamedTuple):
    """What the policy says at each step [R, B, K, ...]: of the action, of its cost's class, of the next observation."""
    mean: Tensor
    log_std: Tensor
    cost: Tensor                       # log-probabilities of c = 0 and c > 0
    next_obs: Tensor | None


class Policy(nn.Module):
    """Tokens (R, C, s, a) of each step, each a linear map plus a vector of the time step; s predicts a, a the rest."""

    def __init__(self, gens: Generators, n_obs: int, n_act: int, horizon: int, cfg: CDTConfig):
        super().__init__()
        W, parity = cfg.width, cfg.mode == "parity"
        linear = Dense if parity else Linear
        self.time = Table(gens, horizon + cfg.context, W)
        self.embed = nn.ModuleList(linear(gens, n, W) for n in (1, 1, n_obs, n_act))
        self.trunk = Transformer(gens, W, cfg.layers, cfg.attention_heads, linear)
        self.action, self.cost = linear(gens, W, 2 * n_act), linear(gens, W, 2)
        self.next_obs = linear(gens, W, n_obs) if parity else None
        self.bounds = (-math.inf, math.inf) if parity else (-5.0, 2.0)

    def forward(self, ret: Tensor, cost: Tensor, obs: Tensor, action: Tensor, t: Tensor, drop: Drop | None = None) -> Prediction:
        """ret, cost, t [R, B, K]; obs [R, B, K, n_obs]; action [R, B, K, n_act]."""
        R, B, K = t.shape
        flat = [x.reshape(R, B * K, -1) for x in (ret, cost, obs, action)]
        tokens = torch.stack([embed(x) for embed, x in zip(self.embed, flat)], 2) + self.time(t.reshape(R, B * K))[:, :, None]
        x = self.trunk(tokens.view(R, B, 4 * K, -1), drop).view(R, B * K, 4, -1)
        mean, log_std = self.action(x[:, :, 2]).view(R, B, K, -1).chunk(2, -1)
        classes = self.cost(x[:, :, 3]).view(R, B, K, 2).log_softmax(-1)
        following = None if self.next_obs is None else self.next_obs(x[:, :, 3]).view(R, B, K, -1)
        return Prediction(mean, log_std.clamp(*self.bounds), classes, following)


class Temperature(nn.Module):
    """The weight of the entropy, as its logarithm [R, 1]."""

    def __init__(self, replicas: int, start: float):
        super().__init__()
        self.log = nn.Parameter(torch.full((replicas, 1), math.log(start)))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the steps that are there: x, mask [R, B, K] -> [R]."""
    return (x * mask).sum((-1, -2)) / mask.sum((-1, -2))


class CDT(Learner):
    LOSSES = "policy", "temperature"
    limit_when_acting = True

    def __init__(self, cfg: CDTConfig, units: Units, qc_limit: Tensor, seeds: Sequence[int], n_act: int, horizon: int = 1000):
        super().__init__(cfg, units, qc_limit, seeds, n_act, horizon)          # gamma = 1: qc_limit is the limit per episode
        self.own("policy", Policy(generators(seeds), self.n_obs, n_act, horizon, cfg), target=False)
        self.own("temperature", Temperature(self.replicas, cfg.temperature), target=False)
        self.register_buffer("best_return", torch.zeros(self.replicas, horizon + 1))           # see `measure`
        self.register_buffer("rate", torch.tensor(cfg.lr), persistent=False)                   # of learning, on the device

    def ready(self) -> CDT:
        self.optimisers(temperature=self.cfg.lr_temperature)
        matrix = lambda name: self.parity or (name.endswith("weight") and not ("norm" in name or name.startswith("time")))
        groups = [{"params": [p for n, p in self.policy.named_parameters() if matrix(n)], "weight_decay": self.cfg.weight_decay},
                  {"params": [p for n, p in self.policy.named_parameters() if not matrix(n)], "weight_decay": 0.0}]
        self.optim["policy"] = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.rate, fused=True,
                                                 capturable=self.device.type == "cuda")
        return self

    def sampler(self, pool: Pool, rows: Sequence[Rows], n_step: int = 1) -> WindowSampler:
        cfg = self.cfg
        return WindowSampler(pool, rows, cfg.batch, cfg.context, self.units, cfg.cheap if self.parity else 0.0)

    def measure(self, pool: Pool, rows: Sequence[Rows]) -> None:
        """The best return among the episodes that cost at most 0, 1, ... T; that of the cheapest where none is so cheap."""
        different, which = distinct(rows)
        limits, tables = torch.arange(self.horizon + 1, device=pool.obs.device), []
        for r in different:
            _, ret, cost = episodes(track(pool, r))
            tables.append(torch.where(cost <= limits.clamp(min=cost.min())[:, None], ret, -torch.inf).amax(1))
        self.best_return.copy_(torch.stack(tables)[which])

    # ------------------------------------------------------------------------------------------------ the policy
    def dropped(self, x: Tensor) -> Tensor:
        keep = torch.rand(x.shape, device=x.device, generator=self.noise) >= self.cfg.dropout
        return x * keep / (1 - self.cfg.dropout)

    def predict(self, ret: Tensor, cost_to_go: Tensor, obs: Tensor, action: Tensor, t: Tensor,
                drop: Drop | None = None) -> Prediction:
        """From to-go in scaled reward and raw cost [R, B, K] and standardised observations."""
        if self.parity:
            return self.policy(ret, 50 - cost_to_go, obs, action, t, drop)
        unit = self.cfg.rate_unit * (self.horizon - t).clamp(min=self.cfg.least_left)
        return self.policy(ret / unit, cost_to_go / unit, obs, action, t, drop)

    def predicted(self, batch: Windows) -> Prediction:
        drop = self.dropped if self.cfg.dropout else None
        return self.predict(batch.ret, batch.cost_to_go, batch.obs, batch.action, batch.t, drop)

    def begin(self, episodes: int) -> Episodes:
        return Episodes(self, episodes)

    def act(self, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:            # an episode's first step
        return self.begin(obs.shape[1]).act(obs, generator)

    # ------------------------------------------------------------------------------------------------ the losses
    def per_action(self, x: Tensor) -> Tensor:                     # sum over action dimensions (parity: mean)
        return x.mean(-1) if self.parity else x.sum(-1)

    def likelihood(self, batch: Windows, said: Prediction) -> Tensor:      # log N(a; mean, std)
        z = (batch.action - said.mean) * (-said.log_std).exp()
        return self.per_action(-z.square() / 2 - said.log_std - math.log(2 * math.pi) / 2)

    def action_density(self, batch: Windows) -> tuple[Tensor, Tensor]:     # mean and log-std of the actions, without dropout
        said = self.predict(batch.ret, batch.cost_to_go, batch.obs, batch.action, batch.t)
        return said.mean, said.log_std

    def entropy(self, batch: Windows, said: Prediction) -> Tensor:         # [R], of the normal distribution
        return masked_mean(self.per_action(said.log_std + (1 + math.log(2 * math.pi)) / 2), batch.mask)

    def cost_loss(self, batch: Windows, said: Prediction) -> Tensor:
        label = batch.cost.long().clamp(0, 1) if self.parity else (batch.cost > 0).long()
        wrong = -said.cost.gather(-1, label[..., None])[..., 0]
        return (wrong * batch.mask).mean((-1, -2)) if self.parity else masked_mean(wrong, batch.mask)

    def next_obs_loss(self, batch: Windows, said: Prediction) -> Tensor:
        wrong = (said.next_obs[:, :, :-1] - batch.obs[:, :, 1:]).square() * batch.mask[:, :, :-1, None]
        return wrong.mean((-1, -2, -3))

    def policy_loss(self, batch: Windows, said: Prediction | None = None) -> Tensor:           # -(log pi(a) + temperature H) + ...
        said = said or self.predicted(batch)
        temperature = self.temperature.log.detach().exp()[:, 0]
        gain = masked_mean(self.likelihood(batch, said), batch.mask) + temperature * self.entropy(batch, said)
        loss = -gain + self.cfg.cost_weight * self.cost_loss(batch, said)
        return loss + 0.0 * self.next_obs_loss(batch, said) if self.parity else loss           # its decay goes on (OSRL)

    def temperature_loss(self, batch: Windows, said: Prediction | None = None) -> Tensor:      # temperature (H - target)
        entropy = self.entropy(batch, said or self.predicted(batch)).detach()
        return self.temperature.log.exp()[:, 0] * (entropy + self.n_act)

    # ------------------------------------------------------------------------------------------------ the update
    @torch.no_grad()
    def before_step(self, name: str) -> None:
        """Clip the gradient of each replica by its own norm; the rate rises in n = 1 .. `warm_up`, then falls linearly."""
        if name == "policy":
            cfg = self.cfg
            for block in () if self.parity else self.policy.trunk.blocks:      # a softmax does not see the keys' bias: this
                block.qkv.bias.grad.chunk(3, -1)[1].zero_()                    # gradient is rounding, which Adam would blow up
            clip_norm([p.grad for p in self.policy.parameters()], cfg.clip)
            n = 1 + next(iter(self.optim["policy"].state.values()), {}).get("step", torch.zeros(()))
            falls = 1.0 if self.parity else 1 - (1 - cfg.lr_end) * (n / cfg.steps).clamp(max=1)
            self.rate.copy_(cfg.lr * (n / cfg.warm_up).clamp(max=1) * falls)

    def update(self, batch: Windows, t: int, target: None = None, extra: Extra | None = None) -> dict[str, Tensor]:
        said = self.predicted(batch)
        out = {"policy": self.minimise("policy", self.policy_loss(batch, said), extra)}
        entropy, loss = self.entropy(batch, said).detach(), self.temperature_loss(batch, said)
        if self.cfg.adapt_temperature:
            self.minimise("temperature", loss, extra)
        return {**out, "entropy": entropy, "likelihood": masked_mean(self.likelihood(batch, said), batch.mask).detach(),
                "cost_loss": self.cost_loss(batch, said).detach(), "temperature": self.temperature.log.detach().exp()[:, 0]}


class Episodes:
    """E episodes side by side per replica, with what CDT remembers of them: the last K steps, and what is still asked for."""

    def __init__(self, learner: CDT, episodes: int):
        self.learner, self.past, self.t = learner, [], 0
        limit = learner.qc_limit * (1.0 if learner.parity else learner.cfg.spend)               # [R, 1]
        best = learner.best_return.gather(1, limit.long().clamp(0, learner.horizon))
        self.ret = (learner.cfg.ask * best / learner.reward_scale[:, None]).expand(-1, episodes)
        self.cost = limit.expand(-1, episodes)

    @torch.no_grad()
    def act(self, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Raw obs [R, E, n_obs] -> the mean action [R, E, n_act]; the action's own token is 0 until it is known."""
        none = obs.new_zeros(*obs.shape[:-1], self.learner.n_act)
        step = self.ret, self.cost, self.learner.standardise(obs), none
        self.past = [*self.past, step][-self.learner.cfg.context:]
        tokens = [torch.stack(column, 2) for column in zip(*self.past)]                         # [R, E, k, ...]
        t = torch.arange(self.t + 1 - len(self.past), self.t + 1, device=obs.device)
        action = self.learner.predict(*tokens, t.expand_as(tokens[0])).mean[:, :, -1].clamp(-1, 1)
        self.past[-1] = (*step[:3], action)
        return action

    def took(self, action: Tensor) -> None:
        """The last action was not its own but this one, [R, E, n_act]: off-policy evaluation leads it along the data."""
        self.past[-1] = (*self.past[-1][:3], action)

    def observe(self, reward: Tensor, cost: Tensor) -> None:
        """reward, cost [R, E] of the last action, raw: what is still asked for falls by them."""
        self.ret = self.ret - reward / self.learner.reward_scale[:, None]
        self.cost = self.cost - cost if self.learner.parity else (self.cost - cost).clamp(min=0)
        self.t += 1
