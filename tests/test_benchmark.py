"""The clean benchmark: bars and verdicts worked out by hand, and figures that show what they should."""
import numpy as np
import pandas as pd
import pytest

from saferule import benchmark
from saferule.benchmark import bar, in_order, judged, references, table, verdicts
from saferule.config import LEARNER_NAMES
from saferule.errors import UserError
from saferule.statistics import main_table

RULES = {"share_of_best_safe_return": 0.8, "share_of_tasks": 0.75}


def models(values, task="BallCircle", limit=20.0):
    """Tidy rows of clean models; values: learner -> (return, cost) per seed, two episodes around each."""
    episodes, runs = [], []
    for learner, pairs in values.items():
        for seed, (ret, cost) in enumerate(pairs):
            key = {"task": task, "learner": learner, "attack": "none", "method": "clean", "seed": seed, "cost_limit": limit}
            runs.append({**key, "steps": 100, "train_seconds": 1.0, "artefact": "a"})
            episodes += [{**key, "stage": "final", "step": 100, "ret": ret + d, "cost": cost + d} for d in (-1, 1)]
    return main_table(pd.DataFrame(episodes), pd.DataFrame(runs))


REFS = {"best_safe": 500.0, "mean_safe": 400.0}
GOOD = {"bcq_lag": [(390, 10), (412, 20)], "cpq": [(300, 5), (300, 5)], "cdt": [(480, 5), (480, 45)],
        "bc_safe": [(401, 1), (401, 1)], "bc_all": [(450, 30), (450, 2)]}


def lines(values=GOOD, **more):
    return judged(models(values), {("BallCircle", 20.0): REFS}, RULES, **more).set_index("learner")


def test_the_data_set_the_bar():
    log = pd.DataFrame({"ret": [300, 500, 900, 400], "cost": [0, 20, 60, 10]})
    assert references(log, 20) == {"best_safe": 500, "mean_safe": 400}
    assert references(log, 5) == {"best_safe": 300, "mean_safe": 300}
    assert np.isnan(references(log[log.cost > 20], 20)["best_safe"])
    assert bar("bcq_lag", REFS, RULES) == 400 and bar("bc_safe", REFS, RULES) == 400
    assert np.isnan(bar("bc_risky", REFS, RULES))


def test_judged_by_hand():
    found = lines()
    assert list(found.index) == ["bcq_lag", "cpq", "cdt", "bc_safe", "bc_all"]          # in the benchmark's order
    n = found.loc["bcq_lag"]
    assert (n.return_mean, n.cost_mean, n.safe_seeds, n.best_share) == (401, 15, 2, 401 / 500)
    assert (n.return_low, n.return_high) == (390, 412) and (n.cost_low, n.cost_high) == (10, 20)
    assert n.return_norm == pytest.approx((401 - 0.38312244415283203) / (881.46337890625 - 0.38312244415283203))
    assert n.cost_norm == pytest.approx(0.75) and n.safe and n.good and n.met
    assert found.loc["cpq"].safe and not found.loc["cpq"].met                           # 300 < 400
    cdt = found.loc["cdt"]
    assert cdt.cost_mean == 25 and cdt.safe_seeds == 1 and cdt.good and not cdt.safe and not cdt.met
    assert found.loc["bc_safe"].met
    assert found.loc["bc_all"].safe and not found.loc["bc_all"].met                     # nothing is asked of it


def test_verdicts_count_tasks():
    tasks = ["BallCircle", "BallRun", "CarRun", "CarCircle"]
    bad = {"BallRun": {**GOOD, "bcq_lag": [(390, 30), (412, 30)]}}
    tidy = pd.concat([models(bad.get(task, GOOD), task) for task in tasks], ignore_index=True)
    refs = {(task, 20.0): REFS for task in tasks}
    found = verdicts(judged(tidy, refs, RULES), RULES).set_index(["learner", "rule"])
    safe, both = "within the cost limit", "within it and good enough"
    assert found.loc[("BCQ-Lag", safe)].tolist() == ["3 of 4", "supported", "BallRun"]
    assert found.loc[("BCQ-Lag", both)].tolist() == ["3 of 4", "supported", "BallRun"]
    assert found.loc[("CPQ", safe)].verdict == "supported" and found.loc[("CPQ", both)].tasks == "0 of 4"
    assert found.loc[("CDT", safe)].verdict == "not supported"
    assert found.loc[("BC-Safe", both)].verdict == "supported" and ("BC-All", both) not in found.index
    strict = verdicts(judged(tidy, refs, RULES), {**RULES, "share_of_tasks": 1.0}).set_index(["learner", "rule"])
    assert strict.loc[("BCQ-Lag", safe)].verdict == "not supported"


