"""Artefacts come back exactly, are whole or absent whatever happens, and name what is wrong with them."""
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from saferule import artifacts, files
from saferule.artifacts import Artifact, load, load_state, plain, save, save_state, verify
from saferule.errors import UserError

FILES = {
    "pool.safetensors": {"x": torch.arange(6, dtype=torch.float32).view(2, 3), "flag": torch.tensor([True, False])},
    "episodes.csv": pd.DataFrame({"attack": ["none", "NA", "inject"], "ret": [0.1, math.nan, 1e-17], "seed": [0, 1, 2]}),
    "curve.json": {"a": [1, 2.5, None], "b": {"c": "d"}},
    "notes.md": "naïve\n",
    "plot.png": b"\x89PNG\r\n\x1a\n0000",
}


def write(root, name="BallRun", files=FILES, **kw) -> Artifact:
    return save("data", name, files, {"profile": "smoke", "seed": 3} | kw.pop("config", {}), root=root, **kw)


def names(root) -> list[str]:
    folder = Path(root) / "artifacts" / "data"
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------------------------------- comes back
def test_every_type_comes_back(tmp_path):
    write(tmp_path, seconds=1.5, replicas=[{"seed": 0}, {"seed": 1}])
    found = load("data", "BallRun", tmp_path)
    tensors = found.tensors("pool.safetensors")
    assert torch.equal(tensors["x"], FILES["pool.safetensors"]["x"]) and tensors["flag"].dtype == torch.bool
    assert_frame_equal(found.table("episodes.csv"), FILES["episodes.csv"])
    assert found.json("curve.json") == FILES["curve.json"]
    assert found.read("notes.md") == "naïve\n".encode() and found.read("plot.png") == FILES["plot.png"]
    assert (found.kind, found.name, found.config["seed"]) == ("data", "BallRun", 3)
    assert found.replicas == ({"seed": 0}, {"seed": 1})
    assert len(found.id) == 64 and found.short == found.id[:8]


def test_manifest_says_where_it_came_from(tmp_path):
    data = write(tmp_path, seconds=1.5)
    made = save("train", "BallRun-bcq_lag", {"a.json": 1}, {"lr": 1e-3}, {"data": data}, root=tmp_path)
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert manifest["inputs"] == {"data": {"kind": "data", "name": "BallRun", "id": data.id}}
    assert set(manifest["files"]["a.json"]) == {"sha256", "bytes"}
    assert {"schema", "id", "code", "libraries", "device", "python", "seconds", "created", "checksum"} <= set(manifest)
    assert "torch" in manifest["libraries"] and len(manifest["code"]["sources"]) == 64
    assert load("train", "BallRun-bcq_lag", tmp_path).manifest == made.manifest


def test_same_content_same_id_and_only_then(tmp_path):
    first = write(tmp_path / "a", seconds=1.0, device="cpu")
    assert write(tmp_path / "b", seconds=2.0, device="cuda").id == first.id
    assert write(tmp_path / "b", files=dict(reversed(FILES.items()))).id == first.id          # order is no content
    assert {p.name: p.read_bytes() for p in first.path.iterdir() if p.name != "manifest.json"} == \
           {p.name: p.read_bytes() for p in (tmp_path / "b/artifacts/data/BallRun").iterdir() if p.name != "manifest.json"}
    others = [write(tmp_path / "c", name="CarRun"), write(tmp_path / "c", config={"seed": 4}),
              write(tmp_path / "c", replicas=[{}]), write(tmp_path / "c", inputs={"x": first}),
              write(tmp_path / "c", files=FILES | {"notes.md": "naive\n"})]
    assert len({a.id for a in [first, *others]}) == 6


def test_config_may_be_a_dataclass_with_numpy_and_nan(tmp_path):
    @dataclass(frozen=True)
    class Config:
        hidden: tuple = (64, 64)
        lr: float = np.float64(1e-3)
        cap: float = math.inf
        where: Path = Path("a/b")
    made = save("data", "x", {}, Config(), root=tmp_path)
    text = (made.path / "manifest.json").read_text()
    json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert load("data", "x", tmp_path).config == {"hidden": [64, 64], "lr": 1e-3, "cap": "Infinity", "where": "a/b"}
    assert float(made.config["cap"]) == math.inf
    with pytest.raises(TypeError):
        save("data", "x", {}, {"f": print}, root=tmp_path)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers(-2**60, 2**60) | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)))
