"""COptiDICE: its losses against cases worked out by hand, problems with a known answer, and OSRL's numbers."""
import json
import math
from dataclasses import replace
from pathlib import Path

import golden
import pytest
import torch

from conftest import make_learner, make_pool, sampler_of
from saferule.config import CONFIGS, DIVERGENCES, UNLEARNER_NAMES, COptiDICEConfig
from saferule.data import Batch, Rows, Units
from saferule.errors import UserError
from saferule.learners.coptidice import F_OF, COptiDICE, StartSampler, Terms
from saferule.unlearning import missing_losses, unlearn

RECORDED = json.loads((Path(__file__).parent / "data" / "osrl_coptidice.json").read_text())
MODES = ("default", "parity")


def constant(net, values):
    """Make the heads of a stacked MLP answer `values` whatever its input."""
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net.layers[-1].bias.copy_(torch.as_tensor(values, dtype=torch.float32).view_as(net.layers[-1].bias))


def small(mode="default", limit=0.5, replicas=1, horizon=10, **cfg):
    """A learner of one observation and one action whose cost limit is `limit` a step."""
    cfg = COptiDICEConfig(**{"mode": mode, "hidden": (8, 8), "gamma": 0.9, "noise": 0.0, "divergence": "chi2", "alpha": 0.5,
                             "kl_limit": 0.01, **cfg})
    units = Units(torch.zeros(replicas, 1), torch.ones(replicas, 1), torch.ones(replicas))
    kappa = limit * (1 - cfg.gamma**horizon) / (1 - cfg.gamma)
    learner = COptiDICE(cfg, units, torch.full((replicas,), kappa), list(range(replicas)), 1, horizon).ready()
    learner.seed_noise(0)
    return learner


def fields(rows=1, replicas=1, reward=1.0, cost=0.5, done=0.0, action=0.0, **more):
    column = lambda x: torch.as_tensor(x, dtype=torch.float32).expand(replicas, rows).clone()
    state = torch.zeros(replicas, rows, 1)
    return Batch(state, column(action)[..., None], column(reward), column(cost), state + 1, column(done), first=column(1.0),
                 init_obs=state, **more)


def with_values(learner, nu=(0.0, 0.0), chi=(0.0, 0.0), lam=0.0, tau=1.0):
    """nu, chi: what both heads answer at observation 0 and at 1."""
    for net, (at0, at1) in ((learner.nu, nu), (learner.chi, chi)):
        net.forward = lambda obs, _, a=at0, b=at1: (a + (b - a) * obs[..., 0])[:, None].expand(-1, 2, -1)
    learner.multiplier.forward = lambda: torch.full((learner.replicas, 1), float(lam))
    learner.temperature.forward = lambda: torch.full((learner.replicas, 1), float(tau))
    return learner


# ----------------------------------------------------------------------------------------------------- f-divergences
def test_divergences_by_hand():
    """algorithms.md B.6."""
    f, inverse = F_OF["softchi"]
    assert f(torch.tensor([0.0, 0.5, 1, 2])).tolist() == pytest.approx([1, 0.15342641, 0, 0.5], abs=1e-6)
    assert inverse(torch.tensor([-1.0, 0, 1])).tolist() == pytest.approx([0.36787944, 1, 2])
    f, inverse = F_OF["chi2"]
    assert f(torch.tensor([0.0, 1, 3])).tolist() == [0.5, 0, 2]
    assert inverse(torch.tensor([-2.0, 0, 1])).tolist() == [-1, 1, 2]
    f, inverse = F_OF["kl"]
    assert f(torch.tensor([0.0, 1, math.e])).tolist() == pytest.approx([0, 0, math.e], abs=1e-6)
    assert inverse(torch.tensor([0.0, 1])).tolist() == pytest.approx([math.exp(-1), 1])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_inverse_is_that_of_the_derivative(name):
    f, inverse = F_OF[name]
    x = torch.linspace(0.05, 4, 80, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f(x).sum(), x)
    assert torch.allclose(inverse(slope), x.detach(), atol=1e-6)
    assert bool((slope.diff() > 0).all())                              # convex


