"""Seeds of colors, swept through a function: pulled or pushed, so many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.methods.base import Method
from autojac.methods.support.engines import Engine, puller, push
from autojac.problem.compression import Colors
from autojac.problem.problem import Problem, bind


@dataclass(frozen=True)
class ColoredSweeps(Method):
    """A method that reads the Jacobian from what the seeds of its colors bring.

    Attributes:
        engine: as in `Pull`; forward mode has no `batched`.
        chunk: seeds per pass; None for all.
    """

    engine: Engine = "loop"
    chunk: int | None = None

    @property
    def makes_sparse(self) -> bool:
        return True

    @property
    def trusts_zeros(self) -> bool:
        return True

    def step(self, count: int) -> int:
        """Return how many of `count` seeds go through func in one pass."""
        return 1 if self.engine == "loop" else self.chunk or count or 1


def pull_colors(
    problem: Problem, colors: Colors, method: ColoredSweeps, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Make one VJP per color; return the values, and for each input what all seeds brought, (seeds, B, *event)."""
    spans = [problem.rows(output) for output in range(len(problem.outputs))]
    bound, inputs = bind(problem, leaves, kwargs)
    pulls = puller(bound, inputs, method.engine, problem.differentiable, not problem.structure.effects)

    def parts() -> Iterator[Sequence[Tensor]]:
        for start, stop in seeds.spans(colors.count, method.step(colors.count)):
            yield pulls.all(colors.seeds(start, stop, spans, pulls.values), last=stop == colors.count)

    if not colors.count:
        return pulls.values, [x.new_zeros(0, *x.shape) for x in inputs]
    return pulls.values, seeds.collect(parts(), colors.count, problem.differentiable)


def push_colors(
    problem: Problem, colors: Colors, method: ColoredSweeps, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Make one JVP per color; return the values, and for each output what all seeds brought, (seeds, B, *event)."""
    bound, inputs = bind(problem, leaves, kwargs)
    # dual numbers refuse expanded tensors, whose elements share memory
    inputs = tuple(x.contiguous() for x in inputs)
    spans = [problem.columns(position) for position in problem.inputs]
    values: tuple[Tensor, ...] = ()

    def parts() -> Iterator[Sequence[Tensor]]:
        nonlocal values
        for start, stop in seeds.spans(colors.count, method.step(colors.count)):
            tangents = colors.seeds(start, stop, spans, inputs)
            values, pushed = push(bound, inputs, tangents, method.engine, problem.structure.draws)
            yield pushed

    if not colors.count:
        with torch.set_grad_enabled(problem.differentiable):
            values = problem.fn(leaves, kwargs)
        return values, [y.new_zeros(0, *y.shape) for y in values]
    # in this order: what is pushed gives the values too
    compressed = seeds.collect(parts(), colors.count, problem.differentiable)
    return values, compressed
