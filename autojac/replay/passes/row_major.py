"""Small factors of large results, laid out row by row as these are to be."""

from __future__ import annotations

import torch
from torch import fx

from autojac.replay.passes.editor import Editor
from autojac.replay.passes.node_facts import acts_by_entry, has_entries

RANK = 78
LEAST_ENTRIES = 2**13
"""Of the result: below, the copy costs more than it brings."""
SHARE = 8
"""How many times as large as what is copied the result is at least."""


def row_major(graph: fx.Graph) -> None:
    """Copy a small argument that lies across the rows of a large result, such as a weight's transpose.

    The result would take over its layout, to be copied before it is multiplied, or it is read with long strides:
    (50, 1, 256) of a transpose times (128, 256), copied, 11 ms on one thread, with the transpose copied before 1.1 ms;
    times (50, 128, 256) 6.1 and 1.2 ms.
    """
    Editor(graph).sweep(_copy_across)


def _copy_across(editor: Editor, node: fx.Node) -> fx.Node | None:
    right = node.meta["value"]
    if not acts_by_entry(node) or right.device.type != "cpu" or right.numel() < LEAST_ENTRIES:
        return None
    if not all(map(has_entries, node.all_input_nodes)):
        return None
    across = [source for source in node.all_input_nodes if not source.meta["value"].is_contiguous()]
    if not across or any(SHARE * source.meta["value"].numel() > right.numel() for source in across):
        return None
    along = {}
    for source in across:
        made = _copy(editor, node, source)
        if made is None:
            return None
        along[source] = made
    return editor.remake(node, along)


def _copy(editor: Editor, at: fx.Node, source: fx.Node) -> fx.Node | None:
    if source.meta["role"] == "constant":
        return editor.constant(source.meta["value"].clone(memory_format=torch.contiguous_format))
    return editor.copy(at, source)