def test_unknown_divergence_and_gamma_in_one_line():
    with pytest.raises(UserError, match="unknown f-divergence of coptidice 'chi'. Did you mean 'chi2'"):
        small(divergence="chi")
    with pytest.raises(UserError, match="coptidice.gamma is 1; it must lie between 0 and 1"):
        make_learner(pool := make_pool(), [pool.rows("clean")], learner="coptidice", gamma=1.0)


# --------------------------------------------------------------------------------------------------- losses by hand
def test_advantage_and_ratio_by_hand():
    """e = r - lam c + g nu(s') - nu(s) = 1 - .8 x .5 + .9 x 2 - 2.1 = .3; chi2 with alpha .5: w = 1 + .3 / .5 = 1.6."""
    learner = with_values(small(), nu=(2.1, 2.0), lam=0.8)
    nu0, e, w = learner.ratio(fields())
    assert (nu0.item(), e.item(), w.item()) == pytest.approx((2.1, 0.3, 1.6), abs=1e-6)
    _, e, w = learner.ratio(fields(done=1.0))                          # a terminal row has no future: e = -1.5, w = max(-2, 0)
    assert (e.item(), w.item()) == pytest.approx((-1.5, 0.0), abs=1e-6)


def test_nu_loss_by_hand():
    """chi2, e = .3, alpha = .5: w e - alpha f(w) = e + e^2 / (2 alpha) = .39 (algorithms.md B.6); plus (1 - g) nu(s0) = .21."""
    learner = with_values(small(), nu=(2.1, 2.0), lam=0.8)
    assert learner.nu_loss(fields()).item() == pytest.approx(0.39 + 0.21, abs=1e-6)


def test_nu_loss_has_its_gradient_through_the_ratio_too():
    """d/de (w e - alpha f(w)) = w + (dw/de)(e - alpha f'(w)) = w, as the second term is 0 where w > 0."""
    learner = small()
    e = torch.tensor([[0.3]], requires_grad=True)
    w = learner.f_prime_inverse(e / 0.5).relu()
    learner.nu_loss(fields(), Terms(torch.zeros(1, 1), e, w, w, w)).sum().backward()
    assert e.grad.item() == pytest.approx(1.6)


def test_initial_states_are_their_own_or_marked_in_the_batch():
    """Default: nu(init_obs). Parity: nu(s) where the row is a first one, over p0; a batch mean of 2.1 x (1 + 0) / 2 / .25."""
    batch = fields(rows=2)._replace(first=torch.tensor([[1.0, 0.0]]))
    default, parity = (with_values(small(mode), nu=(2.1, 2.0)) for mode in MODES)
    parity.p0.fill_(0.25)
    assert default.ratio(batch._replace(init_obs=batch.obs + 1))[0].mean().item() == pytest.approx(2.0)
    assert parity.ratio(batch)[0].mean().item() == pytest.approx(2.1 / 2 / 0.25)


def test_weights_and_chi_loss_by_hand():
    """ell = (1 - g) chi(s0) + w (c + g chi(s') - chi(s)) = .1 x .5 + w (c + .9 - .5) with w = 1: .45 and 1.45;
    p = 2 softmax(ell / tau) with tau = .5: 2 / (1 + e^-2) for the second row."""
    learner = with_values(small(), nu=(1.0, 0.0), chi=(0.5, 1.0), tau=0.5)
    batch = fields(rows=2, cost=[0.0, 1.0])                            # e = 1 - 1 = 0, w = 1
    terms = learner.terms(batch)
    high = 2 / (1 + math.exp(-2))
    assert terms.ell[0].tolist() == pytest.approx([0.45, 1.45], abs=1e-6)
    assert terms.p[0].tolist() == pytest.approx([2 - high, high], abs=1e-6)
    assert learner.chi_loss(batch, terms).item() == pytest.approx(((2 - high) * 0.45 + high * 1.45) / 2, abs=1e-6)
    kl = sum(x * math.log(x) for x in (2 - high, high)) / 2            # p is 1 on average
    assert learner.divergence(terms.p).item() == pytest.approx(kl, abs=1e-6)
    assert learner.cost_rate(batch, terms).item() == pytest.approx(high / 2, abs=1e-6)       # above the plain mean of .5


