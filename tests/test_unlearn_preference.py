"""Negative preference for BC and CDT: losses by hand, bounds, what moves, isolation, resuming, stacking."""
import math

import pytest
import torch
from test_unlearn_common import apart, same_randomness
from test_unlearning import isolated, killed_and_resumed, poisoned, small

from saferule.data import Rows
from saferule.errors import UserError
from saferule.unlearning import Memory, unlearn
from saferule.unlearning.negative_preference import forget_sampler, hinge, log_ratio, loss, phases, preference

METHOD = "negative_preference"
each_imitator = pytest.mark.parametrize("kind", ["bc_all", "bc_multitask", "cdt"])


def test_preference_by_hand():
    """algorithms.md D.8: value and slope at q = 0 and -3, sharpness 1 and 0.1; nothing below -dead_zone / beta."""
    for q, beta, value, slope in ((0.0, 1.0, 1.3862944, 1.0), (-3.0, 1.0, 0.0971747, 0.0948517), (-3.0, 0.1, None, 0.8511150)):
        q = torch.tensor(q, requires_grad=True)
        out = preference(q, beta, 3.0)
        out.backward()
        assert value is None or out.item() == pytest.approx(value, abs=1e-6)
        assert q.grad.item() == pytest.approx(slope, abs=1e-6)
    q = torch.tensor([-3.01, 1e6], requires_grad=True)
    preference(q, 1.0, 3.0).sum().backward()
    assert q.grad.tolist() == [0, 2]


def test_log_ratio_by_hand():
    """Standard deviation 0.1, action (0, 0), mean (0.1, 0) against (0, 0): -1/2. Twice as wide there: -log 2 per dimension."""
    a = torch.zeros(1, 1, 2)
    log_std = math.log(0.1)
    assert log_ratio(a, torch.tensor([[[0.1, 0.0]]]), log_std, a, log_std).item() == pytest.approx(-0.5)
    assert log_ratio(a, a, torch.full((2,), math.log(0.2)), a, torch.full((2,), log_std)).item() == pytest.approx(-2 * math.log(2))


def test_hinge_by_hand():
    """At the action itself d = 0.001; on the other side of the box d = 1; slope at most softness x 1 / softness x 1 / 2."""
    a = torch.tensor([[1.0, 1.0]])
    assert hinge(a, a, 0.2, 0.05).item() == pytest.approx(0.05 * math.log1p(math.exp(0.199 / 0.05)), rel=1e-5)
    assert hinge(a, -a, 0.2, 0.05).item() == pytest.approx(0.05 * math.log1p(math.exp(-0.8 / 0.05)), rel=1e-3)


@each_imitator
def test_the_push_is_bounded_per_row_and_spares_the_standard_deviation(kind):
    """Even far from the action, a row moves the mean by at most clip / rows; log-std gets nothing; weight 0 gets nothing."""
    learner, pool, retain, forget = poisoned(learner=kind, steps=5)
    batch = forget_sampler(learner, Memory(learner, pool, retain, forget, 0)).sample(torch.Generator().manual_seed(0))
    shape = batch.action.shape
    mean = torch.empty(shape).uniform_(-1, 1, generator=torch.Generator().manual_seed(1)).requires_grad_()
    log_std = torch.full(shape, -5.0, requires_grad=True) if kind == "cdt" else None
    weight = (torch.arange(shape[1]) % 2).float()[None].expand(shape[:2])
    weight = weight if len(shape) == 3 else weight[..., None] * batch.mask
    learner.action_density = lambda batch: (mean, log_std)
    reference, *_ = poisoned(learner=kind, steps=0)
    reference.action_density = lambda batch: (mean.detach() + 0.01, None if log_std is None else log_std.detach())
    cfg = small(METHOD, hinge=0.0)
    out = loss(learner, reference, batch._replace(weight=weight), cfg)
    assert out.shape == (2,)
    out.sum().backward()
    norms = mean.grad.norm(dim=-1)
    count = (weight > 0).flatten(1).sum(1)
    assert (norms.flatten(1).amax(1) * count).tolist() == pytest.approx([cfg.clip] * 2, rel=1e-4)
    assert norms[weight == 0].max() == 0
    assert log_std is None or log_std.grad is None


