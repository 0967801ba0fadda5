"""Seeds of colors, swept through a function: pulled or pushed, so many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.autodiff.primitives import functional_jvp, functional_vjp, push_dual, vmap
from autojac.autodiff.pullback import Pullback
from autojac.problem.compression import Colors
from autojac.problem.problem import Problem, bind

Engine = Literal["loop", "vmap", "batched"]


@dataclass(frozen=True)
class Sweep:
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
    problem: Problem, colors: Colors, sweep: Sweep, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """One VJP a color: the values, and for each input what all seeds brought, (seeds, B, *event)."""
    bound, inputs = bind(problem, leaves, kwargs)
    spans = [problem.rows(output) for output in range(len(problem.outputs))]
    if sweep.engine == "vmap":
        values, vjp = functional_vjp(bound, inputs)

        def pull(cotangents: list[Tensor], last: bool) -> Sequence[Tensor]:
            pulled: Sequence[Tensor] = vmap(lambda *own: vjp(own))(*cotangents)
            return pulled
    else:
        pullback = Pullback(bound, inputs, problem.differentiable, not problem.structure.effects)
        values = pullback.outputs

        def pull(cotangents: list[Tensor], last: bool) -> Sequence[Tensor]:
            if sweep.engine == "batched":
                return pullback.pull(pullback.recorded, cotangents, batched=True, last=last)
            return [one[None] for one in pullback.pull(pullback.recorded, [c[0] for c in cotangents], last=last)]

    def parts() -> Iterator[Sequence[Tensor]]:
        for start, stop in seeds.spans(colors.count, sweep.step):
            yield pull(colors.seeds(start, stop, spans, values), stop == colors.count)

    if not colors.count:
        return values, [x.new_zeros(0, *x.shape) for x in inputs]
    return values, seeds.collect(parts(), colors.count, problem.differentiable)


def push_colors(
    problem: Problem, colors: Colors, sweep: Sweep, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """One JVP a color: the values, and for each output what all seeds brought, (seeds, B, *event)."""
    bound, inputs = bind(problem, leaves, kwargs)
    # dual numbers refuse expanded tensors, whose elements share memory
    inputs = tuple(x.contiguous() for x in inputs)
    spans = [problem.columns(position) for position in problem.inputs]
    values: tuple[Tensor, ...] = ()

    def parts() -> Iterator[Sequence[Tensor]]:
        nonlocal values
        for start, stop in seeds.spans(colors.count, sweep.step):
            tangents = colors.seeds(start, stop, spans, inputs)
            if sweep.engine == "loop":
                found, pushed = push_dual(bound, inputs, [t[0] for t in tangents])
                values = tuple(found)
                yield [one[None] for one in pushed]
                continue
            # a draw belongs to the batch, not to a tangent
            push = vmap(lambda *own: functional_jvp(bound, inputs, own), draws=problem.structure.draws)
            found, pushed = push(*tangents)
            values = tuple(value[0] for value in found)
            yield list(pushed)

    if not colors.count:
        with torch.set_grad_enabled(problem.differentiable):
            values = problem.fn(leaves, kwargs)
        return values, [y.new_zeros(0, *y.shape) for y in values]
    compressed = seeds.collect(parts(), colors.count, problem.differentiable)
    return values, compressed
