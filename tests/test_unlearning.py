"""Unlearners: suppression by hand, signs, bounds, isolation, equality with fine-tuning, and no simulator anywhere."""
import math
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import make_learner, make_pool, sampler_of
from saferule.attacks import poison
from saferule.config import CONFIGS, UNLEARNER_NAMES, FinetuneConfig, InjectConfig, SafeRULEConfig
from saferule.data import Rows
from saferule.errors import UserError
from saferule.learners import LEARNERS
from saferule.learners.shared import Targets
from saferule.train import Resume
from saferule.unlearning import Memory, possible, unlearn
from saferule.unlearning.saferule import gate, margins, pushes, suppress, temptation

WITH_CRITICS = [name for name, kind in LEARNERS.items() if {"critic", "cost_critic"} <= set(kind.LOSSES)]
DRAWN = ("gradient_ascent", "random_relabel", "trajdeleter", "early_saferule")       # forget rows drawn by weight
each_learner = pytest.mark.parametrize("kind", WITH_CRITICS)
METHODS = possible(UNLEARNER_NAMES, LEARNERS["bcq_lag"])
each_method = pytest.mark.parametrize("method", METHODS)


def small(method, **more):
    fast = {"finetune": {"steps": 20}, "finetune_nstep": {"steps": 20, "suppress_steps": 15},
            "gradient_ascent": {"steps": 20, "ascent_steps": 10}, "random_relabel": {"steps": 20},
            "trajdeleter": {"steps": 20, "rounds": 2, "block": 4}, "early_saferule": {"steps": 20, "unlearn_steps": 15},
            "negative_preference": {"steps": 20, "repel_steps": 15},
            "saferule": {"steps": 20, "suppress_steps": 15, "gate_steps": 30}}
    return replace(CONFIGS[method], **{**fast[method], **more})


def poisoned(steps=60, replicas=2, **cfg):
    pool, _, _ = poison(make_pool(), "inject", InjectConfig(), donors=make_pool(seed=1), cost_limit=5.0)
    rows = [pool.rows("inject/poisoned")] * replicas
    learner = make_learner(pool, rows, **{"steps": steps, **cfg})
    sampler, stream = sampler_of(learner, pool, rows), torch.Generator().manual_seed(3)
    for t in range(steps):
        learner.update(sampler.sample(stream), t)
    return learner, pool, [pool.rows("inject/retain")] * replicas, [pool.rows("inject/forget")] * replicas


# ------------------------------------------------------------------------------------------------------- suppression
def test_suppression_by_hand():
    """softplus(0) = log 2 at the margin; slopes sg(v - m) downwards and -sg(m - v) upwards (algorithms.md D.7.1)."""
    value = torch.tensor([[[1.0], [3.0]]], requires_grad=True)                 # R 1, E 2, B 1
    margin = torch.tensor([[1.0]])
    down = suppress(value, margin, 1.0, -1)
    expected = torch.nn.functional.softplus(torch.tensor([0.0, 2.0])).sum()
    assert down.item() == pytest.approx(expected.item())
    down.sum().backward()
    assert value.grad.flatten().tolist() == pytest.approx([0.5, torch.sigmoid(torch.tensor(2.0)).item()])
    value.grad = None
    up = suppress(value, margin, 1.0, +1)
    up.sum().backward()
    assert value.grad.flatten().tolist() == pytest.approx([-0.5, -torch.sigmoid(torch.tensor(-2.0)).item()])


def test_suppression_gradient_at_the_margin_is_half_the_weight():
    """d/dC at C = b equals -a .5 w / B (algorithms.md D.7.10, case 5), and rows of weight 0 have no influence."""
    value = torch.full((1, 1, 4), 2.0, requires_grad=True)
    suppress(value, torch.full((1, 4), 2.0), torch.tensor([[0.8, 0.8, 0.0, 0.4]]), +1).sum().backward()
    assert value.grad.flatten().tolist() == pytest.approx([-0.1, -0.1, 0.0, -0.05])


