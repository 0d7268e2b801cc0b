"""The chain on the real simulator, tiny: artefacts in, artefacts out, lineage, resume, and refusals."""
import dataclasses
import shutil

import numpy as np
import pytest
import torch

from saferule import config as settings
from saferule.artifacts import load
from saferule.errors import UserError
from saferule.learners import restore, restored_snapshots, stack
from saferule.stages.data import make_data
from saferule.stages.evaluate import evaluate
from saferule.stages.poison import load_pool, make_poison
from saferule.stages.train import replica_table, rows_of, train
from saferule.stages.unlearn import unlearn
from saferule.tasks import get_task

TASK, ATTACKS, SEEDS = get_task("BallRun"), ("inject", "label_flip"), (0, 1)
TINY = {"data": {"episodes": 40, "donors": 16},
        "train": {"steps": 30, "vae_steps": 10, "batch": 16, "hidden": [8], "vae_hidden": 8},
        "saferule": {"steps": 10, "suppress_steps": 6, "gate_steps": 5}, "finetune": {"steps": 10}}


def run_training(root, **more):
    return train(TASK, "bcq_lag", ATTACKS, SEEDS, "smoke", root, overrides=TINY["train"], **more)


def run_unlearning(root, method="saferule", **more):
    return unlearn(TASK, "bcq_lag", ATTACKS, method, SEEDS, "smoke", root, overrides=TINY[method], **more)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "runs" / "smoke"
    made = {"data": make_data(TASK, "smoke", root, TINY["data"])}
    made |= {a: make_poison(TASK, a, "smoke", root) for a in ATTACKS}
    made["train"] = run_training(root)
    made |= {m: run_unlearning(root, m) for m in ("saferule", "finetune")}
    made["evaluate"] = evaluate(TASK, "bcq_lag", ("saferule", "finetune"), "smoke", root,
                                {"episodes": 2, "curve_episodes": 1}, progress=False)
    return root, made


@pytest.fixture
def copy(chain, tmp_path):
    """The chain's artefacts in a folder of the test's own."""
    shutil.copytree(chain[0], tmp_path / "runs" / "smoke")
    return tmp_path / "runs" / "smoke"


def test_every_artefact_names_what_it_was_made_from(chain):
    root, made = chain
    for kind, name in (("data", "BallRun"), ("poison", "BallRun-inject"), ("train", "BallRun-bcq_lag"),
                       ("unlearn", "BallRun-bcq_lag-saferule")):
        load(kind, name, root)                                                 # hashes hold
    of = lambda key: {k: v["id"] for k, v in made[key].manifest["inputs"].items()}
    assert of("inject") == {"data": made["data"].id}
    assert of("train") == {"data": made["data"].id, "poison:inject": made["inject"].id, "poison:label_flip": made["label_flip"].id}
    assert of("saferule")["train"] == made["train"].id
    methods = {f"unlearn:{m}": made[m].id for m in ("saferule", "finetune")}
    assert of("evaluate") == {"train": made["train"].id, **methods}


def test_one_stacked_run_holds_every_condition_and_seed(chain):
    _, made = chain
    table = made["train"].replicas
    assert [(x["attack"], x["method"], x["seed"]) for x in table] == [
        (a, m, s) for a, m in (("none", "clean"), ("inject", "poisoned"), ("inject", "retrain"), ("label_flip", "poisoned"),
                               ("label_flip", "retrain")) for s in SEEDS]
    assert all(x["init_seed"] != x["seed"] for x in table if x["method"] == "retrain")
    model = restore(made["train"], TASK)
    assert model.replicas == 10
    assert any(k.endswith("exp_avg") for k in model.full_state())


def test_the_pool_holds_both_attacks(chain):
    root, made = chain
    pool, _ = load_pool(TASK, ATTACKS, root)
    for attack in ATTACKS:
        assert made[attack].table("forget.csv").shape[0] == len(pool.rows(f"{attack}/forget").ids)
        alone, _ = load_pool(TASK, (attack,), root)                            # row ids in the file: data, then this attack's rows
        assert alone.rows(f"{attack}/forget").ids.tolist() == made[attack].table("forget.csv")["row"].tolist()


def test_unlearning_starts_from_the_poisoned_models(chain):
    _, made = chain
    start = restored_snapshots(made["saferule"], made["train"], TASK)[0]
    whole = restore(made["train"], TASK)
    poisoned = [i for i, x in enumerate(made["train"].replicas) if x["method"] == "poisoned"]
    for name, value in whole.pick(poisoned).weights().items():
        assert torch.equal(value, start.weights()[name]), name