def test_weights_are_per_replica():
    """A replica whose rows have other costs does not change the weights, KL and cost of the first."""
    one, two = with_values(small(), tau=0.5), with_values(small(replicas=2), tau=0.5)
    batch = fields(rows=3, cost=[0.0, 1.0, 2.0])
    other = fields(rows=3, replicas=2, cost=torch.tensor([[0.0, 1, 2], [50, 0, 9]]))
    alone, beside = one.terms(batch), two.terms(other)
    assert torch.allclose(alone.p[0], beside.p[0], atol=1e-6)
    assert not torch.allclose(beside.p[0], beside.p[1], atol=0.1)
    assert torch.allclose(beside.p.mean(-1), torch.ones(2), atol=1e-6)
    assert one.cost_rate(batch, alone).item() == pytest.approx(two.cost_rate(other, beside)[0].item(), rel=1e-6)


def test_without_a_bound_the_cost_is_the_plain_mean():
    learner = with_values(small(kl_limit=0.0), nu=(1.0, 0.0))
    batch = fields(rows=2, cost=[0.0, 1.0])
    assert learner.cost_rate(batch, learner.terms(batch)).item() == pytest.approx(0.5)
    learner = small(kl_limit=0.0)
    before = learner.weights()
    out = learner.update(fields(rows=2), 0)
    assert "chi" not in out
    moved = {k.split(".")[0] for k, v in learner.weights().items() if not torch.equal(v, before[k])}
    assert not moved & {"chi", "temperature"} and "multiplier" in moved


def test_threshold_is_a_cost_per_step():
    """A limit of 20 in an episode of 200 steps is .1 a step whatever gamma; parity takes the discounted sum."""
    for gamma in (0.9, 0.99):
        kappa = 20 * (1 - gamma**200) / ((1 - gamma) * 200)
        units = Units(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1))
        default, parity = (COptiDICE(COptiDICEConfig(mode=mode, gamma=gamma), units, torch.tensor([kappa]), [0], 1, 200)
                           for mode in MODES)
        assert default.rate_limit.item() == pytest.approx(0.1)
        assert parity.rate_limit.item() == pytest.approx(kappa)


def step_of(learner, name, cost=0.5, **terms):
    """By how much one step on a scalar's own loss moves it."""
    batch = fields(rows=2, cost=cost)
    made = learner.terms(batch)._replace(**{k: torch.tensor([v]) for k, v in terms.items()})
    net = getattr(learner, name)
    before = net().item()
    learner.minimise(name, getattr(learner, name + "_loss")(batch, made))
    return net().item() - before


def test_the_multiplier_rises_above_the_limit_and_falls_below_it():
    """Cost per step = mean(p w c) = .5 against .4 and .6; the loss is lam (limit - cost), lam = log(1 + e) at the start."""
    ones = {"p": [1.0, 1.0], "w": [1.0, 1.0]}
    assert step_of(small(limit=0.4), "multiplier", **ones) > 0
    assert step_of(small(limit=0.6), "multiplier", **ones) < 0
    batch = fields(rows=2)
    terms = Terms(*(torch.ones(1, 2),) * 5)
    assert small(limit=0.4).multiplier_loss(batch, terms).item() == pytest.approx(math.log(1 + math.e) * (0.4 - 0.5), abs=1e-6)


def test_the_temperature_rises_where_the_weights_are_too_uneven():
    """Weights (.5, 1.5) have KL .1308 > .01: tau (.01 - .1308) is descended by a larger tau. Even weights: by a smaller one."""
    assert step_of(small(), "temperature", p=[0.5, 1.5]) > 0
    assert step_of(small(), "temperature", p=[1.0, 1.0]) < 0
    terms = Terms(*(torch.ones(1, 2),) * 4, torch.tensor([[0.5, 1.5]]))
    kl = (0.5 * math.log(0.5) + 1.5 * math.log(1.5)) / 2
    assert small().temperature_loss(fields(rows=2), terms).item() == pytest.approx(math.log(1 + math.e) * (0.01 - kl), abs=1e-6)


