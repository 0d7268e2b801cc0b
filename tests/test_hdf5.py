"""HDF5 files: exact round trips, d4rl's reader as oracle, every kind of bad file, and downloads that break."""
import http.server
import logging
import os
import pickle
import re
import subprocess
import sys
import threading

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saferule import hdf5
from saferule.errors import UserError
from saferule.hdf5 import KEYS, chain_fraction, download, read_hdf5, write_hdf5
from saferule.tasks import get_task

TASK, HOPPER = get_task("BallCircle"), get_task("HopperVelocity")


def recording(episodes=3, horizon=5, n_obs=8, n_act=2, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    track, n = rng.normal(size=(episodes, horizon + 1, n_obs)).astype(np.float32), episodes * horizon
    return {"obs": track[:, :-1].reshape(n, -1), "action": rng.uniform(-1, 1, (n, n_act)).astype(np.float32),
            "reward": rng.random(n, np.float32), "cost": (rng.random(n) < 0.5).astype(np.float32),
            "next_obs": track[:, 1:].reshape(n, -1), "terminal": np.zeros(n, bool),
            "timeout": np.arange(n) % horizon == horizon - 1}


def raw(path, **changes) -> str:
    """A DSRL file written without our writer; a change of None leaves a key out."""
    columns = {KEYS[name]: values for name, values in recording().items()} | changes
    with h5py.File(path, "w") as f:
        for key, values in columns.items():
            if values is not None:
                f.create_dataset(key, data=values, compression="gzip")
    return path


def refused(path, match, task=TASK) -> None:
    before = sorted(os.listdir(os.path.dirname(path))) if os.path.isdir(os.path.dirname(path)) else None
    with pytest.raises(UserError, match=match) as error:
        read_hdf5(path, task)
    text = str(error.value)
    assert "\n" not in text and len(text) < 500 and str(os.path.basename(path)) in text
    assert before is None or sorted(os.listdir(os.path.dirname(path))) == before


@pytest.fixture
def path(tmp_path):
    return tmp_path / "my.hdf5"


# ------------------------------------------------------------------------------------------------------ round trips
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_round_trip_bit_for_bit(tmp_path_factory, episodes, horizon, n_obs, n_act, seed):
    path, columns = tmp_path_factory.mktemp("h5") / "x.hdf5", recording(episodes, horizon, n_obs, n_act, seed)
    found = read_hdf5(write_hdf5(path, columns))
    assert list(found) == list(KEYS)
    for name, values in columns.items():
        assert found[name].dtype == values.dtype and np.array_equal(found[name], values), name


def test_schema_and_determinism(tmp_path):
    a = write_hdf5(tmp_path / "a.hdf5", recording())
    b = write_hdf5(tmp_path / "b.hdf5", {k: torch.from_numpy(v) for k, v in recording().items()} | {"episode": np.arange(15)})
    assert a.read_bytes() == b.read_bytes()
    with h5py.File(a) as f:
        assert set(f) == {"observations", "next_observations", "actions", "rewards", "costs", "terminals", "timeouts"}
        assert {key: (d.shape, d.dtype.str, d.compression) for key, d in f.items()} == {
            "observations": ((15, 8), "<f4", "gzip"), "next_observations": ((15, 8), "<f4", "gzip"),
            "actions": ((15, 2), "<f4", "gzip"), "rewards": ((15,), "<f4", "gzip"), "costs": ((15,), "<f4", "gzip"),
            "terminals": ((15,), "|b1", "gzip"), "timeouts": ((15,), "|b1", "gzip")}


def test_variants_that_are_fine(path):
    """(N, 1) columns, float64 and big-endian numbers, 0/1 flags of any type, squeezed arrays of width 1."""
    want = recording()
    raw(path, rewards=want["reward"][:, None].astype(">f8"), costs=want["cost"][:, None].astype(np.int64),
        terminals=want["terminal"][:, None].astype(np.float32), timeouts=want["timeout"].astype(np.uint8))
    found = read_hdf5(path, TASK)
    assert all(np.array_equal(found[name], want[name]) and found[name].dtype == want[name].dtype for name in want)
    narrow = recording(n_obs=1, n_act=1)
    raw(path, **{KEYS[k]: v.squeeze() for k, v in narrow.items()})
    assert all(np.array_equal(v, narrow[k]) for k, v in read_hdf5(path).items())


def test_other_groups_are_ignored(path):
    with h5py.File(raw(path), "a") as f:
        f.create_group("metadata")["algorithm"] = "SAC"
    assert len(read_hdf5(path, TASK)["obs"]) == 15


def test_incomplete_tail_is_dropped_with_a_note(path, caplog):
    timeout = recording()["timeout"]
    timeout[-1] = False
    raw(path, timeouts=timeout)
    with caplog.at_level(logging.WARNING, "saferule"):
        assert len(read_hdf5(path, TASK)["obs"]) == 10
    assert "dropped 5 rows after the last end flag" in caplog.text


def test_chain_fraction():
    columns = recording(2, 5)
    assert chain_fraction(columns) == 1.0
    columns["next_obs"][[1, 4, 6], 0] += 1                             # row 4 ends an episode and does not count
    assert chain_fraction(columns) == 6 / 8
    assert chain_fraction(recording(4, 1)) == 1.0
    assert chain_fraction({k: torch.from_numpy(v) for k, v in columns.items()}) == 6 / 8


def test_writer_refuses_what_the_reader_would(tmp_path):
    good = recording()
    for bad, match in (({"reward": good["reward"][:-1]}, "'rewards' has shape \\(14\\); expected \\(15\\)"),
                       ({"cost": good["cost"] - 1}, "'costs' is negative"), ({"obs": good["obs"] * np.nan}, "holds NaN"),
                       ({"timeout": good["terminal"]}, "no terminal and no time-out flag"),
                       ({k: v[:0] for k, v in good.items()}, "zero rows")):
        with pytest.raises(UserError, match=match):
            write_hdf5(tmp_path / "x.hdf5", good | bad)
    with pytest.raises(UserError, match="without the columns cost"):
        write_hdf5(tmp_path / "x.hdf5", {k: v for k, v in good.items() if k != "cost"})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_hdf5(tmp_path / "file" / "x.hdf5", good)


# ------------------------------------------------------------------------------------------------------------- D4RL
def d4rl_raw(lengths, ends, n_obs=11, n_act=3, seed=0) -> dict[str, np.ndarray]:
    """Episodes as D4RL stores them; ends: 't' terminal, 'o' time-out, 'b' both, '' cut off."""
    rng, n = np.random.default_rng(seed), sum(lengths)
    last, terminals, timeouts = np.cumsum(lengths) - 1, np.zeros(n, bool), np.zeros(n, bool)
    for row, end in zip(last, ends):
        terminals[row], timeouts[row] = end in "tb" and end != "", end in "ob" and end != ""
    return {"observations": rng.normal(size=(n, n_obs)).astype(np.float32), "rewards": rng.random(n, np.float32),
            "actions": rng.uniform(-1, 1, (n, n_act)).astype(np.float32), "terminals": terminals, "timeouts": timeouts}


def store(path, data):
    with h5py.File(path, "w") as f:
        for key, values in data.items():
            f[key] = values
    return path


@pytest.fixture(scope="session")
def qlearning_dataset():
    """d4rl's own function, without its simulator imports."""
    sys.modules.setdefault("mujoco_py", None)
    os.environ["D4RL_SUPPRESS_IMPORT_ERROR"] = "1"
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        d4rl = pytest.importorskip("d4rl")
    return d4rl.qlearning_dataset


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from("tob")), min_size=1, max_size=5), st.integers(0, 3),
       st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_derived_transitions_are_those_of_d4rl(tmp_path_factory, qlearning_dataset, episodes, tail, seed):
    lengths, ends = [n for n, _ in episodes] + [tail] * (tail > 0), [e for _, e in episodes] + [""] * (tail > 0)
    data = d4rl_raw(lengths, ends, seed=seed)
    path = store(tmp_path_factory.mktemp("d4rl") / "x.hdf5", data)
    oracle = qlearning_dataset(None, dataset=data)
    last = data["terminals"][-1] and not data["timeouts"][-1]          # d4rl's loop leaves out the very last row
    if not len(oracle["rewards"]) + last:
        return refused(path, "no transition is complete", HOPPER)
    found = read_hdf5(path, HOPPER)
    n = len(found["obs"]) - last
    for name, key in (("obs", "observations"), ("action", "actions"), ("reward", "rewards"), ("terminal", "terminals")):
        assert np.array_equal(found[name][:n], oracle[key].reshape(found[name][:n].shape)), name
    alive = ~found["terminal"][:n]                                     # after a terminal, d4rl has the next episode's start
    assert np.array_equal(found["next_obs"][:n][alive], oracle["next_observations"].reshape(n, 11)[alive])
    assert np.array_equal(found["next_obs"][found["terminal"]], found["obs"][found["terminal"]])
    assert chain_fraction(found) == 1.0 and (found["terminal"] | found["timeout"])[-1]
    kept = sum(1 for n, e in zip(lengths, ends) if n > 1 or e == "t")
    assert (found["terminal"] | found["timeout"]).sum() == kept