def test_suppression_is_bounded_where_ascent_is_not():
    far = torch.tensor([[[-1e6, 1e6]]], requires_grad=True)
    suppress(far, torch.zeros(1, 2), 1.0, -1).sum().backward()
    assert far.grad.abs().max() <= 0.5                                         # 1 / B
    assert suppress(far, torch.zeros(1, 2), 1.0, -1).item() >= 0


def test_margins_by_hand():
    learner, *_ = poisoned(steps=0)
    learner.value = lambda obs, generator=None: (torch.tensor([[5.0, 1.0]]), torch.tensor([[0.5, 9.0]]))
    learner.qc_limit.fill_(3.0)
    low, high = margins(learner, None, SafeRULEConfig(margin=1.0, cost_floor=2.0), None)
    assert low.tolist() == [[4.0, 0.0]]
    assert high[0].tolist() == [6.0, 10.0]
    _, high = margins(learner, None, SafeRULEConfig(cost_sign=-1), None)
    assert high[0].tolist() == [-0.5, 8.0]


def test_gate_opens_only_where_the_label_is_a_lie():
    """Cost is 1[obs_0 > 0] in the retain rows; forged rows say 0 everywhere: their gate is near 1 exactly where obs_0 > 0."""
    pool = make_pool(episodes=40)
    pool.columns["cost"] = (pool.next_obs[:, 0] > 0).float()
    forged = {k: v[:200].clone() for k, v in pool.columns.items() if k != "origin"}
    truth = forged["cost"].clone()
    forged["cost"].zero_()
    forged["replaces"] = torch.arange(200)
    pool = pool.append("x", forged)
    rows = [pool.rows("x/retain")]
    learner = make_learner(pool, rows)
    (g,) = gate(learner, Memory(learner, pool, rows, [pool.rows("x/forget")], 0), steps=300)
    clear = forged["next_obs"][:, 0].abs() > 0.3
    assert g[clear & (truth == 1)].mean() > 0.85
    assert g[clear & (truth == 0)].mean() < 0.15


# -------------------------------------------------------------------------------------------------------- the methods
@each_learner
def test_signs_forget_values_fall_and_forget_costs_rise(kind):
    learner, pool, retain, forget = poisoned(learner=kind, steps=300, gamma=0.5, tau=0.1, lr=3e-3)       # values have settled
    ids = forget[0].ids
    obs, act = learner.standardise(pool.obs[ids][None].expand(2, -1, -1)), pool.action[ids][None].expand(2, -1, -1)
    before = learner.critic(obs, act).mean(), learner.cost_critic(obs, act).mean()
    cfg = small("saferule", steps=100, suppress_steps=100, gate="off", weight_ungated=1.5)
    unlearn(learner, pool, retain, forget, "saferule", cfg)
    assert learner.critic(obs, act).mean() < before[0]
    assert learner.cost_critic(obs, act).mean() > before[1]


@each_learner
def test_all_weights_zero_equals_fine_tuning_bit_for_bit(kind):
    results = []
    nothing = small("saferule", weight=0.0, weight_ungated=1e-30, n_step_mix=0.0, freeze_lam=False, tau=0.02)
    for method, cfg in (("finetune", FinetuneConfig(steps=20)), ("saferule", nothing)):
        learner, pool, retain, forget = poisoned(learner=kind)
        if method == "finetune":
            learner.reset_optimiser("vae")                                     # Safe-RULE refits the VAE with fresh moments
        results.append(unlearn(learner, pool, retain, forget, method, cfg).learner.full_state())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_rows_of_weight_zero_are_as_if_absent():
    """Forget rows with weight 0 leave the same learner as no suppression at all."""
    results = []
    for weight in (0.0, 1.0):
        learner, pool, retain, forget = poisoned()
        rows = [Rows(f.ids.clone(), f.weight * weight) for f in forget]
        cfg = small("saferule", gate="off", weight_ungated=1.0 if weight == 0 else 0.0)
        results.append(unlearn(learner, pool, retain, rows, "saferule", cfg).learner.weights())
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


