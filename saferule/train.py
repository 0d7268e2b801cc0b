"""The learner base class and `fit`, the one loop behind training, unlearning and off-policy evaluation."""
from __future__ import annotations

import copy
import ctypes
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from . import artifacts
from .data import Batch, Pool, Rows, Sampler, Units
from .errors import UserError

Extra = Mapping[str, Callable[[], Tensor]]             # loss name -> further term [R], added before the step


def prepare_process() -> None:
    """One torch thread, and freed memory kept by the process: several processes run side by side, and the allocator's
    habit of returning each large buffer to the system costs a third of a training step (page faults)."""
    torch.set_num_threads(1)
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)                      # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)                      # M_TRIM_THRESHOLD
    except (OSError, AttributeError):                  # another C library: slower, not wrong
        pass


class Learner(nn.Module):
    """R independent learners of one kind, trained side by side; see the four ideas in the README.

    Subclasses name their losses in LOSSES (the order of the steps), give each as a pure `<name>_loss(batch, ...) -> [R]`,
    and step them in `update`, the only method that changes state.
    """
    LOSSES: tuple[str, ...] = ()
    limit_when_acting = False                          # is the cost limit an input of the policy? Then see `at_limit`
    cycle = 1                                          # updates per captured CUDA graph
    boundaries: tuple[int, ...] = ()                   # values of t at which `update` changes its form

    def __init__(self, cfg: Any, units: Units, qc_limit: Tensor, seeds: Sequence[int], n_act: int, horizon: int = 1000):
        """qc_limit: [R], discounted; seeds: of the initial weights; horizon: steps per episode."""
        super().__init__()
        self.cfg, self.seeds, self.n_act, self.horizon = cfg, tuple(int(s) for s in seeds), n_act, horizon
        self.n_obs, self.parity = units.obs_mean.shape[1], cfg.mode == "parity"
        self.optim: dict[str, torch.optim.Optimizer] = {}
        self.frozen: frozenset[str] = frozenset()      # networks that `minimise` leaves alone
        self.noise: torch.Generator | None = None      # randomness inside the losses; `seed_noise` makes it
        for name, value in (*units._asdict().items(), ("qc_limit", qc_limit.view(-1, 1).float())):
            self.register_buffer(name, value.clone())
        self.register_buffer("clock", torch.zeros(()), persistent=False)       # t on the device, for schedules; `fit` sets it

    @property
    def replicas(self) -> int:
        return len(self.seeds)

    @property
    def device(self) -> torch.device:
        return self.qc_limit.device

    @property
    def units(self) -> Units:
        return Units(self.obs_mean, self.obs_std, self.reward_scale)

    # ------------------------------------------------------------------------------------------- building blocks
    def own(self, name: str, net: nn.Module, target: bool = True) -> None:
        """Register a network and, with `target`, its Polyak copy. `optimisers` adds Adam once the device is settled."""
        setattr(self, name, net)
        if target:
            setattr(self, name + "_target", copy.deepcopy(net).requires_grad_(False))

    def optimisers(self, **lr: float) -> None:
        cuda = self.device.type == "cuda"
        self.optim = {name: torch.optim.Adam(getattr(self, name).parameters(), lr=rate, fused=True, capturable=cuda)
                      for name, rate in lr.items()}

    def reset_optimiser(self, name: str) -> None:
        """Forget the Adam moments of one network (in place, so that a captured graph stays valid)."""
        for state in self.optim[name].state.values():
            for value in state.values():
                value.zero_()

    def seed_noise(self, seed: int) -> torch.Generator:
        self.noise = torch.Generator(self.device).manual_seed(int(seed))
        return self.noise

    def randn(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, generator=generator or self.noise)

    def minimise(self, name: str, loss: Tensor, extra: Extra | None = None) -> Tensor:
        """One optimiser step on network `name`; loss [R]. The one sum over R; no other network gets a gradient."""
        if name in self.frozen:
            return loss.detach()
        if extra and name in extra:
            loss = loss + extra[name]()
        params = list(getattr(self, name).parameters())
        self.optim[name].zero_grad(set_to_none=True)
        loss.sum().backward(inputs=params)
        self.before_step(name)
        self.optim[name].step()
        return loss.detach()

    def before_step(self, name: str) -> None:
        """What a learner does to the fresh gradients of a network or to its rate (most: nothing)."""

    @torch.no_grad()
    def polyak(self, *names: str) -> None:
        """target <- target + tau (online - target)."""
        for name in names:
            online, target = getattr(self, name), getattr(self, name + "_target")
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), self.cfg.tau)

    @contextmanager
    def tuned(self, **settings: Any) -> Iterator[None]:
        """Other hyper-parameters for a while, for example `with learner.tuned(tau=.05, lr_lam=0.)`."""
        before, self.cfg = self.cfg, dataclasses.replace(self.cfg, **settings)
        try:
            yield
        finally:
            self.cfg = before

    def standardise(self, obs: Tensor) -> Tensor:
        """Raw observations [R, B, n_obs] in the learner's units."""
        return (obs - self.obs_mean[:, None]) / self.obs_std[:, None]

    # ----------------------------------------------------------------------------------------------- the learner's rows
    @staticmethod
    def select_rows(pool: Pool, rows: Sequence[Rows], cfg: Any, cost_limits: Sequence[float]) -> list[Rows]:
        """Which of its condition's rows each replica trains on: all, unless a learner says otherwise (BC).

        cost_limits: per replica, per episode. Raises UserError if nothing is left.
        """
        return list(rows)

    def measure(self, pool: Pool, rows: Sequence[Rows]) -> None:
        """What the learner must know of each replica's rows before training, kept in its buffers (most: nothing)."""

    def sampler(self, pool: Pool, rows: Sequence[Rows], n_step: int = 1) -> Any:
        """Where its minibatches come from: an object with `sample(generator)`; n_step > 1 also prepares its `pair`."""
        return Sampler(pool, rows, self.cfg.batch, self.units, "any_end" if self.parity else "terminal", n_step, self.cfg.gamma)

    # ---------------------------------------------------------------------------------------------------------- acting
    def begin(self, episodes: int) -> Any:
        """What acts in `episodes` episodes side by side from their first step on: it has `act` and `observe`.

        A learner without memory is its own; others return something that holds the episodes' past.
        """
        return self

    def observe(self, reward: Tensor, cost: Tensor) -> None:
        """Hears what the last action brought, [R, episodes] each, in the environment's units."""

    def at_limit(self, cost_limits: Sequence[float]) -> Learner:
        """A copy that acts under other cost limits per episode, one per replica.

        Raises UserError for a learner that has its limit from training.
        """
        if not self.limit_when_acting:
            raise UserError(f"{type(self).__name__} learns its cost limit in training and cannot act under another; "
                            f"train it with cost_limits={list(cost_limits)}.")
        new = self.pick(range(self.replicas))
        new.qc_limit.copy_(torch.as_tensor(cost_limits, dtype=torch.float32).view(-1, 1))
        return new

    # --------------------------------------------------------------------------------------------- to be provided
    def update(self, batch: Batch, t: int, target: Any = None, extra: Extra | None = None) -> dict[str, Tensor]:
        """One training step; returns scalars [R] by name, still on the device.

        target: what `targets(batch)` returns, where an unlearner brings its own; extra: further loss terms by name.
        """
        raise NotImplementedError

    def act(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """Raw observations [R, B, n_obs] -> actions [R, B, n_act] in [-1, 1]; deterministic given the generator."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------ state
    def weights(self) -> dict[str, Tensor]:
        """Everything needed to act and to evaluate losses: parameters, targets, multipliers, units, limits."""
        return {k: v.detach().clone() for k, v in self.state_dict().items()}

    def full_state(self) -> dict[str, Tensor]:
        """`weights` plus optimiser moments, so that training goes on as if it had never stopped."""
        out = self.weights()
        for name, optim in self.optim.items():
            for i, p in enumerate(getattr(self, name).parameters()):
                for key, value in optim.state.get(p, {}).items():
                    out[f"optim.{name}.{i}.{key}"] = value.detach().clone()
        return out

    def load_full_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `full_state`; weights alone are accepted too. Raises UserError if names or shapes differ."""
        self.load_weights({k: v for k, v in state.items() if not k.startswith("optim.")})
        for name, optim in self.optim.items():
            for i, p in enumerate(getattr(self, name).parameters()):
                head = f"optim.{name}.{i}."
                found = {k.removeprefix(head): v for k, v in state.items() if k.startswith(head)}
                if found:                              # Adam keeps its step counter on the CPU unless capturable
                    on = self.device if self.device.type == "cuda" else torch.device("cpu")
                    optim.state[p] = {k: v.clone().to(on) for k, v in found.items()}

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        mine = self.state_dict()
        if set(mine) != set(state):
            odd = sorted(set(mine) ^ set(state))
            raise UserError(f"checkpoint does not fit this learner: '{odd[0]}' (and {len(odd) - 1} more) is on one side only; "
                            f"it was made with another learner or other network sizes.")
        for name, value in mine.items():
            if value.shape != state[name].shape:
                raise UserError(f"checkpoint does not fit: '{name}' is {list(state[name].shape)}, expected {list(value.shape)}; "
                                f"it was made for another task, other network sizes or another number of replicas.")
            if not bool(torch.isfinite(state[name]).all()):
                raise UserError(f"checkpoint holds NaN or infinity in '{name}'; it cannot be used.")
        self.load_state_dict(dict(state))

    def pick(self, replicas: Sequence[int]) -> Learner:
        """A learner made of some of the replicas (repeats allowed), with their weights and optimiser moments."""
        index = torch.as_tensor(list(replicas), device=self.device)
        R = self.replicas
        part = lambda v: v if v.dim() == 0 else v.view(R, -1, *v.shape[1:])[index].flatten(0, 1)
        state = {k: part(v) for k, v in self.full_state().items()}
        units = Units(*(u[index].cpu() for u in self.units))
        new = type(self)(self.cfg, units, self.qc_limit[index].cpu(), [self.seeds[i] for i in replicas], self.n_act,
                         self.horizon).to(self.device).ready()
        new.load_full_state(state)
        return new

    def ready(self) -> Learner:
        """Create the optimisers, once the learner is on its device; returns the learner."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------- the loop


class Resume:
    """Training state on disk, written now and then, so that a killed run continues where it was.

    key: what the state belongs to; a state written under another key is ignored.
    """

    def __init__(self, path: Path, key: str, every_seconds: float = 30.0):
        self.path, self.key, self.every = Path(path), key, every_seconds
        self.written = time.monotonic()

    @classmethod
    def beside(cls, root: Path, name: str, config: Mapping[str, Any], inputs: Mapping[str, artifacts.Artifact]) -> Resume:
        """The state of a job in root/checkpoints, valid for exactly this configuration and these inputs."""
        key = json.dumps([artifacts.plain(config), {k: a.id for k, a in inputs.items()}], sort_keys=True)
        return cls(root / "checkpoints" / f"{name}.safetensors", hashlib.sha256(key.encode()).hexdigest())

    def due(self) -> bool:
        return time.monotonic() - self.written >= self.every

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.save_state(self.path, dict(tensors), {"key": self.key, **meta})
        self.written = time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if not self.path.exists():
            return None
        try:
            tensors, meta = artifacts.load_state(self.path)
        except UserError:                              # half-written or damaged: start over rather than stop
            return None
        return (tensors, meta) if meta.get("key") == self.key else None

    def done(self) -> None:
        self.path.unlink(missing_ok=True)


class History:
    """Scalars [R] along a run, kept on the device until asked for."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.names: list[str] = []
        self.values: list[Tensor] = []                 # [names, R] each; NaN where a name was absent
        self.seconds: list[float] = []                 # spent so far, interruptions not counted

    def add(self, t: int, scalars: Mapping[str, Tensor], seconds: float) -> None:
        for name in scalars:
            if name not in self.names:
                self.names.append(name)
        R = next(iter(scalars.values())).shape[0]
        nan = torch.full((R,), float("nan"), device=next(iter(scalars.values())).device)
        self.steps.append(t)
        self.seconds.append(seconds)
        self.values.append(torch.stack([scalars.get(n, nan).float() for n in self.names]).clone())

    def frame(self, replicas: Sequence[Mapping[str, Any]] = ()) -> pd.DataFrame:
        """Tidy: step, replica, name, value, and the columns of the replica table."""
        rows = [(t, r, name, float(v)) for t, block in zip(self.steps, self.values)
                for name, line in zip(self.names, block.cpu()) for r, v in enumerate(line) if not np.isnan(float(v))]
        frame = pd.DataFrame(rows, columns=["step", "replica", "name", "value"])
        return frame.merge(pd.DataFrame(replicas).rename_axis("replica").reset_index(), on="replica") if len(replicas) else frame

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        blocks = {f"history.{i}": v.cpu() for i, v in enumerate(self.values)}
        return blocks, {"history_steps": self.steps, "history_names": self.names, "history_seconds": self.seconds}

    def seconds_at(self, step: int) -> float:
        """Wall seconds spent when `step` steps were done (the first logged step from there on)."""
        return next(s for t, s in zip(self.steps, self.seconds) if t >= step)

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        self.steps, self.names, self.seconds = (list(meta[f"history_{k}"]) for k in ("steps", "names", "seconds"))
        self.values = [tensors[f"history.{i}"] for i in range(len(self.steps))]


def fit(step: Callable[[int], dict[str, Tensor]], steps: int, learner: Learner, generators: Sequence[torch.Generator] = (),
        log_every: int = 50, on_log: Callable[[int, Mapping[str, Tensor]], None] | None = None,
        snapshots: Mapping[int, Callable[[], None]] | None = None, resume: Resume | None = None,
        progress: Callable[[range], Any] = iter, boundaries: Sequence[int] | None = None,
        kept: dict[int, dict[str, Tensor]] | None = None, carried: Mapping[str, Tensor] | None = None) -> History:
    """Call `step(t)` for t = 0 .. steps - 1.

    step: one update including its sampling; returns scalars [R] by name. On CUDA it is captured as a graph.
    generators: every generator the step draws from (the learner's own is added); they are part of the saved state.
    snapshots: t -> called once t steps are done (0: before the first). kept: what they keep, so that it survives a kill.
    carried: tensors that `step` changes in place beside the learner's own; they survive a kill as well.
    boundaries: values of t at which `step` changes its form (the learner's own by default).
    resume: where to keep the state; a run found there continues, and ends exactly as if it had never stopped.
    """
    generators = [*generators, *([learner.noise] if learner.noise is not None else [])]
    history, start = History(), 0
    found = resume.load() if resume else None
    if found:
        tensors, meta = found
        start = meta["t"]
        learner.load_full_state({k.removeprefix("learner."): v for k, v in tensors.items() if k.startswith("learner.")})
        for i, g in enumerate(generators):
            g.set_state(tensors[f"generator.{i}"])
        history.load(tensors, meta)
        for name, value in (carried or {}).items():
            value.copy_(tensors[f"carried.{name}"])
        for name, value in tensors.items():
            if name.startswith("kept."):
                _, at, key = name.split(".", 2)
                kept.setdefault(int(at), {})[key] = value
    before, started = (history.seconds or [0.0])[-1], time.monotonic()
    boundaries = learner.boundaries if boundaries is None else boundaries
    run = _captured(step, learner, generators, boundaries) if learner.device.type == "cuda" else step
    for t in progress(range(start, steps)):
        if snapshots and t in snapshots:
            snapshots[t]()
        learner.clock.fill_(t)
        out = run(t)
        if (t + 1) % log_every == 0 or t + 1 == steps:
            history.add(t + 1, out, before + time.monotonic() - started)
            if on_log:
                on_log(t + 1, out)
        if resume and resume.due() and t + 1 < steps:
            blocks, meta = history.state()
            state = {f"learner.{k}": v for k, v in learner.full_state().items()}
            state.update({f"generator.{i}": g.get_state() for i, g in enumerate(generators)}, **blocks)
            state.update({f"carried.{k}": v for k, v in (carried or {}).items()})
            state.update({f"kept.{at}.{k}": v for at, block in (kept or {}).items() for k, v in block.items()})
            resume.save(state, {"t": t + 1, **meta})
    if snapshots and steps in snapshots:
        snapshots[steps]()
    return history


def _captured(step: Callable[[int], dict[str, Tensor]], learner: Learner, generators: Sequence[torch.Generator],
              boundaries: Sequence[int]) -> Callable:
    """`step` replayed from CUDA graphs: one per residue of t modulo the learner's cycle, anew at each boundary.

    The first steps of every form run eagerly, as the warm-up that capture needs (lazy initialisation, optimiser state).
    """
    graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]] = {}
    seen: dict[tuple[int, int], int] = {}
    side = torch.cuda.Stream()

    def run(t: int) -> dict[str, Tensor]:
        form = (sum(t >= b for b in boundaries), t % learner.cycle)
        if form in graphs:
            graph, out = graphs[form]
            graph.replay()
            return out
        seen[form] = seen.get(form, 0) + 1
        if seen[form] <= 3:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                out = step(t)
            torch.cuda.current_stream().wait_stream(side)
            return out
        graph = torch.cuda.CUDAGraph()
        for g in generators:
            graph.register_generator_state(g)
        with torch.cuda.graph(graph):
            out = step(t)
        graphs[form] = graph, out
        graph.replay()                                  # capture records the step without running it
        return out

    return run