def test_costs_come_from_the_task(path):
    data = d4rl_raw([3, 2], "to")
    found = read_hdf5(store(path, data), HOPPER)
    assert np.array_equal(found["cost"], (found["next_obs"][:, HOPPER.velocity_index] > HOPPER.velocity_limit).astype(np.float32))
    assert found["cost"].dtype == np.float32 and len(found["cost"]) == 4


def test_d4rl_file_with_next_observations_keeps_every_row(path):
    data = d4rl_raw([3, 2], "to")
    data["next_observations"] = data["observations"] + 1
    found = read_hdf5(store(path, data), HOPPER)
    assert len(found["obs"]) == 5 and np.array_equal(found["next_obs"], data["next_observations"])
    assert np.array_equal(found["timeout"], data["timeouts"])


def test_d4rl_file_without_a_velocity_task(path):
    store(path, d4rl_raw([3, 2], "to", n_obs=8, n_act=2))
    refused(path, "lacks 'costs', 'next_observations'")
    raw(path, costs=None)
    refused(path, "lacks 'costs'; .* name a velocity task")
    store(path, {k: v for k, v in d4rl_raw([3, 2], "to").items() if k != "timeouts"})
    refused(path, "lacks 'timeouts'", HOPPER)


# --------------------------------------------------------------------------------------------------------- bad files
def replaced(name, row, value, column=None):
    values = recording()[name].astype(np.float64 if name not in ("terminal", "timeout") else np.float32)
    values[row if column is None else (row, column)] = value
    return {KEYS[name]: values}


