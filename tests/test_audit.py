"""Forgetting audits: statistics by hand, and models of which the answer is known."""
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import make_learner, make_pool
from saferule import forgetting
from saferule.artifacts import load, save
from saferule.audit import AUDITS, HeldOut, audit, contained, distance, membership, numbers, probes
from saferule.audit.relearning import acted, first_time, regained, separated
from saferule.config import CONFIGS, AuditConfig
from saferule.data import Pool
from saferule.errors import UserError
from saferule.learners import stack
from saferule.stages.audit import audit_models, audited, held_out_rows
from saferule.stages.poison import load_pool, make_poison
from saferule.stages.train import train
from saferule.stages.unlearn import unlearn
from saferule.tasks import get_task
from saferule.train import Resume

T = torch.tensor
SMALL = AuditConfig(trajectories=8, rows=64, samples=3, copies=2, shadow_steps=20, window=10, published_copies=2,
                    published_passes=2, relearn_steps=60, relearn_every=2, relearn_rows=64, bootstrap=100)


# ------------------------------------------------------------------------------------------------- statistics by hand
def test_wasserstein_by_hand():
    assert numbers.wasserstein(T([0.0, 1, 3]), T([8.0, 5, 6])) == 5
    assert numbers.wasserstein(T([0.0, 0]), T([0.0, 2])) == 1
    both = numbers.wasserstein(T([[0.0, 1, 3, 9], [0, 0, 7, 7]]), T([[6.0, 5, 8, -9], [2, 0, 1, 5]]),
                               T([[1, 1, 1, 0], [1, 1, 0, 0]]).bool())          # what is masked does not count
    assert both.tolist() == [5, 1]


def test_outlier_cuts_by_hand():
    assert numbers.published_cut(20, 1e-4) == pytest.approx(1.4708, abs=5e-5)
    assert numbers.grubbs_cut(20, 1e-4) == pytest.approx(3.5414, abs=5e-5)
    assert numbers.published_cut(10, 1e-4) == pytest.approx(3.2812, abs=5e-5)
    assert numbers.grubbs_cut(10, 1e-4) == pytest.approx(2.7341, abs=5e-5)
    # t(0.995, 3) = 5.8409: of four values of mean 0 and standard deviation 1, a fifth may lie 5.8409 sqrt(1.25) away
    assert numbers.prediction_cut(4, 0.01) == pytest.approx(5.84091 * 1.25**0.5, abs=1e-4)


def test_the_prediction_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(4000, 6))
    known, new = draws[:, :5], draws[:, 5]
    out = np.abs(new - known.mean(1)) > numbers.prediction_cut(5, 0.1) * known.std(1, ddof=1)
    assert out.mean() == pytest.approx(0.1, abs=0.02)


def test_auc_counts_ties_half():
    assert numbers.auc([3, 4], [1, 2]) == 1 and numbers.auc([1, 2], [3, 4]) == 0
    assert numbers.auc([1, 2], [2, 0]) == (0.5 + 0.5 + 0 + 1 + 0.5) / 4 == 0.625
    assert numbers.auc([7, 7, 7], [7, 7]) == 0.5


def test_gaussian_kl_by_hand():
    assert numbers.gaussian_kl(T(0.0), T(1.0), T(1.0), T(1.0)) == pytest.approx(0.5)
    assert numbers.gaussian_kl(T(0.0), T(1.0), T(0.0), T(2.0)) == pytest.approx(0.3181472)


def test_energy_distance():
    x = torch.randn(6, 5, 2)
    assert torch.allclose(numbers.energy(x, x), torch.zeros(5), atol=1e-6)                # shared noise, the same policy
    fixed = T([[3.0, 4.0]]).expand(4, 1, 2)
    assert torch.allclose(numbers.energy(fixed, torch.zeros(4, 1, 2)), T([5.0]))          # deterministic: the plain distance
    assert torch.allclose(numbers.energy(fixed[:1], torch.zeros(1, 1, 2)), T([5.0]))      # one draw
    coin = torch.bernoulli(torch.full((400, 1, 1), 0.5), generator=torch.Generator().manual_seed(0))
    assert numbers.energy(coin, torch.zeros(400, 1, 1)) == pytest.approx(0.5 - 0.25, abs=0.03)      # E|X| - E|X - X'| / 2


