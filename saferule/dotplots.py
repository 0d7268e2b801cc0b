"""Dot plots: cost beside return, one line per method, every seed a dot. Style, names and colours are those of `figures`."""
from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .errors import UserError
from .figures import COLOURS, COST, MARKERS, RETURN, STYLE, cost_limit_line
from .statistics import ATTACKS, METHODS, beside

SMALL, LARGE = 3.5, 8.5                # points: a seed, a mean


def triggered_figure(triggered: pd.DataFrame, title: str = "") -> Figure:
    """Cost (left) and return (right) of every method without a trigger and under it, one row of panels per trigger.

    triggered: `triggered_table` of one (task, learner) and cost limit; else UserError. Hollow: without, filled: with the trigger;
    small: each seed, a line joins its two; large: means over seeds.
    """
    if len(triggered[["task", "learner", "cost_limit"]].drop_duplicates()) != 1:
        raise UserError("triggered_figure: hand in models of one task, learner and cost limit.")
    both = beside(triggered)
    triggers = list(dict.fromkeys(both.trigger))
    sizes = [both[both.trigger == t].method.nunique() for t in triggers]
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(len(triggers), 2, figsize=(9.6, 1.2 + sum(0.5 + 0.36 * n for n in sizes)), squeeze=False,
                                 sharex="col", height_ratios=sizes)
        for row, trigger in zip(axes, triggers):
            own = both[both.trigger == trigger]
            methods = [m for m in METHODS if m in set(own.method)]
            for ax, value in zip(row, ("cost", "return")):
                for y, method in enumerate(methods):
                    plain, shown = (own.loc[own.method == method, f"{value}_{part}"].to_numpy() for part in ("plain", "mean"))
                    look = {"color": COLOURS[method], "marker": MARKERS[method]}
                    ax.hlines(beside_each_other(y, len(plain)), plain, shown, color=look["color"], lw=0.8, alpha=0.5)
                    dots(ax, plain, y, hollow=True, **look)
                    dots(ax, shown, y, **look)
                lines_named(ax, [METHODS[m] for m in methods] if ax is row[0] else [""] * len(methods))
            row[0].set_title(f"trigger of {ATTACKS.get(trigger, trigger)}")
        for ax in axes[:, 0]:
            cost_limit_line(ax, triggered.cost_limit.iloc[0], horizontal=False)
        axes[-1, 0].set_xlabel(COST)
        axes[-1, 1].set_xlabel(RETURN)
        grey = {"color": "#555555", "marker": "o", "ls": "", "ms": LARGE}
        fig.legend(handles=[Line2D([], [], mfc="white", mew=1.6, label="without the trigger", **grey),
                            Line2D([], [], mec="white", label="with the trigger", **grey)], loc="lower center", ncol=2)
        if title:
            fig.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
        fig.tight_layout(rect=(0, 0.35 / fig.get_figheight(), 1, 1))
    plt.close(fig)
    return fig


# ----------------------------------------------------------------------------------------------------- parts of figures
def beside_each_other(y: float, seeds: int) -> np.ndarray:
    """Heights [seeds] around line y, so that equal values do not hide each other."""
    return y + 0.16 * (np.arange(seeds) - (seeds - 1) / 2)


def dots(ax: Axes, values: np.ndarray, y: float, hollow: bool = False, **look) -> None:
    """Every seed small, their mean large, at line y."""
    grow = 1.5 if look.get("marker") == "*" else 1.0                  # a star of the same size looks smaller
    inside = {"mfc": "white"} if hollow else {}
    ax.plot(values, beside_each_other(y, len(values)), ls="", ms=grow * SMALL, clip_on=False, zorder=2.5, **inside, **look)
    edge = {"mfc": "white", "mew": 1.6} if hollow else {"mec": "white", "mew": 0.8}
    ax.plot(values.mean(), y, ls="", ms=grow * LARGE, clip_on=False, zorder=3, **edge, **look)


def lines_named(ax: Axes, names: list[str]) -> None:
    """One name per line, the first on top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
