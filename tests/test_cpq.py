"""CPQ: every loss against cases worked out by hand, its quantile, what OSRL's inert term does, and probe problems."""
import pytest
import torch
from test_learners import constant, row

from conftest import make_learner
from saferule.config import CPQConfig
from saferule.data import Batch, Sampler, Units
from saferule.learners import LEARNERS
from saferule.learners.cpq import quantile


def one_replica(mode="default", limit=3.17, **cfg):
    units = Units(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1))
    small = {"mode": mode, "vae_steps": 0, "hidden": (4,), "vae_hidden": 4, "samples": 2, "gamma": 0.9,
             "clone": 0.0}
    learner = LEARNERS["cpq"](CPQConfig(**{**small, **cfg}), units, torch.tensor([limit]), [0], n_act=1).ready()
    learner.seed_noise(0)
    return learner


def of_action(q, c):
    """Critics that answer q(a) and c(a) [heads] instead of their networks."""
    def patch(learner, name, f):
        getattr(learner, name).forward = lambda obs, a: torch.stack([torch.as_tensor(x, dtype=a.dtype).expand(a.shape[:2])
                                                                     for x in f(a[..., 0])], 1)
    pairs = [(name + end, f) for end in ("", "_target") for name, f in (("critic", q), ("cost_critic", c))]
    return lambda learner: [patch(learner, name, f) for name, f in pairs]


# ------------------------------------------------------------------------------------------------------------- targets
@pytest.mark.parametrize(("mode", "cost", "y", "yc"), [
    ("default", (1, 3), 1 + 0.9 * 2, 0.5 + 0.9 * 2),                   # Q min(2, 4); safe by C max 3 <= 3.17; C mean backed up
    ("default", (1, 4), 1 + 0.9 * -6, 0.5 + 0.9 * 2.5),                # 4 > 3.17: worth `worst`
    ("parity", (1, 4), 1 + 0.9 * 2, 0.5 + 0.9 * 1),                    # C min: safe
    ("parity", (4, 9), 1.0, 0.5 + 0.9 * 4)])                           # unsafe: worth 0
def test_targets_by_hand(mode, cost, y, yc):
    learner = one_replica(mode)
    constant(learner.critic_target.net, [2, 4])
    constant(learner.cost_critic_target.net, cost)
    learner.worst.fill_(-6.0 if mode == "default" else 0.0)
    target = learner.targets(row())
    assert target.reward.item() == pytest.approx(y)
    assert target.cost.item() == pytest.approx(yc)


def test_what_terminal_rows_and_long_targets_do():
    """Default: a terminal row is worth exactly r and c. Parity: its cost target goes on (algorithms.md B.8, case 1)."""
    for mode, cost in (("default", 0.5), ("parity", 0.5 + 0.9 * 1)):
        learner = one_replica(mode)
        constant(learner.critic_target.net, [2, 4])
        constant(learner.cost_critic_target.net, [1, 3])
        target = learner.targets(row(done=1.0))
        assert target.reward.item() == 1.0
        assert target.cost.item() == pytest.approx(cost)
        target = learner.targets(row(steps=torch.full((1, 1), 3.0)))
        assert target.reward.item() == pytest.approx(1 + 0.9**3 * 2)


def test_worst_follows_the_low_rewards_and_never_exceeds_zero():
    learner = one_replica(tau=1.0, worst_quantile=0.0)
    learner.watch(torch.tensor([[0.3, 2.0]]))
    assert learner.worst.item() == 0.0
    learner.watch(torch.tensor([[-0.3, 2.0]]))
    assert learner.worst.item() == pytest.approx(-0.3 / 0.1)
    parity = one_replica("parity", tau=1.0)
    parity.watch(torch.tensor([[-0.3, 2.0]]))
    assert parity.worst.item() == 0.0


# ------------------------------------------------------------------------------------------------------ actor and acting
def test_actor_loss_by_hand():
    """Q = min(2, 4). C = max(1, 3) <= 3.17: -2. C = 5: default -worst + retreat (5 - 3.17), parity 0 and no gradient."""
    learner = one_replica(retreat=0.5)
    constant(learner.critic.net, [2, 4])
    constant(learner.cost_critic.net, [1, 3])
    assert learner.actor_loss(row()).item() == pytest.approx(-2)
    constant(learner.cost_critic.net, [1, 5])
    learner.worst.fill_(-7)
    assert learner.actor_loss(row()).item() == pytest.approx(7 + 0.5 * (5 - 3.17))
    parity = one_replica("parity")
    constant(parity.cost_critic.net, [4, 5])
    before = parity.weights()
    parity.minimise("actor", parity.actor_loss(row()))
    assert all(torch.equal(v, before[k]) for k, v in parity.weights().items())


