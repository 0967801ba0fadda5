"""Arithmetic that changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from autojac.replay.passes.editor import MOST_ENTRIES, Editor, aten
from autojac.replay.passes.node_facts import has_entries, narrow_repeats

RANK = 20
KEEPERS: dict[Any, tuple[int, tuple[int, ...]]] = {
    aten.mul.Tensor: (1, (0, 1)),
    aten.mul.Scalar: (1, (1,)),
    aten.div.Tensor: (1, (1,)),
    aten.div.Scalar: (1, (1,)),
    aten.add.Tensor: (0, (0, 1)),
    aten.add.Scalar: (0, (1,)),
    aten.sub.Tensor: (0, (1,)),
    aten.sub.Scalar: (0, (1,)),
    torch.ops.prims.mul.default: (1, (0, 1)),
    torch.ops.prims.add.default: (0, (0, 1)),
    aten.pow.Tensor_Scalar: (1, (1,)),
}
"""What number at which places leaves the other argument as it is."""


def neutral_elements(graph: fx.Graph) -> None:
    """Leave out products with constant ones and sums with constant zeros, whose other factor or term is the result."""
    known: dict[tuple[fx.Node, int], bool] = {}

    def is_filled(value: Any, number: int) -> bool:
        if not isinstance(value, fx.Node):
            return isinstance(value, (int, float, complex)) and value == number
        if value.meta["role"] not in ("constant", "literal") or not has_entries(value):
            return False
        if (value, number) not in known:
            one = narrow_repeats(value.meta["value"])
            known[value, number] = 0 < one.numel() <= MOST_ENTRIES and bool((one == number).all())
        return known[value, number]

    def rule(editor: Editor, node: fx.Node) -> fx.Node | None:
        if len(node.args) < 2:
            return None
        number, places = KEEPERS[node.target]
        for place in places:
            other: Any = node.args[1 - place]
            if isinstance(other, fx.Node) and is_filled(node.args[place], number):
                return _keep(editor, node, other)
        return None

    Editor(graph).sweep(rule, KEEPERS)


def _keep(editor: Editor, node: fx.Node, other: fx.Node) -> fx.Node | None:
    ours, right = other.meta["value"], node.meta["value"]
    if not isinstance(ours, Tensor) or ours.dtype != right.dtype or ours.device != right.device:
        return None
    if ours.shape == right.shape:
        return other
    return editor.make(node, aten.expand.default, other, list(right.shape))