def test_likelihood_is_that_of_the_squashed_action():
    """Mean 0, std 1, a = tanh(1): log N(1) + .867561661 (algorithms.md B.0); parity takes the Gaussian at a itself."""
    default, parity = (small(mode) for mode in MODES)
    for learner in (default, parity):
        with torch.no_grad():
            for p in learner.actor.parameters():
                p.zero_()
    a, normal = math.tanh(1), lambda u: -u * u / 2 - math.log(2 * math.pi) / 2
    at = torch.zeros(1, 1, 1), torch.full((1, 1, 1), a)
    assert default.log_likelihood(*at).item() == pytest.approx(normal(1) + 0.867561661, abs=1e-5)
    assert parity.log_likelihood(*at).item() == pytest.approx(normal(a), abs=1e-6)
    assert default.actor_loss(fields(rows=1, action=a), torch.tensor([[2.0]])).item() == pytest.approx(
        -2 * (normal(1) + 0.867561661), abs=1e-5)
    assert math.isfinite(default.log_likelihood(at[0], at[1] * 0 + 1.0).item())              # an action on the edge


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mode", MODES)
def test_every_loss_reaches_its_own_network_alone(pool, mode, divergence):
    """Also where the shared terms are handed over, as `update` does."""
    learner = make_learner(pool, [pool.rows("clean")] * 2, learner="coptidice", mode=mode, divergence=divergence)
    batch = sampler_of(learner, pool, [pool.rows("clean")] * 2).sample(torch.Generator().manual_seed(0))
    terms, before = learner.terms(batch), learner.weights()
    for name in learner.LOSSES:
        loss = getattr(learner, name + "_loss")
        loss = loss(batch) if name == "actor" else loss(batch, terms)
        wanted = {k for k, p in learner.named_parameters() if k.split(".")[0] == name}
        gradients = torch.autograd.grad(loss.sum(), list(learner.parameters()), allow_unused=True)
        reached = {k for (k, _), g in zip(learner.named_parameters(), gradients) if g is not None and g.abs().sum() > 0}
        assert loss.shape == (2,)
        assert reached <= wanted and reached, name
    assert all(torch.equal(v, before[k]) for k, v in learner.weights().items())              # nothing was changed


@pytest.mark.parametrize("mode", MODES)
def test_the_actor_learns_from_the_new_nu_and_the_old_multiplier(pool, mode):
    rows = [pool.rows("clean")]
    learner = make_learner(pool, rows, learner="coptidice", mode=mode, lr_scalar=0.5)
    batch = sampler_of(learner, pool, rows).sample(torch.Generator().manual_seed(0))
    old = learner.multiplier().detach()
    out = learner.update(batch, 0)
    assert not torch.equal(old, learner.multiplier())
    after = learner.ratio(batch)[2]                                    # new nu, new multiplier
    learner.multiplier.forward = lambda: old
    assert out["w"].item() == pytest.approx(learner.ratio(batch)[2].mean().item(), rel=1e-5)
    assert out["w"].item() != pytest.approx(after.mean().item(), rel=1e-3)


# --------------------------------------------------------------------------------------------------- its minibatches
def test_batches_know_where_episodes_start():
    pool = make_pool(episodes=20, horizon=25)
    learner = make_learner(pool, [pool.rows("clean")] * 2, learner="coptidice")
    sampler = sampler_of(learner, pool, [pool.rows("clean")] * 2)
    batch = sampler.sample(torch.Generator().manual_seed(0))
    firsts = learner.standardise(pool.obs[pool.t == 0].expand(2, -1, -1))[0]
    starts = lambda obs: (torch.cdist(obs, firsts.expand(2, -1, -1)) < 1e-2).any(-1)         # the same in both replicas' units
    assert batch.init_obs.shape == batch.obs.shape
    assert starts(batch.init_obs).all()
    assert torch.equal(batch.first.bool(), starts(batch.obs)) and 0 < float(batch.first.mean()) < 0.5
    assert not torch.equal(batch.init_obs[0], batch.init_obs[1])       # each replica draws its own