def test_evaluation_lists_every_model(chain):
    _, made = chain
    episodes, runs = made["evaluate"].table("episodes.csv"), made["evaluate"].table("runs.csv")
    final = episodes[episodes.stage == "final"].groupby(["attack", "method", "seed"]).size()
    assert len(final) == 10 + 2 * 4
    assert (final == 2).all()
    assert len(episodes[episodes.stage == "later"].groupby(["attack", "method", "seed"])) == 2 * 4
    curve = episodes[(episodes.stage == "curve") & (episodes.method == "saferule")]
    assert sorted(curve.step.unique()) == sorted({round(f * 10) for f in settings.CURVE})
    assert np.isfinite(episodes[["ret", "cost"]]).all().all()
    assert (episodes.length == TASK.horizon).all()
    assert len(runs) == 18
    assert (runs.train_seconds > 0).all()
    assert set(runs[runs.method == "saferule"].artefact) == {made["saferule"].short}


def test_stacking_models_changes_nothing(chain):
    _, made = chain
    models = list(restored_snapshots(made["saferule"], made["train"], TASK).values())[:2]
    both, obs = stack(models), torch.randn(4, 3, TASK.n_obs)
    for i, model in enumerate(models):
        for r in range(4):
            one = model.pick([r]).act(obs[r:r + 1], torch.Generator().manual_seed(0))
            same = both.pick([4 * i + r]).act(obs[r:r + 1], torch.Generator().manual_seed(0))
            assert torch.equal(one, same)


def test_same_seed_same_bytes(chain, copy):
    """Everything made again gets the same id: data from the simulator, attacks, training, unlearning."""
    _, made = chain
    assert make_data(TASK, "smoke", copy, TINY["data"]).id == made["data"].id
    assert make_poison(TASK, "inject", "smoke", copy).id == made["inject"].id
    assert run_training(copy).id == made["train"].id
    assert run_unlearning(copy).id == made["saferule"].id


class Killed(BaseException):
    pass


def killed_at(step):
    def on_log(t, _):
        if t >= step:
            raise Killed
    return on_log


@pytest.mark.parametrize("stage", [run_training, run_unlearning])
def test_killed_and_resumed_gives_the_same_artefact(chain, copy, stage, monkeypatch):
    _, made = chain
    key, name = ("train", "train-BallRun-bcq_lag") if stage is run_training else ("saferule", "unlearn-BallRun-bcq_lag-saferule")
    from saferule.train import Resume
    monkeypatch.setattr(Resume, "due", lambda self: True)                      # a checkpoint after every step
    with pytest.raises(Killed):
        stage(copy, on_log=killed_at(7))
    assert (copy / "checkpoints" / f"{name}.safetensors").exists()
    seen = []
    assert stage(copy, on_log=lambda t, _: seen.append(t)).id == made[key].id
    assert min(seen) >= 7                                                      # it went on, and did not start over
    assert not (copy / "checkpoints" / f"{name}.safetensors").exists()


def test_a_checkpoint_of_other_settings_is_not_continued(chain, copy, monkeypatch):
    from saferule.train import Resume
    monkeypatch.setattr(Resume, "due", lambda self: True)
    with pytest.raises(Killed):
        run_training(copy, on_log=killed_at(7))
    seen = []
    train(TASK, "bcq_lag", ATTACKS, (0,), "smoke", copy, overrides=TINY["train"], on_log=lambda t, _: seen.append(t))
    assert min(seen) == 1


def test_stale_inputs_are_named(chain, copy):
    make_data(TASK, "smoke", copy, {**TINY["data"], "seed": 1})
    with pytest.raises(UserError, match="poison BallRun-inject was made from other data"):
        run_training(copy)


def test_stale_checkpoints_are_named(chain, copy):
    train(TASK, "bcq_lag", ATTACKS, SEEDS, "smoke", copy, overrides={**TINY["train"], "steps": 31})
    with pytest.raises(UserError, match="made from another training run"):
        evaluate(TASK, "bcq_lag", ("saferule",), "smoke", copy, progress=False)


def test_missing_inputs_name_their_notebook(tmp_path, copy):
    with pytest.raises(UserError, match="01_data"):
        make_poison(TASK, "inject", "smoke", tmp_path / "none")
    with pytest.raises(UserError, match=r"no model poisoned by 'inject' with seed 7.*03_train"):
        unlearn(TASK, "bcq_lag", ATTACKS, "saferule", (7,), "smoke", copy)


