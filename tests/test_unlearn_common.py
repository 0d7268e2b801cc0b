"""What every unlearner of forget rows drawn by weight, and every one that bounds its push, shares: weights, bounds, stacking."""
import pytest
import torch
from test_unlearning import DRAWN, each_learner, isolated, killed_and_resumed, poisoned, small

from conftest import make_pool
from saferule.attacks import poison
from saferule.config import PROFILES, UNLEARNER_NAMES, InjectConfig
from saferule.data import Rows, Sampler, Units
from saferule.errors import UserError
from saferule.figures import COLOURS, MARKERS
from saferule.learners import LEARNERS
from saferule.statistics import METHODS
from saferule.train import Learner
from saferule.unlearning import missing_losses, unlearn
from saferule.unlearning.bounds import bounded, clipped_rows, gradient_norm

UNITS = Units(torch.zeros(2, 4), torch.ones(2, 4), torch.ones(2))
VARIANTS = [("gradient_ascent", {"guards": True}), ("trajdeleter", {"anchor": "far"}), ("trajdeleter", {"anchor": "off"}),
            ("early_saferule", {"lam": "gradnorm"}), ("early_saferule", {"mended": True}), ("random_relabel", {"rewards": "ramp"})]
each_variant = pytest.mark.parametrize(("method", "cfg"), VARIANTS, ids=lambda x: x if isinstance(x, str) else "-".join(x))


# ----------------------------------------------------------------------------------------------------- names
def test_every_method_has_a_name_a_colour_and_a_marker_of_its_own():
    for method in UNLEARNER_NAMES:
        assert METHODS[method] and COLOURS[method] and MARKERS[method]
    assert len(set(COLOURS.values())) == len(COLOURS)
    assert len(set(MARKERS.values())) == len(MARKERS) == len(METHODS)


def test_quick_and_standard_compare_every_method_that_works_on_critics():
    for profile in ("quick", "standard"):
        assert PROFILES[profile].methods == tuple(m for m in UNLEARNER_NAMES if not missing_losses(m, LEARNERS["bcq_lag"]))


def test_a_method_is_refused_by_learners_that_lack_what_it_needs():
    assert missing_losses("negative_preference", LEARNERS["bcq_lag"]) == ("action_density",)
    assert not missing_losses("negative_preference", LEARNERS["bc_safe"]) + missing_losses("negative_preference", LEARNERS["cdt"])
    learner, pool, retain, forget = poisoned(steps=0)
    with pytest.raises(UserError, match="'negative_preference' works on the likelihood of the data's actions, but BCQLag has no"):
        unlearn(learner, pool, retain, forget, "negative_preference", small("negative_preference"))
    for method in DRAWN:
        assert missing_losses(method, LEARNERS["cdt"])[0] == "critic"


# ----------------------------------------------------------------------------------------------------- drawing by weight
def test_rows_are_drawn_in_proportion_to_their_weights():
    """Weights 0, 1/4, 3/4, 0: row 1 in a quarter of the draws, row 2 in the rest; the mean positive weight is 1/2."""
    pool = make_pool()
    rows = [Rows(torch.tensor([3, 5, 8, 13]), torch.tensor([0.0, 0.25, 0.75, 0.0])), Rows(torch.arange(7), torch.ones(7))]
    batch = Sampler(pool, rows, 4000, UNITS).draw_by_weight().sample(torch.Generator().manual_seed(0))
    seen = {int(i): (batch.obs[0] == pool.obs[i]).all(-1).float().mean().item() for i in rows[0].ids}
    assert seen[3] == seen[13] == 0
    assert seen[5] == pytest.approx(0.25, abs=0.02)
    assert seen[8] == pytest.approx(0.75, abs=0.02)
    assert batch.weight[0].unique().tolist() == [0.5]
    assert batch.weight[1].unique().tolist() == [1.0]
    shares = (batch.obs[1][:, None] == pool.obs[:7]).all(-1).float().mean(0)
    assert torch.allclose(shares, torch.full((7,), 1 / 7), atol=0.02)


def test_without_weights_drawing_is_as_ever():
    pool, rows = make_pool(), [Rows(torch.arange(9), torch.ones(9))] * 2
    ever, drawn = (s.sample(torch.Generator().manual_seed(0)) for s in (Sampler(pool, rows, 32, UNITS),
                                                                        Sampler(pool, rows, 32, UNITS).draw_by_weight()))
    assert drawn.weight == 1.0
    assert torch.equal(ever.obs, drawn.obs)


def test_nothing_to_draw_in_one_line():
    pool = make_pool()
    with pytest.raises(UserError, match="every row of a data condition has weight 0"):
        Sampler(pool, [Rows(torch.arange(3), torch.zeros(3))] * 2, 8, UNITS).draw_by_weight()


