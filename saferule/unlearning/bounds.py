"""Bounds on how hard an unlearner may push: per replica, or per row. No host sync, nothing mixes replicas.

Shapes      R replicas, B batch
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def gradient_norm(loss: Tensor, params: Iterable[nn.Parameter]) -> Tensor:
    """Norm [R] of each replica's gradient of its loss [R], over all of `params` ([R * members, ...] each)."""
    grads = torch.autograd.grad(loss.sum(), list(params), retain_graph=True)
    return torch.stack([g.reshape(len(loss), -1).square().sum(1) for g in grads]).sum(0).sqrt()


def bounded(loss: Tensor, params: Iterable[nn.Parameter], limit: float) -> Tensor:
    """The loss [R], scaled down where the norm of its gradient exceeds `limit`: a clip of this one term alone."""
    return loss * (limit / gradient_norm(loss, params).clamp(min=limit))


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: Tensor | float) -> Tensor:
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        norm = grad.norm(dim=-1, keepdim=True)
        return grad * (ctx.limit / torch.maximum(norm, torch.as_tensor(ctx.limit).to(norm))), None


def clipped_rows(x: Tensor, limit: Tensor | float) -> Tensor:
    """x [..., n] itself; the gradient that comes back through it has a norm of at most `limit` (> 0, broadcast) per row."""
    return _Clipped.apply(x, limit)
