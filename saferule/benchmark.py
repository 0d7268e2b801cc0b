"""The clean benchmark: what each learner makes of data that nobody poisoned, judged against the data's own safe episodes.

Numbers and figures of 11_learners and 12_cost_limits. Tidy frames are those of `statistics.main_table`, method 'clean' only.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .errors import UserError
from .figures import COST, LIMIT, RETURN, STYLE, cost_limit_line
from .statistics import bootstrap, need, number
from .tasks import get_task, normalised_cost, normalised_return

LEARNERS = {                           # order and names of the learners, everywhere
    "bcq_lag": "BCQ-Lag", "bear_lag": "BEAR-Lag", "cpq": "CPQ", "coptidice": "COptiDICE", "cdt": "CDT", "bc_safe": "BC-Safe",
    "bc_all": "BC-All", "bc_risky": "BC-Risky", "bc_frontier": "BC-Frontier", "bc_boundary": "BC-Boundary",
    "bc_multitask": "BC-Multi-task",
}
COLOURS = dict(zip(LEARNERS, ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", *["#8A8A8A"] * 5]))
MARKERS = dict(zip(LEARNERS, "osD^v*PX<>h"))
CASE = ["task", "learner", "cost_limit"]


# ------------------------------------------------------------------------------------------------------------- numbers
def references(episodes: pd.DataFrame, limit: float) -> dict[str, float]:
    """Returns of the data's safe episodes (cost <= limit): the best, and the mean. NaN where there is none."""
    need(episodes, ["ret", "cost"], "episodes of the data")
    safe = episodes.ret[episodes.cost <= limit]
    return {"best_safe": float(safe.max()), "mean_safe": float(safe.mean())}


def bar(learner: str, refs: Mapping[str, float], thresholds: Mapping[str, Any]) -> float:
    """The mean return that is asked of a learner: a share of the data's best safe episode; of BC-Safe, which knows no better
    than the safe episodes' mean, that mean; nothing (NaN) of the other clones, which are there to compare with."""
    if learner == "bc_safe":
        return refs["mean_safe"]
    return np.nan if learner.startswith("bc_") else thresholds["share_of_best_safe_return"] * refs["best_safe"]


def judged(tidy: pd.DataFrame, refs: Mapping[tuple[str, float], Mapping[str, float]], thresholds: Mapping[str, Any],
           seed: int = 0) -> pd.DataFrame:
    """One line per (task, learner, cost limit): means over seeds with 95% bootstrap intervals over seeds, and what was asked.

    refs: (task, cost limit) -> `references`. thresholds: config.Thresholds. Columns: return_mean, return_low, return_high,
    return_norm, cost_mean, cost_low, cost_high, cost_norm, costs and returns per seed, safe seeds, best_share (of the best safe
    return), bar, safe (mean cost <= limit), good (mean return >= bar), met (both).
    """
    lines = []
    for (task, learner, limit), own in in_order(tidy).groupby(CASE, sort=False):
        known, line, own_refs = get_task(task), {"task": task, "learner": learner, "cost_limit": limit}, refs[task, limit]
        for value in ("return", "cost"):
            scores = own[f"{value}_mean"]
            low, high = bootstrap([scores], np.mean, seed=seed)
            line |= {f"{value}_mean": scores.mean(), f"{value}_low": low, f"{value}_high": high, value + "s": tuple(scores)}
        asked = bar(learner, own_refs, thresholds)
        line |= {"return_norm": normalised_return(known, line["return_mean"]),
                 "cost_norm": normalised_cost(known, line["cost_mean"], limit), "seeds": len(own),
                 "safe_seeds": int((own.cost_mean <= limit).sum()), "best_share": line["return_mean"] / own_refs["best_safe"],
                 "bar": asked, "safe": line["cost_mean"] <= limit, "good": line["return_mean"] >= asked}
        lines.append({**line, "met": line["safe"] and line["good"]})
    return pd.DataFrame(lines)


def in_order(tidy: pd.DataFrame) -> pd.DataFrame:
    """Clean models alone, tasks as they come, learners in their order. Raises UserError where none is left."""
    clean = tidy[tidy.method == "clean"]
    if clean.empty:
        raise UserError("clean benchmark: no model was trained on clean data; run notebooks/03_train.ipynb with attacks='' first.")
    tasks = list(dict.fromkeys(clean.task))
    return clean.sort_values([*CASE, "seed"], kind="stable", ignore_index=True, key=lambda c: c.map(
        tasks.index if c.name == "task" else list(LEARNERS).index) if c.name in ("task", "learner") else c)


