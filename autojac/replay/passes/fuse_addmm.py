"""A product and a sum in one operator."""

from __future__ import annotations

from typing import Any

from torch import fx

from autojac.replay.passes.editor import Editor, aten, source, sweep
from autojac.replay.passes.node_facts import has_entries

RANK = 65


def fuse_addmm(graph: fx.Graph) -> None:
    """Add a vector to each row of a product as it is made: b + x @ W, which vmap takes apart, by `addmm`."""
    sweep(graph, _together, {aten.add.Tensor})


def _together(editor: Editor, node: fx.Node) -> fx.Node | None:
    if node.kwargs or len(node.args) != 2:
        return None
    for vector, rows in (node.args, node.args[::-1]):
        if not (has_entries(vector) and has_entries(rows)):
            continue
        product: Any = rows
        if product.target is not aten.mm.default and len(rows.users) == 1:
            product = source(editor, rows)
        if product is None or product.target is not aten.mm.default or len(product.users) != 1:
            continue
        ours, right = product.meta["value"], node.meta["value"]
        if not (editor.free(product) and vector.meta["value"].shape == ours.shape[-1:] == right.shape[-1:]):
            continue
        if right.numel() == ours.numel() and vector.meta["value"].dtype == right.dtype == ours.dtype:
            if rows is not product and rows.target not in (aten.view.default, aten._unsafe_view.default):
                continue
            made = editor.make(node, aten.addmm.default, vector, *product.args)
            return made and editor.shaped(node, made, list(right.shape))
    return None
