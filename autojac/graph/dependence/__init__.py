"""Which inputs stand behind each element of a tensor, followed through a graph operator by operator.

Each element has the set of those inputs that its derivative may be nonzero for, at any point that has this graph. The
sets are the rows of one boolean matrix, and an element holds the number of its row: what only moves elements about
(views, slices, rolls, gathers) is run on these numbers by the very same operator, so it needs no rule. Row 0 is the
empty set. An operator without a rule gives each of its results the union of all that it reads, which is never wrong.
The idea of sets that run along with the values is that of SparseConnectivityTracer.jl (Hill and Dalle, 2025).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import scipy.sparse
import torch
from torch import Tensor

from autojac.graph.dependence.dispatch import rule_of
from autojac.graph.dependence.index_sets import Constant, DependenceContext, IndexSets, State, TooLarge, Unknown
from autojac.graph.ir import Graph
from autojac.graph.operator_facts import Kind, facts_of
from autojac.graph.operators import traits

__all__ = ["TooLarge", "dependence"]


def dependence(
    graph: Graph, columns: Sequence[Tensor | None], count: int, varying: Collection[int] = ()
) -> list[IndexSets]:
    """For each output of a graph the inputs that its elements may have a derivative for.

    Args:
        graph: with its constants.
        columns: for each leaf of the call the number of the input that each of its elements is, of the leaf's shape,
            int64; None for those that are not differentiated.
        count: number of inputs.
        varying: numbers of constants that another call may have other values of.

    Returns:
        The sets of each output's elements: a superset at every point that has this graph and where the captured tensors
        that are no parameters have their zeros, and their integers, where they have them here.

    Raises:
        TooLarge: if there is too much to go through.
    """
    single = scipy.sparse.csr_array(scipy.sparse.eye_array(count, dtype=bool))
    none = scipy.sparse.csr_array((1, count), dtype=bool)
    matrix = scipy.sparse.csr_array(scipy.sparse.vstack([none, single], format="csr"))
    states: dict[int, State] = {
        number: Unknown() if column is None else IndexSets(matrix, column.cpu().contiguous() + 1)
        for number, column in zip(graph.inputs, columns, strict=True)
    }
    for number, tensor in graph.constants.items():
        learned = isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad or number in varying
        states[number] = Unknown() if learned else Constant(tensor.detach())
    work = 0
    with torch.no_grad():
        for operation in graph.operations:
            read = [states[number] for number in operation.sources]
            context = DependenceContext(graph, operation, states, count)
            context.spend(work + sum(math.prod(shape) for shape in context.shapes))
            for made, state in zip(operation.outputs, _made(context, read), strict=True):
                if made is not None:
                    states[made] = state
            work = context.work
    ends = ((graph.shapes[number], states[number]) for number in graph.outputs)
    return [
        state if isinstance(state, IndexSets) else IndexSets(none, torch.zeros(shape, dtype=torch.int64))
        for shape, state in ends
    ]


def _made(context: DependenceContext, read: Sequence[State]) -> list[State]:
    """Return what is known of the results of an operator."""
    operation, graph = context.operation, context.graph
    count = len(operation.outputs)
    if all(isinstance(state, Constant) for state in read) and not traits(operation.target)[2]:
        parts = operation({n: s.value for n in operation.sources if isinstance(s := context.states[n], Constant)})
        return [Constant(part) if isinstance(part, Tensor) else Unknown() for part in parts]
    if facts_of(operation.target).kind is Kind.FACTORY:
        like = {n: torch.zeros(graph.shapes[n], dtype=graph.dtypes[n]) for n in operation.sources}
        return [Constant(operation(like)[0])]
    if operation.held or not facts_of(operation.target).has_derivative:
        return [Unknown()] * count
    try:
        made = rule_of(context)(context)
        states = [made] * count if isinstance(made, (Constant, Unknown, IndexSets)) else list(made)
        return [
            state if number is None else _fitting(state, graph, number)
            for number, state in zip(operation.outputs, states, strict=True)
        ]
    except TooLarge:
        raise
    except Exception:  # an operator in a form that its rule does not foresee
        whole = context.everything()
        return [Unknown() if number is None else _fitting(whole, graph, number) for number in operation.outputs]


def _fitting(state: State, graph: Graph, number: int) -> State:
    """Return the state of a result: integers have no derivative, and a lone set stands for that of all elements."""
    dtype, shape = graph.dtypes[number], graph.shapes[number]
    if not isinstance(state, IndexSets):
        return state
    if not (dtype.is_floating_point or dtype.is_complex):
        return Unknown()
    index = state.index.reshape(()).expand(shape) if state.index.numel() == 1 else state.index
    if tuple(index.shape) != shape:
        raise ValueError(f"sets of shape {tuple(index.shape)} for a tensor {shape}")
    return IndexSets(state.matrix, index.contiguous())
