"""T5 for people: the table, the figure and the calibration of the forgetting audits. No audit is computed here."""
from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .figures import COLOURS, MARKERS, STYLE
from .files import locked
from .report import write_table
from .stages.audit import audited
from .statistics import ATTACKS, CASE, METHODS, number

SHOWN = {                              # audit -> column of the table, and whether poisoned models lie above retrained ones
    "contained_q": ("contained, Q", True), "contained_c": ("contained, Qc", True),
    "contained_published": ("contained, as published", True),
    "delta_mia_q": ("membership ΔAUC, Q", True), "delta_mia_c": ("membership ΔAUC, Qc", True),
    "distance_action": ("distance, actions", True), "distance_q": ("distance, Q", True), "distance_c": ("distance, Qc", True),
    "relearn": ("relearn time", False),
}
UNITS = {"contained": "share of forget trajectories", "delta": "AUC less that of the retrained",
         "distance": "retrained to retrained = 1", "relearn": "of the retrained models' time"}
TITLE = "T5: is the influence of the forget rows gone?"


def publish(root: Path, profile: str) -> tuple[pd.DataFrame, list[Path]]:
    """T5 of a run from the audits that are there, of every task and learner: the tidy frame, and the files that were written.

    Notebooks that finish together take turns, so that the last one writes what all have found.
    """
    turn = root / "tables" / ".T5.lock"
    turn.parent.mkdir(parents=True, exist_ok=True)
    turn.touch()
    with locked(turn, wait=True):
        audits, artefacts = audited(root)
        paths = write_table(audits, root / "tables" / "T5_forgetting", TITLE, calibration_note(audits), profile, artefacts,
                            forgetting_table(audits))
    return audits, paths


def calibration(audits: pd.DataFrame) -> pd.DataFrame:
    """Per case and audit the ranges over seeds of the two ends, and whether they are told apart: every poisoned model on the right
    side of every retrained one. Columns: CASE, audit, poisoned_low, poisoned_high, retrained_low, retrained_high, told_apart."""
    lines, ends = [], ["poisoned_low", "poisoned_high", "retrained_low", "retrained_high"]
    for key, rows in audits.groupby([*CASE, "audit"], sort=False):
        if key[-1] not in SHOWN:
            continue
        bad, gold = (rows[rows.method == m].value for m in ("poisoned", "retrain"))
        apart = bad.min() > gold.max() if SHOWN[key[-1]][1] else bad.max() < gold.min()
        lines.append((*key, bad.min(), bad.max(), gold.min(), gold.max(), bool(apart)))
    return pd.DataFrame(lines, columns=[*CASE, "audit", *ends, "told_apart"])


def calibration_note(audits: pd.DataFrame) -> str:
    """One line per case: which audits tell the poisoned from the retrained models on every seed, and which do not."""
    lines = []
    for key, rows in calibration(audits).groupby(CASE, sort=False):
        good, bad = ([SHOWN[a][0] for a in rows[rows.told_apart == told].audit] for told in (True, False))
        lines.append(f"{_name(key)}: poisoned and retrained are told apart on every seed by {'; '.join(good) or 'nothing'}. "
                     + (f"Not by {'; '.join(bad)}: there it says nothing about the others, either." if bad else ""))
    return "\n".join(line.rstrip() for line in lines)


def forgetting_table(audits: pd.DataFrame) -> pd.DataFrame:
    """One line per case and method, every seed of every audit shown: '0.98/0.94/1'. A censored relearn time has a '>'."""
    lines = []
    several = audits.cost_limit.nunique() > 1
    for key, rows in audits.groupby(CASE, sort=False):
        for method in [m for m in METHODS if m in set(rows.method)]:
            own = rows[rows.method == method]
            line = {"task": key[0], "learner": key[1], "attack": ATTACKS.get(key[2], key[2]), "method": METHODS[method]}
            if several:
                line["cost limit"] = number(key[3])
            for audit, (label, _) in SHOWN.items():
                seeds = own[own.audit == audit].sort_values("seed")
                line[label] = "/".join(_text(s) for s in seeds.itertuples()) or "–"
            lines.append(line)
    return pd.DataFrame(lines)


def _text(line) -> str:
    bound = line.audit == "relearn" and not np.isnan(line.low) and np.isnan(line.high)
    return (">" if bound else "") + number(line.value, 2 if abs(line.value) < 100 else 0)


