"""Files that are whole or absent on writing, and plain, not too large and no pickles on reading.

Used by artifacts.py and hdf5.py. Writers work on a hidden sibling and rename it; the sibling is locked while its writer
lives, so that leftovers of killed processes are told from the work of running ones and removed by the next writer.
"""
from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from saferule.errors import UserError
from saferule.sources import REPO
from saferule.sources import relative as show

PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".npy", ".npz", ".joblib", ".ckpt")
MAX_FILE = 64 << 30                                       # bytes; more than this is damage or malice


# --------------------------------------------------------------------------------------------------------------- places
def results_dir() -> Path:
    """$SAFERULE_RESULTS, or `results/` of the repository (found from this file, so any working directory will do)."""
    if os.environ.get("SAFERULE_RESULTS"):
        return Path(os.environ["SAFERULE_RESULTS"]).expanduser().resolve()
    return (REPO if (REPO / "pyproject.toml").exists() else Path.cwd()) / "results"


def run_dir(profile: str) -> Path:
    """The folder of everything made under a profile."""
    return results_dir() / "runs" / profile


# -------------------------------------------------------------------------------------------------------------- writing
@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write to the path given inside the `with`; it becomes `path` at the end, or vanishes if anything goes wrong.

    Leftovers of killed writers of the same file are removed. UserError if the folder cannot be written.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        with ExitStack() as stack:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.parent, wait=True):          # no other writer may take the new file for a leftover
                for stale in _leftovers(path, "tmp"):
                    stale.unlink()
                temporary.touch()
                stack.enter_context(locked(temporary))
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    except OSError as e:
        raise UserError(f"cannot write {show(path)}: {e.strerror or e}") from e
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """A fresh hidden sibling folder of `final` that takes its place at the end of the `with`."""
    token = secrets.token_hex(8)
    folder, old = (final.parent / f".{final.name}.{token}.{end}" for end in ("tmp", "old"))
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:
            with locked(final.parent, wait=True):
                _put_back(final)
                for stale in _leftovers(final, "tmp") + _leftovers(final, "old"):
                    shutil.rmtree(stale, ignore_errors=True)
                folder.mkdir()
                stack.enter_context(locked(folder))
            yield folder
            sync(folder)
            with locked(final.parent, wait=True):
                if os.path.lexists(final):
                    os.rename(final, old)
                try:
                    os.rename(folder, final)
                finally:
                    _put_back(final)                      # only if the line above failed
                sync(final.parent)
    finally:
        for rest in (folder, old):
            if rest.is_dir() and not rest.is_symlink():
                shutil.rmtree(rest, ignore_errors=True)
            elif os.path.lexists(rest):                   # a link or a file that stood where the artefact belongs
                rest.unlink()


def restore(final: Path) -> None:
    """If a killed writer took `final` away and could not put the new one there: bring the old one back."""
    if final.parent.is_dir():
        with locked(final.parent, wait=True):
            _put_back(final)


def _put_back(final: Path) -> None:
    if not os.path.lexists(final):
        for old in _leftovers(final, "old")[:1]:
            os.rename(old, final)


def _leftovers(final: Path, end: str) -> list[Path]:
    """Hidden siblings of `final` that no living process holds."""
    pattern = re.compile(rf"\.{re.escape(final.name)}\.[0-9a-f]{{16}}\.{end}")
    return [p for p in sorted(final.parent.glob(".*")) if pattern.fullmatch(p.name) and not _held(p)]


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock on a file or folder; the system releases it when the process dies. BlockingIOError if taken."""
    fd = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:                                   # a file system without locks: go on without
            pass
        yield
    finally:
        os.close(fd)


def _held(path: Path) -> bool:
    try:
        with locked(path):
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -------------------------------------------------------------------------------------------------------------- reading
@contextmanager
def regular(path: Path, remedy: str, limit: int = MAX_FILE, archive: bool = False) -> Iterator:
    """Open a plain, not too large file that is no pickle, without following a link.

    archive: torch's files are let through, for torchfile.py, which reads them without unpickling.
    """
    if not archive:
        refuse_pickle_name(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)    # O_NONBLOCK: a FIFO must not hang us
    except FileNotFoundError:
        raise UserError(f"{show(path)} is missing; {remedy}") from None
    except OSError as e:
        why = "is a link, not a file" if e.errno == errno.ELOOP else f"cannot be read: {e.strerror}"
        raise UserError(f"{show(path)} {why}; {remedy}") from e
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):                  # before open(), which does not take a folder
        os.close(fd)
        raise UserError(f"{show(path)} is not a plain file; {remedy}")
    with open(fd, "rb") as f:
        if status.st_size > limit:
            raise UserError(f"{show(path)}: {status.st_size} bytes are beyond reason; {remedy}")
        head = f.read(16)
        if is_pickle(head) and not archive:
            raise UserError(f"{show(path)} is a pickled file: refused, it could run code; {remedy}")
        f.seek(0)
        yield f


def refuse_pickle_name(path: Path) -> None:
    if Path(path).suffix.lower() in PICKLES:
        raise UserError(f"{show(path)}: pickled files are refused, they could run code; "
                        "convert it to safetensors or HDF5 where it was made")


def is_pickle(head: bytes) -> bool:
    """Do these first 16 bytes open a pickle, a torch or NumPy archive (zip) or an .npy file?"""
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000:
        return False                                      # a safetensors header of 640 bytes also begins with 80 02
    return (head[:1] == b"\x80" and head[1:2] in (b"\x01", b"\x02", b"\x03", b"\x04", b"\x05")
            or head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY")))