def test_distance_and_closure_by_hand():
    """Models on a line: retrained at 0, 1, 2 (4/3 apart on average), poisoned at 4 (3 from them on average)."""
    at = np.array([0.0, 1, 2, 4])
    sums = np.abs(at[:, None] - at[None, :3])[..., None].repeat(2, -1)                    # [A, G, m]: two equal trajectories
    (value,) = distance.to_retrained(sums * 5, np.array([5, 5]), [0, 1, 2], False, np.arange(2)[None])
    assert np.allclose(value, [1.5 / (4 / 3), 1 / (4 / 3), 1.5 / (4 / 3), 3 / (4 / 3)])
    assert value[:3].mean() == pytest.approx(1)
    assert np.allclose(distance.closures(value[None], [3])[0, 3], 0)
    assert distance.closures(value[None], [3])[0, :3].mean() == pytest.approx(1)
    assert np.isnan(distance.closures(np.array([[1.0, 0.9]]), [1])).all()                 # nothing to close
    squares, rows = distance.value_distances(T([[[3.0, 5.0]]]), T([[[0.0, 2.0]]]), T([[True, True]]))
    assert squares.tolist() == [[[18.0]]] and rows.tolist() == [2]                        # (3 / std 1)^2 twice
    found, _ = distance.action_distances(torch.ones(1, 1, 1, 1, 2), -torch.ones(1, 1, 1, 1, 2), T([[True]]))
    assert found.item() == pytest.approx(1)                                               # corner to corner


def test_intervals_resample_trajectories():
    values = np.r_[np.zeros(50), np.ones(50)]
    low, high = numbers.interval(lambda i: values[i].mean(-1), 100, 2000, 0)
    assert low == pytest.approx(0.4, abs=0.02) and high == pytest.approx(0.6, abs=0.02)
    member, other = np.random.default_rng(1).normal(size=(2, 3, 40))
    drawn = membership.resampled_auc(member, other, 500, 0)                               # [reps, 3 models]
    exact = [numbers.auc(a, b) for a, b in zip(member, other)]
    assert drawn.shape == (500, 3) and np.allclose(drawn.mean(0), exact, atol=0.02)
    assert np.allclose(membership.resampled_auc(member[1], other[1], 500, 0), drawn[:, 1])         # paired over models
    assert (membership.resampled_auc(np.ones(5), np.zeros(4), 9, 0) == 1).all()
    assert (membership.resampled_auc(np.ones(5), np.ones(4), 9, 0) == 0.5).all()


def test_matching_takes_the_nearest_pairs():
    i, j = membership.match(np.array([[0.0], [10.0], [20.0]]), np.array([[21.0], [1.0]]))
    assert sorted(zip(i.tolist(), j.tolist())) == [(0, 1), (2, 0)]


# ---------------------------------------------------------------------------------------------------------- TrajAuditor
def test_value_vectors_accumulate_within_windows():
    assert contained.accumulate(T([1.0, 2.0, 4.0]), 0.5, window=2).tolist() == [2, 2, 4]
    assert contained.accumulate(T([[1.0, 2.0, 4.0]]), 0.5, window=128).tolist() == [[3, 4, 4]]


def family(shift=0.0, n=8, seed=0, m=200):
    """Shadows [n, m, T = 5] of n models that differ by a number per trajectory."""
    offset = torch.randn(n, m, 1, generator=torch.Generator().manual_seed(seed))
    return offset + shift + torch.arange(5.0)


