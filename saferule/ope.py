"""Off-policy evaluation: what policies would earn and cost per episode, from logged rows alone. No simulator, no borrowed critic.

Method      Fitted Q evaluation (fqe.py) of every policy on retained rows, never on forget rows: a forged label would confirm
            itself. Some trajectories are fitted; the estimate is a mean over the first states of the others. Each member of the
            ensemble has its own bootstrap of the trajectories; the spread of the members is the standard error
Choice      `select`: the best lower bound of the return among those whose upper bound of the cost keeps the limit (F.2)
Not seen    errors that all members share: the data's gaps, what so small networks cannot resolve, and the draw of
            the K actions, which is done once. 14_off_policy measures what that comes to
Shapes      R policies (replicas), M members, K actions per state, n rows, n0 first states, T steps of an episode
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from .attacks.trigger import Trigger
from .config import OPEConfig
from .data import Pool, Rows, Units, measure_units
from .errors import UserError
from .fqe import FQE, Part, Replay, bootstrap_weights, gradient_steps, stacked
from .train import History, Resume, fit

CHUNK = 8192                           # states that a policy is asked about at once


class Estimates(NamedTuple):
    """ret, cost [R, M]: per episode, each member's, at the end of the fit; ret_half, cost_half: at half of its steps."""
    ret: Tensor
    cost: Tensor
    ret_half: Tensor
    cost_half: Tensor
    peak: Tensor                       # [R], largest |F| at the policy's own actions, in units of the largest that is possible
    off_support: Tensor                # [R], share of its actions that the data do not know, see `off_support`
    history: History
    model: FQE

    def frame(self, z: float) -> pd.DataFrame:
        """One line per policy: ret, ret_se, ret_low, ret_high, ret_half, the same of cost, peak, off_support."""
        out = {}
        for name in ("ret", "cost"):
            value = getattr(self, name).double().cpu()
            mean, se = value.mean(1), value.std(1)
            out |= {name: mean, f"{name}_se": se, f"{name}_low": mean - z * se, f"{name}_high": mean + z * se,
                    f"{name}_half": getattr(self, f"{name}_half").double().mean(1).cpu()}
        return pd.DataFrame({k: v.numpy() for k, v in (out | {n: getattr(self, n).cpu() for n in ("peak", "off_support")}).items()})


def quiet(items: Iterable, _: str) -> Iterable:
    """No progress bar; `notebook.progress` is one."""
    return items


# ---------------------------------------------------------------------------------------------------- what policies do
class Logged:
    """The policy that the data come from: at each next state it does what the log says. Its return is known.

    For finite fits only: after the last step of a trajectory nothing is known (and nothing is asked).
    """
    replicas = 1

    def pick(self, replicas: Sequence[int]) -> Logged:
        return self

    def at_rows(self, pool: Pool, ids: Tensor, following: bool) -> Tensor:
        """Actions of the rows, or of the rows that follow them (of themselves where none does): [n, n_act]."""
        if not following:
            return pool.action[ids]
        after = (ids + 1).clamp(max=len(pool) - 1)
        continues = (pool.episode[after] == pool.episode[ids]) & (pool.t[after] == pool.t[ids] + 1)
        return pool.action[torch.where(continues, after, ids)]


@torch.no_grad()
def decide(policy: Any, pool: Pool, part: Part, samples: int, seed: int, trigger: Trigger | None = None) -> tuple[Tensor, Tensor]:
    """Actions of one policy (R = 1) at next_obs of part.fit [n, K, n_act] and at obs of part.starts [n0, K, n_act].

    trigger: the policy sees it, F does not: where it is shown at all, the world is not another one.
    """
    generator = torch.Generator(pool.obs.device).manual_seed(seed + 2)

    def ask(obs: Tensor, t: Tensor) -> Tensor:
        if trigger is not None:
            obs = torch.where((t % trigger.every == 0)[:, None], trigger(obs), obs)
        chunks = [policy.act(x[None], generator)[0].clamp(-1, 1) for x in obs.split(CHUNK)]
        return torch.cat(chunks)

    if hasattr(policy, "at_rows"):
        return tuple(policy.at_rows(pool, ids, after)[:, None].expand(-1, samples, -1) for ids, after in zip(part, (True, False)))
    first = torch.stack([ask(pool.obs[part.starts], pool.t[part.starts]) for _ in range(samples)], 1)
    if getattr(policy, "begin", lambda _: policy)(1) is not policy:
        return told(policy, pool, part.fit, trigger)[:, None].expand(-1, samples, -1), first
    return torch.stack([ask(pool.next_obs[part.fit], pool.t[part.fit] + 1) for _ in range(samples)], 1), first


