"""Operators that lack derivatives which their plain formula has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autojac.operators import FORWARD_ONCE, autograd_nodes

ATTENTION = "scaled_dot_product_attention"
_NODE = "ScaledDotProduct"
# NativeLayerNormBackward0 is the node of native_layer_norm
_NODES = {"".join(part.capitalize() for part in name.split("_")) + "Backward": name for name in FORWARD_ONCE}


def special_kernels(values: Sequence[Tensor]) -> tuple[str, ...]:
    """Fused attention, and operators of `FORWARD_ONCE`, among those that computed some values, told by their graph."""
    found = dict[str, None]()
    for node in autograd_nodes(values):
        name = node.name()
        if name.startswith(_NODE):
            found[ATTENTION] = None
        elif (known := _NODES.get(name.rstrip("0123456789"))) and _saves_for_derivative(node):
            found[known] = None
    return tuple(found)


def _saves_for_derivative(node: Any) -> bool:
    """Whether what the operator has saved depends on a differentiated tensor: its first argument makes that."""
    # a batch norm that uses running statistics is a plain rescaling
    return getattr(node, "_saved_training", True) and node.next_functions[0][0] is not None


def plain_formulas(kernels: Sequence[str]) -> AbstractContextManager[Iterator[None] | None]:
    """Within it the named operators are computed by their formula, which has every derivative."""
    return sdpa_kernel(SDPBackend.MATH) if ATTENTION in kernels else nullcontext()
