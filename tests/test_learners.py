"""Every learner: stacking, isolation, purity, resuming. BCQ-Lag: every loss against cases worked out by hand."""
import math
from dataclasses import replace

import pytest
import torch

from conftest import KINDS, make_learner, make_pool, sampler_of
from saferule.config import CONFIGS, BCQLagConfig
from saferule.data import Batch, Sampler, Units
from saferule.learners import LEARNERS
from saferule.learners.shared import Targets
from saferule.nets import Linear, generators, kl_to_standard_normal
from saferule.train import Learner, Resume, fit

MODES = ("default", "parity")
each_learner_and_mode = pytest.mark.parametrize(("learner", "mode"), [(name, mode) for name in KINDS for mode in MODES])
each_loss = pytest.mark.parametrize(("learner", "name"), [(kind, name) for kind in KINDS for name in LEARNERS[kind].LOSSES])


def noiseless(learner: Learner) -> Learner:
    """Replace the noise by zeros, so that stacked and separate runs see the same."""
    learner.randn = lambda *shape, generator=None: torch.zeros(shape)
    return learner


# ------------------------------------------------------------------------------------------------- networks and stacking
def test_initial_distribution_is_that_of_nn_linear():
    """Same bound, and same mean and variance, as torch.nn.Linear; independent replicas."""
    ours = Linear(generators(range(3)), 50, 400)
    theirs = torch.nn.Linear(50, 400)
    bound = 1 / math.sqrt(50)
    for tensor in (ours.weight, ours.bias):
        assert tensor.abs().max() <= bound
        assert tensor.abs().max() > 0.97 * bound
    assert float(ours.weight.detach().std()) == pytest.approx(float(theirs.weight.detach().std()), rel=0.02)
    assert float(ours.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not torch.equal(ours.weight[0], ours.weight[1])


def test_stacked_linear_is_three_linears():
    layer = Linear(generators(range(3)), 5, 7)
    x = torch.randn(3, 11, 5)
    for r in range(3):
        expected = torch.nn.functional.linear(x[r], layer.weight[r].T, layer.bias[r, 0])
        assert torch.allclose(layer(x)[r], expected, atol=1e-6)


@each_learner_and_mode
def test_stacked_equals_three_separate_runs(pool, learner, mode):
    rows = [pool.rows("clean")] * 3
    small = {"learner": learner, "mode": mode, "vae_steps": 3, "qc_limit": 0.1}
    stacked = noiseless(make_learner(pool, rows, seeds=[5, 6, 7], **small))
    single = [noiseless(make_learner(pool, rows[:1], seeds=[s], **small)) for s in (5, 6, 7)]
    for r, one in enumerate(single):                                   # exactly equal at the start
        for (name, a), (_, b) in zip(stacked.named_parameters(), one.named_parameters()):
            members = a.shape[0] // 3
            assert torch.equal(a[r * members:(r + 1) * members], b), name
    sampler = sampler_of(stacked, pool, rows)
    stream = torch.Generator().manual_seed(0)
    for t in range(100):
        batch = sampler.sample(stream)
        stacked.update(batch, t)
        for r, one in enumerate(single):
            one.update(type(batch)(*(f[r:r + 1] if isinstance(f, torch.Tensor) else f for f in batch)), t)
    for r, one in enumerate(single):
        for (name, a), (_, b) in zip(stacked.state_dict().items(), one.state_dict().items()):
            members = a.shape[0] // 3
            assert torch.allclose(a[r * members:(r + 1) * members], b, atol=1e-5, rtol=0), name
    if hasattr(stacked, "lam"):
        assert float(stacked.lam.max()) > 0                            # the multiplier took part


@each_learner_and_mode
def test_nan_in_one_replica_leaves_the_others_unchanged(pool, learner, mode):
    rows = [pool.rows("clean")] * 3
    clean, hurt = (make_learner(pool, rows, learner=learner, mode=mode) for _ in range(2))
    sampler = sampler_of(clean, pool, rows)
    stream = torch.Generator().manual_seed(0)
    for t in range(5):
        batch = sampler.sample(stream)
        broken = batch._replace(obs=batch.obs.clone(), action=batch.action.clone())
        broken.obs[0], broken.action[0] = float("nan"), float("nan")
        clean.update(batch, t)
        hurt.update(broken, t)
    for name, value in clean.state_dict().items():
        members = value.shape[0] // 3
        assert torch.equal(value[members:], hurt.state_dict()[name][members:]), name
    assert all(any(p[0].isnan().any() for p in getattr(hurt, name).parameters()) for name in hurt.LOSSES)


@each_loss
def test_a_step_moves_only_its_own_network(pool, learner, name):
    learner = make_learner(pool, [pool.rows("clean")] * 2, learner=learner)
    batch = sampler_of(learner, pool, [pool.rows("clean")] * 2).sample(torch.Generator().manual_seed(0))
    before = learner.weights()
    learner.minimise(name, getattr(learner, name + "_loss")(batch))
    moved = {k.split(".")[0] for k, v in learner.weights().items() if not torch.equal(v, before[k])}
    assert moved == {name}


@each_loss
def test_losses_are_pure_and_ignore_the_order_of_the_batch(pool, learner, name):
    learner = noiseless(make_learner(pool, [pool.rows("clean")] * 2, learner=learner))
    batch = sampler_of(learner, pool, [pool.rows("clean")] * 2).sample(torch.Generator().manual_seed(0))
    loss, before = getattr(learner, name + "_loss"), learner.weights()
    first, order = loss(batch), torch.randperm(32)
    shuffled = type(batch)(*(f[:, order] if isinstance(f, torch.Tensor) else f for f in batch))
    assert first.shape == (2,)
    assert torch.equal(first, loss(batch))
    assert torch.allclose(first, loss(shuffled), atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in learner.weights().items())


# --------------------------------------------------------------------------------------------------- losses by hand
def constant(net, values):
    """Make a stacked MLP answer `values` [members, n_out] whatever its input."""
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net.layers[-1].bias.copy_(torch.as_tensor(values, dtype=torch.float32).view_as(net.layers[-1].bias))


def one_replica(mode="default", **cfg):
    units = Units(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1))
    cfg = BCQLagConfig(**{"mode": mode, "vae_steps": 0, "hidden": (4,), "vae_hidden": 4, "samples": 2, "gamma": 0.9, **cfg})
    learner = LEARNERS["bcq_lag"](cfg, units, torch.tensor([3.17]), [0], n_act=1).ready()
    learner.seed_noise(0)
    return learner


