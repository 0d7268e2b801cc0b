"""Every attack through 02_poison's stage, on a little of the real BallRun: written, read back into one pool, the same again."""
import json

import numpy as np
import pytest
import torch

from conftest import make_learner, make_pool
from saferule.attacks.trigger import Trigger, Triggered
from saferule.config import ATTACK_NAMES, CONFIGS
from saferule.errors import UserError
from saferule.evaluate import evaluate
from saferule.stages.data import make_data
from saferule.stages.poison import load_pool, make_poison
from saferule.stages.train import train
from saferule.stages.unlearn import unlearn
from saferule.tasks import get_task

TASK = get_task("BallRun")
ATTACKS = [name for name in ATTACK_NAMES if name != "given"]
TINY = {"surrogate_steps": 20}


def tiny(attack):
    return {k: v for k, v in TINY.items() if k in CONFIGS[attack].__dataclass_fields__}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "runs" / "smoke"
    make_data(TASK, "smoke", root, {"episodes": 40, "donors": 16})
    return root


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_goes_through_the_stage(attack, root):
    made = make_poison(TASK, attack, "smoke", root, tiny(attack))
    facts, episodes = made.json("facts.json"), made.table("poisoned_episodes.csv")
    pool, inputs = load_pool(TASK, [attack], root)
    assert inputs[f"poison:{attack}"].id == made.id
    forget, retain = pool.rows(f"{attack}/forget").ids, pool.rows(f"{attack}/retain").ids
    assert len(forget) == facts["rows"] > 0 and len(retain)
    assert forget.tolist() == made.table("forget.csv")["row"].tolist()
    assert 0 < facts["realised_budget"] <= facts["budget"] + 1 / 40
    assert set(facts["threat"]) == {"fields", "unit", "knowledge", "placement", "tier", "goal", "bound"}
    forged = episodes[episodes.origin > 0]
    assert len(forged) == (0 if attack == "clean_forget" else facts["episodes"]) == forged.true_cost.notna().sum()
    assert json.dumps(made.config)
    assert make_poison(TASK, attack, "smoke", root, tiny(attack)).id == made.id           # the same bytes again


def test_all_attacks_in_one_pool(root):
    for attack in ATTACKS:
        make_poison(TASK, attack, "smoke", root, tiny(attack))
    pool, _ = load_pool(TASK, ATTACKS, root)
    for attack in ATTACKS:
        parts = [set(pool.rows(f"{attack}/{part}").ids.tolist()) for part in ("poisoned", "retain", "forget")]
        assert parts[0] == parts[1] | parts[2] and not parts[1] & parts[2]
    assert pool.rows("clean").ids.tolist() == list(range(int((pool.origin == 0).sum())))
    assert bool(torch.isfinite(pool.obs).all())


def test_every_kind_of_attack_is_trained_on_and_unlearned(root):
    """Replaced episodes, replaced single rows, added episodes, and honest rows that are only marked."""
    attacks, small = ("outliers", "reward_poison", "constant_action", "clean_forget"), {"batch": 16, "hidden": [8], "vae_hidden": 8}
    for attack in attacks:
        make_poison(TASK, attack, "smoke", root)
    trained = train(TASK, "bcq_lag", attacks, (0,), "smoke", root, overrides={"steps": 8, "vae_steps": 2, **small})
    assert [line["attack"] for line in trained.replicas] == ["none", *(a for a in attacks for _ in range(2))]
    done = unlearn(TASK, "bcq_lag", attacks, "saferule", (0,), "smoke", root,
                   overrides={"steps": 6, "suppress_steps": 4, "gate_steps": 3})
    assert [line["attack"] for line in done.replicas] == list(attacks)
    assert all(bool(torch.isfinite(v).all()) for v in done.tensors("snapshots.safetensors").values())


def test_a_setting_of_another_attack_is_refused(root):
    with pytest.raises(UserError, match="setting of outliers 'bonus'"):
        make_poison(TASK, "outliers", "smoke", root, {"bonus": 1.0})


def test_a_triggered_learner_is_rolled_out_replica_by_replica():
    pool = make_pool(n_obs=7)
    learner = make_learner(pool, [pool.rows("clean")] * 2, act_samples=2)
    plain = evaluate(learner, "BallRun", 1, workers=1, progress=False)
    shown = evaluate(Triggered(learner, Trigger("marker", (0, 1, 2), (5.0, -5.0, 5.0))), "BallRun", 1, workers=1, progress=False)
    assert (plain.ret != shown.ret).all() and np.isfinite(shown.ret).all()
    obs, noise = torch.randn(2, 3, 7), lambda: torch.Generator().manual_seed(0)
    assert torch.equal(learner.act(obs, noise()), Triggered(learner, Trigger("bias", (0,), (0.0,))).act(obs, noise()))