@each_learner
@each_method
def test_replicas_do_not_touch_each_other(method, kind):
    isolated(method, kind, **({"gate": "off"} if method == "saferule" else {}))


def isolated(method, kind, **cfg):
    """NaN in the forget rows of replica 0 leaves replica 1 as it was."""
    states = []
    for hurt in (False, True):
        learner, pool, retain, forget = poisoned(learner=kind, steps=20)
        if hurt:
            broken = pool.to("cpu")
            broken.columns["obs"] = pool.obs.clone()
            extra = {k: v[:50].clone() for k, v in pool.columns.items() if k != "origin"}
            extra["obs"][:] = float("nan")
            extra["replaces"][:] = -1
            broken = broken.append("x", extra)
            forget, pool = [broken.rows("x/forget"), forget[1]], broken
        states.append(unlearn(learner, pool, retain, forget, method, small(method, **cfg)))
    for name, value in states[0].learner.weights().items():
        members = value.shape[0] // 2
        assert torch.equal(value[members:], states[1].learner.weights()[name][members:]), name


@each_learner
@each_method
def test_killed_and_resumed_equals_never_stopping(method, kind, tmp_path):
    killed_and_resumed(method, kind, tmp_path, stop=17)


def killed_and_resumed(method, kind, folder, stop, **cfg):
    """A run killed in step `stop` and resumed ends as one that never stopped: weights, moments, snapshots, history."""
    def run(resume, stop=None):
        def steps(span):
            for t in span:
                if t == stop:
                    raise KeyboardInterrupt
                yield t

        learner, pool, retain, forget = poisoned(learner=kind, steps=20)
        return unlearn(learner, pool, retain, forget, method, small(method, **cfg), later_steps=10, snapshots_at=(0, 8, 20, 30),
                       resume=resume, log_every=5, progress=steps)

    whole = run(None)
    path = folder / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(Resume(path, "k", every_seconds=0), stop)
    again = run(Resume(path, "k"))
    for name, value in whole.learner.full_state().items():
        assert torch.equal(value, again.learner.full_state()[name]), name
    assert sorted(again.snapshots) == [0, 8, 20, 30]
    for at, weights in whole.snapshots.items():
        assert all(torch.equal(v, again.snapshots[at][k]) for k, v in weights.items())
    assert whole.history.frame().equals(again.history.frame())


def test_phases_fill_the_budget_exactly():
    for method in METHODS:
        learner, pool, retain, forget = poisoned(steps=5)
        done = unlearn(learner, pool, retain, forget, method, small(method), later_steps=7)
        assert sum(n for name, n in done.phases if name != "later") == small(method).steps
        assert done.phases[-1] == ("later", 7)
        assert done.history.steps[-1] == small(method).steps + 7


def test_multiplier_is_frozen_during_the_budget_and_free_afterwards():
    learner, pool, retain, forget = poisoned(qc_limit=0.1)
    lam = learner.lam.clone()
    assert lam.min() > 0
    unlearn(learner, pool, retain, forget, "saferule", small("saferule"))
    assert torch.equal(learner.lam, lam)
    unlearn(learner, pool, retain, forget, "saferule", small("saferule"), later_steps=5)
    assert not torch.equal(learner.lam, lam)
    assert learner.cfg.tau == 0.02                                             # the tuned rate is given back


