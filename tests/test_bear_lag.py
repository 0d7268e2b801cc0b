"""BEAR-Lag: its distance, actor and multipliers against cases worked out by hand; probe problems."""
import math

import pytest
import torch

from conftest import make_learner
from saferule.config import BEARLagConfig
from saferule.data import Batch, Units
from saferule.learners import LEARNERS
from saferule.learners.bear_lag import PolicyTerms, mmd, mmd_squared
from saferule.nets import SquashedGaussian, generators


def constant(net, values):
    """Make a stacked MLP answer `values` [members, n_out] whatever its input."""
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net.layers[-1].bias.copy_(torch.as_tensor(values, dtype=torch.float32).view_as(net.layers[-1].bias))


def one_replica(mode="default", **cfg):
    units = Units(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1))
    small = {"mode": mode, "vae_steps": 0, "actor_start": 0, "hidden": (4,), "vae_hidden": 4, "samples": 2, "gamma": 0.9}
    learner = LEARNERS["bear_lag"](BEARLagConfig(**{**small, **cfg}), units, torch.tensor([3.17]), [0], n_act=1).ready()
    learner.seed_noise(0)
    return learner


def row(reward=1.0, cost=0.5, done=0.0, **more):
    one = torch.ones(1, 1, 1)
    return Batch(0 * one, 0 * one, one[0] * reward, one[0] * cost, one, one[0] * done, **more)


def points(*values):
    return torch.tensor(values)[None, None, :, None].float()           # [1, 1, M, 1]


# ---------------------------------------------------------------------------------------------------------- the distance
def test_mmd_table():
    """algorithms.md B.4: {0, 2} against {1, 1} with width 50; equal sets; {0} against {1} with width 1."""
    assert mmd(points(0, 2), points(1, 1), 50, "gaussian").item() == pytest.approx(0.01720617, abs=2e-5)
    assert mmd(points(0, 2), points(0, 2), 50, "gaussian").item() == pytest.approx(0.001, abs=2e-5)
    assert mmd(points(0), points(1), 1, "gaussian").item() == pytest.approx(0.88709621, abs=1e-6)


def test_laplacian_mmd_by_hand():
    """{(0, 0)} against {(1, 2)}: L1 distance 3, so sqrt(1 + 1 - 2 exp(-3 / (2 sigma)) + 1e-6)."""
    x, y = torch.zeros(1, 1, 1, 2), torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    assert mmd(x, y, 2.0, "laplacian").item() == pytest.approx(math.sqrt(2 - 2 * math.exp(-0.75) + 1e-6), abs=1e-6)


def test_squared_mmd_by_hand():
    """{0, 1} against {0, 1}, width 1/2: off-diagonal pairs e^-1 twice, all pairs (2 + 2 e^-1) / 4 -> 2 e^-1 - (1 + e^-1)."""
    e = math.exp(-1)
    assert mmd_squared(points(0, 1), points(0, 1), 0.5, "gaussian").item() == pytest.approx(2 * e - (1 + e), abs=1e-6)


def test_squared_mmd_is_zero_on_average_for_equal_distributions():
    """Mean over 20 000 draws of 5 + 5 normal samples: 0 within 4 standard errors; OSRL's estimate is far above it."""
    x, y = torch.randn(2, 1, 20_000, 5, 1, generator=torch.Generator().manual_seed(0))
    d = mmd_squared(x, y, 0.5, "gaussian")
    assert abs(d.mean().item()) < 4 * d.std().item() / math.sqrt(d.numel())
    assert mmd(x, y, 0.5, "gaussian").mean() > 0.3


def test_slope_of_the_squared_mmd_is_bounded_where_sets_agree():
    """The root's slope is 500 at zero; the square's vanishes there."""
    y = points(0.3, 0.3).requires_grad_()
    mmd_squared(points(0.3, 0.3), y, 0.5, "gaussian").sum().backward()
    assert y.grad.abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------------------- the policy
