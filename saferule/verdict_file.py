"""A verdict that somebody hands in is checked before it is believed, or printed."""
from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from .config import UNLEARNER_NAMES, VerdictThresholds
from .errors import UserError
from .files import regular, show
from .statistics import CASE
from .verdict import CRITERIA, RESULTS, SCHEMA, calibrated, checked, judge, tally, worst


def _number(x) -> bool:
    return type(x) in (int, float) and -1e300 < x < 1e300            # no NaN, no infinity, no bool


KINDS = {
    "text": lambda x: isinstance(x, str) and len(x) <= 1000 and x.isprintable(),                  # one line, fit for a terminal
    "number": _number,
    "number or null": lambda x: x is None or _number(x),
    "count": lambda x: type(x) is int and 0 <= x < 2**63,
    "sha256": lambda x: isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x) is not None,
    "sha256 or null": lambda x: x is None or KINDS["sha256"](x),
    "text or null": lambda x: x is None or KINDS["text"](x),
    "result": lambda x: isinstance(x, str) and x in RESULTS,
    "known method": lambda x: isinstance(x, str) and x in UNLEARNER_NAMES,
}
COUNTS, MODELS = dict.fromkeys(RESULTS, "count"), dict.fromkeys(("poisoned", "unsafe", "repaired"), "count")
SHAPE = {
    "schema": "text", "method": "known method", "profile": "text", "note": "text", "result": "result", "models": MODELS,
    "results": {c.name: COUNTS for c in CRITERIA},
    "cases": [{"task": "text", "learner": "text", "attack": "text", "cost_limit": "number", "seeds": ["count"], "result": "result",
               "models": MODELS, "seconds_share": "number or null",
               "criteria": [{"name": "text", "rule": "text", "relation": "text", "threshold": "number", "value": "number or null",
                             "low": "number or null", "high": "number or null", "per_seed": ["number or null"], "n": "count",
                             "calibration": (dict.fromkeys(("poisoned", "retrain"), "number or null"),), "result": "result",
                             "reason": "text"}]}],
    "thresholds": {f.name: "count" if f.name in ("min_seeds", "reps") else "number" for f in fields(VerdictThresholds)},
    "bootstrap_seed": "count", "tables": {"tidy": "sha256", "later": "sha256", "audits": "sha256 or null"},
    "rests_on": [{"kind": "text", "name": "text", "id": "sha256"}], "code": {"revision": "text or null", "sources": "sha256"},
}


def _fits(x: Any, shape: Any, where: str) -> None:
    """UserError, naming the key, where x has another shape. (shape,): or null."""
    if isinstance(shape, tuple):
        if x is not None:
            _fits(x, shape[0], where)
    elif isinstance(shape, str):
        if not KINDS[shape](x):
            raise UserError(f"{where}: {str(x)[:40]!r} is no {shape}.")
    elif not isinstance(x, type(shape)):
        raise UserError(f"{where}: a {'list' if isinstance(shape, list) else 'group of keys'} belongs here.")
    elif isinstance(shape, list):
        for i, item in enumerate(x):
            _fits(item, shape[0], f"{where}[{i}]")
    else:
        for key in [*shape, *x]:
            if key not in x or key not in shape:
                raise UserError(f"{where}: {'no' if key not in x else 'unknown'} key {str(key)[:40]!r}.")
            _fits(x[key], shape[key], f"{where}.{key}")


def check(document: Any, where: str = "verdict") -> dict[str, Any]:
    """The document, if it is a verdict of this schema: every key there and of its kind, every result what its numbers make it.

    Otherwise UserError in one line that names the key. Numbers can still be invented: the hashes say what they rest on.
    """
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise UserError(f"{where}: no verdict of schema '{SCHEMA}'.")
    _fits(document, SHAPE, where)
    thresholds, cases = checked(VerdictThresholds(**document["thresholds"])), document["cases"]

    def same(key, found, expected):
        if found != expected:
            raise UserError(f"{where}: {key} is {str(found)[:80]!r}, but the rest of the file makes it {str(expected)[:80]!r}.")

    for i, case in enumerate(cases):
        at, n_seeds, lines = f"cases[{i}]", len(case["seeds"]), case["criteria"]
        same(f"{at}.criteria", [line["name"] for line in lines], [c.name for c in CRITERIA])
        for c, line in zip(CRITERIA, lines):
            this, bound = f"{at}.{c.name}", case["cost_limit"] if c.bound == "cost_limit" else getattr(thresholds, c.bound)
            same(f"{this}.threshold", (line["rule"], line["relation"], line["threshold"]), (c.rule, c.relation, bound))
            same(f"{this}.per_seed", len(line["per_seed"]), n_seeds)
            given = sum(x is not None for x in line["per_seed"])
            by_seed = c.rule == "every seed" and line["value"] is not None
            same(f"{this}.n", line["n"], given if by_seed else min(line["n"], n_seeds))
            result, _ = judge(c.rule, c.relation, bound, *(line[k] for k in ("value", "low", "high", "per_seed", "n")),
                              thresholds.min_seeds)
            if c.audit and result != "not measured":
                flaw = calibrated(c, thresholds, *(line["calibration"] or {"poisoned": None, "retrain": None}).values())
                result = "undecided" if flaw else result
            same(f"{this}.result", line["result"], result)
        same(f"{at}.result", case["result"], worst([line["result"] for line in lines]))
        same(f"{at}.models", case["models"]["poisoned"], n_seeds)
    same("cases", len({tuple(case[k] for k in CASE) for case in cases}), len(cases))
    same("result", document["result"], worst([case["result"] for case in cases]))
    same("models", document["models"], {k: sum(case["models"][k] for case in cases) for k in MODELS})
    same("results", document["results"], {c.name: tally(case["criteria"][j]["result"] for case in cases)
                                          for j, c in enumerate(CRITERIA)})
    return document


def read(path: Path) -> dict[str, Any]:
    """`check` on a file that somebody handed in. UserError too if it is missing, beyond reason, or not JSON."""
    with regular(Path(path), "ask for it again", 16 << 20) as file:
        text = file.read()
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{show(Path(path))}: not JSON.") from None
    return check(document, show(Path(path)))
