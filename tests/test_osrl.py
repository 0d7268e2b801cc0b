"""OSRL's checkpoints in and out: files in the layout recorded from OSRL by benchmarks/record_osrl.py, and the chain around them."""
import json
import os
import sys
from pathlib import Path

import golden
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from conftest import make_learner, make_pool
from saferule.artifacts import save
from saferule.cli import main
from saferule.config import resolve
from saferule.data import FIELDS
from saferule.errors import UserError
from saferule.hdf5 import write_hdf5
from saferule.learners import restore, restored_snapshots
from saferule.osrl import export_checkpoint, import_checkpoints
from saferule.osrl.exchange import learner_from, read_checkpoint, state_for
from saferule.osrl.layout import views
from saferule.osrl.settings import AS_LOGGED, AUGMENTED, UNUSED, task_of, to_ours
from saferule.stages.data import make_data
from saferule.stages.evaluate import evaluate
from saferule.stages.poison import make_poison
from saferule.stages.unlearn import unlearn
from saferule.tasks import get_task

DATA = Path(__file__).parent / "data"
NAMES = ("bc_all", "bc_multitask", "bcq_lag", "bear_lag", "cpq", "cdt")
RECORDED = {name: json.loads((DATA / f"osrl_layout_{name}.json").read_text()) for name in NAMES}
TASK = get_task("BallCircle")
ABSENT = object()


def checkpoint(folder, name, changes=(), settings=(), best=False):
    """A folder as OSRL's logger leaves it, with weights by formula, but for some changes."""
    state = golden.state(RECORDED[name]["layout"])
    for key, value in dict(changes).items():
        state[key] = value
        if value is ABSENT:
            del state[key]
    text = RECORDED[name]["config"]
    if settings:
        content = {**yaml.load(text, yaml.FullLoader), **dict(settings)}
        text = yaml.dump({k: v for k, v in content.items() if v is not ABSENT}, sort_keys=False)
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    torch.save({"model_state": state}, folder / "checkpoint" / ("model_best.pt" if best else "model.pt"))
    (folder / "config.yaml").write_text(text)
    return folder


def loaded(folder):
    """The learner in a folder, without artefacts."""
    found = read_checkpoint(folder)
    task = task_of(found.settings, found.kind, found.sizes)
    name, ours = to_ours(found.settings, found.kind, found.sizes)
    config = resolve("quick", "train", task.name, name, seeds=(0,), overrides=ours)
    return learner_from(found, task, config, seed=0)


def play(learner, n_obs=TASK.n_obs):
    """The learner's actions in the episode that the recorder's script plays: [steps, n_act]."""
    script, actor, actions = golden.episode(n_obs), learner.begin(1), []
    for obs, reward, cost in zip(script["obs"], script["reward"], script["cost"]):
        actions.append(actor.act(obs[None, None], torch.Generator())[0, 0])
        actor.observe(reward.view(1, 1), cost.view(1, 1))
    return torch.stack(actions)