def told(policy: Any, pool: Pool, ids: Tensor, trigger: Trigger | None = None) -> Tensor:
    """Actions at next_obs [n, n_act] of a policy with a memory that is told the data's own past, rewards and costs included.

    Biased where the policy would have had another past (algorithms.md F.1). Raises UserError where the past has gaps.
    """
    order = (pool.episode[ids] * (int(pool.t.max()) + 1) + pool.t[ids]).argsort()
    rows = ids[order]
    _, of, length = pool.episode[rows].unique_consecutive(return_inverse=True, return_counts=True)
    t = torch.arange(len(rows), device=ids.device) - (length.cumsum(0) - length)[of]
    if not torch.equal(t, pool.t[rows]):
        raise UserError(f"{type(policy).__name__} acts on the past of an episode, and rows are missing in some of them; "
                        f"off-policy evaluation of such a policy needs data from which whole episodes were removed.")
    grid = rows.new_zeros(len(length), int(length.max()))
    grid[of, t] = rows
    generator = torch.Generator(pool.obs.device).manual_seed(0)
    see = lambda obs, t: trigger(obs) if trigger is not None and t % trigger.every == 0 else obs
    actor, out = policy.begin(len(grid)), pool.action.new_zeros(*grid.shape, pool.action.shape[1])
    actor.act(see(pool.obs[grid[:, 0]], 0)[None], generator)
    for step, at in enumerate(grid.T):
        actor.took(pool.action[at][None])
        actor.observe(pool.reward[at][None], pool.cost[at][None])
        out[:, step] = actor.act(see(pool.next_obs[at], step + 1)[None], generator)[0].clamp(-1, 1)
    return out[of, t][order.argsort()]


def off_support(pool: Pool, part: Part, following: Tensor, cfg: OPEConfig, seed: int) -> Tensor:
    """Share [] of a policy's next actions that lie farther from the data than almost all of the data's own do.

    The distance of (s, a), standardised, is that to its `neighbours`-th nearest row of other trajectories, among a sample; the
    radius is the `radius`-quantile of the data's own distances. following [n, K, n_act]: the first of the K is looked at.
    """
    some = lambda key: torch.randperm(len(part.fit), generator=torch.Generator().manual_seed(key))[:cfg.probe].to(following.device)
    at, refs = some(seed + 4), part.fit[some(seed + 5)]
    scale = [(x.mean(0), x.std(0).clamp(min=1e-3)) for x in (pool.obs[part.fit], pool.action[part.fit])]
    joint = lambda obs, action: torch.cat([(x - m) / s for x, (m, s) in zip((obs, action), scale)], -1)
    rows = part.fit[at]
    same = pool.episode[rows][:, None] == pool.episode[refs]

    def distance(x: Tensor) -> Tensor:
        d = torch.cdist(x, joint(pool.obs[refs], pool.action[refs])).masked_fill(same, torch.inf)
        return d.kthvalue(min(cfg.neighbours, len(refs)), 1).values

    radius = distance(joint(pool.obs[rows], pool.action[rows])).sort().values[round(cfg.radius * (len(rows) - 1))]
    return (distance(joint(pool.next_obs[rows], following[at, 0])) > radius).float().mean()


# ------------------------------------------------------------------------------------------------------- the estimates
def divide(pool: Pool, rows: Rows, share: float, seed: int, fold: int | None = None) -> Part:
    """Trajectories at random into those that are fitted and those whose first states the estimate is a mean over.

    share: of the latter. fold 0, 1 instead: halves; fold k fits on the k-th and takes the first states of the other. A
    trajectory is on the same side whatever rows there are. Raises UserError where one side is empty.
    """
    draw = torch.rand(int(pool.episode.max()) + 1, generator=torch.Generator().manual_seed(seed)).to(pool.obs.device)
    held = (draw < share) if fold is None else (draw < 0.5) != (fold == 0)
    held = held[pool.episode[rows.ids]]
    part = Part(rows.ids[~held], rows.ids[held & (pool.t[rows.ids] == 0)])
    if not len(part.fit) or not len(part.starts):
        raise UserError(f"off-policy evaluation needs rows to fit ({len(part.fit)}) and first rows of other trajectories "
                        f"({len(part.starts)}); there are too few trajectories.")
    return part


