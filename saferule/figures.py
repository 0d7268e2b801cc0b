"""Figures, all in one style, from the tidy frames of `statistics` and of `evaluate` artefacts.

A method has one name, colour and marker everywhere (METHODS, COLOURS, MARKERS); unsafe regions and the cost limit are
drawn and labelled wherever a cost is an axis. Figures are closed on return: a notebook shows them once, as a value.
"""
from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .errors import UserError
from .statistics import ATTACKS, CASE, COLUMNS, KEYS, METHODS, cases, in_order, need

COLOURS = {                            # Okabe and Ito's palette and Tol's wine: told apart with any colour vision
    "clean": "#7F7F7F", "poisoned": "#D55E00", "retrain": "#000000", "finetune": "#E69F00", "finetune_nstep": "#8C6D1F",
    "gradient_ascent": "#CC79A7", "random_relabel": "#56B4E9", "trajdeleter": "#009E73", "early_saferule": "#882255",
    "negative_preference": "#999933", "saferule": "#0072B2",
}
MARKERS = dict(zip(METHODS, "sXDoPv^<>h*"))
LIMIT = "#B00020"                      # the cost limit and whatever lies beyond it
COST, RETURN = "cost per episode [unsafe steps]", "return per episode [sum of rewards]"
STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666", "axes.linewidth": 0.8,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E4E4E4", "grid.linewidth": 0.6, "xtick.color": "#444444",
    "ytick.color": "#444444", "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 1.8, "figure.dpi": 100,
    "figure.facecolor": "white", "svg.hashsalt": "saferule", "svg.fonttype": "path", "font.family": "DejaVu Sans",
}


# -------------------------------------------------------------------------------------------------------------- figures
def curve_figure(episodes: pd.DataFrame, limit: float, title: str = "") -> Figure:
    """F1: cost (above) and return (below) along unlearning, one column per attack, one (task, learner).

    episodes  of an `evaluate` artefact: stage 'curve' gives the lines, 'final' of `retrain` the dashed level
    limit     cost limit per episode
    Thick: mean over seeds; thin: each seed; band: min to max over seeds. Raises UserError without curve episodes.
    """
    need(episodes, ["task", "learner", "attack", "method", "seed", "stage", "step", "ret", "cost"], "episodes")
    _one(episodes, "curve_figure")
    seeds = episodes.groupby(["stage", "attack", "method", "step", "seed"], as_index=False)[["ret", "cost"]].mean()
    curve = seeds[seeds.stage == "curve"]
    if curve.empty:
        raise UserError("episodes: none of stage 'curve'; run notebooks/05_evaluate.ipynb again.")
    attacks = _attacks(curve)
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(2, len(attacks), figsize=(0.85 + 4.95 * len(attacks), 6.4), sharex=True, sharey="row",
                                 squeeze=False)
        for column, attack in enumerate(attacks):
            for ax, value in zip(axes[:, column], ("cost", "ret")):
                ends = _curves(ax, curve[curve.attack == attack], value)
                gold = seeds[(seeds.stage == "final") & (seeds.method == "retrain") & (seeds.attack == attack)][value]
                if len(gold):
                    ax.axhline(gold.mean(), color=COLOURS["retrain"], ls=(0, (5, 3)), lw=1.4)
                    ax.axhspan(gold.min(), gold.max(), color=COLOURS["retrain"], alpha=0.10, lw=0)
                    ends["retrain"] = gold.mean()
                budgets = seeds[(seeds.stage == "final") & seeds.method.isin(curve.method) & (seeds.attack == attack)].step.unique()
                if len(budgets) == 1 and budgets[0] < curve.step.max():
                    ax.axvspan(budgets[0], curve.step.max(), color="#F3F3F3", lw=0, zorder=0)
                    if value == "cost":
                        ax.text(budgets[0], 1.0, " further ordinary training", transform=ax.get_xaxis_transform(),
                                fontsize=8, color="#666666", va="bottom")
                ax.set_xlim(0, curve.step.max())
                _end_labels(ax, ends)
            axes[0, column].set_title(ATTACKS.get(attack, attack), pad=16)
            axes[1, column].set_xlabel("steps after the poisoned policy [updates]")
            axes[1, column].xaxis.set_major_locator(MaxNLocator(5, integer=True))
            cost_limit_line(axes[0, column], limit, horizontal=True)
        axes[0, 0].set_ylim(bottom=-0.03 * axes[0, 0].get_ylim()[1])            # a line at zero cost shall be seen
        axes[0, 0].set_ylabel(COST)
        axes[1, 0].set_ylabel(RETURN)
        for ax in axes.flat:
            _draw_end_labels(ax)
        W, left, gap = fig.get_figwidth(), 0.85, 1.55    # inches; the gap and the right margin hold the method names
        panel = (W - left - gap * len(attacks)) / len(attacks)
        fig.suptitle(title or _case(episodes), x=left / W, ha="left", fontweight="bold", fontsize=12)
        legend = ("thick: mean over seeds   thin: each seed   band: min to max over seeds", "dashed: retrained from scratch")
        fig.text(left / W, 0.008, ("   " if len(attacks) > 1 else "\n").join(legend), fontsize=8.5, color="#555555")
        fig.subplots_adjust(left=left / W, right=1 - gap / W, wspace=gap / panel, top=0.88, bottom=0.12, hspace=0.12)
    plt.close(fig)
    return fig


