"""Forgetting audits: is the influence of the forget rows gone from a repaired model, or only out of sight?

Every audit puts each model of one attack between two ends whose answer is known, the poisoned models ('contained') and those
that were retrained without the forget rows ('gone'), which are audited like all others. Where an audit cannot tell its two ends
apart, its answer about anything else is worth nothing. Nothing here imports a simulator.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..config import AuditConfig
from ..data import Pool, Rows
from ..train import Learner, Resume
from . import contained, distance, membership
from .numbers import auc, interval
from .probes import Trajectories, actions, every_few, go_on, has_critics, remembers, trajectories, values
from .relearning import first_time, regained, relearn, separated

AUDITS = {                             # name -> how it reads for people
    "contained_q": "contained, reward critic", "contained_c": "contained, cost critic",
    "contained_published": "contained, as published",
    "mia_q": "membership AUC, reward critic", "mia_c": "membership AUC, cost critic",
    "delta_mia_q": "AUC less retrained, reward critic", "delta_mia_c": "AUC less retrained, cost critic",
    "distance_action": "distance to retrained, actions", "distance_q": "distance to retrained, reward critic",
    "distance_c": "distance to retrained, cost critic",
    "closure_action": "closure, actions", "closure_q": "closure, reward critic", "closure_c": "closure, cost critic",
    "relearn": "relearn time / retrained",
}
COLUMNS = ["task", "learner", "attack", "method", "seed", "cost_limit", "audit", "value", "low", "high", "n", "artefact"]


class HeldOut(NamedTuple):
    """Trajectories that nobody trained on, forged as the forget rows are: rows of a pool of their own."""
    pool: Pool
    ids: Tensor


class Findings(NamedTuple):
    audits: pd.DataFrame               # COLUMNS but task and learner
    outcomes: pd.DataFrame             # of the corrected TrajAuditor: shares of trajectories contained, gone, neither
    relearning: pd.DataFrame           # curves: attack, method, seed, cost_limit, step, share
    notes: tuple[str, ...]             # what could not be audited, and why; how alike members and non-members are


class Shadows(NamedTuple):
    """Fine-tuned copies, and for each the position of its original and the family: in, out or published."""
    learner: Learner
    base: tuple[int, ...]
    family: tuple[str, ...]


def audit(models: Learner, lines: Sequence[Mapping[str, Any]], trained: Learner, pool: Pool,
          held_out: Mapping[str, HeldOut | str], cfg: AuditConfig, resume: Callable[[str], Resume | None] = lambda part: None,
          progress: Callable[[str], Callable] = lambda what: iter) -> Findings:
    """All audits of models that belong together.

    models    weights; lines: attack, method, seed, cost_limit, artefact of each. The first ones are `trained`'s replicas
    trained   the poisoned and retrained models with their optimisers' moments
    held_out  per attack trajectories that nobody trained on, or why there are none
    resume    part ('shadows', 'relearn') -> where its training state is kept
    """
    cases = list(dict.fromkeys((line["attack"], line["cost_limit"]) for line in lines if line["attack"] != "none"))
    of = {case: [i for i, line in enumerate(lines) if (line["attack"], line["cost_limit"]) == case] for case in cases}
    out = Findings(pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), ())
    log = _Log(lines)
    shadows = None
    if has_critics(models):
        shadows = make_shadows(trained, lines[:trained.replicas], pool, cfg, resume("shadows"), progress("shadows"))
    else:
        log.notes.append(f"{type(models).__name__} has no values of state and action: only its actions are audited.")
    for case in cases:
        attack, mine = case[0], of[case]
        forget = pool.rows(f"{attack}/forget")
        part, described = models.pick(mine), [lines[i] for i in mine]
        along = trajectories(pool, forget.ids[forget.weight > 0], cfg.trajectories, cfg.seed)
        audit_distance(log, part, described, pool, attack, along, cfg)
        if shadows:
            audit_contained(log, part, described, trained, shadows, lines, pool, along, cfg)
            audit_membership(log, part, described, pool, attack, held_out.get(attack, "none were handed in"), cfg)
    curves = pd.DataFrame()
    if shadows:
        everyone = [i for case in cases for i in of[case]]
        curves = audit_relearning(log, models.pick(everyone), [lines[i] for i in everyone], pool, cfg, resume("relearn"),
                                  progress("relearning"))
    return out._replace(audits=log.frame(), outcomes=pd.DataFrame(log.outcomes), relearning=curves, notes=tuple(log.notes))


class _Log:
    """Rows of the table as they come."""

    def __init__(self, lines: Sequence[Mapping[str, Any]]):
        self.rows: list[dict[str, Any]] = []
        self.outcomes: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def add(self, line: Mapping[str, Any], name: str, value: float, low: float, high: float, n: int) -> None:
        if np.isfinite(value):
            self.rows.append({**_key(line), "audit": name, "value": float(value), "low": float(low), "high": float(high),
                              "n": int(n), "artefact": line["artefact"]})

    def frame(self) -> pd.DataFrame:
        rank = {name: i for i, name in enumerate(AUDITS)}
        return pd.DataFrame(sorted(self.rows, key=lambda row: rank[row["audit"]]), columns=COLUMNS[2:])


def _key(line: Mapping[str, Any]) -> dict[str, Any]:
    return {k: line[k] for k in ("attack", "method", "seed", "cost_limit")}


def _quantiles(drawn: np.ndarray) -> np.ndarray:
    """2.5% and 97.5%, of what is defined."""
    return np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975]) if np.isfinite(drawn).any() else np.full(2, np.nan)


def _at(lines: Sequence[Mapping[str, Any]], method: str) -> list[int]:
    return [i for i, line in enumerate(lines) if line["method"] == method]


# ------------------------------------------------------------------------------------------------------- TrajAuditor
def make_shadows(trained: Learner, lines: Sequence[Mapping[str, Any]], pool: Pool, cfg: AuditConfig, resume: Resume | None = None,
                 progress: Callable = iter) -> Shadows:
    """Copies of the poisoned models that go on with the poisoned rows (in) or the retained ones (published), and of the retrained
    models with the retained rows (out), all as one stacked run."""
    plan = [(i, family, f"{line['attack']}/{part}") for i, line in enumerate(lines)
            for method, family, part, copies in (("poisoned", "in", "poisoned", cfg.copies),
                                                 ("retrain", "out", "retain", cfg.copies),
                                                 ("poisoned", "published", "retain", cfg.published_copies))
            if line["method"] == method for _ in range(copies)]
    base, family, condition = zip(*plan)
    rows = {c: pool.rows(c) for c in dict.fromkeys(condition)}
    learner = trained.pick(base)
    go_on(learner, pool, [rows[c] for c in condition], cfg.shadow_steps, 30_000 + cfg.seed, resume, progress)
    return Shadows(learner, base, family)


def audit_contained(log: _Log, models: Learner, lines: Sequence[Mapping[str, Any]], trained: Learner, shadows: Shadows,
                    origin: Sequence[Mapping[str, Any]], pool: Pool, along: Trajectories, cfg: AuditConfig) -> None:
    """`contained_q`, `contained_c`, `contained_published` of the models of one case. origin: lines of the shadows' originals."""
    case = lambda line: (line["attack"], line["cost_limit"]) == (lines[0]["attack"], lines[0]["cost_limit"])
    here = [j for j, i in enumerate(shadows.base) if case(origin[i])]
    copies, base, family = shadows.learner.pick(here), [shadows.base[j] for j in here], [shadows.family[j] for j in here]
    poisoned = [i for i, line in enumerate(origin[:trained.replicas]) if line["method"] == "poisoned" and case(line)]
    judge, std = trained.pick(poisoned), pool.obs[pool.rows("clean").ids].std(0)
    shape, mask = (*along.mask.shape, pool.obs.shape[1]), along.mask.cpu()
    draw = torch.Generator(pool.obs.device).manual_seed(cfg.seed)
    noise = lambda: cfg.noise * std * torch.randn(shape, generator=draw, device=std.device)
    vector = lambda judge, action, noise: contained.value_vectors(judge, pool, along, action, cfg.window, noise).cpu()
    done, theirs = actions(models, pool, along, seed=cfg.seed)[0], actions(copies, pool, along, seed=cfg.seed)[0]
    audited, known = noise(), [j for j, f in enumerate(family) if f != "published"]
    vectors = torch.stack([vector(judge, a, audited) for a in done])                   # [A, 2, m, T]
    reference = torch.stack([vector(judge, theirs[j], noise()) for j in known])
    seed_of = [origin[base[j]]["seed"] for j in known]
    for seed in dict.fromkeys(line["seed"] for line in lines):
        mine = [a for a, line in enumerate(lines) if line["seed"] == seed]
        use = [[k for k, j in enumerate(known) if family[j] == kind and seed_of[k] != seed] for kind in ("in", "out")]
        for c, name in enumerate(("contained_q", "contained_c") if min(map(len, use)) > 1 else ()):
            found = contained.classify(vectors[mine, c], [reference[u, c] for u in use], [[base[known[k]] for k in u] for u in use],
                                       mask, cfg.alpha)
            for a, verdict in zip(mine, found):
                _share(log, lines[a], name, verdict == contained.CONTAINED, cfg)
                shares = {k: float((verdict == v).double().mean()) for v, k in enumerate(("contained", "gone", "neither"))}
                log.outcomes.append({**_key(lines[a]), "audit": name, **shares, "n": len(verdict)})
    if len(set(seed_of)) < 3:
        log.notes.append(f"{lines[0]['attack']}: {len(set(seed_of))} training seed(s); the corrected TrajAuditor wants two besides "
                         f"the audited model's own, to know the spread between seeds.")
    rough = lambda: cfg.published_noise * (torch.randn(shape, generator=draw, device=std.device) - 0.5)
    by_seed = {origin[i]["seed"]: i for i in poisoned}
    for seed, i in by_seed.items():
        own, used = trained.pick([i]), [j for j, f in enumerate(family) if f == "published" and base[j] == i]
        passes = torch.stack([vector(own, theirs[j], rough())[0] for j in used for _ in range(cfg.published_passes)])
        for a in [a for a, line in enumerate(lines) if line["seed"] == seed]:
            verdict = contained.looks_contained_as_published(vector(models.pick([a]), done[a], rough())[0], passes, mask,
                                                             cfg.published_alpha)
            _share(log, lines[a], "contained_published", verdict, cfg)


