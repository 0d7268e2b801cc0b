"""The only module that imports a simulator: bullet-safety-gym (PyBullet) and gymnasium's MuJoCo tasks.

bullet-safety-gym 1.4 needs help, all of it here:
1. It redirects C streams with ctypes when imported and at every `make`, which crashes in Jupyter kernels and under
   pytest's capture. Remedy: real streams during the import, then silence by file descriptor instead.
2. It ignores `reset(seed=...)` and draws from numpy's global generator. Remedy: `_Seeded` lends it a state.
3. A simulator costs 10 ms and 30 MB to connect, and up to 60 MB and 0.3 s for meshes that only rendering needs.
   Remedy: connections are reset and re-used, meshes left out. Trajectories were compared with those of new
   connections with meshes: equal bit for bit on all eight tasks. (The environment's own reset is not: cars and
   drones carry state over. So every episode gets a new environment.)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import types
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

# mujoco-py comes with d4rl and wants MuJoCo 2.1 binaries; gymnasium's v4 tasks work once it counts as absent.
sys.modules.setdefault("mujoco_py", None)
os.environ.setdefault("D4RL_SUPPRESS_IMPORT_ERROR", "1")

import gymnasium  # noqa: E402
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from saferule.errors import UserError  # noqa: E402
from saferule.notebook import die_with_parent  # noqa: E402
from saferule.notebook import progress as progress_bar  # noqa: E402
from saferule.tasks import Task  # noqa: E402

_idle: list[int] = []  # PyBullet connections of this process, free to be reset and used again
_shared = None  # see `parallel`
os.register_at_fork(after_in_child=_idle.clear)


class _Silence:
    """Sends file descriptors 1 and 2 to nowhere: PyBullet prints from C. Ignores what RedirectStream is given."""

    def __init__(self, *_):
        self.libc = ctypes.CDLL(None)

    def __enter__(self):
        self.libc.fflush(None)
        self.saved = os.dup(1), os.dup(2)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        os.close(null)

    def __exit__(self, *_):
        self.libc.fflush(None)
        for number, saved in zip((1, 2), self.saved):
            os.dup2(saved, number)
            os.close(saved)


@functools.cache
def _builder() -> types.ModuleType:
    """bullet_safety_gym.envs.builder, imported and mended once per process."""
    streams = sys.stdout, sys.stderr
    try:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        with _Silence():
            import bullet_safety_gym  # noqa: F401  (registers the tasks)
            from bullet_safety_gym.envs import builder
    finally:
        sys.stdout, sys.stderr = streams
    builder.RedirectStream = _Silence
    return builder


@functools.cache
def _client_class():
    import pybullet
    from pybullet_utils.bullet_client import BulletClient

    class Client(BulletClient):
        """A PyBullet connection that is taken from the idle ones and goes back there; loads no meshes."""

        def __init__(self, connection_mode):
            if _idle:
                self._shapes, self._pid, self._client = {}, os.getpid(), _idle.pop()
                pybullet.resetSimulation(physicsClientId=self._client)
            else:
                super().__init__(connection_mode)

        def __getattr__(self, name):
            attribute = super().__getattr__(name)
            if name == "loadURDF":
                load = attribute

                def attribute(*args, flags=0, **kwargs):
                    return load(*args, flags=flags | pybullet.URDF_IGNORE_VISUAL_SHAPES, **kwargs)

            self.__dict__[name] = attribute  # the next look-up does not come here
            return attribute

        def disconnect(self):
            _idle.append(self._client)
            self._client = -1

    return Client


def release() -> None:
    """Give the memory of all idle connections of this process back."""
    if _idle:
        import pybullet

        while _idle:
            pybullet.disconnect(physicsClientId=_idle.pop())


@contextlib.contextmanager
def _global_random(state):
    """Run a block with that state of numpy's global generator, then put the old one back."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.set_state(state)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