def classes(agents, inside, outside, base_in=None, base_out=None):
    """Shares of CONTAINED, GONE, NEITHER per agent: [A, 3]."""
    bases = [range(len(f)) if b is None else b for f, b in ((inside, base_in), (outside, base_out))]
    found = contained.classify(agents, [inside, outside], bases, torch.ones(inside.shape[1:], dtype=torch.bool), 0.01)
    return torch.nn.functional.one_hot(found, 3).double().mean(1)


def test_one_more_of_a_family_belongs_to_it_and_a_stranger_to_neither():
    inside, outside = family(seed=2), family(shift=20.0, seed=3)
    agents = [family(seed=1)[0], family(shift=20.0, seed=1)[0], family(shift=-20.0, seed=1)[0], family(shift=10.0, seed=1)[0],
              inside.mean(0)]
    share = classes(torch.stack(agents), inside, outside)
    assert share[0, contained.CONTAINED] > 0.95 and share[1, contained.GONE] > 0.95
    assert share[2:4, contained.NEITHER].min() > 0.95                          # beyond, and half way
    assert share[4, contained.CONTAINED] == 1                                  # nearer than usual is no reason for doubt


def test_models_are_counted_and_not_their_copies():
    """Two models per family, four nearly equal copies of each: a third model is one of them almost as often as 0.99 says."""
    base, draw = [i for i in range(2) for _ in range(4)], torch.Generator().manual_seed(3)
    copied = lambda models: models[base] + 0.3 * torch.randn(8, 2000, 1, generator=draw)
    models, others = family(n=3, m=2000), family(shift=1000.0, n=2, m=2000, seed=5)
    inside, outside = copied(models), copied(others)
    share = lambda *bases: float(classes(models[2:], inside, outside, *bases)[0, contained.CONTAINED])
    assert share(base, base) > 0.93 > 0.9 > share(range(8), range(8))          # copies taken for models: a third looks strange
    own = contained.own_distances(inside, torch.tensor(base), torch.ones(2000, 5, dtype=torch.bool))
    assert own.mean() == pytest.approx(float((models[0] - models[1]).abs().mean()), rel=0.1)      # from the other model
    alone = contained.own_distances(inside[:4], torch.zeros(4), torch.ones(2000, 5, dtype=torch.bool))
    assert alone.mean() < 0.4                                                  # of one model, copies are all there is


def test_what_is_published_calls_the_nearest_forgotten():
    shadows, mask = family(n=20), torch.ones(200, 5, dtype=torch.bool)
    verdict = contained.looks_contained_as_published(shadows.mean(0), shadows, mask, 1e-4)
    assert verdict.double().mean() < 0.75                                      # the family's own mean is an 'outlier'
    one_more = contained.looks_contained_as_published(family(seed=1)[0], shadows, mask, 1e-4)
    corrected = classes(family(seed=1)[:1], shadows, family(shift=1000.0, n=20, seed=4))[0, contained.CONTAINED]
    assert one_more.double().mean() < 0.9 < corrected                          # 'forgotten' is over-declared


# --------------------------------------------------------------------------------------------------------------- relearn
def test_relearn_time_by_hand():
    steps = [0, 10, 20, 30]
    assert first_time(steps, [0.0, 0.4, 0.5, 0.9], 0.5) == (20, True)
    assert first_time(steps, [1.0, 0.9, 0.2, 0.9], 0.5) == (0, True)           # it never lost it
    assert first_time(steps, [0.0, 0.1, 0.1, 0.2], 0.5) == (30, False)         # censored
    assert separated([0.9, 1.1], [-0.1, 0.2]) and not separated([0.4, 1.6], [0.0, 0.0]) and not separated([1.0, 1.0], [0.6, -0.6])


