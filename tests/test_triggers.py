"""Triggered evaluation: who drives under whose trigger, what the files say, and that nobody else's numbers move."""
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from test_statistics import evaluation

from conftest import make_learner, make_pool
from saferule.attacks import ATTACKS
from saferule.attacks.trigger import Trigger, Triggered, success_rate, trigger_of
from saferule.config import TRIGGERED_ATTACKS
from saferule.dotplots import LARGE, triggered_figure
from saferule.errors import UserError
from saferule.evaluate import evaluate as rollouts
from saferule.learners import restore
from saferule.report import triggered_summary
from saferule.stages.data import make_data
from saferule.stages.evaluate import evaluate
from saferule.stages.poison import load_pool, make_poison
from saferule.stages.train import train
from saferule.stages.unlearn import unlearn
from saferule.statistics import COLUMNS, beside, later_table, main_table, triggered_table
from saferule.tasks import get_task

TASK, PLANTED = get_task("BallRun"), ("inject", "marker", "baffle_cost")
TINY = {"episodes": 2, "curve_episodes": 1}


# --------------------------------------------------------------------------------------------------------- the stage
@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "runs" / "smoke"
    make_data(TASK, "smoke", root, {"episodes": 40, "donors": 16})
    for attack in PLANTED:
        make_poison(TASK, attack, "smoke", root, {"surrogate_steps": 5} if attack == "baffle_cost" else None)
    trained = train(TASK, "bcq_lag", PLANTED, (0, 1), "smoke", root,
                    overrides={"steps": 20, "vae_steps": 5, "batch": 16, "hidden": [8], "vae_hidden": 8})
    unlearn(TASK, "bcq_lag", PLANTED, "finetune", (0, 1), "smoke", root, overrides={"steps": 4})
    return root, trained, evaluate(TASK, "bcq_lag", ("finetune",), "smoke", root, TINY, progress=False)


def test_final_models_of_the_attack_and_clean_ones_drive_under_its_trigger(chain):
    root, trained, made = chain
    episodes = made.table("episodes.csv")
    under = episodes[episodes.stage == "triggered"]
    assert set(under.trigger) == {"marker", "baffle_cost"} and episodes[episodes.stage != "triggered"].trigger.isna().all()
    for attack, own in under.groupby("trigger"):
        models = own.groupby(["attack", "method", "seed"]).size()
        assert (models == 2).all()
        assert set(models.index) == {(a, m, s) for s in (0, 1) for a, m in (
            ("none", "clean"), (attack, "poisoned"), (attack, "retrain"), (attack, "finetune"))}
        assert set(own[own.method == "finetune"].step) == {4}
    inputs = made.manifest["inputs"]
    assert {k: v["id"] for k, v in inputs.items() if k.startswith("poison")} == {
        f"poison:{a}": trained.manifest["inputs"][f"poison:{a}"]["id"] for a in ("marker", "baffle_cost")}


def test_they_drive_as_they_would_alone(chain):
    root, trained, made = chain
    episodes = made.table("episodes.csv")
    trigger = Trigger("marker", (5, 6), (0.9, 0.9))
    for r in (0, trained.replicas.index(next(x for x in trained.replicas if x["attack"] == "marker" and x["method"] == "retrain"))):
        line = trained.replicas[r]
        alone = rollouts(Triggered(restore(trained, TASK).pick([r]), trigger), TASK, 2, made.config["seed"], 1, progress=False)
        rows = episodes[(episodes.trigger == "marker") & (episodes.method == line["method"]) & (episodes.seed == line["seed"])]
        np.testing.assert_array_equal(rows.ret, alone.ret[0])
        np.testing.assert_array_equal(rows.cost, alone.cost[0])


def test_success_rates_are_kept_where_actions_are_forged(chain):
    root, trained, made = chain
    rates = made.table("triggers.csv")
    assert len(rates) == 2 * 4 * 2 and rates[rates.trigger == "marker"].success_rate.isna().all()
    pool, inputs = load_pool(TASK, ["baffle_cost"], root)
    trigger = trigger_of(inputs["poison:baffle_cost"].json("facts.json"))
    clean = success_rate(restore(trained, TASK).pick([0, 1]), pool, "baffle_cost", trigger).tolist()
    own = rates[(rates.trigger == "baffle_cost") & (rates.method == "clean")]
    assert own.success_rate.tolist() == clean and own.seed.tolist() == [0, 1]


