"""DSRL and D4RL files in and out. A file is somebody else's: everything about it is checked before it is believed.

DSRL schema (root level, gzip): observations, next_observations, actions, rewards, costs, terminals, timeouts; N rows
each. D4RL files have no costs (the task's speed limit gives them) and may have no next_observations (the next row of
the episode is taken, as d4rl.qlearning_dataset does). Columns here: obs [N, n_obs], action [N, n_act], reward [N],
cost [N], next_obs [N, n_obs] float32; terminal [N], timeout [N] bool.
"""
from __future__ import annotations

import contextlib
import http.client
import json
import logging
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
from tqdm import tqdm

from saferule.errors import UserError
from saferule.files import MAX_FILE, atomic_file, locked, regular, show, sync

if TYPE_CHECKING:
    from saferule.tasks import Task

KEYS = {"obs": "observations", "action": "actions", "reward": "rewards", "cost": "costs", "next_obs": "next_observations",
        "terminal": "terminals", "timeout": "timeouts"}
WIDE, FLAGS = ("obs", "action", "next_obs"), ("terminal", "timeout")
MAX_BYTES = 8 << 30                                       # of all columns as declared; the largest DSRL file has 2.7 GB
MAX_RATIO, FREE_BYTES = 200, 256 << 20                    # declared bytes per byte of file, asked of larger ones only
MAX_CHUNK = 64 << 20                                      # HDF5 inflates whole chunks, so these are bounded, too
HOSTS = {"bullet": "https://huggingface.co/datasets/YYY-45/DSRL/resolve/main",
         "d4rl": "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2"}
PAUSE, PATIENCE = 2.0, 3                                  # seconds between attempts; attempts without a single new byte
log = logging.getLogger("saferule")


# -------------------------------------------------------------------------------------------------------------- reading
def read_hdf5(path: str | Path, task: Task | None = None) -> dict[str, np.ndarray]:
    """The columns of a DSRL file or, for a task with source 'd4rl', of a D4RL file.

    An incomplete episode after the last end flag is dropped and a warning is logged. Raises UserError for anything
    that is not exactly such a file or does not fit the task.
    """
    path, where = Path(path), show(Path(path))
    if path.is_dir():
        raise UserError(f"{where} is a folder; name the .hdf5 file in it")
    with regular(Path(os.path.realpath(path)), "check the name, or use source=local to collect data here"):
        pass                                              # exists, is a plain file and no pickle
    d4rl = getattr(task, "source", None) == "d4rl"
    columns = _load(path, where, optional=("next_obs", "cost")[:1 + hasattr(task, "cost_of")] if d4rl else ())
    check(columns, where, task)
    columns = _drop_tail(columns, where) if "next_obs" in columns else _chain(columns, where)
    if "cost" not in columns:
        columns["cost"] = np.asarray(task.cost_of(columns["obs"], columns["action"], columns["next_obs"]), np.float32)
        check(columns, where, task)
    return {name: columns[name] for name in KEYS}


def _load(path: Path, where: str, optional: tuple[str, ...]) -> dict[str, np.ndarray]:
    """All columns in their final dtype, once links, types and sizes have been found harmless."""
    if not h5py.is_hdf5(path):
        raise UserError(f"{where} is not an HDF5 file, or its beginning is damaged; export or download it again")
    with _damage(where), h5py.File(path, "r", locking=False) as f:
        if len(f) > 10_000:
            raise UserError(f"{where} has {len(f):,} entries at root level; expected {', '.join(KEYS.values())}")
        links = {key: f.get(key, getlink=True) for key in f}
        for key, link in links.items():
            if not isinstance(link, h5py.HardLink):
                raise UserError(f"{where}: {key!r} is a link to {getattr(link, 'filename', 'another place')!r}; links are "
                                "not followed, copy the data into the file")
        missing = [KEYS[name] for name in KEYS if KEYS[name] not in links and name not in optional]
        if missing:
            known = "" if optional or missing != ["costs"] else "; D4RL files have none, name a velocity task for these"
            raise UserError(f"{where} lacks {', '.join(map(repr, missing))}; it holds {', '.join(links) or 'nothing'}{known}")
        data = {name: f[key] for name, key in KEYS.items() if key in links}
        for name, dset in data.items():
            _harmless(dset, KEYS[name], where, name in FLAGS)
        total, size = sum(math.prod(d.shape) * max(d.dtype.itemsize, 4) for d in data.values()), path.stat().st_size
        if total > MAX_BYTES:
            raise UserError(f"{where} declares {total / 1e9:,.1f} GB of data, more than {MAX_BYTES / 1e9:.1f} GB; split it")
        if total > FREE_BYTES and total > MAX_RATIO * size:
            raise UserError(f"{where} declares {total / 1e9:,.1f} GB of data in a file of {size / 1e6:,.1f} MB; "
                            "no recorded data compress like this, refused")
        rows = data["obs"].shape[0]
        for name, dset in data.items():
            if dset.shape[0] != rows:
                raise UserError(f"{where}: {KEYS[name]!r} has {dset.shape[0]:,} rows but 'observations' has {rows:,}; "
                                "every transition needs both: re-export the file or drop the incomplete last rows")
        if rows == 0:
            raise UserError(f"{where} has zero rows; collect or export at least one episode")
        return {name: _read(dset, KEYS[name], where, name) for name, dset in data.items()}


