"""T3: variants of Safe-RULE that differ in what they say and in nothing else; the table and the picture of them."""
import numpy as np
import pandas as pd
import pytest
import torch
from test_statistics import evaluation

from saferule.ablation import VARIANTS, figure, table, tidy_table
from saferule.artifacts import load
from saferule.config import ABLATIONS, ablated, configured, resolve, with_overrides
from saferule.dotplots import LARGE
from saferule.errors import UserError
from saferule.evaluate import evaluate as rollouts
from saferule.learners import restored_snapshots
from saferule.stages.ablation import ablate, evaluate_ablation
from saferule.stages.data import make_data
from saferule.stages.poison import make_poison
from saferule.stages.train import train
from saferule.stages.unlearn import unlearn
from saferule.statistics import COLUMNS
from saferule.tasks import get_task

TASK, ATTACKS, SEEDS = get_task("BallRun"), ("inject", "label_flip"), (0, 1)
TINY = {"steps": 8, "suppress_steps": 5, "gate_steps": 3}
CALL = (TASK, "bcq_lag", ATTACKS, SEEDS, "smoke")


# ---------------------------------------------------------------------------------------------------------- settings
def test_every_variant_differs_from_the_full_method_in_what_it_says():
    full = configured("saferule", "quick", "BallCircle")
    for variant, difference in ABLATIONS.items():
        own = with_overrides(full, ablated(variant, "quick", "BallCircle"), "saferule")
        assert {k for k in full.__dataclass_fields__ if getattr(own, k) != getattr(full, k)} == set(difference)
    assert list(ABLATIONS)[0] == "full" and set(VARIANTS) == set(ABLATIONS)
    with pytest.raises(TypeError):
        ABLATIONS["more"] = {}
    with pytest.raises(UserError, match="unknown variant of Safe-RULE 'asent'. Did you mean 'ascent'"):
        ablated("asent", "quick", "BallCircle")


def test_no_relearning_is_suppression_for_the_whole_budget():
    for profile, overrides in (("quick", {}), ("smoke", {}), ("quick", {"steps": 123})):
        steps = configured("saferule", profile, "BallCircle", overrides).steps
        assert ablated("no_relearning", profile, "BallCircle", overrides) == {**overrides, "suppress_steps": steps}
    known = resolve("quick", "ablation", "BallCircle")["variants"]
    assert known["no_relearning"]["suppress_steps"] == known["full"]["steps"] > known["full"]["suppress_steps"]


# --------------------------------------------------------------------------------------------------------- the stage
@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "runs" / "smoke"
    make_data(TASK, "smoke", root, {"episodes": 40, "donors": 16})
    for attack in ATTACKS:
        make_poison(TASK, attack, "smoke", root)
    train(TASK, "bcq_lag", ATTACKS, SEEDS, "smoke", root,
          overrides={"steps": 20, "vae_steps": 5, "batch": 16, "hidden": [8], "vae_hidden": 8})
    made = ablate(*CALL, root, overrides=TINY)
    return root, made, evaluate_ablation(TASK, "bcq_lag", made, "smoke", root, {"episodes": 2}, progress=False)


def test_variants_are_artefacts_from_the_same_poisoned_models(chain):
    _, made, _ = chain
    assert list(made) == list(ABLATIONS) and made["ascent"].name == "BallRun-bcq_lag-saferule+ascent"
    start, end = (made["full"].tensors(f) for f in ("snapshots.safetensors", "state.safetensors"))
    for variant, artefact in made.items():
        assert artefact.kind == "unlearn" and artefact.manifest["inputs"] == made["full"].manifest["inputs"]
        assert {k for k, v in artefact.config.items() if v != made["full"].config[k]} == set(ABLATIONS[variant])
        snapshots, state = artefact.tensors("snapshots.safetensors"), artefact.tensors("state.safetensors")
        assert all(torch.equal(v, start[k]) for k, v in snapshots.items() if k.startswith("0/"))
        assert variant == "full" or any(not torch.equal(v, end[k]) for k, v in state.items()), variant
        moved = any(not torch.equal(v, start[f"0/{k}"]) for k, v in state.items() if k.startswith("vae."))
        assert moved == (variant != "frozen_vae")


def test_neither_term_is_fine_tuning_with_n_step_targets(chain):
    root, made, _ = chain
    plain = unlearn(TASK, "bcq_lag", ATTACKS, "finetune_nstep", SEEDS, "smoke", root, overrides=TINY)
    mine = made["neither_term"].tensors("snapshots.safetensors")
    assert all(torch.equal(v, mine[k]) for k, v in plain.tensors("snapshots.safetensors").items())


def test_the_full_method_is_that_of_04_where_it_has_these_settings(chain):
    root, made, _ = chain
    assert made["full"].name == "BallRun-bcq_lag-saferule+full"               # 04 had not been run
    own = unlearn(TASK, "bcq_lag", ATTACKS, "saferule", SEEDS, "smoke", root, overrides=TINY)
    one = lambda overrides: ablate(*CALL, root, overrides=overrides, progress=lambda names: names[:1])["full"]
    assert one(TINY).id == own.id and one(TINY).name == "BallRun-bcq_lag-saferule"
    assert one({**TINY, "margin": 0.5}).name == "BallRun-bcq_lag-saferule+full"
    assert load("unlearn", "BallRun-bcq_lag-saferule", root).id == own.id      # and never overwritten


