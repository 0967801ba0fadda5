"""The inputs behind each element, propagated from the arguments of a call to its outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import scipy.sparse
import torch
from torch import Tensor

from autojac.graph.dependence.context import Constant, DependenceContext, Result, State, Unknown
from autojac.graph.dependence.elementwise_and_moves import (
    gathering,
    moving,
    placing,
    pointwise,
    viewing,
    without_inputs,
)
from autojac.graph.dependence.index_sets import (
    MOST_ENTRIES,
    MOST_WORK,
    IndexSets,
    SetAlgebra,
    TooLarge,
    compress_index,
    singles,
)
from autojac.graph.dependence.reductions_and_products import (
    behind,
    distances,
    keeping_axes,
    leaves_alone,
    mixing,
    normalization,
    product,
)
from autojac.graph.dependence.windows import adaptive, convolution, pooling
from autojac.graph.ir import Graph
from autojac.graph.operator_facts import facts_of
from autojac.graph.operator_kinds import Kind
from autojac.graph.operators import traits

MOST_SAMPLE_WORK = 1_000_000_000
"""Slices and entries that are gone through before samples are given up: half a minute."""
RULES: dict[Kind, Callable[[DependenceContext], Result]] = {
    Kind.POINTWISE: pointwise,
    Kind.COPY: pointwise,
    Kind.VIEW: viewing,
    Kind.AXES: moving,
    Kind.MOVE: moving,
    Kind.GATHER: gathering,
    Kind.SCATTER: placing,
    Kind.CONVOLUTION: convolution,
    Kind.WINDOW: pooling,
    Kind.ADAPTIVE: adaptive,
    Kind.CHANNEL: behind(2),
    Kind.PRODUCT: product,
    Kind.DISTANCE: distances,
    Kind.REDUCTION: mixing,
    Kind.SCAN: mixing,
    Kind.MATRIX: behind(lambda context, dims: max(dims - 2, 0)),
    Kind.NORMALIZATION: normalization,
}
"""What operators of a kind do to sets; those of other kinds keep some axes and mix all others."""


@dataclass
class DependenceFlow:
    """What stands behind the tensors of a graph.

    Attributes:
        graph: whose tensors they are.
        states: what is known of each tensor, by number.
        count: number of inputs.
        followed: positions of the operators that change which inputs stand behind elements.
        losses: for operators along whose axes sets were united for lack of better, by position: the operator's name.
        selectors: constants whose values decided what is read.
        value_dependent: what is read depends on the values of inputs.
        refusal: why the graph was not followed to its end, at the last of the losses; empty if it was.
    """

    graph: Graph
    states: dict[int, State]
    count: int
    followed: list[int] = field(default_factory=list)
    losses: dict[int, str] = field(default_factory=dict)
    selectors: set[int] = field(default_factory=set)
    value_dependent: bool = False
    refusal: str = ""

    def outputs(self) -> list[IndexSets]:
        """Return the sets behind the elements of each output."""
        none, sets = singles(self.count), []
        for number in self.graph.outputs:
            state, dims = self.states[number], len(self.graph.shapes[number])
            nothing = IndexSets(none, torch.zeros([1] * dims, dtype=torch.int64))
            sets.append(state if isinstance(state, IndexSets) else nothing)
        return sets

    def samples(self) -> scipy.sparse.csr_array | None:
        """Return the samples behind each sample of the outputs, itself included; None if there are too many.

        Samples are the inputs, and the outputs carry them on axis 0.
        """
        if self.refusal:
            return None
        total = singles(self.count)[1:]
        for sets in self.outputs():
            whole = sets.over(range(1, sets.index.dim()))
            shape = [self.count, *[1] * (whole.index.dim() - 1)]
            if whole.counts(shape).sum() > MOST_ENTRIES:
                return None
            total = total + whole.rows(shape)
        return total


def propagate(
    graph: Graph,
    leaves: Sequence[Tensor],
    columns: Sequence[Tensor | None],
    count: int,
    *,
    follow_values: bool = False,
    varying_constants: Collection[int] = (),
) -> DependenceFlow:
    """Follow inputs from the arguments of a call through its graph.

    Args:
        graph: with its constants.
        leaves: the call's tensors.
        columns: for each leaf the number of the input that each of its elements is, int64, broadcast to the leaf's
            shape; None for those that are no inputs.
        count: number of inputs.
        follow_values: inputs stand behind an element if its value depends on theirs, at any point where all other
            tensors are what they are here. By default they do if it may have a derivative with respect to them, at any
            point that has this graph and where captured tensors that are no parameters have their zeros and their
            integers where they have them here.
        varying_constants: numbers of constants that another call may have other values of.
    """
    matrix = singles(count)
    states: dict[int, State] = {
        number: (Constant() if follow_values else Unknown())
        if column is None
        else IndexSets(matrix, compress_index(column.cpu()) + 1)
        for number, column in zip(graph.inputs, columns, strict=True)
    }
    for number, tensor in graph.constants.items():
        learned = isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad or number in varying_constants
        states[number] = Unknown() if learned and not follow_values else Constant()
    flow = DependenceFlow(graph, states, count)
    values: dict[int, Tensor] = dict(zip(graph.inputs, leaves, strict=True))

    def constant(number: int) -> Tensor:
        if number not in values:
            (values[number],) = graph.run((number,), values)
        return values[number].detach()

    algebra = SetAlgebra(MOST_SAMPLE_WORK if follow_values else MOST_WORK)
    with torch.no_grad():
        for place, operation in enumerate(graph.operations):
            context = DependenceContext(graph, operation, states, constant, algebra, follow_values)
            try:
                states.update(zip(context.results, _results(context), strict=True))
            except TooLarge as error:
                flow.refusal, flow.losses[place] = str(error), operation.name
                break
            _note(flow, place, context)
    return flow


def _note(flow: DependenceFlow, place: int, context: DependenceContext) -> None:
    """Add what an operator does to the account of a flow."""
    flow.selectors |= context.selectors
    read = [state for _, state in context.sets()]
    if context.lost:
        flow.losses[place] = context.operation.name
        flow.value_dependent |= context.value_dependent or context.facts.by_value
    elif context.facts.kind is not Kind.VIEW and any(
        isinstance(state := flow.states[number], IndexSets) and not any(_are_alike(state, one) for one in read)
        for number in context.results
    ):
        flow.followed.append(place)


def _are_alike(one: IndexSets, other: IndexSets) -> bool:
    """Check whether sets are the same but for where their axes are."""
    return one.matrix is other.matrix and torch.equal(one.index.squeeze(), other.index.squeeze())


def _results(context: DependenceContext) -> Sequence[State]:
    """Return what is known of the results of an operator."""
    count, facts = len(context.results), context.facts
    if facts.kind is Kind.FACTORY:
        return [Constant()] * count
    if not any(isinstance(context.states[number], IndexSets) for number in context.operation.sources):
        return _without_inputs(context)
    if not context.follow_values and (context.operation.detached or not facts.has_derivative):
        return [Unknown()] * count
    try:
        # sets of samples differ along few axes: where an operator leaves these alone, the others need not be looked at
        whole = context.follow_values and facts.kind not in (Kind.POINTWISE, Kind.VIEW) and leaves_alone(context)
        made = None if whole else RULES.get(facts.kind, keeping_axes)(context)
        made = keeping_axes(context) if made is None else made
        each = [made] * count if isinstance(made, IndexSets) else made
        return [_fit(context, *pair) for pair in zip(each, context.results, strict=True)]
    except TooLarge:
        raise
    except Exception:  # an operator in a form that its rule does not foresee
        return [_fit(context, context.everything(), number) for number in context.results]


def _without_inputs(context: DependenceContext) -> Sequence[State]:
    """Return what is known of the results of an operator that no input stands behind."""
    count = len(context.results)
    known = all(isinstance(context.states[number], Constant) for number in context.operation.sources)
    if known and (context.follow_values or not traits(context.operation.target)[2]):
        return [Constant()] * count
    try:
        return [without_inputs(context)] * count
    except Exception:  # an operator in a form that its rule does not foresee
        return [Unknown()] * count


def _fit(context: DependenceContext, sets: IndexSets, number: int) -> State:
    """Return the state of a result: integers have no derivative, and axes that sets lack in front have length 1."""
    dtype, shape = context.graph.dtypes[number], context.graph.shapes[number]
    if not (context.follow_values or dtype.is_floating_point or dtype.is_complex):
        return Unknown()
    index = sets.index.reshape((1,) * (len(shape) - sets.index.dim()) + sets.index.shape)
    if any(one not in (1, size) for one, size in zip(index.shape, shape, strict=True)):
        raise ValueError(f"sets of shape {tuple(index.shape)} for a tensor {shape}")
    return IndexSets(sets.matrix, index)


def roots(graph: Graph, numbers: Collection[int]) -> set[int]:
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
