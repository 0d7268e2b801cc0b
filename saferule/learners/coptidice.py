"""Offline constrained policy optimisation by stationary distribution correction (COptiDICE).

Paper       Lee et al. 2022 (arXiv 2204.08957), algorithm 1
Parity      mode='parity' follows OSRL (revision 03a4586): the cost of a step, averaged over the policy's states, is held
            against the *discounted sum* qc_limit, so that the constraint hardly ever binds; the likelihood is that of a Gaussian
            at the raw action, and the tanh of its mean is acted; time-outs end an episode; initial states are the few that
            happen to be in the batch, weighted by 1 / p0
Deviations  (mode='default'; each is ours unless noted)
            1. the threshold is a cost per step, `rate_limit`, as in the paper
            2. the likelihood is that of the squashed action, which is the one acted
            3. terminal rows end an episode; behind a time-out a new one starts (OSRL: both end it). The state behind it is
               nowhere in the data, so nothing keeps its nu from falling without bound: on BallRun the policy then stays
               where it started (return 32 to 101)
            4. initial states come in a batch of their own (the paper's code)
            5. a wide `kl_limit`: the limit is met by mixing safe rows with unsafe ones, and the mean action of the mixture, the
               one acted, is unsafe; a pessimistic estimate of the cost leaves few unsafe rows to be mixed in (BallRun, cost
               per episode at limit 20: 86/82/85 with .1, 2/31/0 with .3)
            6. standardised observations, rewards divided by their 98% quantile
Limits      The constraint is on the weighted data, not on the policy cloned from them: on CarRun these keep to the speed limit
            (99% at or under 1.50, cost per step .001), the multiplier sees nothing amiss, and the policy drives at 1.57
Shapes      R replicas, B batch, E heads; every batch field is [R, B, ...]
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import DIVERGENCES, COptiDICEConfig, one_of
from ..data import Batch, Pool, Rows, Sampler, Units
from ..errors import UserError
from ..nets import Critic, SquashedGaussian, generators
from ..train import Extra, Learner

# f of the f-divergence between the policy's and the data's distribution, and the inverse of its derivative
F_OF: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "softchi": (lambda x: torch.where(x < 1, x * ((x + 1e-10).log() - 1) + 1, (x - 1).square() / 2),
                lambda y: torch.where(y < 0, y.clamp(max=0).exp(), y + 1)),
    "chi2": (lambda x: (x - 1).square() / 2, lambda y: y + 1),
    "kl": (lambda x: x * (x + 1e-10).log(), lambda y: (y - 1).exp())}
assert tuple(F_OF) == DIVERGENCES


class Scalar(nn.Module):
    """One positive number per replica, softplus(raw): [R, 1]."""

    def __init__(self, replicas: int):
        super().__init__()
        self.raw = nn.Parameter(torch.ones(replicas, 1))

    def forward(self) -> Tensor:
        return F.softplus(self.raw)


def starts_of(pool: Pool, rows: Rows) -> Rows:
    """Those of some rows that start an episode; rows without any (a forget set, say) count as starts themselves."""
    at = pool.t[rows.ids] == 0
    return Rows(rows.ids[at], rows.weight[at]) if at.any() else rows


class StartSampler(Sampler):
    """Minibatches that also know where episodes start: `first` [R, B] marks t = 0; `init_obs` [R, B, n_obs] are states at t = 0.

    restart: what comes behind a time-out is a state at t = 0.
    """

    def __init__(self, pool: Pool, rows: Sequence[Rows], batch: int, units: Units, done: str = "terminal", restart: bool = True):
        super().__init__(pool, rows, batch, units, done)
        self.restart, self.first, self.timeout = restart, (pool.t == 0).float(), pool.timeout & ~pool.terminal
        starts = {key: starts_of(pool, r) for key, r in {id(r.ids): r for r in rows}.items()}          # shared as before
        self.starts = Sampler(pool, [starts[id(r.ids)] for r in rows], batch, units)
        self.starts.packed = self.packed               # one copy of the pool serves both

    def sample(self, generator: torch.Generator) -> Batch:
        position = self._draw(generator)
        batch, start, ids = self._batch(position), self.starts.sample(generator).obs, self.ids.flatten()[position]
        if self.restart:
            batch = batch._replace(next_obs=torch.where(self.timeout[ids][..., None], start, batch.next_obs))
        return batch._replace(first=self.first[ids], init_obs=start)


class Terms(NamedTuple):
    """What several losses share, [R, B] each. Gradient reaches nu through nu0, e and w, and chi through ell and p."""
    nu0: Tensor                        # value of the initial states
    e: Tensor                          # r - lam c + gamma nu(s') - nu(s), the advantage
    w: Tensor                          # the policy's distribution over the data's: max((f')^-1(e / alpha), 0)
    ell: Tensor                        # (1 - gamma) chi(s0) + w (c + gamma chi(s') - chi(s))
    p: Tensor                          # weights of the rows that overestimate the cost, 1 on average


class COptiDICE(Learner):
    LOSSES = "chi", "temperature", "nu", "multiplier", "actor"     # order of the steps

    def __init__(self, cfg: COptiDICEConfig, units: Units, qc_limit: Tensor, seeds: Sequence[int], n_act: int, horizon: int = 1000):
        super().__init__(cfg, units, qc_limit, seeds, n_act, horizon)
        if not 0 < cfg.gamma < 1:
            raise UserError(f"coptidice.gamma is {cfg.gamma:g}; it must lie between 0 and 1, both excluded.")
        self.f, self.f_prime_inverse = F_OF[one_of("f-divergence of coptidice", cfg.divergence, DIVERGENCES)]
        gens = generators(seeds)
        self.own("nu", Critic(gens, self.n_obs, 0, cfg.hidden, cfg.heads), target=False)
        self.own("chi", Critic(gens, self.n_obs, 0, cfg.hidden, cfg.heads), target=False)
        self.own("actor", SquashedGaussian(gens, self.n_obs, n_act, cfg.hidden), target=False)
        self.own("multiplier", Scalar(self.replicas), target=False)                      # lambda of the cost constraint
        self.own("temperature", Scalar(self.replicas), target=False)                     # tau of the weights p
        self.register_buffer("p0", torch.full((self.replicas, 1), 1 / horizon))          # share of initial rows
        self.register_buffer("obs_spread", torch.ones(self.replicas, self.n_obs))        # std of standardised observations
        self.register_buffer("action_spread", torch.ones(self.replicas, n_act))

    def ready(self) -> COptiDICE:
        cfg = self.cfg
        self.optimisers(chi=cfg.lr, temperature=cfg.lr_scalar, nu=cfg.lr, multiplier=cfg.lr_scalar, actor=cfg.lr_actor)
        return self

    # ------------------------------------------------------------------------------------------- the learner's rows
    @torch.no_grad()
    def measure(self, pool: Pool, rows: Sequence[Rows]) -> None:
        found: dict[int, tuple[Tensor, ...]] = {}
        for r, mine in enumerate(rows):
            if (key := id(mine.ids)) not in found:
                ids = mine.ids
                found[key] = ((pool.t[ids] == 0).float().mean(), pool.obs[ids].std(0, correction=0),
                              pool.action[ids].std(0, correction=0))
            p0, obs, action = found[key]
            self.p0[r] = p0
            self.obs_spread[r] = obs / self.obs_std[r]
            self.action_spread[r] = action

    def sampler(self, pool: Pool, rows: Sequence[Rows], n_step: int = 1) -> StartSampler:      # no critics, no n-step targets
        return StartSampler(pool, rows, self.cfg.batch, self.units, "any_end" if self.parity else "terminal", not self.parity)

    # ------------------------------------------------------------------------------------------------ the policy
    @torch.no_grad()
    def act(self, obs: Tensor, generator: torch.Generator | None = None) -> Tensor:      # the squashed mean
        return self.actor(self.standardise(obs))[0].tanh()

    def log_likelihood(self, obs: Tensor, action: Tensor) -> Tensor:
        """Log-density of actions [R, B, n_act] under the policy -> [R, B] (parity: that of its Gaussian before the tanh)."""
        mean, std = self.actor(obs)
        u = action if self.parity else action.clamp(-self.cfg.clip, self.cfg.clip).atanh()
        log_p = -((u - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2
        return (log_p if self.parity else log_p - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)

    # ------------------------------------------------------------------------------------------------ the losses
    @property
    def rate_limit(self) -> Tensor:
        """What the cost per step is held against, [R, 1].

        The cost estimate is the mean of c under the policy's discounted state distribution, whose mass is 1 as long as only
        terminal rows end it: a cost per step. `qc_limit` is the discounted sum of l / T over T steps, hence
        l / T = qc_limit (1 - gamma) / (1 - gamma^T).
        """
        g = self.cfg.gamma
        return self.qc_limit if self.parity else self.qc_limit * (1 - g) / (1 - g**self.horizon)

    def values(self, net: Critic, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Smallest head at s, s' and the initial states, [R, B] each (parity: s where it is one, over p0)."""
        obs = torch.cat([batch.obs, batch.next_obs, *(() if self.parity else (batch.init_obs,))], 1)
        now, after, *start = net(obs, obs[..., :0]).amin(1).split(batch.obs.shape[1], 1)
        return now, after, start[0] if start else now * batch.first / self.p0

    def ratio(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """nu0, e and w of `Terms`."""
        now, after, start = self.values(self.nu, batch)
        e = batch.reward - self.multiplier().detach() * batch.cost + self.cfg.gamma * (1 - batch.done) * after - now
        return start, e, self.f_prime_inverse(e / self.cfg.alpha).relu()

    def terms(self, batch: Batch) -> Terms:
        nu0, e, w = self.ratio(batch)
        if self.cfg.kl_limit == 0:                                 # no upper bound: the plain estimate
            return Terms(nu0, e, w, torch.zeros_like(w), torch.ones_like(w))
        now, after, start = self.values(self.chi, batch)
        flow = batch.cost + self.cfg.gamma * (1 - batch.done) * after - now
        ell = (1 - self.cfg.gamma) * start + w.detach() * flow
        return Terms(nu0, e, w, ell, (ell / self.temperature().detach()).softmax(-1) * ell.shape[-1])

    def chi_loss(self, batch: Batch, terms: Terms | None = None) -> Tensor:
        _, _, _, ell, p = terms or self.terms(batch)
        return (p * ell).mean(-1)

    def divergence(self, p: Tensor) -> Tensor:                     # KL of the weights p [R, B] from uniform ones
        return (p.xlogy(p) - p + 1).mean(-1)

    def temperature_loss(self, batch: Batch, terms: Terms | None = None) -> Tensor:      # tau (limit - KL)
        p = (terms or self.terms(batch)).p.detach()
        return self.temperature()[:, 0] * (self.cfg.kl_limit - self.divergence(p))

    def nu_loss(self, batch: Batch, terms: Terms | None = None) -> Tensor:               # (1 - g) nu(s0) + w e - alpha f(w)
        nu0, e, w, *_ = terms or self.terms(batch)
        return ((1 - self.cfg.gamma) * nu0 + w * e - self.cfg.alpha * self.f(w)).mean(-1)

    def cost_rate(self, batch: Batch, terms: Terms) -> Tensor:     # the policy's cost per step [R], from above
        return (terms.p * terms.w * batch.cost).detach().mean(-1)

    def multiplier_loss(self, batch: Batch, terms: Terms | None = None) -> Tensor:       # lam (limit - cost)
        return self.multiplier()[:, 0] * (self.rate_limit[:, 0] - self.cost_rate(batch, terms or self.terms(batch)))

    def actor_loss(self, batch: Batch, w: Tensor | None = None) -> Tensor:               # -w log pi(a | s), both blurred
        w = self.ratio(batch)[2].detach() if w is None else w
        obs, action = (x + self.cfg.noise * spread[:, None] * self.randn(*x.shape)
                       for x, spread in ((batch.obs, self.obs_spread), (batch.action, self.action_spread)))
        return -(w * self.log_likelihood(obs, action)).mean(-1)

    # ------------------------------------------------------------------------------------------------ the update
    def update(self, batch: Batch, t: int, target: None = None, extra: Extra | None = None) -> dict[str, Tensor]:
        lam, tau = self.multiplier()[:, 0].detach(), self.temperature()[:, 0].detach()
        terms, out = self.terms(batch), {}
        if self.cfg.kl_limit > 0:
            out["chi"] = self.minimise("chi", self.chi_loss(batch, terms), extra)
            out["temperature"] = self.minimise("temperature", self.temperature_loss(batch, terms), extra)
        out["nu"] = self.minimise("nu", self.nu_loss(batch, terms), extra)
        with torch.no_grad():
            w = self.ratio(batch)[2]                               # of the new nu and the old multiplier
        out["multiplier"] = self.minimise("multiplier", self.multiplier_loss(batch, terms), extra)
        out["actor"] = self.minimise("actor", self.actor_loss(batch, w), extra)
        return {**out, "lam": lam, "tau": tau, "kl": self.divergence(terms.p.detach()), "cost_rate": self.cost_rate(batch, terms),
                "w": w.mean(-1)}