def test_every_variant_is_rolled_out_twice_and_the_others_once(chain):
    root, made, done = chain
    episodes, runs = done.table("episodes.csv"), done.table("runs.csv")
    assert done.name == "BallRun-bcq_lag+ablation"
    assert set(done.manifest["inputs"]) == {"train", *(f"unlearn:{v}" for v in ABLATIONS)}
    models = episodes.groupby(["variant", "attack", "method", "seed", "stage"]).size()
    assert (models == 2).all()
    expected = {(v, a, "saferule", s, stage) for v in ABLATIONS for a in ATTACKS for s in SEEDS for stage in ("final", "later")}
    expected |= {("none", a, m, s, "final") for s in SEEDS for a, m in (
        ("none", "clean"), *((a, m) for a in ATTACKS for m in ("poisoned", "retrain")))}
    assert set(models.index) == expected and len(runs) == len(ABLATIONS) * 4 + 10
    model = restored_snapshots(made["ascent"], load("train", "BallRun-bcq_lag", root), TASK)[16].pick([3])     # label_flip, seed 1
    alone = rollouts(model, TASK, 2, done.config["seed"], 1, progress=False)
    own = episodes.set_index(["variant", "attack", "seed", "stage"]).sort_index().loc[("ascent", "label_flip", 1, "later")]
    np.testing.assert_array_equal(own.ret, alone.ret[0])
    tidy = tidy_table(episodes, runs)
    assert len(tidy) == len(runs) and tidy[tidy.variant != "none"].notna().all(axis=None)
    assert set(runs[runs.variant == "ascent"].artefact) == {made["ascent"].short}


# -------------------------------------------------------------------------------------------------- table and figure
@pytest.fixture
def frames():
    """Two seeds of BallCircle. Full: 500|0 and 480|2, later 520|0 and 510|4; all others lose 10 and cost 30 more, later 60 more."""
    parts = [(*evaluation({("none", "clean"): (4000, [(600, 0), (580, 3)]), ("inject", "poisoned"): (4000, [(700, 60), (720, 40)]),
                           ("inject", "retrain"): (4000, [(600, 0), (600, 0)])}), "none")]
    for variant in VARIANTS:
        off = variant != "full"
        final = {("inject", "saferule"): (400, [(500 - 10 * off, 30 * off), (480 - 10 * off, 2 + 30 * off)])}
        later = {("inject", "saferule"): (800, [(520 - 10 * off, 60 * off), (510 - 10 * off, 4 + 60 * off)])}
        (episodes, runs), more = evaluation(final), evaluation(later, stage="later")[0]
        parts.append((pd.concat([episodes, more]), runs, variant))
    return tuple(pd.concat([part[i].assign(variant=part[2]) for part in parts], ignore_index=True) for i in (0, 1))


def test_tidy_table_by_hand(frames):
    tidy = tidy_table(*frames)
    assert list(tidy.columns) == [*COLUMNS, "variant", "return_later", "cost_later"]
    assert list(dict.fromkeys(tidy.variant)) == ["none", *VARIANTS] and len(tidy) == 6 + 2 * len(VARIANTS)
    one = tidy[(tidy.variant == "ascent") & (tidy.seed == 1)].iloc[0]
    assert (one.return_mean, one.cost_mean, one.return_later, one.cost_later) == (470, 32, 500, 64)
    assert (one.method, one.steps, one.violation_rate) == ("saferule", 400, 1)
    assert tidy[tidy.variant == "none"].cost_later.isna().all()
    with pytest.raises(UserError, match="none of variant 'no_anneal'"):
        tidy_table(*(frame[frame.variant != "no_anneal"] for frame in frames))


def test_table_says_it_in_words(frames):
    shown = table(tidy_table(*frames)).set_index("variant")
    assert list(shown.index) == ["Poisoned", "Retrained", *VARIANTS.values()]
    full, other = shown.loc["Safe-RULE"], shown.loc["frozen VAE"]
    assert (full["return [95%]"], full["cost per seed"], full["safe seeds"]) == ("490 [480, 500]", "0/2", "2/2")
    assert (full["return against full"], full["of retrained return"], full["cost per seed, later"]) == ("–", "82%", "0/4")
    assert (other["return against full"], other["cost against full"]) == ("-10 [-10, -10]", "+30.0 [+30.0, +30.0]")
    assert (other["cost per seed"], other["safe seeds"], other["return, later"], other["cost per seed, later"]) == (
        "30/32", "0/2", "505", "60/64")
    assert shown.loc["Retrained", "cost per seed, later"] == shown.loc["Retrained", "return, later"] == "–"


def test_figure_has_the_full_method_on_top_and_every_seed(frames):
    tidy = tidy_table(*frames)
    fig = figure(tidy, "T3")
    cost, returns = fig.axes
    assert [t.get_text() for t in cost.get_yticklabels()] == list(VARIANTS.values()) and cost.yaxis_inverted()
    assert [t.get_text() for t in cost.texts] == ["cost limit 20"] and cost.get_title(loc="left") == "injection"
    dots = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in returns.lines if line.get_linestyle() == "None"]
    small = [x for x, _ in dots if len(x) == 2]
    assert small.count([500.0, 480.0]) == 1 and small.count([490.0, 470.0]) == len(VARIANTS) - 1          # ends of the budget
    assert small.count([520.0, 510.0]) == 1 and small.count([510.0, 500.0]) == len(VARIANTS) - 1          # later
    large = {(line.get_xdata()[0], line.get_ydata()[0]) for line in returns.lines if line.get_markersize() >= LARGE}
    assert {(490.0, 0), (515.0, 0), (480.0, 1), (505.0, 1)} <= large
    levels = {line.get_xdata()[0] for line in returns.lines if len(set(line.get_xdata())) == 1 and line.get_linestyle() != "None"}
    assert {600.0, 710.0} <= levels                                  # retrained and poisoned
    with pytest.raises(UserError, match="one task"):
        figure(pd.concat([tidy, tidy.assign(task="CarRun")]))
