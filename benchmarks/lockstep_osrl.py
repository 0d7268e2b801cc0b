"""The same training run in OSRL and here: `python benchmarks/lockstep_osrl.py --osrl PATH [--steps 1000]`.

OSRL's BCQ-Lag, BEAR-Lag and CPQ and ours (mode='parity') start from the same weights, get the same batches, those of OSRL's own
loader, and the same noise, in float64, with the settings of against_osrl.py. Reported is how far they come apart, beside how far
OSRL comes from itself when its initial weights are changed by a rounding; by how much the final policies' actions differ; and
whether our sampler's rows are rows of OSRL's loader. Returns of separate runs, as in against_osrl.py, vary too much between seeds
to show a small error; this shows one at once. None of OSRL's code is copied.
"""
from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from against_osrl import (
    EVALUATION,
    SETTINGS,
    data_file,
    made,
    note,
    options,
    osrl_batches,
    osrl_dataset,
    osrl_trainer,
    parsed,
    seed_all,
    sha256,
    write,
)
from torch import Tensor

from saferule.data import Batch, Pool
from saferule.files import run_dir
from saferule.hdf5 import read_hdf5
from saferule.learners import discounted_limit
from saferule.osrl.layout import views
from saferule.tasks import Task, get_task
from saferule.train import Learner, prepare_process

LOOKS = (1, 10, 100, 300, 1000)                         # steps after which the largest difference so far is kept; and the last
LOGGED = {"vae": "loss_vae", "critic": "critic_loss", "cost_critic": "cost_critic_loss", "actor": "actor_loss"}
LAGRANGIAN = {**LOGGED, "lam": "lagrangian"}
SCALARS = {"bcq_lag": LAGRANGIAN, "bear_lag": {**LAGRANGIAN, "mmd": "mmd_loss", "alpha": "alpha_value"},
           "cpq": {**LOGGED, "alpha": "alpha_value"}}   # ours -> what OSRL logs it as
USED = {"bcq_lag": (True,), "bear_lag": (True,), "cpq": (True, True, True, False, True, False, True)}      # OSRL's draws in a step
STATES, MINIBATCHES = 64, 64                            # at which actions are compared; of ours that are looked up in OSRL's rows


