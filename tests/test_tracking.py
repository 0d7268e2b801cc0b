"""The record that is always there, and wandb beside it: offline, inside the run folder, and never in the way."""
import json
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from saferule.config import FinetuneConfig
from saferule.errors import UserError
from saferule.tracking import Run, environment, read, scalars


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("WANDB") or name == "SAFERULE_GROUP":
            monkeypatch.delenv(name)


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


def artefact(folder, kind="train", name="BallRun-bcq_lag", inputs=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.bin").write_bytes(b"weights")
    return SimpleNamespace(path=folder, manifest={"inputs": inputs or {}}, id="ab" * 32, short="abababab", kind=kind, name=name,
                           config={"steps": 7}, replicas=())


def records(path):
    """The messages of an offline .wandb file: a 7-byte header, then 32 KiB blocks of (crc, length, type, data) pieces."""
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:                       # no piece starts in a block's last bytes
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at:at + 7])
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):                               # full, or the last piece
            yield Record.FromString(whole)
            whole = b""


def test_the_record_holds_what_was_logged(tmp_path, quiet):
    with Run("smoke", "train-BallRun-bcq_lag", FinetuneConfig(steps=7), tmp_path, group="g") as run:
        run.log({"critic": torch.tensor([0.5, float("nan")], requires_grad=True), "lam": 1.5}, step=1)
        run.log({"lam": np.float32(2)}, step=2)
        run.table("T1", pd.DataFrame({"method": ["saferule"], "cost": [np.float64("inf")]}))
        run.artifact(artefact(tmp_path / "a", inputs={"data": {"id": "cd"}}))
    start, first, second, table, made, finish = read(tmp_path, "train-BallRun-bcq_lag")
    assert start == {"type": "start", "profile": "smoke", "job": "train-BallRun-bcq_lag", "group": "g", "config": {"steps": 7}}
    assert first == {"type": "scalars", "step": 1, "values": {"critic": [0.5, "NaN"], "lam": 1.5}}
    assert second["values"] == {"lam": 2.0}
    assert table == {"type": "table", "name": "T1", "columns": ["method", "cost"], "rows": [["saferule", "Infinity"]]}
    assert made == {"type": "artifact", "role": "output", "kind": "train", "name": "BallRun-bcq_lag", "id": "ab" * 32,
                    "inputs": {"data": {"id": "cd"}}}
    assert finish == {"type": "finish", "status": "finished"}
    assert "wandb" not in {p.name for p in tmp_path.iterdir()}       # disabled means disabled


def test_scalars_come_back_tidy(tmp_path, quiet):
    with Run("smoke", "job", {}, tmp_path) as run:
        run.log({"critic": [0.5, float("nan")], "lam": 1.5}, step=10)
    frame = scalars(tmp_path, "job")
    assert list(frame.columns) == ["step", "name", "replica", "value"]
    assert frame.fillna(-9).to_numpy().tolist() == [[10, "critic", 0, 0.5], [10, "critic", 1, -9], [10, "lam", -1, 1.5]]
    labelled = scalars(tmp_path, "job", pd.DataFrame({"method": ["clean", "poisoned"], "seed": [0, 0]}))
    assert labelled[["name", "method"]].to_numpy().tolist() == [["critic", "clean"], ["critic", "poisoned"]]


def test_a_rerun_replaces_the_record_at_its_end_only(tmp_path, quiet):
    for value in (1.0, 2.0):
        with Run("smoke", "job", {}, tmp_path) as run:
            run.log({"x": value}, step=0)
            if value == 2.0:                             # the old record stands, the new one can be followed
                assert read(tmp_path, "job")[1]["values"] == {"x": 1.0}
                partial = (tmp_path / "tracking" / ".job.jsonl.partial").read_text().splitlines()
                assert json.loads(partial[-1])["values"] == {"x": 2.0}
    assert [item["values"] for item in read(tmp_path, "job") if item["type"] == "scalars"] == [{"x": 2.0}]
    assert [p.name for p in (tmp_path / "tracking").iterdir()] == ["job.jsonl"]


def test_an_exception_is_recorded_and_passed_on(tmp_path, quiet):
    with pytest.raises(ZeroDivisionError):
        with Run("smoke", "job", {}, tmp_path):
            raise ZeroDivisionError("division by zero")
    assert read(tmp_path, "job")[-1] == {"type": "finish", "status": "failed", "error": "ZeroDivisionError: division by zero"}


def test_group(tmp_path, quiet, monkeypatch):
    groups = [Run("smoke", "a", {}, tmp_path / "x").group, Run("smoke", "b", {}, tmp_path / "x").group,
              Run("smoke", "a", {}, tmp_path / "y").group]
    assert groups[0] == groups[1] != groups[2] and groups[0].startswith("smoke-")
    monkeypatch.setenv("SAFERULE_GROUP", "tuesday")
    assert Run("smoke", "a", {}, tmp_path).group == "tuesday"
    assert Run("smoke", "a", {}, tmp_path, group="mine").group == "mine"


def test_bad_input_is_one_line(tmp_path, quiet):
    with pytest.raises(UserError, match="job name 'a/b'"):
        Run("smoke", "a/b", {}, tmp_path)
    with pytest.raises(UserError, match="no such record"):
        read(tmp_path, "job")
    with pytest.raises(UserError, match="not open"):
        Run("smoke", "job", {}, tmp_path).log({"x": 1})
    with Run("smoke", "job", {}, tmp_path, replicas=["clean/0"]) as run:
        with pytest.raises(UserError, match="2 values per name but has 1 replicas"):
            run.log({"x": [1.0, 2.0]})
        with pytest.raises(UserError, match="role 'sideways'"):
            run.artifact(None, role="sideways")
    (tmp_path / "tracking" / "job.jsonl").write_text('{"type": "start"}\n{"type":')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read(tmp_path, "job")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        with Run("smoke", "job", {}, tmp_path / "file"):
            pass


