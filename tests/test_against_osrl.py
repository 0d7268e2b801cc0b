"""The pure parts of benchmarks/against_osrl.py and lockstep_osrl.py; all of them with a checkout of OSRL named by $OSRL."""
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import against_osrl as against  # noqa: E402
import lockstep_osrl  # noqa: E402

from saferule.config import CONFIGS, with_overrides  # noqa: E402
from saferule.hdf5 import write_hdf5  # noqa: E402
from saferule.tasks import get_task  # noqa: E402

needs_osrl = pytest.mark.skipif("OSRL" not in os.environ, reason="needs a checkout of OSRL, named by $OSRL")


def record(side, seed, ret, cost):
    return {"task": "BallCircle", "learner": "cpq", "implementation": side, "seed": seed, "ret": [ret - 1, ret + 1],
            "cost": [cost, cost], "identity": {"settings": {"steps": 7}}}


def compared(osrl, ours, cost=(0.0, 0.0, 0.0)):
    pairs = [("osrl", osrl), ("ours", ours)]
    return against.comparison(against.tidy([record(s, k, v, cost[k]) for s, values in pairs for k, v in enumerate(values)]))


# ------------------------------------------------------------------------------------------------------------ settings
@pytest.mark.parametrize("learner", against.SETTINGS)
def test_every_setting_reaches_both_sides(learner):
    settings = against.SETTINGS[learner]
    with_overrides(CONFIGS[learner], {**settings, **against.PARITY, **against.WRITTEN_IN[learner]}, learner)   # ours: or it raises
    model, trainer = against.in_osrl_words(settings)
    handed_on = {word for name in settings for word in (*against.MODEL.get(name, ()), *against.TRAINER.get(name, ()))}
    assert {*model, *trainer} == handed_on
    assert set(settings) <= {*against.MODEL, *against.TRAINER, *against.LOOP}
    assert model["a_hidden_sizes"] == model["c_hidden_sizes"] == [64, 64] and model["num_q"] == model["num_qc"] == 2
    assert trainer["reward_scale"] == settings["reward_scale"] and trainer["critic_lr"] == settings["lr"]


def test_an_actors_own_rate_wins_and_an_untranslated_setting_is_refused():
    trainer = against.in_osrl_words({"lr": 1e-3, "lr_actor": 5e-4, "steps": 3})[1]
    assert trainer == {"actor_lr": 5e-4, "critic_lr": 1e-3, "vae_lr": 1e-3}
    with pytest.raises(KeyError, match="colour"):
        against.in_osrl_words({"colour": 1})


# -------------------------------------------------------------------------------------------------------------- acting
class Noisy(torch.nn.Module):
    """Acts as OSRL's models do: one observation [n_obs] in, an action and something else out, noise from torch's own generator."""

    def act(self, obs, deterministic, with_logprob):
        assert deterministic and with_logprob and obs.shape == (3,)
        return np.float32(obs[:2] * torch.randn(2).numpy()), None


def check_wrapper(model, n_obs):
    policy, obs = against.OSRLPolicy(model), torch.linspace(-1, 1, 4 * n_obs).view(1, 4, n_obs)
    seeded = lambda: torch.Generator().manual_seed(5)
    one = policy.act(obs[:, :1], seeded())
    torch.manual_seed(int(torch.randint(2**62, (), generator=seeded())))
    assert np.array_equal(one[0, 0].numpy(), model.act(obs[0, 0].numpy(), True, True)[0])      # OSRL's own action
    many, state = policy.act(obs, seeded()), torch.get_rng_state()
    assert torch.equal(many[:, :1], one) and torch.equal(policy.act(obs, seeded()), many)      # deterministic given the generator
    assert torch.equal(torch.get_rng_state(), state)                                           # the global stream is left alone
    return many, policy.act(obs, torch.Generator().manual_seed(6))


def test_the_wrapped_policy_acts_as_the_model_does():
    many, other = check_wrapper(Noisy(), 3)
    assert many.shape == (1, 4, 2) and not torch.equal(many, other)


@needs_osrl
@pytest.mark.parametrize("learner", against.SETTINGS)
def test_the_wrapped_policy_acts_as_osrls_model_does(learner):
    task = get_task("BallCircle")
    model = against.osrl_trainer(Path(os.environ["OSRL"]), learner, task, against.SETTINGS[learner]).model
    many, other = check_wrapper(model, task.n_obs)
    assert torch.equal(many, other) == (learner != "bcq_lag")                                  # BCQ-Lag alone samples when acting


# ---------------------------------------------------------------------------------------------------------------- runs
def test_a_kept_run_counts_only_with_the_same_identity(tmp_path):
    mine = against.identity("cpq", "osrl", "d" * 64, "03a4586")
    against.write(tmp_path / "r.json", json.dumps({"identity": mine, "ret": [1.0]}))
    assert against.kept(tmp_path / "r.json", mine)["ret"] == [1.0]
    assert against.kept(tmp_path / "r.json", against.identity("cpq", "osrl", "e" * 64, "03a4586")) is None     # other data
    assert against.kept(tmp_path / "r.json", {**mine, "settings": {**mine["settings"], "lr": 1.0}}) is None
    assert against.kept(tmp_path / "absent.json", mine) is None
    (tmp_path / "r.json").write_text('{"identity": ')
    assert against.kept(tmp_path / "r.json", mine) is None                                                     # cut off
    ours = [against.identity(k, "ours", "d" * 64, "03a4586")["code"] for k in ("cpq", "bcq_lag")]
    assert len({*ours, mine["code"]}) == 3                                                     # each learner hangs on its own file