def row(reward=1.0, cost=0.5, done=0.0, **more):
    one = torch.ones(1, 1, 1)
    return Batch(0 * one, 0 * one, one[0] * reward, one[0] * cost, one, one[0] * done, **more)


def test_default_targets_by_hand():
    """Heads Q (2, 4), C (1, 3): pessimism takes Q = 2 and C = 3; y = r + .9 (1 - d) 2, y_c = c + .9 (1 - d) 3."""
    learner = one_replica()
    constant(learner.critic_target.net, [2, 4])
    constant(learner.cost_critic_target.net, [1, 3])
    y, yc, _ = learner.targets(row())
    assert y.item() == pytest.approx(1 + 0.9 * 2)
    assert yc.item() == pytest.approx(0.5 + 0.9 * 3)
    y, yc, _ = learner.targets(row(done=1.0))                             # a terminal row: exactly r and c
    assert (y.item(), yc.item()) == (1.0, 0.5)
    y, *_ = learner.targets(row(steps=torch.full((1, 1), 3.0)))         # three-step sums bootstrap with gamma cubed
    assert y.item() == pytest.approx(1 + 0.9**3 * 2)


def test_parity_targets_by_hand():
    """Groups (2, 9) and (4, 7): minima 2 and 4, mixture .75 x 2 + .25 x 4 = 2.5 (algorithms.md B.3); cost is never masked."""
    learner = one_replica("parity")
    constant(learner.critic_target.net, [2, 9, 4, 7])
    constant(learner.cost_critic_target.net, [2, 9, 4, 7])
    y, yc, _ = learner.targets(row(done=1.0))
    assert y.item() == pytest.approx(1.0)
    assert yc.item() == pytest.approx(0.5 + 0.9 * 2.5)
    y, *_ = learner.targets(row())
    assert y.item() == pytest.approx(1 + 0.9 * 2.5)


def test_critic_loss_sums_over_heads_and_averages_over_rows():
    """Q = (2, 4) against y = 1: (2-1)^2 + (4-1)^2 = 10."""
    learner = one_replica()
    constant(learner.critic.net, [2, 4])
    constant(learner.cost_critic.net, [2, 4])
    target = Targets(torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))
    assert learner.critic_loss(row(), target).item() == pytest.approx(10)
    assert learner.cost_critic_loss(row(), target).item() == pytest.approx(20)


def test_actor_loss_by_hand():
    """-Q + lam (C - limit) with Q = min(2, 4), C = max(1, 3), lam = .5, limit 3.17: -2 + .5 (3 - 3.17)."""
    learner = one_replica()
    constant(learner.critic.net, [2, 4])
    constant(learner.cost_critic.net, [1, 3])
    learner.lam.fill_(0.5)
    assert learner.actor_loss(row()).item() == pytest.approx(-2 + 0.5 * (3 - 3.17))


