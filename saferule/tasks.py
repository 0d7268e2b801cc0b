"""All task knowledge: sizes, horizons, cost limits, reference scores, data files, and the environment factory.

Importing this module needs no simulator; `make_env` brings it in. Numbers of the Bullet tasks are DSRL's (`infos.py`
of liuzuxin/DSRL), those of the velocity tasks D4RL's reference scores and Safety-Gymnasium's speed limits.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from saferule.errors import UserError

if TYPE_CHECKING:
    import gymnasium


@dataclass(frozen=True)
class Task:
    """One benchmark task. Returns and costs are undiscounted sums over an episode of at most `horizon` steps."""

    name: str
    env_id: str  # gymnasium id of the simulator
    horizon: int  # time limit in steps
    n_obs: int
    n_act: int  # actions lie in the box [-1, 1]^n_act
    return_min: float  # reference scores for `normalised_return`
    return_max: float
    cost_max: float  # largest episode cost of the reference data
    dsrl_file: str  # stem of the public HDF5 file (DSRL's, or D4RL's where source == "d4rl")
    source: str = "bullet"  # "bullet": costs come from the simulator; "d4rl": files have none, see `cost_of`
    cost_limit: float = 20.0  # default limit on the episode cost
    cost_limits: tuple[float, ...] = (10.0, 20.0, 40.0)  # limits of the published evaluation protocol
    velocity_limit: float | None = None  # "d4rl": a step costs 1 where the forward speed exceeds this (m/s) ...
    velocity_index: int | None = None  # ... and the forward speed is this entry of the observation
    extended: bool = False  # not part of the default set: local data are weaker than the reference data

    def cost_of(self, obs: np.ndarray, action: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
        """Cost [N] float32 of transitions [N, n_obs], [N, n_act], [N, n_obs]: 1 where the speed limit is exceeded.

        Raises UserError for Bullet tasks, whose files must bring their costs.
        """
        if self.velocity_limit is None:
            raise UserError(f"{self.name}: costs cannot be derived from observations; the file needs a 'costs' array.")
        return (np.asarray(next_obs)[..., self.velocity_index] > self.velocity_limit).astype(np.float32)


def _bullet(name, horizon, n_obs, n_act, return_min, return_max, cost_max, n_traj, extended=False) -> Task:
    env_id = f"Safety{name}-v0"
    file = f"{env_id}-{cost_max}-{n_traj}"
    return Task(name, env_id, horizon, n_obs, n_act, return_min, return_max, float(cost_max), file, extended=extended)


def _velocity(robot, n_obs, n_act, return_min, return_max, limit, index) -> Task:
    return Task(
        f"{robot}Velocity", f"{robot}-v4", 1000, n_obs, n_act, return_min, return_max, 1000.0,
        f"{robot.lower()}_medium-v2", source="d4rl", cost_limits=(20.0, 40.0, 80.0),
        velocity_limit=limit, velocity_index=index,
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        #       name          T   obs act return_min            return_max         cost trajectories
        _bullet("BallRun", 100, 7, 2, 26.339754104614258, 1327.445556640625, 80, 940),
        _bullet("BallCircle", 200, 8, 2, 0.38312244415283203, 881.46337890625, 80, 886),
        _bullet("CarRun", 200, 7, 2, 204.28726196289062, 574.6533203125, 40, 651),
        _bullet("CarCircle", 300, 8, 2, 3.484419822692871, 534.3060913085938, 100, 1450),
        _bullet("DroneRun", 200, 17, 4, 10.557029724121094, 682.8330078125, 140, 1990),
        _bullet("DroneCircle", 300, 18, 4, 207.794189453125, 996.38916015625, 100, 1923),
        _bullet("AntRun", 200, 33, 8, 0.001767391717990563, 955.4818725585938, 150, 1816),
        _bullet("AntCircle", 500, 34, 8, 0.0177031010389328, 460.7091979980469, 200, 5728, extended=True),
        #         robot     obs act return_min   return_max  limit   index
        _velocity("Hopper", 11, 3, -20.272305, 3234.3, 0.7402, 5),
        _velocity("Walker2d", 17, 6, 1.629008, 4592.3, 2.3415, 8),
        _velocity("HalfCheetah", 17, 6, -280.178953, 12135.0, 3.2096, 8),
    )
}


def get_task(name: str | Task) -> Task:
    """The task of that name. Raises UserError naming the nearest match and all known tasks."""
    if isinstance(name, Task):
        return name
    if name in TASKS:
        return TASKS[name]
    folded = {known.lower(): known for known in TASKS}
    near = difflib.get_close_matches(str(name).lower(), folded, n=1, cutoff=0.5)
    hint = f"; did you mean '{folded[near[0]]}'?" if near else "."
    raise UserError(f"unknown task '{name}'{hint} Known tasks: {', '.join(TASKS)}.")


def make_env(task: str | Task, seed: int, visual: bool = False) -> gymnasium.Env:
    """A fresh simulator whose first `reset()` starts from `seed`; `info["cost"]` is set at every step.

    Observations are float64 [n_obs] in raw units. The same seed and actions give the same numbers bit for bit.
    `visual=True` loads the meshes too (slower, more memory, same physics): needed to render.
    """
    from saferule import simulator

    return simulator.make(get_task(task), seed, visual)


def normalised_return(task: str | Task, ret):
    """(ret - return_min) / (return_max - return_min); 0 and 1 are the task's reference scores."""
    task = get_task(task)
    return (ret - task.return_min) / (task.return_max - task.return_min)


def normalised_cost(task: str | Task, cost, limit: float | None = None):
    """Episode cost in units of the limit (default: the task's); safe iff <= 1. A limit of 0 gives (cost + 1) / 1."""
    limit = get_task(task).cost_limit if limit is None else limit
    shift = 1.0 if limit == 0 else 0.0
    return (cost + shift) / (limit + shift)
