"""Gradient ascent: without guards as it ever was, with guards bounded and stopped."""
import pytest
import torch
from test_unlearning import each_learner, poisoned, small

from saferule.learners.shared import Targets
from saferule.unlearning import Memory, unlearn
from saferule.unlearning.gradient_ascent import errors, phases


def test_without_guards_every_step_is_the_plain_one():
    """Critics' loss on the retain batch minus that on the forget batch, everything else ordinary: bit for bit."""
    states = []
    for by_hand in (False, True):
        learner, pool, retain, forget = poisoned(steps=20)
        if by_hand:
            learner.seed_noise(2)
            memory = Memory(learner, pool, retain, forget, 0)
            for t in range(20):
                batch, extra = memory.retain(), None
                if t < 10:
                    bad = memory.forget()
                    y = learner.targets(bad)
                    minus = lambda loss, *at: lambda: -loss(*at)
                    extra = {"critic": minus(learner.critic_loss, bad, y), "cost_critic": minus(learner.cost_critic_loss, bad, y)}
                learner.update(batch, learner.cfg.steps + t, extra=extra)
        else:
            unlearn(learner, pool, retain, forget, "gradient_ascent", small("gradient_ascent"))
        states.append(learner.full_state())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_errors_by_hand():
    """Heads that say 0 everywhere, targets 1 and -3 for rewards, 2 and 2 for costs: mean |Q - y| is 2 for both critics."""
    learner, pool, _, forget = poisoned(steps=0)
    for name in ("critic", "cost_critic"):
        for p in getattr(learner, name).parameters():
            p.data.zero_()
    batch = learner.sampler(pool, forget).sample(torch.Generator().manual_seed(0))
    batch = batch._replace(obs=batch.obs[:, :2], action=batch.action[:, :2])
    found = errors(learner, batch, Targets(torch.tensor([[1.0, -3.0]] * 2), torch.full((2, 2), 2.0), torch.zeros(2, 2)))
    assert found["critic"].tolist() == [2, 2]
    assert found["cost_critic"].tolist() == [2, 2]


def test_an_ascent_that_has_gone_too_far_ends_for_good():
    """A bound of 0 is exceeded at once: the same as an ascent of weight 0, and the switch stays off."""
    states = []
    for cfg in ({"stop": 0.0}, {"beta": 0.0}):
        learner, pool, retain, forget = poisoned(steps=20)
        unlearn(learner, pool, retain, forget, "gradient_ascent", small("gradient_ascent", guards=True, **cfg))
        states.append(learner.weights())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    memory = Memory(learner, pool, retain, forget, 0)
    phase = next(phases(learner, memory, small("gradient_ascent", guards=True, stop=1e9), [True] * 2))
    phase.step(0)
    assert memory.carried["critic"].tolist() == [1, 1]
    memory.carried["critic"][0] = 0.0
    phase.step(1)
    assert memory.carried["critic"].tolist() == [0, 1]


@each_learner
def test_guards_keep_the_error_near_where_it_was(kind):
    """150 steps drive the error on forget rows up; with guards less far, and never much beyond `stop` times the start."""
    ends = {}
    for guards in (False, True):
        learner, pool, retain, forget = poisoned(learner=kind, steps=40, lr=3e-3)
        batch = learner.sampler(pool, forget).sample(torch.Generator().manual_seed(0))
        y = learner.targets(batch)
        before = errors(learner, batch, y)["critic"]
        cfg = small("gradient_ascent", steps=150, ascent_steps=150, guards=guards, stop=2.0)
        unlearn(learner, pool, retain, forget, "gradient_ascent", cfg)
        ends[guards] = errors(learner, batch, y)["critic"] / before
    assert ends[False].min() > 4
    assert ends[True].max() < 3


def test_the_push_of_the_guarded_ascent_is_bounded():
    """However far the values are off, the gradient that the forget rows add has a norm of at most `clip`."""
    learner, pool, retain, forget = poisoned(steps=20)
    with torch.no_grad():
        for p in list(learner.critic.parameters())[-1:]:
            p.add_(1e4)
    added, update = [], learner.update

    def watched(batch, t, target=None, extra=None):
        learner.zero_grad()
        extra["critic"]().sum().backward(inputs=list(learner.critic.parameters()))
        added.append(torch.stack([p.grad.reshape(2, -1).square().sum(1) for p in learner.critic.parameters()]).sum(0).sqrt())
        return update(batch, t, target, extra)

    learner.update = watched
    memory = Memory(learner, pool, retain, forget, 0)
    next(phases(learner, memory, small("gradient_ascent", guards=True, clip=0.5), [True] * 2)).step(0)
    assert added[0].tolist() == pytest.approx([0.5, 0.5], rel=1e-4)
