"""Estimates beside rollouts: joins, rank correlation, coverage, failures and chosen steps, by hand."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from saferule.config import OPEConfig
from saferule.errors import UserError
from saferule.validation import agreement, beside_rollouts, chosen_steps, failures, for_people, ope_figure, rank_correlation

HEAD = {"task": "BallRun", "learner": "bcq_lag", "attack": "inject", "cost_limit": 20.0, "stage": "final", "step": 90}


def estimates(costs, rets, se=1.0, z=1.64):
    """One policy per seed."""
    frame = pd.DataFrame({"seed": range(len(costs)), "ret": rets, "cost": costs}).assign(**HEAD, method="saferule")
    for name in ("ret", "cost"):
        frame = frame.assign(**{f"{name}_se": se, f"{name}_low": frame[name] - z * se, f"{name}_high": frame[name] + z * se})
    return frame.assign(off_support=0.01, peak=0.5)


def episodes(costs, rets, spread=2.0):
    """Two episodes per policy, `spread` above and below its mean."""
    return pd.DataFrame([{**HEAD, "method": "saferule", "seed": i, "episode": e, "ret": r + d, "cost": c + d}
                         for i, (c, r) in enumerate(zip(costs, rets)) for e, d in enumerate((-spread, spread))])


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 4000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)                    # 1 - 6 * 2 / (3 * 8)
    assert rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(np.sqrt(0.75))          # ranks 1.5, 1.5, 3
    assert np.isnan(rank_correlation([1, 1], [1, 2]))


def test_coverage_and_verdicts_by_hand():
    """Interval +-1.64; the rollouts' standard error is 2, so that 'near' reaches 1.64 sqrt(5) = 3.67."""
    table = beside_rollouts(estimates([10, 17, 19, 30], [500] * 4), episodes([11, 20, 22, 15], [500, 503, 510, 500]), 1.64)
    assert table.real_cost.tolist() == [11, 20, 22, 15] and table.real_cost_se.tolist() == pytest.approx([2] * 4)
    assert table.cost_covered.tolist() == [True, False, False, False] and table.cost_near.tolist() == [True, True, True, False]
    assert table.ret_covered.tolist() == [True, False, False, True] and table.ret_near.tolist() == [True, True, False, True]
    assert table.called_safe.tolist() == [True, True, False, False] and table.safe.tolist() == [True, True, False, True]
    lines = agreement(table).set_index("signal")
    assert lines.coverage.to_dict() == {"return": 0.5, "cost": 0.25} and lines.near.to_dict() == {"return": 0.75, "cost": 0.75}
    assert lines.loc["cost", "bias"] == pytest.approx((-1 - 3 - 3 + 15) / 4)
    assert lines.loc["cost", "mean_abs_error"] == pytest.approx(22 / 4)
    wrong = failures(table)["what is wrong"].to_dict()
    assert wrong == {2: "return missed", 3: "called unsafe, keeps the limit; cost missed"}


def test_the_dangerous_mistake_is_named():
    table = beside_rollouts(estimates([10], [500]), episodes([25], [500]), 1.64)
    assert failures(table)["what is wrong"].tolist() == ["called safe, costs more than the limit; cost missed"]


def test_a_policy_without_rollouts_is_refused():
    with pytest.raises(UserError, match="no rollouts of BallRun bcq_lag inject saferule 1"):
        beside_rollouts(estimates([10, 12], [500, 500]), episodes([10], [500]), 1.64)


def test_text_and_picture():
    table = beside_rollouts(estimates([10, 30], [500, 510]), episodes([12, 28], [495, 500]), 1.64)
    line = for_people(table).iloc[0]
    assert line["cost, estimate"] == "10 [8.4, 11.6]" and line["rollouts "] == "12" and line["attack"] == "injection"
    fig = ope_figure(table)
    assert "rank correlation 1.00" in fig.axes[1].get_title(loc="left") and not plt.get_fignums()


def test_chosen_steps_report_the_other_half():
    """Fold 0 chooses step 40; fold 1 says what it is worth; rollouts of the same step stand beside."""
    one = {**HEAD, "stage": "curve", "method": "saferule", "seed": 0, "peak": 0.5, "off_support": 0.0}
    lines = [{**one, "fold": fold, "step": step, "ret_low": ret, "cost_high": cost, "ret": ret + 5 + 100 * fold,
              "cost": cost - 1 + fold} for fold in (0, 1) for step, ret, cost in ((0, 800, 60), (40, 500, 18), (90, 400, 5))]
    driven = pd.DataFrame([{**one, "step": step, "ret": ret, "cost": cost} for step, ret, cost in
                           ((0, 790, 55), (40, 520, 25), (90, 410, 3))])
    line = chosen_steps(pd.DataFrame(lines), driven, OPEConfig()).iloc[0]
    assert line.step == 40 and (line.ret, line.cost) == (605, 18)
    assert (line.driven_ret, line.driven_cost, line.driven_ret_end, line.driven_cost_end) == (520, 25, 410, 3)
    vetoed = chosen_steps(pd.DataFrame(lines).assign(peak=9.0), driven, OPEConfig()).iloc[0]
    assert np.isnan(vetoed.step) and np.isnan(vetoed.cost) and vetoed.why == "all vetoed" and vetoed.driven_cost_end == 3
