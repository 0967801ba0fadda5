"""Fused operators that lack derivatives which their plain formula has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION = "scaled_dot_product_attention"
_NODE = "ScaledDotProduct"


def fused_kernels(values: Sequence[Tensor]) -> tuple[str, ...]:
    """The fused operators among those that computed some values, told by the values' graph."""
    waiting = [value.grad_fn for value in values if value.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name().startswith(_NODE):
            return (ATTENTION,)
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return ()


def plain_formulas(kernels: Sequence[str]) -> AbstractContextManager[Iterator[None] | None]:
    """Within it the named operators are computed by their formula, which has every derivative."""
    return sdpa_kernel(SDPBackend.MATH) if ATTENTION in kernels else nullcontext()
