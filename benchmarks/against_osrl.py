"""Does our parity mode learn what OSRL learns? `python benchmarks/against_osrl.py --osrl PATH [--seeds 3 | --speed]`.

Trains OSRL's BCQ-Lag, BEAR-Lag and CPQ and ours (mode='parity') on the same HDF5 file with the SETTINGS below, evaluates the final
policies by the same rollouts from the same starts, and writes return and cost per seed, their difference and its intervals.
Every run is kept in results/runs/parity as soon as it is there; a killed script continues, and more `--seeds` only adds runs.
`--speed` measures steps per second instead: both in this process, one thread, taking turns.

Equal on both sides: data file, network sizes, hyper-parameters, steps, batch size, the distribution of the initial weights
(U(-1/sqrt(n_in), 1/sqrt(n_in)) on both), uniform sampling with replacement, the start of every episode. Not equal: the random
streams, so a seed is a run's number and pairs nothing. OSRL samples by its own TransitionDataset and DataLoader and acts by its own
`act`, called as its own evaluation calls it. None of its code is copied.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics as median
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch
from record_osrl import load_osrl
from scipy import stats
from torch import Tensor
from torch.utils.data import DataLoader

from saferule.artifacts import plain
from saferule.collect import collect
from saferule.config import CONFIGS, with_overrides
from saferule.data import Pool, Rows, measure_units
from saferule.evaluate import evaluate
from saferule.files import atomic_file, results_dir, run_dir
from saferule.hdf5 import read_hdf5, write_hdf5
from saferule.learners import LEARNERS, discounted_limit
from saferule.sources import REPO
from saferule.statistics import bootstrap
from saferule.tasks import Task, get_task
from saferule.train import Learner, fit, prepare_process

EPISODES = {"BallCircle": 600, "CarRun": 400}           # task -> collected episodes
DATA_SEED = 0
EVALUATION = {"episodes": 20, "seed": 1000, "cost_limit": 20.0}
COMMON = {"steps": 2000, "batch": 128, "hidden": (64, 64), "vae_hidden": 64, "heads": 2, "samples": 4, "gamma": 0.97, "tau": 0.02,
          "lr": 1e-3, "beta": 0.5, "reward_scale": 0.1}
SETTINGS = {                                            # in our words; values that OSRL has as defaults are OSRL's
    "bcq_lag": {**COMMON, "phi": 0.05, "lmbda": 0.75, "pid": (0.1, 0.003, 0.001)},
    "bear_lag": {**COMMON, "lmbda": 0.75, "pid": (0.1, 0.003, 0.001), "kernel": "gaussian", "mmd_sigma": 50.0, "mmd_limit": 0.05,
                 "match_samples": 10, "actor_start": 0, "lr_alpha": 1e-3},
    "cpq": {**COMMON, "lr_actor": 1e-3, "lr_alpha": 1e-4, "ood_limit": 1.5},
}
PARITY = {"mode": "parity", "vae_steps": 0, "standardise": False}                              # ours alone: OSRL has no such switch
WRITTEN_IN = {"bcq_lag": {}, "bear_lag": {}, "cpq": {"alpha": 1.0, "ood_quantile": 0.75}}      # OSRL: literals in its code

OSRL = {"bcq_lag": ("algorithms.bcql", "BCQL"), "bear_lag": ("algorithms.bearl", "BEARL"), "cpq": ("algorithms.cpq", "CPQ")}
MODEL = {"hidden": ("a_hidden_sizes", "c_hidden_sizes"), "vae_hidden": ("vae_hidden_sizes",), "heads": ("num_q", "num_qc"),
         "samples": ("sample_action_num",), "pid": ("PID",), "mmd_limit": ("target_mmd_thresh",),
         "match_samples": ("num_samples_mmd_match",), "actor_start": ("start_update_policy_step",), "ood_limit": ("qc_scalar",),
         **{same: (same,) for same in ("gamma", "tau", "beta", "phi", "lmbda", "kernel", "mmd_sigma")}}
TRAINER = {"lr": ("actor_lr", "critic_lr", "vae_lr"), "lr_actor": ("actor_lr",), "lr_alpha": ("alpha_lr",),
           "reward_scale": ("reward_scale",)}
LOOP = ("steps", "batch")                               # neither the model's nor the trainer's

IMPLEMENTATIONS = ("osrl", "ours")
MEASURES = {"return_mean": "return", "cost_mean": "cost"}
KEYS = ["task", "learner", "implementation", "seed"]
DEFINING = ("nets.py", "data.py", "train.py", "evaluate.py", "learners/shared.py", "learners/{learner}.py")   # of our runs
ROUNDS, TURN, WARM_UP = 15, 25, 20                      # of the speed pass: turns of each side, steps per turn, steps before
REPLICAS = (1, 3, 9)


# ------------------------------------------------------------------------------------------------------------ OSRL's side
def in_osrl_words(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of OSRL's model and trainer from settings in our words. An untranslated one: KeyError."""
    model, trainer = {}, {}
    for name, value in settings.items():
        if name in LOOP:
            continue
        out, words = (model, MODEL[name]) if name in MODEL else (trainer, TRAINER[name])
        out.update(dict.fromkeys(words, list(value) if isinstance(value, tuple) else value))       # later ones are special
    return model, trainer


