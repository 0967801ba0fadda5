"""Is the coupling that was seen only rounding? What cancels exactly leaves a trace between samples in any precision.

Inputs that are centred by the batch's mean before distances are taken depend on all samples, and the distances do not:
gradients of a few eps reach other samples. The operators of a call are run in float32 and in float64 on the same
numbers, and where samples do not depend on each other, all that passes between them shrinks as eps does. A coupling
that is there stays what it is, however small. The operators are those of the call itself, so that neither a branch on
the dtype nor its eps changes with the precision.

NaN passes all the same, as it does through a weight of zero or a threshold: see `cancelling`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autojac.autodiff.pullback import Pullback
from autojac.autodiff.seeds import noise
from autojac.autodiff.tolerance import balance
from autojac.core.time_limit import within
from autojac.graph.analysis import flow_of
from autojac.graph.batch_axis.states import State
from autojac.graph.ir import Graph
from autojac.graph.recorder import FunctionRecording, record
from autojac.probe.cancelling import SLIGHT, Env, PossibleCoupling, SampleChange, exceeds, outside_of, rounding
from autojac.probe.sample_pairs import SCALES, ProbePoint, along

SHRINKS = 2.0**-23
"""Rounding that passes between samples in float64 is at most this share of that in float32: 64 ratios of eps."""
PASSES = 16
"""Evaluations, each mask and point, that are counted on: gradients, and the operators one by one, in two precisions."""
CONSTANTS_MOVE = 0.3
"""How far captured tensors are moved, relative to their entries."""


class GraphInPrecision(NamedTuple):
    """A graph with its constants, and the leaves of a point, in one precision."""

    graph: Graph
    leaves: tuple[Tensor, ...]

    def tensors(self, leaves: Sequence[Tensor], numbers: Sequence[int]) -> Env:
        """Return every tensor of the graph, for these leaves."""
        values = dict(zip(self.graph.inputs, leaves, strict=True))
        tensors = dict(zip(numbers, self.graph.run(numbers, values), strict=True))
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values() if tensor.is_floating_point()):
            raise PossibleCoupling
        return tensors

    def pullback(self, inputs: Sequence[int]) -> Pullback:
        def bound(*tensors: Tensor) -> tuple[Tensor, ...]:
            leaves = {**dict(enumerate(self.leaves)), **dict(zip(inputs, tensors, strict=True))}
            values = {number: leaves[position] for position, number in enumerate(self.graph.inputs)}
            return self.graph.run(self.graph.outputs, values)

        return Pullback(bound, [self.leaves[position] for position in inputs], differentiable=False)


def is_only_rounding(
    point: ProbePoint, masks: Sequence[Tensor], cost: float, generator: torch.Generator, budget_s: float
) -> bool:
    """Check that nothing but rounding passes between samples, at several points.

    Args:
        point: the function, at arguments where little passes.
        masks: samples to change.
        cost: seconds of one evaluation.
        generator: of other values and points.
        budget_s: seconds after which the answer is no.
    """
    if cost * PASSES * (1 + len(SCALES)) * len(masks) > budget_s:
        return False

    def check() -> None:
        _require_rounding(point, masks, 1.0, generator, moving=False)
        for turn, scale in enumerate(SCALES):
            _require_rounding(point.at_other_point(turn, scale, generator), masks, scale, generator, moving=True)

    try:
        within(budget_s, check)
    except (Exception, TimeoutError):  # also whatever func raises
        return False
    return True


def _require_rounding(
    there: ProbePoint, masks: Sequence[Tensor], scale: float, generator: torch.Generator, moving: bool
) -> None:
    """Raise `PossibleCoupling` unless what passes between samples vanishes with the precision or cancels."""
    recording, graph = _record(there, there.leaves)
    carriers = (*there.inputs, *there.sides)
    flow = flow_of(graph, [position in carriers for position in range(len(there.leaves))], there.batch)
    if flow.lost_output:
        raise PossibleCoupling
    states = flow.states
    numbers = _numbers(graph)
    captured = {id(tensor) for tensor in recording.captured}
    constants = {
        # what cancels for these weights alone would not after the next step of training
        number: _another(tensor, generator) if moving and id(tensor) in captured else tensor.detach()
        for number, tensor in graph.constants.items()
    }
    low, high = (_in_precision(graph, constants, there.leaves, dtype) for dtype in (torch.float32, torch.float64))
    pullbacks = low.pullback(there.inputs), high.pullback(there.inputs)
    moves = []
    for mask in masks:
        _pull(*pullbacks, mask, generator)
        changed = dataclasses.replace(there, leaves=low.leaves).with_inputs_moved(scale, generator, mask).leaves
        moves.append(changed)
        if graph.reads_data:
            # Python may have read what the other samples are
            as_passed = [new.to(old.dtype) for new, old in zip(changed, there.leaves, strict=True)]
            if not _same(graph, _record(there, as_passed)[1]):
                raise PossibleCoupling
    noisy = _noise(low, states, numbers, masks, moves)
    base = high.tensors(high.leaves, numbers)
    scales = {number: rounding(tensor) for number, tensor in base.items()}
    for mask, leaves in zip(masks, moves, strict=True):
        after = high.tensors([_in_dtype(leaf, torch.float64) for leaf in leaves], numbers)
        outside = {number: outside_of(states.get(number), base[number], mask) for number in numbers}
        reached = {n: exceeds(base[n], after[n], scales[n] + SHRINKS * noisy[n]) & outside[n] for n in numbers}
        if any(bool(reached[number].any()) for number in graph.outputs):
            raise PossibleCoupling
        change = SampleChange(states, base, after, scales, outside, reached)
        for operation in high.graph.operations:
            change.require_cancelling(operation)


def _record(there: ProbePoint, leaves: Sequence[Tensor]) -> tuple[FunctionRecording, Graph]:
    with there.sandbox():
        recording = within(there.limit_s, lambda: record(there.fn, leaves, there.kwargs, there.inputs))
    if recording.graph is None:
        raise PossibleCoupling
    return recording, recording.graph


def _same(graph: Graph, other: Graph) -> bool:
    """Check whether two calls did the same with their inputs."""
    if graph.exact != other.exact:
        return False
    pairs = ((tensor, other.constants[number]) for number, tensor in graph.constants.items())
    return all(one is another or torch.equal(one, another) for one, another in pairs)


def _noise(
    run: GraphInPrecision,
    states: Mapping[int, State],
    numbers: Sequence[int],
    masks: Sequence[Tensor],
    moves: Sequence[Sequence[Tensor]],
) -> Env:
    """Return for each coordinate of each tensor how far it moves at most when other samples do."""
    base = run.tensors(run.leaves, numbers)
    most: dict[int, Tensor] = {}
    for mask, leaves in zip(masks, moves, strict=True):
        for number, tensor in run.tensors(leaves, numbers).items():
            change = (tensor.double() - base[number].double()).abs() * outside_of(states.get(number), tensor, mask)
            change = change.amax(0) if change.dim() and len(change) else change
            most[number] = torch.maximum(change, most.get(number, change))
    return most


def _numbers(graph: Graph) -> tuple[int, ...]:
    """Return the graph's tensors; raise `PossibleCoupling` where another precision may change what operators mean."""
    if any(operation.target.namespace != "aten" or operation.name == "nextafter" for operation in graph.operations):
        raise PossibleCoupling
    numbers = dict.fromkeys((*graph.inputs, *graph.constants))
    for operation in graph.operations:
        numbers.update(dict.fromkeys(operation.results))
    dtypes = {graph.dtypes[number] for number in numbers}
    dtypes = {dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex}
    if dtypes not in ({torch.float32}, {torch.float64}):
        raise PossibleCoupling
    return tuple(numbers)


