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

DATA = Path(__file__).parent / "data"
KINDS = [kind for kind in ("bcq_lag", "bear_lag", "cpq") if kind in LEARNERS]  # learners with a VAE and critics
RECORDED = {kind: json.loads((DATA / f"osrl_{kind}.json").read_text()) for kind in KINDS}
Z = RECORDED["bcq_lag"]["sizes"]


def osrl_names(kind: str) -> dict[str, tuple[str, int, slice | None]]:
    """OSRL's parameter -> ours: name, member of the stack, columns (our VAE's encoder gives mean and log-std at once)."""
    names = {}

    def mlp(theirs, ours, member=0, layers=3):
        for i in range(layers):
            names[f"{theirs}.{2 * i}"] = (f"{ours}.layers.{i}", member, None)

    for old, target in (("", ""), ("_old", "_target")):
        if kind == "bcq_lag":
            mlp(f"actor{old}.pi", f"actor{target}.net")
        elif kind == "bear_lag" or not old:                            # CPQ makes no use of its target actor
            mlp(f"actor{old}.net", f"actor{target}.trunk", layers=2)
            names[f"actor{old}.mu_layer"] = (f"actor{target}.mu", 0, None)
            names[f"actor{old}.log_std_layer"] = (f"actor{target}.log_std", 0, None)
        for critic in ("critic", "cost_critic"):
            for i in range(Z["heads"] if kind == "cpq" else 0):        # one group
                mlp(f"{critic}{old}.q_nets.{i}", f"{critic}{target}.net", i)
            for group in () if kind == "cpq" else (0, 1):
                for i in range(Z["heads"]):
                    mlp(f"{critic}{old}.q{group + 1}_nets.{i}", f"{critic}{target}.net", group * Z["heads"] + i)
    latent = 2 * Z["n_act"]
    for i, name in enumerate(("e1", "e2")):
        names[f"vae.{name}"] = (f"vae.encoder.layers.{i}", 0, None)
    names["vae.mean"] = ("vae.encoder.layers.2", 0, slice(0, latent))
    names["vae.log_std"] = ("vae.encoder.layers.2", 0, slice(latent, 2 * latent))
    for i, name in enumerate(("d1", "d2", "d3")):
        names[f"vae.{name}"] = (f"vae.decoder.layers.{i}", 0, None)
    return {f"{k}.{part}": (f"{ours}.{part}", *rest) for k, (ours, *rest) in names.items() for part in ("weight", "bias")}


def view(learner, place, name) -> torch.Tensor:
    """Our tensor in OSRL's layout: weight [out, in], bias [out]."""
    ours, member, columns = place
    value = learner.get_parameter(ours)[member].detach()
    value = value if columns is None else value[:, columns]
    return value.T if name.endswith("weight") else value[0]


def views(learner, kind) -> dict[str, torch.Tensor]:
    return {name: view(learner, place, name) for name, place in osrl_names(kind).items()}


def made(kind):
    same = {k: Z[k] for k in ("vae_hidden", "heads", "batch", "samples", "gamma", "tau", "lr")}
    more = RECORDED[kind].get("settings", {})
    cfg = replace(CONFIGS[kind], mode="parity", vae_steps=0, hidden=tuple(Z["hidden"]), beta=0.5, **same, **more)
    units = Units(torch.zeros(1, Z["n_obs"]), torch.ones(1, Z["n_obs"]), torch.ones(1))
    limit = torch.tensor([discounted_limit(RECORDED[kind].get("cost_limit", Z["cost_limit"]), Z["gamma"], Z["horizon"])])
    learner = LEARNERS[kind](cfg, units, limit, [0], n_act=Z["n_act"]).ready()
    with torch.no_grad():
        for name, own in views(learner, kind).items():
            own.copy_(weight(name.replace("_old.", "."), tuple(own.shape)))
    learner.randn = Noise()
    return learner


def numbered_batch(t):
    return Batch(**{k: v[None] for k, v in batch(t, Z["batch"], Z["n_obs"], Z["n_act"]).items()})


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_ours_is_one_of_theirs(kind):
    learner = made(kind)
    assert set(RECORDED[kind]["steps"][0]["parameters"]) == set(osrl_names(kind))
    assert sum(v.numel() for v in views(learner, kind).values()) == sum(p.numel() for p in learner.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_three_updates_agree_with_osrl(kind):
    """Losses, multipliers, and sum and sum of squares of every parameter, to 1e-5 in float32."""
    learner = made(kind)
    for t, recorded in enumerate(RECORDED[kind]["steps"]):
        out = learner.update(numbered_batch(t), t)
        for name in set(recorded) - {"parameters"}:
            assert out[name].item() == pytest.approx(recorded[name], abs=1e-5, rel=1e-5), (t, name)
        ours = checksums(views(learner, kind))
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
