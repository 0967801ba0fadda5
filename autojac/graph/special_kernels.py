"""Operators that lack derivatives which their plain formula has."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autojac.graph.operators import FORWARD_ONCE, autograd_nodes

ATTENTION = "scaled_dot_product_attention"
_NODE = "ScaledDotProduct"
# NativeLayerNormBackward0 is the node of native_layer_norm
_NODES = {"".join(part.capitalize() for part in name.split("_")) + "Backward": name for name in FORWARD_ONCE}
# what Python calls them by: native_layer_norm is layer_norm, _linalg_solve_ex is solve or solve_ex
_CALLED = {name.removeprefix("_").removeprefix("native_").removeprefix("linalg_"): name for name in FORWARD_ONCE}
_CALLED |= {name.removesuffix("_ex"): operator for name, operator in _CALLED.items()}
_CALLED |= {"instance_norm": "native_batch_norm", "logdet": "_linalg_slogdet", "tensorsolve": "_linalg_solve_ex"}


def special_kernels(values: Sequence[Tensor], reached: Sequence[str] = ()) -> tuple[str, ...]:
    """Return which of fused attention and `FORWARD_ONCE` are among the operators that computed some values.

    Args:
        values: with their graph.
        reached: what another branch may run; what the graph shows to be harmless is taken to be so everywhere.
    """
    found, harmless = dict[str, None](), set[str]()
    for node in autograd_nodes(values):
        name = node.name()
        if name.startswith(_NODE):
            found[ATTENTION] = None
        elif known := _NODES.get(name.rstrip("0123456789")):
            if _saves_for_derivative(node):
                found[known] = None
            else:
                harmless.add(known)
    return tuple(dict.fromkeys((*found, *(name for name in reached if name not in harmless))))


def _saves_for_derivative(node: Any) -> bool:
    """Check whether what the operator has saved depends on a differentiated tensor: its first argument makes that."""
    # a batch norm that uses running statistics is a plain rescaling
    return getattr(node, "_saved_training", True) and node.next_functions[0][0] is not None


def reachable_kernels(codes: Iterable[CodeType], modules: Iterable[torch.nn.Module]) -> tuple[str, ...]:
    """Return the operators of `FORWARD_ONCE` that another branch may run.

    Args:
        codes: of the functions of the user's that are reached.
        modules: all that are reached.
    """
    found = {name for code in codes for name in code.co_names}
    for module in modules:
        # in eval mode it uses running statistics, if it has any, and a change of mode is another plan
        plain = not module.training and getattr(module, "running_mean", None) is not None
        kinds = itertools.takewhile(lambda kind: kind is not torch.nn.Module, type(module).__mro__)
        methods = [part for kind in kinds for part in vars(kind).values() if isinstance(part, FunctionType)]
        named = {name for method in methods for name in method.__code__.co_names}
        found |= named - ({"batch_norm"} if plain else set())
    return tuple(sorted({_CALLED[name] for name in found & _CALLED.keys()}))


def plain_formulas(kernels: Sequence[str]) -> AbstractContextManager[Iterator[None] | None]:
    """Compute the named operators by their formula, which has every derivative, while this context is open."""
    return sdpa_kernel(SDPBackend.MATH) if ATTENTION in kernels else nullcontext()