class _Seeded(gymnasium.Wrapper):
    """A Bullet task whose every reset starts from a seed of its own, where the package uses numpy's global state."""

    def __init__(self, env: gymnasium.Env, seed: int):
        super().__init__(env)
        self.seeds = np.random.RandomState(seed)
        self.first: int | None = seed

    def reset(self, *, seed: int | None = None, options=None):
        if seed is None:
            seed = self.first if self.first is not None else int(self.seeds.randint(2**31))
        self.first = None
        with _global_random(np.random.RandomState(seed).get_state()):
            return self.env.reset(options=options)


class _Velocity(gymnasium.Wrapper):
    """A MuJoCo task whose cost is the task's speed limit, by the same rule as for files."""

    def __init__(self, env: gymnasium.Env, task: Task, seed: int):
        super().__init__(env)
        self.task, self.seed, self.obs = task, seed, None

    def reset(self, *, seed: int | None = None, options=None):
        seed, self.seed = (self.seed if seed is None else seed), None
        self.obs, info = self.env.reset(seed=seed, options=options)
        return self.obs, info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        info["cost"] = float(self.task.cost_of(self.obs, action, obs))
        self.obs = obs
        return obs, reward, terminated, truncated, info


def make(task: Task, seed: int, visual: bool = False) -> gymnasium.Env:
    """See `saferule.tasks.make_env`."""
    if task.source == "d4rl":
        mode = {"render_mode": "rgb_array"} if visual else {}
        return _Velocity(gymnasium.make(task.env_id, disable_env_checker=True, **mode), task, seed)
    builder = _builder()
    from pybullet_utils import bullet_client

    builder.bullet_client = bullet_client if visual else types.SimpleNamespace(BulletClient=_client_class())
    with _Silence(), _global_random(np.random.RandomState(seed).get_state()):
        env = gymnasium.make(task.env_id, disable_env_checker=True)
    return _Seeded(env, seed)


def render(env: gymnasium.Env) -> np.ndarray:
    """The present view of an environment made with `visual=True`, uint8 [height, width, 3]."""
    bullet = isinstance(env, _Seeded)
    return np.asarray(env.unwrapped.render("rgb_array") if bullet else env.render(), dtype=np.uint8)


def cores() -> int:
    """Processes to use by default: SAFERULE_WORKERS, else the cores that this process may use."""
    return int(os.environ.get("SAFERULE_WORKERS") or len(os.sched_getaffinity(0)))


def _start_worker(share) -> None:
    global _shared
    _shared = share
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@contextlib.contextmanager
def _this_process(share):
    """What a worker sees, in this process: the shared object and one torch thread (more would change sums)."""
    global _shared
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 1
    _shared = share
    try:
        if torch:
            torch.set_num_threads(1)
        yield
    finally:
        _shared = None
        if torch:
            torch.set_num_threads(threads)
        release()


def shared():
    """What `parallel` was given to share: inherited by its processes, never pickled."""
    return _shared


def parallel(function, jobs: list[tuple], workers: int | None, label: str, progress: bool, share=None) -> list:
    """[function(*job) for job in jobs] on several processes, with a progress bar; results in the order of the jobs.

    Processes are forked, so this works in notebooks and in scripts without a __main__ guard, and starts at once.
    One worker means this process. An exception in a job is raised here, and the other jobs are cancelled.
    """
    _builder()  # imported before the fork: once instead of once per worker
    workers = min(workers or cores(), len(jobs))
    results: list = [None] * len(jobs)
    with progress_bar(desc=label, total=len(jobs)) if progress else tqdm(disable=True) as bar:
        if workers == 1:
            with _this_process(share):
                for i, job in enumerate(jobs):
                    results[i] = function(*job)
                    bar.update()
            return results
        fork = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(workers, mp_context=fork, initializer=_start_worker, initargs=(share,))
        try:
            index = {pool.submit(function, *job): i for i, job in enumerate(jobs)}
            for done in as_completed(index):
                results[index[done]] = done.result()
                bar.update()
        except UserError as error:
            raise UserError(str(error)) from None  # without the worker's traceback
        except BrokenProcessPool:
            raise UserError(f"{label}: a process was killed, probably for want of memory; try fewer workers "
                            f"(SAFERULE_WORKERS=1).") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return results