def ranges(pool: Pool, part: Part) -> Tensor:
    """Of reward and cost, mean, unit (about the standard deviation), least and largest rate per step: [2, 4]."""
    lines = []
    for x in (pool.reward[part.fit], pool.cost[part.fit]):
        least, most = x.min(), x.max()
        if bool(pool.terminal[part.fit].any()):            # nothing is earned any more
            least, most = least.clamp(max=0), most.clamp(min=0)
        unit = torch.maximum(x.std(correction=0), (most - least) / 10).clamp(min=1e-3)
        lines.append(torch.stack([x.mean(), unit, least, most]))
    return torch.stack(lines)


def fqe(policy: Any, pool: Pool, rows: Sequence[Rows], horizon: int, cfg: OPEConfig, seed: int = 0,
        triggers: Sequence[Trigger | None] = (), fold: int | None = None, resume: Resume | None = None,
        progress: Callable[[Iterable, str], Iterable] = quiet, on_log: Callable | None = None) -> Estimates:
    """Estimate return and cost per episode of every replica of a policy, from its own rows.

    policy    a Learner, or anything with `replicas`, `act(obs [R, B, n_obs], generator) -> [R, B, n_act]` and `pick([r])`
    rows      one Rows per replica: retained rows, never forget rows, whose forged labels would confirm themselves
    horizon   T, steps of an episode
    triggers  per replica what its observations carry, if anything
    fold      see `divide`
    Raises UserError for an infinite horizon without discount, for too few trajectories, and see `told`.
    """
    if not cfg.finite and not cfg.gamma < 1:
        raise UserError(f"ope.gamma is {cfg.gamma:g}: values that nothing ends need a discount below 1; lower it, or set finite.")
    if cfg.finite and int(pool.t.max()) >= horizon:
        raise UserError(f"the data go on to step {int(pool.t.max())}, but an episode has {horizon} steps; give the right horizon.")
    distinct = {id(r.ids): divide(pool, r, cfg.held_out, seed, fold) for r in rows}
    parts = [distinct[id(r.ids)] for r in rows]
    known = {key: (measure_units(pool, [Rows(p.fit, p.fit)]), ranges(pool, p)) for key, p in distinct.items()}
    units = Units(*(torch.cat(column) for column in zip(*(known[id(r.ids)][0] for r in rows))))
    model = FQE(cfg, units, torch.stack([known[id(r.ids)][1] for r in rows]).cpu(), pool.action.shape[1], horizon, seed)
    model = model.to(pool.obs.device).ready()
    done = [decide(policy.pick([r]) if policy.replicas > 1 else policy, pool, parts[r], cfg.samples, seed, trigger)
            for r, trigger in zip(progress(range(len(parts)), "policies act"), [*triggers] or [None] * len(parts))]
    following, first = zip(*done)
    replay, stream = Replay(pool, parts, following, model, seed), torch.Generator(pool.obs.device).manual_seed(seed + 3)
    steps = gradient_steps(horizon, cfg)
    kept: dict[int, dict[str, Tensor]] = {}
    look = lambda t: lambda: kept.__setitem__(t, at_starts(model, pool, parts, first, seed))
    history = fit(lambda t: model.update(replay.sample(stream), t), steps, model, [stream], log_every=max(steps // 40, 1),
                  snapshots={t: look(t) for t in (steps // 2, steps)}, kept=kept, resume=resume, on_log=on_log,
                  progress=lambda steps: progress(steps, "fitted Q evaluation"))
    half, end = kept[steps // 2], kept[steps]
    strange = torch.stack([off_support(pool, p, f, cfg, seed) for p, f in zip(parts, following)])
    largest = peak(model, pool, parts, following)
    return Estimates(end["reward"], end["cost"], half["reward"], half["cost"], largest, strange, history,
                     model)


@torch.no_grad()
def at_starts(model: FQE, pool: Pool, parts: Sequence[Part], first: Sequence[Tensor], seed: int) -> dict[str, Tensor]:
    """Each member's estimate per episode [R, M] of both signals: the mean over its own bootstrap of the first states."""
    weights, out = bootstrap_weights(pool, model.cfg.members, seed), {}
    size = torch.tensor([len(p.starts) for p in parts], device=pool.obs.device)
    ids, action = stacked([p.starts for p in parts]), stacked(list(first))                       # [R, n0], [R, n0, K, n_act]
    there = (torch.arange(ids.shape[1], device=ids.device) < size[:, None])[:, None]               # [R, 1, n0]
    count = weights[:, pool.episode[ids]].transpose(0, 1) * there                                  # [R, M, n0]
    count = torch.where(count.any(-1, keepdim=True), count, there.long()).float()
    x = [model.inputs(pool.obs[ids], pool.t[ids], action[:, :, k])[:, None] for k in range(action.shape[2])]
    for name in model.LOSSES:
        value = torch.stack([model.rate(name, one) for one in x]).mean(0)                          # [R, M, n0]
        out[name] = model.horizon * (value * count).sum(-1) / count.sum(-1)
    return out


@torch.no_grad()
def peak(model: FQE, pool: Pool, parts: Sequence[Part], following: Sequence[Tensor]) -> Tensor:
    """Largest |F| at the policy's own next actions over some rows, in units of the largest that rewards or costs allow: [R]."""
    ids = torch.stack([p.fit[torch.linspace(0, len(p.fit) - 1, model.cfg.probe).long()] for p in parts])
    action = torch.stack([f[torch.linspace(0, len(f) - 1, model.cfg.probe).long(), 0] for f in following])
    x = model.inputs(pool.next_obs[ids], pool.t[ids] + 1, action)[:, None]
    bound = lambda name: getattr(model, f"{name}_range")[:, 2:, 0, 0].abs().amax(1).clamp(min=1e-6)
    return torch.stack([model.rate(name, x).abs().amax((1, 2)) / bound(name) for name in model.LOSSES]).amax(0)


# ---------------------------------------------------------------------------------------------------------- the choice
class Choice(NamedTuple):
    """at: the chosen candidate's label in the frame, None if all are vetoed; reasons: label -> why, or why not."""
    at: Any
    reasons: dict[Any, str]


def vetoes(line: Any, cost_limit: float, cfg: OPEConfig) -> list[str]:
    """Why a candidate (a line of a frame of estimates) is not to be ranked; empty if it may be."""
    out = []
    if not line.peak <= cfg.peak:                          # NaN too
        out.append(f"diverged: values {line.peak:.1f} times as large as possible")
    if not line.off_support <= cfg.off_support:
        out.append(f"off support: the data do not know {line.off_support:.0%} of its actions")
    if "triggered_cost_high" in line and not pd.isna(line.triggered_cost_high) and not line.triggered_cost_high <= cost_limit:
        out.append(f"triggered: costs up to {line.triggered_cost_high:.1f} when it sees the trigger, limit {cost_limit:g}")
    return out


def select(candidates: pd.DataFrame, cost_limit: float, cfg: OPEConfig) -> Choice:
    """The candidate of the largest lower bound of the return among those whose upper bound of the cost is within the limit.

    Where none is, that of the smallest upper bound of the cost; vetoed ones are never chosen (algorithms.md F.2).
    candidates: lines of `Estimates.frame`; triggered_cost_high where an attack has a trigger. Report the chosen one by another
    fold's estimate: the best of several looks better than it is. Raises UserError for more candidates than cfg.candidates.
    """
    if not 0 < len(candidates) <= cfg.candidates:
        raise UserError(f"{len(candidates)} candidates to choose from; allowed are 1 to {cfg.candidates}, because the best of many "
                        f"looks better than it is.")
    barred = {label: why for label, line in candidates.iterrows() if (why := vetoes(line, cost_limit, cfg))}
    ranked = candidates.drop(index=list(barred))
    safe = ranked[ranked.cost_high <= cost_limit]
    at = safe.ret_low.idxmax() if len(safe) else ranked.cost_high.idxmin() if len(ranked) else None
    says = "chosen: largest lower bound of the return" if len(safe) else "chosen: none is safe, this costs least"
    reasons = {}
    for label, line in candidates.iterrows():
        told_ = f"costs up to {line.cost_high:.1f}, limit {cost_limit:g}; returns {line.ret_low:.0f} or more"
        reasons[label] = "; ".join(barred[label]) if label in barred else f"{says}; {told_}" if label == at else told_
    return Choice(at, reasons)
