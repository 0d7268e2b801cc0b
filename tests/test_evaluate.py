"""Rollouts: equal for any number of processes and any stacking, same starts for every policy, usable everywhere."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from saferule.errors import UserError
from saferule.evaluate import BLOCK, Returns, evaluate, rollout_frames

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Fake(torch.nn.Module):
    """Replica r pushes with strength gain[r] towards +x, and with some noise along y."""

    def __init__(self, *gain, noise=0.3, n_act=2):
        super().__init__()
        self.gain, self.noise, self.n_act = torch.nn.Parameter(torch.tensor(gain)), noise, n_act

    @property
    def replicas(self):
        return len(self.gain)

    def act(self, obs, generator):
        R, E, _ = obs.shape
        assert R == self.replicas and obs.dtype == torch.float32
        action = torch.randn(R, E, self.n_act, generator=generator) * self.noise
        action[..., 0] = self.gain[:, None]
        return action


class Picking(Fake):
    def pick(self, replicas):
        return Picking(*self.gain[list(replicas)].tolist(), noise=self.noise, n_act=self.n_act)


def same(a: Returns, b: Returns):
    return all(np.array_equal(x, y) for x, y in zip(a, b))


def test_same_for_any_number_of_processes():
    torch.randn(300, 300) @ torch.randn(300, 300)  # the parent has used torch's threads before it forks
    policy = Picking(0.1, 0.5, 0.9)
    one, three = (evaluate(policy, "BallRun", 3, seed=1, workers=w, progress=False) for w in (1, 3))
    assert same(one, three)
    assert one.ret.shape == (3, 3) and one.ret.dtype == np.float64 and one.length.dtype == np.int64
    assert np.all(one.length == 100)
    assert not np.array_equal(one.ret, evaluate(policy, "BallRun", 3, seed=2, workers=1, progress=False).ret)


def test_a_policy_does_not_feel_its_neighbours():
    together = evaluate(Picking(0.1, 0.5, 0.9), "BallRun", 2, workers=1, progress=False)
    alone = evaluate(Picking(0.5), "BallRun", 2, workers=1, progress=False)
    assert np.array_equal(together.ret[1], alone.ret[0])
    assert together.ret[2].mean() > together.ret[1].mean() > together.ret[0].mean()


def test_every_policy_meets_the_same_starts():
    r = evaluate(Fake(0.4, 0.4, noise=0.0), "BallCircle", 3, workers=1, progress=False)
    assert np.array_equal(r.ret[0], r.ret[1]) and len(set(r.ret[0])) == 3
    assert np.all(r.cost[0] > 0)  # it rolls out of the boundary


def test_more_episodes_than_a_block():
    r = evaluate(Fake(0.2, noise=0.0), "BallRun", BLOCK + 2, workers=2, progress=False)
    assert r.ret.shape == (1, BLOCK + 2)
    assert np.array_equal(r.ret[:, :2], evaluate(Fake(0.2, noise=0.0), "BallRun", 2, workers=1, progress=False).ret)


def test_an_early_end_stops_the_count_and_not_the_others():
    r = evaluate(Fake(1.0, noise=1.0, n_act=4), "DroneCircle", 4, seed=3, workers=1, progress=False)
    assert r.length.min() < 300
    again = evaluate(Fake(1.0, noise=1.0, n_act=4), "DroneCircle", 4, seed=3, workers=1, progress=False)
    assert same(r, again)


def test_velocity_task_has_costs():
    r = evaluate(Fake(0.5, n_act=6), "HalfCheetahVelocity", 1, workers=1, progress=False)
    assert r.length[0, 0] == 1000 and 0 <= r.cost[0, 0] <= 1000


@pytest.mark.parametrize("workers", [1, 2])
def test_diverged_policy_is_named(workers):
    with pytest.raises(UserError, match=r"policy \(replica 1\) returned NaN or infinite"):
        evaluate(Picking(0.5, float("nan")), "BallRun", 1, workers=workers, progress=False)


def test_wrong_shape_and_no_episodes():
    with pytest.raises(UserError, match="actions of shape .1, 1, 4. .*wants .1, 1, 2."):
        evaluate(Fake(0.5, n_act=4), "BallRun", 1, workers=1, progress=False)
    with pytest.raises(UserError, match="at least 1 episode"):
        evaluate(Fake(0.5), "BallRun", 0)


def test_threads_and_seed_of_the_caller_are_left_alone():
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    evaluate(Fake(0.5), "BallRun", 1, workers=1, progress=False)
    assert torch.get_num_threads() == threads and torch.equal(state, torch.random.get_rng_state())


CODE = """
import torch
from saferule.collect import collect
from saferule.evaluate import evaluate
class Fake:
    replicas = 2
    def act(self, obs, generator): return torch.randn(*obs.shape[:2], 2, generator=generator)
data = collect("BallRun", 2, seed=0, workers=2)
result = evaluate(Fake(), "BallRun", 2, workers=2)
print("total", round(float(data["reward"].sum() + result.ret.sum()), 3))
"""


def test_in_a_script_and_in_a_kernel(tmp_path):
    """No __main__ guard, no special streams, no `undefined symbol`; and the same numbers."""
    (tmp_path / "script.py").write_text(CODE)
    script = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=120)
    assert script.returncode == 0, script.stderr
    assert script.stdout.count("\n") == 1, "the simulator's own chatter is silenced"
    import nbclient
    import nbformat

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    streams = [o for o in book.cells[0].outputs if o.get("name") == "stdout"]
    assert "".join(o["text"] for o in streams) == script.stdout


def test_frames():
    frames = rollout_frames(Fake(0.2, 0.9), 1, "BallRun", every=50)
    assert frames.shape == (2, 360, 480, 3) and frames.dtype == np.uint8 and not np.array_equal(*frames)