def test_temptation_by_hand():
    """Merit Q - lam Qc with lam 1/2: the forged action 4 - 1/2 * 2 = 3, the policy's 5 - 1/2 * 2 = 4, margin 1: exactly 1/2."""
    learner, *_ = poisoned(steps=0, replicas=1)
    learner.lam.fill_(0.5)
    heads = lambda low, high: lambda obs, action: torch.tensor([[[low], [high]]])
    learner.critic.forward, learner.cost_critic.forward = heads(4.0, 9.0), heads(1.0, 2.0)  # min of Q, max of Qc
    nowhere = SimpleNamespace(obs=None, action=None)
    cfg = SafeRULEConfig(margin=1.0, temptation=0.5)
    found = lambda v, vc: temptation(learner, nowhere, torch.tensor([[v]]), torch.tensor([[vc]]), cfg).item()
    assert found(5.0, 2.0) == pytest.approx(0.5)
    assert found(3.0, 2.0) == pytest.approx(1 / (1 + math.exp(-(3 - 2 + 1) / 0.5)))         # better than the policy's own by 1
    assert found(9.0, 2.0) < 0.001                                                          # no temptation at all
    assert found(5.0, 4.0) == pytest.approx(1 / (1 + math.exp(-2.0)))                       # a dearer policy: 3 - 3 + 1


@each_learner
def test_what_does_not_tempt_is_not_pushed(kind):
    learner, pool, retain, forget = poisoned(learner=kind, steps=20)
    push = lambda **cfg: pushes(learner, learner, Memory(learner, pool, retain, forget, 0), small("saferule", **cfg),
                                torch.ones(2, 1))
    always, softened = push(temptation=0.0), push(temptation=0.5)
    for name in ("critic", "cost_critic"):
        assert (softened[name]() < always[name]()).all()                                   # a weight in (0, 1) per row
    assert push(temptation=0.5, margin=-1e6)["critic"]().abs().max() == 0                  # worse than the policy's own by far


@pytest.mark.parametrize("falls", [True, False])
def test_share_of_the_long_targets_falls_with_the_weight(falls, monkeypatch):
    """In step t of 3 the target is (1 - w) 1-step + w n-step with w = mix (1 - t / 3); constant without `anneal_mix`."""
    learner, *rest = poisoned(steps=5)
    seen = []
    short, long = (torch.zeros(2, 32), torch.ones(2, 32))
    learner.targets = lambda batch: Targets(*[long if isinstance(batch.steps, torch.Tensor) else short] * 3)
    real = learner.update
    learner.update = lambda batch, t, target=None, push=None: (seen.append(target), real(batch, t, target, push))[1]
    cfg = small("saferule", steps=3, suppress_steps=3, n_step_mix=0.9, anneal_mix=falls, weight=0.0, weight_ungated=0.0)
    unlearn(learner, *rest, "saferule", cfg)
    assert [t.reward.mean().item() for t in seen] == pytest.approx([0.9, 0.6, 0.3] if falls else [0.9] * 3)


# --------------------------------------------------------------------------------------------- the ablation's switches
def pushed(**cfg):
    """A poisoned learner, one forget batch, and the terms that are added to its losses at weight 0.5."""
    learner, pool, retain, forget = poisoned(steps=20, qc_limit=0.1)
    memory = Memory(learner, pool, retain, forget, 0)
    batch = Memory(learner, pool, retain, forget, 0).forget()                  # the same stream: what `pushes` will draw
    return learner, batch, pushes(learner, learner, memory, small("saferule", **cfg), torch.full((2, 1), 0.5))


def test_ascent_adds_minus_the_bellman_error_of_the_forget_batch():
    learner, batch, push = pushed(form="ascent", beta=2.0)
    state = learner.noise.get_state()
    target = learner.targets(batch)
    learner.noise.set_state(state)
    error = (learner.cost_critic(batch.obs, batch.action) - target.cost[:, None]).square().mean(-1).sum(1)
    found = push["cost_critic"]()
    again = learner.cost_critic_loss(batch, target)
    assert torch.allclose(again, error) and found.shape == (2,)
    assert found.max() < 0
    _, _, single = pushed(form="ascent", beta=1.0)
    assert torch.allclose(found, 2 * single["cost_critic"]())


def test_a_share_of_zero_or_a_sign_of_zero_leaves_a_critic_alone():
    assert "cost_critic" not in pushed(cost_sign=0)[2]
    assert pushed(alpha=0.0)[2]["critic"]().abs().max() == 0
    assert pushed(beta=0.0)[2]["cost_critic"]().abs().max() == 0
    assert pushed()[2]["critic"]().min() > 0 and "actor" not in pushed()[2]


