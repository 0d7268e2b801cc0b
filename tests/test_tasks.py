"""Task facts, scores, and the simulators' promises: same seed same numbers, nothing shared between episodes."""

import subprocess
import sys

import numpy as np
import pytest

from saferule.errors import UserError
from saferule.tasks import TASKS, get_task, make_env, normalised_cost, normalised_return

BULLET = [t.name for t in TASKS.values() if t.source == "bullet"]


def rollout(task, seed, steps=40, visual=False):
    env = make_env(task, seed, visual)
    obs, _ = env.reset()
    rng, rows = np.random.default_rng(seed), [obs]
    for _ in range(steps):
        obs, reward, terminated, truncated, info = env.step(rng.uniform(-1, 1, env.action_space.shape))
        rows.append(np.r_[obs, reward, info["cost"]])
        if terminated or truncated:
            break
    env.close()
    return rows


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def test_import_needs_no_simulator():
    code = "import sys, saferule.tasks; assert not {'gymnasium', 'pybullet', 'mujoco'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_scores_by_hand():
    assert normalised_return("CarCircle", 300.0) == pytest.approx(0.55859735, abs=1e-8)
    assert normalised_cost("CarCircle", 15.0, 10.0) == 1.5
    assert normalised_cost("CarCircle", 3.0, 0.0) == 4.0
    assert normalised_cost("CarCircle", 10.0) == 0.5
    assert np.allclose(normalised_return("BallRun", np.array([TASKS["BallRun"].return_max])), 1.0)


def test_unknown_task_names_the_nearest_and_all():
    with pytest.raises(UserError, match="unknown task 'balcircle'; did you mean 'BallCircle'.*AntRun") as error:
        get_task("balcircle")
    assert "\n" not in str(error.value)
    assert get_task(TASKS["CarRun"]) is TASKS["CarRun"]


@pytest.mark.parametrize("name", TASKS)
def test_simulator_has_the_stated_sizes_and_horizon(name):
    task = TASKS[name]
    env = make_env(task, 0)
    obs, _ = env.reset()
    assert obs.shape == (task.n_obs,) and env.action_space.shape == (task.n_act,)
    assert env.spec.max_episode_steps == task.horizon
    assert np.all(env.action_space.high == 1) and np.all(env.action_space.low == -1)
    env.close()


@pytest.mark.parametrize("name", BULLET)
def test_same_seed_same_numbers_on_used_connections(name):
    first = rollout(name, 3)  # a new connection, or one that another task has used
    rollout(name, 4)
    assert same(first, rollout(name, 3))
    assert not same(first, rollout(name, 5))


@pytest.mark.parametrize("name", ["BallCircle", "CarRun", "DroneCircle", "AntRun"])
def test_leaving_the_meshes_out_does_not_change_the_physics(name):
    assert same(rollout(name, 3), rollout(name, 3, visual=True))


def test_global_random_state_is_neither_used_nor_changed():
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = rollout("BallCircle", 7, steps=3)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert same(first, rollout("BallCircle", 7, steps=3))


def test_velocity_cost():
    task = get_task("HopperVelocity")
    next_obs = np.zeros((3, task.n_obs), np.float32)
    next_obs[:, task.velocity_index] = 0.7, 0.75, 2
    assert task.cost_of(next_obs, None, next_obs).tolist() == [0, 1, 1]
    with pytest.raises(UserError, match="BallRun.*'costs'"):
        get_task("BallRun").cost_of(next_obs, None, next_obs)


@pytest.mark.parametrize("name", ["HopperVelocity", "Walker2dVelocity", "HalfCheetahVelocity"])
def test_velocity_index_is_the_forward_speed(name):
    task = get_task(name)
    env = make_env(task, 0)
    env.reset()
    speeds, truth = [], []
    for _ in range(20):
        obs, _, terminated, _, info = env.step(env.action_space.sample())
        speeds.append(obs[task.velocity_index])
        truth.append(float(env.unwrapped.data.qvel[0]))  # the root's slide joint along x
        assert info["cost"] == (obs[task.velocity_index] > task.velocity_limit)
        if terminated:
            break
    assert np.allclose(speeds, np.clip(truth, -10, 10))


def test_velocity_scores_are_d4rls():
    import saferule.simulator  # noqa: F401  (d4rl imports only with its help)

    infos = pytest.importorskip("d4rl.infos")
    for task in TASKS.values():
        if task.source == "d4rl":
            name = task.dsrl_file.replace("_", "-")
            assert (infos.REF_MIN_SCORE[name], infos.REF_MAX_SCORE[name]) == (task.return_min, task.return_max)
            assert infos.DATASET_URLS[name].endswith(task.dsrl_file + ".hdf5")


def test_rendering():
    from saferule import simulator

    env = make_env("BallRun", 0, visual=True)
    env.reset()
    frame = simulator.render(env)
    env.close()
    assert frame.dtype == np.uint8 and frame.shape == (360, 480, 3) and frame.std() > 5