def test_vae_loss_by_hand():
    """Mean 0, log-std 0 and decoded 0 against a = .5: MSE .25 and no KL; mean 1 adds beta / 2."""
    learner = one_replica(beta=0.05)
    constant(learner.vae.decoder, [0])
    constant(learner.vae.encoder, [0, 0, 0, 0])
    batch = row()._replace(action=torch.full((1, 1, 1), 0.5))
    assert learner.vae_loss(batch).item() == pytest.approx(0.25)
    constant(learner.vae.encoder, [1, 1, 0, 0])
    assert learner.vae_loss(batch).item() == pytest.approx(0.25 + 0.05 * 0.5)


def test_kl_table():
    """algorithms.md B.0: KL(mean, std) for (0,1), (1,1), (0,2), (.5,.5)."""
    mean, std = torch.tensor([0, 1, 0, 0.5]), torch.tensor([1, 1, 2, 0.5])
    expected = torch.tensor([0, 0.5, 0.8068528, 0.4431472])
    assert torch.allclose(kl_to_standard_normal(mean, std), expected, atol=1e-6)


def test_perturbation_is_small_and_clipped():
    """phi = .05, net -> 1, a = .98 -> 1.0 (algorithms.md B.0)."""
    learner = one_replica()
    constant(learner.actor.net, [100])
    assert learner.actor(torch.zeros(1, 1, 1), torch.full((1, 1, 1), 0.98)).item() == 1.0
    assert learner.actor(torch.zeros(1, 1, 1), torch.full((1, 1, 1), 0.10)).item() == pytest.approx(0.15)


def test_pid_table():
    """algorithms.md B.1: limit 3.17, mean costs 5.17, 4.17, 2.17, 1.17, 6.17."""
    learner = one_replica("parity")
    seen = []
    for x in (5.17, 4.17, 2.17, 1.17, 6.17):
        learner.ascend_lam(torch.full((1, 4), x))
        seen.append((learner.lam.item(), learner.pid_integral.item()))
    assert [s[0] for s in seen] == pytest.approx([0.208, 0.109, 0.006, 0, 0.314], abs=1e-5)
    assert [s[1] for s in seen] == pytest.approx([2, 3, 2, 0, 3], abs=1e-5)


def test_dual_ascent_is_capped_and_can_be_frozen():
    learner = one_replica(lr_lam=1.0, lam_max=1.5)
    learner.ascend_lam(torch.full((1, 4), 3.17 + 0.7))
    assert learner.lam.item() == pytest.approx(0.7, abs=1e-5)
    learner.ascend_lam(torch.full((1, 4), 9.0))
    assert learner.lam.item() == 1.5
    with learner.tuned(adapt_lam=False):
        learner.ascend_lam(torch.full((1, 4), -9.0))
    assert learner.lam.item() == 1.5
    learner.ascend_lam(torch.full((1, 4), -9.0))
    assert learner.lam.item() == 0.0


def test_acting_takes_the_candidate_with_the_largest_lagrangian():
    """Q(s, a) = a, C(s, a) = 2 a: with lam = 0 the largest action wins, with lam = 1 the smallest."""
    learner = one_replica(act_samples=50, phi=0.0)
    obs, generator = torch.zeros(1, 3, 1), lambda: torch.Generator().manual_seed(0)
    many = obs[:, :, None].expand(1, 3, 50, 1).reshape(1, 150, 1)
    a = learner.decode(many, generator()).view(1, 3, 50)
    learner.critic.forward = lambda o, action: action[..., 0][:, None]
    learner.cost_critic.forward = lambda o, action: 2 * action[..., 0][:, None]
    learner.lam.fill_(0)
    assert torch.equal(learner.act(obs, generator())[..., 0], a.amax(-1))
    learner.lam.fill_(1)
    assert torch.equal(learner.act(obs, generator())[..., 0], a.amin(-1))


# ------------------------------------------------------------------------------------------------------ probe problems
def run_probe(batch, steps=1500, **cfg):
    learner = one_replica(**{"tau": 0.1, "lr": 3e-3, **cfg})
    for t in range(steps):
        learner.update(batch, t)
    return learner.critic(batch.obs, batch.action).mean().item(), learner.cost_critic(batch.obs, batch.action).mean().item()


def test_probe_one_row_that_ends():
    """One terminal row: Q = r and C = c."""
    q, qc = run_probe(row(reward=1.0, cost=0.5, done=1.0), steps=600)
    assert q == pytest.approx(1.0, abs=0.02)
    assert qc == pytest.approx(0.5, abs=0.02)


def test_probe_self_loop():
    """A state that returns to itself under the data's action for ever: Q = r / (1 - gamma), C = c / (1 - gamma)."""
    batch = row(reward=1.0, cost=0.5)
    batch = batch._replace(next_obs=batch.obs)
    q, qc = run_probe(batch, gamma=0.5, phi=0.0, latent_clip=0.0)
    assert q == pytest.approx(2.0, abs=0.1)
    assert qc == pytest.approx(1.0, abs=0.1)


