"""Artefacts: directories that are whole or absent, and say where they came from.

    <root>/artifacts/<kind>/<name>/manifest.json + files         root = run_dir(profile)

`id` is the sha256 of what a re-run must reproduce: kind, name, configuration, replicas, ids of the inputs, hashes of
the files. Wall time, device, versions and date are recorded beside it and do not enter. Every byte is checked on load.
Nothing here reads or writes pickles: tensors are safetensors, tables CSV, the rest JSON, text or images.
"""
from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from saferule.errors import UserError
from saferule.files import (
    MAX_FILE,
    PICKLES,
    atomic_file,
    regular,
    replacing,
    restore,
    results_dir,  # noqa: F401  (also from here)
    run_dir,
    show,
    sync,
)
from saferule.sources import REPO

SCHEMA = "saferule-artifact/1"
NOTEBOOKS = {"data": "01_data", "poison": "02_poison", "train": "03_train", "unlearn": "04_unlearn",
             "evaluate": "05_evaluate", "audit": "06_audit", "verdict": "07_verdict", "ope": "14_off_policy",
             "table": "10_table_main", "figure": "20_figures"}
LIBRARIES = ("torch", "numpy", "pandas", "h5py", "safetensors", "gymnasium", "bullet-safety-gym", "pybullet", "mujoco",
             "d4rl", "wandb", "triton")
MAX_MANIFEST = 16 << 20                                   # bytes
# pandas < 3.1 loses the last bit of some numbers unless asked; later ones do not and warn when asked
EXACT = {"float_precision": "round_trip"} if tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1) else {}
IDS = {"artefact": str}                                   # a column of ids: 01234567 and 123e4567 are no numbers
TEXT, IMAGE = (".md", ".txt", ".jsonl"), (".png", ".svg", ".pdf")


# ------------------------------------------------------------------------------------------------------- the object
@dataclass(frozen=True)
class Artifact:
    path: Path
    manifest: dict

    id = property(lambda self: self.manifest["id"])                  # sha256 hex over the deterministic content
    short = property(lambda self: self.id[:8])
    kind = property(lambda self: self.manifest["kind"])
    name = property(lambda self: self.manifest["name"])
    config = property(lambda self: self.manifest["config"])
    replicas = property(lambda self: tuple(self.manifest["replicas"]))

    def tensors(self, file: str) -> dict[str, Tensor]:
        """CPU tensors of a .safetensors file."""
        with _named(self.path / file, _remedy(self.kind)):
            return safetensors.torch.load(self.read(file))

    def table(self, file: str) -> pd.DataFrame:
        """A .csv file. An empty cell is NaN; every other text, 'none' and 'NA' included, is itself, and so are short ids."""
        with _named(self.path / file, _remedy(self.kind)):
            return pd.read_csv(BytesIO(self.read(file)), keep_default_na=False, na_values=[""], dtype=IDS, **EXACT)

    def json(self, file: str):
        with _named(self.path / file, _remedy(self.kind)):
            return _parse(self.read(file))

    def read(self, file: str) -> bytes:
        """The bytes of a file of this artefact, checked again: what is used is what was written."""
        if file not in self.manifest["files"]:
            raise UserError(f"{show(self.path)} holds no {file!r}; it holds {', '.join(self.manifest['files'])}")
        entry, remedy = self.manifest["files"][file], _remedy(self.kind)
        with regular(self.path / file, remedy) as f:
            data = f.read(entry["bytes"] + 1)
        _compare(self.path / file, len(data), hashlib.sha256(data).hexdigest(), entry, remedy)
        return data

    def __repr__(self) -> str:
        return f"Artifact({self.kind}/{self.name} {self.short})"


