"""Parity mode against numbers recorded from OSRL (revision 03a4586) by benchmarks/record_osrl.py."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden import Noise, batch, checksums, weight

from saferule.config import CONFIGS
from saferule.data import Batch, Units
from saferule.learners import LEARNERS, discounted_limit
from saferule.osrl.layout import views

DATA = Path(__file__).parent / "data"
KINDS = [kind for kind in ("bcq_lag", "bear_lag", "cpq") if kind in LEARNERS]  # learners with a VAE and critics
RECORDED = {kind: json.loads((DATA / f"osrl_{kind}.json").read_text()) for kind in KINDS}
Z = RECORDED["bcq_lag"]["sizes"]


def made(kind):
    same = {k: Z[k] for k in ("vae_hidden", "heads", "batch", "samples", "gamma", "tau", "lr")}
    more = RECORDED[kind].get("settings", {})
    cfg = replace(CONFIGS[kind], mode="parity", vae_steps=0, hidden=tuple(Z["hidden"]), beta=0.5, **same, **more)
    units = Units(torch.zeros(1, Z["n_obs"]), torch.ones(1, Z["n_obs"]), torch.ones(1))
    limit = torch.tensor([discounted_limit(RECORDED[kind].get("cost_limit", Z["cost_limit"]), Z["gamma"], Z["horizon"])])
    learner = LEARNERS[kind](cfg, units, limit, [0], n_act=Z["n_act"]).ready()
    with torch.no_grad():
        for name, own in views(learner).items():
            own.copy_(weight(name.replace("_old.", "."), tuple(own.shape)))
    learner.randn = Noise()
    return learner


def numbered_batch(t):
    return Batch(**{k: v[None] for k, v in batch(t, Z["batch"], Z["n_obs"], Z["n_act"]).items()})


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_ours_is_one_of_theirs(kind):
    learner = made(kind)
    assert set(RECORDED[kind]["steps"][0]["parameters"]) == set(views(learner))
    assert sum(v.numel() for v in views(learner).values()) == sum(p.numel() for p in learner.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_three_updates_agree_with_osrl(kind):
    """Losses, multipliers, and sum and sum of squares of every parameter, to 1e-5 in float32."""
    learner = made(kind)
    for t, recorded in enumerate(RECORDED[kind]["steps"]):
        out = learner.update(numbered_batch(t), t)
        for name in set(recorded) - {"parameters"}:
            assert out[name].item() == pytest.approx(recorded[name], abs=1e-5, rel=1e-5), (t, name)
        ours = checksums(views(learner))
        for name, sums in recorded["parameters"].items():
            assert ours[name] == pytest.approx(sums, abs=1e-5, rel=1e-5), (t, name)
    assert learner.randn.calls == RECORDED[kind]["noise_calls"]
    if kind == "cpq":
        assert 0 < out["safe"].item() < 1                                      # some actions look safe, some do not
    else:
        assert RECORDED[kind]["steps"][-1]["lam"] > 0.1                        # the multiplier took part


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_mode_differs_from_osrl(kind):
    """The comparison can fail: the corrected mode gives other numbers on the same start."""
    learner = made(kind)
    learner.parity = False
    out = learner.update(numbered_batch(0), 0)
    assert out["cost_critic"].item() != pytest.approx(RECORDED[kind]["steps"][0]["cost_critic"], rel=1e-3)