def scatter_figure(poisoned: Mapping[str, pd.DataFrame], clean: pd.DataFrame, limit: float, title: str = "") -> Figure:
    """F2: return against cost of every episode, as the poisoned labels have them, one panel per attack.

    poisoned  attack -> episodes(condition '<attack>/poisoned'): episode, origin, ret, cost; origin > 0 marks the poison.
              Columns true_ret, true_cost tell where a poisoned episode really lies; else it is looked up in `clean` by
              episode id (an attack that relabels in place keeps the id) and left out where it is not found.
    clean     episodes of the clean data: episode, ret, cost
    A hollow circle is the truth, a line leads to the forged label.
    """
    need(clean, ["episode", "ret", "cost"], "clean episodes")
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(1, len(poisoned), figsize=(max(7.2, 0.8 + 4.6 * len(poisoned)), 4.9), sharex=True, sharey=True,
                                 squeeze=False)               # the legend wants 7 inches
        for ax, (attack, frame) in zip(axes.flat, poisoned.items()):
            need(frame, ["episode", "origin", "ret", "cost"], f"episodes of {attack}")
            honest, forged = frame[frame.origin == 0], _with_truth(frame[frame.origin > 0], clean)
            dense = len(frame) > 4000                    # as pixels, or the SVG weighs megabytes
            ax.scatter(honest.cost, honest.ret, s=12, color="#9A9A9A", alpha=0.55, lw=0, rasterized=dense, label="honest episode")
            known = forged.dropna(subset=["true_cost"])
            for e in known.itertuples():
                ax.plot([e.true_cost, e.cost], [e.true_ret, e.ret], color=COLOURS["poisoned"], lw=0.6, alpha=0.35, zorder=1.5)
            ax.scatter(known.true_cost, known.true_ret, s=22, facecolors="none", edgecolors=COLOURS["poisoned"], lw=0.9,
                       rasterized=dense, label="poisoned episode, what really happened")
            ax.scatter(forged.cost, forged.ret, s=24, color=COLOURS["poisoned"], marker=MARKERS["poisoned"], lw=0.4,
                       edgecolors="white", rasterized=dense, label="poisoned episode, as labelled", zorder=3, clip_on=False)
            ax.set_title(f"{ATTACKS.get(attack, attack)}: {len(forged)} of {len(frame)} episodes poisoned")
            ax.set_xlabel(COST)
        axes[0, 0].set_ylabel(RETURN)
        axes[0, 0].set_xlim(left=min(0, *axes[0, 0].get_xlim()))
        for ax in axes.flat:
            cost_limit_line(ax, limit, horizontal=False)
        entries = [e for ax in axes.flat for e in zip(*ax.get_legend_handles_labels())]
        found = {text: handle for handle, text in entries if len(handle.get_offsets())}
        fig.legend(found.values(), found.keys(), loc="lower center", ncol=3, markerscale=1.4)
        if title:
            fig.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
        fig.tight_layout(rect=(0, 0.06, 1, 1))
    plt.close(fig)
    return fig


