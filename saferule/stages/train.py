"""03_train: every data condition and seed of one task and learner, as one stacked run."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..artifacts import Artifact, save
from ..config import resolve
from ..data import Pool, Rows, measure_units
from ..learners import LEARNERS, configuration, discounted_limit
from ..tasks import Task
from ..train import Resume, fit, prepare_process
from .poison import load_pool

RETRAIN_SEED = 1000                    # retrained references start from other weights than the models they are compared with


def replica_table(attacks: Sequence[str], seeds: Sequence[int], cost_limits: Sequence[float]) -> list[dict[str, Any]]:
    """One line per replica: attack, method (clean, poisoned, retrain), condition, seed, init_seed, cost_limit (per episode)."""
    kinds = [("none", "clean", "clean")] if any(a != "given" for a in attacks) or not attacks else []
    kinds += [(a, method, f"{a}/{part}") for a in attacks for method, part in (("poisoned", "poisoned"), ("retrain", "retain"))]
    return [{"attack": a, "method": m, "condition": c, "seed": s, "init_seed": s + RETRAIN_SEED * (m == "retrain"), "cost_limit": l}
            for a, m, c in kinds for l in cost_limits for s in seeds]


def rows_of(pool: Pool, conditions: Sequence[str]) -> list[Rows]:
    """Rows per replica; replicas of one condition share them."""
    distinct = {c: pool.rows(c) for c in dict.fromkeys(conditions)}
    return [distinct[c] for c in conditions]


def train(task: Task, learner: str, attacks: Sequence[str], seeds: Sequence[int], profile: str, root: Path, device: str = "cpu",
          overrides: Mapping[str, Any] | None = None, progress: Callable = iter, on_log: Callable | None = None,
          cost_limits: Sequence[float] = (), suffix: str = "") -> Artifact:
    """Train one learner on clean, poisoned and retain-only rows side by side, at one or more cost limits (empty: the data's).

    Files: state.safetensors (weights and optimiser moments), history.csv (scalars along training), and, where the profile has
    a learning curve, snapshots.safetensors ('<step>/<name>'). The artefact is called <task>-<learner><suffix>. A killed run
    continues from root/checkpoints, where the state is written every half minute.
    """
    prepare_process()
    name = f"{task.name}-{learner}{suffix}"
    config = resolve(profile, "train", task.name, learner, attacks, seeds=seeds, overrides=overrides)
    pool, inputs = load_pool(task, attacks, root)
    config["cost_limit"] = inputs["data"].config["cost_limit"]
    pool = pool.to(device)
    table = replica_table(attacks, seeds, cost_limits or [config["cost_limit"]])
    cfg, limits = configuration(config), [line["cost_limit"] for line in table]
    rows = LEARNERS[learner].select_rows(pool, rows_of(pool, [line["condition"] for line in table]), cfg, limits)
    units = measure_units(pool, rows, standardise=cfg.standardise, reward_scale=cfg.reward_scale)
    qc_limit = torch.tensor([discounted_limit(limit, cfg.gamma, task.horizon) for limit in limits])
    model = LEARNERS[learner](cfg, units, qc_limit, [line["init_seed"] for line in table], task.n_act, task.horizon)
    model = model.to(device).ready()
    model.measure(pool, rows)
    model.seed_noise(seeds[0] if seeds else 0)
    sampler = model.sampler(pool, rows)
    stream = torch.Generator(device).manual_seed(10_000 + (seeds[0] if seeds else 0))
    resume = Resume.beside(root, f"train-{name}", {**config, "replicas": table}, inputs)
    kept: dict[int, dict[str, torch.Tensor]] = {}
    keep = lambda t: lambda: kept.__setitem__(t, model.weights())
    history = fit(lambda t: model.update(sampler.sample(stream), t), cfg.steps, model, [stream], log_every=max(cfg.steps // 80, 1),
                  on_log=on_log, resume=resume, progress=progress, kept=kept,
                  snapshots={t: keep(t) for t in sorted({round(share * cfg.steps) for share in config["learning_curve"]})})
    files = {"state.safetensors": model.full_state(), "history.csv": history.frame(table)}
    if kept:
        files["snapshots.safetensors"] = {f"{t}/{k}": value for t, weights in kept.items() for k, value in weights.items()}
    artifact = save("train", name, files, config, inputs, table, root=root, seconds=history.seconds[-1])
    resume.done()
    return artifact