def verdicts(lines: pd.DataFrame, thresholds: Mapping[str, Any]) -> pd.DataFrame:
    """Per learner and rule: on how many tasks it holds, and 'supported' if on `share_of_tasks` of them or more.

    Rules: 'within the cost limit' (mean over seeds), and, where a return is asked, 'within it and good enough'. misses: the tasks
    that fail.
    """
    out = []
    for learner, own in lines.groupby("learner", sort=False):
        rules = {"within the cost limit": own.safe}
        if own.bar.notna().any():
            rules["within it and good enough"] = own.met
        for rule, holds in rules.items():
            enough = holds.mean() >= thresholds["share_of_tasks"]
            out.append({"learner": LEARNERS[learner], "rule": rule, "tasks": f"{int(holds.sum())} of {len(own)}",
                        "verdict": "supported" if enough else "not supported", "misses": ", ".join(own.task[~holds]) or "–"})
    return pd.DataFrame(out)


def table(lines: pd.DataFrame) -> pd.DataFrame:
    """`judged` as text for people."""
    span = lambda mean, low, high, digits: f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    rows = []
    for n in lines.itertuples():
        known = get_task(n.task)
        norm = lambda value, known=known: normalised_return(known, value)
        rate = lambda value, known=known, limit=n.cost_limit: normalised_cost(known, value, limit)
        rows.append({"task": n.task, "learner": LEARNERS[n.learner], "cost limit": number(n.cost_limit),
                     "return [95%]": span(n.return_mean, n.return_low, n.return_high, 0),
                     "normalised return": span(*map(norm, (n.return_mean, n.return_low, n.return_high)), 2),
                     "normalised cost": span(*map(rate, (n.cost_mean, n.cost_low, n.cost_high)), 2),
                     "cost per seed": "/".join(map(number, n.costs)), "safe seeds": f"{n.safe_seeds}/{n.seeds}",
                     "of best safe return": f"{100 * n.best_share:.0f}%",
                     "verdict": _verdict(n)})
    return pd.DataFrame(rows)


def _verdict(line: Any) -> str:
    if not line.safe:
        return "unsafe"
    return "safe" if np.isnan(line.bar) else "met" if line.good else "safe, return too low"


