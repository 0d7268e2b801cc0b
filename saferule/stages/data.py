"""01_data: a pool of transitions, collected here, downloaded, or read from the user's own file."""
from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artifacts import Artifact, save
from ..config import resolve
from ..data import Pool
from ..errors import UserError
from ..tasks import Task


def make_data(task: Task, profile: str, root: Path, overrides: Mapping[str, Any] | None = None) -> Artifact:
    """The data set of a task as an artefact.

    config.source: 'local' collects episodes in the simulator, and held-out risky ones for an injecting attacker; 'dsrl'
    downloads the task's file; anything else is the path of an HDF5 file. Files: pool.safetensors, episodes.csv and, with
    'local', donors.safetensors. Raises UserError for a file that cannot be used.
    """
    started, config = time.monotonic(), resolve(profile, "data", task.name, overrides=overrides)
    source, donors = config["source"], None
    if source == "local":
        from ..collect import collect
        pool = Pool.from_columns(collect(task, config["episodes"], config["seed"]))
        if config["donors"]:
            donors = Pool.from_columns(collect(task, config["donors"], config["seed"], mix="risky"))
    else:
        from ..hdf5 import download, read_hdf5
        if source == "dsrl":
            path = download(task, root.parent.parent / "downloads")
        else:
            path = Path(source).expanduser()
            config["source"] = path.name               # the manifest keeps the name and the hash, not where it lay
        pool = Pool.from_columns(read_hdf5(path, task))
        with open(path, "rb") as f:
            config["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
    if len(pool) == 0:
        raise UserError(f"{task.name}: the data set has no rows.")
    files = {"pool.safetensors": pool.tensors(), "episodes.csv": pool.episodes()}
    if donors is not None:
        files["donors.safetensors"] = donors.tensors()
    return save("data", task.name, files, config, root=root, seconds=time.monotonic() - started)
