"""Fitted Q evaluation: the networks, their losses and their minibatches. `ope.fqe` puts them to use.

Paper       Le, Voloshin & Yue 2019 (arXiv 1903.08738): regress F(s, a) on x + g F'(s', a'), a' ~ pi(.|s'), once for
            rewards, once for costs. A mean over the actions, no pessimism; F' is a Polyak copy
Ours        1. F is a rate: value / H, where H is the discounted number of steps that are left. So every target is a mean of rewards
               (or costs) and lies within the data's own range, to which it is clipped; `episode` = T x F(s_0) is what people read
            2. finite (default): the time step is an input, H = T - t, nothing comes after the last step, and `episode` is the
               undiscounted sum. Otherwise H = 1 / (1 - g), time-outs are bootstrapped, and `episode` = (1 - g) V T: to compare it
               with the cost limit l is to compare V with l / ((1 - g) T) (algorithms.md F.1, units i and iii)
            3. R policies x M members x 2 signals train at once. A policy's next actions are asked for once, before
            4. the members' weights, bootstraps and draws are the same for all policies, so that differences are less noisy
Shapes      R policies (replicas), M members, B rows of a batch, K actions per state, n rows, T steps of an episode
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .config import OPEConfig
from .data import Pool, Units
from .nets import MLP
from .train import Learner


class Part(NamedTuple):
    """The pool rows, int64, that a policy is estimated from."""
    fit: Tensor  # [n], transitions
    starts: Tensor  # [n0], first rows of other, held-out trajectories


class Visits(NamedTuple):
    """A batch: here [R, M, B, n_in], there [R, M, B, K, n_in] (inputs of F), all others [R, M, B].

    A target is weight x signal + carry x F(there); the weights sum to 1 except at terminal rows, where nothing follows.
    """
    here: Tensor
    there: Tensor
    reward: Tensor
    cost: Tensor
    weight: Tensor
    carry: Tensor


def steps_left(t: Tensor, horizon: int, cfg: OPEConfig) -> Tensor:
    """H(t), the discounted number of steps from t on: sum of g^k, k < T - t; 1 / (1 - g) where the horizon is not finite."""
    if not cfg.finite:
        return torch.full_like(t, 1 / (1 - cfg.gamma), dtype=torch.float32)
    left = (horizon - t).clamp(min=0).float()
    return left if cfg.gamma == 1 else (1 - cfg.gamma**left) / (1 - cfg.gamma)


def gradient_steps(horizon: int, cfg: OPEConfig) -> int:
    """How many: news travels back tau of a step per update, and has the whole horizon (3 / (1 - g) where there is none) to go."""
    return max(round(cfg.sweeps * (horizon if cfg.finite else 3 / (1 - cfg.gamma)) / cfg.tau), 1)


class FQE(Learner):
    """M members for each of R policies and both signals, as one learner: `train.fit` trains it."""
    LOSSES = "reward", "cost"

    def __init__(self, cfg: OPEConfig, units: Units, ranges: Tensor, n_act: int, horizon: int, seed: int):
        """ranges [R, 2, 4]: of reward and cost, the mean, the unit, the least and the largest rate."""
        R = len(ranges)
        super().__init__(cfg, units, torch.zeros(R), [seed] * R, n_act, horizon)
        for i, name in enumerate(self.LOSSES):
            gens = [torch.Generator().manual_seed(seed + 100 + i) for _ in range(R)]         # the same members for every policy
            net = MLP(gens, self.n_obs + cfg.finite + n_act, cfg.hidden, 1, members=cfg.members)
            for value in net.layers[-1].parameters():
                torch.nn.init.zeros_(value)
            self.own(name, net)
            self.register_buffer(f"{name}_range", ranges[:, i, :, None, None].clone())

    def ready(self) -> FQE:
        self.optimisers(**dict.fromkeys(self.LOSSES, self.cfg.lr))
        return self

    def time(self, t: Tensor) -> Tensor:
        return 2 * t / self.horizon - 1

    def inputs(self, obs: Tensor, t: Tensor, action: Tensor) -> Tensor:
        """Raw obs [R, B, n_obs], t [R, B], action [R, B, n_act] -> [R, B, n_in]."""
        time = [self.time(t)[..., None]] if self.cfg.finite else []
        return torch.cat([self.standardise(obs), *time, action], -1)

    def rate(self, name: str, x: Tensor, target: bool = True) -> Tensor:
        """F of inputs [R, M, B, n_in] or [R, 1, B, n_in]: [R, M, B], per step."""
        R, _, B, n = x.shape
        x = x.expand(R, self.cfg.members, B, n).reshape(-1, B, n)
        mean, unit, *_ = getattr(self, f"{name}_range").unbind(1)
        return mean + unit * getattr(self, name + "_target" * target)(x).view(R, -1, B)

    def loss(self, name: str, batch: Visits) -> Tensor:
        _, unit, least, most = getattr(self, f"{name}_range").unbind(1)
        with torch.no_grad():
            following = self.rate(name, batch.there.flatten(2, 3)).view(*batch.there.shape[:4]).mean(-1)
            y = (batch.weight * getattr(batch, name) + batch.carry * following).clamp(least, most)
        return ((self.rate(name, batch.here, target=False) - y) / unit).square().mean(-1).sum(-1)      # mean over B, sum over M

    def reward_loss(self, batch: Visits) -> Tensor:
        return self.loss("reward", batch)

    def cost_loss(self, batch: Visits) -> Tensor:
        return self.loss("cost", batch)

    def update(self, batch: Visits, t: int, target: Any = None, extra: Any = None) -> dict[str, Tensor]:
        out = {name: self.minimise(name, self.loss(name, batch), extra) for name in self.LOSSES}
        self.polyak(*self.LOSSES)
        return out


class Replay:
    """The fitted rows of every policy with its next actions, resident on the device; each member draws from its own bootstrap."""

    def __init__(self, pool: Pool, parts: Sequence[Part], following: Sequence[Tensor], model: FQE, seed: int):
        """parts: per policy, may be shared; following: per policy its actions at next_obs of part.fit, [n, K, n_act]."""
        cfg, t, R = model.cfg, pool.t, len(parts)
        left = steps_left(t, model.horizon, cfg)
        carry = cfg.gamma * steps_left(t + 1, model.horizon, cfg) / left * ~pool.terminal
        time = lambda x: [model.time(x)[:, None]] if cfg.finite else []
        self.packed = torch.cat([pool.obs, *time(t), pool.action, pool.next_obs, *time(t + 1),
                                 *(x[:, None] for x in (pool.reward, pool.cost, 1 / left, carry))], 1).contiguous()  # [N, D]
        n_obs, n_act = model.n_obs, model.n_act
        self.split = [n_obs + cfg.finite + n_act, n_obs + cfg.finite, 1, 1, 1, 1]
        same = lambda value, n: torch.full((R, n), value, device=pool.obs.device)
        line = lambda obs, x: torch.cat([obs, same(x, cfg.finite + n_act), obs, same(x, cfg.finite + 4)], 1)[:, None, None]
        self.loc, self.inv = line(model.obs_mean, 0.0), line(1 / model.obs_std, 1.0)  # [R, 1, 1, D]
        distinct = {id(p): p for p in parts}
        which = torch.tensor([list(distinct).index(id(p)) for p in parts], device=pool.obs.device)
        weights = bootstrap_weights(pool, cfg.members, seed)
        drawn = [[repeated(w[pool.episode[p.fit]]) for w in weights] for p in distinct.values()]                        # positions
        self.ids = stacked([p.fit for p in parts])  # [R, n]
        self.following = stacked([f.flatten(1) for f in following]).view(*self.ids.shape, cfg.samples, n_act)
        self.count = torch.tensor([[len(x) for x in block] for block in drawn], device=which.device)[which][..., None]  # [R, M, 1]
        width = int(self.count.max())
        self.drawn = stacked([pad(x, (0, width - len(x))) for block in drawn for x in block]).flatten()
        member = torch.arange(cfg.members, device=which.device)
        self.offset = ((which[:, None] * cfg.members + member) * width)[..., None]  # [R, M, 1]
        self.policy = torch.arange(R, device=which.device)[:, None, None]
        self.batch = cfg.batch

    def sample(self, generator: torch.Generator) -> Visits:
        u = torch.rand(1, self.count.shape[1], self.batch, generator=generator, device=self.ids.device, dtype=torch.float64)
        at = self.drawn[(u * self.count).long().clamp_(max=self.count - 1) + self.offset]  # [R, M, B]
        rows = (self.packed[self.ids[self.policy, at]] - self.loc) * self.inv  # [R, M, B, D]
        here, there, *rest = rows.split(self.split, -1)
        action = self.following[self.policy, at]  # [..., K, n_act]
        there = torch.cat([there[..., None, :].expand(*action.shape[:-1], -1), action], -1)
        return Visits(here, there, *(x[..., 0] for x in rest))


def bootstrap_weights(pool: Pool, members: int, seed: int) -> Tensor:
    """How often each trajectory counts for each member: Poisson(1), int64 [M, trajectories]."""
    mean = torch.ones(members, int(pool.episode.max()) + 1)
    return torch.poisson(mean, generator=torch.Generator().manual_seed(seed + 1)).long().to(pool.obs.device)


def repeated(times: Tensor) -> Tensor:
    """Positions 0 .. n-1, each as often as `times` [n] says; each once if that is never."""
    return torch.arange(len(times), device=times.device).repeat_interleave(times if bool(times.any()) else times + 1)


def stacked(columns: Sequence[Tensor]) -> Tensor:
    """[n_r, ...] each -> [R, n, ...], filled up with zeros that no count reaches."""
    width = max(map(len, columns))
    return torch.stack([pad(x, (0, 0) * (x.dim() - 1) + (0, width - len(x))) for x in columns])
