"""Pool and rows: one immutable pool of transitions, and data conditions that are nothing but sets of row ids.

Shapes      N rows of the pool, n rows of a condition, R replicas, B batch
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .errors import UserError

FIELDS = ("obs", "action", "reward", "cost", "next_obs", "terminal", "timeout")


class Batch(NamedTuple):
    """Transitions, every field [R, B, ...]. `done` means terminal, never time-out (parity mode says otherwise)."""
    obs: Tensor
    action: Tensor
    reward: Tensor
    cost: Tensor
    next_obs: Tensor
    done: Tensor
    steps: Tensor | float = 1.0        # environment steps that reward and cost sum over: bootstrap with gamma ** steps
    weight: Tensor | float = 1.0       # trust in a forget row, in [0, 1]
    first: Tensor | None = None        # 1 where the row starts an episode (COptiDICE)
    init_obs: Tensor | None = None     # states that start an episode, drawn by themselves (COptiDICE)


class Rows(NamedTuple):
    """A set of pool rows: ids int64 [n], weights float32 [n] in [0, 1].

    context: float32 [n, k], what a learner appends to obs and next_obs of these rows, in its own units (most: nothing).
    """
    ids: Tensor
    weight: Tensor
    context: Tensor | None = None


class Units(NamedTuple):
    """What a learner divides by: obs_mean, obs_std [R, n_obs]; reward_scale [R]."""
    obs_mean: Tensor
    obs_std: Tensor
    reward_scale: Tensor


class Pool:
    """N transitions that never change; attacks append rows, and conditions select them.

    Columns: obs, next_obs [N, n_obs]; action [N, n_act]; reward, cost [N] float32; terminal, timeout [N] bool;
    episode, t [N] int64; replaces [N] int64, the row an attack's row stands in for (-1: none); origin [N] int16, 0 for
    the original rows and k for those of the k-th attack. `attacks` names them in that order.
    """

    def __init__(self, columns: Mapping[str, Tensor], attacks: Sequence[str] = (),
                 forget: Mapping[str, Rows] | None = None):
        self.columns = dict(columns)
        self.attacks = tuple(attacks)
        self._forget = dict(forget or {})              # only where the forget rows are not simply the attack's own rows

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["columns"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __len__(self) -> int:
        return len(self.reward)

    # ------------------------------------------------------------------------------------------------ in and out
    @classmethod
    def from_columns(cls, columns: Mapping[str, np.ndarray | Tensor]) -> Pool:
        """A pool of original rows from the seven FIELDS; an episode ends at a terminal or time-out row."""
        missing = [name for name in FIELDS if name not in columns]
        if missing:
            raise UserError(f"columns {', '.join(missing)} are missing; a pool needs {', '.join(FIELDS)}.")
        out = {name: torch.as_tensor(np.asarray(columns[name])) for name in FIELDS}
        out = {k: v.bool() if k in ("terminal", "timeout") else v.float() for k, v in out.items()}
        n = len(out["reward"])
        for name, column in out.items():
            if len(column) != n:
                raise UserError(f"'{name}' has {len(column):,} rows but 'reward' has {n:,}; every transition needs both.")
        end = out["terminal"] | out["timeout"]
        episode = torch.cat([torch.zeros(1, dtype=torch.int64), end[:-1].long().cumsum(0)])
        first = torch.searchsorted(episode, torch.unique(episode))             # [n_episodes] row of t = 0
        out["episode"], out["t"] = episode, torch.arange(n) - first[episode]
        out["replaces"] = torch.full((n,), -1, dtype=torch.int64)
        out["origin"] = torch.zeros(n, dtype=torch.int16)
        return cls(out)

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the attacks' names, for a safetensors file."""
        extra = {f"forget.{a}.{k}": getattr(rows, k) for a, rows in self._forget.items() for k in ("ids", "weight")}
        return {**self.columns, **extra}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], attacks: Sequence[str] = ()) -> Pool:
        """Inverse of `tensors`. Raises UserError unless every column is there, in its shape and dtype, finite and in range."""
        columns = check_columns({k: v for k, v in tensors.items() if not k.startswith("forget.")})
        forget = {a: Rows(tensors[f"forget.{a}.ids"], tensors[f"forget.{a}.weight"])
                  for a in attacks if f"forget.{a}.ids" in tensors}
        return cls(columns, attacks, forget)

    def to(self, device: torch.device | str) -> Pool:
        forget = {a: Rows(rows.ids.to(device), rows.weight.to(device)) for a, rows in self._forget.items()}
        return Pool({k: v.to(device) for k, v in self.columns.items()}, self.attacks, forget)

    # --------------------------------------------------------------------------------------------------- attacks
    def append(self, attack: str, columns: Mapping[str, Tensor], forget: Rows | None = None) -> Pool:
        """A new pool with the rows of one attack behind the old ones.

        columns: FIELDS plus episode, t, replaces, [n, ...] each; `replaces` names original rows.
        forget: row ids (of this pool, before appending) where the forget rows are not the appended ones.
        """
        if attack in self.attacks:
            raise UserError(f"the pool already holds attack '{attack}'.")
        n = len(columns["reward"]) if columns else 0
        origin = torch.full((n,), len(self.attacks) + 1, dtype=torch.int16)
        new = {**columns, "origin": origin}
        joined = {k: torch.cat([v, new[k].to(v.dtype)]) if n else v for k, v in self.columns.items()}
        return Pool(joined, (*self.attacks, attack), {**self._forget, **({attack: forget} if forget else {})})

    def conditions(self) -> tuple[str, ...]:
        return ("clean", *(f"{a}/{part}" for a in self.attacks for part in ("poisoned", "retain", "forget")))

    def rows(self, condition: str) -> Rows:
        """The rows of 'clean', '<attack>/poisoned', '<attack>/retain' or '<attack>/forget', in ascending order."""
        if condition not in self.conditions():
            raise UserError(f"unknown data condition '{condition}'. Known: {', '.join(self.conditions())}.")
        original = self.origin == 0
        if condition == "clean":
            return _rows(original)
        attack, part = condition.split("/")
        mine = self.origin == self.attacks.index(attack) + 1
        replaced = torch.zeros_like(mine)
        replaced[self.replaces[mine & (self.replaces >= 0)]] = True
        poisoned = (original & ~replaced) | mine
        if attack in self._forget:
            forget = self._forget[attack]
        else:
            forget = _rows(mine)
        if part == "forget":
            return forget
        if part == "poisoned":
            return _rows(poisoned)
        poisoned[forget.ids] = False
        return _rows(poisoned)

    def episodes(self, condition: str | None = None) -> pd.DataFrame:
        """One line per episode: episode, origin, rows, ret, cost (sums). All rows, or those of one condition."""
        ids = slice(None) if condition is None else self.rows(condition).ids
        frame = pd.DataFrame({k: self.columns[k][ids].numpy() for k in ("episode", "origin", "reward", "cost")})
        frame[["reward", "cost"]] = frame[["reward", "cost"]].astype("float64")
        grouped = frame.groupby(["origin", "episode"] if condition is None else ["episode"], sort=True)
        out = grouped.agg(rows=("reward", "size"), ret=("reward", "sum"), cost=("cost", "sum"), origin_=("origin", "max"))
        return out.reset_index().drop(columns="origin", errors="ignore").rename(columns={"origin_": "origin"})


