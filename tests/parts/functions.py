"""torch.autograd.Functions of every age."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SoftClip(torch.autograd.Function):
    """With every rule that torch.func knows."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x / (1 + x * x).sqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (1 + x * x) ** -1.5

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent * (1 + x * x) ** -1.5

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return SoftClip.apply(x), in_dims[0]


class Straight(torch.autograd.Function):
    """Rounds, and says that it does not; the new style without a vmap rule."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class PairProduct(torch.autograd.Function):
    """Mixes columns, in the old style."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh() * x.flip(1).tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grad + grad.flip(1)) * x.flip(1).tanh() * (1 - x.tanh() ** 2)
