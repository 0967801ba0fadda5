"""What is known of one tensor, and what a rule gets to find it for the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autojac.graph.batch_axis.rules import rule_of
from autojac.graph.batch_axis.states import BatchAxis, BatchAxisLost, RuleContext
from autojac.graph.dependence.index_sets import IndexSets, SetAlgebra
from autojac.graph.ir import BoundOperation, Graph, Operation, Value, references
from autojac.graph.operator_facts import facts_of


@dataclass(frozen=True)
class Constant:
    """A tensor that no input stands behind and whose value may be used."""


@dataclass(frozen=True)
class Unknown:
    """A tensor that may have another value in the next call, and no derivative with respect to the inputs.

    Attributes:
        nonzero: where it may be other than zero; None for everywhere.
    """

    nonzero: Tensor | None = None


State = Constant | Unknown | IndexSets
Result = IndexSets | Sequence[IndexSets] | None


class DependenceContext(BoundOperation):
    """One operator, with what is known of the tensors that it reads.

    Args:
        graph, operation: the operator.
        states: of the tensors.
        constant: gives the value of a tensor with the state `Constant`.
        algebra: unites sets.
        follow_values: inputs stand behind a tensor if its value depends on theirs, whether or not it has a derivative.

    Attributes:
        facts: what the table of operators says of this one.
        selectors: tensors whose values decided what is read.
        value_dependent: what is read depends on the values of inputs.
        lost: sets were united along axes for lack of a rule that tells them apart.
    """

    def __init__(
        self,
        graph: Graph,
        operation: Operation,
        states: Mapping[int, State],
        constant: Callable[[int], Tensor],
        algebra: SetAlgebra,
        follow_values: bool,
    ) -> None:
        super().__init__(graph, operation)
        self.states = states
        self.constant = constant
        self.algebra = algebra
        self.follow_values = follow_values
        self.facts = facts_of(operation.target)
        self.selectors: set[int] = set()
        self.value_dependent = False
        self.lost = False

    def state(self, value: Any) -> State | None:
        return self.states[value.number] if isinstance(value, Value) else None

    def sets(self) -> list[tuple[Value, IndexSets]]:
        """Return the tensors that depend on inputs."""
        numbers = dict.fromkeys(self.operation.sources)
        return [(Value(number), state) for number in numbers if isinstance(state := self.states[number], IndexSets)]

    def selector_numbers(self) -> list[int]:
        """Return the tensors whose values say which entries are read."""
        return [number for name in self.facts.selectors for number in references(self.arguments.get(name))]

    def select(self, value: Any) -> bool:
        """Check whether an argument that says which entries are read is known; its tensors are noted if it is."""
        numbers = list(references(value))
        self.value_dependent |= any(isinstance(self.states[number], IndexSets) for number in numbers)
        known = all(isinstance(self.states[number], Constant) for number in numbers)
        self.selectors.update(numbers if known else ())
        return known

    def value(self, value: Any) -> Any:
        """Return an argument with the values of its tensors."""
        if isinstance(value, Value):
            return self.constant(value.number).cpu()
        return [self.value(part) for part in value] if isinstance(value, (tuple, list)) else value

    def nonzero(self, value: Value) -> Tensor | None:
        """Return where a constant may be other than zero; None where that is everywhere, or not known."""
        state = self.states[value.number]
        if isinstance(state, Unknown):
            return state.nonzero
        if self.follow_values or not isinstance(state, Constant):
            return None
        tensor = self.constant(value.number)
        if tensor.layout != torch.strided:
            return None
        nonzero = (tensor != 0).cpu()
        # one that is zero throughout waits to be filled
        return None if bool(nonzero.all()) or not bool(nonzero.any()) else nonzero

    def unite_along(self, source: IndexSets, axes: Sequence[int]) -> IndexSets:
        """Unite sets along some axes, since each result reads its whole line along these."""
        made = self.algebra.unite_along(source, axes)
        self.lost |= made is not source
        return made

    def everything(self) -> IndexSets:
        """Return the union of all that is read."""
        total: IndexSets | None = None
        for _, state in self.sets():
            whole = self.unite_along(state, range(state.index.dim()))
            total = self.algebra.union(total, IndexSets(whole.matrix, whole.index.reshape(())))
        assert total is not None
        self.lost = True
        return total

    def kept_axis(self, value: Value, axis: int) -> list[int | None]:
        """Return for each output the axis whose slice j reads slice j of an argument's axis, and no other."""
        addend = self.arguments.get(self.facts.addend)
        if value == addend and self.operation.sources.count(value.number) == 1 < len(self.operation.sources):
            return [axis + len(self.out) - len(self.shape(value))]
        length = self.shape(value)[axis]
        alone: dict[int, Any] = {value.number: BatchAxis(axis)}
        together: dict[int, Any] = {y.number: BatchAxis(axis) for y, sets in self.sets() if axis in sets.axes}
        for states in (alone, together):
            if value.number not in states or any(self.shape(Value(other))[axis] != length for other in states):
                continue
            try:
                made = rule_of(self.operation)(RuleContext(self.graph, self.operation, states, length))
            except BatchAxisLost:
                continue
            each = made if isinstance(made, list) else [made] * len(self.operation.outputs)
            pairs = zip(self.operation.outputs, each, strict=False)
            return [self._axis(y, state, length) for y, state in pairs if y is not None]
        return [None] * len(self.results)

    def _axis(self, number: int, state: object, length: int) -> int | None:
        if not isinstance(state, BatchAxis) or (state.outer, state.inner) != (1, 1):
            return None
        shape = self.graph.shapes[number]
        return state.axis if state.axis < len(shape) and shape[state.axis] == length else None