# -------------------------------------------------------------------------------------------------------------- tables
def test_welchs_interval_by_hand():
    """Means 3 and 2; s^2 / n = 1 / 3 each, so df = 4 and the half width is 2.776445 sqrt(2 / 3)."""
    low, high = against.welch([2, 3, 4], [1, 2, 3])
    assert (low, high) == pytest.approx((1 - 2.776445 * (2 / 3) ** 0.5, 1 + 2.776445 * (2 / 3) ** 0.5), abs=1e-6)
    assert against.welch([5, 5], [2, 2]) == (3, 3)                                             # nothing varies
    low, high = against.welch([2, 2], [1, 3])                                                  # one side does: df = 1, s^2 / n = 1
    assert (low, high) == pytest.approx((-12.706205, 12.706205), abs=1e-5)


def test_tidy_and_the_difference():
    runs = against.tidy([record("osrl", 0, 10.0, 3.0)])
    assert runs.to_dict("records") == [{"task": "BallCircle", "learner": "cpq", "implementation": "osrl", "seed": 0,
                                        "return_mean": 10.0, "cost_mean": 3.0, "episodes": 2, "steps": 7}]
    same = compared([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    assert list(same.measure) == ["return", "cost"] and list(same.difference) == [1.0, 0.0]
    assert -1 <= same.boot_low[0] <= 0 and 2 <= same.boot_high[0] <= 3                         # means of 3 draws a side
    assert same.zero_inside.all() and against.verdicts(same) == {("BallCircle", "cpq"): "no difference seen"}


def test_a_gap_is_called_a_gap():
    apart = compared([1.0, 2.0, 3.0], [101.0, 102.0, 103.0])
    assert list(apart.zero_inside) == [False, True] and list(apart.zero_inside_boot) == [False, True]
    assert against.verdicts(apart) == {("BallCircle", "cpq"): "differs in return"}
    text = against.markdown(apart, against.tidy([record("osrl", k, 1.0, 0.0) for k in range(3)]), "03a4586463")
    assert "| BallCircle | cpq | differs in return |" in text and "(101.0/102.0/103.0) | +100.0 |" in text
    assert "Of 2 differences 1 have" in text and "| no |" in text and "OSRL revision 03a4586;" in text


# ------------------------------------------------------------------------------------------------------------ lockstep
def test_noise_is_the_same_call_by_call_and_skips_what_is_not_used():
    one, two = lockstep_osrl.Noise(3), lockstep_osrl.Noise(3, used=(True, False))
    first = one(2, 3)
    assert torch.equal(two((2, 3)), first) and not two(4).any() and torch.equal(two(5), one(5))
    assert not torch.equal(first, one(2, 3))
    with lockstep_osrl.drawing(lockstep_osrl.Noise(3)):
        assert torch.equal(torch.randn((2, 3)), first)
    with lockstep_osrl.drawing(lockstep_osrl.Noise(3)):
        assert torch.equal(torch.distributions.Normal(torch.ones(2, 3), 2 * torch.ones(2, 3)).rsample(), 1 + 2 * first)
    assert torch.get_default_dtype() == torch.float32
    with lockstep_osrl.in_float64():
        assert lockstep_osrl.Noise(3)(1).dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32


def test_how_far_scalars_are_apart():
    gap = lambda critic, lam: lockstep_osrl.apart({"critic": critic, "lam": lam}, {"critic": 4.0, "lam": 0.5, "unused": 9.0})
    assert gap(4.0, 0.5) == 0 and gap(6.0, 0.5) == 0.5 and gap(4.0, 0.25) == 0.25 and np.isnan(gap(float("nan"), 0.5))


@needs_osrl
@pytest.mark.parametrize("learner", against.SETTINGS)
def test_a_run_in_lockstep(learner, tmp_path):
    rng, task, n = np.random.default_rng(0), get_task("BallCircle"), 400
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    end = np.arange(n) % 20 == 19
    file = write_hdf5(tmp_path / "d.hdf5", {"obs": draw(n, task.n_obs), "next_obs": draw(n, task.n_obs), "reward": draw(n),
                                            "action": rng.uniform(-1, 1, (n, task.n_act)), "cost": rng.integers(0, 2, n),
                                            "terminal": end & (rng.random(n) < 0.5), "timeout": end})
    found = lockstep_osrl.lockstep(Path(os.environ["OSRL"]), learner, task, file, steps=3)
    assert max(found["scalars"].values()) < 1e-12 and found["weights"] < 1e-12 and found["actions"] < 1e-6 and found["rows"] == 1
    assert list(found["scalars"]) == list(found["itself"]) == ["1", "3"] and 0 < found["itself"]["3"] < 1e-12
    assert f"| BallCircle | {learner} |" in lockstep_osrl.markdown([found], "03a4586463")


# --------------------------------------------------------------------------------------------------------------- speed
def test_turns_are_taken_and_timed():
    now, calls = SimpleNamespace(time=0.0), []

    def step(name, seconds):
        def run(t):
            calls.append(name)
            now.time += seconds
        return run

    took = against.turns({"a": step("a", 2.0), "b": step("b", 3.0)}, rounds=2, steps_per_turn=3, warm_up=1, clock=lambda: now.time)
    assert took == {"a": [2.0, 2.0], "b": [3.0, 3.0]}
    assert "".join(calls) == "ab" + 2 * "aaabbb"
