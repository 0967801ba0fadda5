"""How dependence on samples spreads through a graph: which of them stand behind each slice of each tensor.

Where an operator leaves an axis alone, as the rules for the batch axis tell, its slices keep the samples behind them.
Operators that move slices are run on numbers of slices. Along an axis that an operator mixes, or that nothing is known
of, all slices are put together: never wrong, and dense in the worst case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from autojac.graph.ir import Graph
from autojac.graph.operator_facts import Axes, Kind, facts_of
from autojac.graph.sample_graph.combinations import multiplied, scattered, windowed
from autojac.graph.sample_graph.operators import SampleContext, moved, numbers_in
from autojac.graph.sample_graph.slices import MOST_SLICES, SliceSamples, TooDense, united

ALL_SAMPLES: Literal["everything"] = "everything"
State = SliceSamples | Literal["everything"] | None


@dataclass(frozen=True)
class SampleFlow:
    """What stands behind the outputs.

    Attributes:
        samples: boolean (batch, batch): whether sample b of any output reads sample c; None if that is too much.
        followed: positions of the operators that move or mix samples by what is known of the call.
        losses: for operators along whose axes slices were put together, by position: the operator's name.
        selectors: constants whose values decided who reads whom.
        wandering: who reads whom depends on the values of samples.
    """

    samples: Any
    followed: tuple[int, ...]
    losses: Mapping[int, str]
    selectors: frozenset[int]
    wandering: bool


def propagate_samples(graph: Graph, leaves: Sequence[Tensor], inputs: Sequence[int], batch: int) -> SampleFlow:
    """Follow the samples from the inputs, which carry them on axis 0, to the outputs.

    Args:
        graph: with its constants.
        leaves: the call's tensors.
        inputs: indices of the leaves whose samples are followed.
        batch: number of samples.
    """
    env: dict[int, Tensor] = dict(zip(graph.inputs, leaves, strict=True))

    def fixed(number: int) -> Tensor:
        if number not in env:
            with torch.no_grad():
                (env[number],) = graph.run((number,), env)
        return env[number]

    states: dict[int, State] = {}
    own = SliceSamples.of_batch(batch)
    for position in inputs:
        states[graph.inputs[position]] = own
    followed, losses = [], {}
    selectors: set[int] = set()
    wandering = False
    for place, operation in enumerate(graph.operations):
        read = {number: states[number] for number in operation.sources if states.get(number) is not None}
        made: Sequence[State]
        if not read or facts_of(operation.target).kind is Kind.FACTORY:
            continue
        reached = {number: state for number, state in read.items() if isinstance(state, SliceSamples)}
        if len(reached) < len(read):
            made = [ALL_SAMPLES] * len(operation.outputs)
        else:
            context = SampleContext(graph, operation, reached, fixed)
            try:
                made, lost = _through(context)
            except Exception:  # too much to write down, or an operator that refuses numbers in the place of its values
                made, lost = [ALL_SAMPLES] * len(context.outputs), True
            if lost:
                losses[place] = operation.name
                wandering |= context.wandering or context.facts.by_value
            elif context.facts.kind is not Kind.VIEW and any(y is not None and _new(y, reached) for y in made):
                followed.append(place)
            selectors |= context.selectors
        states.update(zip([y for y in operation.outputs if y is not None], made, strict=True))
    return SampleFlow(_behind(graph, states, batch), tuple(followed), losses, frozenset(selectors), wandering)


def _new(made: State, reached: Mapping[int, SliceSamples]) -> bool:
    return isinstance(made, SliceSamples) and all(made.samples is not reach.samples for reach in reached.values())


def _behind(graph: Graph, states: Mapping[int, State], batch: int) -> Any:
    """Return the samples behind each sample of the outputs, itself included."""
    parts = [SliceSamples.of_batch(batch)]
    try:
        for number in graph.outputs:
            state = states.get(number)
            if state == ALL_SAMPLES:
                return None
            if isinstance(state, SliceSamples):
                parts.append(state.placed({0: 0}).spread_over((0,), (batch,)) if batch > 1 else parts[0])
        return united(parts).samples
    except TooDense:
        return None


def _through(context: SampleContext) -> tuple[Sequence[State], bool]:
    """Return what stands behind the outputs of an operator, and whether slices were put together for lack of better."""
    facts, graph = context.facts, context.graph
    if facts.kind is Kind.VIEW:
        (number,) = context.reached
        return [viewed(context.reached[number], graph.shapes[number], graph.shapes[context.outputs[0]])], False
    pointwise = facts.axes is Axes.BROADCAST
    if pointwise and not _chosen(context):
        return [united(_broadcast(context))] * len(context.outputs), False
    places = {number: _places(context, number) for number in context.reached} if not pointwise else {}
    if places and all(None not in where for each in places.values() for where in each.values()):
        return _placed(context, places), False
    rules: tuple[Callable[[SampleContext], list[SliceSamples | None] | None], ...]
    rules = (moved, scattered, windowed, multiplied)
    for rule in rules:
        made = rule(context)
        if made is not None:
            return made, False
    return (_placed(context, places), True) if places else ([united(_broadcast(context))], True)


def _chosen(context: SampleContext) -> bool:
    """Check whether constants choose, entry by entry, whom a pointwise operator reads."""
    chosen = [number for name in context.facts.selectors for number in numbers_in(context.call.arguments.get(name))]
    return bool(chosen) and not set(chosen) & set(context.reached)


def _places(context: SampleContext, number: int) -> dict[int, list[int | None]]:
    """For each tracked axis of an argument its places in the outputs; None where slices are mixed."""
    reach = context.reached[number]
    addend = context.call.arguments.get(context.facts.addend)
    if number in numbers_in(addend) and context.operation.sources[1:]:
        behind = len(context.shape(context.outputs[0])) - len(context.shape(number))
        if context.operation.sources.count(number) == 1:
            return {axis: [axis + behind] for axis in reach.axes}
    return {axis: context.kept(number, axis) for axis in reach.axes}


def _placed(context: SampleContext, places: Mapping[int, Mapping[int, list[int | None]]]) -> list[State]:
    made: list[State] = []
    for index in range(len(context.outputs)):
        parts = []
        for number, where in places.items():
            found = {axis: targets[index] for axis, targets in where.items()}
            parts.append(context.reached[number].placed({a: to for a, to in found.items() if to is not None}))
        made.append(united(parts))
    return made


def _broadcast(context: SampleContext) -> list[SliceSamples]:
    """Return the arguments of a pointwise operator, with their axes where they are in its output."""
    dims = len(context.shape(context.outputs[0]))
    parts = []
    for number, reach in context.reached.items():
        behind = dims - len(context.shape(number))
        parts.append(reach.placed({axis: axis + behind for axis in reach.axes}))
    return parts


def viewed(reach: SliceSamples, before: Sequence[int], after: Sequence[int]) -> SliceSamples:
    """Slices after a view in another shape: axes are split and merged in runs of equal size."""
    axes: list[int] = []
    sizes: list[int] = []
    whole: list[int] = []
    for old, new in _runs(before, after):
        tracked = [axis for axis in old if axis in reach.axes]
        if not tracked:
            continue
        whole += [axis for axis in old if before[axis] > 1]
        found = [axis for axis in new if after[axis] > 1]
        axes += found
        sizes += [after[axis] for axis in found]
    if math.prod(sizes) > MOST_SLICES:
        raise TooDense
    split = reach.spread_over(whole, [before[axis] for axis in whole])
    return SliceSamples(tuple(axes), tuple(sizes), split.samples)


def _runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the shortest runs of axes of two shapes that hold equally many elements."""
    runs = []
    i = j = 0
    while i < len(before) or j < len(after):
        old: list[int] = []
        new: list[int] = []
        one = other = 1
        while not (old or new) or one != other:
            if j >= len(after) or (i < len(before) and one <= other):
                one *= before[i]
                old.append(i)
                i += 1
            else:
                other *= after[j]
                new.append(j)
                j += 1
        runs.append((old, new))
    return runs


def roots(graph: Graph, numbers: Sequence[int]) -> set[int]:
    """Return the inputs and constants that tensors were made of, by value and not by shape alone."""
    found: set[int] = set()
    todo = list(numbers)
    while todo:
        number = todo.pop()
        if number in found:
            continue
        found.add(number)
        place = graph.producers.get(number)
        if place is not None and facts_of(graph.operations[place].target).kind is not Kind.FACTORY:
            todo += graph.operations[place].sources
    return {number for number in found if number in graph.constants or number in graph.inputs}