def _share(log: _Log, line: Mapping[str, Any], name: str, yes: Tensor, cfg: AuditConfig) -> None:
    """A share of trajectories, with its bootstrap interval."""
    yes = yes.double().numpy()
    log.add(line, name, yes.mean(), *interval(lambda i: yes[i].mean(-1), len(yes), cfg.bootstrap, cfg.seed), n=len(yes))


# -------------------------------------------------------------------------------------------------- membership inference
def audit_membership(log: _Log, models: Learner, lines: Sequence[Mapping[str, Any]], pool: Pool, attack: str,
                     others: HeldOut | str, cfg: AuditConfig) -> None:
    """`mia_q`, `mia_c` and their differences to the retrained models' mean."""
    if isinstance(others, str):
        log.notes.append(f"{attack}: no membership inference: {others}")
        return
    forget = pool.rows(f"{attack}/forget")
    inside, outside = trajectories(pool, forget.ids[forget.weight > 0]), trajectories(others.pool, others.ids)
    look = [membership.features(p, t) for p, t in ((pool, inside), (others.pool, outside))]
    i, j = membership.match(*look)
    keep = np.random.default_rng(cfg.seed).permutation(len(i))[:cfg.trajectories or None]
    i, j = i[keep], j[keep]
    take = lambda t, at: Trajectories(t.ids[at], t.mask[at])
    member, other = (membership.scores(models, p, t, cfg.seed).double().cpu().numpy()
                     for p, t in ((pool, take(inside, i)), (others.pool, take(outside, j))))             # [2, R, n]
    means = [f"{x[at, 0].mean():.0f}" for x, at in zip(look, (i, j))]
    log.notes.append(f"{attack}: membership inference compares {len(i)} forget trajectories of mean return {means[0]} (as "
                     f"labelled) with {len(j)} held-out ones of {means[1]}.")
    gold = _at(lines, "retrain")
    for k, end in enumerate("qc"):
        value = np.array([auc(member[k, a], other[k, a]) for a in range(len(lines))])
        drawn = membership.resampled_auc(member[k], other[k], cfg.bootstrap, cfg.seed)                   # [reps, R]
        for a, line in enumerate(lines):
            log.add(line, f"mia_{end}", value[a], *np.quantile(drawn[:, a], [0.025, 0.975]), n=len(i))
            rest = [g for g in gold if g != a]
            if rest:
                gap = drawn[:, a] - drawn[:, rest].mean(1)
                log.add(line, f"delta_mia_{end}", value[a] - value[rest].mean(), *np.quantile(gap, [0.025, 0.975]), n=len(i))


