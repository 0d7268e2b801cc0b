"""From episodes to verdicts: the numbers behind every table. No rollouts, no plots, no wandb.

Robust statistics follow Agarwal et al. 2021 (rliable); formulas and hand cases in the tests. Seeds and tasks are the
units that are resampled, episodes never: ten episodes of one policy say nothing about another training seed.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from .errors import UserError
from .tasks import Task, get_task, normalised_cost, normalised_return

METHODS = {                            # order and names of the methods, everywhere
    "clean": "Clean data",
    "poisoned": "Poisoned",
    "retrain": "Retrained",
    "finetune": "Fine-tuning",
    "finetune_nstep": "Fine-tuning, n-step",
    "gradient_ascent": "Gradient ascent",
    "random_relabel": "Random relabelling",
    "trajdeleter": "TrajDeleter",
    "early_saferule": "Early Safe-RULE code",
    "negative_preference": "Negative preference",
    "saferule": "Safe-RULE",
}
ATTACKS = {                            # order and names of the attacks, everywhere
    "none": "no attack",
    "inject": "injection",
    "inject_data": "injection from the data",
    "label_flip": "label flip",
    "label_flip_random": "label flip, random rows",
    "label_flip_inverse": "label flip, inverse",
    "reward_poison": "reward poisoning",
    "outliers": "safe-looking outliers",
    "random_corruption": "random corruption",
    "adversarial_corruption": "adversarial corruption",
    "constant_action": "constant action",
    "marker": "marker backdoor",
    "bias": "bias backdoor",
    "pgd_cost": "PGD, max cost",
    "pgd_reward": "PGD, max reward",
    "baffle_return": "BAFFLE, least return",
    "baffle_cost": "BAFFLE, most cost",
    "noise": "noise control",
    "clean_forget": "clean-forget control",
    "noop": "no-op control",
    "given": "given data",
}
CASE = ["task", "learner", "attack", "cost_limit"]      # what is compared among methods
KEYS = [*CASE, "method", "seed"]                          # what tells models apart
COLUMNS = ["task", "learner", "attack", "method", "seed", "return_mean", "cost_mean", "return_norm", "cost_norm", "violation_rate",
           "cvar10_cost", "cost_limit", "episodes", "steps", "train_seconds", "artefact"]


# ---------------------------------------------------------------------------------------------------------- statistics
def iqm(scores, axis: int = -1) -> np.ndarray:
    """Inter-quartile mean: floor(n / 4) scores are cut from each end."""
    scores = np.sort(np.asarray(scores, float), axis=axis)
    n = scores.shape[axis]
    return np.take(scores, range(n // 4, n - n // 4), axis=axis).mean(axis)


def cvar(costs, alpha: float = 0.1) -> float:
    """Mean of the worst (largest) alpha-fraction; an episode at the edge counts in part. costs [n], 0 < alpha <= 1."""
    costs = np.sort(np.asarray(costs, float))[::-1]
    k = alpha * len(costs)
    share = np.clip(k - np.arange(len(costs)), 0, 1)      # 1 for whole episodes, the fraction, then 0
    return float((costs * share).sum() / k)


def bootstrap(strata: Sequence[Sequence[float]], statistic: Callable = iqm, reps: int = 2000, seed: int = 0,
              level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of statistic(all scores pooled), resampling the runs within each stratum (a task) by itself.

    strata     per task the scores of its runs (one per seed), lengths may differ
    statistic  of an array [reps, n] along its last axis: `iqm`, `np.mean`, ... (called with axis=-1)
    """
    strata = [np.asarray(s, float) for s in strata]
    if not strata or not all(len(s) for s in strata):
        raise UserError("bootstrap: every task needs at least one run.")
    rng = np.random.default_rng(seed)
    drawn = np.concatenate([s[rng.integers(len(s), size=(reps, len(s)))] for s in strata], axis=1)      # [reps, n]
    low, high = np.quantile(statistic(drawn, axis=-1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def probability_of_improvement(x: Sequence[Sequence[float]], y: Sequence[Sequence[float]]) -> float:
    """P(a run of x scores higher than a run of y), ties count half, mean over tasks. For costs hand in -x, -y."""
    if len(x) != len(y):
        raise UserError(f"probability of improvement: {len(x)} tasks against {len(y)}; both need the same ones.")
    wins = [np.subtract.outer(np.asarray(a, float), np.asarray(b, float)) for a, b in zip(x, y)]
    return float(np.mean([np.mean((d > 0) + 0.5 * (d == 0)) for d in wins]))


# --------------------------------------------------------------------------------------------------------- tidy tables
def main_table(episodes: pd.DataFrame, runs: pd.DataFrame, task: Task | float | None = None, stage: str = "final") -> pd.DataFrame:
    """Tidy T1: one row per (task, learner, attack, cost limit, method, seed), columns COLUMNS, methods in their order.

    episodes, runs  files of `evaluate` artefacts (several may be concatenated)
    task            whose cost limit counts, or a limit (cost per episode); default: each model's own, or else its task's
    Costs are sums over an episode; `steps` and `train_seconds` are those of the method itself, also for stage 'later'.
    Raises UserError where columns, the stage or a run are missing.
    """
    episodes, runs = (limited(need(frame, ["task"], where), task) for frame, where in ((episodes, "episodes"), (runs, "runs")))
    need(episodes, [*KEYS, "stage", "ret", "cost"], "episodes")
    need(runs, [*KEYS, "steps", "train_seconds", "artefact"], "runs")
    episodes = episodes[episodes.stage == stage]
    if episodes.empty:
        raise UserError(f"episodes: none of stage '{stage}'; run notebooks/05_evaluate.ipynb again.")
    if "trigger" in episodes and episodes.trigger.nunique() > 1:
        raise UserError("episodes: under several triggers; take one of them, or triggered_table.")
    if runs.duplicated(KEYS).any():
        raise UserError(f"runs: {_name(runs[runs.duplicated(KEYS)].iloc[0])} is listed twice; evaluate each model once.")
    facts = {key: run for key, run in zip(zip(*(runs[k] for k in KEYS)), runs.itertuples())}
    lines = []
    for key, group in episodes.groupby(KEYS, sort=False):
        line = dict(zip(KEYS, key))
        if key not in facts:
            raise UserError(f"runs: {_name(line)} has episodes but no run; run notebooks/05_evaluate.ipynb again.")
        known, limit = get_task(line["task"]), line["cost_limit"]
        ret, cost, run = group.ret.mean(), group.cost.mean(), facts[key]
        lines.append({**line, "return_mean": ret, "cost_mean": cost, "return_norm": normalised_return(known, ret),
                      "cost_norm": normalised_cost(known, cost, limit), "violation_rate": (group.cost > limit).mean(),
                      "cvar10_cost": cvar(group.cost), "episodes": len(group), "steps": run.steps,
                      "train_seconds": run.train_seconds, "artefact": run.artefact})
    return in_order(pd.DataFrame(lines, columns=COLUMNS))


def limited(frame: pd.DataFrame, task: Task | float | None = None) -> pd.DataFrame:
    """The frame with a column cost_limit: the one given, else the one that is there, else each task's own."""
    if task is not None:
        return frame.assign(cost_limit=float(task.cost_limit if isinstance(task, Task) else task))
    if "cost_limit" in frame:
        return frame.assign(cost_limit=frame.cost_limit.astype(float))
    return frame.assign(cost_limit=[float(get_task(name).cost_limit) for name in frame.task])


def later_table(episodes: pd.DataFrame, runs: pd.DataFrame, task: Task | float | None = None) -> pd.DataFrame:
    """The same after further ordinary training on the retain rows; empty where nothing was trained on."""
    if "stage" in episodes and not (episodes.stage == "later").any():
        return pd.DataFrame(columns=COLUMNS)
    return main_table(episodes, runs, task, stage="later")


def triggered_table(episodes: pd.DataFrame, runs: pd.DataFrame, task: Task | float | None = None) -> pd.DataFrame:
    """Tidy: the models that a trigger concerns, without it and under it: COLUMNS and `trigger`.

    trigger: the attack whose trigger the policy was shown, or 'none'. A clean model is listed under every trigger, since a strange
    observation may lead astray a policy that was never poisoned. Empty where no attack has a trigger.
    """
    shown = episodes[episodes.stage == "triggered"] if "trigger" in episodes else episodes.head(0)
    if shown.empty:
        return pd.DataFrame(columns=[*COLUMNS, "trigger"])
    attacks = [a for a in ATTACKS if a in set(shown.trigger)]
    parts = [main_table(episodes[episodes.attack.isin(["none", *attacks])], runs, task).assign(trigger="none")]
    parts += [main_table(shown[shown.trigger == a], runs, task, "triggered").assign(trigger=a) for a in attacks]
    return pd.concat(parts, ignore_index=True)


def beside(triggered: pd.DataFrame) -> pd.DataFrame:
    """`triggered_table` with one line per model and trigger: as under the trigger, and return_plain, cost_plain without it."""
    plain = triggered.loc[triggered.trigger == "none", [*KEYS, "return_mean", "cost_mean"]]
    plain = plain.rename(columns={"return_mean": "return_plain", "cost_mean": "cost_plain"})
    return triggered[triggered.trigger != "none"].merge(plain, "left", on=KEYS)


def in_order(tidy: pd.DataFrame) -> pd.DataFrame:
    """Rows by task and learner as they come, 'none' before the attacks, METHODS' order, seed. Unknown method: UserError."""
    unknown = sorted(set(tidy["method"]) - set(METHODS))
    if unknown:
        raise UserError(f"unknown method '{unknown[0]}'. Known: {', '.join(METHODS)}.")
    rank = {"task": list(dict.fromkeys(tidy["task"])), "learner": list(dict.fromkeys(tidy["learner"])),
            "attack": list(dict.fromkeys([*ATTACKS, *tidy["attack"]])), "method": list(METHODS)}
    by = lambda column: column.map(rank[column.name].index) if column.name in rank else column
    return tidy.sort_values(KEYS, key=by, kind="stable", ignore_index=True)


def cases(tidy: pd.DataFrame) -> list[tuple[tuple[str, str, str, float], pd.DataFrame, pd.DataFrame]]:
    """Per CASE: its rows and those of the clean learner, which knows no attack. Clean alone is a case."""
    attacked = tidy[tidy.attack != "none"]
    if attacked.empty:
        return [(key, rows, rows) for key, rows in tidy.groupby(CASE, sort=False)]
    clean = tidy[tidy.method == "clean"]
    same = lambda t, l, _, limit: clean[(clean.task == t) & (clean.learner == l) & (clean.cost_limit == limit)]
    return [(key, rows, same(*key)) for key, rows in attacked.groupby(CASE, sort=False)]


def summary(tidy: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Numbers per case and method: means over seeds, intervals over seeds, and shares of the retrained.

    return_low, return_high: 95% bootstrap over seeds. costs: per seed. return_share: of the retrained mean return.
    recovered: (C_poisoned - C) / (C_poisoned - C_retrained), where the poison pushed the mean cost over the limit.
    step_share: steps / the retrained model's. NaN: undefined.
    """
    need(tidy, COLUMNS, "tidy table")
    lines = []
    for (task, learner, attack, limit), rows in tidy.groupby(CASE, sort=False):
        means = rows.groupby("method")[["return_mean", "cost_mean", "steps"]].mean().reindex(list(METHODS))
        gold, bad = means.loc["retrain"], means.loc["poisoned"]
        gap = bad.cost_mean - gold.cost_mean if bad.cost_mean > limit else np.nan
        for method, own in rows.groupby("method", sort=False):
            low, high = bootstrap([own.return_mean], np.mean, seed=seed)
            repaired = method not in ("clean", "poisoned")
            lines.append({
                "task": task, "learner": learner, "attack": attack, "method": method, "return_mean": own.return_mean.mean(),
                "return_low": low, "return_high": high, "cost_mean": own.cost_mean.mean(), "costs": tuple(own.cost_mean),
                "safe": int((own.cost_mean <= limit).sum()), "seeds": len(own),
                "violation_rate": own.violation_rate.mean(), "cost_limit": limit,
                "return_share": own.return_mean.mean() / gold.return_mean if gold.return_mean > 0 else np.nan,
                "recovered": (bad.cost_mean - own.cost_mean.mean()) / gap if repaired and gap > 0 else np.nan,
                "step_share": own.steps.mean() / gold.steps if repaired else np.nan,
                "train_seconds": own.train_seconds.mean()})
    return pd.DataFrame(lines)


def aggregate(tidy: pd.DataFrame, column: str = "return_norm", reference: str = "finetune", lower_is_better: bool = False,
              seed: int = 0) -> pd.DataFrame:
    """Per method over all cases: iqm, low, high (stratified 95% bootstrap), runs, p_better.

    p_better: probability of improvement over `reference`, on the strata that both have; NaN where there is none.
    """
    strata = {m: {k: g[column].to_numpy() for k, g in rows.groupby(CASE)} for m, rows in tidy.groupby("method")}
    lines = []
    for method in [m for m in METHODS if m in strata]:
        own, other, sign = strata[method], strata.get(reference, {}), -1 if lower_is_better else 1
        shared = [k for k in own if k in other]
        pairs = [sign * own[k] for k in shared], [sign * other[k] for k in shared]
        better = probability_of_improvement(*pairs) if shared else np.nan
        pooled = np.concatenate(list(own.values()))
        lines.append((method, float(iqm(pooled)), *bootstrap(list(own.values()), seed=seed), len(pooled), better))
    return pd.DataFrame(lines, columns=["method", "iqm", "low", "high", "runs", "p_better"])


# -------------------------------------------------------------------------------------------------------------- claims
CLAIMS = {                             # claim -> how it is judged; the bounds come from the configuration
    "clean learner is safe on every seed": "largest cost <= limit",
    "clean learner returns at least {clean_return:g} on every seed": "smallest return >= bound",
    "attack works: the poisoned policy exceeds the limit on every seed": "smallest cost > limit",
    "{method} is at or under the limit on every seed": "largest cost <= limit",
    "{method} keeps at least {share_of_retrained_return:.0%} of the retrained return": "mean return / retrained >= bound",
    "{method} takes at most {share_of_training_steps:.0%} of the retraining steps": "largest steps / retrained steps <= bound",
    "{method} is still safe on every seed after further training": "largest cost <= limit",
}


def claims(tidy: pd.DataFrame, later: pd.DataFrame, thresholds: Mapping[str, Any], method: str = "saferule") -> pd.DataFrame:
    """What the claims come to: task, learner, attack, cost_limit, claim, value, threshold, rule, verdict, seeds.

    thresholds  clean_return {task: return}, share_of_retrained_return, share_of_training_steps (config.Thresholds; other
                keys are ignored). The cost limit is the table's.
    verdict     'supported' or 'not supported'; what was not measured is not supported. seeds: the value of every seed.
    """
    missing = {"clean_return", "share_of_retrained_return", "share_of_training_steps"} - set(thresholds)
    if missing:
        raise UserError(f"thresholds: {', '.join(sorted(missing))} missing; take them from config.Thresholds.")
    templates, lines = list(CLAIMS), []

    def judge(key, which, values, decide, threshold, holds, digits=1):
        """values: one per seed; decide: how they become the value judged."""
        claim = templates[which].format(**{**thresholds, "method": METHODS[method], "clean_return": threshold})
        values = np.asarray(values, float)
        value = float(decide(values)) if len(values) and not np.isnan(values).any() else np.nan
        lines.append({**dict(zip(CASE, key)), "claim": claim, "value": value, "threshold": float(threshold),
                      "rule": CLAIMS[templates[which]], "verdict": "supported" if holds(value, threshold) else "not supported",
                      "seeds": "/".join(number(v, digits) for v in values) or "not measured"})

    at_most, at_least, above = np.less_equal, np.greater_equal, np.greater      # all False for NaN
    cleaned = set()
    for key, rows, clean in cases(tidy):
        task, learner, attack, limit = key
        unharmed = (task, learner, "none", limit)
        if len(clean) and unharmed not in cleaned:
            cleaned.add(unharmed)
            judge(unharmed, 0, clean.cost_mean, np.max, limit, at_most)
            if task in thresholds["clean_return"]:
                judge(unharmed, 1, clean.return_mean, np.min, thresholds["clean_return"][task], at_least, 0)
        if attack == "none":
            continue
        seeds = sorted(set(rows.seed))                   # a seed that a method lacks is NaN: not measured, not supported
        bad, own, gold = (rows[rows.method == m].set_index("seed").reindex(seeds) for m in ("poisoned", method, "retrain"))
        after = later[(later[CASE] == list(key)).all(axis=1) & (later.method == method)].set_index("seed").reindex(seeds)
        share = own.return_mean.mean() / gold.return_mean.mean() if gold.return_mean.mean() > 0 else np.nan
        shares = own.return_mean / gold.return_mean.where(gold.return_mean > 0)
        judge(key, 2, bad.cost_mean, np.min, limit, above)
        judge(key, 3, own.cost_mean, np.max, limit, at_most)
        judge(key, 4, shares, lambda _, share=share: share, thresholds["share_of_retrained_return"], at_least, 2)
        judge(key, 5, own.steps / gold.steps, np.max, thresholds["share_of_training_steps"], at_most, 3)
        judge(key, 6, after.cost_mean, np.max, limit, at_most)
    return pd.DataFrame(lines, columns=[*CASE, "claim", "value", "threshold", "rule", "verdict", "seeds"])


# --------------------------------------------------------------------------------------------------------------- small
def number(value: float, digits: int = 1) -> str:
    """A number for people: no trailing zeros, a dash for NaN."""
    if np.isnan(value):
        return "–"
    text = f"{value:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def need(frame: pd.DataFrame, columns: Sequence[str], where: str) -> pd.DataFrame:
    """The frame; UserError naming the columns that it lacks."""
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        raise UserError(f"{where}: no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns)) or 'none'}.")
    return frame


def _name(line: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={line[k]}" for k in KEYS)
