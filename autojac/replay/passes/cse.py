"""Common subexpressions: the same operator on the same arguments runs once.

torch has such a pass (`torch.fx.passes.dialect.common.cse_pass`), which makes a graph of new nodes, takes 1, 1.0 and
True for the same argument, and knows nothing of writes into memory that is read in between.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from autojac.replay.passes.editor import MOST_ENTRIES, Editor
from autojac.replay.passes.node_facts import has_entries, layout_of, narrow_repeats
from autojac.replay.passes.ordering import immovable_operators

RANK = 80


def cse(graph: fx.Graph) -> None:
    """Let the first of equal operators stand for the others, and the first of equal constants."""
    unsteady, editor = immovable_operators(graph), Editor(graph)
    known: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta["role"] == "constant" and has_entries(node):
            key = _content(node.meta["value"])
        elif node.op == "call_function" and node not in unsteady:
            editor.shift(node)
            key = node.target, _key(node.args), _key(node.kwargs)
        else:
            continue
        first = known.setdefault(key, node) if key is not None else node
        # what an earlier phase computes is there for a later one, not the other way round
        if first is not node and first.meta["phase"] <= node.meta["phase"]:
            if has_entries(node):
                editor.shifts(node, {node.meta["value"].untyped_storage()._cdata})
            node.replace_all_uses_with(first)
            if node.op == "call_function":
                graph.erase_node(node)


def _key(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(part)) for name, part in sorted(value.items()))
    if isinstance(value, float):
        # NaN is the same argument as NaN, and 0.0 another one than -0.0
        return float, "nan" if math.isnan(value) else value, math.copysign(1, value)
    if isinstance(value, complex):
        return complex, _key(value.real), _key(value.imag)
    if isinstance(value, (fx.Node, torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return value
    return type(value), value


def _content(value: Tensor) -> Any:
    """Return what a constant is, bit by bit; None for large ones."""
    lean = narrow_repeats(value)
    if lean.numel() > MOST_ENTRIES // 100 or lean.is_conj() or lean.is_neg():
        return None
    numbers = lean.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
    return layout_of(value), lean.shape, bytes(numbers.tolist())
