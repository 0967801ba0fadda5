"""Products that are added to themselves, as derivatives of squares have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from autojac.replay.passes.editor import Editor, aten
from autojac.replay.passes.node_facts import PRECISE, has_entries

RANK = 85


def equal_terms(graph: fx.Graph) -> None:
    """Compute xy + xy as (2x)y, where x is the smaller factor, and (b + pxy) + qxy as b + (p + q)xy."""
    Editor(graph).sweep(_combine, {aten.addcmul.default})


def _combine(editor: Editor, node: fx.Node) -> fx.Node | None:
    arguments: Sequence[Any] = node.args
    term, factors, number = arguments[0], arguments[1:], _number(node)
    if number is None or not has_entries(term) or not editor.free(term):
        return None
    # what is read elsewhere, or kept for a backward, is computed all the same
    if len(term.users) > 1 or term.meta.get("phase") != node.meta.get("phase"):
        return None
    if term.target is aten.addcmul.default and _are_same(term.args[1:], factors):
        before = _number(term)
        if before is None:
            return None
        return editor.make(node, aten.addcmul.default, term.args[0], *factors, value=before + number)
    if term.target is not aten.mul.Tensor or not _are_same(term.args, factors):
        return None
    small, large = sorted(factors, key=lambda factor: int(factor.meta["value"].numel()))
    scaled = editor.make(node, aten.mul.Scalar, small, 1 + number)
    return scaled and editor.make(node, aten.mul.Tensor, scaled, large)


def _number(node: fx.Node) -> float | None:
    """Return what `addcmul` multiplies the product by; None unless it is real, and the result in full precision."""
    number = node.kwargs.get("value", 1)
    return number if isinstance(number, (int, float)) and node.meta["value"].dtype in PRECISE else None


def _are_same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Check whether two pairs hold the same tensors, in either order."""
    (a, b), (c, d) = some, others
    return has_entries(a) and has_entries(b) and ((a is c and b is d) or (a is d and b is c))
