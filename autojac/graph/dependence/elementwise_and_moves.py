"""Operators that work element by element or move elements about."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.graph.dependence.index_sets import Constant, DependenceContext, IndexSets, State, Unknown, alive_of
from autojac.graph.ir import Value
from autojac.graph.operator_facts import MOVING, Axes
from autojac.torch_internals import OpOverload

_MASKS = (torch.bool, torch.uint8)


def unknown(context: DependenceContext) -> State:
    return context.everything()


def constant(context: DependenceContext) -> State:
    """Nothing here has a derivative."""
    return Unknown()


def masked(context: DependenceContext) -> State:
    """A product of constants, or a constant moved about: zero wherever a captured factor is."""
    facts, sources = context.facts, context.operation.sources
    alive = [found for number in sources if (found := alive_of(context.states[number])) is not None]
    if not alive:
        return Unknown()
    if facts.factors:
        return Unknown(functools.reduce(torch.logical_and, alive).expand(context.out))
    if len(sources) > 1 or context.operation.many:
        return Unknown()
    return Unknown(
        alive[0] if facts.kind not in MOVING else _run(context, {sources[0]: alive[0].double()}, fillers=True)[0] != 0
    )


def pointwise(context: DependenceContext) -> State | Sequence[State]:
    """Element by element, broadcast; where captured selectors choose among the arguments, elements are moved."""
    facts = context.facts
    if facts.selectors and all(_known(context, context[name]) for name in facts.selectors):
        return moving(context)
    total: IndexSets | None = None
    for _, state in context.sets():
        wide = IndexSets(state.matrix, state.index.expand(context.out))
        total = wide if total is None else context.union(total, wide)
    assert total is not None
    # a product has no derivative where a captured factor is zero
    for number in context.operation.sources if facts.factors else ():
        alive = alive_of(context.states[number])
        if alive is not None:
            total = IndexSets(total.matrix, torch.where(alive, total.index, 0))
    return total


def moving(context: DependenceContext) -> State | Sequence[State]:
    """Elements change place: so do the numbers of their sets."""
    sets = context.sets()
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
        matrix = context.stacked(matrices)
    return [IndexSets(matrix, part.round().long()) for part in _run(context, given)]


def gathering(context: DependenceContext) -> State | Sequence[State]:
    """Elements are chosen by number or by a mask; where numbers may change, any element along their axes is meant."""
    facts, value = context.facts, context.operation.args[0]
    chosen = [context[name] for name in facts.selectors]
    if _known(context, chosen):
        return moving(context)
    state = context.state(value)
    if not isinstance(state, IndexSets) or len(context.sets()) > 1:
        return unknown(context)
    dims = state.index.dim()
    if isinstance(chosen[0], (tuple, list)):
        parts = [(axis, part) for axis, part in enumerate(chosen[0]) if part is not None]
        loose = [axis for axis, part in parts if not _known(context, part)]
        if any(context.graph.dtypes[part.number] in _MASKS for _, part in parts):
            return unknown(context)
        return _anywhere(context, value, state, loose)
    axis = context[facts.along] % max(dims, 1) if isinstance(facts.along, str) else facts.along
    return unknown(context) if dims == 0 or axis is None else _anywhere(context, value, state, [axis])


def placing(context: DependenceContext) -> State:
    """Elements of a source go to numbered places of a tensor, instead of what is there or onto it."""
    given, facts = context.arguments, context.facts
    chosen = given[facts.selectors[0]]
    if not _known(context, chosen):
        return unknown(context)
    chosen = _value(context, chosen)
    places = torch.arange(math.prod(context.out)).reshape(context.out)
    replaces = facts.overwrites and not given.get("accumulate") and given.get("reduce") is None
    if isinstance(chosen, list):
        places = places[tuple(slice(None) if part is None else part for part in chosen)]
    elif facts.axes is Axes.INDEXED:
        places = places.gather(given["dim"], chosen)
    else:
        places = places.index_select(given["dim"], chosen)
    total: IndexSets | None = None
    own = context.state(given["self"])
    if isinstance(own, IndexSets):
        kept = own.index.clone()
        if replaces:
            kept.reshape(-1)[places.reshape(-1)] = 0
        total = IndexSets(own.matrix, kept)
    other = context.state(given.get(facts.source))
    if isinstance(other, IndexSets):
        read = other.index
        if facts.axes is Axes.INDEXED:
            read = read[tuple(slice(size) for size in chosen.shape)]
        put = context.gathered(places, IndexSets(other.matrix, read.expand(places.shape)), context.out)
        total = put if total is None else context.union(total, put)
    return Unknown() if total is None else total


def _anywhere(context: DependenceContext, value: Value, state: IndexSets, axes: Collection[int]) -> list[State]:
    """Elements are chosen along some axes by numbers that may be any: all there share one set, and any number does."""
    mixed = context.mixed(state, axes)
    wide = mixed.index.expand(state.index.shape).double()
    return [IndexSets(mixed.matrix, part.round().long()) for part in _run(context, {value.number: wide})]


def _run(context: DependenceContext, given: dict[int, Tensor], fillers: bool = False) -> list[Tensor]:
    """The operator on numbers of sets: every other float becomes zero, the empty set, as fillers do unless kept."""
    graph, operation = context.graph, context.operation

    def filled(value: Any) -> Any:
        if isinstance(value, Value):
            if value.number in given:
                return given[value.number]
            state, dtype = context.states[value.number], graph.dtypes[value.number]
            if isinstance(state, Constant) and not (dtype.is_floating_point or dtype.is_complex):
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
        value = context.arguments.get(argument.name, argument.default_value)
        # what fills gaps depends on nothing
        number = not fillers and argument.name in context.facts.fillers and not isinstance(value, Value)
        arguments[argument.name] = 0 if number else filled(value)
    positional = [arguments.pop(a.name) for a in operation.target._schema.arguments if not a.kwarg_only]
    made = operation.target(*positional, **arguments)
    return list(made) if operation.many else [made]


def _known(context: DependenceContext, value: Any) -> bool:
    """Check whether the tensors in an argument are the same in every call."""
    if isinstance(value, Value):
        return isinstance(context.states[value.number], Constant)
    return all(_known(context, part) for part in value) if isinstance(value, (tuple, list)) else True


def _value(context: DependenceContext, value: Any) -> Any:
    if isinstance(value, Value):
        state = context.state(value)
        return state.value.cpu() if isinstance(state, Constant) else None
    return [_value(context, part) for part in value] if isinstance(value, (tuple, list)) else value