GOOD = {KEYS[name]: values for name, values in recording().items()}
BAD = {
    **{f"no {key}": ({key: None}, f"lacks '{key}'") for key in KEYS.values()},
    "two keys": ({"costs": None, "rewards": None}, "lacks 'rewards', 'costs'; it holds actions, next_obs"),
    "short": ({"next_observations": GOOD["next_observations"][:-1]}, "'next_observations' has 14 rows but 'observations' has 15"),
    "long": ({"timeouts": np.append(GOOD["timeouts"], True)}, "'timeouts' has 16 rows"),
    "wide reward": ({"rewards": np.zeros((15, 2), np.float32)}, r"'rewards' has shape \(15, 2\); expected \(15\)"),
    "flat obs": ({"observations": np.zeros(15, np.float32)},
                 r"'observations' has shape \(15, 1\); expected \(15, 8\) as BallCircle"),
    "3-D": ({"actions": np.zeros((15, 2, 1), np.float32)}, r"'actions' has shape \(15, 2, 1\)"),
    "n_obs": ({"observations": np.zeros((15, 7), np.float32)}, r"'observations' has shape \(15, 7\); expected \(15, 8\)"),
    "n_act": ({"actions": np.zeros((15, 3), np.float32)}, r"'actions' has shape \(15, 3\); expected \(15, 2\) as BallCircle"),
    "next width": ({"next_observations": np.zeros((15, 7), np.float32)}, "'next_observations' has shape"),
    "bytes": ({"rewards": np.full(15, b"1.0")}, "'rewards' has dtype text"),
    "complex": ({"costs": np.zeros(15, complex)}, "'costs' has dtype complex128"),
    "compound": ({"rewards": np.zeros(15, [("a", "f4")])}, "'rewards' has dtype"),
    "subarray": ({"rewards": np.zeros(15, [("a", "f4", 3)])}, "'rewards' has dtype"),
    "bool obs": ({"observations": np.zeros((15, 8), bool)}, "'observations' has dtype bool; expected float32"),
    "text flags": ({"terminals": np.full(15, b"no")}, "'terminals' has dtype text; expected bool"),
    "NaN": (replaced("obs", 12, np.nan, 3), "'observations' holds NaN, first in row 12, column 3"),
    "inf": (replaced("reward", 4, -np.inf), "'rewards' holds infinity, first in row 4;"),
    "too large": (replaced("next_obs", 2, 1e300, 1), "'next_observations' holds infinity, first in row 2, column 1"),
    "NaN cost": (replaced("cost", 0, np.nan), "'costs' holds NaN, first in row 0"),
    "NaN flag": (replaced("timeout", 3, np.nan), "'timeouts' must be bool or 0 and 1 but is nan in row 3"),
    "flag 2": (replaced("terminal", 3, 2), "'terminals' must be bool or 0 and 1 but is 2.0 in row 3"),
    "negative": (replaced("cost", 7, -0.5), r"'costs' is negative \(-0.5\), first in row 7"),
    "no flags": ({"timeouts": np.zeros(15, bool)}, "no terminal and no time-out flag"),
    "zero rows": (dict.fromkeys(GOOD) | {k: v[:0] for k, v in GOOD.items()}, "zero rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_columns(path, case):
    changes, match = BAD[case]
    columns = {k: v for k, v in (GOOD | changes).items() if v is not None}
    store(path, columns)
    refused(path, match)


def test_object_and_string_dtypes(path):
    with h5py.File(raw(path, rewards=None), "a") as f:
        f.create_dataset("rewards", data=np.array(["1"] * 15, object), dtype=h5py.string_dtype())
    refused(path, "'rewards' has dtype text")
    with h5py.File(path, "a") as f:
        del f["rewards"]
        f.create_dataset("rewards", (15,), dtype=h5py.vlen_dtype(np.float32))
    refused(path, "'rewards' has dtype object")
    with h5py.File(path, "a") as f:
        del f["rewards"]
        f.create_dataset("rewards", (15,), dtype=h5py.ref_dtype)
    refused(path, "'rewards' has dtype object")
    for shape in ((), None):
        with h5py.File(path, "a") as f:
            del f["rewards"]
            f["rewards"] = h5py.Empty("f4") if shape is None else np.float32(1)
        refused(path, "'rewards' has shape")


def test_links_and_outside_storage(tmp_path, path):
    secret = store(tmp_path / "secret.h5", GOOD)
    refusals = {
        "external": (lambda f: f.__setitem__("rewards", h5py.ExternalLink(str(secret), "rewards")), "is a link to '.*secret.h5'"),
        "soft": (lambda f: f.__setitem__("rewards", h5py.SoftLink("/elsewhere/rewards")), "is a link to"),
        "dangling": (lambda f: f.__setitem__("rewards", h5py.ExternalLink("none.h5", "x")), "is a link to 'none.h5'"),
        "group": (lambda f: f.create_group("rewards"), "'rewards' is a group"),
    }
    for make, match in refusals.values():
        with h5py.File(raw(path, rewards=None), "a") as f:
            make(f)
        refused(path, match)
    with h5py.File(raw(path), "a") as f:                              # a link that nothing needs is not followed either
        f["extra"] = h5py.ExternalLink(str(secret), "rewards")
    refused(path, "'extra' is a link")
    layout = h5py.VirtualLayout((15,), np.float32)
    layout[:] = h5py.VirtualSource(str(secret), "rewards", (15,))
    with h5py.File(raw(path, rewards=None), "a") as f:
        f.create_virtual_dataset("rewards", layout)
    refused(path, "'rewards' keeps its data in other files")
    (tmp_path / "raw.bin").write_bytes(bytes(60))
    with h5py.File(raw(path, rewards=None), "a") as f:
        f.create_dataset("rewards", (15,), np.float32, external=[(str(tmp_path / "raw.bin"), 0, 60)])
    refused(path, "'rewards' keeps its data in other files")


def declare(path, rows, chunks=None):
    with h5py.File(path, "w") as f:
        for key, values in GOOD.items():
            f.create_dataset(key, (rows, *values.shape[1:]), values.dtype, chunks=chunks or True, compression="gzip")


def test_absurd_sizes_are_refused_before_reading(path, monkeypatch):
    monkeypatch.setattr(hdf5, "_read", lambda *_: pytest.fail("was read"))
    declare(path, 10**9)
    refused(path, "declares 88.0 GB of data, more than 8.6 GB")
    declare(path, 2**40)
    refused(path, "more than 8.6 GB")
    declare(path, 10**7)
    refused(path, "GB of data in a file of .* MB; no recorded data compress like this")


def test_compression_bombs(path):
    with h5py.File(path, "w") as f:                                    # 16 bytes of interest in a chunk of 4 GB
        for key, values in GOOD.items():
            chunk = (2**27, *values.shape[1:])
            f.create_dataset(key, (15, *values.shape[1:]), values.dtype, chunks=chunk, maxshape=(None, *values.shape[1:]))
    refused(path, "is stored in chunks of")


def test_huge_root_level(path):
    with h5py.File(path, "w") as f:
        space = h5py.h5s.create(h5py.h5s.NULL)
        for i in range(10_001):
            h5py.h5d.create(f.id, b"%d" % i, h5py.h5t.IEEE_F32LE, space)
    refused(path, "has 10,001 entries at root level")


@pytest.mark.parametrize("content", [b"", b"x", b"<html>not found</html>", b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + bytes(500)])
def test_not_hdf5(path, content):
    path.write_bytes(content)
    refused(path, "is not an HDF5 file|truncated or damaged")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
def test_truncated(path, share):
    raw(path)
    os.truncate(path, int(path.stat().st_size * share))
    refused(path, "is not an HDF5 file|truncated or damaged")


class Bomb:
    def __reduce__(self):
        return (os.abort, ())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_refused_and_never_opened(tmp_path, path, protocol):
    path.write_bytes(pickle.dumps(Bomb(), protocol))
    refused(path, "is a pickled file: refused")
    torch.save({"x": torch.ones(1)}, path)
    refused(path, "is a pickled file: refused")
    raw(tmp_path / "data.pkl")
    refused(tmp_path / "data.pkl", "pickled files are refused")


def test_missing_folders_and_pipes(tmp_path, path):
    refused(path, "is missing; check the name, or use source=local")
    refused(tmp_path / "no" / "my.hdf5", "is missing")
    path.mkdir()
    refused(path, "is a folder")
    os.mkfifo(tmp_path / "pipe.hdf5")
    refused(tmp_path / "pipe.hdf5", "is not a plain file")
    path.rmdir()
    path.symlink_to(path)
    refused(path, "is a link")
    raw(tmp_path / "real.hdf5")
    (tmp_path / "link.hdf5").symlink_to("real.hdf5")                   # a user's own link to a file is fine
    assert len(read_hdf5(tmp_path / "link.hdf5", TASK)["obs"]) == 15


def test_flipped_bytes_never_crash(tmp_path):
    """In a process of its own: what a damaged file must not do is take the interpreter down."""
    raw(tmp_path / "good.hdf5")
    code = (
        "import sys, numpy as np\n"
        "from saferule.hdf5 import read_hdf5\n"
        "from saferule.errors import UserError\n"
        "good = open(sys.argv[1], 'rb').read()\n"
        "rng = np.random.default_rng(0)\n"
        "refused = 0\n"
        "for i in range(400):\n"
        "    data = bytearray(good)\n"
        "    for where in rng.integers(0, len(data) if i % 2 else 3000, 1 + i % 3): data[where] = rng.integers(256)\n"
        "    open(sys.argv[2], 'wb').write(data)\n"
        "    try: read_hdf5(sys.argv[2])\n"
        "    except UserError as e: refused += 1; assert chr(10) not in str(e)\n"
        "print(refused)\n")
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path / "good.hdf5"), str(tmp_path / "bad.hdf5")],
                           capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr[-2000:]
    assert int(child.stdout) > 50