def _harmless(dset, key: str, where: str, flag: bool) -> None:
    """Refuse what is no plain array of numbers stored inside this file."""
    if not isinstance(dset, h5py.Dataset):
        raise UserError(f"{where}: {key!r} is a group, not an array; DSRL and D4RL files keep it at root level")
    if dset.is_virtual or dset.id.get_create_plist().get_external_count():
        raise UserError(f"{where}: {key!r} keeps its data in other files; these are not opened, copy the data into the file")
    if dset.dtype.kind not in ("biuf" if flag else "iuf"):
        kind = "text" if h5py.check_string_dtype(dset.dtype) or dset.dtype.kind in "SU" else str(dset.dtype)
        raise UserError(f"{where}: {key!r} has dtype {kind}; expected {'bool or 0 and 1' if flag else 'float32'}")
    if dset.shape is None or not 1 <= len(dset.shape) <= 2:
        raise UserError(f"{where}: {key!r} has shape {dset.shape}; expected one row per transition")
    if dset.chunks and math.prod(dset.chunks) * dset.dtype.itemsize > max(MAX_CHUNK, math.prod(dset.shape) * 8):
        raise UserError(f"{where}: {key!r} is stored in chunks of {dset.chunks} for a shape of {dset.shape}; refused")


def _read(dset: h5py.Dataset, key: str, where: str, name: str) -> np.ndarray:
    if name in FLAGS:
        values = dset[()]
        wrong = (values != 0) & (values != 1)
        if wrong.any():
            row = np.unravel_index(np.argmax(wrong), wrong.shape)[0]
            raise UserError(f"{where}: {key!r} must be bool or 0 and 1 but is {values[row]} in row {row:,}")
        values = values.astype(bool)
    else:
        values = np.empty(dset.shape, np.float32)
        dset.read_direct(values)                          # the library converts on the way: one copy only
    if name in WIDE and values.ndim == 1:
        return values[:, None]                            # DSRL's writer squeezes arrays of width 1
    return values[:, 0] if name not in WIDE and values.shape[1:] == (1,) else values


