"""Is the repair as good as it shall be? Fresh data and fresh training seeds, several tasks, attacks, learners and methods.

    python benchmarks/repair_target.py prepare --data-seeds 3,4,5,6,7     collect, poison, train victims and references
    python benchmarks/repair_target.py judge --data-seeds 3,4,5,6,7       repair, roll out, write tables

One data seed is one unit: a data set of its own, and one training seed (100 + the data seed). Of every repaired model three states
are rolled out: at the end of its budget ('final'), after a budget three times as long ('long'), and after 1,200 further ordinary
steps on the retain rows ('later'). Finished parts are kept below results/runs/ and not done again.

What the target asks of a (task, learner, attack), fixed before any run: cost at or under the limit on every seed where the
retrained model's is, at least 95% of the retrained return, at most 5% of the training steps; all three states.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from saferule.artifacts import load
from saferule.config import CONFIGS, configured, with_overrides
from saferule.evaluate import evaluate
from saferule.files import atomic_file, run_dir
from saferule.learners import restore, stack
from saferule.notebook import listed, parse_seeds, progress
from saferule.stages import is_current
from saferule.stages.data import make_data
from saferule.stages.poison import load_pool, make_poison
from saferule.stages.train import rows_of, train
from saferule.tasks import Task, get_task
from saferule.train import prepare_process
from saferule.unlearning import unlearn

PROFILE, EPISODES, LATER, LONG = "quick", 10, 1200, 3
TASKS, ATTACKS = "BallCircle,CarCircle,BallRun,CarRun", "inject,label_flip,outliers"
STATES = ("final", "long", "later")


def home(data_seed: int) -> Path:
    return run_dir(f"target-{data_seed}")


def prepare(task: Task, learner: str, attacks: tuple[str, ...], data_seed: int, train_seed: int) -> None:
    """Data, attacks, and the clean, poisoned and retrained models of one data seed, as artefacts."""
    root = home(data_seed)
    if not is_current("data", task.name, root):
        make_data(task, PROFILE, root, {"seed": data_seed})
    data = load("data", task.name, root)
    for attack in attacks:
        if not is_current("poison", f"{task.name}-{attack}", root, data=data):
            make_poison(task, attack, PROFILE, root)
    inputs = {f"poison:{a}": load("poison", f"{task.name}-{a}", root) for a in attacks}
    if not is_current("train", f"{task.name}-{learner}", root, data=data, **inputs):
        train(task, learner, attacks, (train_seed,), PROFILE, root,
              progress=lambda steps: progress(steps, f"{task.name} {learner} {data_seed}"))


def repaired(task: Task, learner: str, method: str, data_seed: int, overrides: dict[str, Any]) -> tuple[list, list]:
    """Learners and their lines: one per state, a replica per attack."""
    prepare_process()
    root = home(data_seed)
    trained = load("train", f"{task.name}-{learner}", root)
    attacks = trained.config["attacks"]
    pool, inputs = load_pool(task, attacks, root)
    victims = [i for i, line in enumerate(trained.replicas) if line["method"] == "poisoned"]
    lines = [trained.replicas[i] for i in victims]
    cfg = configured(method, PROFILE, task.name, overrides)
    forged = ["cost" in inputs[f"poison:{line['attack']}"].json("facts.json")["threat"]["fields"] for line in lines]
    retain, forget = (rows_of(pool, [f"{line['attack']}/{part}" for line in lines]) for part in ("retain", "forget"))
    models, out = [], []
    for steps, later, wanted in ((cfg.steps, LATER, ("final", "later")), (LONG * cfg.steps, 0, ("long",))):
        model = restore(trained, task).pick(victims)
        done = unlearn(model, pool, retain, forget, method, with_overrides(cfg, {"steps": steps}, method), seed=20_000 + data_seed,
                       forged_costs=forged, later_steps=later, snapshots_at=(steps, steps + later))
        for state in wanted:
            copy = model.pick(range(model.replicas))
            copy.load_weights(done.snapshots[steps + (later if state == "later" else 0)])
            models.append(copy)
            out += [{"attack": line["attack"], "method": method, "state": state, "steps": cfg.steps} for line in lines]
    return models, out


def references(task: Task, learner: str, data_seed: int) -> tuple[list, list]:
    trained = load("train", f"{task.name}-{learner}", home(data_seed))
    return [restore(trained, task)], [{"attack": line["attack"], "method": line["method"], "state": "final",
                                       "steps": trained.config["steps"]} for line in trained.replicas]


def rolled_out(task: Task, learner: str, data_seed: int, models: list, lines: list, episodes: int) -> pd.DataFrame:
    result = evaluate(stack(models), task, episodes, seed=1000, progress=False)
    head = {"task": task.name, "learner": learner, "data_seed": data_seed, "cost_limit": task.cost_limit}
    return pd.DataFrame([{**head, **line, "return_mean": r.mean(), "cost_mean": c.mean()}
                         for line, r, c in zip(lines, result.ret, result.cost)])


def judge(runs: pd.DataFrame) -> pd.DataFrame:
    """One line per (task, learner, attack, method, state): return as a share of gold's, cost per seed, and what was met."""
    gold = runs[runs.method == "retrain"].set_index(["task", "learner", "attack", "data_seed"])
    lines = []
    keys = ["task", "learner", "attack", "method", "state"]
    for key, own in runs[~runs.method.isin(["clean"])].groupby(keys, sort=False):
        task, learner, attack, method, state = key
        if attack == "none":
            continue
        own = own.sort_values("data_seed")
        same = gold.loc[[(task, learner, attack, s) for s in own.data_seed]]
        limit = own.cost_limit.iloc[0]
        safe_gold = same.cost_mean.to_numpy() <= limit
        safe = own.cost_mean.to_numpy() <= limit
        share = own.return_mean.mean() / same.return_mean.mean()
        lines.append({**dict(zip(keys, key)), "return_share": share, "costs": "/".join(f"{c:.0f}" for c in own.cost_mean),
                      "safe": int(safe.sum()), "gold_safe": int(safe_gold.sum()), "seeds": len(own),
                      "step_share": (own.steps.to_numpy() / same.steps.to_numpy()).max(),
                      "safe_where_gold": bool((safe | ~safe_gold).all()), "keeps_95": bool(share >= 0.95)})
    return pd.DataFrame(lines)