DTYPES = {"obs": torch.float32, "action": torch.float32, "reward": torch.float32, "cost": torch.float32, "next_obs": torch.float32,
          "terminal": torch.bool, "timeout": torch.bool, "episode": torch.int64, "t": torch.int64, "replaces": torch.int64,
          "origin": torch.int16}


def check_columns(columns: Mapping[str, Tensor], where: str = "pool") -> dict[str, Tensor]:
    """The columns of a pool that may come from a stranger's file. Raises UserError for the first thing that is wrong."""
    odd = sorted(set(DTYPES) ^ set(columns))
    if odd:
        state = "missing" if odd[0] in DTYPES else "unknown"
        raise UserError(f"{where}: column '{odd[0]}' is {state}; a pool holds {', '.join(DTYPES)}.")
    n = len(columns["reward"]) if columns["reward"].dim() == 1 else -1
    for name, dtype in DTYPES.items():
        value, dims = columns[name], 2 if name in ("obs", "action", "next_obs") else 1
        if value.dtype != dtype or value.dim() != dims or len(value) != n:
            raise UserError(f"{where}: '{name}' is {list(value.shape)} {value.dtype}, expected {dims} dimension(s) of {dtype} with "
                            f"as many rows as 'reward'.")
        if dtype == torch.float32 and not bool(torch.isfinite(value).all()):
            raise UserError(f"{where}: '{name}' holds NaN or infinity.")
    if columns["obs"].shape != columns["next_obs"].shape:
        raise UserError(f"{where}: 'next_obs' is {list(columns['next_obs'].shape)} but 'obs' is {list(columns['obs'].shape)}.")
    for name, low in (("replaces", -1), ("episode", 0), ("t", 0), ("origin", 0), ("cost", 0)):
        if n and not columns[name].min().item() >= low:
            raise UserError(f"{where}: '{name}' holds values below {low}.")
    if n and int(columns["replaces"].max()) >= n:
        raise UserError(f"{where}: 'replaces' names row {int(columns['replaces'].max()):,}, but there are {n:,} rows.")
    return dict(columns)


