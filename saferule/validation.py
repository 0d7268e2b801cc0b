"""Off-policy estimates beside real rollouts: rank correlation, coverage, and every policy that the estimates get wrong.

Rollouts judge the estimates here; nothing is chosen or tuned by what this module says.
"""
from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .config import OPEConfig
from .errors import UserError
from .figures import COLOURS, LIMIT, MARKERS, STYLE, cost_limit_line
from .ope import select
from .statistics import ATTACKS, METHODS, need, number

KEYS = ["task", "learner", "attack", "method", "seed", "cost_limit", "stage", "step"]          # of a policy
SIZE = lambda method: 11 if MARKERS[method] == "*" else 7                                      # a star looks smaller
SIGNALS = {"ret": "return", "cost": "cost"}


def beside_rollouts(estimates: pd.DataFrame, episodes: pd.DataFrame, z: float) -> pd.DataFrame:
    """The estimates with real_ret, real_cost (means of the rollouts), their standard errors real_ret_se, real_cost_se, `episodes`,
    and what that says of them: ret_covered, cost_covered (the real mean lies in the interval), ret_near, cost_near (also when the
    rollouts' own error is allowed for: within z root-sum-squares), called_safe (upper bound of the cost within the limit), safe.

    estimates: of an `ope` artefact; episodes: of the `evaluate` artefact of the same models. Raises UserError for a model
    without rollouts.
    """
    need(estimates, [*KEYS, "ret", "ret_se", "cost", "cost_se"], "estimates")
    grouped = need(episodes, [*KEYS, "ret", "cost"], "episodes").groupby(KEYS)[["ret", "cost"]]
    mean, error, count = grouped.mean(), grouped.sem(), grouped.size()
    real = pd.concat([mean.add_prefix("real_"), error.fillna(np.inf).add_prefix("real_").add_suffix("_se"),
                      count.rename("episodes")], axis=1).reset_index()
    out = estimates.merge(real, on=KEYS, how="left")
    if out.episodes.isna().any():
        line = out[out.episodes.isna()].iloc[0]
        raise UserError(f"no rollouts of {' '.join(str(line[k]) for k in KEYS)}; run notebooks/05_evaluate.ipynb again.")
    for name in SIGNALS:
        error = (out[name] - out[f"real_{name}"]).abs()
        out[f"{name}_covered"] = out[f"real_{name}"].between(out[f"{name}_low"], out[f"{name}_high"])
        out[f"{name}_near"] = error <= z * np.hypot(out[f"{name}_se"], out[f"real_{name}_se"])
    return out.assign(called_safe=out.cost_high <= out.cost_limit, safe=out.real_cost <= out.cost_limit)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: Pearson's of the ranks, ties sharing their mean rank. NaN where one side is constant."""
    return float(pd.Series(x, dtype=float).rank().corr(pd.Series(y, dtype=float).rank()))


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Of return and cost over all policies: rank_correlation, bias (mean of estimate - real), mean_abs_error, coverage, near."""
    lines = []
    for name, label in SIGNALS.items():
        error = table[name] - table[f"real_{name}"]
        ranks = rank_correlation(table[name], table[f"real_{name}"])
        lines.append({"signal": label, "policies": len(table), "rank_correlation": ranks,
                      "bias": error.mean(), "mean_abs_error": error.abs().mean(), "coverage": table[f"{name}_covered"].mean(),
                      "near": table[f"{name}_near"].mean()})
    return pd.DataFrame(lines)


def failures(table: pd.DataFrame) -> pd.DataFrame:
    """Policies that the estimates get wrong, and how: called safe but not, called unsafe but safe, return or cost far off."""
    says = {"called safe, costs more than the limit": table.called_safe & ~table.safe,
            "called unsafe, keeps the limit": ~table.called_safe & table.safe,
            "return missed": ~table.ret_near, "cost missed": ~table.cost_near}
    why = ["; ".join(text for text, wrong in says.items() if wrong[i]) for i in table.index]
    out = for_people(table).assign(**{"what is wrong": why})
    return out[out["what is wrong"] != ""]


def chosen_steps(estimates: pd.DataFrame, episodes: pd.DataFrame, cfg: OPEConfig) -> pd.DataFrame:
    """What `ope.select` chooses by fold 0 among the steps of each repaired model, and what it is worth.

    estimates: of `stages.ope.candidates`; episodes: rollouts of the same snapshots (stage 'curve'). One line per model: chosen step
    (NaN: none), ret and cost there by fold 1; driven_ret, driven_cost: by rollouts, there and (.._end) at the end of the budget.
    """
    driven = episodes[episodes.stage == "curve"].groupby(["method", "attack", "seed", "step"])[["ret", "cost"]].mean()
    lines = []
    for (method, attack, seed), own in estimates.groupby(["method", "attack", "seed"], sort=False):
        first, second = (own[own.fold == fold].set_index("step") for fold in (0, 1))
        choice, limit = select(first, own.cost_limit.iloc[0], cfg), own.cost_limit.iloc[0]
        real = driven.loc[method, attack, seed]
        there = lambda frame, name, at=choice.at: np.nan if at is None else frame.loc[at, name]
        lines.append({"task": own.task.iloc[0], "learner": own.learner.iloc[0], "attack": attack, "method": method, "seed": seed,
                      "cost_limit": limit, "step": np.nan if choice.at is None else choice.at,
                      **{name: there(second, name) for name in SIGNALS},
                      **{f"driven_{name}": there(real, name) for name in SIGNALS},
                      **{f"driven_{name}_end": real.loc[first.index.max(), name] for name in SIGNALS},
                      "why": "all vetoed" if choice.at is None else choice.reasons[choice.at]})
    return pd.DataFrame(lines)


def for_people(table: pd.DataFrame) -> pd.DataFrame:
    """One line per policy as text: estimate with its interval, beside the mean of the rollouts."""
    span = lambda line, name, digits: (f"{number(line[name], digits)} [{number(line[f'{name}_low'], digits)}, "
                                       f"{number(line[f'{name}_high'], digits)}]")
    lines = [{"task": line.task, "learner": line.learner, "attack": ATTACKS.get(line.attack, line.attack),
              "method": METHODS[line.method], "seed": line.seed,
              "return, estimate": span(line, "ret", 0), "rollouts": number(line.real_ret, 0),
              "cost, estimate": span(line, "cost", 1), "rollouts ": number(line.real_cost),
              "off support": f"{line.off_support:.0%}"} for _, line in table.iterrows()]
    return pd.DataFrame(lines, index=table.index)


def ope_figure(table: pd.DataFrame, title: str = "") -> Figure:
    """Estimate against rollouts, return and cost, one point per policy; on the diagonal is right. The cost limit on both axes.

    Vertical bars: the estimate's interval; horizontal: the rollouts' standard error. Red rings: called safe, but costs more.
    """
    limit = float(table.cost_limit.iloc[0])
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(1, 2, figsize=(10.6, 5.2))
        for ax, (name, label) in zip(axes, SIGNALS.items()):
            for method in [m for m in METHODS if m in set(table.method)]:
                own = table[table.method == method]
                bars = [own[name] - own[f"{name}_low"], own[f"{name}_high"] - own[name]]
                known = own[f"real_{name}_se"].replace(np.inf, np.nan)
                ax.errorbar(own[f"real_{name}"], own[name], yerr=bars, xerr=known, ls="", color=COLOURS[method],
                            marker=MARKERS[method], ms=SIZE(method), mec="white", mew=0.6, elinewidth=0.9, alpha=0.9)
            low, high = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
            ax.plot([low, high], [low, high], color="#444444", lw=1, ls=(0, (5, 3)), zorder=1)
            ax.set(xlim=(low, high), ylim=(low, high), aspect="equal", xlabel=f"{label} per episode, mean of rollouts",
                   ylabel=f"{label} per episode, estimate")
            found = rank_correlation(table[name], table[f"real_{name}"])
            ax.set_title(f"{label}: rank correlation {found:.2f}, coverage {table[f'{name}_covered'].mean():.0%}")
        wrong = table[table.called_safe & ~table.safe]
        axes[1].scatter(wrong.real_cost, wrong.cost, s=160, facecolors="none", edgecolors=LIMIT, lw=1.4, zorder=4)
        axes[1].axhline(limit, color=LIMIT, lw=1.2)
        cost_limit_line(axes[1], limit, horizontal=False)
        handles = [Line2D([], [], ls="", marker=MARKERS[m], color=COLOURS[m], ms=SIZE(m), mec="white", label=METHODS[m])
                   for m in METHODS if m in set(table.method)]
        fig.legend(handles=handles, loc="lower center", ncol=min(len(handles), 7))
        fig.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
        fig.tight_layout(rect=(0, 0.07, 1, 1))
    plt.close(fig)
    return fig
