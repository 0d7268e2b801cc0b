"""Tables for people, and the files that tables and figures become.

`statistics` has the numbers and `figures` the plots; both are at hand from here under their own names.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .config import PROFILES
from .figures import curve_figure, pareto_figure, render, scatter_figure, table_figure, training_figure
from .files import atomic_file, locked
from .statistics import ATTACKS, CASE, KEYS, METHODS, aggregate, beside, claims, later_table, main_table, number, triggered_table
from .statistics import summary as summarise

__all__ = ["METHODS", "aggregate", "claims", "claims_table", "curve_figure", "later_table", "main_table", "pareto_figure",
           "render", "save_figure", "scatter_figure", "summary_table", "table_figure", "to_markdown", "training_figure",
           "triggered_summary", "triggered_table", "write_table"]


# -------------------------------------------------------------------------------------------------- tables for people
def summary_table(tidy: pd.DataFrame, later: pd.DataFrame | None = None, seed: int = 0) -> pd.DataFrame:
    """One line per case and method, as text: return with its 95% interval over seeds, cost of every seed,
    seeds at or under the limit, and shares of the retrained policy. `later` adds the costs after further training."""
    numbers = summarise(tidy, seed)
    after = {} if later is None or later.empty else {k: g.cost_mean.tolist() for k, g in later.groupby([*CASE, "method"])}
    per_cent = lambda x: "–" if np.isnan(x) else f"{100 * x:.0f}%"
    lines, several = [], tidy.cost_limit.nunique() > 1
    for n in numbers.itertuples():
        line = {"task": n.task, "learner": n.learner, "attack": ATTACKS.get(n.attack, n.attack), "method": METHODS[n.method],
                "return [95%]": f"{n.return_mean:.0f} [{n.return_low:.0f}, {n.return_high:.0f}]",
                "cost per seed": "/".join(map(number, n.costs)), "safe seeds": f"{n.safe}/{n.seeds}"}
        if several:
            line["cost limit"] = number(n.cost_limit)
        if after:
            costs = after.get((n.task, n.learner, n.attack, n.cost_limit, n.method), [])
            line["cost per seed, later"] = "/".join(map(number, costs)) or "–"
        lines.append({**line, "of retrained return": per_cent(n.return_share), "safety recovered": per_cent(n.recovered),
                      "of retraining steps": per_cent(n.step_share)})
    return pd.DataFrame(lines)


def claims_table(verdicts: pd.DataFrame) -> pd.DataFrame:
    """`claims` as text for people."""
    signs = {">=": "≥", "<=": "≤", ">": ">"}
    lines = [{"task": v.task, "attack": ATTACKS.get(v.attack, v.attack), "claim": v.claim, "every seed": v.seeds,
              "judged": number(v.value, 3 if v.value < 10 else 1), "bound": f"{signs[v.rule.split()[-2]]} {number(v.threshold, 3)}",
              "verdict": v.verdict} for v in verdicts.itertuples()]
    return pd.DataFrame(lines, columns=["task", "attack", "claim", "every seed", "judged", "bound", "verdict"])


def triggered_summary(triggered: pd.DataFrame, rates: pd.DataFrame | None = None) -> pd.DataFrame:
    """`triggered_table` as text, one line per trigger and method: without the trigger and with it.

    rates: triggers.csv of `evaluate` artefacts; its success_rate is the last column, where an attack forges actions.
    """
    both, lines = beside(triggered), []
    both = both.assign(success_rate=np.nan) if rates is None else both.merge(rates, "left", on=[*KEYS, "trigger"])
    safe = lambda costs, limits: f"{int((costs <= limits).sum())}/{len(costs)}"
    for (task, learner, trigger, _, method, limit), own in both.groupby(
            ["task", "learner", "trigger", "attack", "method", "cost_limit"], sort=False):
        line = {"task": task, "learner": learner, "trigger of": ATTACKS[trigger], "method": METHODS[method]}
        if both.cost_limit.nunique() > 1:
            line["cost limit"] = number(limit)
        drawn = "–" if own.success_rate.isna().all() else "/".join(f"{100 * rate:.0f}%" for rate in own.success_rate)
        lines.append({**line, "return": number(own.return_plain.mean(), 0), "return, triggered": number(own.return_mean.mean(), 0),
                      "cost per seed": "/".join(map(number, own.cost_plain)),
                      "cost per seed, triggered": "/".join(map(number, own.cost_mean)),
                      "safe seeds": safe(own.cost_plain, own.cost_limit), "safe, triggered": safe(own.cost_mean, own.cost_limit),
                      "follows the trigger": drawn})
    return pd.DataFrame(lines)


def to_markdown(frame: pd.DataFrame) -> str:
    """A GitHub table; cells are taken as they are, no number is reformatted."""
    cell = lambda value: str(value).replace("|", "\\|")
    rows = [list(map(cell, frame.columns)), ["---"] * frame.shape[1], *(list(map(cell, row)) for row in frame.to_numpy(object))]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


# ---------------------------------------------------------------------------------------------------------------- files
def save_figure(fig: Figure, stem: Path | str) -> list[Path]:
    """Writes <stem>.png and <stem>.svg, each whole or not at all; returns their paths."""
    return [_put(Path(f"{stem}.{kind}"), render(fig, kind)) for kind in ("png", "svg")]


def write_table(tidy: pd.DataFrame, stem: Path | str, title: str, note: str = "", profile: str = "", inputs: Iterable[Any] = (),
                shown: pd.DataFrame | None = None, claimed: pd.DataFrame | None = None) -> list[Path]:
    """A table for everyone: <stem>.csv (tidy, exact), .md and .png (for people), and an entry in manifest.json beside them.

    note      one or more lines under the table; a profile's own note ('smoke run, not a result') comes first by itself
    inputs    artefacts (or ids) that the numbers come from
    shown     the table as text for people (default: `summary_table`); claimed: such a table of verdicts, below it
    manifest.json: profile, and per table its title, note, inputs and the sha256 of each file. Returns the paths.
    """
    stem = Path(stem)
    preset = PROFILES[profile].note if profile in PROFILES else ""
    shown = summary_table(tidy) if shown is None else shown
    text = [f"# {title}\n", *([f"**{preset}**\n"] if preset else []), to_markdown(shown)]
    if claimed is not None and len(claimed):
        text += ["## Claims\n", to_markdown(claimed)]
    text += [line + "\n" for line in note.splitlines()]
    contents = {".csv": tidy.to_csv(index=False).encode(), ".md": "\n".join(text).encode(),
                ".png": render(table_figure(shown, title, note, preset), "png")}
    paths = [_put(stem.with_name(stem.name + suffix), content) for suffix, content in contents.items()]
    entry = {"title": title, "note": "\n".join(line for line in (preset, note) if line), "rows": len(tidy),
             "inputs": sorted(getattr(i, "id", i) for i in inputs),
             "files": {p.name: hashlib.sha256(c).hexdigest() for p, c in zip(paths, contents.values())}}
    return [*paths, _register(stem, entry, profile)]


def _register(stem: Path, entry: Mapping[str, Any], profile: str) -> Path:
    """Adds the table to the manifest of its folder; notebooks that finish together take turns."""
    path, turn = stem.parent / "manifest.json", stem.parent / ".manifest.lock"
    turn.touch()
    with locked(turn, wait=True):
        try:
            tables = json.loads(path.read_text(encoding="utf-8"))["tables"]
        except (FileNotFoundError, ValueError, KeyError):           # none yet, or not ours: written anew
            tables = {}
        content = {"profile": profile, "tables": dict(sorted({**tables, stem.name: entry}.items()))}
        return _put(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _put(path: Path, content: bytes) -> Path:
    """Whole or not at all. UserError if the folder cannot be written."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
    return path
