"""Operators that work element by element or move elements about."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.graph.dependence.index_sets import Fixed, Reading, Sets, State, Varying, alive_of
from autojac.graph.ir import Value
from autojac.graph.operator_facts import MOVING, Axes
from autojac.torch_internals import OpOverload

_MASKS = (torch.bool, torch.uint8)


def unknown(reading: Reading) -> State:
    return reading.everything()


def constant(reading: Reading) -> State:
    """Nothing here has a derivative."""
    return Varying()


def masked(reading: Reading) -> State:
    """A product of constants, or a constant moved about: zero wherever a captured factor is."""
    facts, sources = reading.facts, reading.operation.sources
    alive = [found for number in sources if (found := alive_of(reading.states[number])) is not None]
    if not alive:
        return Varying()
    if facts.factors:
        return Varying(functools.reduce(torch.logical_and, alive).expand(reading.out))
    if len(sources) > 1 or reading.operation.many:
        return Varying()
    return Varying(
        alive[0] if facts.kind not in MOVING else _run(reading, {sources[0]: alive[0].double()}, fillers=True)[0] != 0
    )


def pointwise(reading: Reading) -> State | Sequence[State]:
    """Element by element, broadcast; where captured selectors choose among the arguments, elements are moved."""
    facts = reading.facts
    if facts.selectors and all(_known(reading, reading[name]) for name in facts.selectors):
        return moving(reading)
    total: Sets | None = None
    for _, state in reading.sets():
        wide = Sets(state.matrix, state.index.expand(reading.out))
        total = wide if total is None else reading.union(total, wide)
    assert total is not None
    # a product has no derivative where a captured factor is zero
    for number in reading.operation.sources if facts.factors else ():
        alive = alive_of(reading.states[number])
        if alive is not None:
            total = Sets(total.matrix, torch.where(alive, total.index, 0))
    return total


def moving(reading: Reading) -> State | Sequence[State]:
    """Elements change place: so do the numbers of their sets."""
    sets = reading.sets()
    given: dict[int, Tensor] = {}
    matrix, matrices, offset = sets[0][1].matrix, [sets[0][1].matrix], 0
    for value, state in sets:
        if state.matrix is not matrix:
            offset = sum(part.shape[0] for part in matrices)
            matrices.append(state.matrix)
            given[value.number] = torch.where(state.index > 0, state.index + offset, 0).double()
            offset = 0
        else:
            given[value.number] = state.index.double()
    if len(matrices) > 1:
        matrix = reading.stacked(matrices)
    return [Sets(matrix, part.round().long()) for part in _run(reading, given)]


def gathering(reading: Reading) -> State | Sequence[State]:
    """Elements are chosen by number or by a mask; where numbers may change, any element along their axes is meant."""
    facts, value = reading.facts, reading.operation.args[0]
    chosen = [reading[name] for name in facts.selectors]
    if _known(reading, chosen):
        return moving(reading)
    state = reading.state(value)
    if not isinstance(state, Sets) or len(reading.sets()) > 1:
        return unknown(reading)
    dims = state.index.dim()
    if isinstance(chosen[0], (tuple, list)):
        parts = [(axis, part) for axis, part in enumerate(chosen[0]) if part is not None]
        loose = [axis for axis, part in parts if not _known(reading, part)]
        if any(reading.graph.dtypes[part.number] in _MASKS for _, part in parts):
            return unknown(reading)
        return _anywhere(reading, value, state, loose)
    axis = reading[facts.along] % max(dims, 1) if isinstance(facts.along, str) else facts.along
    return unknown(reading) if dims == 0 or axis is None else _anywhere(reading, value, state, [axis])


def placing(reading: Reading) -> State:
    """Elements of a source go to numbered places of a tensor, instead of what is there or onto it."""
    given, facts = reading.arguments, reading.facts
    chosen = given[facts.selectors[0]]
    if not _known(reading, chosen):
        return unknown(reading)
    chosen = _value(reading, chosen)
    places = torch.arange(math.prod(reading.out)).reshape(reading.out)
    replaces = facts.overwrites and not given.get("accumulate") and given.get("reduce") is None
    if isinstance(chosen, list):
        places = places[tuple(slice(None) if part is None else part for part in chosen)]
    elif facts.axes is Axes.INDEXED:
        places = places.gather(given["dim"], chosen)
    else:
        places = places.index_select(given["dim"], chosen)
    total: Sets | None = None
    own = reading.state(given["self"])
    if isinstance(own, Sets):
        kept = own.index.clone()
        if replaces:
            kept.reshape(-1)[places.reshape(-1)] = 0
        total = Sets(own.matrix, kept)
    other = reading.state(given.get(facts.source))
    if isinstance(other, Sets):
        read = other.index
        if facts.axes is Axes.INDEXED:
            read = read[tuple(slice(size) for size in chosen.shape)]
        put = reading.gathered(places, Sets(other.matrix, read.expand(places.shape)), reading.out)
        total = put if total is None else reading.union(total, put)
    return Varying() if total is None else total


def _anywhere(reading: Reading, value: Value, state: Sets, axes: Collection[int]) -> list[State]:
    """Elements are chosen along some axes by numbers that may be any: all there share one set, and any number does."""
    mixed = reading.mixed(state, axes)
    wide = mixed.index.expand(state.index.shape).double()
    return [Sets(mixed.matrix, part.round().long()) for part in _run(reading, {value.number: wide})]


def _run(reading: Reading, given: dict[int, Tensor], fillers: bool = False) -> list[Tensor]:
    """The operator on numbers of sets: every other float becomes zero, the empty set, as fillers do unless kept."""
    graph, operation = reading.graph, reading.operation

    def filled(value: Any) -> Any:
        if isinstance(value, Value):
            if value.number in given:
                return given[value.number]
            state, dtype = reading.states[value.number], graph.dtypes[value.number]
            if isinstance(state, Fixed) and not (dtype.is_floating_point or dtype.is_complex):
                return state.value.cpu()
            like = dtype if not (dtype.is_floating_point or dtype.is_complex) else torch.float64
            return torch.zeros(graph.shapes[value.number], dtype=like)
        if isinstance(value, (tuple, list)):
            return type(value)(filled(part) for part in value)
        return value

    if operation.name == "_reshape_alias":
        return [filled(operation.args[0]).reshape(operation.args[1])]
    if not isinstance(operation.target, OpOverload):
        # a copy into a tensor: the source in the target's shape
        return [filled(operation.args[0]).expand(operation.args[1])]
    arguments = {}
    for argument in operation.target._schema.arguments:
        value = reading.arguments.get(argument.name, argument.default_value)
        # what fills gaps depends on nothing
        number = not fillers and argument.name in reading.facts.fillers and not isinstance(value, Value)
        arguments[argument.name] = 0 if number else filled(value)
    positional = [arguments.pop(a.name) for a in operation.target._schema.arguments if not a.kwarg_only]
    made = operation.target(*positional, **arguments)
    return list(made) if operation.many else [made]


def _known(reading: Reading, value: Any) -> bool:
    """Whether the tensors in an argument are the same in every call."""
    if isinstance(value, Value):
        return isinstance(reading.states[value.number], Fixed)
    return all(_known(reading, part) for part in value) if isinstance(value, (tuple, list)) else True


def _value(reading: Reading, value: Any) -> Any:
    if isinstance(value, Value):
        state = reading.state(value)
        return state.value.cpu() if isinstance(state, Fixed) else None
    return [_value(reading, part) for part in value] if isinstance(value, (tuple, list)) else value