def test_squashed_gaussian_by_hand():
    actor = SquashedGaussian(generators([0, 1]), 3, 2, (8, 4))
    mean, std = actor(torch.randn(2, 5, 3))
    assert mean.shape == std.shape == (2, 5, 2)
    with torch.no_grad():
        for p in actor.log_std.parameters():
            p.zero_()
        for bias, expected in ((0.0, 1.0), (7.0, math.exp(2)), (-30.0, math.exp(-20))):    # log-std is clamped to [-20, 2]
            actor.log_std.bias.fill_(bias)
            assert actor(torch.randn(2, 5, 3))[1].flatten().tolist() == pytest.approx([expected] * 20)


def test_the_trunk_is_activated():
    """OSRL's layout: both hidden layers are rectified before the heads."""
    actor = SquashedGaussian(generators([3]), 3, 2, (8, 4))
    x = torch.randn(1, 6, 3)
    h = torch.relu(actor.trunk.layers[1](torch.relu(actor.trunk.layers[0](x))))
    assert torch.allclose(actor(x)[0], actor.mu(h))


def test_parity_acts_by_its_mean_and_default_by_its_best_candidate():
    obs, generator = torch.zeros(1, 3, 1), lambda: torch.Generator().manual_seed(0)
    learner = one_replica("parity")
    assert torch.equal(learner.act(obs, generator()), learner.actor(obs)[0].tanh())
    learner = one_replica(act_samples=50)
    a = learner.sample(learner.actor, torch.zeros(1, 150, 1), generator()).view(1, 3, 50)
    learner.critic.forward = lambda o, action: action[..., 0][:, None]                     # Q = a, C = 2 a
    learner.cost_critic.forward = lambda o, action: 2 * action[..., 0][:, None]
    assert torch.equal(learner.act(obs, generator())[..., 0], a.amax(-1))
    learner.lam.fill_(1)
    assert torch.equal(learner.act(obs, generator())[..., 0], a.amin(-1))


# ------------------------------------------------------------------------------------------------- losses and multipliers
def test_targets_by_hand():
    """Heads Q (2, 4), C (1, 3): y = r + .9 (1 - d) 2 and c + .9 (1 - d) 3; parity mixes groups' minima 2 and 4 to 2.5."""
    learner = one_replica()
    constant(learner.critic_target.net, [2, 4])
    constant(learner.cost_critic_target.net, [1, 3])
    assert [y.item() for y in learner.targets(row())] == pytest.approx([1 + 0.9 * 2, 0.5 + 0.9 * 3, 3])
    assert [y.item() for y in learner.targets(row(done=1.0))[:2]] == [1.0, 0.5]
    learner = one_replica("parity")
    constant(learner.critic_target.net, [2, 9, 4, 7])
    constant(learner.cost_critic_target.net, [2, 9, 4, 7])
    assert [y.item() for y in learner.targets(row(done=1.0))[:2]] == pytest.approx([1.0, 0.5 + 0.9 * 2.5])


def test_actor_loss_by_hand():
    """-Q + e^log_alpha (MMD - limit) + lam (C - limit), Q = 2, C = 3, lam = .5, MMD .25, alpha 2."""
    terms = PolicyTerms(*(torch.full((1, 1), v) for v in (2.0, 3.0, 0.25)))
    match, penalty = 2 * (0.25 - 0.05), 0.5 * (3 - 3.17)
    for mode, before_start in (("default", match), ("parity", match + penalty)):            # OSRL charges cost from the start
        learner = one_replica(mode, mmd_limit=0.05)
        learner.lam.fill_(0.5)
        learner.log_alpha.fill_(math.log(2))
        assert learner.actor_loss(row(), terms).item() == pytest.approx(-2 + match + penalty)
        assert learner.actor_loss(row(), terms, improve=False).item() == pytest.approx(before_start)


