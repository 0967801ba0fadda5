"""The inputs behind each element of a tensor, as numbered sets, and what operators do with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from autojac.graph.ir import Graph, Operation, Value
from autojac.graph.operator_facts import facts_of

MOST_WORK = 100_000_000
"""Elements and entries that are gone through before it is given up: some seconds."""


class TooLarge(Exception):
    """Following the inputs would take too long or too much memory."""


@dataclass(frozen=True)
class Constant:
    """A tensor whose value is the same in every call, as far as one can know: captured, and no parameter."""

    value: Tensor


@dataclass(frozen=True)
class Unknown:
    """A tensor that may have another value in the next call, and no derivative with respect to the inputs.

    Attributes:
        alive: where it may be other than zero; None for everywhere.
    """

    alive: Tensor | None = None


@dataclass(frozen=True)
class IndexSets:
    """The inputs behind each element of a tensor.

    Attributes:
        matrix: one row for each distinct set, (sets, inputs); the first one empty.
        index: the row of each element, of the tensor's shape, int64.
    """

    matrix: scipy.sparse.csr_array
    index: Tensor

    def counts(self) -> Tensor:
        """Return how many inputs each set has: (sets,)."""
        return torch.from_numpy(np.diff(self.matrix.indptr))

    def over_samples(self) -> scipy.sparse.csr_array:
        """Return the sets of a sample's elements, each united over all samples along axis 0."""
        lines = self.index.reshape(len(self.index), -1)
        width = self.matrix.shape[0]
        codes = torch.unique(torch.arange(lines.shape[1]) * width + lines)
        where = (codes // width).numpy(), (codes % width).numpy()
        chosen = scipy.sparse.csr_array((np.ones(len(codes), dtype=bool), where), shape=(lines.shape[1], width))
        return scipy.sparse.csr_array(chosen @ self.matrix)


State = Constant | Unknown | IndexSets
Rule = Callable[["DependenceContext"], "State | Sequence[State]"]


class DependenceContext:
    """One operator, with what is known of the tensors that it reads.

    Attributes:
        work: elements and entries gone through so far, by this operator and all before it.
        facts: what the table of operators says of this one.
    """

    def __init__(self, graph: Graph, operation: Operation, states: Mapping[int, State], columns: int) -> None:
        self.graph = graph
        self.operation = operation
        self.states = states
        self.columns = columns
        self.work = 0
        self.facts = facts_of(operation.target)
        schema = operation.target._schema.arguments
        given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
        given |= {argument.name: value for argument, value in zip(schema, operation.args, strict=False)}
        self.arguments: dict[str, Any] = given | dict(operation.kwargs)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def state(self, value: Any) -> State | None:
        return self.states[value.number] if isinstance(value, Value) else None

    def shape(self, value: Value) -> tuple[int, ...]:
        return self.graph.shapes[value.number]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the results that are tensors."""
        return [self.graph.shapes[number] for number in self.operation.outputs if number is not None]

    @property
    def out(self) -> tuple[int, ...]:
        return self.shapes[0]

    def axes(self, name: str, dims: int) -> list[int]:
        """An argument that names axes, counted from the front; all where it names none."""
        given = self.arguments.get(name)
        if given is None or (isinstance(given, (list, tuple)) and not given):
            return list(range(dims))
        named = given if isinstance(given, (list, tuple)) else [given]
        return sorted({axis % dims for axis in named}) if dims else []

    def sets(self) -> list[tuple[Value, IndexSets]]:
        """Return the tensors that depend on inputs."""
        found = []
        for number in dict.fromkeys(self.operation.sources):
            state = self.states[number]
            if isinstance(state, IndexSets):
                found.append((Value(number), state))
        return found

    def spend(self, amount: int) -> None:
        self.work += amount
        if self.work > MOST_WORK:
            raise TooLarge(f"more than {MOST_WORK:.0e} elements and entries to go through")

    def union(self, one: IndexSets, other: IndexSets) -> IndexSets:
        """Element by element, of tensors of one shape."""
        if one.matrix is other.matrix and torch.equal(one.index, other.index):
            return one
        width = other.matrix.shape[0]
        self.spend(one.index.numel())
        pairs, index = torch.unique(one.index * width + other.index, return_inverse=True)
        left, right = (pairs // width).numpy(), (pairs % width).numpy()
        # the pair of two empty sets may be missing, or not the first: it is put in front in any case
        matrix = self.after_empty(one.matrix[left] + other.matrix[right])
        return IndexSets(matrix, index + 1)

    def gathered(
        self, groups: Tensor, source: IndexSets, shape: Sequence[int], members: Tensor | None = None
    ) -> IndexSets:
        """For each element of a tensor the union over all elements that name it.

        Args:
            groups: for each of the source's elements (or of its `members`), flattened, the element of the result.
            source: what is united.
            shape: of the result.
            members: which elements of the source take part, by their flat position; all by default.
        """
        taken = source.index.reshape(-1) if members is None else source.index.reshape(-1)[members]
        self.spend(taken.numel())
        count, width = math.prod(shape), source.matrix.shape[0]
        codes = torch.unique(groups.reshape(-1) * width + taken)
        chosen, rows = (codes // width).numpy(), (codes % width).numpy()
        ones = np.ones(len(codes), dtype=bool)
        choice = scipy.sparse.csr_array((ones, (chosen, rows)), shape=(count, width))
        self.spend(int(np.diff(source.matrix.indptr)[rows].sum()))
        matrix = self.after_empty(choice @ source.matrix)
        return IndexSets(matrix, torch.arange(1, count + 1).reshape(tuple(shape)))

    def mixed(self, source: IndexSets, axes: Collection[int]) -> IndexSets:
        """Return the union along some axes, which are kept with length 1."""
        shape = tuple(source.index.shape)
        if all(shape[axis] == 1 for axis in axes):
            return source
        kept = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
        groups = torch.arange(math.prod(kept)).reshape(kept).expand(shape)
        return self.gathered(groups, source, kept)

    def everything(self) -> IndexSets | Unknown:
        """Return the union of all that is read."""
        total = None
        for _, state in self.sets():
            whole = IndexSets(state.matrix, state.index.reshape(-1))
            whole = self.gathered(torch.zeros(whole.index.numel(), dtype=torch.int64), whole, (1,))
            total = whole if total is None else self.union(total, whole)
        return Unknown() if total is None else total

    def after_empty(self, matrix: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
        """Return the rows of a matrix behind an empty one."""
        self.spend(int(matrix.nnz))
        starts = np.concatenate([np.zeros(1, matrix.indptr.dtype), matrix.indptr])
        shape = (matrix.shape[0] + 1, matrix.shape[1])
        return scipy.sparse.csr_array((matrix.data, matrix.indices, starts), shape=shape)

    def stacked(self, matrices: Sequence[scipy.sparse.csr_array]) -> scipy.sparse.csr_array:
        made = scipy.sparse.csr_array(scipy.sparse.vstack(matrices, format="csr"))
        self.spend(int(made.nnz))
        return made


def alive_of(state: State) -> Tensor | None:
    """Where a constant may be other than zero; None where that is everywhere, or not known."""
    if isinstance(state, Unknown):
        return state.alive
    if not isinstance(state, Constant) or state.value.layout != torch.strided:
        return None
    alive = (state.value != 0).cpu()
    # one that is zero throughout waits to be filled
    return None if bool(alive.all()) or not bool(alive.any()) else alive
