"""Views of views."""

from __future__ import annotations

from torch import fx

from autojac.simplify.edit import Editor, chain, sweep

RANK = 60


def views(graph: fx.Graph) -> None:
    """What only looks at memory in another way does so in one step, or not at all where it looks at all of it."""
    sweep(graph, _collapsed)


def _collapsed(editor: Editor, node: fx.Node) -> fx.Node | None:
    sources = chain(editor, node)
    value = node.meta["value"]
    return editor.same(value, sources) or editor.reach(node, value, sources[:-1])