def test_a_checkpoint_of_another_task_is_refused(chain):
    _, made = chain
    with pytest.raises(UserError, match="checkpoint is for BallRun"):
        restore(made["train"], get_task("BallCircle"))
    config = {**made["train"].config, "hidden": [9]}
    odd = dataclasses.replace(made["train"], manifest={**made["train"].manifest, "config": config})
    with pytest.raises(UserError, match="other network sizes"):
        restore(odd, TASK)


def test_replicas_share_the_rows_of_their_condition(chain):
    pool, _ = load_pool(TASK, ATTACKS, chain[0])
    rows = rows_of(pool, [line["condition"] for line in replica_table(ATTACKS, SEEDS, [20.0])])
    assert len({id(r.ids) for r in rows}) == 5


def test_a_learner_without_critics_goes_through_the_chain(chain, copy):
    """Behaviour cloning of safe episodes: trained, fine-tuned on retained safe rows, rolled out; other methods are refused."""
    small = {"steps": 10, "batch": 16, "hidden": [8]}
    trained = train(TASK, "bc_safe", ATTACKS, SEEDS, "smoke", copy, overrides=small)
    pool, _ = load_pool(TASK, ATTACKS, copy)
    costs = pool.episodes("clean").set_index("episode").cost
    safe = torch.isin(pool.episode, torch.tensor(costs[costs <= trained.config["cost_limit"]].index)) & (pool.origin == 0)
    mean = restore(trained, TASK).obs_mean[0]                                  # replica 0 is clean
    assert torch.allclose(mean, pool.obs[safe].mean(0), atol=1e-5)
    tuned = unlearn(TASK, "bc_safe", ATTACKS, "finetune", SEEDS, "smoke", copy, overrides={"steps": 4})
    start, end = (restored_snapshots(tuned, trained, TASK)[t].actor.layers[0].weight for t in (0, 4))
    assert (start != end).any()
    done = evaluate(TASK, "bc_safe", ("finetune",), "smoke", copy, {"episodes": 1, "curve_episodes": 1}, progress=False)
    assert set(done.table("episodes.csv").method) == {"clean", "poisoned", "retrain", "finetune"}
    with pytest.raises(UserError, match="BC has no critic; use 'finetune'"):
        unlearn(TASK, "bc_safe", ATTACKS, "saferule", SEEDS, "smoke", copy)


# ------------------------------------------------------------------------------------------------------ configuration
def test_unknown_names_and_settings_are_refused_with_the_nearest_match():
    for call, message in (
            (lambda: settings.resolve("quik", "data", "BallRun"), "unknown profile 'quik'. Did you mean 'quick'"),
            (lambda: settings.resolve("quick", "train", "BallRun", "bcq_lg"), "unknown learner 'bcq_lg'. Did you mean 'bcq_lag'"),
            (lambda: settings.resolve("quick", "unlearn", "BallRun", method="finetun"), "unknown method 'finetun'. Did you mean"),
            (lambda: settings.resolve("quick", "train", "BallRun", overrides={"step": 3}), "setting of bcq_lag 'step'. Did"),
            (lambda: settings.resolve("quick", "train", "BallRun", overrides={"steps": "3"}), "steps must be of type int"),
            (lambda: settings.resolve("quick", "train", "BallRun", overrides={"steps": True}), "steps must be of type int"),
            (lambda: settings.resolve("quick", "train", "BallRun", overrides={"hidden": 3}), "must be a list")):
        with pytest.raises(UserError, match=message):
            call()


def test_a_setting_reaches_only_the_stages_that_use_it():
    base = lambda stage, **more: settings.resolve("quick", stage, "BallCircle", attacks=("inject",), method="saferule",
                                                  seeds=(0,), **more)
    assert base("data", overrides={"episodes": 5}) != base("data")
    assert "episodes" not in base("train")
    assert settings.resolve("quick", "data", "CarRun")["episodes"] == 400
    assert settings.resolve("quick", "data", "BallRun")["episodes"] == 600
    assert settings.resolve("smoke", "train", "BallRun")["steps"] < settings.resolve("quick", "train", "BallRun")["steps"]


def test_every_profile_resolves():
    """And no method takes more of the training than the claims allow; smoke runs may, and say that they are no result."""
    for name, profile in settings.PROFILES.items():
        share = 0.1 if profile.note else settings.Thresholds().share_of_training_steps
        for task in profile.tasks:
            for learner in profile.learners:
                cfg = settings.resolve(name, "train", task, learner, profile.attacks, seeds=profile.seeds)
                for method in profile.methods:
                    budget = settings.resolve(name, "unlearn", task, learner, profile.attacks, method, profile.seeds)
                    assert budget["steps"] <= share * cfg["steps"]
