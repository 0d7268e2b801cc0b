"""`saferule reproduce`: checks its arguments, hands the DAG of notebooks to Snakemake, and prints the main table."""
from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import PROFILES, one_of
from .errors import UserError
from .files import run_dir
from .notebook import die_with_parent, listed, one_thread, parse_device, parse_seeds
from .sources import REPO, relative
from .tasks import get_task


def run(profile: str = "quick", device: str = "auto", seeds: str = "", tasks: str = "", cores: str = "",
        options: Sequence[str] = (), notebooks: Path | None = None) -> int:
    """Runs what is out of date of a profile, in results/runs/<profile>; returns 0, 1 if one failed, 2 if one met bad input.

    seeds, tasks: comma-separated, empty for the profile's. cores: processes at a time, empty for all. options: further
    options for Snakemake. notebooks: another folder than the repository's. Raises UserError for unknown values.
    """
    one_of("profile", profile, PROFILES)
    parse_device(device)
    parse_seeds(seeds)
    chosen = [get_task(name).name for name in listed(tasks)]
    if cores and not (cores.isdecimal() and int(cores)):
        raise UserError(f"cores: '{cores}' must be a whole number >= 1.")
    root = run_dir(profile)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / ".lock", "w")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror}); set SAFERULE_RESULTS elsewhere.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"saferule: another run is at work in {relative(root)}; this one waits for it.", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        config = {"profile": profile, "device": device, "seeds": seeds, "tasks": ",".join(chosen)}
        if notebooks:
            config["notebooks"] = str(notebooks)
        code = snakemake(root, cores or str(len(os.sched_getaffinity(0))), config, options)
    if code or options:
        return code
    print(summary(root))
    return 0


def snakemake(root: Path, cores: str, config: dict[str, str], options: Sequence[str]) -> int:
    """Snakemake on the repository's Snakefile with `root` as its working directory; its own state stays in there.

    Of what it says only our own lines are shown (all, if the user gives options for it); the rest is in logs/engine.log.
    """
    one_thread()
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(REPO / "Snakefile"), "--directory", str(root),
               "--cores", cores, "--rerun-triggers", "params", "input", "mtime", "--rerun-incomplete", "--keep-going",
               "--nolock",                                 # our lock ends with its holder, a lock file would not
               *options, "--config", *(f"{key}={value}" for key, value in config.items() if value)]
    log = root / "logs" / "engine.log"
    log.parent.mkdir(exist_ok=True)
    told = bad_input = False
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", preexec_fn=die_with_parent)
    try:
        with open(log, "w", encoding="utf-8") as file:
            for line in process.stderr:
                file.write(line)
                file.flush()
                if ours := line.startswith("saferule: ") or bool(options):
                    print(line, end="", file=sys.stderr, flush=True)
                told |= ours
                bad_input |= "non-zero exit status 2" in line
        code = process.wait()
    except KeyboardInterrupt:                              # Ctrl-C reached it, too; it stops its notebooks
        process.communicate()
        raise
    if code and not told:
        said = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()] or ["nothing"]
        error = next((line for line in said if "Exception" in line or "Error" in line), said[-1])
        print(f"saferule: the engine stopped: {error} (all it said: {relative(log)})", file=sys.stderr)
    return 2 if bad_input else 1 if code else 0


def summary(root: Path) -> str:
    """The profile's main table as text, and where everything lies."""
    tables = [root / "tables" / f"{name}.md" for name in ("T1_main", "T0_learners")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in tables if path.is_file())
    places = [("tables", "tables"), ("figures", "figures"), ("notebooks", "executed notebooks"), ("artifacts", "artefacts"),
              ("wandb", "offline W&B runs")]
    lines = [f"  {what:<20}{relative(root / name)}" for name, what in places if (root / name).is_dir()]
    return "\n".join([text.rstrip(), "", "Where to look:", *lines])