def test_the_policy_is_compared_with_the_vae():
    """The same action from both: no distance. Values are those of a policy action: Q = a, C = -a, pessimism over one head."""
    learner = one_replica("parity", match_samples=3)
    learner.randn = lambda *shape, generator=None: torch.zeros(shape)
    constant(learner.vae.decoder, [0.4])
    with torch.no_grad():
        for p in learner.actor.parameters():
            p.zero_()
        learner.actor.mu.bias.fill_(0.4)
    learner.critic.forward = lambda o, a: a[..., 0][:, None]
    learner.cost_critic.forward = lambda o, a: -a[..., 0][:, None]
    q, qc, distance = learner.policy_terms(torch.zeros(1, 2, 1))
    assert q[0].tolist() == pytest.approx([math.tanh(0.4)] * 2)
    assert qc[0].tolist() == pytest.approx([-math.tanh(0.4)] * 2)
    assert distance[0].tolist() == pytest.approx([1e-3] * 2)                               # sqrt(1e-6)


def test_alpha_ascends_by_hand_and_is_clamped():
    """log_alpha += lr e^log_alpha (MMD - limit), kept in [-5, 5]."""
    learner = one_replica(lr_alpha=0.5, mmd_limit=0.05)
    learner.ascend_alpha(torch.full((1, 4), 0.25))
    assert learner.log_alpha.item() == pytest.approx(0.1)
    learner.ascend_alpha(torch.full((1, 4), 0.25))
    assert learner.log_alpha.item() == pytest.approx(0.1 + 0.5 * math.exp(0.1) * 0.2)
    learner.ascend_alpha(torch.full((1, 4), 1e3))
    assert learner.log_alpha.item() == 5
    learner.ascend_alpha(torch.full((1, 4), -1e3))
    assert learner.log_alpha.item() == -5


def test_schedule(pool):
    """First the VAE alone; then everything, the actor only matching the data until `actor_start`."""
    learner = make_learner(pool, [pool.rows("clean")], learner="bear_lag", vae_steps=2, actor_start=4)
    seen, loss = [], learner.actor_loss
    learner.actor_loss = lambda batch, terms=None, improve=True: (seen.append(improve), loss(batch, terms, improve))[1]
    one = torch.zeros(1, 8)
    batch = Batch(torch.randn(1, 8, 4), torch.rand(1, 8, 2), one, one, torch.randn(1, 8, 4), one)
    assert [set(learner.update(batch, t)) == {"vae"} for t in range(6)] == [True, True, False, False, False, False]
    assert seen == [False, False, True, True]
    assert learner.boundaries == (2, 4)


# --------------------------------------------------------------------------------------------------------- probe problems
def run_probe(batch, steps, **cfg):
    learner = one_replica(**{"tau": 0.1, "lr": 3e-3, "hidden": (16,), **cfg})
    for t in range(steps):
        learner.update(batch, t)
    return learner, learner.critic(batch.obs, batch.action).mean().item(), \
        learner.cost_critic(batch.obs, batch.action).mean().item()


def test_probe_one_row_that_ends():
    """One terminal row: Q = r and C = c."""
    _, q, qc = run_probe(row(reward=1.0, cost=0.5, done=1.0), steps=600)
    assert q == pytest.approx(1.0, abs=0.03)
    assert qc == pytest.approx(0.5, abs=0.03)


def test_probe_the_policy_stays_with_the_data():
    """Q grows with the action, which the data never take: a tight constraint keeps the policy at the data's 0.3."""
    generator = torch.Generator().manual_seed(0)
    obs, action = torch.zeros(1, 64, 1), 0.3 + 0.02 * torch.randn(1, 64, 1, generator=generator)
    batch = Batch(obs, action, action[..., 0], torch.zeros(1, 64), obs, torch.ones(1, 64))
    where = {}
    for limit in (0.001, 10.0):
        learner, *_ = run_probe(batch, 800, mmd_limit=limit, lr_alpha=0.1, vae_steps=200)
        where[limit] = learner.sample(learner.actor, obs).mean().item()
    assert where[0.001] == pytest.approx(0.3, abs=0.15)
    assert where[10.0] > 0.8