def test_behind_a_time_out_an_episode_starts_anew():
    """Default: the next state of a time-out row is a start, that of all others its own, terminal or not. Parity: all their own."""
    pool = make_pool(episodes=30, horizon=5)
    pool.columns["terminal"][4::10] = True                             # every other episode ends by itself
    units = Units(torch.zeros(1, 4), torch.ones(1, 4), torch.ones(1))
    for mode in MODES:
        learner = make_learner(pool, [pool.rows("clean")], learner="coptidice", mode=mode)
        sampler = StartSampler(pool, [pool.rows("clean")], 200, units, restart=not learner.parity)
        assert learner.sampler(pool, [pool.rows("clean")]).restart == sampler.restart
        batch = sampler.sample(torch.Generator().manual_seed(0))
        row = (batch.obs[0][:, None] == pool.obs).all(-1).float().argmax(-1)
        own = (batch.next_obs[0] == pool.next_obs[row]).all(-1)
        anew = (batch.next_obs[0] == batch.init_obs[0]).all(-1)
        out_of_time = pool.timeout[row] & ~pool.terminal[row]
        assert 5 < int(out_of_time.sum()) < 60 and bool(pool.terminal[row].any())
        assert torch.equal(anew, out_of_time & (mode == "default"))
        assert torch.equal(own, ~anew)


def test_rows_without_a_start_are_starts_themselves():
    pool = make_pool()
    ids = (pool.t > 3).nonzero()[:, 0]
    learner = make_learner(pool, [pool.rows("clean")], learner="coptidice")
    batch = learner.sampler(pool, [Rows(ids, torch.ones(len(ids)))]).sample(torch.Generator().manual_seed(0))
    assert float(batch.first.sum()) == 0
    assert torch.isfinite(batch.init_obs).all()


def test_starts_are_those_of_each_replica():
    pool = make_pool(episodes=4, horizon=5)
    halves = [Rows(pool.rows("clean").ids[part], torch.ones(10)) for part in (slice(0, 10), slice(10, 20))]
    learner = make_learner(pool, halves, learner="coptidice", standardise=False)
    batch = StartSampler(pool, halves, 64, Units(torch.zeros(2, 4), torch.ones(2, 4), torch.ones(2))).sample(
        torch.Generator().manual_seed(0))
    for r, rows in enumerate((pool.obs[[0, 5]], pool.obs[[10, 15]])):
        assert (batch.init_obs[r][:, None] == rows).all(-1).any(-1).all()
        assert len(batch.init_obs[r].unique(dim=0)) == 2
    assert learner.p0[:, 0].tolist() == pytest.approx([0.2, 0.2])


def test_measured_is_what_the_rows_say():
    pool = make_pool(episodes=12, horizon=25)
    part = Rows(torch.arange(60), torch.ones(60))                      # episodes 0, 1 and a part of 2: 3 starts in 60 rows
    learner = make_learner(pool, [pool.rows("clean"), part], learner="coptidice")
    assert learner.p0[:, 0].tolist() == pytest.approx([1 / 25, 3 / 60])
    assert torch.allclose(learner.action_spread[1], pool.action[:60].std(0, correction=0))
    assert torch.allclose(learner.obs_spread, torch.ones(2, 4), atol=1e-5)                   # in standardised units
    assert "p0" in learner.weights()                                   # travels with a checkpoint


# ------------------------------------------------------------------------------------------------ problems with an answer
def two_arms(limit, steps=700, replicas=2, mode="default"):
    """One state; arm a = .5 pays 1 at cost 1, arm a = -.5 pays .5 at cost 0, equally often in the data; limit: cost per step."""
    learner = small(mode, limit=limit, replicas=replicas, gamma=0.5, divergence="softchi", alpha=0.1, lr=2e-2, lr_actor=1e-2,
                    lr_scalar=5e-2, kl_limit=0.0)
    dear = torch.arange(16) % 2 == 0
    batch = fields(rows=16, replicas=replicas, reward=torch.where(dear, 1.0, 0.5), cost=dear.float(),
                   action=torch.where(dear, 0.5, -0.5))
    batch = batch._replace(next_obs=batch.obs)
    for t in range(steps):
        out = learner.update(batch, t)
    w = learner.ratio(batch)[2].detach()
    return learner, out, w[:, dear].mean(-1), w[:, ~dear].mean(-1)


