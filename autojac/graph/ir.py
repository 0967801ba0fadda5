"""A function's aten operators as data: run in part, from some of its tensors to others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Value(NamedTuple):
    """A tensor of the graph, by number, where it stands among an operator's arguments."""

    number: int


@dataclass(frozen=True)
class Operation:
    """One operator.

    Attributes:
        target: the aten overload.
        args, kwargs: as it was called, tensors as `Value`.
        outputs: numbers of the tensors that it returned; None in the place of anything else.
        many: whether it returns a tuple.
        detached: no gradient flows through it: it ran under `no_grad`.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int | None, ...]
    many: bool = False
    detached: bool = False

    @property
    def name(self) -> str:
        name: str = self.target._schema.name.removeprefix("aten::")
        return name

    @functools.cached_property
    def sources(self) -> tuple[int, ...]:
        """Numbers of the tensors that it reads."""
        return tuple(references((self.args, tuple(self.kwargs.values()))))

    @functools.cached_property
    def results(self) -> tuple[int, ...]:
        """Numbers of the tensors that it returned."""
        return tuple(number for number in self.outputs if number is not None)

    def __call__(self, env: Mapping[int, Tensor]) -> Sequence[Any]:
        """Return what it returns, one entry for each of `outputs`."""
        kwargs = {name: _fill(value, env) for name, value in self.kwargs.items()}
        result = self.target(*_fill(self.args, env), **kwargs)
        parts = result if self.many else (result,)
        return [part.detach() if isinstance(part, Tensor) else part for part in parts] if self.detached else parts


class BoundOperation:
    """One operator with its arguments by name."""

    def __init__(self, graph: Graph, operation: Operation) -> None:
        self.graph = graph
        self.operation = operation
        self.results = operation.results

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name, defaults included."""
        schema = self.operation.target._schema.arguments
        given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
        given |= {argument.name: value for argument, value in zip(schema, self.operation.args, strict=False)}
        return given | dict(self.operation.kwargs)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def shape(self, value: Value) -> tuple[int, ...]:
        return self.graph.shapes[value.number]

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self.graph.shapes[self.results[0]]

    def axes(self, dims: int) -> set[int]:
        """Return the argument `dim` or `dims` as a set of axes from the front; all where it names none."""
        given = self.arguments.get("dim", self.arguments.get("dims"))
        if given is None or (isinstance(given, (list, tuple)) and not given):
            return set(range(dims))
        return {axis % dims for axis in (given if isinstance(given, (list, tuple)) else [given])}


@dataclass(frozen=True)
class Graph:
    """The operators of one call that its outputs depend on.

    Attributes:
        operations: in the order in which they ran, free of in-place writes.
        inputs: for each leaf of the call its number.
        outputs: numbers of the outputs.
        constants: what was captured: parameters, buffers, random draws. Tensors of this call, not copies.
        shapes, dtypes: of every tensor, by number.
        marks: what some tensors are that no operator of the call has made alone.
        reads_data: an operator read values of the data, so another input may take another branch.
        drawn: the constants that are random draws.
    """

    operations: tuple[Operation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: Mapping[int, Tensor]
    shapes: Mapping[int, tuple[int, ...]]
    dtypes: Mapping[int, torch.dtype]
    reads_data: bool
    marks: Mapping[int, str] = field(default_factory=dict)
    drawn: frozenset[int] = frozenset()

    @functools.cached_property
    def key(self) -> int:
        """What graphs have in common that differ in numbers alone."""
        parts = [(op.target, _shape_of((op.args, tuple(op.kwargs.items()))), op.detached) for op in self.operations]
        constants = tuple((index, self.shapes[index]) for index in self.constants)
        return hash((tuple(parts), self.inputs, self.outputs, constants, tuple(self.shapes[i] for i in self.inputs)))

    @functools.cached_property
    def exact(self) -> object:
        """What graphs have in common that differ in tensors alone, to be compared."""
        parts = [(op.target, _freeze((op.args, tuple(op.kwargs.items()))), op.detached) for op in self.operations]
        return parts, [op.outputs for op in self.operations], self.inputs, self.outputs, tuple(self.constants)

    @functools.cached_property
    def producers(self) -> dict[int, int]:
        """For each tensor that was computed the position of its operator."""
        return {index: place for place, operation in enumerate(self.operations) for index in operation.results}

    def find_needed(self, wanted: Sequence[int], given: frozenset[int]) -> list[int]:
        """Return positions of the operators that lead from the given tensors to those wanted."""
        todo, found = [index for index in wanted if index not in given], set()
        while todo:
            place = self.producers.get(todo.pop())
            if place is not None and place not in found:
                found.add(place)
                todo += [index for index in self.operations[place].sources if index not in given]
        return sorted(found)

    def run(
        self,
        wanted: Sequence[int],
        given: Mapping[int, Tensor],
        special: Mapping[int, Callable[[Mapping[int, Tensor]], Sequence[Any]]] | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute some tensors of the graph from others.

        Args:
            wanted: numbers of the tensors to compute.
            given: tensors in the place of those recorded; operators that lead to these alone do not run.
            special: what to run in the place of some operators, by position.
        """
        env = {**self.constants, **given}
        for place in self.find_needed(wanted, frozenset(given)):
            operation = self.operations[place]
            if special is not None and place in special:
                parts: Sequence[Any] = special[place](env)
            else:
                parts = operation(env)
            for index, part in zip(operation.outputs, parts, strict=False):
                if index is not None and index not in given:
                    env[index] = part
        return tuple(env[index] for index in wanted)


def references(value: Any) -> Iterator[int]:
    """Return the numbers of the tensors in an argument."""
    if type(value) is Value:
        yield value.number
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from references(part)


def _fill(value: Any, env: Mapping[int, Tensor]) -> Any:
    kind = type(value)
    if kind is Value:
        return env[value.number]
    if kind is tuple or kind is list:
        return kind([_fill(part, env) for part in value])
    return value


def _shape_of(value: Any) -> Any:
    """Return an argument without its floating-point numbers, hashable."""
    if type(value) is Value:
        return value
    if isinstance(value, (tuple, list)):
        return tuple([_shape_of(part) for part in value])
    return float if isinstance(value, (float, complex)) else value


def _freeze(value: Any) -> Any:
    """Return an argument such that equal ones do the same: 1 is not True, and 0.0 is not -0.0."""
    if type(value) is Value:
        return value
    if isinstance(value, (tuple, list)):
        return tuple([_freeze(part) for part in value])
    return (type(value), repr(value)) if isinstance(value, (bool, int, float, complex)) else value
