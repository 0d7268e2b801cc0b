"""T3: what each part of Safe-RULE does. Numbers and figure of 13_ablation, from the files of `stages.ablation`."""
from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .config import ABLATIONS
from .dotplots import LARGE, beside_each_other, dots, lines_named
from .errors import UserError
from .figures import COLOURS, COST, MARKERS, RETURN, STYLE, cost_limit_line
from .statistics import ATTACKS, CASE, KEYS, METHODS, bootstrap, later_table, main_table, need, number

VARIANTS = {                           # order and names of the variants, everywhere
    "full": "Safe-RULE",
    "no_cost_term": "without the cost term",
    "no_reward_term": "without the reward term",
    "neither_term": "without either term",
    "cost_down": "costs pushed down",
    "ascent": "ascent for softplus",
    "no_anneal": "weight not annealed",
    "no_relearning": "no relearning phase",
    "frozen_vae": "frozen VAE",
    "frozen_margins": "frozen margins",
    "actor_gap": "with an actor gap term",
    "no_temptation": "pushed whether it tempts or not",
    "no_gate": "without the gate",
    "no_long_targets": "without long targets",
    "constant_mix": "long targets not annealed",
}
DASHES = {"retrain": (0, (5, 3)), "poisoned": (0, (1, 1.5))}
assert tuple(VARIANTS) == tuple(ABLATIONS)


def tidy_table(episodes: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Tidy T3: one row per (task, learner, attack, method, seed, cost limit, variant): COLUMNS, variant, return_later, cost_later.

    variant: one of VARIANTS, or 'none' for the models that they are compared with. *_later: means after as many further ordinary
    steps on the retain rows (NaN for the latter). Raises UserError if a variant is missing.
    """
    need(episodes, ["variant"], "episodes")
    new, parts = {"return_mean": "return_later", "cost_mean": "cost_later"}, []
    for variant in ("none", *VARIANTS):
        own, took = episodes[episodes.variant == variant], runs[runs.variant == variant]
        if own.empty:
            raise UserError(f"episodes: none of variant '{variant}'; run notebooks/13_ablation.ipynb again.")
        later = later_table(own, took)[[*KEYS, *new]].rename(columns=new)
        final = main_table(own, took).assign(variant=variant)
        parts.append(final.merge(later, "left", on=KEYS) if len(later) else final.assign(**dict.fromkeys(new.values(), np.nan)))
    return pd.concat(parts, ignore_index=True)


def table(tidy: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The same as text, one line per case and variant; the poisoned and retrained models come first, the full method next.

    Intervals: 95% bootstrap over seeds. 'against full': the differences to the full method seed by seed, mean and interval.
    """
    lines = []
    for (task, learner, attack, limit), own in tidy[tidy.attack != "none"].groupby(CASE, sort=False):
        full, gold = own[own.variant == "full"].set_index("seed"), own[own.method == "retrain"].return_mean.mean()
        for who, mine in shown_lines(own):
            mine = mine.set_index("seed")
            line = {"task": task, "learner": learner, "attack": ATTACKS.get(attack, attack), "variant": who,
                    "return [95%]": span(mine.return_mean, "", 0, seed), "cost per seed": "/".join(map(number, mine.cost_mean)),
                    "safe seeds": f"{int((mine.cost_mean <= limit).sum())}/{len(mine)}",
                    "of retrained return": f"{100 * mine.return_mean.mean() / gold:.0f}%" if gold > 0 else "–"}
            for value, digits in (("return", 0), ("cost", 1)):
                gap = mine[f"{value}_mean"] - full[f"{value}_mean"]
                line[f"{value} against full"] = "–" if who == VARIANTS["full"] else span(gap, "+", digits, seed)
            lines.append({**line, "return, later": number(mine.return_later.mean(), 0),
                          "cost per seed, later": "–" if mine.cost_later.isna().all() else "/".join(map(number, mine.cost_later))})
    return pd.DataFrame(lines)


def span(values: pd.Series, sign: str, digits: int, seed: int) -> str:
    """Mean and 95% bootstrap interval over seeds as text."""
    return "{:{f}} [{:{f}}, {:{f}}]".format(values.mean(), *bootstrap([values], np.mean, seed=seed), f=f"{sign}z.{digits}f")


def shown_lines(own: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Name and rows of each line of a case: poisoned, retrained, then the variants."""
    lines = [(METHODS[m], own[own.method == m]) for m in ("poisoned", "retrain")]
    return lines + [(name, own[own.variant == variant]) for variant, name in VARIANTS.items()]


def figure(tidy: pd.DataFrame, title: str = "") -> Figure:
    """Cost (left) and return (right) of every variant, the full method on top; one row of panels per attack.

    tidy: of one (task, learner) and cost limit; else UserError. Filled: at the end of the budget, hollow: after as many further
    ordinary steps; small: every seed, large: means. Dashed: mean of the retrained models, dotted: of the poisoned ones.
    """
    if len(tidy[["task", "learner", "cost_limit"]].drop_duplicates()) != 1:
        raise UserError("figure of T3: hand in models of one task, learner and cost limit.")
    attacks = [a for a in dict.fromkeys(tidy.attack) if a != "none"]
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(len(attacks), 2, figsize=(10.2, 1.3 + (0.5 + 0.33 * len(VARIANTS)) * len(attacks)), squeeze=False,
                                 sharex="col")
        for row, attack in zip(axes, attacks):
            own = tidy[tidy.attack == attack]
            for ax, value in zip(row, ("cost", "return")):
                for method, dash in DASHES.items():
                    level = own.loc[own.method == method, f"{value}_mean"].mean()
                    ax.axvline(level, color=COLOURS[method], lw=1.3, ls=dash, zorder=1)
                for y, variant in enumerate(VARIANTS):
                    full, rows = variant == "full", own[own.variant == variant]
                    look = {"color": COLOURS["saferule" if full else "clean"], "marker": MARKERS["saferule"] if full else "o"}
                    end, later = (rows[f"{value}_{part}"].to_numpy() for part in ("mean", "later"))
                    ax.hlines(beside_each_other(y, len(end)), end, later, color=look["color"], lw=0.7, alpha=0.5)
                    dots(ax, later, y, hollow=True, **look)
                    dots(ax, end, y, **look)
                lines_named(ax, list(VARIANTS.values()) if ax is row[0] else [""] * len(VARIANTS))
            row[0].set_title(ATTACKS.get(attack, attack))
        for ax in axes[:, 0]:
            cost_limit_line(ax, tidy.cost_limit.iloc[0], horizontal=False)
        axes[-1, 0].set_xlabel(COST)
        axes[-1, 1].set_xlabel(RETURN)
        grey = {"color": COLOURS["clean"], "marker": "o", "ls": "", "ms": LARGE}
        handles = [Line2D([], [], mec="white", label="end of the budget", **grey),
                   Line2D([], [], mfc="white", mew=1.6, label="after further ordinary training", **grey),
                   *(Line2D([], [], color=COLOURS[method], ls=dash, label=METHODS[method]) for method, dash in DASHES.items())]
        fig.legend(handles=handles, loc="lower center", ncol=4)
        if title:
            fig.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
        fig.tight_layout(rect=(0, 0.35 / fig.get_figheight(), 1, 1))
    plt.close(fig)
    return fig
