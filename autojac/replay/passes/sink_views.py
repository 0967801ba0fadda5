"""Pointwise operators before reshapes: they run on what views are views of, and the result is reshaped."""

from __future__ import annotations

from torch import fx

from autojac.replay.passes.editor import Editor, aten, source
from autojac.replay.passes.node_facts import acts_by_entry, has_entries

RANK = 50
MOVES = {aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.t.default, aten.transpose.int}
MOVES |= {aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.alias.default, aten.detach.default}


def sink_views(graph: fx.Graph) -> None:
    """Reshape the result rather than the arguments, so that views before an operator meet those after it."""
    Editor(graph).sweep(_sink)


def _sink(editor: Editor, node: fx.Node) -> fx.Node | None:
    if not acts_by_entry(node) or not any(acts_by_entry(u) or source(editor, u) is not None for u in editor.users):
        return None
    tensors = [s for s in node.all_input_nodes if has_entries(s)]
    if len(tensors) != len(node.all_input_nodes):
        return None
    if len(tensors) == 1:
        return _sink_below_one(editor, node, tensors[0])
    return _sink_below_all(editor, node, tensors) or _drop_thin_axes(editor, node, tensors)


def _sink_below_one(editor: Editor, node: fx.Node, moved: fx.Node) -> fx.Node | None:
    """Write f(view(x)) as view(f(x))."""
    origin = source(editor, moved)
    if (
        moved.target not in MOVES
        or origin is None
        or not all(map(acts_by_entry, moved.users))
        or origin.meta["value"].numel() != moved.meta["value"].numel()
    ):
        return None
    made = editor.remake(node, {moved: origin})
    return made and editor.make(node, moved.target, made, *moved.args[1:], **moved.kwargs)


def _sink_below_all(editor: Editor, node: fx.Node, tensors: list[fx.Node]) -> fx.Node | None:
    """Write f(view(x), view(y)) as view(f(x, y)) where both are reshaped alike; constants and scalars fit in."""
    shaped = [tensor for tensor in tensors if tensor.meta["value"].dim()]
    moved = [tensor for tensor in shaped if tensor.target is aten.view.default]
    instead = {tensor: origin for tensor in moved if (origin := source(editor, tensor)) is not None}
    shapes = {tuple(origin.meta["value"].shape) for origin in instead.values()}
    if (
        len(shapes) != 1
        or len(instead) < len(moved)
        or len({tensor.meta["value"].shape for tensor in shaped}) != 1
        # what stays a view for others would be one more
        or not all(acts_by_entry(user) for tensor in moved for user in tensor.users)
    ):
        return None
    for tensor in shaped:
        if tensor not in instead:
            constant = _constant(editor, tensor, *shapes)
            if constant is None:
                return None
            instead[tensor] = constant
    made = editor.remake(node, instead)
    return made and editor.reshape(node, made, list(node.meta["value"].shape))


def _constant(editor: Editor, node: fx.Node, shape: tuple[int, ...]) -> fx.Node | None:
    """Return a constant in another shape; None for anything else, and where it would be a copy."""
    if node.meta["role"] != "constant":
        return None
    try:
        return editor.constant(node.meta["value"].view(shape))
    except RuntimeError:
        return None


def _drop_thin_axes(editor: Editor, node: fx.Node, tensors: list[fx.Node]) -> fx.Node | None:
    """Write f of views with an axis of length 1 as such a view of f without that axis."""
    shape = node.meta["value"].shape
    thin = [axis for axis, size in enumerate(shape) if size == 1]
    if not thin:
        return None
    lean: dict[fx.Node, fx.Node] = {}
    for tensor in tensors:
        value = tensor.meta["value"]
        before = len(shape) - value.dim()
        gone = [axis - before for axis in thin if axis >= before]
        if gone:
            if source(editor, tensor) is None:
                return None
            made = editor.reshape(node, tensor, [n for axis, n in enumerate(value.shape) if axis not in gone])
            if made is None or made.target is aten.reshape.default:
                return None
            lean[tensor] = made
    made = editor.remake(node, lean)
    return made and editor.reshape(node, made, list(shape))