# ------------------------------------------------------------------------------------------------------ save and load
def save(kind: str, name: str, files: Mapping[str, object], config, inputs: Mapping[str, Artifact] | None = None,
         replicas=(), root: Path | None = None, seconds: float | None = None, device: str | None = None) -> Artifact:
    """Write `files` and their manifest to root/artifacts/kind/name, replacing what was there in one step.

    files: .safetensors dict[str, Tensor] | .csv DataFrame | .json object | .md .txt .jsonl str | .png .svg .pdf bytes.
    config: dict or dataclass, fully resolved; replicas: one dict per replica. JSON has no NaN and no infinity: they
    are written as the strings 'NaN', 'Infinity', '-Infinity' (float() reads them back).
    Raises UserError for a folder that cannot be written or a file type that is not kept.
    """
    for part in (kind, name):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_+-]*", part):
            raise UserError(f"{part!r} cannot be part of an artefact's name: use letters, digits, '-', '+' and '_'")
    for file in files:
        _check_name(file)
    config, replicas = plain(config), plain(list(replicas))
    final = Path(root or run_dir(config.get("profile", "quick"))) / "artifacts" / kind / name
    try:
        with replacing(final) as folder:
            table = {file: _write(folder / file, content) for file, content in sorted(files.items())}
            manifest = {
                "schema": SCHEMA, "kind": kind, "name": name, "config": config, "replicas": replicas,
                "inputs": {k: {"kind": a.kind, "name": a.name, "id": a.id} for k, a in sorted((inputs or {}).items())},
                "files": table, "code": code_version(), "libraries": _libraries(), "device": device or _device(),
                "python": platform.python_version(), "seconds": seconds,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            manifest = plain(manifest | {"id": _identity(manifest)})
            manifest["checksum"] = _digest(manifest)
            _write(folder / "manifest.json", manifest)
    except OSError as e:
        raise UserError(f"cannot write {show(final)}: {e.strerror or e}; free it or point SAFERULE_RESULTS "
                        "to a folder that can be written") from e
    return Artifact(final, manifest)


def load(kind: str, name: str, root: Path) -> Artifact:
    """The artefact root/artifacts/kind/name, with the size and hash of every file verified.

    Raises UserError if it is missing (naming the notebook that makes it), damaged or of an unknown schema.
    """
    final = Path(root) / "artifacts" / kind / name
    if not final.is_dir():
        restore(final)
    if not final.is_dir():
        made = f"run notebooks/{NOTEBOOKS[kind]}.ipynb first" if kind in NOTEBOOKS else f"{kind!r} is no known kind"
        raise UserError(f"{show(final)} is missing: {made}")
    artifact = verify(final)
    if (artifact.kind, artifact.name) != (kind, name):
        raise UserError(f"{show(final)} was saved as {artifact.kind}/{artifact.name}; {_remedy(kind)}")
    return artifact


def verify(path: Path) -> Artifact:
    """Check an artefact directory wherever it lies: schema, manifest, and size and sha256 of every file."""
    path = Path(path)
    remedy = _remedy(path.parent.name)
    if path.is_symlink() or not path.is_dir():
        raise UserError(f"{show(path)} is not an artefact folder")
    with regular(path / "manifest.json", remedy, MAX_MANIFEST) as f:
        text = f.read()
    with _named(path / "manifest.json", remedy):
        manifest = _parse(text)
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            found = manifest.get("schema") if isinstance(manifest, dict) else None
            raise UserError(f"{show(path / 'manifest.json')}: schema {found!r} is not {SCHEMA!r}; "
                            f"it was written by another version: {remedy}")
        seal = manifest.pop("checksum", None)
        if seal != _digest(manifest) or manifest["id"] != _identity(manifest):
            raise UserError(f"{show(path / 'manifest.json')}: contents changed since it was written; {remedy}")
        for file, entry in manifest["files"].items():
            _check_name(file)
            if not 0 <= entry["bytes"] <= MAX_FILE:
                raise UserError(f"{show(path / file)}: {entry['bytes']} bytes are beyond reason; {remedy}")
            with regular(path / file, remedy) as f:
                size = os.fstat(f.fileno()).st_size
                digest = hashlib.file_digest(f, "sha256").hexdigest() if size == entry["bytes"] else ""
            _compare(path / file, size, digest, entry, remedy)
    return Artifact(path, manifest | {"checksum": seal})


# ---------------------------------------------------------------------------------------- states of a running training
def save_state(path: Path, tensors: Mapping[str, Tensor], meta: dict) -> Path:
    """Write a resumable state as one safetensors file with its own checksum, atomically. `meta` must be JSON-able;
    numbers that may be NaN belong into `tensors`."""
    path, tensors, meta = Path(path), _own(tensors), plain(meta)
    # one metadata key only: safetensors writes several in random order, and equal states must be equal bytes
    note = json.dumps({"meta": meta, "sha256": _state_digest(tensors, meta)}, sort_keys=True)
    with atomic_file(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"saferule": note})
    return path


