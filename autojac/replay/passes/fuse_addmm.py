"""A product and a sum in one operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from autojac.replay.passes.editor import Editor, aten, source
from autojac.replay.passes.node_facts import has_entries

RANK = (58, 65)
LEAST_ENTRIES = 2**13
"""Of a sum of matrices: below, the views around it cost more than it brings."""


def fuse_addmm(graph: fx.Graph) -> None:
    """Add to a product as it is made: a vector to each row, which vmap takes apart, or what skips a layer."""
    Editor(graph).sweep(_fuse, {aten.add.Tensor})


def _fuse(editor: Editor, node: fx.Node) -> fx.Node | None:
    if node.kwargs or len(node.args) != 2:
        return None
    for vector, rows in (node.args, node.args[::-1]):
        if not (has_entries(vector) and has_entries(rows)):
            continue
        product: Any = rows
        if product.target is not aten.mm.default and len(rows.users) == 1:
            product = source(editor, rows)
        if not editor.is_read_once(product, aten.mm.default):
            continue
        ours, right, added = product.meta["value"], node.meta["value"], vector.meta["value"]
        if ours.shape[-1:] != right.shape[-1:]:
            continue
        if right.numel() == ours.numel() and added.dtype == right.dtype == ours.dtype:
            if rows is not product and rows.target not in (aten.view.default, aten._unsafe_view.default):
                continue
            addend = vector if added.shape == ours.shape[-1:] else _as_matrix(editor, node, vector, ours)
            made = addend and editor.make(node, aten.addmm.default, addend, *product.args)
            return made and editor.reshape(node, made, list(right.shape))
    return None


def _as_matrix(editor: Editor, node: fx.Node, addend: fx.Node, product: Tensor) -> fx.Node | None:
    """Return what is added to a product entry by entry, as a matrix of its shape; None where that takes a copy."""
    value = addend.meta["value"]
    if value.shape != node.meta["value"].shape or value.numel() < LEAST_ENTRIES or not value.is_contiguous():
        return None
    return editor.reshape(node, addend, list(product.shape))
