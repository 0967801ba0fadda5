"""Zeros that no run has to compute with: tangents that do not exist."""

from __future__ import annotations

from typing import Any

from torch import fx

from autojac.replay.passes.editor import Editor, aten
from autojac.replay.passes.node_facts import facts, layout_of

RANK = 5
VIEWS = {aten.expand.default, aten.view.default, aten.t.default, aten.permute.default, aten.unsqueeze.default}
VIEWS |= {aten.alias.default, aten.detach.default, aten.transpose.int, aten.squeeze.dims, aten.squeeze.dim}
SUMS = {aten.add.Tensor, aten.sub.Tensor}


def zero_tangents(graph: fx.Graph) -> None:
    """Leave out products with tangents that forward mode has made up, and sums with those products.

    torch's forward mode takes the tangent of what has none for a tensor of zeros that takes no memory, and turns it
    into a real one, `zeros([])` expanded, for operators that don't know such tensors. The derivative has no such term,
    so here nothing times it is nothing, where torch's own arithmetic gives NaN for an infinite factor. Zeros of the
    function itself are multiplied as ever.
    """
    made_up: set[fx.Node] = set()

    def rule(editor: Editor, node: fx.Node) -> fx.Node | None:
        if _is_made_up(node) or (node.target in VIEWS and node.args[0] in made_up):
            made_up.add(node)
        elif _is_zero(node, made_up):
            value = node.meta["value"]
            scalar = editor.make(node, aten.zeros.default, [], dtype=value.dtype, device=value.device)
            zero = editor.make(node, aten.expand.default, scalar, list(value.shape)) if scalar is not None else None
            if zero is not None:
                made_up.add(zero)
            return zero
        elif node.target in SUMS and made_up.intersection(node.args[:2]):
            return _keep_other_term(editor, node, made_up)
        return None

    Editor(graph).sweep(rule)


def _is_zero(node: fx.Node, made_up: set[fx.Node]) -> bool:
    """Check whether each term of a product has a factor that is not there."""
    if node.target is aten.convolution.default:
        return bool(made_up.intersection(node.args[:2])) and (node.args[2] is None or node.args[2] in made_up)
    product = facts(node).factors is not None and not facts(node).addend
    return product and bool(made_up.intersection(node.all_input_nodes))


def _is_made_up(node: fx.Node) -> bool:
    if node.target is not aten.expand.default:
        return False
    scalar: Any = node.args[0]
    # torch.zeros, as a function calls it, brings an argument for pinned memory as well
    return scalar.target is aten.zeros.default and not scalar.args[0] and "pin_memory" not in scalar.kwargs


def _keep_other_term(editor: Editor, node: fx.Node, made_up: set[fx.Node]) -> fx.Node | None:
    first, second = node.args[:2]
    if second in made_up:
        term: Any = first
    elif node.target is aten.add.Tensor and not node.kwargs:
        term = second
    else:
        return None
    if not isinstance(term, fx.Node) or term.meta["value"].dtype != node.meta["value"].dtype:
        return None
    if layout_of(term.meta["value"]) == layout_of(node.meta["value"]):
        return term
    return editor.make(node, aten.expand.default, term, list(node.meta["value"].shape))
