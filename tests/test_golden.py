"""Parity mode against numbers recorded from OSRL (revision 03a4586) by benchmarks/record_osrl.py."""
import json
from pathlib import Path

import pytest
import torch
from golden import Noise, batch, checksums, weight

from saferule.config import BCQLagConfig
from saferule.data import Batch, Units
from saferule.learners import LEARNERS, discounted_limit

RECORDED = json.loads((Path(__file__).parent / "data" / "osrl_bcq_lag.json").read_text())
Z = RECORDED["sizes"]


def osrl_names() -> dict[str, tuple[str, int, slice | None]]:
    """OSRL's parameter -> ours: name, member of the stack, columns (our VAE's encoder gives mean and log-std at once)."""
    names = {}

    def mlp(theirs, ours, member=0):
        for i in range(3):
            names[f"{theirs}.{2 * i}"] = (f"{ours}.layers.{i}", member, None)

    for old, target in (("", ""), ("_old", "_target")):
        mlp(f"actor{old}.pi", f"actor{target}.net")
        for critic in ("critic", "cost_critic"):
            for group in (0, 1):
                for i in range(Z["heads"]):
                    mlp(f"{critic}{old}.q{group + 1}_nets.{i}", f"{critic}{target}.net", group * Z["heads"] + i)
    latent = 2 * Z["n_act"]
    for i, name in enumerate(("e1", "e2")):
        names[f"vae.{name}"] = (f"vae.encoder.layers.{i}", 0, None)
    names["vae.mean"] = ("vae.encoder.layers.2", 0, slice(0, latent))
    names["vae.log_std"] = ("vae.encoder.layers.2", 0, slice(latent, 2 * latent))
    for i, name in enumerate(("d1", "d2", "d3")):
        names[f"vae.{name}"] = (f"vae.decoder.layers.{i}", 0, None)
    return {f"{k}.{kind}": (f"{ours}.{kind}", *rest) for k, (ours, *rest) in names.items() for kind in ("weight", "bias")}


def view(learner, name) -> torch.Tensor:
    """Our tensor in OSRL's layout: weight [out, in], bias [out]."""
    ours, member, columns = osrl_names()[name]
    value = learner.get_parameter(ours)[member].detach()
    value = value if columns is None else value[:, columns]
    return value.T if name.endswith("weight") else value[0]


def made():
    same = {k: Z[k] for k in ("vae_hidden", "heads", "batch", "samples", "gamma", "tau", "lr")}
    cfg = BCQLagConfig(mode="parity", vae_steps=0, hidden=tuple(Z["hidden"]), beta=0.5, **same)
    units = Units(torch.zeros(1, Z["n_obs"]), torch.ones(1, Z["n_obs"]), torch.ones(1))
    limit = torch.tensor([discounted_limit(Z["cost_limit"], Z["gamma"], Z["horizon"])])
    learner = LEARNERS["bcq_lag"](cfg, units, limit, [0], n_act=Z["n_act"]).ready()
    with torch.no_grad():
        for name in osrl_names():
            own = view(learner, name)
            own.copy_(weight(name.replace("_old.", "."), tuple(own.shape)))
    learner.randn = Noise()
    return learner


def test_every_parameter_of_ours_is_one_of_theirs():
    learner = made()
    assert set(RECORDED["steps"][0]["parameters"]) == set(osrl_names())
    assert sum(view(learner, n).numel() for n in osrl_names()) == sum(p.numel() for p in learner.parameters())


def test_three_updates_agree_with_osrl():
    """Losses, multiplier, and sum and sum of squares of every parameter, to 1e-5 in float32."""
    learner = made()
    for t, recorded in enumerate(RECORDED["steps"]):
        out = learner.update(Batch(**{k: v[None] for k, v in batch(t, Z["batch"], Z["n_obs"], Z["n_act"]).items()}), t)
        for name in ("vae", "critic", "cost_critic", "actor", "lam"):
            assert out[name].item() == pytest.approx(recorded[name], abs=1e-5, rel=1e-5), (t, name)
        ours = checksums({name: view(learner, name) for name in osrl_names()})
        for name, sums in recorded["parameters"].items():
            assert ours[name] == pytest.approx(sums, abs=1e-5, rel=1e-5), (t, name)
    assert learner.randn.calls == RECORDED["noise_calls"]
    assert RECORDED["steps"][-1]["lam"] > 0.1                                  # the multiplier took part


def test_the_default_mode_differs_from_osrl():
    """The comparison can fail: the corrected mode gives other numbers on the same start."""
    learner = made()
    learner.parity = False
    out = learner.update(Batch(**{k: v[None] for k, v in batch(0, Z["batch"], Z["n_obs"], Z["n_act"]).items()}), 0)
    assert out["cost_critic"].item() != pytest.approx(RECORDED["steps"][0]["cost_critic"], rel=1e-3)
