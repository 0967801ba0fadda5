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

from autojac.dependence.rules import rule_of
from autojac.dependence.sets import Fixed, Reading, Sets, State, TooLarge, Varying
from autojac.flow import SHAPE_ONLY
from autojac.graph import Graph
from autojac.operators import traits

__all__ = ["TooLarge", "dependence"]


def dependence(
    graph: Graph, columns: Sequence[Tensor | None], count: int, varying: Collection[int] = ()
) -> list[scipy.sparse.csr_array]:
    """For each output of a graph the inputs that its elements may have a derivative for.

    Args:
        graph: with its constants.
        columns: for each leaf of the call the number of the input that each of its elements is, of the leaf's shape,
            int64; None for those that are not differentiated.
        count: number of inputs.
        varying: numbers of constants that another call may have other values of.

    Returns:
        Boolean matrices (elements of the output, count): a superset at every point that has this graph and where the
        captured tensors that are no parameters have their zeros, and their integers, where they have them here.

    Raises:
        TooLarge: if there is too much to go through.
    """
    single = scipy.sparse.csr_array(scipy.sparse.eye_array(count, dtype=bool))
    none = scipy.sparse.csr_array((1, count), dtype=bool)
    matrix = scipy.sparse.csr_array(scipy.sparse.vstack([none, single], format="csr"))
    states: dict[int, State] = {
        number: Varying() if column is None else Sets(matrix, column.cpu().contiguous() + 1)
        for number, column in zip(graph.inputs, columns, strict=True)
    }
    for number, tensor in graph.constants.items():
        learned = isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad or number in varying
        states[number] = Varying() if learned else Fixed(tensor.detach())
    work = 0
    made: State | Sequence[State]
    with torch.no_grad():
        for operation in graph.operations:
            read = [states[number] for number in operation.sources]
            reading = Reading(graph, operation, states, count)
            reading.spend(work + sum(math.prod(shape) for shape in reading.shapes))
            made = _made(reading, read)
            for place, result in enumerate(operation.outputs):
                if result is not None:
                    state = made if isinstance(made, (Fixed, Varying, Sets)) else made[place]
                    states[result] = _checked(state, graph, result)
            work = reading.work
    found = []
    for number in graph.outputs:
        state = states[number]
        shape = (math.prod(graph.shapes[number]), count)
        if isinstance(state, Sets):
            found.append(state.matrix[state.index.reshape(-1).numpy()])
        else:
            found.append(scipy.sparse.csr_array(shape, dtype=bool))
    return found


def _made(reading: Reading, read: Sequence[State]) -> State | Sequence[State]:
    operation = reading.operation
    if all(isinstance(state, Fixed) for state in read) and not traits(operation.target)[2]:
        made = operation({n: s.value for n in operation.sources if isinstance(s := reading.states[n], Fixed)})
        return [Fixed(part) if isinstance(part, Tensor) else Varying() for part in made]
    if operation.name in SHAPE_ONLY:
        like = {n: torch.zeros(reading.graph.shapes[n], dtype=reading.graph.dtypes[n]) for n in operation.sources}
        return Fixed(operation(like)[0])
    if any(isinstance(state, Sets) for state in read) and (operation.held or operation.name == "detach"):
        return Varying()
    result: State | Sequence[State] = rule_of(reading)(reading)
    return result


def _checked(state: State, graph: Graph, number: int) -> State:
    """The state of a result: one without a derivative has no inputs behind it, and a lone set stands for all."""
    dtype, shape = graph.dtypes[number], graph.shapes[number]
    if not isinstance(state, Sets):
        return state
    if not (dtype.is_floating_point or dtype.is_complex):
        return Varying()
    if state.index.numel() == 1:
        state = Sets(state.matrix, state.index.reshape(()).expand(shape))
    assert tuple(state.index.shape) == shape, (graph.operations[graph.producers[number]].name, state.index.shape, shape)
    return Sets(state.matrix, state.index.contiguous())
