"""Derivatives of one piece of a computation: many cotangents pulled, or many tangents pushed, by one of the engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.autodiff.primitives import Bound, functional_jvp, functional_vjp, load_forward_rules, push_dual, vmap
from autojac.autodiff.pullback import Pullback
from autojac.graph.batch_axis.states import BatchAxis

Engine = Literal["loop", "vmap", "batched"]
PullMany = Callable[[int, Tensor], Sequence[Tensor]]
PushMany = Callable[[int, Tensor], Sequence[Tensor]]


def puller(
    bound: Bound, inputs: Sequence[Tensor], engine: Engine, differentiable: bool
) -> tuple[tuple[Tensor, ...], PullMany]:
    """The values, and a function from (output, cotangents (c, *output)) to one (c, *input) an input."""
    if engine == "vmap":
        values, vjp = functional_vjp(bound, inputs)

        def pull_vmapped(output: int, cotangents: Tensor) -> Sequence[Tensor]:
            zeros = [torch.zeros_like(value) for value in values]
            pulled: Sequence[Tensor] = vmap(lambda seed: vjp((*zeros[:output], seed, *zeros[output + 1 :])))(cotangents)
            return pulled

        return values, pull_vmapped
    pullback = Pullback(bound, inputs, differentiable)

    def pull(output: int, cotangents: Tensor) -> Sequence[Tensor]:
        if engine == "batched":
            return pullback(output, cotangents, batched=True)
        rows = [pullback(output, cotangent) for cotangent in cotangents]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    return pullback.outputs, pull


def pusher(bound: Bound, inputs: Sequence[Tensor], engine: Engine) -> PushMany:
    """A function from (input, tangents (c, *input)) to one (c, *output) an output."""
    if engine == "vmap" and not torch.compiler.is_compiling():
        load_forward_rules()

    def push(position: int, tangents: Tensor) -> Sequence[Tensor]:
        def alone(tensor: Tensor) -> tuple[Tensor, ...]:
            return bound(*inputs[:position], tensor, *inputs[position + 1 :])

        source = inputs[position]
        if engine == "vmap":
            pushed: Sequence[Tensor] = vmap(lambda seed: functional_jvp(alone, (source,), (seed,))[1])(tangents)
            return pushed
        source = source.contiguous()
        rows = [push_dual(alone, (source,), (tangent,))[1] for tangent in tangents]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    return push


def each(run: Callable[[Tensor], Sequence[Tensor]], rows: Tensor, step: int | None) -> list[Tensor]:
    """What `run` makes of all seeds (k, *shape), `step` of them at a time."""
    parts = [run(rows[start:stop]) for start, stop in seeds.spans(len(rows), step)]
    return [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts, strict=True)]


def coordinates(tensor: Tensor, state: BatchAxis, batch: int) -> Tensor:
    """One-hot seeds (k, *shape) of a tensor that carries the batch along an axis, each for every sample."""
    axis, outer, inner = state
    event = (*tensor.shape[:axis], outer, inner, *tensor.shape[axis + 1 :])
    return seeds.shared(event, batch, tensor).movedim(1, axis + 2).reshape(-1, *tensor.shape)


def by_sample(rows: Tensor, state: BatchAxis, batch: int) -> Tensor:
    """Rows (c, *shape) of such a tensor as (c, B, k), elements in the order of `coordinates`."""
    axis, outer, inner = state
    apart = rows.reshape(*rows.shape[: axis + 1], outer, batch, inner, *rows.shape[axis + 2 :])
    return apart.movedim(axis + 2, 1).reshape(len(rows), batch, -1)
