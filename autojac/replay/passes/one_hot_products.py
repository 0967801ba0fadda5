"""Products with one-hot seeds: rows of the other factor, without arithmetic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx

from autojac.replay.passes.editor import MOST_ENTRIES, Editor, aten
from autojac.replay.passes.node_facts import has_entries, narrow_repeats

RANK = 30
PRODUCTS = {aten.mm.default, aten.bmm.default}
LEAST_WORK = 2**15
"""Multiplications that are worth a copy of the rows."""


class Rows(NamedTuple):
    """Rows `first` to `first + many` of a factor, each of them `each` times, and all that `times` over."""

    first: int
    many: int
    each: int
    times: int


def one_hot_products(graph: fx.Graph) -> None:
    """Put rows of W in the place of S @ W, for constant seeds S whose rows have a single one.

    Seeds come sample by sample or the same for all, so the rows repeat themselves: as a view, which takes no memory.
    Columns in the place of W @ S likewise. Where W is not finite, S @ W has NaN wherever S multiplies that by zero, and
    W's rows have not: they are the derivative, which has no such terms.
    """
    Editor(graph).sweep(_select_rows, PRODUCTS)


def _select_rows(editor: Editor, node: fx.Node) -> fx.Node | None:
    left, right = node.args
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    if has_entries(left) and has_entries(right):
        if left.meta["role"] == "constant":
            return _rows_of(editor, node, left.meta["value"], right, list(node.meta["value"].shape))
        if right.meta["role"] == "constant":
            factor = editor.make(node, aten.transpose.int, left, -2, -1)
            turned = list(node.meta["value"].mT.shape)
            rows = factor and _rows_of(editor, node, right.meta["value"].mT, factor, turned)
            return rows and editor.make(node, aten.transpose.int, rows, -2, -1)
    return None


def _rows_of(editor: Editor, node: fx.Node, seed: Tensor, factor: fx.Node, shape: list[int]) -> fx.Node | None:
    """Return seed @ factor, of that shape, for a seed of one-hot rows."""
    value = factor.meta["value"]
    batch: tuple[int, ...] = tuple(value.shape[:-2])
    shared = bool(batch) and (value.stride(0) == 0 or value.size(0) == 1)
    if batch and not shared and seed.stride(0) != 0:
        return None
    rows = _rows(seed if shared or not batch else seed[0])
    if rows is None:
        return None
    one: fx.Node | None = factor
    if shared:
        value, batch = value[0], ()
        one = editor.narrow(node, factor, value)
    if one is not None and rows.many != value.size(-2):
        one = editor.make(node, aten.slice.Tensor, one, len(batch), rows.first, rows.first + rows.many)
    # axes along which nothing repeats itself stay where they are
    axes = [pair for pair in ((rows.times, 1), (rows.many, rows.many), (rows.each, 1)) if pair[0] > 1]
    lean, wide = [length for _, length in axes], [size for size, _ in axes]
    if one is not None and lean != wide and rows.many > 1 and one.meta["value"].stride(-1) != 1:
        if node.meta["value"].numel() * value.size(-2) < LEAST_WORK:
            return None
        # rows that are repeated are worth having entry by entry: operators lay out what they make as their first factor
        one = editor.copy(node, one)
        if one is not None:
            one.meta["wanted"] = True
    if one is not None and lean != wide:
        one = editor.reshape(node, one, [*batch, *lean, value.size(-1)])
        one = one and editor.make(node, aten.expand.default, one, [*batch, *wide, value.size(-1)])
    return one and editor.reshape(node, one, shape)


def _rows(seed: Tensor) -> Rows | None:
    """Return which rows of a factor a product with a seed is; None if it is not as simple as that."""
    lean = narrow_repeats(seed)
    if not 0 < lean.numel() <= MOST_ENTRIES:
        return None
    ones = lean == 1
    if not bool((ones.sum(-1) == 1).all()) or not bool(((lean != 0).sum(-1) == 1).all()):
        return None
    if lean.size(-1) != seed.size(-1):  # a single one that is repeated: the product adds up rows
        return None
    hot = ones.to(torch.uint8).argmax(-1).expand(seed.shape[:-1]).flatten()
    if hot.numel() > MOST_ENTRIES:
        return None
    first, many = int(hot[0]), int(hot.max() - hot.min()) + 1
    others = (hot != first).nonzero()
    each = int(others[0]) if len(others) else len(hot)
    times = len(hot) // (many * each)
    regular = torch.arange(first, first + many, device=hot.device).view(1, many, 1).expand(times, many, each)
    return Rows(first, many, each, times) if torch.equal(regular.flatten(), hot) else None