# ------------------------------------------------------------------------------------------------------ state and resume
@each_learner_and_mode
def test_save_load_continue_equals_never_stopping(pool, learner, mode, tmp_path):
    rows, kind = [pool.rows("clean")] * 2, {"learner": learner, "mode": mode, "vae_steps": 5}

    def run(steps, resume):
        learner = make_learner(pool, rows, **kind)
        stream = torch.Generator().manual_seed(1)
        sampler = sampler_of(learner, pool, rows)
        fit(lambda t: learner.update(sampler.sample(stream), t), steps, learner, [stream], log_every=5, resume=resume)
        return learner

    whole = run(40, None)
    resume = Resume(tmp_path / "state.safetensors", "same run", every_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        stopped = make_learner(pool, rows, **kind)
        stream = torch.Generator().manual_seed(1)
        sampler = sampler_of(stopped, pool, rows)

        def step(t):
            if t == 23:
                raise KeyboardInterrupt
            return stopped.update(sampler.sample(stream), t)

        fit(step, 40, stopped, [stream], log_every=5, resume=resume)
    continued = run(40, Resume(tmp_path / "state.safetensors", "same run"))
    for name, value in whole.full_state().items():
        assert torch.equal(value, continued.full_state()[name]), name
    other = run(3, Resume(tmp_path / "state.safetensors", "another run"))       # a foreign state is ignored
    assert any(not torch.equal(v, whole.weights()[k]) for k, v in other.weights().items())


def test_pick_carries_weights_and_moments(pool):
    rows = [pool.rows("clean")] * 3
    learner = make_learner(pool, rows)
    sampler, stream = Sampler(pool, rows, 32, learner.units), torch.Generator().manual_seed(0)
    for t in range(3):
        learner.update(sampler.sample(stream), t)
    some = learner.pick([2, 0, 2])
    assert some.seeds == (2, 0, 2)
    for name, value in some.full_state().items():
        if value.dim():
            whole = learner.full_state()[name]
            members = whole.shape[0] // 3
            expected = torch.cat([whole[r * members:(r + 1) * members] for r in (2, 0, 2)])
            assert torch.equal(value, expected), name
    assert any(name.endswith("exp_avg_sq") for name in some.full_state())


@each_learner_and_mode
def test_acting_is_deterministic_given_its_generator(pool, learner, mode):
    learner = make_learner(pool, [pool.rows("clean")] * 2, learner=learner, mode=mode)
    obs = torch.randn(2, 7, 4)
    acts = [learner.act(obs, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(acts[0], acts[1])
    if hasattr(learner, "best") and mode == "default":                 # these choose among sampled actions
        assert not torch.equal(acts[0], acts[2])
    assert acts[0].shape == (2, 7, 2)
    assert acts[0].abs().max() <= 1


def test_checkpoints_of_another_shape_are_refused(pool):
    from saferule.errors import UserError
    learner = make_learner(pool, [pool.rows("clean")] * 2)
    other = make_pool(n_obs=5)
    with pytest.raises(UserError, match="another task, other network sizes"):
        learner.load_weights(make_learner(other, [other.rows("clean")] * 2).weights())
    with pytest.raises(UserError, match="another learner"):
        learner.load_weights({"x": torch.zeros(1)})
    broken = learner.weights()
    broken["lam"][0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinity in 'lam'"):
        learner.load_weights(broken)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_captured_equals_eager(pool, kind):
    """50 updates replayed from a CUDA graph against 50 eager ones, same noise: max difference 1e-6."""
    from saferule import train
    small = {"vae_steps": 5, "actor_start": 10, "batch": 32}
    cfg, states = replace(CONFIGS[kind], **{k: v for k, v in small.items() if hasattr(CONFIGS[kind], k)}), []
    for captured in (True, False):
        data = pool.to("cuda")
        rows = [data.rows("clean")] * 2
        units = Units(torch.zeros(2, 4), torch.ones(2, 4), torch.ones(2))
        learner = LEARNERS[kind](cfg, units, torch.full((2,), 2.0), [0, 1], n_act=2)
        learner = learner.to("cuda").ready()
        learner.seed_noise(0)
        stream = torch.Generator("cuda").manual_seed(1)
        learner.measure(data, rows)
        sampler = sampler_of(learner, data, rows)
        step = lambda t, l=learner, s=sampler, g=stream: l.update(s.sample(g), t)
        if captured:
            train.fit(step, 50, learner, [stream])
        else:
            for t in range(50):
                step(t)
        states.append(learner.weights())
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=1e-6, rtol=0), name
