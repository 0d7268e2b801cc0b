"""14_off_policy's stage, on made-up data of BallRun's sizes: whose rows, which models, triggers, lineage. No simulator."""
import pytest
import torch

from conftest import make_pool
from saferule.artifacts import load, save
from saferule.config import configured, resolve
from saferule.errors import UserError
from saferule.ope import select
from saferule.stages import ope
from saferule.stages.poison import load_pool, make_poison
from saferule.stages.train import train
from saferule.stages.unlearn import unlearn
from saferule.tasks import get_task

TASK, ATTACKS, SEEDS = get_task("BallRun"), ("inject_data", "marker"), (0, 1)
TRAINED = {"steps": 12, "vae_steps": 4, "batch": 16, "hidden": [8], "vae_hidden": 8}
TINY = {"members": 2, "sweeps": 0.03, "tau": 0.5, "batch": 8, "hidden": [8], "probe": 32}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "runs" / "smoke"
    pool = make_pool(episodes=16, horizon=TASK.horizon, n_obs=TASK.n_obs, n_act=TASK.n_act)
    files = {"pool.safetensors": pool.tensors(), "episodes.csv": pool.episodes()}
    save("data", TASK.name, files, resolve("smoke", "data", TASK.name), root=root)
    for attack in ATTACKS:
        make_poison(TASK, attack, "smoke", root)
    train(TASK, "bcq_lag", ATTACKS, SEEDS, "smoke", root, overrides=TRAINED)
    unlearn(TASK, "bcq_lag", ATTACKS, "finetune", SEEDS, "smoke", root, overrides={"steps": 8})
    return root


@pytest.fixture(scope="module")
def made(root):
    return ope.estimate(TASK, "bcq_lag", ("finetune",), "smoke", root, overrides=TINY)


def test_every_final_model_is_estimated_once(root, made):
    frame = made.table("estimates.csv")
    expected = {("none", "clean", s) for s in SEEDS} | {(a, m, s) for a in ATTACKS for m in ("poisoned", "retrain", "finetune")
                                                       for s in SEEDS}
    assert set(zip(frame.attack, frame.method, frame.seed)) == expected and len(frame) == len(expected)
    assert set(frame.stage) == {"final"} and set(frame[frame.method == "finetune"].step) == {8}
    assert set(frame[frame.method != "finetune"].step) == {12} and set(frame.fold) == {-1}
    members = made.tensors("members.safetensors")
    assert torch.allclose(members["cost"].mean(1), torch.tensor(frame.cost.to_numpy(), dtype=torch.float32))
    inputs = {k: v["id"] for k, v in made.manifest["inputs"].items()}
    assert inputs == {"data": load("data", "BallRun", root).id, "train": load("train", "BallRun-bcq_lag", root).id,
                      "unlearn:finetune": load("unlearn", "BallRun-bcq_lag-finetune", root).id,
                      **{f"poison:{a}": load("poison", f"BallRun-{a}", root).id for a in ATTACKS}}


def test_models_of_a_triggered_attack_are_also_estimated_under_the_trigger(made):
    frame = made.table("estimates.csv")
    under = frame[frame.triggered_cost.notna()]
    assert set(under.attack) == {"marker"} == set(frame[frame.attack == "marker"].attack) and len(under) == 6
    assert (under.triggered_cost_low <= under.triggered_cost).all() and (under.triggered_cost <= under.triggered_cost_high).all()
    assert (under.triggered_cost - under.cost).abs().max() > 1e-6               # it sees something else


def test_each_model_is_estimated_from_the_rows_that_its_defender_keeps(root, monkeypatch):
    seen = {}

    def watched(policy, pool, rows, *_, fold, **__):
        seen.update(rows=rows, pool=pool, fold=fold)
        raise UserError("enough")
    monkeypatch.setattr(ope, "fqe", watched)
    with pytest.raises(UserError, match="enough"):
        ope.estimate(TASK, "bcq_lag", ("finetune",), "smoke", root, overrides=TINY)
    pool, lines = seen["pool"], [x for kind, name in (("train", "BallRun-bcq_lag"), ("unlearn", "BallRun-bcq_lag-finetune"))
                                 for x in load(kind, name, root).replicas]
    again = [line for line in lines if line["attack"] == "marker"]              # under the trigger
    assert len(seen["rows"]) == len(lines) + len(again) and seen["fold"] is None
    for line, rows in zip(lines + again, seen["rows"]):
        assert torch.equal(rows.ids, pool.rows("clean" if line["attack"] == "none" else f"{line['attack']}/retain").ids)


def test_candidates_of_one_method(root):
    made = ope.candidates(TASK, "bcq_lag", "finetune", "smoke", root, overrides=TINY, attacks=("inject_data",), seeds=(1,))
    frame = made.table("estimates.csv")
    assert made.name == "BallRun-bcq_lag-finetune" and set(frame.attack) == {"inject_data"} and set(frame.seed) == {1}
    assert frame.groupby("fold").step.apply(list).to_dict() == {0: [0, 1, 2, 4, 6, 8], 1: [0, 1, 2, 4, 6, 8]}      # the budget is 8
    first, second = (frame[frame.fold == fold].set_index("step") for fold in (0, 1))
    assert (first.cost != second.cost).all()
    assert select(first, 20.0, configured("ope", "smoke", "BallRun")).at in (*first.index, None)
    pool, _ = load_pool(TASK, ATTACKS, root)
    assert len(pool.rows("inject_data/retain").ids)
    with pytest.raises(UserError, match="no model of attacks .'label_flip'."):
        ope.candidates(TASK, "bcq_lag", "finetune", "smoke", root, attacks=("label_flip",))


def test_models_of_another_training_run_are_refused(root):
    train(TASK, "bcq_lag", ATTACKS, SEEDS, "smoke", root, overrides={**TRAINED, "steps": 5})
    with pytest.raises(UserError, match="from another training run than the present BallRun-bcq_lag"):
        ope.estimate(TASK, "bcq_lag", ("finetune",), "smoke", root, overrides=TINY)
