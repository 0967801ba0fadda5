"""Products of several factors, entry by entry: the small ones first."""

from __future__ import annotations

import itertools
from typing import Any

from torch import fx

from autojac.replay.passes.editor import Editor, aten, sweep
from autojac.replay.passes.node_facts import has_entries

RANK = 73


def small_factors(graph: fx.Graph) -> None:
    """Multiply what has the fewest entries before it is repeated for others: g * (s * t) for (g * s) * t.

    So do slopes that were taken apart into several factors, and are the same for all seeds.
    """
    sweep(graph, _reordered, {aten.mul.Tensor})


def _reordered(editor: Editor, node: fx.Node) -> fx.Node | None:
    right = node.meta["value"]
    if not right.is_floating_point():
        return None
    for product, last in itertools.permutations(node.args):
        if not has_entries(product) or product.target is not aten.mul.Tensor or len(product.users) != 1:
            continue
        first: tuple[Any, ...] = product.args
        if not editor.free(product) or not all(
            has_entries(f) and f.meta["value"].dtype == right.dtype for f in (*first, last)
        ):
            continue
        for other, factor in (first, first[::-1]):
            few = editor.make(node, aten.mul.Tensor, factor, last)
            if few is not None and few.meta["value"].numel() < product.meta["value"].numel():
                return editor.make(node, aten.mul.Tensor, other, few)
    return None
