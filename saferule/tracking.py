"""Weights & Biases, at arm's length: the only module that imports wandb.

Every run is written twice. `<root>/tracking/<job>.jsonl` is ours: one JSON object per logged item, always there,
what tests and `scalars()` read. wandb is the mirror for people: offline under `<root>/wandb` unless the user's
own environment says otherwise (`WANDB_MODE=online` with a key, or `disabled`), and never a reason to stop training.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .artifacts import plain
from .errors import UserError

PROJECT = "saferule"


def environment(root: Path) -> dict[str, str]:
    """Defaults for wandb: offline, silent, no network, nothing written outside `root`. The user's variables win."""
    folder = Path(root).resolve() / "wandb"
    defaults = {
        "WANDB_MODE": "offline",
        "WANDB_PROJECT": PROJECT,
        "WANDB_CONSOLE": "off",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_DISABLE_CODE": "true",                    # otherwise a kernel looks for its notebook over HTTP
        "WANDB__DISABLE_STATS": "true",
        "WANDB_DIR": str(folder.parent),                 # wandb itself appends "wandb"
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_DATA_DIR": str(folder / "data"),
        "WANDB_ARTIFACT_DIR": str(folder / "artifacts"),
    }
    if os.environ.get("WANDB_MODE", "offline") != "online":
        defaults["WANDB_SILENT"] = "true"                # online, the user wants to see the address of the run
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def job_path(root: Path, job: str) -> Path:
    """Where the record of `job` lies."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", job):
        raise UserError(f"tracking: job name {job!r} must be letters, digits, '.', '_' and '-'; use '-' for '/'")
    return Path(root) / "tracking" / f"{job}.jsonl"


class Run:
    """One tracked job. `with Run("quick", "train-BallCircle-bcq_lag", config, root) as run: run.log({...}, step=t)`.

    profile   name of the profile, part of the default group
    job       name of the run and of its record, one per notebook execution
    config    resolved configuration (whatever artifacts.plain understands)
    root      the profile's run folder; everything is written below it
    group     one per reproduction; default SAFERULE_GROUP, else "<profile>-<hash of the folder>"
    replicas  labels for the entries of per-replica values `[R]`; default "0", "1", ...

    While it runs, the record is `.<job>.jsonl.partial` (follow it with `tail -f`); it replaces `<job>.jsonl` in one
    step when the block ends, also after an exception (last line: status 'failed'). A killed run leaves the old record.
    """

    def __init__(self, profile: str, job: str, config: Any, root: Path | str, group: str | None = None,
                 replicas: Sequence[str] | None = None):
        self.root = Path(root).resolve()
        self.path = job_path(self.root, job)
        self.profile, self.job, self.config, self.replicas = profile, job, plain(config), replicas
        digest = hashlib.sha256(str(self.root).encode()).hexdigest()[:8]
        self.group = group or os.environ.get("SAFERULE_GROUP") or f"{profile}-{digest}"
        self.run = None                                  # wandb's run, None when disabled or broken
        self._file, self._added, self._inputs = None, {}, {}

    # -- life cycle ----------------------------------------------------------------------------------------------
    def __enter__(self) -> Run:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._partial, "w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path}: cannot write ({error.strerror}); "
                            "free the folder or set SAFERULE_RESULTS") from None
        self._write("start", profile=self.profile, job=self.job, group=self.group, config=self.config)
        defaults = environment(self.root)
        self._added = {name: value for name, value in defaults.items() if name not in os.environ}
        os.environ.update(self._added)                   # wandb reads its caches' places from here; undone on exit
        if defaults["WANDB_MODE"] != "disabled":
            self._mirror(lambda: self._start(defaults))
        return self

    def __exit__(self, kind, error, trace) -> None:
        status = "finished" if kind is None else "failed"
        try:
            self._write("finish", status=status, **({} if kind is None else {"error": f"{kind.__name__}: {error}"}))
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self.path)
            if self.run is not None:
                self._mirror(lambda: self.run.finish(exit_code=int(kind is not None)))
        finally:
            self.run = None
            for name in self._added:
                os.environ.pop(name, None)

    def _start(self, env: dict[str, str]) -> None:
        for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            Path(env[name]).mkdir(parents=True, exist_ok=True)       # wandb falls back to /tmp where it is missing
        import wandb  # 1.5 s: only when wanted

        # mode and dir by hand: wandb reads the environment once per process, a process may hold several runs
        self.run = wandb.init(project=env["WANDB_PROJECT"], name=self.job, group=self.group, mode=env["WANDB_MODE"],
                              job_type=self.job.split("-")[0], config={"profile": self.profile, **self.config},
                              dir=env["WANDB_DIR"])
        # steps start again in every phase and wandb drops a step that goes back: ours is a metric like any other
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    # -- what can be logged --------------------------------------------------------------------------------------
    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Scalars `[]` or per-replica values `[R]` (array, tensor or list) by name, at training step `step`."""
        values = plain(values)
        self._write("scalars", step=step, values=values)
        flat = {} if step is None else {"step": int(step)}
        for name, value in values.items():
            if isinstance(value, list):
                flat |= {f"{name}/{label}": _number(v) for label, v in zip(self._labels(len(value)), value)}
            else:
                flat[name] = _number(value)
        self._mirror(lambda: self.run and self.run.log(flat))

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """A data frame, whole."""
        self._write("table", name=name, columns=list(map(str, frame.columns)), rows=plain(frame.to_numpy(object)))

        def send():
            import wandb

            self.run.log({name: wandb.Table(columns=list(map(str, frame.columns)),
                                            data=plain(frame.to_numpy(object)), allow_mixed_types=True)})
        self._mirror(lambda: self.run and send())

    def figure(self, name: str, figure) -> None:
        """A matplotlib figure: its pixels go to wandb, its hash and size to the record."""
        from .figures import render  # the one way figures become bytes

        png = render(figure, "png")
        self._write("figure", name=name, sha256=hashlib.sha256(png).hexdigest(), bytes=len(png))

        def send():
            import io

            import wandb
            from PIL import Image
            self.run.log({name: wandb.Image(Image.open(io.BytesIO(png)))})
        self._mirror(lambda: self.run and send())

    def artifact(self, artifact, role: str = "output") -> None:
        """Lineage: an artefact (artifacts.Artifact) made by this run (`output`) or read by it (`input`)."""
        if role not in ("output", "input"):
            raise UserError(f"tracking: role {role!r} is not known; use 'output' or 'input'")
        inputs = plain(artifact.manifest.get("inputs", {}))
        name = f"{artifact.kind}-{artifact.name}".replace("+", ".")          # wandb knows no '+' in names
        self._write("artifact", role=role, kind=artifact.kind, name=artifact.name, id=artifact.id, inputs=inputs)

        def send():
            if role == "input":
                self._inputs[name] = artifact.id
                self.run.config.update({"inputs": dict(self._inputs)}, allow_val_change=True)
                if not self.run.offline:                 # wandb refuses use_artifact offline
                    self._link(f"{name}:{artifact.short}")
                return
            import wandb

            item = wandb.Artifact(name, artifact.kind,
                                  metadata={"id": artifact.id, "inputs": inputs, "config": plain(artifact.config)})
            # artefacts never change once saved, so wandb need not copy them
            item.add_dir(str(artifact.path), policy="immutable", skip_cache=True)
            self.run.log_artifact(item, aliases=["latest", artifact.short])
        self._mirror(lambda: self.run and send())

    # -- inside --------------------------------------------------------------------------------------------------
    @property
    def _partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")

    def _labels(self, R: int) -> Sequence[str]:
        if self.replicas is None:
            return [str(r) for r in range(R)]
        if len(self.replicas) != R:
            raise UserError(f"tracking: {self.job} logs {R} values per name but has {len(self.replicas)} replicas")
        return self.replicas

    def _write(self, type: str, **item: Any) -> None:
        if self._file is None or self._file.closed:
            raise UserError(f"tracking: {self.job} is not open; use `with Run(...) as run:`")
        self._file.write(json.dumps({"type": type, **item}, allow_nan=False) + "\n")
        self._file.flush()                               # a killed run can still be read up to its last line

    def _link(self, name: str) -> None:
        try:
            self.run.use_artifact(name)
        except Exception as error:                       # made by a run that was never uploaded: ids are in the config
            print(f"saferule: wandb has no {name} to link to ({_line(error)})", file=sys.stderr)

    def _mirror(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:                       # the mirror is broken; the record and the training are not
            self.run = None
            print(f"saferule: wandb is off for {self.job} ({_line(error)}); the record goes on in {self.path}",
                  file=sys.stderr)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _number(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def read(root: Path | str, job: str) -> list[dict]:
    """All items of a finished job's record, in order. UserError when there is none or a line is not JSON."""
    path = job_path(root, job)
    if not path.is_file():
        raise UserError(f"{path}: no such record; run the notebook of job '{job}' first")
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            items.append(json.loads(line))
        except json.JSONDecodeError:
            raise UserError(f"{path}: line {number} is not JSON; delete the file and rerun the job") from None
    return items


def scalars(root: Path | str, job: str, labels: pd.DataFrame | None = None) -> pd.DataFrame:
    """Everything logged by `Run.log` as a tidy frame: step, name, replica (-1 for a single scalar), value.

    labels  one row per replica (for example condition, seed): its columns are joined on, for `training_figure`.
    """
    rows = [(item["step"], name, r, float(v))
            for item in read(root, job) if item["type"] == "scalars"
            for name, value in item["values"].items()
            for r, v in (enumerate(value) if isinstance(value, list) else [(-1, value)])]
    frame = pd.DataFrame(rows, columns=["step", "name", "replica", "value"])
    return frame if labels is None else frame.merge(labels.reset_index(drop=True), left_on="replica", right_index=True)