def _rows(mask: Tensor) -> Rows:
    ids = mask.nonzero().squeeze(-1)
    return Rows(ids, torch.ones(len(ids), device=ids.device))


def forget_rows(ids: Iterable[int] | Tensor, n_rows: int, weight: Iterable[float] | Tensor | None = None,
                where: str = "forget set") -> Rows:
    """Checked Rows from a user's list. Raises UserError for rows out of range, repeated, none at all, or everything."""
    ids = torch.as_tensor(ids if isinstance(ids, Tensor) else list(ids))
    if ids.numel() == 0:
        raise UserError(f"{where}: no rows to forget; list at least one row id.")
    if ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise UserError(f"{where}: row ids must be whole numbers.")
    ids = ids.long()
    bad = ids[(ids < 0) | (ids >= n_rows)]
    if len(bad):
        raise UserError(f"{where}: row {int(bad[0]):,} is out of range; the data have rows 0 to {n_rows - 1:,}.")
    if weight is None:
        weight = torch.ones(len(ids))
    weight = torch.as_tensor(weight if isinstance(weight, Tensor) else list(weight)).float()
    if len(weight) != len(ids):
        raise UserError(f"{where}: {len(ids):,} row ids but {len(weight):,} weights.")
    if not bool(((weight >= 0) & (weight <= 1)).all()):                      # NaN fails both
        raise UserError(f"{where}: weights must lie in [0, 1].")
    ids, order = ids.sort()
    if bool((ids[1:] == ids[:-1]).any()):
        raise UserError(f"{where}: row {int(ids[1:][ids[1:] == ids[:-1]][0]):,} is listed twice.")
    if len(ids) == n_rows:
        raise UserError(f"{where}: covers all {n_rows:,} rows; nothing is left to learn from.")
    return Rows(ids, weight[order])


def measure_units(pool: Pool, rows: Sequence[Rows], quantile: float = 0.98, standardise: bool = True,
                  reward_scale: float = 1.0) -> Units:
    """Per replica: mean and std of the observations, and the 98% quantile of |reward|, over its own rows.

    Without `standardise` (parity): 0, 1, and rewards are multiplied by `reward_scale`. On the CPU, whatever the pool's device.
    """
    if not standardise:
        R, n = len(rows), pool.obs.shape[1]
        return Units(torch.zeros(R, n), torch.ones(R, n), torch.full((R,), 1 / reward_scale))
    means, stds, scales, seen = [], [], [], {}
    for r in rows:
        key = id(r.ids)                                 # replicas of one condition may share one Rows
        if key not in seen:
            obs = pool.obs[r.ids].double().cpu()
            scale = np.quantile(pool.reward[r.ids].abs().cpu().numpy(), quantile)
            seen[key] = (obs.mean(0).float(), obs.std(0, correction=0).clamp(min=1e-3).float(),
                         torch.tensor(max(scale, 1e-6)).float())
        for out, value in zip((means, stds, scales), seen[key]):
            out.append(value)
    return Units(torch.stack(means), torch.stack(stds), torch.stack(scales))


