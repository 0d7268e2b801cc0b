"""Where each tensor of OSRL's state dictionaries lies in our stacked learners.

Shapes      theirs [out, in] and [out]; ours [R E, in, out] and [R E, 1, out], R replicas, E members of an ensemble
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import BC_NAMES
from ..errors import UserError
from ..learners import LEARNERS
from ..train import Learner

TITLES = {"bc": "BC", "bcq_lag": "BCQ-Lag", "bear_lag": "BEAR-Lag", "cpq": "CPQ", "cdt": "CDT"}
KIND = {**dict.fromkeys(BC_NAMES, "bc"), **{kind: kind for kind in TITLES if kind != "bc"}}                   # learner -> family
_LAGRANGIAN = ("actor", "critic", "cost_critic", "vae", "actor_old", "critic_old", "cost_critic_old")
MODULES = {"bc": ("actor",), "bcq_lag": _LAGRANGIAN, "bear_lag": _LAGRANGIAN,
           "cpq": ("actor", "critic", "vae", "cost_critic", "actor_old", "critic_old", "cost_critic_old")}     # as in the file
ALL = slice(None)


class Sizes(NamedTuple):
    """Of a model's networks. n_in: what its policy reads, with the cost limit if that is an input."""
    n_in: int
    n_act: int
    hidden: tuple[int, ...]
    vae_hidden: int = 0
    heads: int = 0


class CDTSizes(NamedTuple):
    """Of a transformer; context: the steps that it reads, horizon: those of an episode."""
    n_in: int
    n_act: int
    width: int
    layers: int
    context: int
    horizon: int


class Place(NamedTuple):
    """A tensor of OSRL's: its shape there; our parameter, the member of the stack, and its columns.

    ours empty: a causal mask, always the same. spare: OSRL keeps it and never uses it, ours has none; a copy of `ours` is written.
    table: rows are entries, there and here, and not turned.
    """
    shape: tuple[int, ...]
    ours: str
    member: int = 0
    columns: slice = ALL
    spare: bool = False
    table: bool = False


def layout(kind: str, z: Sizes | CDTSizes) -> dict[str, Place]:
    """OSRL's state dictionary of a learner, in its order: name -> place."""
    if kind == "cdt":
        return dict(_cdt(z))
    out: dict[str, Place] = {}
    for module in MODULES[kind]:
        net = module.removesuffix("_old")
        spare = kind == "cpq" and module == "actor_old"
        ours = net if spare else module.replace("_old", "_target")
        for theirs, n_in, n_out, place, member, columns in _linears(kind, net, z):
            for part, shape in (("weight", (n_out, n_in)), ("bias", (n_out,))):
                out[f"{module}.{theirs}.{part}"] = Place(shape, f"{ours}.{place}.{part}", member, columns, spare)
    return out


Line = tuple[str, int, int, str, int, slice]            # a linear layer: OSRL's name, inputs, outputs; ours, member, columns


def _linears(kind: str, net: str, z: Sizes) -> Iterator[Line]:
    """The linear layers of one network."""
    both, latent = z.n_in + z.n_act, 2 * z.n_act
    if net == "vae":
        yield "e1", both, z.vae_hidden, "encoder.layers.0", 0, ALL
        yield "e2", z.vae_hidden, z.vae_hidden, "encoder.layers.1", 0, ALL
        yield "mean", z.vae_hidden, latent, "encoder.layers.2", 0, slice(0, latent)           # ours gives both at once
        yield "log_std", z.vae_hidden, latent, "encoder.layers.2", 0, slice(latent, 2 * latent)
        yield "d1", z.n_in + latent, z.vae_hidden, "decoder.layers.0", 0, ALL
        yield "d2", z.vae_hidden, z.vae_hidden, "decoder.layers.1", 0, ALL
        yield "d3", z.vae_hidden, z.n_act, "decoder.layers.2", 0, ALL
    elif net == "actor" and kind == "bc":
        yield from _mlp("pi", (z.n_in, *z.hidden, z.n_act), "layers")
    elif net == "actor" and kind == "bcq_lag":
        yield from _mlp("pi", (both, *z.hidden, z.n_act), "net.layers")
    elif net == "actor":
        yield from _mlp("net", (z.n_in, *z.hidden), "trunk.layers")
        yield "mu_layer", z.hidden[-1], z.n_act, "mu", 0, ALL
        yield "log_std_layer", z.hidden[-1], z.n_act, "log_std", 0, ALL
    else:
        for g, group in enumerate(("q_nets",) if kind == "cpq" else ("q1_nets", "q2_nets")):
            for i in range(z.heads):
                yield from _mlp(f"{group}.{i}", (both, *z.hidden, 1), "net.layers", g * z.heads + i)