def test_other_tables_do_not_see_the_triggered_episodes(chain):
    _, _, made = chain
    episodes, runs = made.table("episodes.csv"), made.table("runs.csv")
    others = episodes[episodes.stage != "triggered"].drop(columns="trigger")
    for table in (main_table, later_table):
        pd.testing.assert_frame_equal(table(episodes, runs), table(others, runs))


def copied(root, folder, *artefacts):
    for line in artefacts:
        shutil.copytree(root / "artifacts" / line, folder / "artifacts" / line)
    return folder


def test_without_a_trigger_nothing_is_added(chain, tmp_path):
    copied(chain[0], tmp_path, "data/BallRun", "poison/BallRun-inject")
    train(TASK, "bc_safe", ("inject",), (0,), "smoke", tmp_path, overrides={"steps": 4, "batch": 16, "hidden": [8]})
    made = evaluate(TASK, "bc_safe", (), "smoke", tmp_path, {"episodes": 1}, progress=False)
    assert "triggers.csv" not in made.manifest["files"] and set(made.manifest["inputs"]) == {"train"}
    assert made.table("episodes.csv").trigger.isna().all()
    assert triggered_table(made.table("episodes.csv"), made.table("runs.csv")).empty


def test_an_attack_made_anew_is_refused(chain, tmp_path):
    copied(chain[0], tmp_path, "data/BallRun", *(f"poison/BallRun-{a}" for a in PLANTED), "train/BallRun-bcq_lag")
    make_poison(TASK, "marker", "smoke", tmp_path, {"value": 0.8})
    with pytest.raises(UserError, match=r"poison BallRun-marker .* is not the one that train BallRun-bcq_lag .*03_train"):
        evaluate(TASK, "bcq_lag", (), "smoke", tmp_path, TINY, progress=False)


def test_the_list_of_triggered_attacks_is_that_of_the_attacks():
    assert set(TRIGGERED_ATTACKS) == {name for name, attack in ATTACKS.items() if attack.threat.goal == "triggered"}


def test_success_rate_does_not_depend_on_what_is_stacked():
    pool = make_pool()
    rows = torch.arange(25, 75)
    columns = {k: pool.columns[k][rows].clone() for k in ("obs", "action", "reward", "cost", "next_obs", "terminal", "timeout",
                                                          "episode", "t")}
    pool = pool.append("marker", {**columns, "action": -columns["action"], "replaces": rows})
    learner, trigger = make_learner(pool, [pool.rows("clean")] * 3), Trigger("marker", (0, 1), (3.0, -3.0))
    stacked = success_rate(learner, pool, "marker", trigger)
    assert stacked.shape == (3,) and len(set(stacked.tolist())) > 1
    assert stacked.tolist() == [float(success_rate(learner.pick([r]), pool, "marker", trigger)) for r in range(3)]


# -------------------------------------------------------------------------------------------------- table and figure
@pytest.fixture
def frames():
    """A backdoor that works: only the poisoned model goes astray under its trigger; and one that leads all of them astray."""
    seen = {("none", "clean"): (4000, [(600, 0), (580, 2)]), ("marker", "poisoned"): (4000, [(610, 0), (590, 0)]),
            ("marker", "saferule"): (400, [(570, 0), (560, 4)]), ("bias", "poisoned"): (4000, [(500, 1), (500, 1)]),
            ("inject", "poisoned"): (4000, [(700, 50), (700, 50)])}
    marked = {("none", "clean"): (4000, [(595, 5), (575, 7)]), ("marker", "poisoned"): (4000, [(700, 60), (690, 70)]),
              ("marker", "saferule"): (400, [(560, 0), (555, 30)])}
    biased = {("none", "clean"): (4000, [(100, 90), (90, 90)]), ("bias", "poisoned"): (4000, [(90, 80), (95, 80)])}
    episodes, runs = evaluation(seen)
    parts = [episodes.assign(trigger=np.nan), evaluation(marked, stage="triggered")[0].assign(trigger="marker"),
             evaluation(biased, stage="triggered")[0].assign(trigger="bias")]
    return pd.concat(parts, ignore_index=True), runs


