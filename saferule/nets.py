"""Stacked networks: R independent copies of each, trained at once by batched matrix products.

Letters used throughout the package
    R replicas   B batch   N rows of the pool   E ensemble members (heads) or evaluation episodes
    K sampled candidate actions   T horizon   n_obs, n_act widths   L latent width
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Generators = Sequence[torch.Generator]                 # one per replica: replica r starts like a single run with its seed


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per replica, for initial weights."""
    return [torch.Generator().manual_seed(int(s)) for s in seeds]


class Linear(nn.Module):
    """x [R, B, n_in] -> [R, B, n_out] with weight [R, n_in, n_out].

    Weights and biases start from U(-1/sqrt(n_in), 1/sqrt(n_in)) as nn.Linear's do. PyTorch's initialisers would take the
    fan-in of this layout from the wrong axis. `members` > 1 stacks an ensemble: the first axis is then R * members.
    """

    def __init__(self, gens: Generators, n_in: int, n_out: int, members: int = 1):
        super().__init__()
        bound = 1 / math.sqrt(n_in)

        def draw(*shape: int) -> nn.Parameter:
            rows = [torch.empty(shape).uniform_(-bound, bound, generator=g) for g in gens for _ in range(members)]
            return nn.Parameter(torch.stack(rows))

        self.weight, self.bias = draw(n_in, n_out), draw(1, n_out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class MLP(nn.Module):
    """Linear layers with `hidden` activation between them and none after the last."""

    def __init__(self, gens: Generators, n_in: int, hidden: Sequence[int], n_out: int, members: int = 1, act: str = "relu_"):
        super().__init__()
        sizes = [n_in, *hidden, n_out]
        self.layers = nn.ModuleList(Linear(gens, i, o, members) for i, o in zip(sizes, sizes[1:]))
        self.act = getattr(torch, act)                 # in place: the products' own buffers are reused

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)


class Critic(nn.Module):
    """Ensemble of E value heads: obs [R, B, n_obs], action [R, B, n_act] -> [R, E, B]."""

    def __init__(self, gens: Generators, n_obs: int, n_act: int, hidden: Sequence[int], heads: int):
        super().__init__()
        self.heads = heads
        self.net = MLP(gens, n_obs + n_act, hidden, 1, members=heads)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], -1)                              # [R, B, n]
        R, B, n = x.shape
        x = x[:, None].expand(R, self.heads, B, n).reshape(R * self.heads, B, n)
        return self.net(x).view(R, self.heads, B)


class Perturbation(nn.Module):
    """BCQ's actor: moves an action by at most phi and keeps it in [-1, 1]. Tanh hidden layers (OSRL)."""

    def __init__(self, gens: Generators, n_obs: int, n_act: int, hidden: Sequence[int], phi: float):
        super().__init__()
        self.phi = phi
        self.net = MLP(gens, n_obs + n_act, hidden, n_act, act="tanh_")

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return (action + self.phi * self.net(torch.cat([obs, action], -1)).tanh()).clamp(-1, 1)


class SquashedGaussian(nn.Module):
    """Actor of BEAR and CPQ: a = tanh(u) with u ~ N(mean, std) given obs; the noise is the learner's to draw.

    obs [R, B, n_obs] -> mean and std of u, [R, B, n_act] each; log-std clamped to [-20, 2].
    """

    def __init__(self, gens: Generators, n_obs: int, n_act: int, hidden: Sequence[int]):
        super().__init__()
        self.trunk = MLP(gens, n_obs, hidden[:-1], hidden[-1])
        self.mu, self.log_std = Linear(gens, hidden[-1], n_act), Linear(gens, hidden[-1], n_act)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(obs).relu_()
        return self.mu(x), self.log_std(x).clamp(-20, 2).exp()


class VAE(nn.Module):
    """Conditional VAE of actions given observations; latent width L = 2 n_act, log-std clamped to [-4, 15]."""

    def __init__(self, gens: Generators, n_obs: int, n_act: int, hidden: int):
        super().__init__()
        self.n_latent = 2 * n_act
        self.encoder = MLP(gens, n_obs + n_act, (hidden, hidden), 2 * self.n_latent)
        self.decoder = MLP(gens, n_obs + self.n_latent, (hidden, hidden), n_act)

    def encode(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.encoder(torch.cat([obs, action], -1)).chunk(2, -1)
        return mean, log_std.clamp(-4, 15).exp()

    def decode_raw(self, obs: Tensor, z: Tensor) -> Tensor:
        """An action before its tanh."""
        return self.decoder(torch.cat([obs, z], -1))

    def decode(self, obs: Tensor, z: Tensor) -> Tensor:
        return self.decode_raw(obs, z).tanh()


def kl_to_standard_normal(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std) || N(0, 1)) per dimension (algorithms.md B.0)."""
    return -0.5 * (1 + 2 * std.log() - mean.square() - std.square())