def write(runs: pd.DataFrame, judged: pd.DataFrame, folder: Path) -> None:
    for name, text in (("runs.csv", runs.to_csv(index=False)), ("judged.csv", judged.to_csv(index=False))):
        with atomic_file(folder / name) as temporary:
            temporary.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("prepare", "judge"))
    parser.add_argument("--data-seeds", default="3,4,5,6,7")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--learners", default="bcq_lag")
    parser.add_argument("--attacks", default=ATTACKS)
    parser.add_argument("--methods", default="saferule,finetune_nstep,finetune")
    parser.add_argument("--overrides", default="{}", help="JSON, settings of every method that has them")
    parser.add_argument("--episodes", type=int, default=EPISODES)
    parser.add_argument("--out", type=Path, default=None, help="folder for runs.csv and judged.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks, frames = [get_task(t) for t in listed(args.tasks)], []
    for task in tasks:
        for learner in listed(args.learners):
            for seed in parse_seeds(args.data_seeds):
                prepare(task, learner, listed(args.attacks), seed, 100 + seed)
                if args.what == "prepare":
                    continue
                models, lines = references(task, learner, seed)
                for method in listed(args.methods):
                    known = {k: v for k, v in json.loads(args.overrides).items() if k in CONFIGS[method].__dataclass_fields__}
                    more, theirs = repaired(task, learner, method, seed, known)
                    models, lines = models + more, lines + theirs
                frames.append(rolled_out(task, learner, seed, models, lines, args.episodes))
    if frames:
        runs = pd.concat(frames, ignore_index=True)
        judged = judge(runs)
        print(judged.to_string())
        write(runs, judged, args.out or run_dir("target"))


if __name__ == "__main__":
    main()
