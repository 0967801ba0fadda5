"""Seeds: the tangents and cotangents that a method pushes or pulls.

`shared` seeds are one per coordinate and the same for all samples (the sum trick): they suffice where samples
are independent. `identity` seeds are one per element of the whole batch. Both are built without storing zeros
where an expanded view does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from autojac.autodiff.open_modes import transforming

SeedKind = Literal["shared", "identity"]
LASTING = "autojac_lasting"
"""Attribute of tensors that are reused from call to call and never written, so that recordings may refer to them."""


def size(shape: tuple[int, ...]) -> int:
    """Return the number of elements of one event."""
    return math.prod(shape)


def shared_seeds(event_shape: tuple[int, ...], batch: int, like: Tensor) -> Tensor:
    """Return all one-hot seeds of an event, each for every sample: (k, B, *event), a view of k × k numbers."""
    count = size(event_shape)
    eye = torch.eye(count, dtype=like.dtype, device=like.device)
    return eye.view(count, 1, *event_shape).expand(count, batch, *event_shape)


class SharedSeeds:
    """A cache of shared seeds, filled by the first call of a plan."""

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}

    def __call__(self, index: int, event_shape: tuple[int, ...], batch: int, like: Tensor) -> Tensor:
        """Return `shared_seeds(event_shape, batch, like)`, cached under `index`."""
        seeds = self._made.get(index)
        if seeds is None or seeds.dtype != like.dtype or seeds.device != like.device:
            seeds = shared_seeds(event_shape, batch, like)
            setattr(seeds, LASTING, True)
            self._made[index] = seeds
        return seeds

    def apart(self, rows: Tensor) -> Tensor:
        """Copy rows that share memory with cached seeds, into which a caller must not write."""
        if not self._made or type(rows) is not Tensor or transforming():
            return rows
        storages = [seeds.untyped_storage().data_ptr() for seeds in self._made.values()]
        return rows.clone() if rows.untyped_storage().data_ptr() in storages else rows


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random tangent or cotangent: the same numbers in every dtype and on every device."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def identity(shape: tuple[int, ...], start: int, stop: int, like: Tensor) -> Tensor:
    """Return one-hot seeds number `start` to `stop` of a whole batch of `shape`: (stop - start, *shape)."""
    seeds = torch.zeros(stop - start, size(shape), dtype=like.dtype, device=like.device)
    seeds.diagonal(offset=start).fill_(1)
    return seeds.view(stop - start, *shape)


def spans(count: int, chunk: int | None) -> Iterator[tuple[int, int]]:
    """Return consecutive (start, stop) of at most `chunk` seeds."""
    step = count if chunk is None else chunk
    for start in range(0, count, step or 1):
        yield start, min(start + (step or 1), count)


def collect(parts: Iterator[Sequence[Tensor]], count: int, differentiable: bool) -> list[Tensor]:
    """Concatenate `count` rows that arrive in parts, for several tensors side by side.

    Each part is written into its place and freed, except where a graph must be kept.
    """
    first = next(parts)
    if len(first[0]) == count:
        return list(first)
    if differentiable:
        return [torch.cat(rows) for rows in zip(first, *parts, strict=True)]
    wholes = [rows.new_empty(count, *rows.shape[1:]) for rows in first]
    start = 0
    for part in itertools.chain((first,), parts):
        for whole, rows in zip(wholes, part, strict=True):
            whole[start : start + len(rows)] = rows
        start += len(part[0])
    return wholes
