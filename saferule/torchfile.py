"""Files of torch.save, read without unpickling: tensors only.

torch.save writes a zip without compression: <name>/data.pkl, a pickle in which every tensor is a call of _rebuild_tensor_v2 on
a numbered storage; <name>/data/<number>, the storages' bytes; <name>/byteorder. The pickle's instructions are interpreted here,
by the few rules below, and yield nothing but numbers, texts, lists, dictionaries and descriptions of tensors. No unpickler
runs, nothing is imported or called, and no byte of a tensor is read before its description has been checked against the file.
"""
from __future__ import annotations

import hashlib
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from saferule.errors import UserError
from saferule.files import regular, show

MAX_BYTES = 1 << 30                                       # of the file
MAX_PICKLE, MAX_DIRECTORY = 2 << 20, 2 << 20              # of its pickle, of its table of contents
MAX_DIMS = 8
DICT, REBUILD = "collections.OrderedDict", "torch._utils._rebuild_tensor_v2"
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64,
    "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool}.items()}
RESAVE = "python -c \"import torch; torch.save(torch.load('{0}', map_location='cpu', weights_only=True), '{0}')\""


class Global(NamedTuple):
    """A name in the pickle; it stays a name."""
    name: str


class Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    count: int


class Described(NamedTuple):
    """A tensor: `shape` numbers of a storage from `offset` on, in rows."""
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


# -------------------------------------------------------------------------------------------------------------- the file
def read_torch(path: Path, key: str) -> tuple[dict[str, Tensor], list[str], str]:
    """The tensors [name] under `key` of a file of torch.save, as CPU tensors; the names of its other keys; its sha256.

    Raises UserError for everything that is not exactly that: other objects, by name; other formats, compression, damage, links,
    sizes beyond the file's own, tensors that are no plain rows, NaN and infinity.
    """
    where = show(path)
    with regular(path, "copy it here whole", MAX_BYTES, archive=True) as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        with _damage(where):
            with _archive(f, path, where) as archive:
                entries = _entries(archive, where)
                content = _interpret(archive.read(entries["data.pkl"]), where)
                if not isinstance(content, dict) or not isinstance(content.get(key), dict):
                    held = ", ".join(f"{k!a:.40}" for k in list(content)[:5]) if isinstance(content, dict) else "something else"
                    raise UserError(f"{where}: has no dictionary '{key}'; it holds {held or 'nothing'}. Save "
                                    f"{{'{key}': model.state_dict()}}, as OSRL does.")
                tensors = dict(_tensors(content[key], archive, entries, os.fstat(f.fileno()).st_size, where))
    return tensors, [_clean(k) for k in content if k != key], digest


def _archive(f: BinaryIO, path: Path, where: str) -> zipfile.ZipFile:
    """The zip, once its table of contents has been found to be of sensible size."""
    f.seek(0)
    head, size = f.read(4), os.fstat(f.fileno()).st_size
    if head[:1] == b"\x80":
        raise UserError(f"{where}: is in torch's format from before version 1.6, one bare pickle; refused. Save it again where it "
                        f"was made: {RESAVE.format(path.name)}")
    f.seek(max(size - 98, 0))
    tail = f.read()
    if head != b"PK\x03\x04" or len(tail) < 98 or tail[-22:-18] != b"PK\x05\x06":
        raise UserError(f"{where}: is not a file of torch.save, or it is truncated; copy it here again.")
    sizes = [struct.unpack("<L", tail[-10:-6])[0]]
    if tail[-42:-38] == b"PK\x06\x07":                    # a second, 64-bit trailer stands before it
        sizes.append(struct.unpack("<Q", tail[-58:-50])[0])
    if max(sizes) > MAX_DIRECTORY or len(set(sizes)) > 1:
        raise UserError(f"{where}: its table of contents has {max(sizes):,} bytes, beyond reason; refused.")
    return zipfile.ZipFile(f)


def _entries(archive: zipfile.ZipFile, where: str) -> dict[str, zipfile.ZipInfo]:
    """The entries by their name below the archive's one folder; stored as they are, so that none can be a bomb."""
    out, infos = {}, archive.infolist()
    for info in infos:
        name = info.filename.partition("/")[2]
        if name in out:
            raise UserError(f"{where}: holds {info.filename!a:.80} twice; refused.")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise UserError(f"{where}: {info.filename!a:.80} is compressed or encrypted, which torch.save never does; refused.")
        out[name] = info
    if "data.pkl" not in out or len({i.filename.partition("/")[0] for i in infos}) > 1:
        raise UserError(f"{where}: is a zip archive, but none of torch.save; name the model.pt that OSRL wrote.")
    if out["data.pkl"].file_size > MAX_PICKLE:
        raise UserError(f"{where}: its pickle has {out['data.pkl'].file_size:,} bytes, beyond reason; refused.")
    if "byteorder" in out and (out["byteorder"].file_size > 16 or archive.read(out["byteorder"]) != b"little"):
        raise UserError(f"{where}: was saved on a big-endian machine; save it again on another.")
    return out