def test_what_is_regained_by_hand():
    """One state, poisoned models at 3 and 5, retrained ones at -1 and 1: from the mean 4 they are 1 and 4 away on average."""
    at = np.array([3.0, 5, -1, 1, 2, -8])[None, :, None, None]                            # [P, R, n, n_act]
    later = np.concatenate([at, at + 1])
    assert np.allclose(regained(later, [0, 1], [2, 3]), [[1, 1, -1 / 3, 1 / 3, 2 / 3, -8 / 3], [4 / 3, 2 / 3, 0, 2 / 3, 1, -7 / 3]])
    assert np.isnan(regained(at, [0, 2], [3, 4])).all() and not separated(np.array([np.nan]), np.array([np.nan]))


# ------------------------------------------------------------------------------------------------- probes, stacked models
@pytest.fixture
def rows_of_two():
    pool = make_pool(episodes=6, horizon=12)
    clean = pool.rows("clean")
    return pool, clean, make_learner(pool, [clean, clean, clean], seeds=[3, 4, 5])


def test_trajectories_are_sorted_padded_and_chosen():
    pool = make_pool(episodes=4, horizon=6)
    found = probes.trajectories(pool, T([8, 6, 3, 1, 2, 20]))
    assert found.ids.tolist() == [[1, 2, 3], [6, 8, 6], [20, 20, 20]]
    assert found.mask.tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    some = probes.trajectories(pool, torch.arange(24), most=2, seed=1)
    assert some.ids.shape == (2, 6) and len(set(pool.episode[some.ids[:, 0]].tolist())) == 2
    assert probes.every_few(probes.trajectories(pool, torch.arange(24)), 8).ids[0].tolist() == [0, 3]
    assert probes.trajectories(pool, torch.arange(0)).ids.shape == (0, 0)


@pytest.mark.parametrize("kind", ["bcq_lag", "cpq", "cdt", "bc_multitask"])
def test_what_a_replica_does_depends_on_itself_alone(kind):
    pool = make_pool(episodes=6, horizon=12)
    clean = pool.rows("clean")
    learner = make_learner(pool, [clean] * 3, learner=kind)
    along = probes.trajectories(pool, clean.ids)
    done = probes.actions(learner, pool, along, samples=2)
    assert done.shape == (2, 3, 6, 12, 2)
    assert torch.equal(done[:, 2:], probes.actions(learner.pick([2]), pool, along, samples=2))
    assert torch.equal(done[:, :1], probes.actions(learner.pick([0, 2]), pool, along, samples=2)[:, :1])


def test_scores_and_values_of_a_replica_depend_on_itself_alone(rows_of_two):
    pool, clean, learner = rows_of_two
    along = probes.trajectories(pool, clean.ids)
    score = membership.scores(learner, pool, along)
    assert score.shape == (2, 3, 6) and (score < 0).all()
    assert torch.equal(score[:, 1:2], membership.scores(learner.pick([1]), pool, along))
    both = torch.stack(probes.values(learner, pool.obs, pool.action))
    assert torch.allclose(both[:, 1:2], torch.stack(probes.values(learner.pick([1]), pool.obs, pool.action)), atol=1e-5)
    seen = acted(learner, pool, [clean.ids[:5], clean.ids[5:10], clean.ids[:5]])
    assert seen.shape == (3, 5, 2)
    alone = learner.pick([0, 1, 1])
    assert torch.equal(seen[0], acted(alone, pool, [clean.ids[:5], clean.ids[9:14], clean.ids[:5]])[0])


def test_values_are_in_raw_units_and_scores_are_td_errors(rows_of_two):
    pool, clean, learner = rows_of_two
    q, qc = probes.values(learner, pool.obs[:5], pool.action[:5])
    obs = learner.standardise(pool.obs[:5].expand(3, 5, -1))
    action = pool.action[:5].expand(3, 5, -1)
    assert torch.allclose(q, learner.critic(obs, action).amin(1) * learner.reward_scale[:, None])
    assert torch.allclose(qc, learner.cost_critic(obs, action).amax(1))
    done = Pool({**pool.columns, "terminal": torch.ones_like(pool.terminal)})            # no bootstrap: the error is q - r
    score = membership.scores(learner, done, probes.Trajectories(torch.arange(5)[:, None], torch.ones(5, 1, dtype=torch.bool)))
    heads = learner.critic(obs, action) * learner.reward_scale[:, None, None]
    assert torch.allclose(score[0], -(heads - pool.reward[:5]).square().mean(1), rtol=1e-4)
    assert torch.allclose(score[1], -(learner.cost_critic(obs, action) - pool.cost[:5]).square().mean(1), rtol=1e-4)


