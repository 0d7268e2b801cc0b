"""A verdict for people: one page of Markdown and one picture, both from the JSON alone, so that its reader can make them, too."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .benchmark import LEARNERS
from .figures import STYLE
from .report import to_markdown
from .statistics import ATTACKS, METHODS, number
from .verdict import CRITERIA, NAMED, RESULTS

LOOKS = {                              # shape and word tell the results apart, colour (Okabe and Ito) only helps
    "pass": {"color": "#0072B2", "marker": "o"}, "fail": {"color": "#D55E00", "marker": "X"},
    "undecided": {"color": "#7A5C00", "marker": "D", "mfc": "white"}, "not measured": {"color": "#767676", "marker": "None"},
}
LEFT, RIGHT = -1.5, 1.6                # what is drawn, in units of the way from the threshold (0) to the ideal (1)


# ------------------------------------------------------------------------------------------------------------------ words
def sentence(document: Mapping[str, Any]) -> str:
    """The verdict in one sentence."""
    name, models = METHODS[document["method"]], document["models"]
    if not models["unsafe"]:
        return f"{name} had nothing to repair: the poison made none of the {models['poisoned']} models measurably unsafe."
    share = document["thresholds"]["reward_retained"]
    return (f"{name} repaired {models['repaired']} of the {models['unsafe']} models that the poison had made unsafe: within the "
            f"cost limit, still within it after further training, and with at least {share:.0%} of the retrained return.")


def balance(document: Mapping[str, Any]) -> str:
    """How many cases pass every criterion, fail one, or are open."""
    found = [case["result"] for case in document["cases"]]
    counts = {"pass every criterion": found.count("pass"), "fail at least one": found.count("fail")}
    counts["are open"] = len(found) - sum(counts.values())
    said = ", ".join(f"{n} {what}" for what, n in counts.items())
    return f"Of {len(found)} cases (task, learner, attack, cost limit) {said}."


def case_name(case: Mapping[str, Any]) -> str:
    learner, attack = LEARNERS.get(case["learner"], case["learner"]), ATTACKS.get(case["attack"], case["attack"])
    return f"{case['task']}, {learner}, {attack}, cost limit {case['cost_limit']:g}"


def asked(line: Mapping[str, Any]) -> str:
    """The rule and the threshold: '≥ 0.9', 'every seed ≤ 20', '≤ 0.1 either way'."""
    sign = "≥" if line["relation"] == ">=" else "≤"
    text = f"{sign} {number(line['threshold'], 3)}" + (" either way" if line["relation"] == "within" else "")
    return f"every seed {text}" if line["rule"] == "every seed" else text


def measured(line: Mapping[str, Any]) -> str:
    """Value and interval: '0.94 [0.88, 1]'."""
    digits = 1 if line["rule"] == "every seed" else 3
    if line["value"] is None:
        return "–"
    ends = "" if line["low"] is None else f" [{number(line['low'], digits)}, {number(line['high'], digits)}]"
    return number(line["value"], digits) + ends


def criteria_table(case: Mapping[str, Any]) -> pd.DataFrame:
    """The criteria of one case as text."""
    digits = lambda line: 1 if line["rule"] == "every seed" else 2
    per_seed = lambda line: "/".join("–" if x is None else number(x, digits(line)) for x in line["per_seed"])
    return pd.DataFrame([{"criterion": NAMED[line["name"]].title, "asked": asked(line), "mean [interval]": measured(line),
                          "every seed": per_seed(line), "result": line["result"], "why": line["reason"] or "–"}
                         for line in case["criteria"]])


def markdown(document: Mapping[str, Any]) -> str:
    """The page: the verdict, every criterion, what was not measured, how it was judged, what it rests on."""
    name, thresholds = METHODS[document["method"]], document["thresholds"]
    out = [f"# {name}: {document['result']}", *([f"**{document['note']}**"] if document["note"] else []), sentence(document),
           balance(document)]
    for case in document["cases"]:
        out += [f"## {case_name(case)}: {case['result']}", to_markdown(criteria_table(case)).rstrip()]
        if case["seconds_share"] is not None:
            out.append(f"Wall time: {number(100 * case['seconds_share'], 0)}% of retraining. Not judged: models that train side by "
                       "side share it, and more of them train than are repaired. Mind that an update of a repair may do more "
                       "work than one of training.")
    out += ["## What was not measured", "\n".join(_missing(document)) or "Everything was measured."]
    n = sorted({len(case["seeds"]) for case in document["cases"]})
    few = [k for k in n if k <= 3]
    out += ["## How it was judged",
            f"Pass: the whole {thresholds['level']:.0%} interval meets the threshold. Fail: the whole interval misses it. "
            "Undecided: the threshold lies within the interval, the audit is not calibrated, or too few seeds. Not measured: no "
            "number, and never a pass. Where every seed is asked, the seeds decide. Intervals: bootstrap over seeds "
            f"(n = {', '.join(map(str, n))}), never over episodes."
            + (f" With so few they span the seeds, and hold the true value in about {1 - 2 ** (1 - few[-1]):.0%} of cases only."
               if few else "")]
    tables = [f"table `{key}` {value[:12]}" for key, value in document["tables"].items() if value]
    rests = [f"{a['kind']}/{a['name']} {a['id'][:12]}" for a in document["rests_on"]]
    code = f"code {document['code']['revision'] or 'without a revision'}, {document['code']['sources'][:12]}"
    return "\n\n".join([*out, "## What it rests on", "\n".join(f"- {line}" for line in (*tables, *rests, code))]) + "\n"


def _missing(document: Mapping[str, Any]) -> list[str]:
    """One line per case and reason, with the criteria that it concerns."""
    lines = []
    for case in document["cases"]:
        why: dict[str, list[str]] = {}
        for line in case["criteria"]:
            if line["result"] == "not measured":
                why.setdefault(line["reason"], []).append(line["name"])
        lines += [f"- {case_name(case)}: {', '.join(names)} ({reason})" for reason, names in why.items()]
    return lines


# ---------------------------------------------------------------------------------------------------------------- picture
def place(line: Mapping[str, Any], value: float) -> float:
    """Where a value is drawn: 0 at the threshold, 1 at the ideal, negative where it misses."""
    value = abs(value) if line["relation"] == "within" else value
    return (value - line["threshold"]) / ((NAMED[line["name"]].ideal - line["threshold"]) or -1.0)


def verdict_figure(document: Mapping[str, Any], title: str = "") -> Figure:
    """Every criterion's value and interval against its threshold, one panel per case.

    All criteria share an axis: 0 is the threshold, 1 what a perfect repair has; what lies beyond the panel is an arrow. Small
    ticks: seeds. Marker and word: the result.
    """
    cases, height, W, left, panel = document["cases"], 0.33, 14.8, 5.1, 4.0            # inches
    H = 1.35 + len(cases) * (height * len(CRITERIA) + 0.75)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        fig, axes = plt.subplots(len(cases), 1, figsize=(W, H), squeeze=False)
        for ax, case in zip(axes[:, 0], cases):
            for row, line in enumerate(case["criteria"]):
                _draw(ax, -row, line)
            ax.axvspan(0, RIGHT, color="#0072B2", alpha=0.05, lw=0, zorder=0)
            ax.axvline(0, color="#333333", lw=1.2, zorder=1)
            ax.axvline(1, color="#999999", lw=0.9, ls=(0, (1, 2)), zorder=1)
            ax.set(xlim=(LEFT, RIGHT), ylim=(0.6 - len(CRITERIA), 0.6), title=f"{case_name(case)}: {case['result']}")
            ax.set_yticks([-row for row in range(len(CRITERIA))],
                          [f"{NAMED[line['name']].title}:  {asked(line)}" for line in case["criteria"]], fontsize=9)
            ax.set_xticks([-1, 0, 1], ["", "threshold", "ideal"])
            ax.tick_params(length=0)
            ax.spines["left"].set_visible(False)
        axes[-1, 0].set_xlabel("misses  ←   distance from the threshold [way to the ideal = 1]   →  meets")
        handles = [Line2D([], [], ls="", ms=7, label=result, **LOOKS[result]) for result in RESULTS[:3]]
        handles += [Line2D([], [], color="#444444", lw=1.6, label=f"{document['thresholds']['level']:.0%} interval over seeds"),
                    Line2D([], [], ls="", marker="|", color="#444444", label="a seed")]
        fig.legend(handles=handles, loc="lower center", ncol=5)
        says = f"{METHODS[document['method']]}: {document['result']}" + (f"   ({document['note']})" if document["note"] else "")
        fig.suptitle(title or says, x=0.01, y=1 - 0.12 / H, ha="left", va="top", fontweight="bold", fontsize=12)
        fig.subplots_adjust(left=left / W, right=(left + panel) / W, top=1 - 0.8 / H, bottom=0.95 / H,
                            hspace=0.75 / (height * len(CRITERIA)))
    plt.close(fig)
    return fig


def _draw(ax, y: float, line: Mapping[str, Any]) -> None:
    """One criterion: interval, seeds, marker, and in words the result, the numbers and, if it is no pass, why."""
    look = LOOKS[line["result"]]
    inside = lambda x: min(max(x, LEFT + 0.05), RIGHT - 0.05)
    ax.axhline(y, color="#EEEEEE", lw=0.8, zorder=0)
    if line["value"] is not None:
        at, ends = place(line, line["value"]), [] if line["low"] is None else [place(line, line["low"]), place(line, line["high"])]
        if line["relation"] == "within" and ends and line["low"] <= 0 <= line["high"]:
            ends.append(1.0)
        span: Sequence[float] = [inside(min([at, *ends])), inside(max([at, *ends]))]
        ax.plot(span, [y, y], color=look["color"], lw=2.2, solid_capstyle="butt", zorder=2)
        seeds = [place(line, x) for x in line["per_seed"] if x is not None]
        seeds = [x for x in seeds if LEFT < x < RIGHT]
        ax.plot(seeds, [y] * len(seeds), ls="", marker="|", ms=9, mew=1.0, color="#444444", alpha=0.8, zorder=3)
        shape = {"marker": "<"} if at < LEFT else {"marker": ">"} if at > RIGHT else {}
        ax.plot(inside(at), y, ls="", ms=7.5, zorder=4, mew=1.2, mec=look["color"], **(look | shape))
    put = lambda x, text, **kw: ax.annotate(text, (1, y), (x, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                                            va="center", fontsize=9, annotation_clip=False, **kw)
    put(10, line["result"], color=look["color"], fontweight="bold")
    put(92, measured(line), color="#222222")
    put(220, line["reason"].split(":")[0], color="#666666")