class Noise:
    """Stands in for torch.randn: standard normal numbers, call by call the same for equal seeds.

    used: in turn, whether a draw is made use of; the others are zeros and take no numbers.
    """

    def __init__(self, seed: int, used: Iterable[bool] = (True,)):
        self.generator, self.used = torch.Generator().manual_seed(seed), itertools.cycle(used)

    def __call__(self, *shape: int | Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        shape = shape if not shape or isinstance(shape[0], int) else tuple(shape[0])
        zeros = torch.zeros(shape)
        return zeros.normal_(generator=self.generator) if next(self.used) else zeros


@contextmanager
def drawing(noise: Noise) -> Iterator[None]:
    """All of OSRL's ways to noise lead to `noise`."""
    with mock.patch("torch.randn", noise), mock.patch("torch.randn_like", lambda x: noise(*x.shape)), \
            mock.patch("torch.normal", lambda mean, std: mean + std * noise(*mean.shape)), \
            mock.patch("torch.distributions.normal._standard_normal", lambda shape, dtype, device: noise(*shape)):
        yield


@contextmanager
def in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def apart(some: Mapping[str, float], logged: Mapping[str, float]) -> float:
    """Largest difference among scalars, relative to their size in `logged` where that is above 1. NaN if one of them is."""
    return float(np.max([abs(value - logged[name]) / max(1.0, abs(logged[name])) for name, value in some.items()]))


def lockstep(osrl: Path, learner: str, task: Task, file: Path, steps: int, seed: int = 0) -> dict[str, Any]:
    """Both from OSRL's initial weights, with batches of OSRL's loader and one noise.

    scalars  largest difference of a loss or multiplier so far, at each of LOOKS and at the end
    itself   the same between OSRL and OSRL from weights larger by a factor 1 + 2^-52: what rounding alone can do
    weights  largest difference of a weight at the end
    actions  of an action of the final policies, in float32 as they act
    rows     share of the rows of our minibatches that OSRL's loader gives, too, bit for bit
    """
    settings, pool = SETTINGS[learner], Pool.from_columns(read_hdf5(file, task))
    with in_float64():
        seed_all(seed)
        trainer, batches = osrl_trainer(osrl, learner, task, settings), osrl_batches(osrl, file, settings)
        theirs, ours = trainer.model.double(), made(learner, task, pool, [seed])[0].double()
        ours.qc_limit.fill_(discounted_limit(EVALUATION["cost_limit"], settings["gamma"], task.horizon))       # was float32
        parameters = dict(theirs.named_parameters())
        for name, own in views(ours).items():
            own.copy_(parameters[name].detach())
        twin, ours.randn = copy.deepcopy(trainer), Noise(seed)
        with torch.no_grad():
            torch._foreach_mul_(list(twin.model.parameters()), 1 + 2.0**-52)
        runs = [(t, {}, Noise(seed, USED[learner])) for t in (trainer, twin)]            # each with what it logs
        for each, logged, _ in runs:
            each.logger = SimpleNamespace(store=lambda into=logged, **said: into.update(said))
        scalars, itself, largest = {}, {}, np.zeros(2)
        for t in range(steps):
            obs, next_obs, action, reward, cost, done = batch = [x.double() for x in next(batches)]
            for each, _, noise in runs:
                with drawing(noise):
                    each.train_one_step(*batch)
            out = ours.update(Batch(*(x[None] for x in (obs, action, reward, cost, next_obs, done))), t)
            said, changed = ({name: logged[f"loss/{name}"] for name in SCALARS[learner].values()} for _, logged, _ in runs)
            mine = {name: out[our].item() for our, name in SCALARS[learner].items()}
            largest = np.maximum(largest, [apart(mine, said), apart(changed, said)])
            if t + 1 in (*LOOKS, steps):
                scalars[str(t + 1)], itself[str(t + 1)] = largest.tolist()
        weights = max((own - parameters[name]).abs().max().item() for name, own in views(ours).items())
    return {"task": task.name, "learner": learner, "steps": steps, "scalars": scalars, "itself": itself, "weights": weights,
            "actions": acting_apart(theirs.float(), ours.float(), pool.obs[:: len(pool) // STATES], seed),
            "rows": shared_rows(ours, pool, osrl_dataset(osrl, file, settings))}


def acting_apart(theirs: torch.nn.Module, ours: Learner, obs: Tensor, seed: int) -> float:
    """Largest difference of an action at obs [n, n_obs], raw, with the same noise."""
    noise, ours.randn = Noise(seed), Noise(seed)
    with drawing(noise):
        said = [theirs.act(row, True, True)[0] for row in obs.numpy()]
    return max(float(np.abs(a - ours.act(row[None, None], torch.Generator())[0, 0].numpy()).max()) for a, row in zip(said, obs))


def shared_rows(ours: Learner, pool: Pool, dataset: Any) -> float:
    """Share of our minibatches' rows that OSRL's data set has, too: obs, next_obs, action, reward, cost, done."""
    numbers = itertools.count()
    with mock.patch("numpy.random.choice", lambda n, p: next(numbers)):        # one after the other, not at random
        table = {np.hstack(row).astype(np.float32).tobytes() for row in itertools.islice(dataset, dataset.dataset_size)}
    sampler, stream, found = ours.sampler(pool, [pool.rows("clean")]), torch.Generator().manual_seed(0), []
    for _ in range(MINIBATCHES):
        b = sampler.sample(stream)
        mine = torch.cat([b.obs, b.next_obs, b.action, *(x[..., None] for x in (b.reward, b.cost, b.done))], -1)[0]
        found += [row.tobytes() in table for row in mine.numpy()]
    return float(np.mean(found))


READING = (
    "OSRL revision {revision}. Both start from the same weights and get the same batches and the same noise, in float64, where "
    "rounding is 2e-16. Largest difference of any loss or multiplier up to a step (relative where that is above 1); in brackets "
    "between OSRL and OSRL from weights changed by a rounding: training may amplify rounding, and no more than that can be asked "
    "for. Then the largest difference of a weight at the end, and of the actions that the final policies take, in float32 and with "
    "the same noise. Same rows: the share of our minibatches' rows (obs, action, scaled reward, cost, next obs, done) that OSRL's "
    "loader gives, too, bit for bit. Made by `benchmarks/lockstep_osrl.py`; settings: manifest.json.")


def markdown(lines: Sequence[Mapping[str, Any]], revision: str) -> str:
    looks = list(dict.fromkeys(look for line in lines for look in line["scalars"]))
    head = ["task", "learner", *(f"{int(n):,} step{'s' * (n != '1')}" for n in looks), "weights", "actions", "same rows"]
    out = ["# The same run in OSRL and here", "", READING.format(revision=revision[:7]), "",
           f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for line in lines:
        gaps = [f"{line['scalars'][look]:.0e} ({line['itself'][look]:.0e})" for look in looks]
        gaps += [f"{line['weights']:.0e}", f"{line['actions']:.0e}"]
        out.append(f"| {' | '.join([line['task'], line['learner'], *gaps, format(line['rows'], '.0%')])} |")
    return "\n".join(out) + "\n"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    args, facts = parsed(parser)
    prepare_process()
    files, lines = {name: data_file(get_task(name), run_dir("parity")) for name in args.tasks}, []
    for name, learner in itertools.product(args.tasks, args.learners):
        lines.append(lockstep(args.osrl, learner, get_task(name), files[name], args.steps))
        print(lines[-1], flush=True)
    table = pd.DataFrame([{**line, "steps": int(n), "scalars": line["scalars"][n], "itself": line["itself"][n]}
                          for line in lines for n in line["scalars"]])
    write(args.out / "lockstep.csv", table.to_csv(index=False, float_format="%.3g"))
    write(args.out / "lockstep.md", markdown(lines, args.revision))
    note(args.out, "lockstep", {**facts, "steps": args.steps, "data_sha256": {name: sha256(file) for name, file in files.items()}})


if __name__ == "__main__":
    main()