# ------------------------------------------------------------------------------------------------ distance to retrained
def audit_distance(log: _Log, models: Learner, lines: Sequence[Mapping[str, Any]], pool: Pool, attack: str, along: Trajectories,
                   cfg: AuditConfig) -> None:
    """`distance_*` and `closure_*` at forget rows; needs two retrained models at least."""
    gold = _at(lines, "retrain")
    if len(gold) < 2:
        log.notes.append(f"{attack}: {len(gold)} retrained model(s); distances are in units of that between two, train more seeds.")
        return
    if remembers(models):                              # it has to see the episodes from their start
        poisoned, forget = pool.rows(f"{attack}/poisoned").ids, along.ids[along.mask]
        along = trajectories(pool, poisoned[torch.isin(pool.episode[poisoned], pool.episode[forget])])
        along = along._replace(mask=along.mask & torch.isin(along.ids, forget))
        acted = actions(models, pool, along, 1, cfg.seed)
    else:
        along = every_few(along, cfg.rows)
        acted = actions(models, pool, along, cfg.samples, cfg.seed)
    found = {"action": (*distance.action_distances(acted, acted[:, gold], along.mask), False)}
    if has_critics(models):
        flat = along.ids.flatten()
        both = [v.view(-1, *along.mask.shape) for v in values(models, pool.obs[flat], pool.action[flat])]
        found |= {end: (*distance.value_distances(v, v[gold], along.mask), True) for end, v in zip("qc", both)}
    for name, (sums, rows, root) in found.items():
        sums, rows, m = sums.double().cpu().numpy(), rows.cpu().numpy(), len(rows)
        (value,) = distance.to_retrained(sums, rows, gold, root, np.arange(m)[None])
        drawn = distance.to_retrained(sums, rows, gold, root, np.random.default_rng(cfg.seed).integers(m, size=(cfg.bootstrap, m)))
        close = distance.closures(value[None], _at(lines, "poisoned"))[0]
        close_drawn = distance.closures(drawn, _at(lines, "poisoned"))
        for a, line in enumerate(lines):
            log.add(line, f"distance_{name}", value[a], *np.quantile(drawn[:, a], [0.025, 0.975]), n=m)
            log.add(line, f"closure_{name}", close[a], *_quantiles(close_drawn[:, a]), n=m)


