"""What stands behind each element, asked for samples, for coordinates and for both, holds all that is really read."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autojac.graph.dependence.index_sets import IndexSets, SetAlgebra, TooLarge, compress_index, singles
from autojac.graph.dependence.propagation import propagate
from autojac.graph.ir import Graph
from autojac.graph.recorder import record
from programs import program

PROGRAMS = 40
MOST_ROWS = 40
Func = Callable[..., Tensor]


def graph_of(func: Func, x: Tensor) -> Graph:
    graph = record(lambda leaves, kwargs: (func(leaves[0]),), [x], {}, (0,)).graph
    assert graph is not None
    return graph


def recorded(seed: int) -> tuple[Graph, Tensor] | None:
    """The graph of a random program and its argument; None where there is none."""
    torch.manual_seed(seed)
    made = program(random.Random(seed), 2 + seed % 4)
    if made is None:
        return None
    func, x, _ = made
    graph = record(lambda leaves, kwargs: (func(leaves[0]),), [x], {}, (0,)).graph
    return None if graph is None else (graph, x)


def told(graph: Graph, x: Tensor, numbers: Tensor, follow_values: bool = False) -> Tensor:
    """The inputs behind each element of the output, (elements, inputs)."""
    count = int(numbers.max()) + 1
    (sets,) = propagate(graph, [x], [numbers], count, follow_values=follow_values).outputs()
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


@pytest.mark.by_day(2)
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
        for follow_values in (False, True):
            pairs = told(graph, x, both, follow_values).unflatten(1, (batch, n))
            by_sample = told(graph, x, samples, follow_values)
            by_coordinate = told(graph, x, coordinates, follow_values)
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
        flow = propagate(
            graph, [x], [torch.arange(len(x)).reshape(-1, *[1] * (x.dim() - 1))], len(x), follow_values=True
        )
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
    graph = graph_of(func, x)
    by_sample = propagate(graph, [x], [torch.arange(50)[:, None]], 50, follow_values=True)
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
        mixed = SetAlgebra(None).unite_along(made, [1])
        assert torch.equal(torch.from_numpy(mixed.rows((4, 1)).toarray()), rows[2].reshape(4, 3, 6).any(1))
        assert made.matrix[[0]].nnz == mixed.matrix[[0]].nnz == 0


def test_work_has_a_limit() -> None:
    algebra = SetAlgebra(10)
    one = IndexSets(singles(8), torch.arange(1, 9))
    with pytest.raises(TooLarge):
        algebra.union(IndexSets(one.matrix, one.index[:, None]), one)


def test_equal_slices_are_found() -> None:
    index = torch.arange(6).reshape(2, 1, 3).expand(2, 5, 3)
    assert compress_index(index).shape == compress_index(index.contiguous()).shape == (2, 1, 3)
    assert compress_index(torch.ones(2, 0, 3)).shape == (1, 0, 1)
    assert compress_index(torch.tensor([0, 0, 1])).shape == (3,)


WEIGHT = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
MASK = torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0], [1, 1, 0, 0]], dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.bool)
ZEROS: dict[str, tuple[Func, Tensor]] = {
    "a mask times weights": (lambda x: x * (MASK * WEIGHT), MASK),
    "weights that are turned": (lambda x: x * (MASK * WEIGHT).t().contiguous().t(), MASK),
    "weights in another shape": (lambda x: (x.view(12) * (MASK * WEIGHT).view(12)).view(3, 4), MASK),
    "negative weights": (lambda x: x * -(MASK * WEIGHT), MASK),
    "the sum of a mask and weights": (lambda x: x * (MASK + WEIGHT), torch.ones(3, 4)),
    "what is copied": (lambda x: torch.zeros(3, 4, dtype=x.dtype).copy_(x) * MASK, MASK),
}
"""Functions of (3, 4) that scale each entry, and which of them they keep."""


@pytest.mark.parametrize("name", ZEROS)
def test_zeros_that_are_captured_cut_paths(name: str) -> None:
    func, kept = ZEROS[name]
    x = torch.randn(3, 4, dtype=torch.float64)
    found = told(graph_of(func, x), x, torch.arange(12).reshape(3, 4))
    assert torch.equal(found, torch.diag(kept.reshape(-1) != 0))
    # but 0 times infinity is a value
    assert torch.equal(
        told(graph_of(func, x), x, torch.arange(12).reshape(3, 4), follow_values=True), torch.eye(12) > 0
    )


ANYWHERE: dict[str, tuple[Func, Tensor]] = {
    "index_select": (lambda x, near: x.index_select(1, near), torch.kron(EYE, torch.ones(4, 4)) > 0),
    "index": (lambda x, near: x[:, near], torch.kron(EYE, torch.ones(4, 4)) > 0),
    "two indices, one of them known": (
        lambda x, near: x[torch.tensor([2, 0, 1])[:, None], near],
        torch.kron(EYE[[2, 0, 1]], torch.ones(4, 4)) > 0,
    ),
    "gather": (lambda x, near: x.gather(0, near[None] % 3), torch.eye(4).repeat(1, 3) > 0),
    "a mask": (lambda x, near: x[near > 0][:1], torch.ones(4, 12) > 0),
}
"""Functions of (3, 4) and of an index of 4 entries, and what they read if that may be any."""


@pytest.mark.parametrize("name", ANYWHERE)
def test_an_index_that_may_change_reaches_all_along_its_axes(name: str) -> None:
    func, read = ANYWHERE[name]
    x, near = torch.randn(3, 4, dtype=torch.float64), torch.tensor([1, 0, 2, 0])
    if name == "a mask":
        near = near[:3]
    graph = record(lambda leaves, kwargs: (func(*leaves),), [x, near], {}, (0,)).graph
    assert graph is not None
    (sets,) = propagate(graph, [x, near], [torch.arange(12).reshape(3, 4), None], 12).outputs()
    found = torch.from_numpy(sets.rows(graph.shapes[graph.outputs[0]]).toarray())
    assert torch.equal(found, read)


@pytest.mark.parametrize("batch", [7_000, 100_000])
def test_no_index_of_all_pairs_of_many_samples_is_made(batch: int) -> None:
    for func in (
        lambda x: (x @ x.mT).softmax(-1) @ x,
        lambda x: (x[:, None] - x[None]).sin().sum(1),
        lambda x: x.mT.repeat(len(x), 1)[: len(x)] * x,
    ):
        # recorded small: a batch of this length need not be computed
        x = torch.randn(6, 1)
        graph = graph_of(func, x)
        shapes = {
            number: tuple(batch if size == 6 else size for size in shape) for number, shape in graph.shapes.items()
        }
        wide = dataclasses.replace(graph, shapes=shapes)
        flow = propagate(wide, [x], [torch.arange(batch)[:, None]], batch, follow_values=True)
        assert "elements and entries" in flow.refusal
        assert flow.losses
        assert flow.samples() is None