def _mlp(theirs: str, sizes: Sequence[int], ours: str, member: int = 0) -> Iterator[Line]:
    for i, (n_in, n_out) in enumerate(pairwise(sizes)):  # every second entry of theirs is an activation
        yield f"{theirs}.{2 * i}", n_in, n_out, f"{ours}.{i}", member, ALL


def _cdt(z: CDTSizes) -> Iterator[tuple[str, Place]]:
    W, length = z.width, 4 * z.context                   # of a token; of a sequence of R, C, s, a

    def linear(theirs: str, n_in: int, n_out: int, ours: str, columns: slice = ALL, joint: str = ".") -> Iterator:
        yield f"{theirs}{joint}weight", Place((n_out, n_in), f"policy.{ours}.weight", 0, columns)
        yield f"{theirs}{joint}bias", Place((n_out,), f"policy.{ours}.bias", 0, columns)

    def norm(theirs: str, ours: str) -> Iterator:
        for part in ("weight", "bias"):
            yield f"{theirs}.{part}", Place((W,), f"policy.{ours}.{part}")

    yield from norm("emb_norm", "trunk.norm_in")
    yield from norm("out_norm", "trunk.norm_out")
    yield "timestep_emb.weight", Place((z.horizon + z.context, W), "policy.time.weight", table=True)
    for name, n, i in (("state", z.n_in, 2), ("action", z.n_act, 3), ("cost", 1, 1), ("return", 1, 0)):
        yield from linear(f"{name}_emb", n, W, f"embed.{i}")
    for i in range(z.layers):
        theirs, ours = f"blocks.{i}", f"trunk.blocks.{i}"
        yield f"{theirs}.causal_mask", Place((length, length), "")
        yield from norm(f"{theirs}.norm1", f"{ours}.norm1")
        yield from norm(f"{theirs}.norm2", f"{ours}.norm2")
        yield from linear(f"{theirs}.attention.in_proj", W, 3 * W, f"{ours}.qkv", joint="_")
        yield from linear(f"{theirs}.attention.out_proj", W, W, f"{ours}.out")
        yield from linear(f"{theirs}.mlp.0", W, 4 * W, f"{ours}.mlp1")
        yield from linear(f"{theirs}.mlp.2", 4 * W, W, f"{ours}.mlp2")
    yield from linear("action_head.mu", W, z.n_act, "action", slice(0, z.n_act))
    yield from linear("action_head.log_std", W, z.n_act, "action", slice(z.n_act, 2 * z.n_act))
    yield from linear("state_pred_head", W, z.n_in, "next_obs")
    yield from linear("cost_pred_head", W, 2, "cost")


# -------------------------------------------------------------------------------------------------------- of a learner
def kind_of(learner: Learner) -> str:
    """The family of a learner. Raises UserError for one that is not exchanged."""
    for name, kind in KIND.items():
        if type(learner) is LEARNERS[name]:
            return kind
    raise UserError(f"{type(learner).__name__} is not exchanged with OSRL; those that are: {', '.join(TITLES.values())}.")


def places(learner: Learner) -> dict[str, Place]:
    """Where one replica's tensors lie, by OSRL's names."""
    cfg, kind, n = learner.cfg, kind_of(learner), (learner.n_obs + getattr(learner, "multi_task", False), learner.n_act)
    if kind == "cdt":
        return layout(kind, CDTSizes(*n, cfg.width, cfg.layers, cfg.context, learner.horizon))
    return layout(kind, Sizes(*n, tuple(cfg.hidden), getattr(cfg, "vae_hidden", 0), getattr(cfg, "heads", 0)))


