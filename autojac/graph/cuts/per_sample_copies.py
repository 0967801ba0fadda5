"""Operators in which each sample reads its own copy of a tensor that all of them shared."""

from __future__ import annotations

import dataclasses
import functools
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff.primitives import vmap
from autojac.graph.batch_axis.propagation import BatchFlow
from autojac.graph.batch_axis.states import SPREAD, BatchAxis
from autojac.graph.ir import Operation
from autojac.graph.operator_facts import facts_of
from autojac.graph.operator_kinds import Axes

Env = Mapping[int, Tensor]
Result = tuple[BatchAxis, tuple[int, ...]]
PerSampleForm = Callable[[Operation, Env], Sequence[Any]]


def per_sample_form(flow: BatchFlow, operation: Operation, tensors: Collection[int]) -> PerSampleForm | None:
    """Return the operator, reading copies (B, *shape) in the place of the shared tensors; None if it takes none.

    By broadcasting where the operator does so, else by torch.vmap over the samples of all that it reads. The form is
    that of the operator in every graph of one key: it is given the one to run, whose numbers are those of its call.
    """
    read = [number for number in dict.fromkeys(operation.sources) if number in tensors]
    made = [s for number in operation.results if isinstance(s := flow.states[number], BatchAxis)]
    if len(made) < len(operation.results):
        return None
    if SPREAD in made:
        return _over_axes(flow, operation, read)
    shapes = {number: shape for number in read if (shape := _as_broadcast(flow, operation, number)) is not None}
    if len(shapes) == len(read):
        return functools.partial(_broadcast, made[0].axis, shapes)
    carried = {n: state for n in operation.sources if isinstance(state := flow.states.get(n), BatchAxis)}
    if not carried or SPREAD in carried.values():
        return None
    results = [None if number is None else (made.pop(0), flow.graph.shapes[number]) for number in operation.outputs]
    if not _slices(flow, _for_one_sample(operation, flow.batch), carried, results):
        return None
    return functools.partial(_map, flow.batch, tuple(read), carried, results)


def _slices(
    flow: BatchFlow, operation: Operation, carried: Mapping[int, BatchAxis], results: Sequence[Result | None]
) -> bool:
    """Check whether one sample's slices give slices: what is read besides must not be as long as a batch."""
    graph, env = flow.graph, {}
    for number in operation.sources:
        state = carried.get(number)
        shape = graph.shapes[number] if state is None else _slice_shape(graph.shapes[number], state)
        env[number] = torch.empty(shape, dtype=graph.dtypes[number], device="meta")
    try:
        made = operation(env)
    except Exception:  # whatever an operator says of shapes that do not fit, or of tensors without memory
        return False
    return all(
        result is None or tuple(part.shape) == _slice_shape(result[1], result[0])
        for part, result in zip(made, results, strict=True)
    )


def _slice_shape(shape: tuple[int, ...], state: BatchAxis) -> tuple[int, ...]:
    return (*shape[: state.axis], state.outer * state.inner, *shape[state.axis + 1 :])


def _for_one_sample(operation: Operation, batch: int) -> Operation:
    counted = facts_of(operation.target).batch_size
    if not counted:
        return operation
    place = [argument.name for argument in operation.target._schema.arguments].index(counted)
    args = (*operation.args[:place], operation.args[place] // batch, *operation.args[place + 1 :])
    return dataclasses.replace(operation, args=args)


def _as_broadcast(flow: BatchFlow, operation: Operation, number: int) -> tuple[int, ...] | None:
    """Return a shared tensor's shape as it is broadcast, if the operator does so along the batch."""
    output = operation.results[0]
    state = flow.states[output]
    if not isinstance(state, BatchAxis) or state[1:] != (1, 1) or not _broadcasts(operation):
        return None
    padded = _padded_shape(flow, number, output)
    return padded if padded[state.axis] == 1 else None


def _broadcasts(operation: Operation) -> bool:
    return operation.name == "expand" or facts_of(operation.target).axes is Axes.BROADCAST


def _padded_shape(flow: BatchFlow, number: int, output: int) -> tuple[int, ...]:
    """Return a tensor's shape with as many axes as a result that it is broadcast to."""
    shape = flow.graph.shapes[number]
    return (1,) * (len(flow.graph.shapes[output]) - len(shape)) + shape


def _over_axes(flow: BatchFlow, operation: Operation, read: Sequence[int]) -> PerSampleForm | None:
    """Return the operator, reading copies, where several axes together tell samples apart and it broadcasts."""
    if len(operation.outputs) > 1 or not _broadcasts(operation):
        return None
    output = operation.results[0]
    states = [along.states[output] for along in flow.axes]
    places = [state.axis for state in states if isinstance(state, BatchAxis) and state[1:] == (1, 1)]
    if len(set(places)) < len(states):
        return None
    shapes = {number: _padded_shape(flow, number, output) for number in read}
    if any(shape[axis] != 1 for shape in shapes.values() for axis in places):
        return None
    return functools.partial(_broadcast_over, tuple(along.batch for along in flow.axes), places, shapes)


def _broadcast_over(
    sizes: Sequence[int], places: Sequence[int], shapes: Mapping[int, tuple[int, ...]], operation: Operation, env: Env
) -> Sequence[Any]:
    given = {}
    for number, shape in shapes.items():
        copies = env[number].reshape(*sizes, *shape)
        for front, axis in enumerate(places):
            copies = copies.transpose(front, len(sizes) + axis)
        given[number] = copies.reshape(copies.shape[len(sizes) :])
    return operation(ChainMap(given, dict(env)))


def _broadcast(axis: int, shapes: Mapping[int, tuple[int, ...]], operation: Operation, env: Env) -> Sequence[Any]:
    # the batch changes places with an axis of length one
    given = {n: env[n].reshape(len(env[n]), *shape).transpose(0, axis + 1).squeeze(0) for n, shape in shapes.items()}
    return operation(ChainMap(given, dict(env)))


def _map(
    batch: int,
    copied: Sequence[int],
    carried: Mapping[int, BatchAxis],
    results: Sequence[Result | None],
    operation: Operation,
    env: Env,
) -> Sequence[Any]:
    numbers = (*carried, *copied)
    operation = _for_one_sample(operation, batch)
    parts = [_move_samples_to_front(env[number], state, batch) for number, state in carried.items()]
    parts += [env[number] for number in copied]

    def run_sample(*sample: Tensor) -> list[Tensor]:
        made = operation(ChainMap(dict(zip(numbers, sample, strict=True)), dict(env)))
        return [part for part, state in zip(made, results, strict=True) if state is not None]

    made = iter(vmap(run_sample)(*parts))
    return [None if result is None else _restore_samples(next(made), result[0]) for result in results]


def _move_samples_to_front(tensor: Tensor, state: BatchAxis, batch: int) -> Tensor:
    """Return (…, outer·B·inner, …) as (B, …, outer·inner, …)."""
    axis = state.axis
    apart: Tensor = tensor.unflatten(axis, (state.outer, batch, state.inner))
    return apart.movedim(axis + 1, 0).flatten(axis + 1, axis + 2)


def _restore_samples(tensor: Tensor, state: BatchAxis) -> Tensor:
    axis = state.axis
    apart: Tensor = tensor.unflatten(axis + 1, (state.outer, state.inner))
    return apart.movedim(0, axis + 1).flatten(axis, axis + 2)
