"""The slope of an activation, computed once for all seeds that are multiplied by it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

from autojac.replay.passes.editor import Editor, aten
from autojac.replay.passes.node_facts import PRECISE, has_entries

RANK = 72
SLOPES = {
    aten.silu_backward.default,
    aten.gelu_backward.default,
    aten.mish_backward.default,
    aten.softplus_backward.default,
    aten.elu_backward.default,
}
"""Operators that multiply their first argument by a slope which takes an exponential or an error function."""


def activation_slopes(graph: fx.Graph) -> None:
    """Multiply by slope(1, z) in the place of each slope(g, z), where there are many g for one z.

    Many cotangents are many calls, or one call on a g with more axes.
    """
    asked = Counter(_question(node) for node in graph.nodes if node.target in SLOPES)

    def rule(editor: Editor, node: fx.Node) -> fx.Node | None:
        gradient: Any = node.args[0]
        (z,) = (argument for argument in node.args[1:] if has_entries(argument))
        value, shape = node.meta["value"], z.meta["value"].shape
        if not has_entries(gradient) or gradient.meta["value"].dtype != value.dtype or value.dtype not in PRECISE:
            return None
        if asked[_question(node)] < 2 and shape.numel() >= value.numel():
            return None
        # in full: oneDNN repeats nothing by itself
        one = editor.constant(torch.ones((), dtype=value.dtype, device=value.device).expand(shape))
        slope = editor.make(node, node.target, one, *node.args[1:], **node.kwargs)
        return slope and editor.make(node, aten.mul.Tensor, gradient, slope)

    Editor(graph).sweep(rule, SLOPES)


def _question(node: fx.Node) -> tuple[Any, ...]:
    """Return what tells slopes apart."""
    return node.target, *node.args[1:], *sorted(node.kwargs.items())