def view(learner: Learner, place: Place, replica: int = 0) -> Tensor:
    """Our tensor in OSRL's layout; writing to it writes to the learner, unless it is a mask."""
    if not place.ours:
        return causal_mask(place.shape)
    stacked = learner.get_parameter(place.ours).detach()
    value = stacked[replica * (len(stacked) // learner.replicas) + place.member][:, place.columns]
    if len(place.shape) == 1:
        return value[0]
    return value if place.table else value.T


def causal_mask(shape: tuple[int, ...]) -> Tensor:
    """True where a token may not look: at those after it."""
    return ~torch.ones(shape, dtype=torch.bool).tril()


def views(learner: Learner, replica: int = 0) -> dict[str, Tensor]:
    """Every parameter of one replica, by OSRL's name and in its layout."""
    return {name: view(learner, place, replica) for name, place in places(learner).items() if place.ours and not place.spare}


# ----------------------------------------------------------------------------------------------------------- of a file
def kind_among(tensors: Mapping[str, Tensor], where: str) -> str:
    """The family to which weights of these names belong. Raises UserError if there is none."""
    nets = {name.partition(".")[0] for name in tensors}
    if "critic.q1_nets.0.0.weight" in tensors and "vae" in nets:
        return "bcq_lag" if "actor.pi.0.weight" in tensors else "bear_lag"
    if "critic.q_nets.0.0.weight" in tensors and "vae" in nets:
        return "cpq"
    if "actor.pi.0.weight" in tensors and nets == {"actor"}:
        return "bc"
    if {"state_emb", "blocks"} <= nets:
        return "cdt"
    known = ", ".join(TITLES.values())
    if "nu_network" in nets:
        raise UserError(f"{where}: is a checkpoint of COptiDICE, which is not imported; known: {known}.")
    names = ", ".join(ascii(name[:40])[1:-1] for name in list(tensors)[:3]) or "nothing"
    raise UserError(f"{where}: holds the weights of no learner known here ({names}, ...); known: {known}.")


def sizes_among(kind: str, tensors: Mapping[str, Tensor], where: str) -> Sizes | CDTSizes:
    """A model's sizes, from its actor's layers, its VAE's first one, and the number of its critics; or those of a transformer."""
    if kind == "cdt":
        size = lambda name, axis: (*tensors.get(name, torch.zeros(())).shape, 0, 0)[axis]
        layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        context = size("blocks.0.causal_mask", 0) // 4
        return CDTSizes(size("state_emb.weight", 1), size("action_emb.weight", 1), size("state_emb.weight", 0), layers, context,
                        size("timestep_emb.weight", 0) - context)
    stem = "actor.pi" if kind in ("bc", "bcq_lag") else "actor.net"
    chain: list[int] = []
    while (name := f"{stem}.{2 * max(len(chain) - 1, 0)}.weight") in tensors:
        shape = tuple(tensors[name].shape)
        if len(shape) != 2 or (chain and shape[1] != chain[-1]):
            raise UserError(f"{where}: '{name}' has shape {list(shape)}, which does not continue the layer before it; the file is "
                            "damaged or of another architecture.")
        chain += shape[::-1] if not chain else shape[:1]
    if "actor.mu_layer.weight" in tensors:
        chain.append(_rows(tensors["actor.mu_layer.weight"]))
    vae = _rows(tensors["vae.e1.weight"]) if "vae.e1.weight" in tensors else 0
    group = "critic.q_nets." if kind == "cpq" else "critic.q1_nets."
    heads = len({name.split(".")[2] for name in tensors if name.startswith(group)})
    if len(chain) < 3 or (kind != "bc" and not vae):
        raise UserError(f"{where}: lacks layers of its actor or its VAE; the file is damaged or of another architecture.")
    n_in, *hidden, n_act = chain
    return Sizes(n_in - n_act * (kind == "bcq_lag"), n_act, tuple(hidden), vae, heads)


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 0


def check_layout(kind: str, z: Sizes | CDTSizes, tensors: Mapping[str, Tensor], where: str) -> None:
    """Every tensor of the layout is there, in its shape and type, and no other. Nothing is built before this holds, so that no
    size is believed for which the file does not bring the numbers."""
    form = f"{z.layers} blocks of width {z.width}" if kind == "cdt" else f"{list(z.hidden)} hidden units"
    title, expected = f"{TITLES[kind]} with {form}", layout(kind, z)
    why = "it is of another variant of OSRL" + ", or its critics have different numbers of heads" * (kind not in ("bc", "cdt"))
    if missing := [name for name in expected if name not in tensors]:
        raise UserError(f"{where}: lacks '{missing[0]}' (and {len(missing) - 1} more) of a {title}; {why}.")
    if odd := [name for name in tensors if name not in expected]:
        raise UserError(f"{where}: holds {odd[0]!a:.80} (and {len(odd) - 1} more), which a {title} has not; {why}.")
    for name, place in expected.items():
        found = tensors[name]
        dtype = torch.float32 if place.ours else torch.bool
        if found.dtype != dtype or tuple(found.shape) != place.shape:
            same = "" if kind in ("bc", "cdt") else "; actor and critics must have the same hidden sizes here"
            raise UserError(f"{where}: '{name}' is {list(found.shape)} {found.dtype}, but a {title} has {list(place.shape)} "
                            f"{dtype}{same}.")
        if not place.ours and not torch.equal(found, causal_mask(place.shape)):
            raise UserError(f"{where}: '{name}' is not the mask of a causal transformer; {why}.")