def load_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors on the CPU, meta) of `save_state`. UserError if missing, not ours, truncated or changed."""
    path, remedy = Path(path), "delete it to start this part again"
    with regular(path, remedy) as f:
        data = f.read()
    with _named(path, remedy):
        tensors = safetensors.torch.load(data)
        header = _parse(data[8:8 + int.from_bytes(data[:8], "little")])
        note = _parse(header["__metadata__"]["saferule"])
        if note["sha256"] != _state_digest(tensors, note["meta"]):
            raise UserError(f"{show(path)}: contents changed since it was written; {remedy}")
    return tensors, note["meta"]


def _state_digest(tensors: Mapping[str, Tensor], meta: dict) -> str:
    h = hashlib.sha256(_canonical(meta))
    for name in sorted(tensors):
        h.update(_canonical([name, str(tensors[name].dtype), list(tensors[name].shape)]))
        h.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()


# ------------------------------------------------------------------------------------------------- one file, in and out
def _check_name(file: object) -> None:
    suffix = Path(str(file)).suffix.lower()
    if suffix in PICKLES:
        raise UserError(f"{file!r}: pickled files are refused; store tensors as .safetensors")
    if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", file) or file == "manifest.json":
        raise UserError(f"{file!r} is not a plain file name")
    if suffix not in (".safetensors", ".csv", ".json", *TEXT, *IMAGE):
        raise UserError(f"{file!r}: files of this type are not kept; use .safetensors, .csv, .json, .md or .png")


def _write(path: Path, content) -> dict:
    """Write one file in the format its suffix names, to the disk; its entry for the manifest."""
    match path.suffix:
        case ".safetensors":
            safetensors.torch.save_file(_own(content), path)
        case ".csv":
            content = content.reset_index() if any(n is not None for n in content.index.names) else content
            path.write_bytes(content.to_csv(index=False, lineterminator="\n", na_rep="").encode())   # floats by repr
        case ".json":
            text = json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False)
            path.write_bytes(text.encode() + b"\n")
        case _:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(path)
    with open(path, "rb") as f:
        return {"sha256": hashlib.file_digest(f, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies where needed: safetensors takes only contiguous tensors that share no storage."""
    out, seen = {}, set()
    for name, t in tensors.items():
        t = torch.as_tensor(t).detach().cpu().contiguous()
        storage = t.untyped_storage()
        out[name] = t.clone() if storage.data_ptr() in seen or storage.nbytes() != t.nbytes else t
        seen.add(storage.data_ptr())
    return out


def _compare(path: Path, size: int, digest: str, entry: dict, remedy: str) -> None:
    if size != entry["bytes"]:
        raise UserError(f"{show(path)}: contents changed since it was written (size not {entry['bytes']}); {remedy}")
    if digest != entry["sha256"]:
        raise UserError(f"{show(path)}: contents changed since it was written (sha256 {digest[:12]}…, not "
                        f"{entry['sha256'][:12]}…); {remedy}")


@contextmanager
def _named(path: Path, remedy: str) -> Iterator[None]:
    """Whatever a parser says about damaged content, say which file it was."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError) as e:
        reason = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
        raise UserError(f"{show(path)} cannot be read ({reason}); {remedy}") from e


def _remedy(kind: str) -> str:
    again = f"run notebooks/{NOTEBOOKS[kind]}.ipynb again" if kind in NOTEBOOKS else "make it again"
    return f"delete the folder and {again}"


# ------------------------------------------------------------------------------------------------------------- identity
def plain(x):
    """Dataclasses, tuples, NumPy and torch values as strict JSON (see `save` for NaN)."""
    if is_dataclass(x) and not isinstance(x, type):
        x = {f.name: getattr(x, f.name) for f in fields(x)}
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, np.ndarray | np.generic | Tensor):
        x = x.tolist()
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return "NaN" if math.isnan(x) else "Infinity" if x > 0 else "-Infinity"
    if isinstance(x, Path):
        return x.as_posix()
    if x is None or isinstance(x, bool | int | float | str):
        return x
    raise TypeError(f"{type(x).__name__} cannot be written as JSON")


def _canonical(x) -> bytes:
    return json.dumps(x, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(x) -> str:
    return hashlib.sha256(_canonical(x)).hexdigest()


def _identity(manifest: dict) -> str:
    return _digest({k: manifest[k] for k in ("schema", "kind", "name", "config", "replicas")}
                   | {"inputs": {k: v["id"] for k, v in manifest["inputs"].items()},
                      "files": {k: v["sha256"] for k, v in manifest["files"].items()}})


def _parse(text: bytes | str):
    def refuse(literal):
        raise ValueError(f"{literal} is not JSON")
    return json.loads(text, parse_constant=refuse)


@functools.cache
def code_version() -> dict:
    """Which code this process runs: the commit, if any, and a digest of the package's sources."""
    h = hashlib.sha256()
    package = Path(__file__).resolve().parent
    for source in sorted(package.rglob("*.py")):
        h.update(_canonical(source.relative_to(package).as_posix()) + source.read_bytes())
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--tags"], cwd=REPO, capture_output=True,
                             text=True, timeout=10)
        revision = git.stdout.strip() if git.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        revision = None
    return {"revision": revision, "sources": h.hexdigest()}


@functools.cache
def _libraries() -> dict:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def _device() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {os.cpu_count()} cores{gpu}"