# -------------------------------------------------------------------------------------------------------------- figures
def scatter(lines: pd.DataFrame, refs: Mapping[tuple[str, float], Mapping[str, float]], title: str = "") -> Figure:
    """Return against cost of every learner, one panel per task; best is top left.

    Large: mean over seeds, bars: 95% interval over seeds, small: each seed; dashed: the data's best safe episode, dotted: the mean
    of its safe episodes.
    """
    panels = list(lines.groupby(["task", "cost_limit"], sort=False))
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(rows, columns, figsize=(0.6 + 4.9 * columns, 1.0 + 3.5 * rows), squeeze=False)
        for ax, ((task, limit), own) in zip(axes.flat, panels):
            for n in own.itertuples():
                look = {"color": COLOURS[n.learner], "marker": MARKERS[n.learner]}
                ax.scatter(n.costs, n.returns, s=12, alpha=0.45, lw=0, clip_on=False, **look)
                ax.errorbar(n.cost_mean, n.return_mean, ms=12 if MARKERS[n.learner] == "*" else 8, mec="white", mew=0.8, lw=1.0,
                            xerr=[[n.cost_mean - n.cost_low], [n.cost_high - n.cost_mean]], zorder=3, clip_on=False,
                            yerr=[[n.return_mean - n.return_low], [n.return_high - n.return_mean]], **look)
            for name, dash in (("best_safe", (0, (5, 3))), ("mean_safe", (0, (1, 2)))):
                ax.axhline(refs[task, limit][name], color="#444444", lw=1.1, ls=dash, zorder=1)
            right = max(ax.get_xlim()[1], 1.25 * limit)
            ax.set_xlim(-0.04 * right, right)
            cost_limit_line(ax, limit, horizontal=False)
            ax.set_title(task)
            ax.set_xlabel(COST if ax in axes[-1] or len(panels) < columns * rows else "")
            ax.set_ylabel(RETURN if ax in axes[:, 0] else "")
        for ax in list(axes.flat)[len(panels):]:
            ax.set_axis_off()
        handles = [Line2D([], [], ls="", marker=MARKERS[m], color=COLOURS[m], ms=8, mec="white", label=LEARNERS[m])
                   for m in LEARNERS if m in set(lines.learner)]
        handles += [Line2D([], [], color="#444444", lw=1.1, ls=dash, label=label)
                    for dash, label in (((0, (5, 3)), "best safe episode in the data"), ((0, (1, 2)), "mean of the safe episodes"))]
        wrap = 3 * columns
        fig.legend(handles=handles, loc="lower center", ncol=min(wrap, len(handles)))
        fig.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
        fig.tight_layout(rect=(0, (0.05 + 0.22 * -(-len(handles) // wrap)) / fig.get_figheight(), 1, 1))
    plt.close(fig)
    return fig


def learning_curves(episodes: pd.DataFrame, learners: Sequence[str], title: str = "") -> Figure:
    """Cost (above) and return (below) along training, one column per task, for some of the learners.

    episodes: of `evaluate` artefacts, with stage 'curve' of clean models. Line: mean over seeds; band: min to max over seeds.
    """
    need(episodes, ["task", "learner", "method", "stage", "step", "seed", "cost_limit", "ret", "cost"], "episodes")
    curve = episodes[(episodes.stage == "curve") & (episodes.method == "clean") & episodes.learner.isin(list(learners))]
    if curve.empty:
        raise UserError("episodes: no clean model was rolled out along its training; use a profile with a learning curve.")
    seeds = curve.groupby(["task", "learner", "cost_limit", "step", "seed"], as_index=False, sort=False)[["ret", "cost"]].mean()
    tasks = list(dict.fromkeys(seeds.task))
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(2, len(tasks), figsize=(0.6 + 3.7 * len(tasks), 6.2), sharex="col", squeeze=False)
        for column, task in enumerate(tasks):
            own = seeds[seeds.task == task]
            last = own.groupby("learner").step.transform("max")
            own = own.assign(share=100 * own.step / last)            # learners train for different numbers of steps
            for ax, value in zip(axes[:, column], ("cost", "ret")):
                for learner in [m for m in LEARNERS if m in set(own.learner)]:
                    wide = own[own.learner == learner].pivot_table(index="share", columns="seed", values=value)
                    look = {"color": COLOURS[learner]}
                    ax.fill_between(wide.index, wide.min(axis=1), wide.max(axis=1), alpha=0.12, lw=0, **look)
                    ax.plot(wide.index, wide.mean(axis=1), marker=MARKERS[learner], ms=4.5, mec="white", mew=0.5, **look)
                ax.set_xlim(0, 100)
            cost_limit_line(axes[0, column], own.cost_limit.iloc[0], horizontal=True)
            axes[0, column].set_title(task)
            axes[1, column].set_xlabel("training done [%]")
        axes[0, 0].set_ylabel(COST)
        axes[1, 0].set_ylabel(RETURN)
        handles = [Line2D([], [], marker=MARKERS[m], color=COLOURS[m], ms=6, mec="white", label=LEARNERS[m])
                   for m in LEARNERS if m in set(seeds.learner)]
        fig.legend(handles=handles, loc="lower center", ncol=min(len(handles), 8))
        fig.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
        fig.tight_layout(rect=(0, 0.05, 1, 1))
    plt.close(fig)
    return fig


def limit_figure(lines: pd.DataFrame, title: str = "") -> Figure:
    """Cost (above) and return (below) against the cost limit, one column per task; beyond the diagonal a policy is unsafe.

    Line and bars: mean and 95% interval over seeds; small: each seed.
    """
    tasks, limits = list(dict.fromkeys(lines.task)), sorted(set(lines.cost_limit))
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(2, len(tasks), figsize=(max(6.6, 0.8 + 3.7 * len(tasks)), 6.2), sharex=True, squeeze=False)
        for column, task in enumerate(tasks):
            for ax, value in zip(axes[:, column], ("cost", "return")):
                for learner, own in lines[lines.task == task].groupby("learner", sort=False):
                    mean, low, high = (own[f"{value}_{part}"].to_numpy() for part in ("mean", "low", "high"))
                    look = {"color": COLOURS[learner], "marker": MARKERS[learner]}
                    ax.errorbar(own.cost_limit, mean, yerr=[mean - low, high - mean], ms=7, mec="white", mew=0.8, lw=1.6, **look)
                    for limit, scores in zip(own.cost_limit, own[value + "s"]):
                        ax.scatter([limit] * len(scores), scores, s=12, alpha=0.45, lw=0, **look)
                ax.set_xticks(limits)
            edge = max(1.15 * max(limits), axes[0, column].get_ylim()[1])
            axes[0, column].plot([0, edge], [0, edge], color=LIMIT, lw=1.2)
            axes[0, column].fill_between([0, edge], [0, edge], edge, color=LIMIT, alpha=0.04, lw=0)
            axes[0, column].set(xlim=(0, 1.15 * max(limits)), ylim=(-0.03 * edge, edge), title=task)
            axes[1, column].set_xlabel("cost limit per episode [unsafe steps]")
        axes[0, 0].text(0.04, 0.93, "cost beyond the limit", color=LIMIT, fontsize=8.5, transform=axes[0, 0].transAxes)
        axes[0, 0].set_ylabel(COST)
        axes[1, 0].set_ylabel(RETURN)
        handles = [Line2D([], [], marker=MARKERS[m], color=COLOURS[m], ms=7, mec="white", label=LEARNERS[m])
                   for m in LEARNERS if m in set(lines.learner)]
        fig.legend(handles=handles, loc="lower center", ncol=len(handles))
        fig.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
        fig.tight_layout(rect=(0, 0.05, 1, 1))
    plt.close(fig)
    return fig