def n_step_sums(pool: Pool, ids: Tensor, n: int, gamma: float) -> dict[str, Tensor]:
    """Discounted n-step sums along each trajectory, looking only at the rows `ids`.

    For row i the sum runs over m = min(n, rows to the end of its episode or to the next row not in `ids`) steps.
    Returns reward, cost [n_ids] (sums), last [n_ids] (pool row whose next_obs, terminal and time-out end the sum), steps [n_ids].
    """
    key = pool.episode[ids] * (int(pool.t.max()) + 1) + pool.t[ids]
    order = key.argsort()
    rows = ids[order]
    follows = torch.zeros_like(rows, dtype=torch.bool)               # does position k + 1 continue position k?
    follows[:-1] = (pool.episode[rows[1:]] == pool.episode[rows[:-1]]) & (pool.t[rows[1:]] == pool.t[rows[:-1]] + 1)
    reward, cost = pool.reward[rows].double(), pool.cost[rows].double()
    position, going = torch.arange(len(rows), device=rows.device), torch.ones_like(follows)
    sums = [reward.clone(), cost.clone()]
    steps = torch.ones(len(rows), device=rows.device)
    for k in range(1, n):
        going = going & follows[position]
        position = torch.where(going, position + 1, position)
        for total, signal in zip(sums, (reward, cost)):
            total += torch.where(going, gamma**k * signal[position], 0.0)
        steps += going.float()
    back = order.argsort()
    return {"reward": sums[0].float()[back], "cost": sums[1].float()[back], "last": rows[position][back], "steps": steps[back]}