def test_limits_are_judged_apart():
    tidy = pd.concat([models({"bcq_lag": [(400, 15), (400, 15)]}, limit=limit) for limit in (10.0, 20.0)], ignore_index=True)
    found = judged(tidy, {("BallCircle", limit): REFS for limit in (10.0, 20.0)}, RULES)
    assert found.cost_limit.tolist() == [10, 20] and found.safe.tolist() == [False, True]
    assert found.cost_norm.tolist() == pytest.approx([1.5, 0.75])


def test_table_says_what_went_wrong():
    shown = table(lines().reset_index()).set_index("learner")
    assert shown.verdict.to_dict() == {"BCQ-Lag": "met", "CPQ": "safe, return too low", "CDT": "unsafe", "BC-Safe": "met",
                                       "BC-All": "safe"}
    assert shown.loc["BCQ-Lag", "cost per seed"] == "10/20" and shown.loc["CDT", "safe seeds"] == "1/2"
    assert shown.loc["BCQ-Lag", "normalised cost"] == "0.75 [0.50, 1.00]"
    assert shown.loc["BCQ-Lag", "of best safe return"] == "80%"


def test_every_learner_has_a_name_a_colour_and_a_marker():
    assert set(benchmark.LEARNERS) == set(LEARNER_NAMES)
    looks = list(zip(benchmark.COLOURS.values(), benchmark.MARKERS.values()))
    assert len(set(looks)) == len(looks) == len(LEARNER_NAMES)


def test_no_clean_model_is_said_in_one_line():
    with pytest.raises(UserError, match="no model was trained on clean data"):
        in_order(models(GOOD).assign(method="poisoned"))


def test_figures_draw_every_learner_limit_and_bar():
    found = lines().reset_index()
    figure = benchmark.scatter(found, {("BallCircle", 20.0): REFS}, "T0")
    (ax,) = figure.axes
    assert {text.get_text() for text in figure.legends[0].texts} >= {"BCQ-Lag", "CPQ", "CDT", "best safe episode in the data"}
    levels = sorted({line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1 and len(line.get_ydata()) == 2})
    assert levels == [400, 500]                                                         # both bars
    assert any("cost limit 20" in text.get_text() for text in ax.texts)
    curve = pd.concat([pd.DataFrame({"task": "BallCircle", "learner": "cdt", "method": "clean", "stage": "curve", "step": step,
                                     "seed": [0, 1], "cost_limit": 20.0, "ret": step, "cost": 30 - step}) for step in (10, 20)])
    top, bottom = benchmark.learning_curves(curve, ["cdt"]).axes
    assert top.lines[0].get_xdata().tolist() == [50, 100] and top.lines[0].get_ydata().tolist() == [20, 10]
    assert bottom.lines[0].get_ydata().tolist() == [10, 20]
    with pytest.raises(UserError, match="rolled out along its training"):
        benchmark.learning_curves(curve, ["cpq"])


def test_limit_figure_shades_what_is_beyond_the_limit():
    tidy = pd.concat([models({"cdt": [(400, 15), (400, 25)]}, limit=limit) for limit in (10.0, 40.0)], ignore_index=True)
    figure = benchmark.limit_figure(judged(tidy, {("BallCircle", limit): REFS for limit in (10.0, 40.0)}, RULES))
    cost, ret = figure.axes
    assert cost.lines[0].get_xdata().tolist() == [10, 40] and cost.lines[0].get_ydata().tolist() == [20, 20]
    diagonal = cost.lines[-1]
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    assert ret.lines[0].get_ydata().tolist() == [400, 400]