def _another(tensor: Tensor, generator: torch.Generator) -> Tensor:
    tensor = tensor.detach()
    if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
        return tensor
    size = torch.where(tensor == 0, 1, tensor.abs())
    return tensor + CONSTANTS_MOVE * size * noise(tensor, generator)


def _in_precision(graph: Graph, constants: Env, leaves: Sequence[Tensor], dtype: torch.dtype) -> GraphInPrecision:
    operations = tuple(
        dataclasses.replace(
            operation,
            args=tuple(_cast(value, dtype) for value in operation.args),
            kwargs={name: _cast(value, dtype) for name, value in operation.kwargs.items()},
        )
        for operation in graph.operations
    )
    cast = {number: _in_dtype(tensor, dtype) for number, tensor in constants.items()}
    graph = dataclasses.replace(graph, operations=operations, constants=cast)
    return GraphInPrecision(graph, tuple(_in_dtype(leaf, dtype) for leaf in leaves))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return dtype if isinstance(value, torch.dtype) and value.is_floating_point else value


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the same numbers in either precision."""
    return tensor.detach().float().to(dtype) if tensor.is_floating_point() else tensor


def _pull(low: Pullback, high: Pullback, mask: Tensor, generator: torch.Generator) -> None:
    """Pull random cotangents inside the mask; raise `PossibleCoupling` unless gradients outside are rounding."""
    values = low.recorded
    weights = balance(values)
    cotangents = [
        noise(value.detach(), generator) * weight * along(mask, value)
        for value, weight in zip(values, weights, strict=True)
    ]
    finer = [cotangent.double() for cotangent in cotangents]
    pairs = zip(low.pull(values, cotangents), high.pull(high.recorded, finer), strict=True)
    for coarse, fine in pairs:
        if not bool(coarse.isfinite().all() and fine.isfinite().all()):
            raise PossibleCoupling
        outside = along(~mask, fine)
        noisy, leak = (coarse.abs() * outside).amax(0).double(), (fine.abs() * outside).amax(0)
        rounding = SLIGHT * torch.finfo(fine.dtype).eps * fine.abs().amax(0)
        if bool((leak > SHRINKS * noisy + rounding).any()):
            raise PossibleCoupling
