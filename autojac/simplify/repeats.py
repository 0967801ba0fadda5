"""What repeats itself along an axis is computed once there."""

from __future__ import annotations

from torch import fx

from autojac.simplify.edit import Editor, acts_by_entry, aten, narrowed, plain, sweep

RANK = 70


def repeats(graph: fx.Graph) -> None:
    """Give operators that repeat their arguments by themselves what is not repeated yet, and repeat the result."""
    sweep(graph, _once)


def _once(editor: Editor, node: fx.Node) -> fx.Node | None:
    if acts_by_entry(node) and node.target is not aten.clone.default:
        wanted = {s: narrowed(s.meta["value"]) for s in node.all_input_nodes if plain(s)}
    elif node.target in (aten.mm.default, aten.addmm.default):
        rows = node.args[-2]
        if not isinstance(rows, fx.Node) or not plain(rows):
            return None
        value = rows.meta["value"]
        wanted = {rows: value[:1] if value.stride(0) == 0 else value}
    else:
        return None
    lean: dict[fx.Node, fx.Node] = {}
    for tensor, value in wanted.items():
        if value.shape != tensor.meta["value"].shape:
            made = editor.narrow(node, tensor, value)
            if made is not None:
                lean[tensor] = made
    if not lean:
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda s: lean.get(s, s))
    once = editor.make(node, node.target, *args, **kwargs)
    if once is None:
        return None
    shape = node.meta["value"].shape
    return once if once.meta["value"].shape == shape else editor.make(node, aten.expand.default, once, list(shape))
