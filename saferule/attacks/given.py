"""No attack of ours: the data set is already poisoned, and a file names the rows to forget (the engineer's case)."""
from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from ..config import GivenConfig
from ..data import Pool, Rows, forget_rows
from ..errors import UserError
from . import Attack, Result, Threat, truth_of


def read_forget_file(path: str | Path, n_rows: int) -> Rows:
    """Rows from a CSV with a column `row` (ids into the data set) and, if wanted, `weight` in [0, 1]."""
    try:
        frame = pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a CSV with a column 'row' as forget_file.") from None
    except (ValueError, OSError) as error:             # pandas' parser errors are ValueErrors
        raise UserError(f"{path}: not a readable CSV ({str(error).splitlines()[0]}).") from None
    if "row" not in frame.columns:
        raise UserError(f"{path}: has no column 'row' (found: {', '.join(map(str, frame.columns))}).")
    if not pd.api.types.is_integer_dtype(frame["row"]) and len(frame):
        raise UserError(f"{path}: column 'row' must hold whole numbers.")
    if "weight" in frame.columns and not pd.api.types.is_numeric_dtype(frame["weight"]):
        raise UserError(f"{path}: column 'weight' must hold numbers in [0, 1].")
    weight = frame["weight"].to_numpy() if "weight" in frame.columns else None
    return forget_rows(frame["row"].to_numpy(dtype="int64"), n_rows, weight, where=str(path))


def run(pool: Pool, cfg: GivenConfig, name: str, donors: Pool | None, cost_limit: float) -> Result:
    if not cfg.forget_file:
        raise UserError("given: name the rows to forget with overrides={'forget_file': 'PATH.csv'} (column 'row').")
    forget = read_forget_file(cfg.forget_file, len(pool))
    facts = {"rows": len(forget.ids), "episodes": int(pool.episode[forget.ids].unique().numel()),
             "forget_file": Path(cfg.forget_file).name,
             "threat": asdict(replace(THREAT, fields=("cost",) if cfg.forged_costs else ()))}
    return pool.append(name, {}, forget), facts, truth_of(pool.episodes().head(0))


THREAT = Threat(fields=(), unit="row", knowledge="none", placement="in place", tier="unknown", goal="unsafe")
ATTACK = Attack(THREAT, run, "The data are already poisoned; a file names the rows to forget.")