@pytest.mark.parametrize(("cost", "sign"), [(lambda a: (a, a), 1), (lambda a: (9 + a, 9 + 2 * a), -1)])
def test_the_actor_climbs_value_where_safe_and_descends_cost_where_not(cost, sign):
    learner = one_replica(lr_actor=0.05)
    of_action(lambda a: (a, a), cost)(learner)
    batch, before = row(), None
    for _ in range(20):
        before = learner.actor(batch.obs)[0].item() if before is None else before
        learner.minimise("actor", learner.actor_loss(batch))
    assert sign * (learner.actor(batch.obs)[0].item() - before) > 0.1


def test_acting_is_the_squashed_mean_and_a_clone_learns_the_data():
    """Cloned to a = .5, the actor acts .5: the median of its actions. It acts by the average of its weights."""
    learner, batch = one_replica(vae_steps=400, lr_actor=0.02, tau=1.0), row()._replace(action=torch.full((1, 1, 1), 0.5))
    for _ in range(400):
        learner.minimise("actor", learner.clone_loss(batch))
        learner.minimise("vae", learner.vae_loss(batch))
    assert learner.act(batch.obs, torch.Generator()).item() != pytest.approx(0.5, abs=0.05)
    learner.polyak("actor")
    assert learner.act(batch.obs, torch.Generator()).item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(learner.act(batch.obs, torch.Generator()), learner.actor(batch.obs)[0].tanh())


def test_the_clone_term_is_added_to_the_actors_loss():
    """mean 0, std 1, a = tanh(.5): -log-likelihood .5^2 / 2, weighted by 2; parity has no such term."""
    for mode in ("default", "parity"):
        learner = one_replica(mode, clone=2.0)
        for net, value in ((learner.critic.net, [2, 4]), (learner.cost_critic.net, [1, 3])):
            constant(net, value)
        with torch.no_grad():
            for p in learner.actor.parameters():
                p.zero_()
        batch = row()._replace(action=torch.full((1, 1, 1), 0.5).tanh())
        assert learner.actor_loss(batch).item() == pytest.approx(-2 + (2 * 0.125 if mode == "default" else 0), abs=1e-5)


# -------------------------------------------------------------------------------------------------------- strange actions
def test_quantile_is_that_of_torch_for_each_replica():
    x = torch.randn(3, 41)
    for q in (0.0, 0.1, 0.75, 1.0):
        assert torch.allclose(quantile(x, q), torch.quantile(x, q, dim=1, keepdim=True), atol=1e-6)
    assert quantile(torch.randn(1, 20_000_000), 0.5).abs().item() < 0.01           # torch.quantile refuses this size


@pytest.mark.parametrize("mode", ["default", "parity"])
def test_strange_actions_of_one_replica_do_not_depend_on_the_others(pool, mode):
    """Replica 1's VAE is made wildly strange: replica 0's selection stays as it was; parity selects a quarter of each."""
    rows = [pool.rows("clean")] * 2
    learner = make_learner(pool, rows, learner="cpq", mode=mode, ood_quantile=0.75, samples=6)
    batch = Sampler(pool, rows, 32, learner.units).sample(torch.Generator().manual_seed(0))
    first = learner.strange(batch)[2]
    with torch.no_grad():
        learner.vae.encoder.layers[-1].bias[1] += 50
    learner.seed_noise(0)
    second = learner.strange(batch)[2]
    assert torch.equal(first[0], second[0])
    if mode == "parity":
        assert first.mean(-1).tolist() == pytest.approx([0.25, 0.25], abs=0.01)


def test_strange_term_by_hand():
    """Two actions, KL of 0 and 9 (made), C = 1 and 3, limit 2 x 2: the strange one falls short by 1; half of all are strange."""
    learner = one_replica(limit=2.0, ood_limit=2.0, alpha=0.1)
    obs = torch.zeros(1, 2, 1)
    a = torch.tensor([[[0.1], [0.3]]])
    learner.strange = lambda batch: (obs, a, torch.tensor([[0.0, 1.0]]))
    of_action(None, lambda a: (10 * a, 10 * a))(learner)
    term, short = learner.strange_term(row())
    assert term.item() == pytest.approx(0.1 * (4 - 3) / 2)
    assert short.item() == pytest.approx(4 - 3)
    a[0, 1] = 0.7                                                      # C = 7, beyond its limit: no push, alpha shall fall
    term, short = learner.strange_term(row())
    assert term.item() == 0
    assert short.item() == pytest.approx(4 - 7)
    parity = one_replica("parity", limit=2.0, ood_limit=2.0, alpha=0.1)
    parity.strange = learner.strange
    of_action(None, lambda a: (10 * a, 20 * a))(parity)
    term, short = parity.strange_term(row())                           # others count as 0: K = 7 / 2
    assert short.item() == pytest.approx(4 - 3.5)
    assert term.item() == pytest.approx(0.1 * 0.5)