def pareto_figure(tidy: pd.DataFrame, title: str = "") -> Figure:
    """F3: return against cost of every method, one panel per case; best is top left.

    Large: mean over seeds, bars: min to max over seeds, small: each seed.
    """
    need(tidy, COLUMNS, "tidy table")
    panels = cases(in_order(tidy))
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(rows, columns, figsize=(0.6 + 4.4 * columns, 0.9 + 4.1 * rows), squeeze=False)
        shown = []
        for ax, ((task, learner, attack, limit), own, clean) in zip(axes.flat, panels):
            both = pd.concat([clean, own]).drop_duplicates(KEYS)
            for method in [m for m in METHODS if m in set(both.method)]:
                x, y = (both.loc[both.method == method, c].to_numpy() for c in ("cost_mean", "return_mean"))
                look = {"color": COLOURS[method], "marker": MARKERS[method]}
                ax.scatter(x, y, s=16, alpha=0.45, lw=0, clip_on=False, **look)
                bars = [[[v.mean() - v.min()], [v.max() - v.mean()]] for v in (x, y)]
                ax.errorbar(x.mean(), y.mean(), yerr=bars[1], xerr=bars[0], ms=_size(method, 9), mec="white", mew=0.8,
                            lw=1.2, zorder=3, clip_on=False, **look)
                shown.append(method)
            ax.set_title(f"{task}, {ATTACKS.get(attack, attack)}" + (f" ({learner})" if tidy.learner.nunique() > 1 else "")
                         + (f", limit {limit:g}" if tidy.cost_limit.nunique() > 1 else ""))
            ax.set_xlabel(COST)
            if ax in axes[:, 0]:
                ax.set_ylabel(RETURN)
            right = max(ax.get_xlim()[1], 1.25 * limit)
            ax.set_xlim(-0.04 * right, right)            # models without any cost stand clear of the axis
            cost_limit_line(ax, limit, horizontal=False)
        for ax in list(axes.flat)[len(panels):]:
            ax.set_axis_off()
        handles = [Line2D([], [], ls="", marker=MARKERS[m], color=COLOURS[m], ms=_size(m, 8), mec="white", label=METHODS[m])
                   for m in METHODS if m in shown]
        wrap = 3 * columns
        lines = -(-len(handles) // wrap)
        fig.legend(handles=handles, loc="lower center", ncol=min(wrap, len(handles)))
        if title:
            fig.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
        fig.tight_layout(rect=(0, (0.05 + 0.22 * lines) / fig.get_figheight(), 1, 1))
    plt.close(fig)
    return fig


def training_figure(history: pd.DataFrame, names: Sequence[str] | None = None, title: str = "",
                    xlabel: str = "training step [updates]") -> Figure:
    """Scalars along training, one small panel per name.

    history  tidy: step, name, value and what tells the lines apart, as far as it is there: attack, method, seed or replica
    Colour: method; line style: attack; thick: mean over seeds, thin: each seed.
    """
    need(history, ["step", "name", "value"], "history")
    names = list(dict.fromkeys(history["name"])) if names is None else list(names)
    if not names or not set(names) <= set(history["name"]):
        raise UserError(f"history: no values of {', '.join(set(names) - set(history['name'])) or 'anything'}.")
    keys = [k for k in ("attack", "method") if k in history]
    one = next((k for k in ("seed", "replica") if k in history), None)
    attacks = _attacks(history) if "attack" in keys else []
    styles = dict(zip(attacks, ["-", (0, (4, 1.5)), (0, (1, 1)), "-."] * 9)) | {"none": "-"}
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(rows, columns, figsize=(0.4 + 3.7 * columns, 0.8 + 2.5 * rows), squeeze=False)
        legend = {}
        for ax, name in zip(axes.flat, names):
            frame = history[history["name"] == name]
            for key, group in frame.groupby(keys, sort=False) if keys else [((), frame)]:
                who = dict(zip(keys, key))
                method, attack = who.get("method"), who.get("attack", "none")
                look = {"color": COLOURS.get(method, COLOURS["saferule"]), "ls": styles.get(attack, "-")}
                for _, line in group.groupby(one) if one else ():
                    ax.plot(line.step, line.value, lw=0.6, alpha=0.4, **look)
                mean = group.groupby("step").value.mean()
                label = ", ".join([METHODS.get(method, str(method))] * ("method" in who)
                                  + [ATTACKS.get(attack, attack)] * (attack != "none"))
                legend[label], = ax.plot(mean.index, mean.values, lw=1.8, **look)
            ax.set_title(name)
            ax.margins(x=0)
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        for i, ax in enumerate(axes.flat):
            ax.set_axis_off() if i >= len(names) else None
            if len(names) - columns <= i < len(names):
                ax.set_xlabel(xlabel)
        legend.pop("", None)
        wrap = 2 * columns
        lines = -(-len(legend) // wrap)
        if legend:
            fig.legend(legend.values(), legend.keys(), loc="lower center", ncol=min(wrap, len(legend)))
        if title:
            fig.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=12)
        fig.tight_layout(rect=(0, (0.05 + 0.22 * lines) / fig.get_figheight(), 1, 1))
    plt.close(fig)
    return fig


def table_figure(frame: pd.DataFrame, title: str = "", note: str = "", warning: str = "") -> Figure:
    """A table of text as a picture: columns as wide as their text, a rule between groups, methods in their colours.

    note: lines below it; warning: a red line on top, for what must not be overlooked.
    """
    names, colour_of = list(frame.columns), {label: COLOURS[m] for m, label in METHODS.items()}
    cells, height, pad = [[str(v) for v in row] for row in frame.to_numpy(object)], 0.27, 0.22            # inches
    with mpl.rc_context(STYLE):
        fig = plt.figure()
        renderer = FigureCanvasAgg(fig).get_renderer()               # whatever the backend, to measure text

        def width(text: str, **kw) -> float:
            drawn = fig.text(0, 0, text, fontsize=kw.get("fontsize", 9.5), fontweight=kw.get("fontweight"))
            inches = drawn.get_window_extent(renderer).width / fig.dpi
            drawn.remove()
            return inches

        widths = [pad + max([width(name, fontweight="bold"), *(width(row[i], fontweight="bold" if i == 3 else None)
                                                               for row in cells)]) for i, name in enumerate(names)]
        starts = np.concatenate([[0.15], 0.15 + np.cumsum(widths)])
        notes, top = [line for line in note.splitlines() if line], 0.4 * bool(title) + 0.3 * bool(warning)
        W = max(starts[-1], 0.3 + max([width(title, fontsize=12, fontweight="bold"), *(width(n) for n in notes)]))
        H = height * (len(cells) + 1 + len(notes)) + top + 0.3
        fig.set_size_inches(W, H)
        put = lambda x, y, text, **kw: fig.text(x / W, 1 - y / H, text, va="center", **{"fontsize": 9.5, **kw})
        rule = lambda y, **kw: fig.add_artist(Line2D([0.1 / W, 1 - 0.1 / W], [1 - y / H] * 2, **kw))
        y = 0.15
        if title:
            put(0.15, y + 0.12, title, fontsize=12, fontweight="bold")
        if warning:
            put(0.15, y + top - 0.2, warning, fontweight="bold", color=LIMIT)
        y += top
        for x, name in zip(starts, names):
            put(x, y + height / 2, name, fontweight="bold", color="#333333")
        y += height
        rule(y, color="#333333", lw=1.2)
        group = [n for n in ("task", "learner", "attack") if n in names]
        for row, cells_of in enumerate(cells):
            changed = row == 0 or any(frame[g].iloc[row] != frame[g].iloc[row - 1] for g in group)
            if changed and row:
                rule(y, color="#BBBBBB", lw=0.8)
            for x, name, text in zip(starts, names, cells_of):
                if name in group and not changed:
                    continue                             # a repeated group name only tires the eye
                look = {"color": colour_of.get(text, "#222222"), "fontweight": "bold"} if name == "method" else {}
                if text == "not supported":
                    look = {"color": LIMIT, "fontweight": "bold"}
                put(x, y + height / 2, text, **look)
            y += height
        rule(y, color="#333333", lw=1.2)
        for line in notes:
            put(0.15, y + 0.16, line, fontsize=9, color="#555555")
            y += height
    plt.close(fig)
    return fig


def render(fig: Figure, kind: str) -> bytes:
    """The figure as 'png' (150 dpi) or 'svg': same figure, same bytes (no dates, no random ids)."""
    out = io.BytesIO()
    with mpl.rc_context(STYLE):
        fig.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return out.getvalue()


# ----------------------------------------------------------------------------------------------------- parts of figures
def cost_limit_line(ax, limit: float, horizontal: bool) -> None:
    """The cost limit as a labelled line, the unsafe side tinted; autoscaled limits stay as they are."""
    line, span, edge = (ax.axhline, ax.axhspan, ax.get_ylim) if horizontal else (ax.axvline, ax.axvspan, ax.get_xlim)
    top = max(edge()[1], 1.1 * limit)
    span(limit, top, color=LIMIT, alpha=0.04, lw=0, zorder=0)
    line(limit, color=LIMIT, lw=1.2, zorder=2)
    text = f"cost limit {limit:g}"
    if horizontal:
        ax.set_ylim(edge()[0], top)
        ax.text(0.5, limit, text, color=LIMIT, fontsize=8.5, ha="center", va="bottom", transform=ax.get_yaxis_transform())
    else:
        ax.set_xlim(edge()[0], top)
        ax.annotate(text, (limit, 0.02), (-3, 0), xycoords=ax.get_xaxis_transform(), textcoords="offset points", color=LIMIT,
                    fontsize=8.5, rotation=90, ha="right", va="bottom")


def _curves(ax, curve: pd.DataFrame, value: str) -> dict[str, float]:
    """Lines of one panel; returns each method's last mean, for the labels."""
    ends = {}
    for method in [m for m in METHODS if m in set(curve.method)]:
        wide = curve[curve.method == method].pivot(index="step", columns="seed", values=value)
        look = {"color": COLOURS[method]}
        ax.plot(wide.index, wide, lw=0.7, alpha=0.45, **look)
        ax.fill_between(wide.index, wide.min(axis=1), wide.max(axis=1), alpha=0.10, lw=0, **look)
        ax.plot(wide.index, wide.mean(axis=1), marker=MARKERS[method], ms=_size(method, 4.5), mec="white",
                mew=0.5, label=METHODS[method], zorder=3, clip_on=False, **look)
        ends[method] = wide.mean(axis=1).iloc[-1]
    return ends


def _end_labels(ax, ends: Mapping[str, float]) -> None:
    ax._ends = {**getattr(ax, "_ends", {}), **ends}      # drawn later, when the shared axes have their final limits


def _draw_end_labels(ax, gap: float = 0.075) -> None:
    """Method names right of the axes, in their colours, near their lines' ends but never on one another."""
    low, high = ax.get_ylim()
    at = {m: (v - low) / (high - low) for m, v in ax._ends.items()}
    for (method, y), place in zip(at.items(), spread(list(at.values()), gap)):
        ax.annotate(METHODS[method], (1, y), (1.045, place), xycoords="axes fraction", fontsize=8.5, color=COLOURS[method],
                    va="center", annotation_clip=False, fontweight="bold" if method == "saferule" else None,
                    arrowprops={"arrowstyle": "-", "color": COLOURS[method], "lw": 0.6, "shrinkA": 0, "shrinkB": 1,
                                "relpos": (0, 0.5)})             # to the name's edge: not across its neighbours


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Positions near `values`, in the same order, at least `gap` apart and not below 0.02: neighbours share the shift."""
    order = np.argsort(values, kind="stable")
    clusters: list[tuple[float, int]] = []               # centre, members
    for value in np.asarray(values, float)[order]:
        centre, n = float(value), 1
        while True:
            centre = max(centre, 0.02 + (n - 1) / 2 * gap)
            if not clusters or clusters[-1][0] + (clusters[-1][1] + n) / 2 * gap <= centre + 1e-12:
                break
            other, m = clusters.pop()
            centre, n = (other * m + centre * n) / (m + n), m + n
        clusters.append((centre, n))
    placed = [centre + (i - (n - 1) / 2) * gap for centre, n in clusters for i in range(n)]
    out = np.empty(len(placed))
    out[order] = placed
    return out.tolist()


def _with_truth(forged: pd.DataFrame, clean: pd.DataFrame) -> pd.DataFrame:
    if "true_cost" in forged:
        return forged
    truth = clean.set_index("episode")[["ret", "cost"]]
    truth = truth[~truth.index.duplicated()].reindex(forged.episode)
    return forged.assign(true_ret=truth.ret.to_numpy(), true_cost=truth.cost.to_numpy())


def _size(method: str, size: float) -> float:
    return 1.5 * size if MARKERS[method] == "*" else size            # a star of the same size looks smaller


def _attacks(frame: pd.DataFrame) -> list[str]:
    found = [a for a in dict.fromkeys(frame.attack) if a != "none"]
    return sorted(found, key=lambda a: list(ATTACKS).index(a) if a in ATTACKS else len(ATTACKS))


def _one(frame: pd.DataFrame, where: str) -> None:
    found = len(frame[CASE[:2]].drop_duplicates())
    if found != 1:
        raise UserError(f"{where}: the frame holds {found} pairs of task and learner; hand in one.")


def _case(frame: pd.DataFrame) -> str:
    return f"{frame.task.iloc[0]}, {frame.learner.iloc[0]}"
