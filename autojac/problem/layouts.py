"""The layouts of a Jacobian: their shapes, and how rows, columns and blocks find their place in each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from autojac.autodiff.derivative_terms import Terms, in_words
from autojac.core.signature import Layout, Leaf, Signature
from autojac.errors import InputError, OutputError, plural


def jacobian_shape(layout: Layout, batch: int, event: Sequence[int], leaf: Leaf) -> tuple[int, ...]:
    """Return the shape of the Jacobian of an output of shape (batch, *event) with respect to one tensor."""
    if layout == "diagonal":
        return batch, math.prod(event)
    return (batch, *event, *(leaf.shape if layout == "full" else leaf.event_shape))


def require_layout(signature: Signature) -> None:
    """Raise `OutputError` unless every pair of output and input has a Jacobian of the layout asked for."""
    if signature.layout != "diagonal":
        return
    for event, leaf in itertools.product(signature.outputs, signature.leaves):
        if leaf.differentiated and math.prod(event) != math.prod(leaf.event_shape):
            raise OutputError(
                f"a diagonal needs as many outputs as inputs in a sample, but func maps {leaf.event_shape} to {event}. "
                "Ask for layout='blocks', or leave that argument out of argnums"
            )


def require_columns(signature: Signature, of: Terms) -> None:
    """Raise `InputError` unless there is one input, which carries the batch and has every column in `of`."""
    if not of:
        return
    inputs = [leaf for leaf in signature.leaves if leaf.differentiated]
    if len(inputs) != 1 or not inputs[0].batched:
        what = "one that all samples share" if len(inputs) == 1 else plural(len(inputs), "tensor")
        raise InputError(
            f"derivatives by columns are of one tensor (B, n), got {what}. Pass one whose columns are the variables, "
            "as torch.stack([t, x], 1) makes it, and take it apart in func"
        )
    width = math.prod(inputs[0].event_shape)
    for term in () if of == "laplacian" else of:
        if any(column >= width for columns in term for column in columns):
            raise InputError(
                f"the derivative {in_words(term)} was asked for, but a sample has {plural(width, 'column')}, counted "
                "from 0. Name columns that there are"
            )


def embed(blocks: Tensor, event_dims: int) -> Tensor:
    """Return blocks (B, *out, *in) on the diagonal of a full Jacobian (B, *out, B, *in) that is zero elsewhere."""
    return blocks.movedim(0, -1).diag_embed(dim1=0, dim2=1 + event_dims)


def from_blocks(layout: Layout, blocks: Tensor, event: Sequence[int], batched: bool) -> Tensor:
    """Return the blocks (B, *out, *in) of independent samples, or of a shared input, in another layout."""
    if layout == "diagonal":
        size = math.prod(event)
        return blocks.reshape(len(blocks), size, size).diagonal(dim1=1, dim2=2)
    return embed(blocks, len(event)) if layout == "full" and batched else blocks


def own_coordinates(rows: Tensor, start: int) -> Tensor:
    """Return each seed's own coordinate, (c, B), of seeds number `start` and on, (c, B, *event)."""
    return rows.reshape(*rows.shape[:2], -1).diagonal(offset=start, dim1=0, dim2=2).T


def own_coordinate(rows: Tensor, numbers: Tensor, size: int) -> Tensor:
    """Return each row's own coordinate, (c,), of rows (c, *event) that belong to elements of a batch of events.

    Args:
        rows: one row for each element.
        numbers: the elements, counted through the whole batch.
        size: elements of one event.
    """
    return rows.reshape(len(rows), -1).gather(1, (numbers % size).unsqueeze(1)).squeeze(1)


def own_sample(rows: Tensor, numbers: Tensor, size: int) -> Tensor:
    """Return each row's part for its own sample, (c, *event), of rows (c, B, *event) of elements of a batch."""
    return rows[torch.arange(len(rows), device=rows.device), numbers // size]