def test_alpha_by_hand():
    """log alpha += lr alpha short, within [-5, 5]; it can be frozen."""
    learner = one_replica(alpha=1.0, lr_alpha=0.5)
    learner.ascend_alpha(torch.tensor([0.4]))
    assert learner.log_alpha.item() == pytest.approx(0.2)
    with learner.tuned(adapt_lam=False):
        learner.ascend_alpha(torch.tensor([0.4]))
    assert learner.log_alpha.item() == pytest.approx(0.2)
    learner.ascend_alpha(torch.tensor([1e3]))
    assert learner.log_alpha.item() == 5
    learner.ascend_alpha(torch.tensor([-1e3]))
    assert learner.log_alpha.item() == -5


def test_the_strange_term_reaches_the_cost_critic_in_default_mode_only(pool):
    """OSRL's term has no gradient: with or without it the parameters are the same bit for bit (algorithms.md B.8, case 4)."""
    rows = [pool.rows("clean")] * 2
    for mode in ("default", "parity"):
        states = []
        for dropped in (False, True):
            learner = make_learner(pool, rows, learner="cpq", mode=mode, lr_alpha=0.0, ood_quantile=0.5)
            if dropped:
                whole = learner.strange_term
                learner.strange_term = lambda batch, f=whole: tuple(0 * x for x in f(batch))       # the noise is still drawn
            sampler, stream = Sampler(pool, rows, 32, learner.units), torch.Generator().manual_seed(0)
            for t in range(5):
                learner.update(sampler.sample(stream), t)
            states.append(learner.weights())
        same = {k: torch.equal(v, states[1][k]) for k, v in states[0].items()}
        assert all(same.values()) == (mode == "parity")
        assert same["vae.encoder.layers.0.weight"]


def test_strange_actions_become_costly():
    """Data take a = .5 at no cost. Trained, the cost critic tells a = -.9 from it, and only with the term."""
    one = torch.ones(1, 32, 1)
    noise = 0.05 * torch.randn(1, 32, 1, generator=torch.Generator().manual_seed(0))
    batch = Batch(0 * one, 0.5 * one + noise, one[..., 0], 0 * one[..., 0], 0 * one, one[..., 0])
    costs = []
    for alpha in (1.0, 1e-9):
        learner = one_replica(vae_steps=300, alpha=alpha, lr=1e-2, hidden=(16, 16), vae_hidden=16, samples=8, adapt_lam=False,
                              lr_actor=0.0)
        with torch.no_grad():
            learner.actor.log_std.bias.fill_(0.5)                      # a wide actor, which stays so
        for t in range(600):
            learner.update(batch, t)
        costs.append([learner.cost_critic(batch.obs, a * one).mean().item() for a in (0.5, -0.9)])
    assert costs[0][1] > 1.0 > 0.5 > costs[0][0]
    assert abs(costs[1][0]) < 0.3


# ------------------------------------------------------------------------------------------------------ probe problems
def run_probe(batch, steps=1000, **cfg):
    learner = one_replica(**{"tau": 0.1, "lr": 3e-3, "alpha": 1e-9, "adapt_lam": False, "clone": 10.0, **cfg})
    for t in range(steps):
        learner.update(batch, t)
    return learner.critic(batch.obs, batch.action).mean().item(), learner.cost_critic(batch.obs, batch.action).mean().item()


@pytest.mark.parametrize("mode", ["default", "parity"])
def test_probe_one_row_that_ends(mode):
    """One terminal row: Q = r; C = c unless parity, which lets it go on."""
    q, qc = run_probe(row(reward=1.0, cost=0.5, done=1.0), steps=600, mode=mode)
    assert q == pytest.approx(1.0, abs=0.02)
    if mode == "default":
        assert qc == pytest.approx(0.5, abs=0.02)


def test_probe_self_loop():
    """A state that returns to itself under the data's action for ever: C = c / (1 - gamma); Q = r / (1 - gamma) where that is safe.

    Where it is not, every action is worth `worst` = 0 (no reward is negative): Q = r.
    """
    batch = row(reward=1.0, cost=0.5)
    batch = batch._replace(next_obs=batch.obs)
    q, qc = run_probe(batch, gamma=0.5, vae_steps=300)
    assert q == pytest.approx(2.0, abs=0.2)
    assert qc == pytest.approx(1.0, abs=0.2)
    q, qc = run_probe(batch, gamma=0.5, vae_steps=300, limit=0.3)
    assert q == pytest.approx(1.0, abs=0.1)
