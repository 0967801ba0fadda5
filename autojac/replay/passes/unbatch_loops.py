"""An operator on each part of a tensor, one by one, is the operator on the tensor."""

from __future__ import annotations

from typing import Any

from torch import fx

from autojac.replay.passes.editor import Editor, aten
from autojac.replay.passes.node_facts import acts_by_entry, has_entries

RANK = 25


def unbatch_loops(graph: fx.Graph) -> None:
    """Undo the loops in which `is_grads_batched` runs operators that it can't batch, with a stack of their results."""
    Editor(graph).sweep(_unbatch, {aten.stack.default})


def _unbatch(editor: Editor, node: fx.Node) -> fx.Node | None:
    if len(node.args) > 1 and node.args[1] != 0:
        return None
    parts: Any = node.args[0]
    first = parts[0]
    if not acts_by_entry(first) or any(p.target is not first.target or p.kwargs != first.kwargs for p in parts):
        return None
    if any(isinstance(value, fx.Node) for value in first.kwargs.values()):
        return None
    if not all(editor.free(part) and len(part.users) == 1 and len(part.args) == len(first.args) for part in parts):
        return None
    args = list(first.args)
    for place, arguments in enumerate(zip(*(part.args for part in parts), strict=True)):
        whole = _find_whole(editor, arguments)
        if whole is not None:
            # with fewer axes, its first one would meet another one of the result
            if whole.meta["value"].dim() != node.meta["value"].dim():
                return None
            args[place] = whole
        elif any(argument is not arguments[0] for argument in arguments) or _has_too_many_axes(arguments[0], node):
            return None
    made = editor.make(node, first.target, *args, **first.kwargs)
    right = node.meta["value"]
    return made if made and (made.meta["value"].shape, made.meta["value"].dtype) == (right.shape, right.dtype) else None


def _has_too_many_axes(argument: Any, node: fx.Node) -> bool:
    """Check whether an argument of all parts has so many axes that it is not one for each of them."""
    return isinstance(argument, fx.Node) and argument.meta["value"].dim() >= node.meta["value"].dim()


def _find_whole(editor: Editor, parts: tuple[Any, ...]) -> fx.Node | None:
    """Return what the parts are all entries of, along its first axis and in their order."""
    if not all(isinstance(part, fx.Node) and part.target is aten.select.int and editor.free(part) for part in parts):
        return None
    whole = parts[0].args[0]
    if not has_entries(whole) or whole.meta["value"].size(0) != len(parts):
        return None
    alike = all(part.args == (whole, 0, place) for place, part in enumerate(parts))
    return whole if alike else None