# ------------------------------------------------------------------------------------------------------------ download
class Server(http.server.ThreadingHTTPServer):
    """Serves `data` on 127.0.0.1 and misbehaves on request. `plan`: bytes to send per request before breaking off."""

    def __init__(self, data):
        self.data, self.tag, self.plan, self.status, self.requests, self.ranges = data, '"v1"', [], 200, [], True
        self.lie = 0
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/files"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.path, asked))
        if server.status != 200:
            return self.send_error(server.status)
        start = 0
        if asked and server.ranges and self.headers.get("If-Range") in (None, server.tag):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(server.data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.data)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.data) - 1}/{len(server.data)}")
        else:
            self.send_response(200)
        if server.tag:
            self.send_header("ETag", server.tag)
        self.send_header("Content-Length", str(len(server.data) - start + server.lie))
        self.end_headers()
        count = server.plan.pop(0) if server.plan else len(server.data)
        self.wfile.write(server.data[start:start + count])


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    data = write_hdf5(tmp_path / "origin.hdf5", recording(200)).read_bytes()
    server = Server(data)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(server, folder, **kw):
    return download(TASK, folder, progress=False, base=server.url, timeout=5, **kw)


def test_download_and_no_second_request(server, tmp_path):
    path = fetch(server, tmp_path / "new")
    assert path == tmp_path / "new" / "SafetyBallCircle-v0-80-886.hdf5" and path.read_bytes() == server.data
    assert os.listdir(path.parent) == [path.name] and len(read_hdf5(path, TASK)["obs"]) == 1000
    assert fetch(server, tmp_path / "new") == path and len(server.requests) == 1
    assert server.requests[0] == ("/files/SafetyBallCircle-v0-80-886.hdf5", None)