# ------------------------------------------------------------------------------------ whole audits, the answer being known
def attacked_pool(seed=0):
    """Forged episodes are added: one action in all of them, a high reward, no cost."""
    pool = make_pool(episodes=24, horizon=15, seed=seed)
    new = {k: v[:10 * 15].clone() for k, v in make_pool(episodes=10, horizon=15, seed=seed + 1).columns.items() if k != "origin"}
    new |= {"action": torch.full_like(new["action"], 0.9), "reward": torch.full_like(new["reward"], 3.0),
            "cost": torch.zeros_like(new["cost"]), "episode": new["episode"] + 24}
    return pool.append("inject", new)


def held_out(seed=2):
    pool = make_pool(episodes=10, horizon=15, seed=seed)
    forged = {**pool.columns, "action": torch.full_like(pool.action, 0.9), "reward": torch.full_like(pool.reward, 3.0),
              "cost": torch.zeros_like(pool.cost)}
    return HeldOut(Pool(forged), torch.arange(len(pool)))


def known_answers(learner="bcq_lag", steps=300, cfg=SMALL):
    """Three poisoned, three retrained models, and two 'methods' that give back the poisoned or retrained model of the next seed."""
    pool, seeds = attacked_pool(), (0, 1, 2)
    lines = [{"attack": "inject", "method": m, "seed": s, "cost_limit": 20.0, "artefact": "a"} for m in ("poisoned", "retrain")
             for s in seeds]
    rows = [pool.rows(f"inject/{part}") for part in ("poisoned", "retain") for _ in seeds]
    model = make_learner(pool, rows, seeds=[0, 1, 2, 1000, 1001, 1002], learner=learner, lr=3e-3, tau=0.05, samples=2,
                         act_samples=4)
    probes.go_on(model, pool, rows, steps, 0)
    turned = [1, 2, 0]
    made = [{"attack": "inject", "method": m, "seed": s, "cost_limit": 20.0, "artefact": "b"} for m in ("finetune", "saferule")
            for s in seeds]
    models = stack([model, model.pick(turned), model.pick([3 + i for i in turned])]).ready()
    found = audit(models, lines + made, model, pool, {"inject": held_out()}, cfg)
    return found, found.audits.set_index(["audit", "method", "seed"]).value.sort_index()


@pytest.fixture(scope="module")
def known():
    return known_answers()


def test_the_two_ends_come_out_the_right_way_round(known):
    found, value = known
    assert set(found.audits.audit) <= set(AUDITS)
    mean = lambda audit, method: value[audit, method].mean()
    for name in ("contained_q", "contained_c"):
        assert mean(name, "poisoned") > 0.7 and mean(name, "retrain") < 0.1
    for name in ("distance_action", "distance_q", "distance_c"):
        assert value[name, "poisoned"].min() > 1.3 and mean(name, "retrain") == pytest.approx(1)
    for name in ("closure_action", "closure_q", "closure_c"):
        assert mean(name, "poisoned") == pytest.approx(0) and mean(name, "retrain") == pytest.approx(1)
    assert (value["relearn", "poisoned"] == 0).all() and value["relearn", "retrain"].min() > 0.3


