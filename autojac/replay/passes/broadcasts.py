"""What repeats itself along an axis is computed once there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from autojac.replay.passes.editor import Editor, aten
from autojac.replay.passes.node_facts import acts_by_entry, has_entries, narrow_repeats

RANK = 70
REDUCTIONS = {aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default}


def broadcasts(graph: fx.Graph) -> None:
    """Give operators that repeat their arguments by themselves what is not repeated yet, and repeat the result."""
    Editor(graph).sweep(_strip_repeats)


def _strip_repeats(editor: Editor, node: fx.Node) -> fx.Node | None:
    lean: dict[fx.Node, fx.Node] = {}
    for tensor, value in _slices(node):
        if value.shape != tensor.meta["value"].shape:
            made = editor.narrow(node, tensor, value)
            if made is not None:
                lean[tensor] = made
    if not lean:
        return None
    once = editor.remake(node, lean)
    if once is None:
        return None
    shape = node.meta["value"].shape
    if once.meta["value"].shape == shape:
        return once
    # without a repetition nothing is gained by a result without its leading axes
    return (
        None
        if once.meta["value"].numel() == shape.numel()
        else editor.make(node, aten.expand.default, once, list(shape))
    )


def _slices(node: fx.Node) -> Iterator[tuple[fx.Node, Tensor]]:
    """Yield for each argument the smallest slice that suffices; the full result is a broadcast of what it gives."""
    if acts_by_entry(node) and node.target is not aten.clone.default:
        for source in filter(has_entries, node.all_input_nodes):
            yield source, _lean(source.meta["value"])
    elif node.target in (aten.mm.default, aten.addmm.default):
        rows: Any = node.args[-2]
        if has_entries(rows) and rows.meta["value"].stride(0) == 0:
            yield rows, rows.meta["value"][:1]
    elif node.target in REDUCTIONS and len(node.args) > 2 and node.args[2] and has_entries(node.args[0]):
        tensor: Any = node.args[0]
        axes: Any = node.args[1]
        value = tensor.meta["value"]
        gone = {axis % value.dim() for axis in axes}
        for axis, step in enumerate(value.stride()):
            if step == 0 and axis not in gone:
                value = value[(slice(None),) * axis + (slice(1),)]
        if gone:
            yield tensor, value


def _lean(value: Tensor) -> Tensor:
    """Strip what broadcasting brings back: repetitions, and leading axes with a single entry."""
    lean = narrow_repeats(value)
    while lean.dim() and lean.size(0) == 1:
        lean = lean[0]
    return lean
