"""The drawings of 00_start_here say what is in the pool."""
import numpy as np
import pytest
from matplotlib.colors import to_rgba

from conftest import make_pool
from saferule import sketches
from saferule.attacks import poison
from saferule.config import InjectConfig, LabelFlipConfig, SafeRULEConfig
from saferule.errors import UserError
from saferule.tasks import get_task


@pytest.fixture
def poisoned():
    pool, *_ = poison(make_pool(), "inject", InjectConfig(), donors=make_pool(seed=1), cost_limit=10.0)
    return poison(pool, "label_flip", LabelFlipConfig(), cost_limit=10.0)[0]


@pytest.mark.parametrize("task", ["BallCircle", "CarRun"])
def test_top_view_colours_every_episode_by_its_labels(task, poisoned):
    fig = sketches.top_view({"clean": make_pool(), "poisoned": poisoned}, get_task(task), limit=10.0)
    for ax, pool in zip(fig.axes, (make_pool(), poisoned)):
        drawn = [line.get_color() for line in ax.lines if len(line.get_xdata()) > 2]
        episodes = pool.episodes()
        honest = episodes[episodes.origin == 0]
        assert drawn.count(sketches.RISKY) == (honest.cost > 10).sum() > 0
        assert drawn.count(sketches.SAFE) == (honest.cost <= 10).sum() > 0
        assert drawn.count(sketches.FORGED) == (episodes.origin > 0).sum()
        xy = ax.lines[0].get_xydata()                       # the first episode: all of its observations, then the last next_obs
        first = pool.episode == 0
        first &= pool.origin == 0
        want = 10 * np.concatenate([pool.obs[first, :2], pool.next_obs[first, :2][-1:]])
        np.testing.assert_allclose(xy, want, rtol=1e-6)


def test_top_view_needs_a_boundary():
    with pytest.raises(UserError, match="HopperVelocity: only the Circle and Run tasks"):
        sketches.top_view({"clean": make_pool()}, get_task("HopperVelocity"), 20.0)


def test_conditions_figure_paints_exactly_the_rows(poisoned):
    (ax,) = sketches.conditions_figure(poisoned).axes
    image = np.asarray(ax.images[0].get_array())
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == list(poisoned.conditions()) and image.shape == (7, len(poisoned), 3)
    for line, name in zip(image, names):
        painted = (line != 1).any(-1)
        assert painted.nonzero()[0].tolist() == poisoned.rows(name).ids.tolist()
        np.testing.assert_array_equal(line[painted, 0] == to_rgba(sketches.FORGED)[0],
                                      (poisoned.origin[painted.nonzero()[0]] > 0).numpy())


def test_push_figure_shows_a_bounded_and_an_unbounded_slope():
    right = sketches.push_figure().axes[1]
    softplus, ascent = (line.get_ydata() for line in right.lines[:2])
    assert 0 < softplus.min() < 0.01 < 0.99 < softplus.max() < 1
    assert ascent.max() == pytest.approx(14) and ascent.min() == pytest.approx(-6)


def test_schedule_figure_falls_to_zero_where_relearning_starts():
    cfg = SafeRULEConfig()
    gated, ungated = (line.get_ydata() for line in sketches.schedule_figure(cfg).axes[0].lines[:2])
    assert (gated[0], ungated[0]) == (cfg.weight, cfg.weight_ungated)
    assert gated[cfg.suppress_steps - 1] > 0 and not gated[cfg.suppress_steps:].any() and len(gated) == cfg.steps + 1