@each_imitator
def test_forget_actions_get_unlikely_and_retain_actions_stay(kind):
    learner, pool, retain, forget = poisoned(learner=kind, steps=60, lr=3e-3, warm_up=10)
    sampler = forget_sampler(learner, Memory(learner, pool, retain, forget, 0))
    bad = sampler.sample(torch.Generator().manual_seed(0))
    good = learner.sampler(pool, learner.select_rows(pool, retain, learner.cfg, [5.0] * 2)).sample(torch.Generator().manual_seed(0))
    chosen = bad.weight > 0 if isinstance(bad.weight, torch.Tensor) else torch.ones(bad.action.shape[:-1], dtype=torch.bool)

    def distance(batch, where=slice(None)):
        return (learner.action_density(batch)[0] - batch.action).norm(dim=-1)[where].mean().item()

    before = distance(bad, chosen), distance(good)
    good_rows = learner.select_rows(pool, retain, learner.cfg, [5.0] * 2)
    unlearn(learner, pool, good_rows, forget, METHOD, small(METHOD, steps=60, repel_steps=60))
    assert distance(bad, chosen) > before[0] + 0.05
    assert distance(good) < before[1] + 0.3


def test_windows_start_at_forget_rows_amid_what_the_learner_was_trained_on():
    """A forget set of scattered rows: every window starts at one; the retain rows beside are seen with weight 0."""
    learner, pool, _, _ = poisoned(learner="cdt", steps=0)
    ids = torch.arange(len(pool.reward))
    forget, retain = Rows(ids[ids % 5 == 2], torch.full((len(ids[ids % 5 == 2]),), 0.5)), Rows(ids[ids % 5 != 2], torch.ones(1))
    retain = retain._replace(weight=torch.ones(len(retain.ids)))
    batch = forget_sampler(learner, Memory(learner, pool, [retain] * 2, [forget] * 2, 0)).sample(torch.Generator().manual_seed(0))
    assert batch.weight[..., 0].unique().tolist() == [0.5]
    assert batch.weight[..., 1:].unique().tolist() == [0]
    assert batch.mask[..., 1:].mean() > 0.8
    nothing = forget._replace(weight=torch.zeros(len(forget.ids)))
    with pytest.raises(UserError, match="no row of positive weight lies in an episode whose end"):
        forget_sampler(learner, Memory(learner, pool, [retain] * 2, [nothing] * 2, 0))


def test_cdt_learns_at_full_rate_in_the_budget_and_slowly_afterwards():
    learner, pool, retain, forget = poisoned(learner="cdt", steps=5, lr=1e-3, warm_up=1)
    rates = []
    for later in (0, 1):
        unlearn(learner, pool, retain, forget, METHOD, small(METHOD, steps=4, repel_steps=2, rate=0.5), later_steps=later)
        rates.append(learner.rate.item())
    assert rates == pytest.approx([0.5e-3, learner.cfg.lr_end * 1e-3])


def test_entropy_weight_rests_while_repelling_and_moves_again_afterwards():
    learner, pool, retain, forget = poisoned(learner="cdt", steps=5)
    before = learner.temperature.log.detach().clone()
    unlearn(learner, pool, retain, forget, METHOD, small(METHOD, steps=5, repel_steps=5))
    assert torch.equal(learner.temperature.log, before)
    unlearn(learner, pool, retain, forget, METHOD, small(METHOD, steps=5, repel_steps=3))
    assert not torch.equal(learner.temperature.log, before)


@pytest.mark.parametrize("kind", ["bc_all", "cdt"])
def test_replicas_do_not_touch_each_other(kind):
    isolated(METHOD, kind)


@pytest.mark.parametrize("kind", ["bc_all", "cdt"])
def test_killed_and_resumed_equals_never_stopping(kind, tmp_path):
    killed_and_resumed(METHOD, kind, tmp_path, stop=6)


@pytest.mark.parametrize("kind", ["bc_all", "cdt"])
def test_stacked_equals_separate(kind, monkeypatch):
    same_randomness(monkeypatch)
    apart(METHOD, kind, rate=0.05)     # keys' bias: no gradient but rounding, which Adam follows at full rate


@pytest.mark.parametrize("kind", ["bc_all", "cdt"])
def test_rows_of_weight_zero_are_as_if_absent(kind):
    """With weight 0 everywhere but on one row, only that row is pushed away from."""
    learner, pool, retain, forget = poisoned(learner=kind, steps=5)
    weight = torch.zeros(len(forget[0].ids))
    weight[7] = 1.0
    memory = Memory(learner, pool, retain, [Rows(forget[0].ids, weight)] * 2, 0)
    reference = learner.pick(range(2))
    batch = forget_sampler(learner, memory).sample(torch.Generator().manual_seed(0))
    cfg = small(METHOD)
    out = loss(learner, reference, batch, cfg)
    there = batch.weight > 0
    action, mean = batch.action[there], learner.action_density(batch)[0][there]
    expected = cfg.weight * 2 / cfg.beta * math.log(2) + cfg.hinge * hinge(action, mean, cfg.margin, cfg.softness)      # q = 0
    expected = torch.stack([expected[there.nonzero()[:, 0] == r].sum() / max(int(there[r].sum()), 1) for r in range(2)])
    assert torch.allclose(out, expected, atol=1e-5)
    assert next(phases(learner, memory, cfg, [True] * 2)).name == "repel"
