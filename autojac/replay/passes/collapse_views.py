"""Views of views."""

from __future__ import annotations

from torch import fx

from autojac.replay.passes.editor import Editor, chain
from autojac.replay.passes.node_facts import narrow_repeats

RANK = (60, 92)


def collapse_views(graph: fx.Graph) -> None:
    """Replace a chain of views by one view of its origin, or by the origin itself where that is the same."""
    Editor(graph).sweep(_collapse)


def _collapse(editor: Editor, node: fx.Node) -> fx.Node | None:
    sources = chain(editor, node)
    value = node.meta["value"]
    found = editor.same(value, sources) or editor.reach(node, value, sources[:-1])
    if found is None and len(sources) > 2:
        found = _in_two(editor, node, sources[0])
    return found


def _in_two(editor: Editor, node: fx.Node, first: fx.Node) -> fx.Node | None:
    """Return a view with its axes in the order of memory and nothing repeated, and one step from there."""
    value = node.meta["value"]
    lean = narrow_repeats(value)
    axes = sorted(range(lean.dim()), key=lean.stride().__getitem__, reverse=True)
    if axes != sorted(axes) and lean.shape != value.shape:
        return None
    between = editor.reach(node, lean.permute(axes), [first])
    return between and editor.reach(node, value, [between])
