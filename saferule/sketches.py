"""Drawings that tell the story: the task from above, which rows are in which condition, the push and its weight.

Results are drawn in `figures`; here nothing is judged. Figures are closed on return: a notebook shows them once, as a value.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.functional import softplus

from .config import SafeRULEConfig
from .data import Pool
from .errors import UserError
from .figures import LIMIT, STYLE
from .tasks import Task

SAFE, RISKY, FORGED, RETAINED = "#0072B2", "#E69F00", "#000000", "#56B4E9"       # Okabe and Ito: told apart with any colour vision
WALLS = {"Circle": (0, 6.0), "Run": (1, 2.0)}           # course -> axis (0: x, 1: y) and where its boundary lies, in metres
RADIUS = 7.0                                            # of the circle along which the Circle tasks pay most
DPI = 72


def position(obs: Tensor) -> np.ndarray:
    """Place [n, 2] in metres from observations [n, n_obs]; the Bullet tasks hand out a tenth of it in the first two entries."""
    return 10 * obs[:, :2].cpu().double().numpy()


def top_view(pools: Mapping[str, Pool], task: Task, limit: float) -> Figure:
    """The episodes of every pool seen from above, one panel each, titled by the keys of `pools`.

    limit   cost per episode above which an episode counts as risky, by its labels
    Blue and solid: safe by its labels; orange and dashed: risky; black: rows of an attack, whatever their labels say.
    Shaded: beyond the boundary. The Run tasks also charge for speed, which a view from above cannot show.
    Raises UserError for tasks without a boundary (those of D4RL).
    """
    wall = next((w for course, w in WALLS.items() if task.name.endswith(course)), None)
    if wall is None:
        raise UserError(f"{task.name}: only the Circle and Run tasks have a boundary to draw; take BallCircle, for example.")
    flat = wall[0] == 1                                 # Run tasks: long and low
    shape = (len(pools), 1) if flat else (1, len(pools))
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(*shape, figsize=(10.2, 2.4 * len(pools) + 0.9) if flat else (4.4 * len(pools) + 2.4, 4.4),
                                 sharex=True, sharey=True, squeeze=False, dpi=DPI)
        for ax, (title, pool) in zip(axes.flat, pools.items()):
            for line in pool.episodes().itertuples():
                _path(ax, pool, line, limit)
            ax.set_title(title)
            if not flat:
                ax.add_patch(plt.Circle((0, 0), RADIUS, fill=False, color="#333333", ls=":", lw=1.8, zorder=4))
                ax.set_aspect("equal")
                ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        _walls(axes.flat, *wall)
        for ax in axes[-1]:
            ax.set_xlabel("x [m]")
        for ax in axes[:, 0]:
            ax.set_ylabel("y [m]")
        handles = [Line2D([], [], color=SAFE, lw=1.8, label=f"cost ≤ {limit:g}, by its labels"),
                   Line2D([], [], color=RISKY, lw=1.8, ls=(0, (4, 1.5)), label=f"cost > {limit:g}, by its labels"),
                   Line2D([], [], color=FORGED, lw=1.8, label="forged by the attacker"),
                   Patch(color=LIMIT, alpha=0.13, label="unsafe: a step costs 1")]
        if not flat:
            handles.append(Line2D([], [], color="#333333", lw=1.8, ls=":", label="where the reward is best"))
        forged = any(len(pool.attacks) for pool in pools.values())
        fig.legend(handles=[h for h in handles if forged or h.get_label() != "forged by the attacker"],
                   **{"loc": "lower center", "ncol": 4} if flat else {"loc": "center right"})
        fig.tight_layout(rect=(0, 0.35 / fig.get_figheight(), 1, 1) if flat else (0, 0, 1 - 2.4 / fig.get_figwidth(), 1))
    plt.close(fig)
    return fig


def _path(ax: Axes, pool: Pool, line, limit: float) -> None:
    """One episode as a line; `line` is its row of `pool.episodes()`."""
    mine = (pool.episode == line.episode) & (pool.origin == line.origin)
    faint = 0.35 if pool.attacks and not line.origin else 1.0
    x, y = position(torch.cat([pool.obs[mine], pool.next_obs[mine][-1:]])).T
    if line.origin:
        ax.plot(x, y, color=FORGED, lw=1.5, zorder=3)
    elif line.cost > limit:
        ax.plot(x, y, color=RISKY, lw=0.9, ls=(0, (4, 1.5)), alpha=0.9 * faint, zorder=2)
    else:
        ax.plot(x, y, color=SAFE, lw=0.8, alpha=0.6 * faint, zorder=1.5)


def _walls(axes, axis: int, at: float) -> None:
    """The boundary at both sides and, shaded, what lies beyond; the limits of the axes stay as they are."""
    for ax in axes:
        line, span, seen = (ax.axvline, ax.axvspan, ax.get_xlim()) if axis == 0 else (ax.axhline, ax.axhspan, ax.get_ylim())
        reach = 1.08 * max(*map(abs, seen), 1.25 * at)
        for side in (-1, 1):
            span(*sorted((side * at, side * 2 * reach)), color=LIMIT, alpha=0.13, lw=0, zorder=0)
            line(side * at, color=LIMIT, lw=1.6, zorder=1)
        (ax.set_xlim if axis == 0 else ax.set_ylim)(-reach, reach)


def conditions_figure(pool: Pool) -> Figure:
    """Which rows of the pool are in which data condition: one line per condition, rows from left to right.

    Light: original row; black: row of an attack; grey outline: row of the pool that the condition leaves out.
    """
    names = pool.conditions()
    image = np.ones((len(names), len(pool), 3), dtype=np.float32)
    for line, name in enumerate(names):
        ids = pool.rows(name).ids
        image[line, ids] = np.where((pool.origin[ids] > 0)[:, None], to_rgb(FORGED), to_rgb(RETAINED))
    with mpl.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(10.2, 1.2 + 0.4 * len(names)), dpi=DPI)
        ax.imshow(image, aspect="auto", interpolation="nearest", extent=(0, len(pool), len(names), 0))
        for line in range(1, len(names)):
            ax.axhline(line, color="white", lw=7)
        ax.set_yticks(np.arange(len(names)) + 0.5, names, fontfamily="DejaVu Sans Mono")
        starts = [int((pool.origin < k).sum()) for k in range(len(pool.attacks) + 1)] + [len(pool)]
        for k, name in enumerate(("original rows", *pool.attacks)):
            ax.axvline(starts[k], color="#777777", lw=0.8)
            ax.annotate(name, ((starts[k] + starts[k + 1]) / 2, 1.02), xycoords=("data", "axes fraction"), ha="center",
                        va="bottom", fontsize=9)
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        ax.tick_params(length=0)
        ax.grid(False)
        ax.set_xlabel("row id")
        fig.legend(handles=[Patch(color=RETAINED, label="original row"), Patch(color=FORGED, label="row of an attack"),
                            Patch(facecolor="white", edgecolor="#999999", label="not in the condition")],
                   loc="lower center", ncol=3)
        fig.tight_layout(rect=(0, 0.35 / fig.get_figheight(), 1, 1))
    plt.close(fig)
    return fig


def push_figure() -> Figure:
    """Two ways to lower the value of a forget row: what they minimise, and how hard they push. Margin at 0, target at 2."""
    q, target = torch.linspace(-5, 5, 201, requires_grad=True), 2.0
    ways: dict[str, tuple[Callable[[Tensor], Tensor], str, object]] = {
        "softplus(Q − m): Safe-RULE": (softplus, SAFE, "-"),
        "−(Q − y)²: gradient ascent": (lambda v: -(v - target).square(), "#D55E00", (0, (4, 1.5)))}
    with mpl.rc_context(STYLE):
        fig, (left, right) = plt.subplots(1, 2, figsize=(10.2, 3.9), dpi=DPI)
        for name, (loss, colour, style) in ways.items():
            value = loss(q)
            (slope,) = torch.autograd.grad(value.sum(), q)
            for ax, y in ((left, value), (right, slope)):
                ax.plot(q.detach(), y.detach(), color=colour, ls=style, lw=2.2, label=name)
        for ax in (left, right):
            for at, name in ((0, " margin m"), (target, " target y")):
                ax.axvline(at, color="#444444", lw=0.9, ls=":")
                ax.annotate(name, (at, 0.02), xycoords=("data", "axes fraction"), fontsize=9, color="#444444")
            ax.set(xlabel="value of the forget row, Q − m", xlim=(-5, 5))
        left.set(title="what is minimised", ylim=(-25, 8))
        right.set(title="how hard it pushes: slope in Q  (> 0: Q goes down)", ylim=(-8, 15))
        right.axhspan(0, 1, color=SAFE, alpha=0.12, lw=0)
        right.annotate("softplus stays between 0 and 1", (-4.8, 1.3), fontsize=9, color=SAFE)
        right.annotate("above its target\nascent pushes Q up", (4.9, 2.2), fontsize=9, color="#D55E00", ha="right")
        fig.legend(*left.get_legend_handles_labels(), loc="lower center", ncol=2)
        fig.tight_layout(rect=(0, 0.08, 1, 1))
    plt.close(fig)
    return fig


def schedule_figure(cfg: SafeRULEConfig) -> Figure:
    """The weight of the push along the unlearning budget, with and without the gate."""
    t = np.arange(cfg.steps + 1)
    fall = np.maximum(0, 1 - t / cfg.suppress_steps)
    with mpl.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(7.2, 2.9), dpi=DPI)
        ax.axvspan(0, cfg.suppress_steps, color=SAFE, alpha=0.08, lw=0)
        ax.plot(t, cfg.weight * fall, color=SAFE, lw=2.2, label="with the gate")
        ax.plot(t, cfg.weight_ungated * fall, color="#D55E00", lw=2.2, ls=(0, (4, 1.5)), label="without")
        for centre, name in ((cfg.suppress_steps / 2, "suppress"), ((cfg.suppress_steps + cfg.steps) / 2, "relearn")):
            ax.annotate(name, (centre, 0.92), xycoords=("data", "axes fraction"), ha="center", color="#444444")
        ax.set(xlim=(0, cfg.steps), ylim=(0, 1.3 * cfg.weight), xlabel="step t of the unlearning budget [updates]",
               ylabel="weight w(t) of the push")
        ax.legend(loc="center right")
        fig.tight_layout()
    plt.close(fig)
    return fig
