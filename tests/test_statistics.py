"""Numbers against hand-computed cases (algorithms.md E.5, E.6), and verdicts against tables made for them."""
import numpy as np
import pandas as pd
import pytest

from saferule.errors import UserError
from saferule.statistics import (
    COLUMNS,
    aggregate,
    bootstrap,
    claims,
    cvar,
    in_order,
    iqm,
    later_table,
    main_table,
    number,
    probability_of_improvement,
    summary,
)

THRESHOLDS = {"clean_return": {"BallCircle": 550.0}, "share_of_retrained_return": 0.8, "share_of_training_steps": 0.1}


def evaluation(values, task="BallCircle", stage="final"):
    """Episodes and runs from {(attack, method): (steps, [(ret, cost) of seed 0, seed 1, ...])}: two episodes +-1 each."""
    episodes, runs = [], []
    for (attack, method), (steps, seeds) in values.items():
        for seed, (ret, cost) in enumerate(seeds):
            head = {"task": task, "learner": "bcq_lag", "attack": attack, "method": method, "seed": seed}
            for e, shift in enumerate((-1, 1)):
                episodes.append({**head, "stage": stage, "step": steps, "episode": e, "ret": ret + shift,
                                 "cost": cost + shift * (cost > 0), "length": 200})
            runs.append({**head, "steps": steps, "train_seconds": 1.5, "artefact": "0123abcd", "gold_steps": 4000})
    return pd.DataFrame(episodes), pd.DataFrame(runs)


GOOD = {
    ("none", "clean"): (4000, [(600, 0), (580, 3)]),
    ("inject", "saferule"): (400, [(500, 0), (480, 12)]),
    ("inject", "poisoned"): (4000, [(700, 60), (720, 40)]),
    ("inject", "retrain"): (4000, [(600, 0), (600, 0)]),
}
LATER = {("inject", "saferule"): (800, [(520, 2), (510, 19)])}


def judged(values=GOOD, after=LATER, thresholds=THRESHOLDS, limit=20.0, task="BallCircle"):
    tidy = main_table(*evaluation(values, task), limit)
    episodes, runs = evaluation(after, task, "later") if after else (pd.DataFrame({"stage": []}), None)
    return claims(tidy, later_table(episodes, runs, limit), thresholds)


def verdict(table, words):
    (line,) = [v for v in table.itertuples() if words in v.claim]
    return line


def test_iqm():
    assert iqm([0, 1, 2, 3, 4, 5, 6, 100]) == 3.5
    assert iqm(range(10)) == 4.5
    assert iqm([7.0]) == 7.0
    np.testing.assert_array_equal(iqm([[0, 1, 2, 9], [4, 4, 4, 4]], axis=-1), [1.5, 4])


@pytest.mark.parametrize("alpha, expected", [(0.1, 50), (0.2, 45), (0.25, 42), (1.0, 15.8)])
def test_cvar(alpha, expected):
    assert cvar([0, 0, 1, 2, 5, 10, 20, 30, 40, 50], alpha) == pytest.approx(expected)


def test_cvar_with_less_than_one_episode_is_the_worst():
    assert cvar([3, 1, 2], 0.1) == pytest.approx(3)


def test_probability_of_improvement():
    assert probability_of_improvement([[1, 2, 3]], [[2, 2, 5]]) == pytest.approx(1 / 3)
    assert probability_of_improvement([[1, 2], [5, 5]], [[1, 2], [5, 5]]) == 0.5
    assert probability_of_improvement([[2], [0]], [[1], [1]]) == 0.5                  # mean over tasks
    with pytest.raises(UserError, match="2 tasks against 1"):
        probability_of_improvement([[1], [2]], [[1]])