# ---------------------------------------------------------------------------------------------------------- relearn time
def audit_relearning(log: _Log, models: Learner, lines: Sequence[Mapping[str, Any]], pool: Pool, cfg: AuditConfig,
                     resume: Resume | None = None, progress: Callable = iter) -> pd.DataFrame:
    """`relearn`, of every case at once, and the curves behind it.

    A censored ratio is a bound from below: its low is the value, its high empty. Otherwise both are empty.
    """
    draw, probed, poison = torch.Generator().manual_seed(cfg.seed), {}, {}
    for attack in dict.fromkeys(line["attack"] for line in lines):
        forget = pool.rows(f"{attack}/forget")
        ids = forget.ids[forget.weight > 0]
        poison[attack] = Rows(ids, torch.ones(len(ids), device=ids.device))
        probed[attack] = ids[torch.randint(len(ids), (cfg.relearn_rows,), generator=draw).to(ids.device)]
    steps, acted = relearn(models, pool, [poison[line["attack"]] for line in lines], [probed[line["attack"]] for line in lines],
                           cfg.relearn_steps, cfg.relearn_every, 40_000 + cfg.seed, resume, progress)
    curves = []
    for case in dict.fromkeys((line["attack"], line["cost_limit"]) for line in lines):
        mine = [a for a, line in enumerate(lines) if (line["attack"], line["cost_limit"]) == case]
        own = [lines[a] for a in mine]
        bad, gold = _at(own, "poisoned"), _at(own, "retrain")
        share = regained(acted[:, mine], bad, gold) if bad and len(gold) > 1 else None                     # [P, A]
        if share is None or not separated(share[0, bad], share[0, gold]):
            log.notes.append(f"{case[0]}: no relearn time: at the forget states the actions of the poisoned models are not told "
                             f"from those of the retrained ones (two or more are needed).")
            continue
        curves += [{**_key(line), "step": t, "share": share[p, a]} for a, line in enumerate(own) for p, t in enumerate(steps)]
        times = [first_time(steps, share[:, a], cfg.relearn_share) for a in range(len(own))]
        if not all(times[g][1] for g in gold):             # nothing to compare with
            log.notes.append(f"{case[0]}: no relearn time: not every retrained model relearned within {steps[-1]} steps; raise "
                             f"relearn_steps.")
            continue
        for a, line in enumerate(own):
            time, reached = times[a]
            ratio = time / np.median([times[g][0] for g in gold if g != a])
            log.add(line, "relearn", ratio, np.nan if reached else ratio, np.nan, n=cfg.relearn_rows)
    return pd.DataFrame(curves)