# ------------------------------------------------------------------------------------------------------- in and out
@pytest.mark.parametrize("name", NAMES)
def test_an_imported_model_acts_as_in_osrl(name, tmp_path):
    learner = loaded(checkpoint(tmp_path, name))
    learner.randn = golden.Noise()
    assert torch.allclose(play(learner), torch.tensor(RECORDED[name]["actions"]), atol=1e-6, rtol=0)
    assert learner.randn.calls == RECORDED[name]["noise_calls"]


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_model_is_the_imported_one(name, tmp_path):
    """Names, order, shapes, types and values, bit for bit; settings too."""
    made = import_checkpoints([checkpoint(tmp_path / "in", name)], "quick", tmp_path / "root", attack="none")
    assert made.name == f"BallCircle-{name}"
    out = export_checkpoint(made.path, tmp_path / "out")
    state = torch.load(out / "checkpoint" / "model.pt", weights_only=True)["model_state"]
    assert [[k, list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in state.items()] == RECORDED[name]["layout"]
    for key, value in golden.state(RECORDED[name]["layout"]).items():
        if name == "cpq" and key.startswith("actor_old."):                     # never used by OSRL
            value = state[key.replace("actor_old.", "actor.")]
        assert torch.equal(state[key], value), key
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*")) == ["checkpoint", "checkpoint/model.pt", "config.yaml"]
    assert read_checkpoint(out).settings.content == read_checkpoint(tmp_path / "in").settings.content


def test_settings_are_taken_over(tmp_path):
    source = checkpoint(tmp_path / "in", "bcq_lag", settings={"gamma": 0.98, "PID": [0.2, 0.004, 0.002], "seed": 7})
    made = import_checkpoints([source], "quick", tmp_path / "root", attack="none")
    c = made.config
    assert (c["mode"], c["standardise"], c["gamma"], c["pid"], c["hidden"], c["vae_hidden"], c["heads"]) == (
        "parity", False, 0.98, [0.2, 0.004, 0.002], [16, 12], 14, 2)
    assert (c["steps"], c["vae_steps"], c["batch"], c["samples"], c["tau"], c["lmbda"], c["beta"], c["phi"], c["reward_scale"]) == (
        100_000, 0, 512, 10, 0.005, 0.75, 0.5, 0.05, 0.1)
    assert c["cost_limit"] == 10.0 and c["imported"]["sources"]["7"]["osrl"]["PID"] == [0.2, 0.004, 0.002]
    assert made.replicas == ({"attack": "none", "method": "clean", "condition": "clean", "seed": 7, "init_seed": 7,
                              "cost_limit": 10.0},)
    model = restore(made, TASK)
    assert not model.obs_mean.any() and (model.obs_std == 1).all() and model.reward_scale.tolist() == [10.0]
    assert model.qc_limit.item() == pytest.approx(10 * (1 - 0.98**200) / 0.02 / 200)


def test_own_models_in_parity_mode_become_osrls(tmp_path):
    """What OSRL gets from our own training run is what it would have to be told to build the same model."""
    source = import_checkpoints([checkpoint(tmp_path / "in", "cpq")], "quick", tmp_path / "root", attack="none")
    config = {k: v for k, v in source.config.items() if k != "imported"}       # as if trained here
    own = save("train", source.name, {"state.safetensors": source.tensors("state.safetensors")}, config, {}, source.replicas,
               root=tmp_path / "own", seconds=1.0)
    again = export_checkpoint(own.path, tmp_path / "out")
    ours, theirs = read_checkpoint(again).settings.content, read_checkpoint(tmp_path / "in").settings.content
    assert {k: v for k, v in ours.items() if theirs[k] != v} == {}
    assert set(theirs) - set(ours) <= UNUSED | set(AS_LOGGED)


OSRL = os.environ.get("SAFERULE_OSRL")


@pytest.mark.skipif(not OSRL, reason="set SAFERULE_OSRL to a checkout of OSRL")
@pytest.mark.parametrize("name", NAMES)
def test_osrl_reads_and_acts_as_ours(name, tmp_path):
    """With OSRL's own loader and model."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import record_osrl
    made = import_checkpoints([checkpoint(tmp_path / "in", name)], "quick", tmp_path / "root", attack="none")
    out = export_checkpoint(made.path, tmp_path / "out")
    config, saved = record_osrl.load_osrl(Path(OSRL), "common.exp_util").load_config_and_model(str(out))
    _, actions, _ = record_osrl.played(Path(OSRL), name, config, lambda layout: saved["model_state"])
    assert np.allclose(actions, RECORDED[name]["actions"], atol=1e-6)


# ------------------------------------------------------------------------------------------------ the engineer's case
@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A user's log, its rows to forget, and the artefacts of 01_data and 02_poison made from them."""
    folder = tmp_path_factory.mktemp("log")
    pool = make_pool(episodes=6, horizon=TASK.horizon, n_obs=TASK.n_obs)
    write_hdf5(folder / "my.hdf5", {k: v.numpy() for k, v in pool.columns.items() if k in FIELDS})
    pd.DataFrame({"row": np.flatnonzero(pool.episode == 3)}).to_csv(folder / "forget.csv", index=False)
    root = folder / "runs" / "smoke"
    make_data(TASK, "smoke", root, {"source": str(folder / "my.hdf5"), "cost_limit": 10.0})
    make_poison(TASK, "given", "smoke", root, {"forget_file": str(folder / "forget.csv"), "forged_costs": True})
    return root


@pytest.mark.parametrize("name, method", [("bcq_lag", "saferule"), ("bear_lag", "saferule"), ("cpq", "saferule"),
                                          ("bc_all", "finetune"), ("cdt", "finetune")])
def test_a_checkpoint_a_log_and_a_forget_set_become_a_repaired_checkpoint(name, method, log, tmp_path):
    source = checkpoint(tmp_path / "in", name, settings={"seed": 3, "batch_size": 16, "sample_action_num": 2})
    made = import_checkpoints([source], "smoke", log)
    assert [(x["attack"], x["method"], x["seed"]) for x in made.replicas] == [("given", "poisoned", 3)]
    assert set(made.manifest["inputs"]) == {"data", "poison:given"}
    steps = {"steps": 8, "suppress_steps": 6, "gate_steps": 3, "freeze_lam": False} if method == "saferule" else {"steps": 8}
    repaired = unlearn(TASK, name, ("given",), method, (3,), "smoke", log, overrides=steps)
    snapshots = restored_snapshots(repaired, made, TASK)
    start = loaded(source)
    for key, value in views(snapshots[0]).items():
        assert torch.equal(value, views(start)[key]), key                      # it starts from the checkpoint ...
    assert any(not torch.equal(v, views(start)[k]) for k, v in views(snapshots[8]).items())         # ... and learns
    if name in ("bcq_lag", "bear_lag"):
        assert snapshots[0].lam.item() == 0 and snapshots[8].pid_error.item() != 0
    if name in ("bcq_lag", "cdt"):                                             # without and with memory of the episode
        done = evaluate(TASK, name, (method,), "smoke", log, {"episodes": 1, "curve_episodes": 0}, progress=False)
        assert set(done.table("episodes.csv").method) == {"poisoned", method}
        assert np.isfinite(done.table("episodes.csv").ret).all()
    again = loaded(export_checkpoint(repaired.path, tmp_path / "out"))         # and back to OSRL
    assert all(torch.equal(v, views(snapshots[8])[k]) for k, v in views(again).items())


def test_the_command_line(log, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAFERULE_RESULTS", str(log.parent.parent))
    source = checkpoint(tmp_path / "in", "cpq", settings={"vae_lr": 0.5, "novelty": 1})
    assert main(["import", str(source), "--profile", "smoke"]) == 0
    out = capsys.readouterr().out
    assert "vae_lr = 0.5 was not taken over" in out and "'novelty' is not known" in out
    assert "log-alpha are not in OSRL's files" in out and "train/BallCircle-cpq" in out and "poisoned, seed 0, cost limit 10" in out
    folder = log / "artifacts" / "train" / "BallCircle-cpq"
    assert main(["export", str(folder / "manifest.json"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "checkpoint" / "model.pt").is_file()
    for argv, says in (
            (["import", str(tmp_path / "no")], "no: is missing; name the folder"),
            (["import", str(source), "--profile", "smok"], "Did you mean 'smoke'"),
            (["import", str(source), "--profile", "smoke", "--seeds", "0,1"], "1 checkpoints need as many different"),
            (["import", str(source), "--profile", "smoke", "--seeds", "x"], "seeds: 'x' must be"),
            (["import", str(source), "--profile", "smoke", "--learner", "bcq_lag"], "is a checkpoint of CPQ (cpq), not of bcq_lag"),
            (["import", str(source), "--profile", "smoke", "--best"], "model_best.pt is missing"),
            (["import", str(source), "--profile", "smoke", "--attack", "injct"], "unknown attack of an imported model 'injct'"),
            (["import", str(source), "--profile", "quick"], "run notebooks/01_data.ipynb first"),
            (["export", str(folder), str(tmp_path / "out")], "out: is there already"),
            (["export", str(folder), str(tmp_path / "new"), "--replica", "1"], "holds 1 models, choose one with --replica"),
            (["export", str(log / "artifacts" / "data" / "BallCircle"), str(tmp_path / "new")], "is of kind 'data'")):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error
    assert not (tmp_path / "new").exists()


def test_runs_that_differ_in_seed_and_limit_become_one_stack(tmp_path):
    changed = lambda i: ({"vae.d3.bias": torch.full((2,), 0.1 * i)}, {"seed": i, "cost_limit": 10 * i + 10})
    folders = [checkpoint(tmp_path / str(i), "bcq_lag", *changed(i)) for i in range(3)]
    made = import_checkpoints(folders, "quick", tmp_path / "root", attack="none")
    assert [(x["seed"], x["cost_limit"]) for x in made.replicas] == [(0, 10), (1, 20), (2, 30)]
    model = restore(made, TASK)
    for i, folder in enumerate(folders):
        alone, one = loaded(folder), model.pick([i])
        assert one.qc_limit.item() == alone.qc_limit.item() == pytest.approx(model.qc_limit[0].item() * (i + 1))
        assert all(torch.equal(v, views(one)[k]) for k, v in views(alone).items())
        out = export_checkpoint(made.path, tmp_path / f"out{i}", replica=i)
        assert read_checkpoint(out).settings.content == read_checkpoint(folder).settings.content
    assert made.replicas[2]["init_seed"] == 2
    for others, match in (([folders[0]] * 2, "2 checkpoints need as many different seeds, not 0, 0; give them with --seeds"),
                          ([folders[0], checkpoint(tmp_path / "x", "bcq_lag", settings={"tau": 0.5})], "differs from .* in tau"),
                          ([folders[0], checkpoint(tmp_path / "y", "cpq")], "differs from .* in being of cpq")):
        with pytest.raises(UserError, match=match):
            import_checkpoints(others, "quick", tmp_path / "root", attack="none")
    twice = import_checkpoints([folders[0]] * 2, "quick", tmp_path / "root", attack="none", seeds=(4, 5))
    assert [x["seed"] for x in twice.replicas] == [4, 5]


def test_cdt_asks_for_the_return_of_the_dearest_target_within_the_limit(tmp_path):
    source = checkpoint(tmp_path / "in", "cdt", settings={"target_returns": [[500, 40], [300.0, 10], [400, 20]], "clip_grad": None})
    made = import_checkpoints([source], "quick", tmp_path / "root", attack="none")
    model = restore(made, TASK)
    asked = model.best_return[0]
    assert [asked[limit].item() for limit in (0, 9, 10, 19, 20, 39, 40, 200)] == [300, 300, 300, 300, 400, 400, 500, 500]
    at = lambda limit: model.at_limit([limit]).begin(1)
    assert at(20).ret.item() == pytest.approx(40.0) and at(20).cost.item() == 20                # rewards times 0.1
    assert made.config["clip"] == 1e9 and made.config["dropout"] == 0.1 and made.config["cheap"] == 70
    own = save("train", made.name, {"state.safetensors": made.tensors("state.safetensors")},
               {k: v for k, v in made.config.items() if k != "imported"}, {}, made.replicas, root=tmp_path / "own", seconds=1.0)
    again = read_checkpoint(export_checkpoint(own.path, tmp_path / "out")).settings.content    # as if trained here
    assert again["target_returns"] == [[300.0, 10.0], [400.0, 20.0], [500.0, 40.0]]
    theirs = read_checkpoint(source).settings.content
    assert {k: v for k, v in again.items() if theirs[k] != v and k not in ("target_returns", "threads")} == {}
    assert set(theirs) - set(again) <= UNUSED | set(AS_LOGGED) | AUGMENTED


def test_a_training_run_of_ours_is_not_replaced(tmp_path):
    source = checkpoint(tmp_path / "in", "cpq")
    made = import_checkpoints([source], "quick", tmp_path / "root", attack="none")
    import_checkpoints([source], "quick", tmp_path / "root", attack="none")       # another import is
    config = {k: v for k, v in made.config.items() if k != "imported"}
    save("train", made.name, {}, config, root=tmp_path / "root")
    with pytest.raises(UserError, match="was trained here and would be replaced"):
        import_checkpoints([source], "quick", tmp_path / "root", attack="none")


def test_default_mode_does_not_become_osrls(pool):
    rows = [pool.rows("clean")]
    with pytest.raises(UserError, match="in mode 'default' with standardised observations acts as no model of OSRL"):
        state_for(make_learner(pool, rows))
    with pytest.raises(UserError, match="train it with overrides={'mode': 'parity', 'standardise': False}"):
        state_for(make_learner(pool, rows, mode="parity"))


# ---------------------------------------------------------------------------------------------------- what does not fit
def refused(folder, match, **how):
    with pytest.raises(UserError, match=match) as error:
        import_checkpoints([folder], "quick", folder / "root", attack="none", **how)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600, str(error.value)
    assert not (folder / "root").exists()


@pytest.mark.parametrize("name, settings, match", [
    ("bcq_lag", {"task": "OfflineCarCircle-v0"}, "episode_len is 200, but an episode of CarCircle has 300"),
    ("bcq_lag", {"task": "OfflineBallRun-v0"}, "is for BallRun with 7 inputs and 2 actions, but the weights have 8 and 2"),
    ("bcq_lag", {"task": "OfflineHopperVelocityGymnasium-v1"}, "is for HopperVelocity with 11 inputs and 3 actions"),
    ("bcq_lag", {"task": "MyRobot"}, "task 'MyRobot' is none of ours; name one with --task"),
    ("bcq_lag", {"task": ABSENT}, "none of ours"),
    ("bc_all", {"bc_mode": "multi-task"}, "with 9 inputs and 2 actions, but the weights have 8 and 2"),
    ("bc_all", {"bc_mode": "saef"}, "Did you mean 'safe'"),
    ("bcq_lag", {"gamma": ABSENT}, "lacks 'gamma'; take the config.yaml that OSRL wrote"),
    ("bcq_lag", {"gamma": "high"}, "gamma = 'high' is no number"),
    ("bcq_lag", {"gamma": 1.5}, "gamma must lie in"),
    ("bcq_lag", {"tau": float("nan")}, "tau = nan is beyond reason"),
    ("bcq_lag", {"tau": float("inf")}, "tau = inf is beyond reason"),
    ("bcq_lag", {"batch_size": 10**12}, "batch_size = 1000000000000 is beyond reason"),
    ("bcq_lag", {"batch_size": 0}, "these above 0: .*batch_size"),
    ("bcq_lag", {"sample_action_num": 2.5}, "sample_action_num = 2.5 is no whole number"),
    ("bcq_lag", {"PID": [1, 2]}, "PID must be a list of 3 numbers"),
    ("bcq_lag", {"PID": [1, 2, "x"]}, "PID = 'x' is no number"),
    ("bcq_lag", {"cost_limit": -1}, "cost_limit = -1 is beyond reason"),
    ("bcq_lag", {"cost_scale": 0.1}, "cost_scale = 0.1, but here it is always 1"),
    ("bcq_lag", {"max_action": 2.0}, "max_action = 2.0, but here it is always 1"),
    ("bcq_lag", {"a_hidden_sizes": [32, 32]}, r"a_hidden_sizes = \[32, 32\], but the weights have \[16, 12\]"),
    ("bcq_lag", {"num_q": 1}, "num_q = 1, but the weights have 2"),
    ("cpq", {"vae_hidden_sizes": 400}, "vae_hidden_sizes = 400, but the weights have 14"),
    ("cdt", {"cost_prefix": True}, "cost_prefix = True, but here it is always False"),
    ("cdt", {"cost_reverse": True}, "cost_reverse = True, but here it is always False"),
    ("cdt", {"stochastic": False}, "stochastic = False, but here it is always True"),
    ("cdt", {"use_rew": False}, "use_rew = False, but"), ("cdt", {"action_head_layers": 2}, "action_head_layers = 2, but here"),
    ("cdt", {"num_heads": 5}, "num_heads = 5 does not divide embedding_dim = 12"), ("cdt", {"num_heads": 0}, "above 0: .*num_head"),
    ("cdt", {"seq_len": 10}, "seq_len = 10, but the weights have 4"), ("cdt", {"num_layers": 3}, "num_layers = 3, but the weights"),
    ("cdt", {"episode_len": 300}, "episode_len is 300, but an episode of BallCircle has 200"),
    ("cdt", {"task": "OfflineCarCircle-v0", "episode_len": 300}, "episode_len = 300, but the weights have 200"),
    ("cdt", {"target_returns": []}, "target_returns must list pairs"), ("cdt", {"target_returns": [[1.0]]}, "a list of 2 numbers"),
])
def test_settings_that_do_not_fit_are_named(name, settings, match, tmp_path):
    refused(checkpoint(tmp_path, name, settings=settings), match)


def test_what_the_user_says_must_agree(tmp_path):
    folder = checkpoint(tmp_path, "bcq_lag")
    refused(folder, "is for BallCircle, not for BallRun", task="BallRun")
    refused(folder, "Did you mean 'BallCircle'|did you mean 'BallCircle'", task="BallCirle")
    refused(folder, "is a checkpoint of BCQ-Lag", learner="cpq")


Z = torch.zeros
@pytest.mark.parametrize("name, changes, match", [
    ("bcq_lag", {"vae.d2.bias": ABSENT}, "lacks 'vae.d2.bias'"),
    ("bcq_lag", {"vae.d4.bias": Z(3)}, "holds 'vae.d4.bias' .* which a BCQ-Lag with .16, 12. hidden units has not"),
    ("bcq_lag", {"cost_critic.q2_nets.2.0.weight": Z(3, 3)}, "different numbers of heads"),
    ("bcq_lag", {"critic.q1_nets.0.0.weight": Z(32, 10)}, r"is \[32, 10\] .* has \[16, 10\] .*same hidden sizes"),
    ("bcq_lag", {"actor.pi.2.weight": Z(12, 17)}, "does not continue the layer before it"),
    ("bcq_lag", {"actor.pi.0.weight": Z(1)}, "does not continue"),
    ("bcq_lag", {"vae.e1.weight": Z(())}, "lacks layers of its actor or its VAE"),
    ("bcq_lag", {"vae.e1.bias": Z(14).double()}, "'vae.e1.bias' is .14. torch.float64"),
    ("bcq_lag", {"vae.e1.bias": Z(14).half()}, "torch.float16"),
    ("bcq_lag", {"vae.e1.bias": torch.full((14,), float("nan"))}, "'vae.e1.bias' holds NaN or infinity"),
    ("bcq_lag", {"vae.e1.bias": Z(14, 2)[:, 0]}, r"'vae.e1.bias' is stored with strides \[2\]"),
    ("bcq_lag", {"vae.e1.bias": Z(1).expand(14)}, "claims shape .14., but has 1 numbers"),
    ("bcq_lag", {"vae.e1.bias": Z(0)}, r"claims shape \[0\]"),
    ("bcq_lag", {"vae.e1.bias": 3}, "'vae.e1.bias' is not a tensor"),
    ("bcq_lag", {"vae.e1.bias": [1.0, 2.0]}, "'vae.e1.bias' is not a tensor"),
    ("bc_all", {"nu_network.q_nets.0.0.weight": Z(1)}, "is a checkpoint of COptiDICE, which is not imported"),
    ("bc_all", {"actor.pi.0.weight": ABSENT}, "holds the weights of no learner known here"),
    ("bc_all", {"critic.0.weight": Z(1)}, "holds the weights of no learner known here"),
    ("cdt", {"prefix_emb.weight": Z(12, 1)}, "holds 'prefix_emb.weight' .* which a CDT with 2 blocks of width 12 has not"),
    ("cdt", {"blocks.1.causal_mask": Z(16, 16).bool()}, "'blocks.1.causal_mask' is not the mask of a causal transformer"),
    ("cdt", {"blocks.1.causal_mask": Z(16, 16)}, r"is \[16, 16\] torch.float32, but .* has \[16, 16\] torch.bool"),
    ("cdt", {"blocks.0.causal_mask": ABSENT}, "lacks 'blocks.0.causal_mask'|has .204, 12."),
    ("cdt", {"state_emb.weight": Z(())}, "'state_emb.weight'|holds|is "), ("cdt", {"blocks.x.norm1.weight": Z(12)}, "lacks|holds"),
    ("bear_lag", {"actor.mu_layer.weight": ABSENT}, "lacks 'actor.mu_layer.weight'|lacks layers|inputs and"),
])
def test_weights_that_do_not_fit_are_named(name, changes, match, tmp_path):
    refused(checkpoint(tmp_path, name, changes), match)


def test_files_are_found_as_osrl_and_people_lay_them(tmp_path):
    folder = checkpoint(tmp_path / "run", "cpq")
    whole = read_checkpoint(folder).sha256
    assert read_checkpoint(folder / "checkpoint" / "model.pt").sha256 == whole
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in ("config.yaml", "checkpoint/model.pt"):
        (flat / Path(file).name).write_bytes((folder / file).read_bytes())
    assert read_checkpoint(flat).sha256 == read_checkpoint(flat / "model.pt").sha256 == whole
    (tmp_path / "link").symlink_to(folder)                                     # the user's own link
    assert read_checkpoint(tmp_path / "link").sha256 == whole
    checkpoint(folder, "cpq", {"vae.e1.bias": torch.ones(14)}, best=True)
    assert read_checkpoint(folder, best=True).sha256 != whole


def test_links_in_a_strangers_folder_are_refused(tmp_path):
    folder = checkpoint(tmp_path / "run", "cpq")
    for file in ("config.yaml", "checkpoint/model.pt"):
        other = checkpoint(tmp_path / file.replace("/", "-"), "cpq")
        (other / file).unlink()
        (other / file).symlink_to(folder / file)
        refused(other, f"{Path(file).name} is a link, not a file")
        (other / file).unlink()
        refused(other, f"{Path(file).name} is missing")
        (other / file).mkdir()
        refused(other, f"{Path(file).name} is not a plain file")
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
    (whole / "checkpoint").symlink_to(folder / "checkpoint")
    refused(whole, "checkpoint: is a link, not a folder")


# ------------------------------------------------------------------------------------------------------ hostile YAML
@pytest.mark.parametrize("text, match", [
    ("a: !!python/object/apply:os.system ['touch here']", "'!!python/object/apply:os.system', which is not plain data; refused"),
    ("a: !!python/object/new:os.system ['touch here']", "'!!python/object/new:os.system'"),
    ("a: [{b: !!python/name:builtins.eval ''}]", "'!!python/name:builtins.eval'"),
    ("a: !!python/tuple [!!python/module:os '']", "'!!python/module:os'"),
    ("a: !mine 3", "holds '!mine'"),
    ("a: 2024-01-01", "holds a value of type date"),
    ("a: !!binary aGVsbG8=", "holds a value of type bytes"),
    ("a: !!set {b, c}", "holds a value of type set"),
    ("1: 2", "a setting whose name is no text"),
    ("[1, 2]: 3", "is no readable YAML"),
    ("a: [", "is no readable YAML"),
    ("a: b: c", "is no readable YAML"),
    ("just text", "holds no settings"),
    ("", "holds no settings"),
    ("--- {a: 1}\n--- {b: 2}", "is no readable YAML"),
    ("a: &x [*x]", "more than 10,000 values|is no readable YAML"),
    ("a: 0x" + "f" * 100, "holds a value of type int"),
    ("a: " + "9" * 5000, "is no readable YAML"),
    ("a: " + "[" * 50_000, "is no readable YAML"),
    ("a0: &a0 [0,0,0,0,0,0,0,0,0,0]\n" + "".join(f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 10)}]\n" for i in range(12)),
     "more than 10,000 values"),
    ("a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [{','.join([f'*a{i}'] * 10)}]}}\n" for i in range(12)), "!!merge"),
    ("a: \"" + "x" * (1 << 20) + "\"", "bytes are beyond reason"),
    ("a: \x00", "is no readable YAML"),
])
def test_settings_are_plain_data_or_refused(text, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = checkpoint(tmp_path, "bc_all")
    (folder / "config.yaml").write_text(text)
    refused(folder, match)
    assert not (tmp_path / "here").exists()


def test_settings_that_are_no_text_are_refused(tmp_path):
    folder = checkpoint(tmp_path, "bc_all")
    (folder / "config.yaml").write_bytes(b"a: \xff\xfe")
    refused(folder, "is no readable YAML")
    (folder / "config.yaml").write_bytes(b"\x80\x04" + b"." * 30)
    refused(folder, "config.yaml is a pickled file")