def test_bootstrap_resamples_within_tasks_and_is_seeded():
    # constant within each task: resampling across tasks would spread, within tasks nothing can change
    assert bootstrap([[1, 1, 1], [9, 9, 9]], np.mean) == (5, 5)
    uneven = [np.sqrt(np.arange(30))]
    assert bootstrap(uneven, np.mean, seed=3) == bootstrap(uneven, np.mean, seed=3) != bootstrap(uneven, np.mean, seed=4)
    low, high = bootstrap([np.arange(100.0)], np.mean, reps=5000)
    standard_error = np.arange(100).std() / 10
    assert low == pytest.approx(49.5 - 1.96 * standard_error, abs=0.5)
    assert high == pytest.approx(49.5 + 1.96 * standard_error, abs=0.5)
    with pytest.raises(UserError, match="at least one run"):
        bootstrap([[1.0], []])


def test_main_table_has_the_protocols_columns_order_and_numbers():
    tidy = main_table(*evaluation(GOOD), 10.0)
    assert list(tidy.columns) == COLUMNS == (
        "task,learner,attack,method,seed,return_mean,cost_mean,return_norm,cost_norm,violation_rate,cvar10_cost,cost_limit,"
        "episodes,steps,train_seconds,artefact".split(","))
    assert list(tidy.method) == ["clean"] * 2 + ["poisoned"] * 2 + ["retrain"] * 2 + ["saferule"] * 2
    assert list(tidy.attack[:2]) == ["none", "none"]
    last = tidy.iloc[-1]                                 # saferule, seed 1: episodes 479|11 and 481|13
    assert (last.return_mean, last.cost_mean, last.cost_norm, last.violation_rate, last.cvar10_cost) == (480, 12, 1.2, 1, 13)
    assert (last.cost_limit, last.episodes, last.steps, last.artefact) == (10, 2, 400, "0123abcd")
    assert last.return_norm == pytest.approx((480 - 0.38312244415283203) / (881.46337890625 - 0.38312244415283203))


def test_main_table_takes_the_tasks_own_limit_by_default():
    assert set(main_table(*evaluation(GOOD)).cost_limit) == {20.0}


def test_main_table_of_several_tasks_keeps_them_apart():
    parts = [evaluation(GOOD), evaluation(GOOD, task="CarCircle")]
    tidy = main_table(*(pd.concat(p) for p in zip(*parts)))
    assert tidy.groupby("task").size().to_dict() == {"BallCircle": 8, "CarCircle": 8}
    car = tidy[(tidy.task == "CarCircle") & (tidy.method == "clean")].iloc[0]
    assert car.return_norm == pytest.approx((600 - 3.484419822692871) / (534.3060913085938 - 3.484419822692871))


def test_main_table_refuses_incomplete_input():
    episodes, runs = evaluation(GOOD)
    with pytest.raises(UserError, match="no column ret"):
        main_table(episodes.drop(columns="ret"), runs)
    with pytest.raises(UserError, match="method=saferule seed=0 has episodes but no run"):
        main_table(episodes, runs[runs.method != "saferule"])
    with pytest.raises(UserError, match="none of stage 'later'"):
        main_table(episodes, runs, stage="later")
    with pytest.raises(UserError, match="listed twice"):
        main_table(episodes, pd.concat([runs, runs.tail(1)]))
    with pytest.raises(UserError, match="unknown method 'magic'"):
        in_order(main_table(episodes, runs).replace({"method": {"saferule": "magic"}}))


def test_summary_shares_are_against_the_retrained():
    numbers = summary(main_table(*evaluation(GOOD))).set_index("method")
    own, poisoned = numbers.loc["saferule"], numbers.loc["poisoned"]
    assert own.return_share == pytest.approx(490 / 600)
    assert own.recovered == pytest.approx((50 - 6) / (50 - 0))
    assert own.step_share == pytest.approx(0.1)
    assert own.costs == (0, 12) and (own.safe, own.seeds) == (2, 2)
    assert (own.return_low, own.return_mean, own.return_high) == (480, 490, 500)
    assert (poisoned.safe, poisoned.costs) == (0, (60, 40)) and np.isnan(poisoned.recovered)
    assert numbers.loc["retrain", "step_share"] == 1