@pytest.mark.parametrize("method", DRAWN)
def test_forget_rows_of_weight_zero_change_nothing(method):
    """As if they were not in the forget set, bit for bit."""
    states = []
    for more in (0, 40):
        learner, pool, retain, forget = poisoned(steps=20)
        ids, n = forget[0].ids, len(forget[0].ids) - 40
        weight = torch.linspace(0.5, 1, n)
        rows = [Rows(ids[:n + more], torch.cat([weight, torch.zeros(more)]))] * 2
        states.append(unlearn(learner, pool, retain, rows, method, small(method)).learner.full_state())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


# ----------------------------------------------------------------------------------------------------- bounds
def test_a_clipped_term_by_hand():
    """Losses 3 w^2 and 0.1 w at w = 2 and 1: slopes 12 and 0.1. With limit 1 the first is divided by 12, the second left alone."""
    w = torch.nn.Parameter(torch.tensor([[2.0], [1.0]]))
    loss = torch.stack([3 * w[0, 0] ** 2, 0.1 * w[1, 0]])
    assert gradient_norm(loss, [w]).tolist() == pytest.approx([12, 0.1])
    loss = bounded(loss, [w], 1.0)
    assert loss.tolist() == pytest.approx([1, 0.1])
    loss.sum().backward()
    assert w.grad.flatten().tolist() == pytest.approx([1, 0.1])


def test_ascent_runs_away_and_a_clip_makes_it_linear():
    """SGD on -w^2 from 0.1 at rate 1e-3 multiplies w by 1.002 (algorithms.md D.3): 5.44 after 2,000 steps. With slopes of at
    most 1 it passes 0.5 in step 806 and gains 1e-3 in each of the other 1,194."""
    ends = []
    for limit in (float("inf"), 1.0):
        w = torch.nn.Parameter(torch.full((1, 1), 0.1))
        for _ in range(2000):
            loss = -w[:, 0] ** 2
            loss = loss if limit == float("inf") else bounded(loss, [w], limit)
            (grad,) = torch.autograd.grad(loss.sum(), [w])
            w.data.sub_(1e-3 * grad)
        ends.append(w.item())
    assert ends[0] == pytest.approx(0.1 * 1.002**2000, rel=1e-3)
    assert ends[1] == pytest.approx(1.694, abs=0.003)


def test_rows_are_clipped_one_by_one():
    x = torch.zeros(1, 2, 2, requires_grad=True)
    out = clipped_rows(x, 1.0)
    assert torch.equal(out, x)
    out.backward(torch.tensor([[[3.0, 4.0], [0.3, 0.4]]]))
    assert x.grad.flatten().tolist() == pytest.approx([0.6, 0.8, 0.3, 0.4])


# ----------------------------------------------------------------------------------------------------- variants
@each_variant
def test_variants_isolate_replicas(method, cfg):
    isolated(method, "bcq_lag", **cfg)


@each_variant
def test_variants_resume_in_the_middle_of_the_first_phase(method, cfg, tmp_path):
    killed_and_resumed(method, "bcq_lag", tmp_path, stop=6, **cfg)


@each_learner
@pytest.mark.parametrize("method", DRAWN)
def test_stacked_equals_separate(method, kind, monkeypatch):
    """Two replicas beside each other end as each alone, given the same rows and no other randomness (float32: 1e-5)."""
    same_randomness(monkeypatch)
    apart(method, kind)


def same_randomness(monkeypatch):
    """Every replica draws the first one's rows; noise is 0."""
    rand = torch.rand

    def first(*shape, **more):
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        return rand(1, *shape[1:], **more).expand(shape) if len(shape) == 2 and shape[0] <= 2 else rand(*shape, **more)

    monkeypatch.setattr(torch, "rand", first)
    monkeypatch.setattr(Learner, "randn", lambda self, *shape, generator=None: torch.zeros(shape))


def apart(method, kind, **cfg):
    pool, _, _ = poison(make_pool(), "inject", InjectConfig(), donors=make_pool(seed=1), cost_limit=5.0)
    forget = pool.rows("inject/forget")
    forget = Rows(forget.ids, torch.linspace(0.2, 1, len(forget.ids)))
    together, *_ = poisoned(learner=kind, steps=20)
    alone = [together.pick([r]) for r in range(2)]
    runs = []
    for learner in (together, *alone):
        R = learner.replicas
        done = unlearn(learner, pool, [pool.rows("inject/retain")] * R, [forget] * R, method, small(method, **cfg))
        runs.append(done.learner.weights())
    for name, value in runs[0].items():
        assert torch.allclose(value, torch.cat([runs[1][name], runs[2][name]]), atol=1e-5, rtol=1e-5), name