def test_probe_a_loose_limit_takes_the_dear_arm():
    """At most cost 1 a step, limit 2: lam -> 0, and the ratio tilts to the arm that pays more."""
    learner, out, dear, cheap = two_arms(limit=2.0)
    assert (dear > 1.9).all() and (cheap < 0.1).all()
    assert (learner.multiplier() < 0.1).all()
    assert (learner.act(torch.zeros(2, 1, 1)) > 0.3).all()


def test_probe_a_tight_limit_takes_the_cheap_arm():
    """Limit .1: the dear arm may be taken one time in ten, so w = (.2, 1.8), at a multiplier that outweighs the gain of .5."""
    learner, out, dear, cheap = two_arms(limit=0.1)
    assert torch.allclose(dear, torch.full((2,), 0.2), atol=0.05)
    assert torch.allclose(cheap, torch.full((2,), 1.8), atol=0.1)
    assert torch.allclose(out["cost_rate"], torch.full((2,), 0.1), atol=0.02)
    assert (learner.multiplier() > 0.5).all()
    assert (learner.act(torch.zeros(2, 1, 1)) < -0.2).all()


def test_probe_nu_is_the_value():
    """One arm that pays 1: w must be 1, so e = 0 and nu = r / (1 - g) = 2 for gamma = .5."""
    learner = small(limit=2.0, gamma=0.5, divergence="softchi", lr=3e-2, lr_scalar=2e-2)
    batch = fields(rows=4)
    batch = batch._replace(next_obs=batch.obs, cost=batch.cost * 0)
    for t in range(300):
        out = learner.update(batch, t)
    assert out["w"].item() == pytest.approx(1.0, abs=0.02)
    assert learner.values(learner.nu, batch)[0].mean().item() == pytest.approx(2.0, abs=0.05)


