"""Parts without entries."""

from __future__ import annotations

from typing import Any

from torch import fx

from autojac.replay.passes.editor import Editor, aten
from autojac.replay.passes.node_facts import has_entries

RANK = 12


def empty_parts(graph: fx.Graph) -> None:
    """Concatenate no parts without entries, such as the cache of a transformer before its first token."""
    Editor(graph).sweep(_drop_empty, {aten.cat.default})


def _drop_empty(editor: Editor, node: fx.Node) -> fx.Node | None:
    parts, whole = node.args[0], node.meta["value"]
    if not isinstance(parts, (list, tuple)) or not all(map(has_entries, parts)):
        return None
    left: list[Any] = [part for part in parts if part.meta["value"].numel()]  # type: ignore[union-attr]
    if not left or len(left) == len(parts) or any(part.meta["value"].dtype != whole.dtype for part in left):
        return None
    if len(left) == 1:
        return editor.copy(node, left[0])
    return editor.make(node, aten.cat.default, left, *node.args[1:])