def forgetting_figure(audits: pd.DataFrame, title: str = "") -> Figure:
    """A strip per audit (rows) and case (columns): every seed of every method a dot between the two ends, poisoned and retrained.

    Dashed: means of the two ends. Arrow and number: models beyond the strip, and their median. Grey strip: the ends overlap.
    """
    keys = list(audits.groupby(CASE, sort=False).groups)
    names = [a for a in SHOWN if a in set(audits.audit)]
    methods = [m for m in METHODS if m in set(audits.method)]
    order = [m for m in ("poisoned",) if m in methods] + [m for m in methods if m not in ("poisoned", "retrain")] + ["retrain"]
    told = calibration(audits).set_index([*CASE, "audit"]).told_apart
    with mpl.rc_context(STYLE):
        height = 0.32 + 0.155 * len(order)
        size = 2.6 + 4.3 * len(keys), 0.9 + (height + 0.42) * len(names)
        fig, axes = plt.subplots(len(names), len(keys), figsize=size, squeeze=False)
        for row, name in zip(axes, names):
            for ax, key in zip(row, keys):
                part = audits[(audits[CASE] == list(key)).all(axis=1) & (audits.audit == name)]
                _strip(ax, part, order, bool(told.get((*key, name), True)))
                ax.set_xlabel(UNITS[name.split("_")[0]], fontsize=8, labelpad=1)
            row[0].set_ylabel(SHOWN[name][0].replace(", ", ",\n"), rotation=0, ha="right", va="center", fontweight="bold",
                              fontsize=9)
        for ax, key in zip(axes[0], keys):
            ax.set_title(ATTACKS.get(key[2], key[2]) if audits[CASE[:2]].drop_duplicates().shape[0] == 1 else _name(key), pad=12)
        handles = [Line2D([], [], ls="", marker=MARKERS[m], color=COLOURS[m], ms=10 if MARKERS[m] == "*" else 7, mec="white",
                          mew=0.4, label=METHODS[m]) for m in order]
        fig.legend(handles=handles, loc="lower center", ncol=min(len(order), 4 * len(keys)), fontsize=8.5)
        fig.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
        H = fig.get_figheight()
        fig.tight_layout(rect=(0, 0.42 / H, 1, 1 - 0.05 / H), h_pad=0.5)
    plt.close(fig)
    return fig


def _strip(ax, part: pd.DataFrame, order: list[str], told: bool) -> None:
    """One panel: methods from top to bottom, seeds side by side in height."""
    ends = {m: part[part.method == m].value for m in ("poisoned", "retrain")}
    known = pd.concat(list(ends.values()))
    if part.empty or known.empty:
        ax.text(0.5, 0.5, "not audited", transform=ax.transAxes, ha="center", va="center", color="#777777", fontsize=9)
        ax.set(xticks=[], yticks=[])
        return
    span, name = max(known.max() - known.min(), 1e-3), part.audit.iloc[0]
    low, high = known.min() - 0.45 * span, known.max() + 0.45 * span
    if name.startswith("contained"):
        low, high = -0.04, 1.04
    elif not name.startswith("delta"):
        low = max(low, -0.04 * high)
    for m, values in ends.items():
        ax.axvline(values.mean(), color=COLOURS[m], ls=(0, (4, 3)), lw=1.0, zorder=1)
    for y, method in enumerate(order):
        seeds = part[part.method == method].sort_values("seed").value.to_numpy()
        at = y + np.linspace(-0.22, 0.22, len(seeds)) if len(seeds) > 1 else np.array([y] * len(seeds))
        look = {"color": COLOURS[method], "lw": 0.4, "edgecolors": "white", "clip_on": False, "zorder": 3}
        inside = (seeds >= low) & (seeds <= high)
        ax.scatter(seeds[inside], at[inside], s=34 * (2 if MARKERS[method] == "*" else 1), marker=MARKERS[method], **look)
        for beyond, edge, arrow, inwards, side in ((seeds < low, low, "<", 6, "left"), (seeds > high, high, ">", -6, "right")):
            if beyond.any():
                ax.scatter(np.full(beyond.sum(), edge), at[beyond], s=26, marker=arrow, **look)
                ax.annotate(number(float(np.median(seeds[beyond]))), (edge, y), (inwards, 0), textcoords="offset points", ha=side,
                            va="center", fontsize=7, color=COLOURS[method])
    ax.set(xlim=(low, high), ylim=(len(order) - 0.4, -0.6), yticks=[])
    ax.tick_params(axis="x", labelsize=8, pad=1)
    if not told:
        ax.set_facecolor("#F2F2F2")
        ax.text(1, 1.01, "ends not told apart", transform=ax.transAxes, ha="right", va="bottom", fontsize=7.5, color="#777777")


def _name(key) -> str:
    return f"{key[0]}, {key[1]}, {ATTACKS.get(key[2], key[2])}"
