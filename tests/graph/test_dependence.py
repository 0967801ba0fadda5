"""What stands behind each element, asked for samples, for coordinates and for both, holds all that is really read."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from autojac.graph.dependence.index_sets import IndexSets, SetAlgebra, TooLarge, compressed, singles
from autojac.graph.dependence.propagation import propagate
from autojac.graph.ir import Graph
from autojac.graph.recorder import record
from programs import program

PROGRAMS = 40
MOST_ROWS = 40


def recorded(seed: int) -> tuple[Graph, Tensor] | None:
    """The graph of a random program and its argument; None where there is none."""
    torch.manual_seed(seed)
    made = program(random.Random(seed), 2 + seed % 4)
    if made is None:
        return None
    func, x, _ = made
    graph = record(lambda leaves, kwargs: (func(leaves[0]),), [x], {}, (0,)).graph
    return None if graph is None else (graph, x)


def told(graph: Graph, x: Tensor, numbers: Tensor, by_value: bool = False) -> Tensor:
    """The inputs behind each element of the output, (elements, inputs)."""
    count = int(numbers.max()) + 1
    (sets,) = propagate(graph, [x], [numbers], count, by_value=by_value).outputs()
    return torch.from_numpy(sets.rows(graph.shapes[graph.outputs[0]]).toarray())


def read(graph: Graph, x: Tensor) -> tuple[Tensor, Tensor]:
    """Some elements of the output, and which elements of the argument each has a derivative for."""
    inputs = x.clone().requires_grad_()
    (y,) = graph.run(graph.outputs, {graph.inputs[0]: inputs})
    rows = torch.randperm(y.numel())[:MOST_ROWS]
    found = torch.zeros(len(rows), x.numel(), dtype=torch.bool)
    for place, row in enumerate(rows.tolist() if y.requires_grad else []):
        (gradient,) = torch.autograd.grad(y.reshape(-1)[row], inputs, retain_graph=True, allow_unused=True)
        if gradient is not None:
            found[place] = gradient.nan_to_num(0).reshape(-1) != 0
    return rows, found


@pytest.mark.parametrize("start", range(0, 200, PROGRAMS))
def test_samples_coordinates_and_both_hold_what_is_read(start: int) -> None:
    for seed in range(start, start + PROGRAMS):
        made = recorded(seed)
        if made is None:
            continue
        graph, x = made
        batch, n = len(x), x[0].numel()
        samples, coordinates = (
            torch.arange(batch).reshape(-1, *[1] * (x.dim() - 1)),
            torch.arange(n).reshape(x[:1].shape),
        )
        both = torch.arange(batch * n).reshape(x.shape)
        for by_value in (False, True):
            pairs = told(graph, x, both, by_value).unflatten(1, (batch, n))
            by_sample = told(graph, x, samples, by_value)
            by_coordinate = told(graph, x, coordinates, by_value)
            for _ in range(2):
                rows, found = read(graph, torch.randn_like(x))
                found = found.unflatten(1, (batch, n))
                assert not bool((found & ~pairs[rows]).any()), seed
                assert not bool((found.any(2) & ~by_sample[rows]).any()), seed
                assert not bool((found.any(1) & ~by_coordinate[rows]).any()), seed


@pytest.mark.parametrize("start", range(0, 200, PROGRAMS))
def test_values_move_only_where_samples_say(start: int) -> None:
    for seed in range(start, start + PROGRAMS):
        made = recorded(seed)
        if made is None:
            continue
        graph, x = made
        flow = propagate(graph, [x], [torch.arange(len(x)).reshape(-1, *[1] * (x.dim() - 1))], len(x), by_value=True)
        matrix = flow.samples()
        assert matrix is not None
        samples = torch.from_numpy(matrix.toarray())
        (base,) = graph.run(graph.outputs, {graph.inputs[0]: x})
        for sample in range(len(x)):
            changed = x.clone()
            changed[sample] += torch.randn_like(x[sample])
            (y,) = graph.run(graph.outputs, {graph.inputs[0]: changed})
            moved = ((y - base).abs() > 1e-9 * base.abs().clamp(min=1)).reshape(len(x), -1).any(1)
            assert not bool((moved & ~samples[:, sample]).any()), seed


def test_where_it_makes_no_difference_sets_are_kept_once() -> None:
    """A wide event costs nothing where samples are asked for, nor a large batch where coordinates are."""

    def func(x: Tensor) -> Tensor:
        y = torch.cat([x, x.roll(1, 0)], 1)
        return torch.nn.functional.pad(y, (3, 0)).exp() + y.sum(1, keepdim=True)

    x = torch.randn(50, 70)
    graph = record(lambda leaves, kwargs: (func(leaves[0]),), [x], {}, (0,)).graph
    assert graph is not None
    by_sample = propagate(graph, [x], [torch.arange(50)[:, None]], 50, by_value=True)
    assert {state.index.shape[1:] for state in by_sample.states.values() if isinstance(state, IndexSets)} == {(1,)}
    by_coordinate = propagate(graph, [x], [torch.arange(70)[None]], 70)
    assert {state.index.shape[0] for state in by_coordinate.states.values() if isinstance(state, IndexSets)} == {1}


def test_unions_are_those_of_sets() -> None:
    """Whichever way a union is found: numbers are all distinct, or some are the same, or broadcast."""
    matrix = singles(6)
    for seed in range(60):
        torch.manual_seed(seed)
        shapes = [(4, 1), (1, 3)] if seed % 3 == 0 else [(4, 3), (4, 3)] if seed % 3 == 1 else [(3,), (4, 1)]
        parts = [IndexSets(matrix, torch.randint(7, shape)) for shape in shapes]
        if seed % 2:
            parts[0] = SetAlgebra(None).union(parts[0], IndexSets(matrix, torch.randint(7, shapes[0])))
        made = SetAlgebra(None).union(*parts)
        rows = [torch.from_numpy(part.rows((4, 3)).toarray()) for part in (*parts, made)]
        assert torch.equal(rows[2], rows[0] | rows[1])
        mixed = SetAlgebra(None).mixed(made, [1])
        assert torch.equal(torch.from_numpy(mixed.rows((4, 1)).toarray()), rows[2].reshape(4, 3, 6).any(1))
        assert made.matrix[[0]].nnz == mixed.matrix[[0]].nnz == 0


def test_work_has_a_limit() -> None:
    algebra = SetAlgebra(10)
    one = IndexSets(singles(8), torch.arange(1, 9))
    with pytest.raises(TooLarge):
        algebra.union(IndexSets(one.matrix, one.index[:, None]), one)


def test_equal_slices_are_found() -> None:
    index = torch.arange(6).reshape(2, 1, 3).expand(2, 5, 3)
    assert compressed(index).shape == compressed(index.contiguous()).shape == (2, 1, 3)
    assert compressed(torch.ones(2, 0, 3)).shape == (1, 0, 1)
    assert compressed(torch.tensor([0, 0, 1])).shape == (3,)