def test_a_model_that_is_poisoned_or_retrained_looks_it(known):
    """'finetune' hands back the poisoned model of the next seed, 'saferule' the retrained one."""
    found, value = known
    for name in ("contained_q", "contained_c"):
        assert value[name, "finetune"].mean() > 0.7 and value[name, "saferule"].max() < 0.1
    gone = found.outcomes.set_index(["audit", "method"]).sort_index().gone
    assert gone["contained_q", "saferule"].mean() > 0.7 and gone["contained_q", "finetune"].max() < 0.1
    assert np.allclose(found.outcomes[["contained", "gone", "neither"]].sum(axis=1), 1)
    for seed, twin in ((0, 1), (1, 2), (2, 0)):
        for name in ("mia_q", "mia_c", "distance_action", "distance_q", "closure_c", "relearn"):
            if name != "relearn":                                              # trained side by side with other noise
                assert value[name, "finetune", seed] == pytest.approx(value[name, "poisoned", twin])
        assert value["mia_q", "saferule", seed] == pytest.approx(value["mia_q", "retrain", twin])
        assert value["delta_mia_q", "finetune", seed] == pytest.approx(
            value["mia_q", "finetune", seed] - value["mia_q", "retrain"].mean())
    assert (value["relearn", "finetune"] == 0).all() and 0.3 < value["relearn", "saferule"].median() < 3


def test_intervals_are_there_and_hold_the_value(known):
    rows = known[0].audits
    shares = rows[rows.audit.str.startswith(("contained", "mia", "delta", "distance"))]
    assert (shares.low <= shares.value + 1e-9).all() and (shares.value <= shares.high + 1e-9).all()
    assert any("membership inference compares 8" in note for note in known[0].notes)
    assert (rows.n > 0).all() and np.isfinite(rows.value).all()
    assert len(rows) == len(rows.drop_duplicates(["audit", "method", "seed"]))


def test_without_a_time_to_compare_with_there_is_none():
    """With hardly a step to relearn in, retrained models never do."""
    found, _ = known_answers(steps=150, cfg=replace(SMALL, relearn_steps=2, relearn_every=1, shadow_steps=1))
    assert "relearn" not in set(found.audits.audit)
    assert any("no relearn time: not every retrained model" in note for note in found.notes)


def test_without_critics_only_actions_are_audited():
    for kind in ("bc_all", "cdt"):
        found, value = known_answers(kind, steps=60)
        assert set(found.audits.audit) == {"distance_action", "closure_action"}
        assert value["distance_action", "poisoned"].min() > value["distance_action", "retrain"].max()
        assert any("only its actions are audited" in note for note in found.notes)


def test_relearning_and_shadows_survive_a_kill(tmp_path, monkeypatch):
    pool = attacked_pool()
    rows = [pool.rows("inject/poisoned")] * 2

    def run(resume=None, stop=99):
        learner = make_learner(pool, rows)
        def steps(of):
            for t in of:
                if t == stop:
                    raise KeyboardInterrupt
                yield t
        probe = lambda: {"actions": acted(learner, pool, [rows[0].ids] * 2)}
        return probes.go_on(learner, pool, rows, 12, 0, resume, steps, dict.fromkeys(range(0, 13, 4), probe))

    monkeypatch.setattr(Resume, "due", lambda self: True)
    whole, place = run(), lambda: Resume(tmp_path / "state.safetensors", "key")
    with pytest.raises(KeyboardInterrupt):
        run(place(), stop=7)
    again = run(place())
    assert sorted(again) == [0, 4, 8, 12]
    assert all(torch.equal(again[t]["actions"], whole[t]["actions"]) for t in whole)


