"""What an aten operator may do to entries and to axes: the vocabulary of the table of operator facts."""

from __future__ import annotations

import enum

import torch


class Kind(enum.Enum):
    """What an operator does to the entries of the tensors that it reads."""

    POINTWISE = "each result reads the entries at its own place, after broadcasting"
    COPY = "every entry stays where it is"
    PAIRS = "complex numbers become pairs of real ones, or the reverse"
    VIEW = "the entries keep their order and get another shape"
    AXES = "whole axes are rearranged, added, removed or expanded"
    MOVE = "each result is an entry of an argument, or a filler, at places that no value decides"
    GATHER = "each result is an entry of an argument, at places that the selectors decide"
    SCATTER = "entries of the source go to places in the first argument that the selectors decide"
    CONVOLUTION = "each result reads the channels of its group in a window"
    WINDOW = "each result reads a window of its channel"
    ADAPTIVE = "each result reads a window of its channel whose size follows from that of the output"
    CHANNEL = "each result reads everything behind the first two axes, at its own place along these"
    PRODUCT = "each result reads a row of the left factor and a column of the right one"
    DISTANCE = "each result reads one point of either argument"
    REDUCTION = "each result reads its whole line along the reduced axes"
    SCAN = "each result reads its whole line along axes that stay"
    MATRIX = "each result reads the whole of its matrix, which the last two axes hold"
    NORMALIZATION = "each result reads its whole group"
    FACTORY = "fresh memory, for which no entry of an argument is read, only its shape and dtype"
    SIZES = "no tensor is returned and no entry of one is read"
    UNKNOWN = "each result may read everything"


class Axes(enum.Enum):
    """What an operator does to the axes of the tensors that it reads."""

    BROADCAST = "the arguments are broadcast against each other"
    KEPT = "all axes stay as they are"
    REGROUPED = "neighboring axes are merged and split"
    SPLIT = "results are pieces along `dim`"
    REDUCED = "those named by `dim` are removed, or get length one"
    NAMED = "it works along those named by `dim` or `dims`; all others stay as they are"
    TRAILING = "it works along the last two"
    LEADING = "the first one is the batch by definition, in each argument of `batched`"
    INDEXED = "all tensors have equally many axes, and entries are taken along `dim`"
    FACTORS = "those of a product of matrices, vectors or stacks of matrices"
    OWN = "a rule of its own says"
    UNKNOWN = "nothing is known"


MOVING = frozenset({Kind.VIEW, Kind.AXES, Kind.MOVE})
"""Kinds that move entries without looking at any."""
MASKS = (torch.bool, torch.uint8)
"""Dtypes of indices that take the entries where they are set."""
