"""The early Safe-RULE code: its actor's terms by hand, as published and mended; what it moves and what it leaves alone."""
from types import SimpleNamespace

import pytest
import torch
from test_unlearning import each_learner, poisoned, small

from saferule.config import EarlySafeRULEConfig
from saferule.data import Batch
from saferule.errors import UserError
from saferule.unlearning import Memory, unlearn
from saferule.unlearning.early_saferule import actor_terms, phases, policy_values, slowed


def toy(theta):
    """A policy that always takes action theta; heads Q = s a and s a + 9, Qc = s a + 1 and s a + 7; limit 0.5."""
    heads = lambda low, high: lambda obs, a: torch.stack([(obs * a)[..., 0] + low, (obs * a)[..., 0] + high], 1)
    return SimpleNamespace(critic=heads(0, 9), cost_critic=heads(1, 7), actor=None, qc_limit=torch.tensor([[0.5]]),
                           sample=lambda actor, obs: theta.expand(*obs.shape[:-1], 1))


def batches():
    row = lambda s, a: Batch(*[torch.tensor([[[x]]]) for x in (s, a)], *[None] * 4)
    return row(1.0, 0.5), row(3.0, 1.0)


def test_actor_terms_by_hand_as_published():
    """A(k) = 0.5 - theta, A(f) = 3 - 3 theta, the same for costs: at theta = 1/4 both gaps are -2, slope 2 in theta."""
    theta = torch.tensor(0.25, requires_grad=True)
    gain, price, excess = actor_terms(toy(theta), *batches(), 1.0, EarlySafeRULEConfig(samples=2, target=10.0))
    assert gain.item() == price.item() == -2
    assert excess.item() == -12
    assert torch.autograd.grad(gain.sum(), theta)[0].item() == 2                   # -dQ/d theta at s_k + dQ/d theta at s_f


def test_actor_terms_by_hand_mended():
    """E_pi Q(k) + eta E_pi Q(f) = theta + 3 eta theta; costs one more each; excess theta + 1 - 0.5."""
    theta = torch.tensor(0.25, requires_grad=True)
    cfg = EarlySafeRULEConfig(samples=2, mended=True, eta=0.5)
    gain, price, excess = actor_terms(toy(theta), *batches(), 1.0, cfg)
    assert gain.item() == pytest.approx(0.25 + 0.375)
    assert price.item() == pytest.approx(1.25 + 0.5 * 1.75)
    assert excess.item() == pytest.approx(0.75)
    assert torch.autograd.grad(gain.sum(), theta)[0].item() == pytest.approx(2.5)


def test_the_flaw_and_its_repair():
    """On retain states alone (forget rows not trusted at all) descent lowers Q as published, and raises it when mended."""
    slopes = []
    for mended in (False, True):
        theta = torch.tensor(0.25, requires_grad=True)
        gain, price, _ = actor_terms(toy(theta), *batches(), torch.zeros(1), EarlySafeRULEConfig(samples=2, mended=mended))
        slopes.append([-torch.autograd.grad(x.sum(), theta)[0].item() for x in (-gain, price)])       # of descent
    assert slopes == [[-1, 1], [1, -1]]


@each_learner
def test_policy_values_reach_the_actor_alone_through_its_actions(kind):
    learner, pool, retain, _ = poisoned(learner=kind, steps=0)
    obs = learner.sampler(pool, retain).sample(torch.Generator().manual_seed(0)).obs
    for value in policy_values(learner, obs, 3):
        assert value.shape == (2, 32)
        grads = torch.autograd.grad(value.sum(), list(learner.actor.parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in grads)


@each_learner
def test_generator_multiplier_and_rates_stay_and_the_rest_moves(kind):
    learner, pool, retain, forget = poisoned(learner=kind, qc_limit=0.1, steps=20)
    before, rates = learner.weights(), [g["lr"] for o in learner.optim.values() for g in o.param_groups]
    unlearn(learner, pool, retain, forget, "early_saferule", small("early_saferule", steps=15))
    kept = {name.split(".")[0] for name, value in learner.weights().items() if torch.equal(value, before[name])}
    moved = {name.split(".")[0] for name, value in learner.weights().items() if not torch.equal(value, before[name])}
    assert moved == {n for n in ("critic", "cost_critic", "actor", "critic_target", "cost_critic_target", "actor_target")
                     if hasattr(learner, n)}
    assert "vae" in kept and {"lam", "log_alpha"} & kept
    assert [g["lr"] for o in learner.optim.values() for g in o.param_groups] == rates


def test_dual_weight_is_gone_in_two_steps_and_the_others_hold():
    """Gaps far below the target of 10: 1 -> 1 + 0.1 (G_c - 10), about 0, -> 0 (algorithms.md D.6)."""
    seen = {}
    for lam in ("dual", "fixed", "gradnorm"):
        learner, pool, retain, forget = poisoned(steps=20)
        memory = Memory(learner, pool, retain, forget, 0)
        phase = next(phases(learner, memory, small("early_saferule", lam=lam), [True] * 2))
        seen[lam] = [phase.step(t) for t in range(3)]
    price = seen["dual"][0]["price"]
    assert torch.allclose(seen["dual"][0]["lam"], (1 + 0.1 * (price - 10)).clamp(0, 10))
    assert seen["dual"][2]["lam"].tolist() == [0, 0]
    assert seen["fixed"][2]["lam"].tolist() == [1, 1]
    assert all(((s["lam"] > 0) & (s["lam"] <= 10)).all() for s in seen["gradnorm"])
    assert len({tuple(s["lam"].tolist()) for s in seen["gradnorm"]}) == 3


def test_rates_are_given_back_after_an_error():
    learner, *_ = poisoned(steps=0)
    with pytest.raises(UserError), slowed(learner, ["critic"], 0.1):
        assert learner.optim["critic"].param_groups[0]["lr"] == pytest.approx(1e-4)
        raise UserError("stop")
    assert learner.optim["critic"].param_groups[0]["lr"] == 1e-3


def test_an_unknown_weight_of_the_cost_in_one_line():
    with pytest.raises(UserError, match="unknown weight of the cost 'grad_norm'. Did you mean 'gradnorm'"):
        unlearn(*poisoned(steps=0), "early_saferule", small("early_saferule", lam="grad_norm"))