@contextlib.contextmanager
def _damage(where: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{where} does not fit into memory; use a part of it") from None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, AttributeError) as e:
        reason = " ".join(str(e).split())[:120]
        raise UserError(f"{where} is truncated or damaged ({reason}); export or download it again") from e


# ----------------------------------------------------------------------------------------------------------- validation
def check(columns: Mapping[str, np.ndarray], where: str, task: Task | None = None) -> None:
    """Shapes, the task's sizes, finite numbers, costs >= 0, at least one end flag. Raises UserError naming the first
    offender; 'cost' and 'next_obs' may be absent."""
    rows, n_obs = len(columns["obs"]), columns["obs"].shape[1:]
    width = {"obs": (task.n_obs,) if task else n_obs, "action": (task.n_act,) if task else columns["action"].shape[1:]}
    width["next_obs"] = width["obs"]
    for name, values in columns.items():
        want = (rows, *width.get(name, ()))
        if values.shape != want or (name in WIDE and values.ndim != 2):
            whose = f" as {task.name} has" if task and name in WIDE else ""
            raise UserError(f"{where}: {KEYS[name]!r} has shape {_shape(values.shape)}; expected {_shape(want)}{whose}")
        if name in FLAGS:
            continue
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            row, *column = np.unravel_index(bad[0], values.shape)
            what = "NaN" if np.isnan(values.flat[bad[0]]) else "infinity"
            place = f"row {row:,}" + (f", column {column[0]}" if column else "")
            raise UserError(f"{where}: {KEYS[name]!r} holds {what}, first in {place}; remove or repair the episode")
    if "cost" in columns and columns["cost"].min() < 0:
        row = int(np.argmax(columns["cost"] < 0))
        raise UserError(f"{where}: 'costs' is negative ({columns['cost'][row]:g}), first in row {row:,}; "
                        "a cost is an amount of harm, 0 or more")
    if not (columns["terminal"].any() or columns["timeout"].any()):
        raise UserError(f"{where} has no terminal and no time-out flag, so episodes cannot be told apart; "
                        "set 'timeouts' in the last row of every episode")


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(f"{n:,}" for n in shape) + ")"


def chain_fraction(columns: Mapping[str, np.ndarray]) -> float:
    """Share of the rows inside episodes whose next_obs is the following row's obs, bit for bit; 1.0 if there are none.

    Recorded data have 1.0; rows that were taken out, shuffled or altered break the chain.
    """
    inside = ~(np.asarray(columns["terminal"]) | np.asarray(columns["timeout"]))[:-1]
    same = (np.asarray(columns["next_obs"])[:-1] == np.asarray(columns["obs"])[1:]).all(1)
    return float(same[inside].mean()) if inside.any() else 1.0


def _drop_tail(columns: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    ends = np.flatnonzero(columns["terminal"] | columns["timeout"])
    rows, keep = len(columns["obs"]), int(ends[-1]) + 1
    if keep < rows:
        log.warning("%s: dropped %s rows after the last end flag: an incomplete episode", where, f"{rows - keep:,}")
    return {name: values[:keep] for name, values in columns.items()}


def _chain(columns: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """D4RL without next_observations: the next row's obs, where the next row is of the same episode.

    The last row of a time-out episode and of an incomplete one has no successor and is dropped, the row before becomes
    the time-out. A terminal row needs none, because nothing is bootstrapped from it: it keeps its own obs there.
    """
    terminal, timeout = columns["terminal"] & ~columns["timeout"], columns["timeout"].copy()
    timeout[-1] |= not terminal[-1]
    last = np.flatnonzero(timeout)
    before = last[last > 0] - 1
    timeout[before[~(terminal | timeout)[before]]] = True
    next_obs = np.concatenate([columns["obs"][1:], columns["obs"][-1:]])
    next_obs[terminal] = columns["obs"][terminal]
    keep = np.ones(len(timeout), bool)
    keep[last] = False
    if not keep.any():
        raise UserError(f"{where} has no 'next_observations' and only episodes of one row; no transition is complete")
    log.info("%s: next_observations derived; %s last rows without a successor dropped", where, f"{len(last):,}")
    out = columns | {"terminal": terminal, "timeout": timeout, "next_obs": next_obs}
    return {name: values[keep] for name, values in out.items()}


# -------------------------------------------------------------------------------------------------------------- writing
def write_hdf5(path: str | Path, columns: Mapping[str, np.ndarray]) -> Path:
    """Write columns (NumPy or torch; others than the seven are ignored) as a DSRL file, atomically; equal columns give
    equal bytes. Raises UserError for columns that `read_hdf5` would refuse and for a folder that cannot be written."""
    path = Path(path)
    missing = [name for name in KEYS if name not in columns]
    if missing:
        raise UserError(f"{show(path)}: cannot be written without the columns {', '.join(missing)}")
    arrays = {name: np.asarray(columns[name], dtype=bool if name in FLAGS else np.float32) for name in KEYS}
    if len(arrays["obs"]) == 0:
        raise UserError(f"{show(path)}: there are zero rows to write")
    check(arrays, show(path))
    with atomic_file(path) as temporary, h5py.File(temporary, "w", locking=False) as f:
        for name, values in arrays.items():
            f.create_dataset(KEYS[name], data=values, compression="gzip")
    return path


# ------------------------------------------------------------------------------------------------------------- download
def download(task: Task, folder: str | Path, progress: bool = True, base: str | None = None,
             timeout: float = 30.0) -> Path:
    """Fetch the task's public file into `folder` unless it is there, and return its path.

    A broken transfer goes on where it stopped, also in a later call; the name appears only when the file is whole.
    base: URL of the folder to fetch from; timeout: seconds of silence. Raises UserError if that fails.
    """
    path = Path(folder) / f"{task.dsrl_file}.hdf5"
    url = f"{(base or HOSTS[task.source]).rstrip('/')}/{path.name}"
    if path.exists():
        return path
    part = path.with_name(path.name + ".part")
    note = path.with_name(path.name + ".part.json")       # which version of the file the part belongs to
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        with locked(part):
            try:
                if not path.exists():                     # it does if another process finished it meanwhile
                    _complete(url, part, note, progress, timeout)
                    os.replace(part, path)
                    sync(path.parent)
            finally:
                if path.exists() or part.stat().st_size == 0:
                    part.unlink(missing_ok=True)
                    note.unlink(missing_ok=True)
    except BlockingIOError:
        raise UserError(f"{show(path)} is being downloaded by another process; wait for it") from None
    except OSError as e:
        raise UserError(f"cannot write {show(path)}: {e.strerror or e}; choose another folder") from e
    return path


def _complete(url: str, part: Path, note: Path, progress: bool, timeout: float) -> None:
    """Fetch until `part` is whole, for as long as every few attempts bring something."""
    failures = 0
    with tqdm(desc=part.stem, unit="B", unit_scale=True, disable=not progress) as bar:
        before = part.stat().st_size
        while not _fetch(url, part, note, bar, timeout):
            before, failures = part.stat().st_size, 0 if part.stat().st_size > before else failures + 1
            if failures == PATIENCE:
                raise UserError(f"{url}: the transfer keeps breaking off at {part.stat().st_size:,} bytes; run this "
                                "again to go on from there, or use source=local to collect data here")
            time.sleep(PAUSE)
    if not h5py.is_hdf5(part):
        os.truncate(part, 0)
        raise UserError(f"{url}: what came is no HDF5 file; use source=local to collect data here")
    sync(part)


def _fetch(url: str, part: Path, note: Path, bar: tqdm, timeout: float) -> bool:
    """One request for what `part` lacks. True if it is whole now, False if it broke off or must start again."""
    have, known = part.stat().st_size, {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(note.read_text())
    headers = {"User-Agent": "saferule", "Accept-Encoding": "identity"}
    if have and known.get("tag"):                         # If-Range: should the file have changed, send all of it
        headers |= {"Range": f"bytes={have}-", "If-Range": known["tag"]}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as e:
        if e.code == 416:                                 # nothing lies beyond what we have: it is whole, or not ours
            whole = known.get("total") == have
            if not whole:
                os.truncate(part, 0)
            return whole
        raise UserError(f"{url}: the server answers {e.code} ({e.reason}); use source=local to collect data here") from None
    except (OSError, http.client.HTTPException, ValueError) as e:
        reason = getattr(e, "reason", e) or type(e).__name__
        raise UserError(f"{url} cannot be reached ({reason}); check the network, put the file beside {show(part)} "
                        "yourself, or use source=local to collect data here") from None
    with response, open(part, "r+b") as f:
        if response.status == 206 and (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            f.seek(have)
        else:
            f.truncate(0)
            if response.status != 200:                    # a part that was not asked for
                return False
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else None
        note.write_text(json.dumps({"tag": response.headers.get("ETag") or response.headers.get("Last-Modified"),
                                    "total": total}))
        if (total or 0) > MAX_FILE:
            raise UserError(f"{url}: {total:,} bytes are beyond reason; use source=local to collect data here")
        bar.total, bar.initial, bar.n = total, have, have
        bar.refresh()
        try:
            while block := response.read(1 << 20):
                have += f.write(block)
                bar.update(len(block))
                if have > (total or MAX_FILE):
                    raise UserError(f"{url}: sends more than it announced; use source=local to collect data here")
        except (http.client.HTTPException, TimeoutError, ConnectionError, OSError) as e:
            if isinstance(e, OSError) and e.errno in (28, 122):          # disk or quota full: trying again will not help
                raise
            return False
        return total in (have, None)