def test_defaults_are_offline_inside_the_folder_and_the_user_wins(tmp_path, monkeypatch):
    env = environment(tmp_path)
    assert env["WANDB_MODE"] == "offline" and env["WANDB_SILENT"] == "true" and env["WANDB_ERROR_REPORTING"] == "false"
    assert all(env[k].startswith(str(tmp_path)) for k in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    env = environment(tmp_path)
    assert (env["WANDB_MODE"], env["WANDB_PROJECT"]) == ("online", "mine") and "WANDB_SILENT" not in env


@pytest.mark.parametrize("when", ["missing", "start", "later"])
def test_a_broken_wandb_costs_one_line(tmp_path, monkeypatch, capsys, when):
    def broken(*args, **kwargs):
        raise RuntimeError("service died\nwith a long story")
    mute = SimpleNamespace(define_metric=lambda *a, **k: None, log=broken)
    module = None if when == "missing" else SimpleNamespace(init=broken if when == "start" else lambda **k: mute)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with Run("smoke", "job", {}, tmp_path) as run:
        run.log({"x": 1.0}, step=0)
        run.log({"x": 2.0}, step=1)
        run.table("t", pd.DataFrame({"a": [1]}))
        run.artifact(artefact(tmp_path / "a"), "input")
    assert len(read(tmp_path, "job")) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("saferule: wandb is off for job (") and "long story" not in line


SCRIPT = """
import sys
from pathlib import Path
from types import SimpleNamespace
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from saferule.tracking import Run
root = Path(sys.argv[1])
made = SimpleNamespace(path=root / "a", manifest={"inputs": {"data": {"id": "cd"}}}, id="ab" * 32, short="abababab", kind="train",
                       name="BallRun", config={"steps": 7}, replicas=())
for job in ("train-1", "train-2"):
    with Run("smoke", job, {"steps": 7}, root, group="g", replicas=["clean/0", "inject/poisoned/0"]) as run:
        run.artifact(made, "input")
        for step in (400, 0):
            run.log({"critic": [0.5, float("nan")], "lam": 1.25}, step=step)
        run.table("T1", pd.DataFrame({"method": ["saferule"], "cost": [1.0]}))
        run.figure("F1", plt.figure(figsize=(1, 1)))
        run.artifact(made)
"""


def test_offline_wandb_holds_what_was_logged_and_stays_in_its_folder(tmp_path):
    """In a process of its own: two runs, no network from Python (any address but the local one is refused), HOME untouched."""
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(
        "import socket\nreal = socket.socket.connect\n"
        "def connect(self, address):\n"
        "    if self.family != socket.AF_UNIX and address[0] not in ('127.0.0.1', '::1', 'localhost'):\n"
        "        open(__file__ + '.called', 'a').write(str(address))\n"
        "        raise OSError('network is off')\n"
        "    return real(self, address)\n"
        "socket.socket.connect = connect\n")
    root, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    artefact(root / "a")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "MPL"))}
    env |= {"HOME": str(home), "PYTHONPATH": str(guard), "MPLCONFIGDIR": str(tmp_path / "mpl")}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(root)], env=env, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (guard / "sitecustomize.py.called").exists()
    assert list(home.rglob("*")) == []
    files = sorted((root / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    for file in files:
        items = list(records(file))
        (run,) = [r.run for r in items if r.WhichOneof("record_type") == "run"]
        assert (run.project, run.run_group, run.job_type) == ("saferule", "g", "train")
        config = {c.key: json.loads(c.value_json) for c in run.config.update}
        assert config["steps"] == 7 and config["profile"] == "smoke"
        changed = {c.key: json.loads(c.value_json) for r in items if r.WhichOneof("record_type") == "config"
                   for c in r.config.update}
        assert changed["inputs"] == {"train-BallRun": "ab" * 32}
        history = [{i.key or "/".join(i.nested_key): i.value_json for i in r.history.item} for r in items
                   if r.WhichOneof("record_type") == "history"]
        logged = [line for line in history if "lam" in line]
        assert [json.loads(line["step"]) for line in logged] == [400, 0]         # a step that goes back is kept
        assert json.loads(logged[0]["lam"]) == 1.25 and json.loads(logged[0]["critic/clean/0"]) == 0.5
        assert "critic/inject/poisoned/0" in logged[0]
        assert ["table-file"] == [json.loads(line["T1/_type"]) for line in history if "T1/_type" in line]
        assert ["image-file"] == [json.loads(line["F1/_type"]) for line in history if "F1/_type" in line]
        sent = [r.request.log_artifact.artifact if r.WhichOneof("record_type") == "request" else r.artifact for r in items
                if r.WhichOneof("record_type") in ("request", "artifact")]
        mine = [a for a in sent if a.name == "train-BallRun"]
        assert mine and json.loads(mine[0].metadata)["id"] == "ab" * 32
        assert any(entry.path == "state.bin" for entry in mine[0].manifest.contents)
    assert {item["type"] for item in read(root, "train-1")} == {"start", "artifact", "scalars", "table", "figure", "finish"}


def test_the_environment_is_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    before = dict(os.environ)
    with Run("smoke", "job", {}, tmp_path) as run:
        assert os.environ["WANDB_MODE"] == "offline"
        run.figure("F", plt.figure(figsize=(1, 1)))
    plt.close("all")
    assert dict(os.environ) == before