def test_download_shows_progress(server, tmp_path, capsys):
    download(TASK, tmp_path / "new", base=server.url)
    assert "SafetyBallCircle-v0-80-886.hdf5" in capsys.readouterr().err


def test_broken_transfers_are_resumed(server, tmp_path):
    server.plan = [1000, 2500, 300]
    assert fetch(server, tmp_path / "new").read_bytes() == server.data
    assert [asked for _, asked in server.requests] == [None, "bytes=1000-", "bytes=3500-", "bytes=3800-"]
    assert len(os.listdir(tmp_path / "new")) == 1


def test_a_later_call_goes_on(server, tmp_path):
    server.plan = [1000, 0, 0, 0]
    with pytest.raises(UserError, match="keeps breaking off at 1,000 bytes; run this again .* source=local") as error:
        fetch(server, tmp_path / "new")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new" / f"{TASK.dsrl_file}.hdf5").exists()
    assert fetch(server, tmp_path / "new").read_bytes() == server.data
    assert server.requests[-1][1] == "bytes=1000-"
    assert len(os.listdir(tmp_path / "new")) == 1


@pytest.mark.parametrize("change", ["version", "no ranges", "no tag", "part too long", "part whole"])
def test_parts_that_do_not_fit_are_not_spliced(server, tmp_path, change):
    server.plan = [1000, 0, 0, 0]
    with pytest.raises(UserError):
        fetch(server, tmp_path / "new")
    part = next((tmp_path / "new").glob("*.part"))
    if change == "version":
        server.data, server.tag = write_hdf5(tmp_path / "v2.hdf5", recording(200, seed=1)).read_bytes(), '"v2"'
    elif change == "no ranges":
        server.ranges = False
    elif change == "no tag":
        server.tag = None
    else:
        part.write_bytes(server.data + b"x" * (change == "part too long"))
    assert fetch(server, tmp_path / "new").read_bytes() == server.data
    assert len(os.listdir(tmp_path / "new")) == 1


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_refusals_of_the_server(server, tmp_path, status):
    server.status = status
    with pytest.raises(UserError, match=f"answers {status} .* use source=local") as error:
        fetch(server, tmp_path / "new")
    assert "\n" not in str(error.value) and os.listdir(tmp_path / "new") == []