@settings(max_examples=60, deadline=None)
def test_plain_is_strict_json_and_settles(value):
    once = plain(value)
    assert json.loads(json.dumps(once, allow_nan=False)) == once == plain(once)


@given(st.lists(st.tuples(st.floats(allow_nan=True), st.integers(-2**53, 2**53)), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_csv_floats_come_back_bit_for_bit(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    table = pd.DataFrame(rows, columns=["a", "b"]).astype({"a": "float64", "b": "int64"})
    entry = artifacts._write(path, table)
    found = Artifact(path.parent, {"kind": "data", "files": {"x.csv": entry}}).table("x.csv")
    left, right = found["a"].to_numpy("float64"), table["a"].to_numpy()
    assert np.array_equal(left, right, equal_nan=True) and np.array_equal(np.signbit(left), np.signbit(right) & ~np.isnan(right))
    assert found["b"].tolist() == table["b"].tolist()


def test_named_index_becomes_columns(tmp_path):
    table = pd.DataFrame({"x": [1, 2]}, index=pd.Index(["a", "b"], name="method"))
    found = write(tmp_path, files={"t.csv": table}).table("t.csv")
    assert list(found.columns) == ["method", "x"]


def test_tensors_that_share_storage_or_are_views(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    given = {"a": base, "b": base, "row": base[1], "t": base.T, "zero": torch.zeros(()), "none": torch.zeros(0, 3)}
    found = write(tmp_path, files={"w.safetensors": given}).tensors("w.safetensors")
    assert all(torch.equal(found[k], v) for k, v in given.items())


# ------------------------------------------------------------------------------------------------ damage is named
def spoil(path: Path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", [*FILES, "manifest.json"])
def test_a_flipped_byte_is_named(tmp_path, file):
    made = write(tmp_path)
    if file == "manifest.json":                                      # part of the manifest that the id does not cover
        text = (made.path / file).read_text()
        (made.path / file).write_text(text.replace('"python": "3', '"python": "2'))
    else:
        spoil(made.path / file)
    with pytest.raises(UserError) as error:
        load("data", "BallRun", tmp_path)
    text = one_line(error)
    assert f"BallRun/{file}: contents changed since it was written" in text
    assert "delete the folder and run notebooks/01_data.ipynb again" in text


@given(st.integers(0, 2**31), st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_any_flipped_bit_anywhere_is_refused(tmp_path_factory, where, bit):
    made = write(tmp_path_factory.mktemp("flip"), files={"a.json": [1], "n.md": "x"})
    every = sorted(made.path.iterdir())
    position = where % sum(p.stat().st_size for p in every)
    for path in every:
        if position < path.stat().st_size:
            break
        position -= path.stat().st_size
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        verify(made.path)
    assert path.name in one_line(error)


def test_shorter_longer_and_missing_files(tmp_path):
    made = write(tmp_path)
    data = (made.path / "notes.md").read_bytes()
    for wrong in (data[:-1], data + b"x", b""):
        (made.path / "notes.md").write_bytes(wrong)
        with pytest.raises(UserError, match="notes.md: contents changed"):
            verify(made.path)
    (made.path / "notes.md").unlink()
    with pytest.raises(UserError, match="notes.md is missing; delete the folder"):
        verify(made.path)


def test_a_change_after_loading_is_seen_on_reading(tmp_path):
    found = write(tmp_path)
    spoil(found.path / "pool.safetensors")
    with pytest.raises(UserError, match="contents changed"):
        found.tensors("pool.safetensors")
    with pytest.raises(UserError, match="holds no 'other.csv'; it holds curve.json"):
        found.table("other.csv")


def forge(made: Artifact, **changes):
    """A manifest with valid id and checksum, as a malicious writer could make it."""
    manifest = json.loads((made.path / "manifest.json").read_text()) | changes
    manifest.pop("checksum")
    manifest["id"] = artifacts._identity(manifest)
    manifest["checksum"] = artifacts._digest(manifest)
    (made.path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("file", ["../secret.md", "/etc/passwd.md", "a/b.md", "..", ".hidden.md", "manifest.json", "", "a\nb.md"])
def test_forged_paths_are_refused(tmp_path, file):
    made = write(tmp_path)
    (made.path.parent / "secret.md").write_text("x")
    forge(made, files={file: {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(UserError, match="not a plain file name"):
        verify(made.path)
    with pytest.raises(UserError, match="not a plain file name"):
        write(tmp_path, files={file: "x"})


@pytest.mark.parametrize("size", [-1, 1 << 60, "many", None])
def test_forged_sizes_are_refused(tmp_path, size):
    made = write(tmp_path)
    forge(made, files={"notes.md": {"sha256": "0" * 64, "bytes": size}})
    with pytest.raises(UserError, match="beyond reason|cannot be read"):
        verify(made.path)


def test_unknown_schema_and_broken_manifests(tmp_path):
    made = write(tmp_path)
    forge(made, schema="saferule-artifact/99")
    with pytest.raises(UserError, match="schema 'saferule-artifact/99' is not"):
        verify(made.path)
    for text in ("", "{", "[]", "null", '{"schema": "saferule-artifact/1"}', "[" * 100_000, '{"a": NaN}', "\xff"):
        (made.path / "manifest.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match="manifest.json"):
            verify(made.path)
    with open(made.path / "manifest.json", "wb") as f:
        f.truncate(1 << 30)                                          # sparse: large without using the disk
    with pytest.raises(UserError, match="beyond reason"):
        verify(made.path)


def test_links_and_fifos_are_refused(tmp_path):
    made = write(tmp_path)
    shutil.move(made.path / "notes.md", tmp_path / "notes.md")
    (made.path / "notes.md").symlink_to(tmp_path / "notes.md")
    with pytest.raises(UserError, match="notes.md is a link, not a file"):
        load("data", "BallRun", tmp_path)
    (made.path / "notes.md").unlink()
    os.mkfifo(made.path / "notes.md")
    with pytest.raises(UserError, match="notes.md is not a plain file"):
        load("data", "BallRun", tmp_path)
    (made.path.parent / "CarRun").symlink_to(made.path)
    with pytest.raises(UserError, match="not an artefact folder"):
        load("data", "CarRun", tmp_path)


def test_a_copy_under_another_name_is_refused(tmp_path):
    shutil.copytree(write(tmp_path).path, tmp_path / "artifacts/data/CarRun")
    with pytest.raises(UserError, match="was saved as data/BallRun"):
        load("data", "CarRun", tmp_path)


@pytest.mark.parametrize("kind,notebook", artifacts.NOTEBOOKS.items())
def test_missing_names_the_notebook(tmp_path, kind, notebook):
    with pytest.raises(UserError) as error:
        load(kind, "BallRun", tmp_path)
    assert one_line(error).endswith(f"{kind}/BallRun is missing: run notebooks/{notebook}.ipynb first")


# --------------------------------------------------------------------------------------------- pickles, other refusals
class Bomb:
    def __reduce__(self):
        return (os.abort, ())


@pytest.mark.parametrize("suffix", files.PICKLES)
def test_pickles_are_refused_by_name(tmp_path, suffix):
    with pytest.raises(UserError, match="pickled files are refused"):
        write(tmp_path, files={"model" + suffix: b"x"})
    made = write(tmp_path)
    forge(made, files={"model" + suffix: {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(UserError, match="pickled files are refused"):
        verify(made.path)


@pytest.mark.parametrize("content", [*(pickle.dumps(Bomb(), p) for p in (2, 3, 4, 5)), b"PK\x03\x04torch", b"\x93NUMPY\x01\x00"])
def test_pickles_are_refused_by_content_and_never_opened(tmp_path, content):
    made = write(tmp_path)
    (made.path / "pool.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is a pickled file: refused"):
        load("data", "BallRun", tmp_path)
    (tmp_path / "state.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is a pickled file: refused"):
        load_state(tmp_path / "state.safetensors")


def test_safetensors_whose_length_looks_like_a_pickle(tmp_path):
    """A header of 640 bytes makes the file begin with 80 02, as a pickle of protocol 2 does."""
    for pad in range(400, 640):
        save_state(tmp_path / "s.safetensors", {"x": torch.ones(1)}, {"pad": "x" * pad})
        if (tmp_path / "s.safetensors").read_bytes()[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("no such header was made")
    assert load_state(tmp_path / "s.safetensors")[1]["pad"] == "x" * pad


@pytest.mark.parametrize("kind,name", [("data", "../x"), ("data", ""), ("..", "x"), ("data", "a/b"), ("data", ".x"),
                                       ("data", "a b")])
def test_bad_names(tmp_path, kind, name):
    with pytest.raises(UserError, match="cannot be part of an artefact's name"):
        save(kind, name, {}, {}, root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_file_types(tmp_path):
    with pytest.raises(UserError, match="files of this type are not kept"):
        write(tmp_path, files={"x.exe": b""})


def test_unwritable_folder_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        write(tmp_path / "file")
    assert "cannot write" in one_line(error) and "SAFERULE_RESULTS" in one_line(error)
    with pytest.raises(UserError, match="cannot write"):
        save_state(tmp_path / "file" / "s.safetensors", {}, {})

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(artifacts, "sync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path)
    assert names(tmp_path) == []


# ------------------------------------------------------------------------------------------------ whole or absent
def test_failing_save_keeps_the_old_version(tmp_path):
    first = write(tmp_path)
    with pytest.raises(TypeError):
        write(tmp_path, files=FILES | {"z.json": print})
    assert names(tmp_path) == ["BallRun"] and load("data", "BallRun", tmp_path).id == first.id


def test_failing_rename_puts_the_old_version_back(tmp_path, monkeypatch):
    first, real = write(tmp_path), os.rename

    def failing(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        real(source, target)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(UserError, match="Input/output error"):
        write(tmp_path, files={})
    assert names(tmp_path) == ["BallRun"] and load("data", "BallRun", tmp_path).id == first.id


def test_replacing_leaves_no_file_of_the_old_version(tmp_path):
    write(tmp_path)
    write(tmp_path, files={"notes.md": "new"})
    assert sorted(p.name for p in (tmp_path / "artifacts/data/BallRun").iterdir()) == ["manifest.json", "notes.md"]
    assert names(tmp_path) == ["BallRun"]


def killed(action):
    """Run in a child that dies by SIGKILL inside."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("function,count", [("sync", 1), ("sync", 4), ("sync", 7), ("rename", 1), ("rename", 2), ("rmtree", 1)])
def test_killed_at_any_point(tmp_path, monkeypatch, function, count, before):
    """Old version or new version, never a mixture; and the next save tidies up."""
    old = write(tmp_path)
    new = write(tmp_path / "other", files=FILES | {"notes.md": "new"})

    def action():
        calls = 0
        module = {"sync": files, "rename": os, "rmtree": shutil}[function]
        real = getattr(module, function)

        def dying(*args, **kw):
            nonlocal calls
            calls += 1
            if calls == count and before:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args, **kw)
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
        monkeypatch.setattr(module, function, dying)
        monkeypatch.setattr(artifacts, "sync", files.sync)
        write(tmp_path, files=FILES | {"notes.md": "new"})

    killed(action)
    found = load("data", "BallRun", tmp_path)
    assert found.id in (old.id, new.id)
    assert write(tmp_path).id == old.id
    assert names(tmp_path) == ["BallRun"]


def test_the_work_of_a_living_writer_is_left_alone(tmp_path):
    with files.replacing(tmp_path / "artifacts/data/BallRun") as folder:
        (folder / "x").write_text("in progress")
        write(tmp_path)                                                # another process saves the same name meanwhile
        assert (folder / "x").exists()
    assert names(tmp_path) == ["BallRun"] and (tmp_path / "artifacts/data/BallRun/x").exists()


def test_concurrent_saves_end_with_one_whole_artefact(tmp_path):
    children = []
    for i in range(4):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for j in range(15):
                    write(tmp_path, files={"n.md": f"{i} {j}"})
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    for _ in range(40):
        try:
            assert load("data", "BallRun", tmp_path).kind == "data"
        except UserError as e:                                         # replaced between two files: never half-written
            assert "missing" in str(e) or "changed" in str(e)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    load("data", "BallRun", tmp_path)
    write(tmp_path)
    assert names(tmp_path) == ["BallRun"]


# ------------------------------------------------------------------------------------------------------------ states
def test_state_comes_back_and_equal_states_are_equal_bytes(tmp_path):
    tensors = {"w": torch.randn(3, 4), "half": torch.ones(3, dtype=torch.bfloat16), "rng": torch.get_rng_state(),
               "n": torch.tensor(7), "empty": torch.zeros(0, 2), "nan": torch.tensor([math.nan])}
    meta = {"t": 12, "nested": {"a": [1, 0.1]}}
    path = save_state(tmp_path / "deep" / "state.safetensors", tensors, meta)
    found, note = load_state(path)
    assert note == meta and set(found) == set(tensors)
    assert all(found[k].dtype == v.dtype and torch.equal(found[k].nan_to_num(), v.nan_to_num()) for k, v in tensors.items())
    again = save_state(tmp_path / "again.safetensors", dict(reversed(tensors.items())), meta)
    assert path.read_bytes() == again.read_bytes()


@given(st.integers(0, 2**31), st.integers(0, 7), st.booleans())
@settings(max_examples=60, deadline=None)
def test_damaged_states_are_refused(tmp_path_factory, where, bit, cut):
    path = save_state(tmp_path_factory.mktemp("state") / "s.safetensors", {"x": torch.arange(4.0)}, {"t": 1})
    data = bytearray(path.read_bytes())
    where %= len(data)
    if cut:
        data = data[:where]
    else:
        data[where] ^= 1 << bit
    path.write_bytes(data)
    try:
        tensors, meta = load_state(path)
    except UserError as e:
        assert "s.safetensors" in str(e) and "\n" not in str(e)
    else:                                                  # white space of the header may change without any meaning
        assert not cut and torch.equal(tensors["x"], torch.arange(4.0)) and meta == {"t": 1}


def test_missing_foreign_and_interrupted_states(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        load_state(tmp_path / "s.safetensors")
    from safetensors.torch import save_file
    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        load_state(tmp_path / "foreign.safetensors")
    path = save_state(tmp_path / "s.safetensors", {"x": torch.ones(1)}, {"t": 1})
    with pytest.raises(RuntimeError), files.atomic_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    killed(lambda: dying_write(path))
    assert load_state(path)[1] == {"t": 1}
    save_state(path, {"x": torch.ones(1)}, {"t": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign.safetensors", "s.safetensors"]


def dying_write(path):
    with files.atomic_file(path) as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------------ places
def test_results_dir_does_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("SAFERULE_RESULTS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert artifacts.run_dir("quick") == Path(__file__).resolve().parents[1] / "results" / "runs" / "quick"
    monkeypatch.setenv("SAFERULE_RESULTS", str(tmp_path / "elsewhere"))
    assert artifacts.results_dir() == tmp_path / "elsewhere"
    assert save("data", "x", {}, {"profile": "smoke"}).path == tmp_path / "elsewhere/runs/smoke/artifacts/data/x"


def test_places_need_no_torch():
    code = "import sys, saferule.files; saferule.files.run_dir('quick'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_id_of_digits_stays_an_id(tmp_path):
    """A short hash may look like a number; read as one it would match no artefact any more."""
    ids = ["01234567", "123e4567", "12345678"]
    made = save("evaluate", "x", {"runs.csv": pd.DataFrame({"artefact": ids, "steps": [1, 2, 3]})}, {}, root=tmp_path)
    table = made.table("runs.csv")
    assert table.artefact.tolist() == ids and table.steps.tolist() == [1, 2, 3]
    assert save("evaluate", "y", {"a.csv": pd.DataFrame({"b": [1]})}, {}, root=tmp_path).table("a.csv").b.tolist() == [1]