def osrl_trainer(path: Path, learner: str, task: Task, settings: Mapping[str, Any]) -> Any:
    module, name = OSRL[learner]
    module = load_osrl(path, module)
    for_model, for_trainer = in_osrl_words(settings)
    model = getattr(module, name)(task.n_obs, task.n_act, 1.0, cost_limit=EVALUATION["cost_limit"], episode_len=task.horizon,
                                  **for_model)
    return getattr(module, name + "Trainer")(model, env=None, **for_trainer)


def osrl_dataset(path: Path, file: Path, settings: Mapping[str, Any]) -> Any:
    with h5py.File(file) as f:
        columns = {name: f[name][()] for name in f}
    return load_osrl(path, "common.dataset").TransitionDataset(columns, reward_scale=settings["reward_scale"])


def osrl_batches(path: Path, file: Path, settings: Mapping[str, Any]) -> Iterator[list[Tensor]]:
    """OSRL's own loading, in this process (its examples use 8 more processes)."""
    return iter(DataLoader(osrl_dataset(path, file, settings), batch_size=settings["batch"]))


class OSRLPolicy:
    """OSRL's model in `evaluate`: its own `act`, one episode after the other, with the arguments of its own rollouts."""
    replicas = 1

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def act(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """obs [1, E, n_obs] -> [1, E, n_act]; its noise is that of the global generator, which `generator` seeds."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            actions = [self.model.act(row, True, True)[0] for row in obs[0].numpy()]
        return torch.from_numpy(np.stack(actions))[None]


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def train_osrl(path: Path, learner: str, task: Task, file: Path, seed: int) -> OSRLPolicy:
    settings = SETTINGS[learner]
    seed_all(seed)
    trainer, batches = osrl_trainer(path, learner, task, settings), osrl_batches(path, file, settings)
    for _ in range(settings["steps"]):
        trainer.train_one_step(*next(batches))
    return OSRLPolicy(trainer.model)


# -------------------------------------------------------------------------------------------------------------- our side
def made(learner: str, task: Task, pool: Pool, seeds: Sequence[int]) -> tuple[Learner, Callable[[int], dict[str, Tensor]]]:
    """Our learner, one replica per seed, and its step with sampling."""
    cfg = with_overrides(CONFIGS[learner], {**SETTINGS[learner], **PARITY, **WRITTEN_IN[learner]}, learner)
    rows: list[Rows] = [pool.rows("clean")] * len(seeds)
    units = measure_units(pool, rows, standardise=cfg.standardise, reward_scale=cfg.reward_scale)
    limit = torch.full((len(seeds),), discounted_limit(EVALUATION["cost_limit"], cfg.gamma, task.horizon))
    model = LEARNERS[learner](cfg, units, limit, seeds, task.n_act, task.horizon).ready()
    model.seed_noise(seeds[0])
    sampler, stream = model.sampler(pool, rows), torch.Generator().manual_seed(10_000 + seeds[0])
    return model, lambda t: model.update(sampler.sample(stream), t)


def train_ours(learner: str, task: Task, pool: Pool, seed: int) -> Learner:
    model, step = made(learner, task, pool, [seed])
    fit(step, SETTINGS[learner]["steps"], model)
    return model


# ------------------------------------------------------------------------------------------------------------------ runs
def sha256(*files: Path) -> str:
    h = hashlib.sha256()
    for file in files:
        h.update(file.read_bytes())
    return h.hexdigest()


def data_file(task: Task, folder: Path) -> Path:
    file = folder / f"{task.name}-{EPISODES[task.name]}-{DATA_SEED}.hdf5"
    return file if file.exists() else write_hdf5(file, collect(task, EPISODES[task.name], DATA_SEED, workers=1))


def identity(learner: str, implementation: str, data: str, revision: str) -> dict[str, Any]:
    """Everything but task and seed that a run depends on; a kept run with another identity is done again."""
    package = REPO / "saferule"
    code = revision if implementation == "osrl" else sha256(*(package / name.format(learner=learner) for name in DEFINING))
    return plain({"settings": SETTINGS[learner], "evaluation": EVALUATION, "data_sha256": data, "code": code,
                  "torch": torch.__version__})


def kept(file: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """A run that was done before, with the same identity; otherwise None."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return record if record.get("identity") == wanted else None


def write(file: Path, text: str) -> None:
    with atomic_file(file) as temporary:
        temporary.write_text(text)


def run(osrl: Path, revision: str, tasks: Sequence[str], learners: Sequence[str], seeds: Sequence[int], folder: Path) -> list[dict]:
    """Every run that was asked for, from disk where it is there. Seeds outermost: what there is is always balanced."""
    files = {name: data_file(get_task(name), folder) for name in tasks}
    pools = {name: Pool.from_columns(read_hdf5(file, get_task(name))) for name, file in files.items()}
    hashes = {name: sha256(file) for name, file in files.items()}
    records = []
    for seed, name, learner, side in ((s, n, l, i) for s in seeds for n in tasks for l in learners for i in IMPLEMENTATIONS):
        task, file = get_task(name), folder / f"{name}-{learner}-{side}-{seed}.json"
        wanted = identity(learner, side, hashes[name], revision)
        record = kept(file, wanted)
        if record is None:
            start = time.perf_counter()
            policy = (train_osrl(osrl, learner, task, files[name], seed) if side == "osrl" else
                      train_ours(learner, task, pools[name], seed))
            seconds = time.perf_counter() - start
            out = evaluate(policy, task, EVALUATION["episodes"], EVALUATION["seed"], workers=1, progress=False)
            record = {"task": name, "learner": learner, "implementation": side, "seed": seed, "identity": wanted,
                      "ret": out.ret[0].tolist(), "cost": out.cost[0].tolist(), "train_seconds": round(seconds, 1)}
            write(file, json.dumps(record, indent=1) + "\n")
            print(f"{name:10s} {learner:8s} {side:4s} seed {seed}: return {out.ret.mean():7.1f}  cost {out.cost.mean():6.2f}  "
                  f"{seconds:4.0f} s", flush=True)
        records.append(record)
    return records


# ---------------------------------------------------------------------------------------------------------------- tables
def tidy(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per run: KEYS, return_mean, cost_mean (sums over an episode, mean over episodes), episodes, steps."""
    return pd.DataFrame([{**{k: r[k] for k in KEYS}, "return_mean": np.mean(r["ret"]), "cost_mean": np.mean(r["cost"]),
                          "episodes": len(r["ret"]), "steps": r["identity"]["settings"]["steps"]} for r in records])


def welch(x: Sequence[float], y: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Welch's t interval of mean(x) - mean(y) for unpaired runs with unequal variances; a point where nothing varies."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    difference, parts = x.mean() - y.mean(), [v.var(ddof=1) / len(v) for v in (x, y)]
    if sum(parts) == 0:
        return difference, difference
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (x, y)))
    half = stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(sum(parts))
    return difference - half, difference + half


def bootstrapped(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Bootstrap interval of mean(x) - mean(y), each side resampled by itself."""
    n = len(x)
    return bootstrap([x, y], lambda drawn, axis: drawn[:, :n].mean(axis) - drawn[:, n:].mean(axis))


def comparison(runs: pd.DataFrame) -> pd.DataFrame:
    """Per (task, learner, measure): the runs of both sides (2 at least), the difference ours - osrl, and its intervals."""
    lines = []
    for (task, learner), rows in runs.groupby(["task", "learner"], sort=False):
        for measure, name in MEASURES.items():
            osrl, ours = (rows[rows.implementation == i].sort_values("seed")[measure].to_numpy() for i in IMPLEMENTATIONS)
            low, high = welch(ours, osrl)
            boot_low, boot_high = bootstrapped(ours, osrl)
            lines.append({"task": task, "learner": learner, "measure": name, "osrl": osrl, "ours": ours,
                          "difference": ours.mean() - osrl.mean(), "low": low, "high": high, "boot_low": boot_low,
                          "boot_high": boot_high, "zero_inside": low <= 0 <= high, "zero_inside_boot": boot_low <= 0 <= boot_high})
    return pd.DataFrame(lines)


def verdicts(compared: pd.DataFrame) -> dict[tuple[str, str], str]:
    """(task, learner) -> what its intervals (Welch) say."""
    out = {}
    for key, rows in compared.groupby(["task", "learner"], sort=False):
        apart = list(rows[~rows.zero_inside].measure)
        out[key] = f"differs in {' and '.join(apart)}" if apart else "no difference seen"
    return out


def cell(values: np.ndarray) -> str:
    low, high = bootstrap([values], np.mean)
    return f"{values.mean():.1f} [{low:.1f}, {high:.1f}] ({'/'.join(f'{v:.1f}' for v in values)})"


CARE = (
    "Read it with care. Of {n} differences {outside} have an interval without 0 by Welch's t and {outside_boot} by the bootstrap; "
    "{expected:.1f} are expected if nothing differs. With so few seeds Welch's intervals are wide: differences smaller than their "
    "half width go unseen. Bootstrap intervals are too narrow, as they resample only {seeds} values a side, so the verdict is "
    "Welch's. 'No difference seen' does not mean that there is none: that the updates are the same is shown by lockstep.md, with "
    "equal weights, batches and noise. Here initial weights come from the same distribution, not from the same draw, so seed k of "
    "one side has nothing to do with seed k of the other.")


def markdown(compared: pd.DataFrame, runs: pd.DataFrame, revision: str) -> str:
    seeds, said = runs.seed.nunique(), verdicts(compared)
    outside, outside_boot = (int((~compared[c]).sum()) for c in ("zero_inside", "zero_inside_boot"))
    lines = [
        "# Our parity mode against OSRL", "",
        f"OSRL revision {revision[:7]}; {seeds} seeds; {runs.steps.max():,} steps; {runs.episodes.max()} episodes per seed with "
        "the final policy, the same starts for both. Settings, data hashes and versions: manifest.json. Made by "
        "`benchmarks/against_osrl.py`.", "",
        "Mean [95% bootstrap over seeds] (each seed). Difference: ours - OSRL.", "",
        "| task | learner | measure | OSRL | ours | difference | 95%, Welch's t | 95%, bootstrap | 0 inside |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    inside = {(True, True): "yes", (True, False): "Welch's only", (False, True): "bootstrap's only", (False, False): "no"}
    lines += [f"| {r.task} | {r.learner} | {r.measure} | {cell(r.osrl)} | {cell(r.ours)} | {r.difference:+.1f} | "
              f"[{r.low:.1f}, {r.high:.1f}] | [{r.boot_low:.1f}, {r.boot_high:.1f}] | {inside[r.zero_inside, r.zero_inside_boot]} |"
              for r in compared.itertuples()]
    lines += ["", "| task | learner | verdict (Welch's t, 95%) |", "| --- | --- | --- |"]
    lines += [f"| {task} | {learner} | {verdict} |" for (task, learner), verdict in said.items()]
    n = len(compared)
    lines += ["", CARE.format(n=n, outside=outside, outside_boot=outside_boot, expected=0.05 * n, seeds=seeds)]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------------- speed
def turns(steps: Mapping[str, Callable[[int], Any]], rounds: int, steps_per_turn: int, warm_up: int,
          clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds per step of each, once per round; within a round they take turns, so that a busy machine slows all alike."""
    for step in steps.values():
        for t in range(warm_up):
            step(t)
    out: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            for t in range(steps_per_turn):
                step(t)
            out[name].append((clock() - start) / steps_per_turn)
    return out


def speed(osrl: Path, learners: Sequence[str], folder: Path) -> pd.DataFrame:
    """Tidy: learner, what, replicas, replica_steps_per_second (median over rounds), and the ratio to OSRL with its loading."""
    task = get_task("BallCircle")
    file = data_file(task, folder)
    pool, lines = Pool.from_columns(read_hdf5(file, task)), []
    for learner in learners:
        trainer, batches = osrl_trainer(osrl, learner, task, SETTINGS[learner]), osrl_batches(osrl, file, SETTINGS[learner])
        batch = next(batches)
        steps = {("osrl, loading included", 1): lambda t, m=trainer, b=batches: m.train_one_step(*next(b)),
                 ("osrl, loading excluded", 1): lambda t, m=trainer, b=batch: m.train_one_step(*b)}
        steps |= {("ours, sampling included", R): made(learner, task, pool, list(range(R)))[1] for R in REPLICAS}
        took = turns(steps, ROUNDS, TURN, WARM_UP)
        base = took["osrl, loading included", 1]
        for (what, R), seconds in took.items():
            ratios = [b / s * R for b, s in zip(base, seconds)]
            took_R = median.median(seconds) / R
            lines.append({"task": task.name, "learner": learner, "what": what, "replicas": R,
                          "replica_steps_per_second": 1 / took_R, "ms_per_replica_step": 1e3 * took_R,
                          "ratio": median.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)})
            print(f"{learner:8s} {what:24s} R={R}  {1 / took_R:7.0f} replica-steps/s  {median.median(ratios):5.2f} x", flush=True)
    return pd.DataFrame(lines)


def speed_markdown(measured: pd.DataFrame, load: Sequence[float]) -> str:
    lines = ["# Steps per second, ours (parity) and OSRL's", "",
             f"One process, one thread, {ROUNDS} rounds of {TURN} steps each, taking turns; medians. Load average of the machine "
             f"before and after: {load[0]:.1f} and {load[1]:.1f} (this process alone: 1.0); {len(os.sched_getaffinity(0))} cores. "
             "OSRL's loading runs in the same process. Ratio: to OSRL with its loading, median [smallest, largest] of the rounds.",
             "",
             "| learner | what | R | replica-steps per second | ms per replica-step | ratio |",
             "| --- | --- | --- | --- | --- | --- |"]
    lines += [f"| {r.learner} | {r.what} | {r.replicas} | {r.replica_steps_per_second:.0f} | {r.ms_per_replica_step:.2f} | "
              f"{r.ratio:.2f} [{r.ratio_low:.2f}, {r.ratio_high:.2f}] |" for r in measured.itertuples()]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------- output
def git(folder: Path, *command: str) -> str:
    return subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True).stdout.strip()


def note(out: Path, part: str, content: Mapping[str, Any]) -> None:
    """manifest.json has a part per pass; each pass rewrites its own."""
    file = out / "manifest.json"
    manifest = json.loads(file.read_text()) if file.exists() else {}
    write(file, json.dumps(plain({**manifest, part: content}), indent=1) + "\n")


def options(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--osrl", type=Path, required=True, help="a checkout of OSRL")
    parser.add_argument("--revision", default="", help="its revision, where the checkout has no .git")
    parser.add_argument("--tasks", nargs="*", default=list(EPISODES), choices=list(EPISODES))
    parser.add_argument("--learners", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=results_dir() / "reference" / "parity")
    return parser


def parsed(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options, and what a manifest says of every pass."""
    args = parser.parse_args()
    args.revision = args.revision or git(args.osrl, "rev-parse", "HEAD")
    if not args.revision:
        parser.error(f"{args.osrl} has no .git; name its revision with --revision")
    return args, {
        "osrl_revision": args.revision, "commit": git(REPO, "describe", "--always", "--dirty"), "torch": torch.__version__,
        "numpy": np.__version__, "python": sys.version.split()[0], "data_seed": DATA_SEED, "data_episodes": EPISODES,
        "settings": SETTINGS, "parity": PARITY, "written_in_osrl": WRITTEN_IN}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--speed", action="store_true", help="measure speed instead")
    args, facts = parsed(parser)
    if args.seeds < 2:
        parser.error("an interval needs at least 2 seeds")
    prepare_process()
    folder = run_dir("parity")
    if args.speed:
        before = os.getloadavg()[0]
        measured = speed(args.osrl, args.learners, folder)
        load = before, os.getloadavg()[0]
        write(args.out / "speed.csv", measured.to_csv(index=False, float_format="%.6g"))
        write(args.out / "speed.md", speed_markdown(measured, load))
        note(args.out, "speed", {**facts, "load_average": load, "cores": len(os.sched_getaffinity(0)), "rounds": ROUNDS,
                                 "steps_per_turn": TURN})
        return
    records = run(args.osrl, args.revision, args.tasks, args.learners, range(args.seeds), folder)
    runs = tidy(records)
    text = markdown(comparison(runs), runs, args.revision)
    write(args.out / "against_osrl.csv", runs.to_csv(index=False, float_format="%.6g"))
    write(args.out / "against_osrl.md", text)
    note(args.out, "runs", {**facts, "seeds": args.seeds, "evaluation": EVALUATION,
                            "data_sha256": {r["task"]: r["identity"]["data_sha256"] for r in records},
                            "code_sha256": {r["learner"]: r["identity"]["code"] for r in records if r["implementation"] == "ours"}})
    print(text)


if __name__ == "__main__":
    main()