# --------------------------------------------------------------------------------------------------- the stage, the table
TASK, SEEDS = get_task("BallRun"), (0, 1)
TINY = {"steps": 30, "vae_steps": 5, "batch": 16, "hidden": [8], "vae_hidden": 8}
FEW = {"trajectories": 4, "rows": 32, "samples": 2, "copies": 2, "shadow_steps": 2, "published_copies": 1, "relearn_steps": 4,
       "relearn_every": 2, "bootstrap": 20}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Data made by hand (no simulator), two attacks, two seeds, one method."""
    root = tmp_path_factory.mktemp("runs") / "runs" / "smoke"
    data, donors = (make_pool(episodes=n, horizon=30, n_obs=TASK.n_obs, n_act=TASK.n_act, seed=s) for n, s in ((40, 0), (45, 1)))
    files = {"pool.safetensors": data.tensors(), "donors.safetensors": donors.tensors(), "episodes.csv": data.episodes()}
    save("data", "BallRun", files, {"task": "BallRun", "cost_limit": 20.0}, root=root)
    for attack in ("inject", "label_flip"):
        make_poison(TASK, attack, "smoke", root)
    train(TASK, "bcq_lag", ("inject", "label_flip"), SEEDS, "smoke", root, overrides=TINY)
    unlearn(TASK, "bcq_lag", ("inject", "label_flip"), "finetune", SEEDS, "smoke", root, overrides={"steps": 4})
    return root, audit_models(TASK, "bcq_lag", ("finetune",), "smoke", root, overrides=FEW)


def test_the_stage_audits_every_model_of_the_chain(chain):
    root, made = chain
    table = made.table("audits.csv")
    assert ",".join(table.columns) == "task,learner,attack,method,seed,cost_limit,audit,value,low,high,n,artefact"
    models = table.groupby(["attack", "method", "seed"])
    assert len(models) == 2 * 3 * 2 and (table.cost_limit == 20).all()
    for name in ("contained_q", "contained_c", "contained_published", "mia_q", "delta_mia_c", "distance_action"):
        assert len(table[table.audit == name]) == 12, name
    assert table[table.audit.str.startswith("contained")].value.between(0, 1).all()
    trained, repaired = load("train", "BallRun-bcq_lag", root), load("unlearn", "BallRun-bcq_lag-finetune", root)
    assert set(table[table.method == "finetune"].artefact) == {repaired.short}
    assert set(table[table.method != "finetune"].artefact) == {trained.short}
    assert {k: v["id"] for k, v in made.manifest["inputs"].items()}["train"] == trained.id
    everything, found = audited(root)
    assert everything.equals(table) and [a.id for a in found] == [made.id]
    assert not list((root / "checkpoints").glob("audit*"))


def test_the_same_again_gives_the_same_bytes(chain):
    root, made = chain
    assert audit_models(TASK, "bcq_lag", ("finetune",), "smoke", root, overrides=FEW).id == made.id


def test_stale_and_missing_inputs_are_named(chain, tmp_path):
    shutil.copytree(chain[0], tmp_path / "runs" / "smoke")
    root = tmp_path / "runs" / "smoke"
    train(TASK, "bcq_lag", ("inject",), SEEDS, "smoke", root, overrides={**TINY, "steps": 31})
    with pytest.raises(UserError, match="unlearn BallRun-bcq_lag-finetune was made from another training run"):
        audit_models(TASK, "bcq_lag", ("finetune",), "smoke", root, overrides=FEW)
    assert audited(root)[0].empty                                              # what belongs to another training is left out
    with pytest.raises(UserError, match="setting of audit 'copys'. Did you mean 'copies'"):
        audit_models(TASK, "bcq_lag", (), "smoke", root, overrides={"copys": 1})
    train(TASK, "bcq_lag", (), SEEDS, "smoke", root, overrides=TINY)
    with pytest.raises(UserError, match="no poisoned models"):
        audit_models(TASK, "bcq_lag", (), "smoke", root, overrides=FEW)


def test_non_members_are_held_out_and_forged_alike(chain):
    root, _ = chain
    pool, inputs = load_pool(TASK, ("inject", "label_flip"), root)
    for attack in ("inject", "label_flip"):
        made, starts = inputs[f"poison:{attack}"], {tuple(s) for s in pool.obs[pool.rows(f"{attack}/poisoned").ids].tolist()}
        other, ids = held_out_rows(attack, pool, inputs["data"], made)
        assert len(ids) and not starts & {tuple(s) for s in other.obs[ids].tolist()}     # nobody has seen them
        assert (other.cost[ids] == 0).all()
        donors = Pool.from_tensors(inputs["data"].tensors("donors.safetensors"))
        bonus = made.json("facts.json").get("reward_bonus", 0.0)
        honest = {tuple(s): r for s, r in zip(donors.obs.tolist(), donors.reward.tolist())}
        assert all(r == pytest.approx(honest[tuple(s)] + bonus, abs=1e-5)
                   for s, r in zip(other.obs[ids].tolist(), other.reward[ids].tolist()))


def test_where_nothing_is_held_out_it_says_why(chain, tmp_path):
    root, _ = chain
    pool, inputs = load_pool(TASK, ("inject", "label_flip"), root)
    data, made = inputs["data"], inputs["poison:label_flip"]
    assert "cannot be mounted" in held_out_rows("pgd_cost", pool, data, made)
    bare = save("data", "BallRun", {"pool.safetensors": data.tensors("pool.safetensors")}, data.config, root=tmp_path)
    reason = held_out_rows("label_flip", pool, bare, made)
    assert reason == "the data hold no held-out episodes."


def tidy(poisoned=0.9, retrained=0.1, low=np.nan):
    head = {"task": "BallRun", "learner": "bcq_lag", "attack": "inject", "cost_limit": 20.0, "n": 5, "artefact": "a"}
    lines = [{**head, "method": m, "seed": s, "audit": a, "value": v + 0.01 * s, "low": low, "high": np.nan}
             for a in ("contained_q", "relearn") for m, v in (("poisoned", poisoned), ("retrain", retrained), ("saferule", 0.2))
             for s in (0, 1)]
    return pd.DataFrame(lines)


def test_the_table_shows_every_seed_and_bounds_as_such():
    shown = forgetting.forgetting_table(tidy(low=0.5)).set_index("method")
    assert shown.loc["Poisoned", "contained, Q"] == "0.9/0.91" and shown.loc["Safe-RULE", "relearn time"] == ">0.2/>0.21"
    assert shown.loc["Retrained", "distance, Q"] == "–"


def test_a_calibration_that_fails_is_said():
    told = forgetting.calibration(tidy()).set_index("audit").told_apart
    assert told["contained_q"] and not told["relearn"]                         # poisoned models relearn sooner, not later
    assert "Not by relearn time" in forgetting.calibration_note(tidy())
    assert not forgetting.calibration(tidy(0.1, 0.105)).told_apart.iloc[0]
    figure = forgetting.forgetting_figure(tidy(), "title")
    assert len(figure.axes) == 2 and any("not told apart" in t.get_text() for ax in figure.axes for t in ax.texts)


def test_audits_need_no_simulator():
    """'No environment' holds for the audits, too: they import and run where no simulator can be imported."""
    code = textwrap.dedent("""
        import sys
        for name in ("gymnasium", "gym", "pybullet", "bullet_safety_gym", "mujoco", "mujoco_py", "d4rl"):
            sys.modules[name] = None                                           # importing any of these now fails
        sys.path.insert(0, sys.argv[1])
        from test_audit import SMALL, known_answers, replace
        import saferule.stages.audit
        found, _ = known_answers(steps=5, cfg=replace(SMALL, relearn_steps=2, relearn_every=1, shadow_steps=1))
        print("audited", len(found.audits) > 50)
    """)
    out = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True)
    assert out.stdout.strip() == "audited True", out.stderr


def test_the_smoke_audit_is_smaller_than_the_default():
    from saferule.config import resolve
    small, usual = (resolve(p, "audit", "BallRun") for p in ("smoke", "quick"))
    assert small["shadow_steps"] < usual["shadow_steps"] == CONFIGS["audit"].shadow_steps