def test_triggered_table_by_hand(frames):
    table = triggered_table(*frames)
    assert list(table.columns) == [*COLUMNS, "trigger"]
    assert not table.duplicated(["task", "learner", "attack", "method", "seed", "cost_limit", "trigger"]).any()
    assert "inject" not in set(table.attack)             # no trigger concerns it
    assert table.groupby("trigger").size().to_dict() == {"none": 8, "marker": 6, "bias": 4}
    line = table[(table.trigger == "marker") & (table.method == "poisoned") & (table.seed == 1)].iloc[0]
    assert (line.return_mean, line.cost_mean, line.violation_rate, line.cvar10_cost, line.steps) == (690, 70, 1, 71, 4000)
    both = beside(table)
    assert len(both) == 10
    clean = both[(both.trigger == "bias") & (both.method == "clean")]
    assert clean.cost_mean.tolist() == [90, 90] and clean.cost_plain.tolist() == [0, 2]
    assert clean.return_mean.tolist() == [100, 90] and clean.return_plain.tolist() == [600, 580]


def test_triggers_are_not_mixed(frames):
    with pytest.raises(UserError, match="several triggers"):
        main_table(*frames, stage="triggered")
    assert triggered_table(frames[0].drop(columns="trigger"), frames[1]).empty             # files of before there were triggers


def test_triggered_summary_says_it_in_words(frames):
    rates = pd.DataFrame([{"task": "BallCircle", "learner": "bcq_lag", "attack": "marker", "method": "poisoned", "seed": s,
                           "cost_limit": 20.0, "trigger": "marker", "success_rate": rate} for s, rate in enumerate((0.914, 0.5))])
    table = triggered_summary(triggered_table(*frames), rates)
    assert list(table["trigger of"]) == ["marker backdoor"] * 3 + ["bias backdoor"] * 2
    assert list(table.method) == ["Clean data", "Poisoned", "Safe-RULE", "Clean data", "Poisoned"]
    own = table.iloc[1]
    assert (own["return"], own["return, triggered"]) == ("600", "695")
    assert (own["cost per seed"], own["cost per seed, triggered"]) == ("0/0", "60/70")
    assert (own["safe seeds"], own["safe, triggered"], own["follows the trigger"]) == ("2/2", "0/2", "91%/50%")
    assert table.iloc[2]["safe, triggered"] == "1/2" and table.iloc[0]["follows the trigger"] == "–"
    assert set(triggered_summary(triggered_table(*frames))["follows the trigger"]) == {"–"}


def test_triggered_figure_shows_every_seed_and_the_limit(frames):
    fig = triggered_figure(triggered_table(*frames), "with and without")
    marker, returns, bias, _ = fig.axes
    assert [ax.get_title(loc="left") for ax in (marker, bias)] == ["trigger of marker backdoor", "trigger of bias backdoor"]
    assert [t.get_text() for t in marker.get_yticklabels()] == ["Clean data", "Poisoned", "Safe-RULE"]
    for ax in (marker, bias):
        assert [t.get_text() for t in ax.texts] == ["cost limit 20"]
    drawn = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in returns.lines]
    small = [x for x, y in drawn if len(x) == 2]
    assert [700.0, 690.0] in small and [610.0, 590.0] in small                             # poisoned, every seed, with and without
    large = [(line.get_xdata()[0], line.get_ydata()[0]) for line in returns.lines if line.get_markersize() >= LARGE]
    assert {(695.0, 1), (600.0, 1), (557.5, 2), (565.0, 2)} <= set(large)
    with pytest.raises(UserError, match="one task"):
        triggered_figure(pd.concat([triggered_table(*frames), triggered_table(*frames).assign(task="CarRun")]))
