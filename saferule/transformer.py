"""A stacked transformer: R independent copies, trained at once by batched matrix products.

Letters as in nets.py; L tokens of a sequence, W their width. Matrices start as those of `linear` do, tables from N(0, 0.02),
gains at 1, each replica from its own generator.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .nets import Generators, Linear

Drop = Callable[[Tensor], Tensor]                      # dropout with the learner's own noise; None: nothing is dropped
STD = 0.02                                             # of the initial weights


def normal(gens: Generators, *shape: int) -> nn.Parameter:
    """[R, *shape] from N(0, 0.02), replica by replica."""
    return nn.Parameter(torch.stack([torch.empty(shape).normal_(0, STD, generator=g) for g in gens]))


class Dense(Linear):
    """Linear that starts as in OSRL and GPT-2: weights from N(0, 0.02), biases 0. Slow to learn where it is narrow."""

    def __init__(self, gens: Generators, n_in: int, n_out: int):
        nn.Module.__init__(self)
        self.weight, self.bias = normal(gens, n_in, n_out), nn.Parameter(torch.zeros(len(gens), 1, n_out))


class LayerNorm(nn.Module):
    """x [R, B, W]: each row to mean 0 and variance 1, then a gain and a bias per replica."""

    def __init__(self, gens: Generators, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(len(gens), 1, width))
        self.bias = nn.Parameter(torch.zeros(len(gens), 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:]), self.weight)


class Table(nn.Module):
    """One vector per time step: t int64 [R, B] -> [R, B, W]."""

    def __init__(self, gens: Generators, entries: int, width: int):
        super().__init__()
        self.weight = normal(gens, entries, width)

    def forward(self, t: Tensor) -> Tensor:
        R, entries, width = self.weight.shape
        first = entries * torch.arange(R, device=t.device)[:, None]
        return F.embedding(t.clamp(max=entries - 1) + first, self.weight.view(R * entries, width))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): causal, heads of width W / heads, GELU between W and 4 W.

    x [R, B, L, W]. A token sees itself and those before it. No mask is needed for padding on the right: what is
    before it never sees it.
    """

    def __init__(self, gens: Generators, width: int, heads: int, linear: type[Linear] = Linear):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(gens, width), LayerNorm(gens, width)
        self.qkv, self.out = linear(gens, width, 3 * width), linear(gens, width, width)
        self.mlp1, self.mlp2 = linear(gens, width, 4 * width), linear(gens, 4 * width, width)

    def attention(self, x: Tensor, B: int, drop: Drop | None) -> Tensor:
        R, BL, W = x.shape
        q, k, v = self.qkv(x).view(R * B, BL // B, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)   # [R B, heads, L, .]
        if drop is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            past = torch.ones(score.shape[-2:], dtype=torch.bool, device=x.device).tril()
            y = drop(score.masked_fill(~past, -torch.inf).softmax(-1)) @ v
        return self.out(y.transpose(1, 2).reshape(R, BL, W))

    def forward(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        R, B, L, W = x.shape
        x, dropped = x.view(R, B * L, W), drop or (lambda y: y)
        x = x + dropped(self.attention(self.norm1(x), B, drop))
        x = x + dropped(self.mlp2(F.gelu(self.mlp1(self.norm2(x)))))
        return x.view(R, B, L, W)


class Transformer(nn.Module):
    """Tokens [R, B, L, W] -> what the blocks make of them, normed before and after, [R, B, L, W]."""

    def __init__(self, gens: Generators, width: int, layers: int, heads: int, linear: type[Linear] = Linear):
        super().__init__()
        self.norm_in, self.norm_out = LayerNorm(gens, width), LayerNorm(gens, width)
        self.blocks = nn.ModuleList(Block(gens, width, heads, linear) for _ in range(layers))

    def forward(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        shape = x.shape
        x = self.norm_in(x.flatten(1, 2)).view(shape)
        x = drop(x) if drop else x
        for block in self.blocks:
            x = block(x, drop)
        return self.norm_out(x.flatten(1, 2)).view(shape)


def clip_norm(grads: Sequence[Tensor], limit: float) -> Tensor:
    """Scale gradients [R, ...] in place so that no replica's norm over all of them exceeds `limit`; returns the norms [R]."""
    norm = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1)                   # as torch's clip_grad_norm_ has it
    for g in grads:
        g.mul_(scale.view(-1, *[1] * (g.dim() - 1)))
    return norm