def _tensors(state: dict, archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], left: int,
             where: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, its description checked before its bytes are read; together they have no more bytes than the file, `left`."""
    for name, found in state.items():
        if not isinstance(name, str) or not isinstance(found, Described):
            raise UserError(f"{where}: {name!a:.80} is not a tensor; refused.")
        storage, entry, count = found.storage, entries.get(f"data/{found.storage.key}"), math.prod(found.shape)
        itemsize = storage.dtype.itemsize
        rows = tuple(math.prod(found.shape[i + 1:]) for i in range(len(found.shape)))
        if count < 1 or found.offset + count > storage.count:
            raise UserError(f"{where}: '{_clean(name)}' claims shape {_shape(found.shape)}, but has {storage.count:,} numbers; "
                            "refused.")
        if any(s != r for n, s, r in zip(found.shape, found.stride, rows, strict=True) if n > 1):
            raise UserError(f"{where}: '{_clean(name)}' is stored with strides {_shape(found.stride)}; save it as .contiguous().")
        if entry is None or entry.file_size != storage.count * itemsize:
            raise UserError(f"{where}: '{_clean(name)}' needs {storage.count * itemsize:,} bytes but the file holds "
                            f"{entry.file_size if entry else 0:,}; copy it here again.")
        left -= count * itemsize
        if left < 0:
            raise UserError(f"{where}: its tensors claim more bytes than the file has; refused.")
        with archive.open(entry) as f:
            f.seek(found.offset * itemsize)
            data = bytearray(f.read(count * itemsize))
        if storage.dtype == torch.bool and max(data) > 1:
            raise UserError(f"{where}: '{_clean(name)}' is of type bool but holds other bytes than 0 and 1; refused.")
        value = torch.frombuffer(data, dtype=storage.dtype).view(found.shape)
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{where}: '{_clean(name)}' holds NaN or infinity; its training has diverged, it cannot be used.")
        yield name, value


@contextmanager
def _damage(where: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (zipfile.BadZipFile, ValueError, KeyError, IndexError, TypeError, EOFError, OSError, OverflowError, RuntimeError,
            NotImplementedError, MemoryError, struct.error) as e:
        reason = ascii(" ".join(str(e).split())[:120])[1:-1] or type(e).__name__
        raise UserError(f"{where}: is damaged or no file of torch.save ({reason}); copy it here again.") from e


# ------------------------------------------------------------------------------------------------------------ the pickle
def _interpret(code: bytes, where: str) -> Any:
    """What a pickle describes; every name in it that is not a tensor's is refused, and so is every other instruction."""
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def until_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, marks.pop()
        return items

    def last(n: int) -> list[Any]:
        if len(stack) < n:
            raise ValueError("the pickle takes more than it has put")
        items = stack[-n:]
        del stack[-n:]
        return items

    def put(pairs: list[Any]) -> None:
        if type(stack[-1]) is not dict or len(pairs) % 2 or any(type(k) not in (str, int) for k in pairs[::2]):
            raise UserError(f"{where}: holds a dictionary whose keys are neither texts nor numbers; refused.")
        stack[-1].update(zip(pairs[::2], pairs[1::2]))

    for op, arg, _ in pickletools.genops(code):
        match op.name:
            case "PROTO":                                  # torch.save writes 2
                if not 2 <= arg <= 5:
                    raise UserError(f"{where}: its pickle has protocol {arg}; save it again with torch.save's own settings.")
            case "FRAME":
                pass
            case "STOP":
                if marks or len(stack) != 1:
                    raise ValueError("the pickle ends in the middle")
                return stack[0]
            case "MARK":
                marks.append(stack)
                stack = []
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                items = until_mark()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = last(int(op.name[-1]))
                stack.append(tuple(items))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(arg)
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "APPEND" | "APPENDS":
                items = until_mark() if op.name == "APPENDS" else last(1)
                if type(stack[-1]) is not list:
                    raise ValueError("append to what is no list")
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                pairs = until_mark() if op.name == "SETITEMS" else last(2)
                put(pairs)
            case "GLOBAL" | "INST" | "STACK_GLOBAL":
                parts = arg.split(" ", 1) if arg else last(2)
                if any(type(part) is not str for part in parts):
                    raise ValueError("a name that is no text")
                name = ".".join(parts)
                if name not in (DICT, REBUILD, *STORAGES) or op.name == "INST":
                    raise UserError(f"{where}: holds '{_clean(name)}', which is not tensor data; refused.")
                stack.append(Global(name))
            case "BINPERSID":
                stack.extend(_storage(reference, where) for reference in last(1))
            case "REDUCE":
                function, args = last(2)
                stack.append(_called(function, args, where))
            case "BUILD":                                  # attributes of a state dictionary: its modules' versions
                last(1)
                if type(stack[-1]) is not dict:
                    raise UserError(f"{where}: sets attributes of something that is no dictionary; refused.")
            case _:
                raise UserError(f"{where}: its pickle uses the instruction {op.name}, which tensors never need; refused.")
    raise ValueError("the pickle has no end")


def _storage(reference: Any, where: str) -> Storage:
    match reference:
        case ("storage", Global(kind), str(key), str(), int(count)) if kind in STORAGES and key.isdecimal() and count >= 0:
            return Storage(STORAGES[kind], key, count)
    raise UserError(f"{where}: holds a reference that is not to a tensor's numbers; refused.")


def _called(function: Any, args: Any, where: str) -> Any:
    """The two calls that tensors need, as descriptions."""
    whole = lambda xs: type(xs) is tuple and len(xs) <= MAX_DIMS and all(type(x) is int and x >= 0 for x in xs)
    match function, args if type(args) is tuple else None:
        case Global(name), () if name == DICT:
            return {}
        case Global(name), (Storage() as storage, int(offset), shape, stride, *_) if name == REBUILD and whole((offset,)):
            if whole(shape) and whole(stride) and len(shape) == len(stride):
                return Described(storage, offset, shape, stride)
    name = f"'{_clean(function.name)}'" if isinstance(function, Global) else "something"
    raise UserError(f"{where}: calls {name} with other arguments than a tensor's; refused.")


def _clean(name: str) -> str:
    """A stranger's name, safe to print on one line."""
    return ascii(str(name)[:80])[1:-1]


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(f"{n:,}" for n in shape) + "]"