class Sampler:
    """Uniform minibatches with replacement, replica r from its own rows, in the learner's units, on the pool's device.

    One gather serves all columns: the pool is packed once as [N, D] with D = 2 n_obs + n_act + 3.
    done: 'terminal' (default) or 'any_end' (parity: a time-out counts as an end).
    n_step: also prepares long targets for `pair`.
    """

    def __init__(self, pool: Pool, rows: Sequence[Rows], batch: int, units: Units, done: str = "terminal",
                 n_step: int = 1, gamma: float = 1.0):
        if any(len(r.ids) == 0 for r in rows):
            raise UserError("a data condition has no rows; nothing can be sampled from it.")
        n_obs, n_act, device = pool.obs.shape[1], pool.action.shape[1], pool.obs.device
        self.split = [n_obs, n_act, 1, 1, n_obs, 1]
        end = pool.terminal if done == "terminal" else pool.terminal | pool.timeout
        self.packed = torch.cat([pool.obs, pool.action, pool.reward[:, None], pool.cost[:, None], pool.next_obs,
                                 end.float()[:, None]], dim=1).contiguous()
        R = len(rows)
        ones, zeros = (lambda n: torch.ones(R, n, device=device)), (lambda n: torch.zeros(R, n, device=device))
        mean, inv, scale = (x.to(device) for x in (units.obs_mean, 1 / units.obs_std, 1 / units.reward_scale[:, None]))
        self.loc = torch.cat([mean, zeros(n_act + 2), mean, zeros(1)], 1)[:, None]                 # [R, 1, D]
        self.inv = torch.cat([inv, ones(n_act), scale, ones(1), inv, ones(1)], 1)[:, None]
        distinct: dict[int, int] = {}                   # replicas of one condition may share one Rows
        which = [distinct.setdefault(id(r.ids), len(distinct)) for r in rows]
        lists = {w: r for w, r in zip(which, rows)}
        width = max(len(r.ids) for r in rows)
        pad = lambda x: torch.nn.functional.pad(x, (0, width - len(x)))
        self.ids = torch.stack([pad(lists[w].ids) for w in range(len(lists))]).to(device)          # [U, width]
        weighted = any(bool((r.weight != 1).any()) for r in rows)
        self.weight = torch.stack([pad(lists[w].weight) for w in range(len(lists))]).flatten().to(device) if weighted else None
        context = [r.context for r in lists.values() if r.context is not None]
        if context and len(context) < len(lists):
            raise UserError("some replicas' rows have a context and others have none; they cannot be stacked.")
        self.context = torch.stack([torch.nn.functional.pad(lists[w].context, (0, 0, 0, width - len(lists[w].ids)))
                                    for w in range(len(lists))]).flatten(0, 1).to(device) if context else None    # [U width, k]
        self.offset = torch.tensor(which, device=device)[:, None] * width                          # [R, 1] into the flat lists
        self.count = torch.tensor([len(r.ids) for r in rows], device=device)[:, None]
        self.batch, self.R = batch, R
        self.long = self.upto = None
        if n_step > 1:
            sums = [n_step_sums(pool, lists[w].ids.to(device), n_step, gamma) for w in range(len(lists))]
            self.long = {k: torch.stack([pad(s[k]) for s in sums]).flatten() for k in sums[0]}

    def draw_by_weight(self) -> Sampler:
        """From now on draw rows in proportion to their weights: for losses that know none. Rows of weight 0 are never seen.

        The weight of every row in a batch is then the mean of the replica's positive weights, so that the expectation of weight
        times loss stays. Without weights nothing changes. Returns itself. Raises UserError if all weights are 0.
        """
        if self.weight is not None:
            width = self.ids.shape[1]
            weight = self.weight.double().view(-1, width)[self.offset[:, 0] // width]                            # [R, width]
            upto = weight.cumsum(1)
            if not bool((upto[:, -1] > 0).all()):
                raise UserError("every row of a data condition has weight 0; nothing can be drawn from it.")
            self.upto, self.last = upto.contiguous(), (upto < upto[:, -1:]).sum(1, keepdim=True)
            self.trust = (upto[:, -1:] / (weight > 0).sum(1, keepdim=True)).float()
        return self

    def _draw(self, generator: torch.Generator) -> Tensor:
        u = torch.rand(self.R, self.batch, generator=generator, device=self.packed.device, dtype=torch.float64)
        if self.upto is not None:
            return torch.searchsorted(self.upto, u * self.upto[:, -1:], right=True).clamp(max=self.last) + self.offset
        return (u * self.count).long().clamp_(max=self.count - 1) + self.offset                    # [R, B] flat positions

    def _batch(self, position: Tensor) -> Batch:
        flat = self.packed[self.ids.flatten()[position]]                                           # [R, B, D]
        obs, action, reward, cost, next_obs, done = ((flat - self.loc) * self.inv).split(self.split, -1)
        weight = 1.0 if self.weight is None else self.weight[position] if self.upto is None else self.trust.expand(position.shape)
        obs, next_obs = self._in_context(obs, position), self._in_context(next_obs, position)
        return Batch(obs, action, reward[..., 0], cost[..., 0], next_obs, done[..., 0], 1.0, weight)

    def _in_context(self, obs: Tensor, position: Tensor) -> Tensor:
        return obs if self.context is None else torch.cat([obs, self.context[position]], -1)

    def sample(self, generator: torch.Generator) -> Batch:
        return self._batch(self._draw(generator))

    def pair(self, generator: torch.Generator) -> tuple[Batch, Batch]:
        """One batch twice: with 1-step, and with n-step reward, cost, next_obs, done and steps."""
        position = self._draw(generator)
        short = self._batch(position)
        n_obs = self.split[0]
        last = self.packed[self.long["last"][position], -n_obs - 1:]
        end = (last - self.loc[..., -n_obs - 1:]) * self.inv[..., -n_obs - 1:]
        reward_inv = self.inv[..., n_obs + self.split[1]]                                           # [R, 1]
        long = short._replace(reward=self.long["reward"][position] * reward_inv, cost=self.long["cost"][position],
                              next_obs=self._in_context(end[..., :n_obs], position), done=end[..., n_obs],
                              steps=self.long["steps"][position])
        return short, long