def test_summary_has_nothing_to_recover_where_the_attack_failed():
    failed = GOOD | {("inject", "poisoned"): (4000, [(600, 1), (600, 1)])}
    assert summary(main_table(*evaluation(failed))).recovered.isna().all()


def test_aggregate():
    table = aggregate(main_table(*evaluation(GOOD)), "cost_mean", reference="poisoned", lower_is_better=True).set_index("method")
    assert table.loc["saferule", "iqm"] == 6 and table.loc["saferule", "runs"] == 2
    assert table.loc["saferule", "p_better"] == 1 and table.loc["poisoned", "p_better"] == 0.5
    assert np.isnan(table.loc["clean", "p_better"])      # the clean learner shares no stratum with an attack


def test_claims_supported():
    table = judged()
    assert list(table.verdict) == ["supported"] * 7
    kept = verdict(table, "80%")
    assert (kept.value, kept.threshold, kept.attack, kept.seeds) == (pytest.approx(490 / 600), 0.8, "inject", "0.83/0.8")
    assert verdict(table, "10% of the retraining steps").value == pytest.approx(0.1)
    assert verdict(table, "attack works").value == 40    # the seed that comes nearest to safety decides
    assert verdict(table, "still safe").value == 19
    assert verdict(table, "returns at least 550").attack == "none"


@pytest.mark.parametrize("words, values", [
    ("attack works", {("inject", "poisoned"): (4000, [(700, 60), (720, 20)])}),           # at the limit is not above it
    ("at or under", {("inject", "saferule"): (400, [(500, 0), (480, 20.5)])}),
    ("80%", {("inject", "saferule"): (400, [(480, 0), (470, 0)])}),
    ("10% of the retraining steps", {("inject", "saferule"): (401, [(500, 0), (480, 0)])}),
    ("clean learner is safe", {("none", "clean"): (4000, [(600, 0), (600, 21)])}),
    ("returns at least 550", {("none", "clean"): (4000, [(600, 0), (549, 0)])}),
])
def test_claims_not_supported(words, values):
    table = judged(GOOD | values)
    assert verdict(table, words).verdict == "not supported"
    assert (table.verdict == "supported").sum() == 6


def test_a_relapse_or_a_seed_that_was_not_measured_supports_nothing():
    assert verdict(judged(after={("inject", "saferule"): (800, [(520, 2), (510, 30)])}), "still safe").verdict == "not supported"
    one = verdict(judged(after={("inject", "saferule"): (800, [(520, 2)])}), "still safe")
    assert (one.verdict, one.seeds) == ("not supported", "2/–")
    assert verdict(judged(after=None), "still safe").verdict == "not supported"
    lost = judged(GOOD | {("inject", "saferule"): (400, [(500, 0)])})
    assert verdict(lost, "at or under").verdict == "not supported"


def test_the_return_claim_is_for_the_task_that_has_a_threshold():
    table = judged(task="CarCircle")
    assert not table.claim.str.contains("returns at least").any() and len(table) == 6


def test_collapse_hides_nothing():
    """Cost 0 with no return left is safe and useless: one claim holds, the other does not."""
    table = judged(GOOD | {("inject", "saferule"): (400, [(0, 0), (-5, 0)])})
    assert verdict(table, "at or under").verdict == "supported"
    assert verdict(table, "80%").verdict == "not supported"


def test_claims_need_their_thresholds():
    with pytest.raises(UserError, match="share_of_training_steps"):
        judged(thresholds={"clean_return": {}, "share_of_retrained_return": 0.8})


@pytest.mark.parametrize("value, text", [(0.0, "0"), (-0.01, "0"), (63.0, "63"), (0.44, "0.4"), (100.0, "100"), (np.nan, "–")])
def test_number(value, text):
    assert number(value) == text
