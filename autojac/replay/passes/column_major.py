"""Products with few columns, laid out as the CPU's kernels are fast for."""

from __future__ import annotations

from torch import fx

from autojac.replay.passes.editor import Editor, aten
from autojac.replay.passes.node_facts import has_entries

RANK = 90
FEW = 8
"""Columns up to which it pays."""
LEAST_ENTRIES = 2**14
"""Of the other factor: below, the copy costs more than it brings."""


def column_major(graph: fx.Graph) -> None:
    """Give `mm` a second factor of few columns column by column.

    As a network's first weight stands in a backward pass, row by row, it takes a kernel that was measured three times
    slower: (3072, 64) @ (64, 3) 227 µs on one thread, with the weight copied column by column 70 µs. Where the first
    factor is a transpose itself, as in that weight's gradient, the product of the transposes takes no copy:
    (50, 2048) @ (2048, 2) 102 µs, by a copy 172 µs, transposed 40 µs.
    """
    copied: dict[fx.Node, fx.Node] = {}

    def rule(editor: Editor, node: fx.Node) -> fx.Node | None:
        left, right = node.args
        if not (has_entries(left) and has_entries(right)):
            return None
        rows, weight = left.meta["value"], right.meta["value"]
        slow = weight.device.type == "cpu" and weight.is_contiguous() and 1 < weight.size(1) <= FEW < weight.size(0)
        if not slow or rows.numel() < LEAST_ENTRIES or not editor.free(node):
            return None
        if rows.t().is_contiguous():
            return _transpose_product(editor, node, left, right)
        if right not in copied:
            view = editor.make(node, aten.t.default, right)
            transposed = view and editor.copy(node, view)
            columns = transposed and editor.make(node, aten.t.default, transposed)
            if columns is None:
                return None
            copied[right] = columns
        return editor.make(node, aten.mm.default, left, copied[right])

    Editor(graph).sweep(rule, {aten.mm.default})


def _transpose_product(editor: Editor, node: fx.Node, left: fx.Node, right: fx.Node) -> fx.Node | None:
    """Write x @ y as the transpose of y's transpose times x's."""
    factors = [editor.narrow(node, factor, factor.meta["value"].t()) for factor in (right, left)]
    product = None if None in factors else editor.make(node, aten.mm.default, *factors)
    return product and editor.make(node, aten.t.default, product)
