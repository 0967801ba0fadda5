"""Products with the Hessian of a scalar function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.errors import InputError, kind_of


def hessian_product(loss: Callable[..., Any], points: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """Return the Hessian of a scalar function at some tensors times vectors, by reverse over reverse mode.

    Args:
        loss: function of the tensors.
        points, vectors: of the same shapes.

    Raises:
        InputError: if the function does not return a scalar.
    """
    keeps_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [y.view_as(y) if y.requires_grad and keeps_graph else y.detach().requires_grad_() for y in points]
        value = loss(*inputs)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else kind_of(value)
            raise InputError(f"loss was expected to return a scalar, got {got}. Let it return the sum over the batch")
        if not value.requires_grad:
            return [torch.zeros_like(v) for v in vectors]
        first = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
        pairs = [(g, v) for g, v in zip(first, vectors, strict=True) if g.requires_grad]
        if not pairs:
            return [torch.zeros_like(v) for v in vectors]
        gradients, weights = [g for g, _ in pairs], [v for _, v in pairs]
        products = torch.autograd.grad(
            gradients, inputs, weights, create_graph=keeps_graph, allow_unused=True, materialize_grads=True
        )
    return list(products)
