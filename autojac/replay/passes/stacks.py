"""Rows put together one by one."""

from __future__ import annotations

from typing import Any

from torch import fx

from autojac.replay.passes.editor import Editor, aten
from autojac.replay.passes.node_facts import has_entries

RANK = 75


def stacks(graph: fx.Graph) -> None:
    """Concatenate parts of length one by `stack`, along the axis where a permutation that follows puts them."""
    Editor(graph).sweep(_stack, {aten.cat.default, aten.permute.default})


def _stack(editor: Editor, node: fx.Node) -> fx.Node | None:
    if node.target is aten.cat.default:
        parts: Any = node.args[0]
        axis: Any = node.args[1] if len(node.args) > 1 else 0
        axis %= node.meta["value"].dim()
        if not parts or not all(map(has_entries, parts)):
            return None
        # a part without entries may have one axis alone
        values = [part.meta["value"] for part in parts]
        if any(value.dim() != node.meta["value"].dim() or value.size(axis) != 1 for value in values):
            return None
        lean = [editor.narrow(node, part, part.meta["value"].select(axis, 0)) for part in parts]
        if any(part is None or part.target is aten.select.int for part in lean):
            return None
        return editor.make(node, aten.stack.default, lean, axis)
    if node.target is aten.permute.default:
        stack: Any = node.args[0]
        axes: Any = [axis % node.meta["value"].dim() for axis in node.args[1]]  # type: ignore[union-attr]
        if editor.is_read_once(stack, aten.stack.default):
            axis = stack.args[1] if len(stack.args) > 1 else 0
            others = [a for a in axes if a != axis % len(axes)]
            if others == sorted(others):
                return editor.make(node, aten.stack.default, list(stack.args[0]), axes.index(axis % len(axes)))
    return None