def test_an_html_page_is_no_data(server, tmp_path):
    server.data = b"<html>please log in</html>"
    with pytest.raises(UserError, match="no HDF5 file"):
        fetch(server, tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []


def test_announced_sizes_are_bounded(server, tmp_path):
    server.lie = 1 << 50
    with pytest.raises(UserError, match="beyond reason"):
        fetch(server, tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []


def test_unreachable_host_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for base in (f"http://127.0.0.1:{port}", "nonsense"):
        with pytest.raises(UserError, match="cannot be reached .* source=local") as error:
            download(TASK, tmp_path / "new", progress=False, base=base)
        assert "\n" not in str(error.value) and os.listdir(tmp_path / "new") == []


def test_silent_host(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: threading.Event().wait(0.5))
    with pytest.raises(UserError, match="cannot be reached"):
        download(TASK, tmp_path / "new", progress=False, base=server.url, timeout=0.1)


def test_two_downloads_of_one_file(server, tmp_path):
    (tmp_path / "new").mkdir()
    part = tmp_path / "new" / f"{TASK.dsrl_file}.hdf5.part"
    part.touch()
    from saferule.files import locked
    with locked(part), pytest.raises(UserError, match="by another process"):
        fetch(server, tmp_path / "new")
    assert part.exists() and fetch(server, tmp_path / "new").exists()


def test_unwritable_download_folder(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        fetch(server, tmp_path / "file")