# -------------------------------------------------------------------------------------------------------- the chain
def test_acting_is_the_squashed_mean_and_needs_no_noise(pool):
    learner = make_learner(pool, [pool.rows("clean")] * 2, learner="coptidice")
    obs = pool.obs[:5].expand(2, -1, -1)
    first, second = (learner.act(obs, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.equal(first, second)
    assert torch.equal(first, learner.actor(learner.standardise(obs))[0].tanh().detach())


def test_scalars_and_their_moments_are_in_the_state(pool):
    rows = [pool.rows("clean")] * 2
    learner = make_learner(pool, rows, learner="coptidice")
    sampler, stream = sampler_of(learner, pool, rows), torch.Generator().manual_seed(0)
    for t in range(3):
        learner.update(sampler.sample(stream), t)
    state = learner.full_state()
    for name in ("multiplier", "temperature"):
        assert state[f"{name}.raw"].shape == (2, 1)
        assert state[f"optim.{name}.0.exp_avg"].shape == (2, 1)
        assert float(state[f"optim.{name}.0.exp_avg"].abs().min()) > 0


def test_replicas_may_have_limits_of_their_own(pool):
    rows = [pool.rows("clean")] * 2
    learner = make_learner(pool, rows, learner="coptidice", lr_scalar=0.1)
    learner.qc_limit.copy_(torch.tensor([[0.0], [1e3]]))
    sampler, stream = sampler_of(learner, pool, rows), torch.Generator().manual_seed(0)
    for t in range(20):
        learner.update(sampler.sample(stream), t)
    tight, loose = learner.multiplier()[:, 0].tolist()
    assert tight > math.log(1 + math.e) > loose


@pytest.mark.parametrize("method", UNLEARNER_NAMES)
def test_unlearners_that_push_critics_refuse_it_in_one_line(pool, method):
    """It has no Q-critics: Safe-RULE and its like have nothing to push. Fine-tuning works."""
    rows, forget = [pool.rows("clean")], [Rows(torch.arange(3, 9), torch.ones(6))]
    learner = make_learner(pool, rows, learner="coptidice")
    assert bool(missing_losses(method, learner)) != (method == "finetune")
    before, cfg = learner.weights(), replace(CONFIGS[method], steps=3)
    if method == "finetune":
        unlearn(learner, pool, rows, forget, method, cfg)
        assert any(not torch.equal(v, before[k]) for k, v in learner.weights().items())
        return
    with pytest.raises(UserError, match=f"method '{method}' works on .*, but COptiDICE has no .*; use 'finetune'.$"):
        unlearn(learner, pool, rows, forget, method, cfg)
    assert all(torch.equal(v, before[k]) for k, v in learner.weights().items())


# ------------------------------------------------------------------------------------------------------------- golden
def osrl_names() -> dict[str, str]:
    """OSRL's parameter -> ours."""
    names = {"actor.mu_layer": "actor.mu", "actor.log_std_layer": "actor.log_std"}
    names |= {f"actor.net.{2 * i}": f"actor.trunk.layers.{i}" for i in range(2)}
    heads = {f"{net}_network.q_nets.{h}.{2 * i}": (f"{net}.net.layers.{i}", h) for net in ("nu", "chi")
             for h in range(golden.SIZES["heads"]) for i in range(3)}
    names = {theirs: (ours, 0) for theirs, ours in names.items()} | heads
    return {f"{k}.{part}": (f"{ours}.{part}", member) for k, (ours, member) in names.items() for part in ("weight", "bias")}


def views(learner) -> dict[str, torch.Tensor]:
    """Our parameters under OSRL's names and in its layout."""
    out = {}
    for name, (ours, member) in osrl_names().items():
        value = learner.get_parameter(ours)[member].detach()
        out[name] = value.T if name.endswith("weight") else value[0]
    return {**out, "lmbda": learner.multiplier.raw.detach(), "tau": learner.temperature.raw.detach()}


def golden_learner():
    z, known = RECORDED["sizes"], RECORDED["measured"]
    cfg = COptiDICEConfig(mode="parity", hidden=tuple(z["hidden"]), **{k: z[k] for k in ("heads", "batch", "gamma", "lr")},
                          **RECORDED["settings"])
    units = Units(torch.zeros(1, z["n_obs"]), torch.ones(1, z["n_obs"]), torch.ones(1))
    g, T = z["gamma"], z["horizon"]
    kappa = torch.tensor([RECORDED["cost_limit"] * (1 - g**T) / ((1 - g) * T)])
    learner = COptiDICE(cfg, units, kappa, [0], z["n_act"], T).ready()
    with torch.no_grad():
        for name, own in views(learner).items():
            if name not in ("lmbda", "tau"):                           # these start at 1 on both sides
                own.copy_(golden.weight(name, tuple(own.shape)))
        for name, value in known.items():
            getattr(learner, name).copy_(torch.tensor(value))
    learner.randn = golden.Noise()
    return learner


def golden_batch(t):
    z = RECORDED["sizes"]
    named = {**golden.batch(t, z["batch"], z["n_obs"], z["n_act"]), "first": golden.starts(t, z["batch"])}
    return Batch(**{k: v[None] for k, v in named.items()})


def test_three_parity_updates_agree_with_osrl():
    """Losses, lambda, tau and KL; sum and sum of squares of every parameter, lambda and tau among them, to 1e-5."""
    learner = golden_learner()
    assert sum(v.numel() for v in views(learner).values()) == sum(p.numel() for p in learner.parameters())
    assert set(views(learner)) == set(RECORDED["steps"][0]["parameters"])
    for t, recorded in enumerate(RECORDED["steps"]):
        out = learner.update(golden_batch(t), t)
        for name in set(recorded) - {"parameters"}:
            assert out[name].item() == pytest.approx(recorded[name], abs=1e-5, rel=1e-5), (t, name)
        ours = golden.checksums(views(learner))
        for name, sums in recorded["parameters"].items():
            assert ours[name] == pytest.approx(sums, abs=1e-5, rel=1e-5), (t, name)
    assert learner.randn.calls == RECORDED["noise_calls"]


@pytest.mark.parametrize("change", [{"parity": False}, {"cfg": {"noise": 0.2}}, {"cfg": {"alpha": 0.4}}])
def test_the_comparison_with_osrl_can_fail(change):
    learner = golden_learner()
    if "cfg" in change:
        learner.cfg = replace(learner.cfg, **change["cfg"])
    else:
        learner.parity = False
    batch = golden_batch(0)
    out = learner.update(batch._replace(init_obs=batch.obs), 0)
    assert out["actor"].item() != pytest.approx(RECORDED["steps"][0]["actor"], rel=1e-3)
