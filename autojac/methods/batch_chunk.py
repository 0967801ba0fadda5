"""Wrapper: compute a slice of the batch at a time, so that temporaries stay in cache and in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.methods.base import Method, Wrapper, registry
from autojac.methods.support.costs import WORKSPACE_MARGIN
from autojac.problem.layouts import from_blocks
from autojac.problem.problem import Compute, Problem, Result

LARGE_BATCH = 4096


@dataclass(frozen=True)
class BatchChunk(Wrapper):
    """Another method, applied to `size` samples at a time.

    Attributes:
        size: samples per slice; the last slice may be smaller.
        inner: the method for one slice.
    """

    size: int
    inner: Method

    goes_into_chunks: ClassVar[bool] = False

    def unsupported(self, problem: Problem) -> str | None:
        if not problem.structure.independent:
            return "samples are coupled, so a slice of the batch has other Jacobians"
        if not problem.structure.sliceable:
            return "func of a slice is not the slice of func: its output depends on the rest of the batch"
        return self.inner.unsupported(problem) or super().unsupported(problem)

    @classmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        if problem.batch >= LARGE_BATCH:
            sizes = [size for size in (1024, 4096, 16384) if size < problem.batch]
        else:
            sizes = [size for size in (problem.batch // 4,) if depth and size >= 16]
        room = problem.memory_limit - 2 * problem.result_bytes
        fitting = problem.batch * room // (WORKSPACE_MARGIN * problem.seed_bytes)
        if 0 < fitting < problem.batch:
            sizes.append(1 << (fitting.bit_length() - 1))
        for size in dict.fromkeys(sizes):
            part = problem.resize(size)
            for kind in registry().values():
                if kind.goes_into_chunks:
                    yield from (cls(size, inner) for inner in kind.candidates(part, depth) if not inner.is_chunked)

    def cost(self, problem: Problem) -> float:
        slices = problem.batch / self.size
        return slices * self.inner.cost(self._part(problem, self.size))

    def workspace(self, problem: Problem) -> int:
        return self.inner.workspace(self._part(problem, self.size))

    def _part(self, problem: Problem, size: int) -> Problem:
        """Return the problem of one slice, in blocks where all was asked for, since nothing couples slices."""
        layout = "blocks" if problem.layout == "full" else problem.layout
        return dataclasses.replace(problem.resize(size), layout=layout)

    def prepare(self, problem: Problem) -> Compute:
        spans = list(seeds.spans(problem.batch, self.size))
        sizes = {stop - start for start, stop in spans}
        computes = {size: self.inner.prepare(self._part(problem, size)) for size in sizes}
        batched = [leaf.batched for leaf in problem.leaves]

        def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            parts = []
            for start, stop in spans:
                sliced = [x[start:stop] if has else x for x, has in zip(leaves, batched, strict=True)]
                parts.append(computes[stop - start](sliced, kwargs))
            values = tuple(torch.cat(pieces) for pieces in zip(*(part.values for part in parts), strict=True))
            rows = zip(*(part.jacobians for part in parts), strict=True)
            return Result(values, tuple(tuple(self._join(problem, o, row)) for o, row in enumerate(rows)))

        return compute

    @staticmethod
    def _join(problem: Problem, output: int, row: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
        for position, pieces in zip(problem.inputs, zip(*row, strict=True), strict=True):
            joined = torch.cat(pieces)
            if problem.layout == "full":
                joined = from_blocks("full", joined, problem.outputs[output], problem.leaves[position].batched)
            yield joined