def test_forget_states_enter_the_actors_loss_and_reach_the_actor_only():
    learner, _, push = pushed(gap=2.0)
    loss = push["actor"]()
    assert loss.shape == (2,)
    grads = torch.autograd.grad(loss.sum(), list(learner.actor.parameters()), retain_graph=True)
    assert any(bool((g != 0).any()) for g in grads)
    assert torch.allclose(loss, 2 * pushed(gap=1.0)[2]["actor"](), atol=1e-6)


@pytest.mark.parametrize("anneal, expected", [(True, [1.0, 2 / 3, 1 / 3, 0.0]), (False, [1.0, 1.0, 1.0, 0.0])])
def test_weight_falls_linearly_or_stays(anneal, expected, monkeypatch):
    seen = []
    monkeypatch.setattr("saferule.unlearning.saferule.pushes",
                        lambda learner, source, memory, cfg, w: seen.append(w.flatten().tolist()))
    cfg = small("saferule", steps=4, suppress_steps=3, gate="off", weight_ungated=1.0, anneal=anneal)
    unlearn(*poisoned(steps=5), "saferule", cfg)
    assert [w for w, _ in seen] + [0.0] == pytest.approx(expected)             # no push in the step of relearning


def test_frozen_margins_are_those_of_the_checkpoint(monkeypatch):
    for margins_of, same in (("frozen", True), ("live", False)):
        learner, *rest = poisoned(steps=20)
        before, seen = learner.weights(), []
        real = pushes
        def spy(learner, source, *more, real=real, seen=seen):
            seen.append({k: v.clone() for k, v in source.weights().items()})
            return real(learner, source, *more)
        monkeypatch.setattr("saferule.unlearning.saferule.pushes", spy)
        unlearn(learner, *rest, "saferule", small("saferule", margins=margins_of))
        assert all(torch.equal(v, before[k]) for k, v in seen[-1].items()) == same
        monkeypatch.undo()


def test_a_frozen_vae_stays_during_the_budget_and_is_fitted_afterwards():
    vae = lambda learner: torch.cat([p.detach().flatten() for p in learner.vae.parameters()])
    for later, same in ((0, True), (5, False)):
        learner, *rest = poisoned(steps=20)
        before = vae(learner)
        unlearn(learner, *rest, "saferule", small("saferule", fit_vae=False), later_steps=later)
        assert torch.equal(vae(learner), before) == same
        assert not learner.frozen


@pytest.mark.parametrize("wrong", [{"form": "hinge"}, {"margins": "dead"}])
def test_an_unknown_switch_in_one_line(wrong):
    with pytest.raises(UserError, match="unknown"):
        unlearn(*poisoned(steps=0), "saferule", small("saferule", **wrong))


def test_unknown_method_in_one_line():
    learner, pool, retain, forget = poisoned(steps=0)
    with pytest.raises(UserError, match="unknown method 'safe_rule'. Did you mean 'saferule'"):
        unlearn(learner, pool, retain, forget, "safe_rule", None)


def test_unlearning_needs_no_simulator():
    """The method promises 'no environment': it imports and runs where gymnasium and pybullet cannot be imported."""
    code = textwrap.dedent("""
        import sys
        for name in ("gymnasium", "gym", "pybullet", "bullet_safety_gym", "mujoco", "mujoco_py", "d4rl"):
            sys.modules[name] = None                                           # importing any of these now fails
        sys.path.insert(0, sys.argv[1])
        from test_unlearning import METHODS, poisoned, small, unlearn
        for method in METHODS:
            unlearn(*poisoned(steps=3), method, small(method))
        unlearn(*poisoned(steps=3, learner="cdt"), "negative_preference", small("negative_preference"))
        print("repaired")
    """)
    out = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True)
    assert out.stdout.strip() == "repaired", out.stderr
