"""Seeds of colors, swept through a function: pulled or pushed, so many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.methods.support.engines import Engine, puller, push
from autojac.problem.compression import Colors
from autojac.problem.problem import Problem, bind


@dataclass(frozen=True)
class SweepOptions:
    """How seeds go through a function.

    Attributes:
        engine: `loop`, `vmap`, or for pulling `batched`.
        chunk: seeds per pass; None for all.
    """

    engine: Engine
    chunk: int | None = None

    @property
    def step(self) -> int | None:
        return 1 if self.engine == "loop" else self.chunk


def pull_colors(
    problem: Problem, colors: Colors, sweep: SweepOptions, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Make one VJP per color; return the values, and for each input what all seeds brought, (seeds, B, *event)."""
    spans = [problem.rows(output) for output in range(len(problem.outputs))]
    bound, inputs = bind(problem, leaves, kwargs)
    pulls = puller(bound, inputs, sweep.engine, problem.differentiable, not problem.structure.effects)

    def parts() -> Iterator[Sequence[Tensor]]:
        for start, stop in seeds.spans(colors.count, sweep.step):
            yield pulls.all(colors.seeds(start, stop, spans, pulls.values), last=stop == colors.count)

    if not colors.count:
        return pulls.values, [x.new_zeros(0, *x.shape) for x in inputs]
    return pulls.values, seeds.collect(parts(), colors.count, problem.differentiable)


def push_colors(
    problem: Problem, colors: Colors, sweep: SweepOptions, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Make one JVP per color; return the values, and for each output what all seeds brought, (seeds, B, *event)."""
    bound, inputs = bind(problem, leaves, kwargs)
    # dual numbers refuse expanded tensors, whose elements share memory
    inputs = tuple(x.contiguous() for x in inputs)
    spans = [problem.columns(position) for position in problem.inputs]
    values: tuple[Tensor, ...] = ()

    def parts() -> Iterator[Sequence[Tensor]]:
        nonlocal values
        for start, stop in seeds.spans(colors.count, sweep.step):
            tangents = colors.seeds(start, stop, spans, inputs)
            values, pushed = push(bound, inputs, tangents, sweep.engine, problem.structure.draws)
            yield pushed

    if not colors.count:
        with torch.set_grad_enabled(problem.differentiable):
            values = problem.fn(leaves, kwargs)
        return values, [y.new_zeros(0, *y.shape) for y in values]
    # in this order: what is pushed gives the values too
    compressed = seeds.collect(parts(), colors.count, problem.differentiable)
    return values, compressed
