"""A product entry by entry, a number and a sum in one operator, as derivatives of derivatives have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from autojac.replay.passes.editor import Editor, aten
from autojac.replay.passes.node_facts import PRECISE, has_entries

RANK = 66
MOST = 1000.0
"""What a number may be, or one over that: multiplied later, a smaller one would let x * y overflow before."""


def fuse_addcmul(graph: fx.Graph) -> None:
    """Compute b + a * (c * x * y), c a number, by `addcmul`: two passes through memory in the place of four."""
    Editor(graph).sweep(_fuse, {aten.add.Tensor})


def _fuse(editor: Editor, node: fx.Node) -> fx.Node | None:
    if node.kwargs or len(node.args) != 2:
        return None
    arguments: Sequence[Any] = node.args
    for product, other in (arguments, arguments[::-1]):
        if not has_entries(other) or not editor.is_read_once(product, aten.mul.Tensor):
            continue
        factors: Sequence[Any] = product.args
        if all(_is_like(part, node.meta["value"]) for part in (other, *factors)):
            factors, number = _split_off_number(editor, node, factors)
            return editor.make(node, aten.addcmul.default, other, *factors, value=number)
    return None


def _split_off_number(editor: Editor, node: fx.Node, factors: Sequence[Any]) -> tuple[Sequence[Any], float]:
    """Return factors, and a number that one of them, or a factor of that, was multiplied by; 1 if none was."""
    for factor, rest in (factors, factors[::-1]):
        if (number := _number(editor, factor)) is not None:
            return (factor.args[0], rest), number
        if not editor.is_read_once(factor, aten.mul.Tensor):
            continue
        for scaled, other in (factor.args, factor.args[::-1]):
            number = _number(editor, scaled)
            if number is not None and _is_like(other, node.meta["value"]) and _is_like(scaled, node.meta["value"]):
                made = editor.make(node, aten.mul.Tensor, scaled.args[0], other)
                if made is not None:
                    return (made, rest), number
    return factors, 1


def _number(editor: Editor, node: Any) -> float | None:
    """Return the number that a node multiplies a tensor by; None where it does something else."""
    scales = editor.is_read_once(node, aten.mul.Scalar) or editor.is_read_once(node, aten.mul.Tensor)
    if not scales or not isinstance(node.args[1], (int, float)):
        return None
    number: float = node.args[1]
    modest = 1 / MOST <= abs(number) <= MOST
    return number if modest and _is_like(node.args[0], node.meta["value"]) else None


def _is_like(node: Any, value: Tensor) -> bool:
    """Check whether a node has the shape and dtype of a tensor of real numbers, not of half precision."""
    if not has_entries(node) or value.dtype not in PRECISE:
        return False
    ours: Tensor = node.meta["value"]
    return ours.shape == value.shape and ours.dtype == value.dtype and ours.device == value.device
