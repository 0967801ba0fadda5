"""Which samples depend on which: what is found contains the truth, and saves passes where there are any to save."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import autojac
from autojac.core.pattern import Pattern
from autojac.core.structure import Structure
from autojac.graph.dependence.index_sets import IndexSets, SetAlgebra, singles
from autojac.graph.dependence.propagation import propagate
from autojac.graph.recorder import record
from autojac.probe.coded_cotangents import spread_colors
from autojac.probe.sample_graph import SampleGraph, find_sample_graph
from harness import Counted, keep_waiting_for_a_core

B = 12
SCALES = (1.0, 1e3)
ORDER = torch.tensor([7, 2, 9, 0, 4, 11, 1, 3, 10, 5, 8, 6])
NEIGHBOURS = torch.tensor([[b, (b * 5 + 1) % B, (b + 3) % B] for b in range(B)])
EDGES = torch.tensor([[0, 3, 3, 5, 7, 8, 11, 2], [1, 4, 6, 5, 2, 9, 0, 2]])
PART = torch.arange(B) % 3 == 0
# by the setting, not by the argument: torch 2.11 warns that neither was chosen, even where the argument is given
with torch.sparse.check_sparse_tensor_invariants(True):
    ADJACENCY = torch.sparse_coo_tensor(EDGES, torch.arange(1.0, 9.0), (B, B)).coalesce()

Func = Callable[..., Tensor]


class Rolled(torch.autograd.Function):
    """Opaque: nothing follows a graph through a custom Function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.roll(1, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.roll(-1, 0)


def opaque(x: Tensor) -> Tensor:
    rolled: Tensor = Rolled.apply(x)
    return rolled


def attention(x: Tensor) -> Tensor:
    return (x @ x.mT).softmax(-1) @ x


def in_groups(size: int) -> Func:
    def func(x: Tensor) -> Tensor:
        missing = -len(x) % size
        groups = F.pad(x, (0, 0, 0, missing)).view(-1, size, x.shape[1])
        return attention(groups).reshape(-1, x.shape[1])[: len(x)]

    return func


def by_index(size: int) -> Func:
    """Groups whose last one is shorter, each summed up by the number of its samples' group."""

    def func(x: Tensor) -> Tensor:
        group = torch.arange(len(x)) // size
        total = torch.zeros(-(-len(x) // size), x.shape[1], dtype=x.dtype).index_add(0, group, x.sin())
        return x * total[group]

    return func


def permuted(x: Tensor) -> Tensor:
    return attention(x[ORDER].view(4, 3, 2)).reshape(B, 2)[ORDER.argsort()]


def windows(x: Tensor) -> Tensor:
    inner = x[:-2] - 2 * x[1:-1] * x[2:]
    return torch.cat([x[:1] * x[1:2], inner, x[-1:] - x[-2:-1].sin()])


def messages(x: Tensor) -> Tensor:
    sent = x.index_select(0, NEIGHBOURS.flatten()).view(B, 3, 2)
    weights = (sent * x[:, None]).sum(-1, keepdim=True).softmax(1)
    return x + (weights * sent.tanh()).sum(1)


def along_edges(x: Tensor) -> Tensor:
    source, target = EDGES
    return x + torch.zeros_like(x).index_add(0, target, x[source].sin() * x[target])


def scattered(x: Tensor) -> Tensor:
    source, target = EDGES
    return x.scatter_add(0, target[:, None].expand(-1, 2), x[source].exp())


def largest_message(x: Tensor) -> Tensor:
    source, target = EDGES
    return x + torch.zeros_like(x).scatter_reduce(0, target[:, None].expand(-1, 2), x[source], "sum")


def put(x: Tensor) -> Tensor:
    y = x.clone()
    y[ORDER] = x.sin()
    return x * y


def convolution(x: Tensor) -> Tensor:
    weight = torch.arange(1.0, 13.0, dtype=x.dtype).view(2, 2, 3)
    return F.conv1d(x.T[None], weight, padding=2, dilation=2)[0].T.tanh()


def transposed_convolution(x: Tensor) -> Tensor:
    return F.conv_transpose1d(x.T[None], torch.ones(2, 2, 3, dtype=x.dtype), padding=1)[0].T.tanh()


def rare(x: Tensor) -> Tensor:
    return torch.cat((x[:-1].sin(), x[-1:] + x[3:4] ** 3))


EXACT: dict[str, tuple[Func, str]] = {
    "roll by 1": (lambda x: x * x.roll(1, 0), "sparse"),
    "roll by -2": (lambda x: x.sin() + x.roll(-2, 0), "sparse"),
    "roll of pairs of samples": (lambda x: x * x.flip(0), "grouped"),
    "roll of all": (lambda x: x * x.roll(1), "sparse"),
    "windows": (windows, "sparse"),
    "banded by slices": (lambda x: x + F.pad(x[3:] ** 2, (0, 0, 0, 3)), "sparse"),
    "unfolded": (lambda x: F.pad(x, (0, 0, 1, 1)).unfold(0, 3, 1).square().sum(-1), "sparse"),
    "convolution": (convolution, "sparse"),
    "transposed convolution": (transposed_convolution, "sparse"),
    "pooling": (lambda x: F.avg_pool1d(x.T, 3, 1, 1).T.tanh(), "sparse"),
    "groups of 2": (in_groups(2), "grouped"),
    "groups of 3": (in_groups(3), "grouped"),
    "groups of 5, padded": (in_groups(5), "grouped"),
    "groups of 3, by index": (by_index(3), "grouped"),
    "groups across": (lambda x: (x.view(3, 4, 2).exp() / x.view(3, 4, 2).exp().sum(0)).view(B, 2), "grouped"),
    "fused attention in groups": (
        lambda x: F.scaled_dot_product_attention(*(x.view(6, 1, 2, 2),) * 3).reshape(B, 2),
        "grouped",
    ),
    "permuted groups": (permuted, "grouped"),
    "index_add": (along_edges, "sparse"),
    "scatter_add": (scattered, "sparse"),
    "scatter_reduce": (largest_message, "sparse"),
    "index_put": (put, "sparse"),
    "embedding": (lambda x: F.embedding(NEIGHBOURS, x).prod(1), "sparse"),
    "take_along_dim": (lambda x: x * torch.take_along_dim(x, ORDER[:, None], 0), "sparse"),
    "neighbours by list": (lambda x: x * x[[1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10]], "grouped"),
    "partitioned by a mask": (lambda x: torch.cat([x[PART], x[~PART]]) * x, "sparse"),
    "where by a mask": (lambda x: torch.where(PART[:, None], x.roll(1, 0), x), "sparse"),
    "sparse product": (lambda x: x + torch.sparse.mm(ADJACENCY.to(x.dtype), x), "sparse"),
    "sparse product by @": (lambda x: x + (ADJACENCY.to(x.dtype) @ x.sin()), "sparse"),
    "stacked neighbours": (lambda x: torch.stack([x, x.roll(1, 0), x.roll(-1, 0)], 1).exp().sum(1), "sparse"),
    "many see one": (lambda x: x.sin() + torch.where(PART[:, None], x[4] * x.roll(1, 0), 0), "sparse"),
    "a rare pair": (rare, "sparse"),
    "flattened with the features": (
        lambda x: F.conv1d(x.reshape(1, 1, -1), torch.ones(1, 1, 3, dtype=x.dtype), padding=1).view(B, 2).tanh(),
        "sparse",
    ),
}

SUPERSET: dict[str, Func] = {
    "message passing": messages,
    "dead here": lambda x: x + (x.roll(1, 0) - 100).relu(),
    "elsewhere only": lambda x: torch.where(x > 50, x.roll(1, 0), x),
    "times zero": lambda x: x + 0 * x.roll(1, 0),
    "largest of a window": lambda x: F.max_pool1d(x.T[None], 3, 1, 1)[0].T,
}

OPAQUE: dict[str, Func] = {
    "roll": lambda x: x * opaque(x),
    "neighbours": lambda x: (opaque(x)[NEIGHBOURS] * x[:, None]).sin().sum(1),
    "dead here": lambda x: x + (opaque(x) - 100).relu(),
    "elsewhere only": lambda x: torch.where(x > 50, opaque(x), x),
    "groups": lambda x: attention(opaque(x).view(4, 3, 2)).reshape(B, 2).roll(-1, 0),
    "one number a sample": lambda x: x + opaque(x).sin().sum(-1, keepdim=True),
    "a slice written in place": lambda x: x + F.pad(x.T[None], (2, 2), mode="circular")[0].T[:-4].sin(),
}

DENSE: dict[str, Func] = {
    "mean and neighbours": lambda x: x - x.mean(0) + x.roll(1, 0) * x,
    "attention": attention,
    "sort": lambda x: x.sort(0).values,
    "cumsum": lambda x: x.cumsum(0).sin(),
    "nearest neighbours of the moment": lambda x: x[torch.cdist(x, x).topk(2, largest=False).indices].sum(1),
    "neighbours by Python": lambda x: x + x[x.detach().numpy()[:, 0].argsort().tolist()],
    "neighbour of a number": lambda x: x + x[int(x[:, 0].argmax())],
    "opaque mean": lambda x: x - opaque(x).mean(0).sin(),
    "opaque neighbours of the moment": lambda x: opaque(x)[torch.cdist(x, x).topk(2, largest=False).indices].sum(1),
}


def points(shape: tuple[int, ...] = (B, 2)) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def truth(func: Func, x: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Who depends on whom at a point, by one VJP per element of the output."""
    x = x.clone().requires_grad_()
    y = func(x)
    found = torch.eye(len(x), dtype=torch.bool)
    for b, row in enumerate(y):
        for value in row.reshape(-1):
            (gradient,) = torch.autograd.grad(value, x, retain_graph=True, allow_unused=True)
            if gradient is not None:
                # infinity times zero is no dependence
                found[b] |= (gradient.nan_to_num(0).reshape(len(x), -1) != 0).any(1)
    return found.numpy()


def graph_of(structure: Structure) -> np.ndarray[Any, np.dtype[np.bool_]]:
    assert structure.sparsity is not None, structure.evidence
    assert structure.sparsity.samples is not None
    assert not structure.sliceable
    dense: np.ndarray[Any, np.dtype[np.bool_]] = structure.sparsity.samples.scipy().toarray() > 0
    return dense


def assert_covers(found: np.ndarray[Any, Any], func: Func, x: Tensor) -> None:
    for scale in SCALES:
        assert not (truth(func, x + scale * torch.randn_like(x)) & ~found).any()


@pytest.mark.by_day(2)
@pytest.mark.parametrize("name", EXACT)
def test_a_followed_graph_is_the_truth(name: str) -> None:
    func, kind = EXACT[name]
    x = points()
    structure = autojac.probe(func, x)
    assert structure.coupling == kind, structure.evidence
    assert structure.evidence[-1].startswith("samples: a graph of")
    assert "followed" in structure.evidence[-1]
    assert not structure.suspect
    assert np.array_equal(graph_of(structure), truth(func, x))
    assert_covers(graph_of(structure), func, x)


@pytest.mark.parametrize("name", SUPERSET)
def test_a_followed_graph_holds_for_all_values(name: str) -> None:
    x = points()
    structure = autojac.probe(SUPERSET[name], x)
    assert structure.coupling == "sparse"
    assert not structure.suspect
    assert_covers(graph_of(structure), SUPERSET[name], x)


@pytest.mark.by_day(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_functions_are_probed(name: str, dtype: torch.dtype) -> None:
    x = points().to(dtype)
    structure = autojac.probe(OPAQUE[name], x)
    assert structure.coupling == ("grouped" if name == "groups" else "sparse"), structure.evidence
    assert any("index-coded probes" in line for line in structure.evidence)
    assert_covers(graph_of(structure), OPAQUE[name], x)


def test_a_busy_machine_probes_opaque_functions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_waiting_for_a_core(monkeypatch)
    for name, func in OPAQUE.items():
        structure = autojac.probe(func, points())
        assert structure.coupling == ("grouped" if name == "groups" else "sparse"), structure.evidence


@pytest.mark.parametrize("name", DENSE)
def test_no_graph_is_claimed_where_there_is_none(name: str) -> None:
    structure = autojac.probe(DENSE[name], points())
    assert structure.coupling in ("dense", "statistics"), structure.evidence
    assert structure.samples is None


def test_statistics_are_preferred_where_they_take_fewer_passes() -> None:
    x = points()
    for func in (lambda x: x * x[0], by_index(6), lambda x: x - x.mean(0)):
        assert autojac.probe(func, x).coupling == "statistics"
        assert autojac.probe(func, x).samples is None
    assert autojac.probe(by_index(2), x).coupling == "grouped"


@pytest.mark.by_day(4)
@pytest.mark.parametrize("batch", [7, 11, 13, 64])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("make", [in_groups, by_index], ids=["padded", "by index"])
def test_the_last_group_may_be_shorter(make: Callable[[int], Func], size: int, batch: int) -> None:
    func, x = make(size), points((batch, 2))
    structure = autojac.probe(func, x)
    assert structure.coupling == "grouped", structure.evidence
    assert np.array_equal(graph_of(structure), truth(func, x))


def test_one_pair_among_many_is_found() -> None:
    def pair(x: Tensor) -> Tensor:
        return x.sin().index_add(0, torch.tensor([250]), x[17:18] ** 2)

    graph = graph_of(autojac.probe(pair, points((300, 2))))
    assert graph.sum() == 301
    assert graph[250, 17]


def test_one_pair_among_many_is_found_by_probes() -> None:
    def pair(x: Tensor) -> Tensor:
        own = (torch.arange(len(x)) == 250)[:, None]
        return x.sin() + torch.where(own, opaque(x)[18].square(), 0)

    graph = graph_of(autojac.probe(pair, points((300, 2))))
    assert graph.sum() == 301
    assert graph[250, 17]


@pytest.mark.parametrize("side", ["positional", "keyword"])
def test_indices_may_be_arguments(side: str) -> None:
    def func(x: Tensor, near: Tensor) -> Tensor:
        return x + x[near].sin().sum(1)

    x = points()
    given = ((x, NEIGHBOURS), {}) if side == "positional" else ((x,), {"near": NEIGHBOURS})
    structure = autojac.probe(func, *given[0], **given[1])
    assert structure.coupling == "sparse"
    assert np.array_equal(graph_of(structure), truth(lambda x: func(x, NEIGHBOURS), x))


def graphs_of(monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> SampleGraph:
    """What a probe found of the sample graph."""
    found = []

    def kept(*given: Any) -> SampleGraph:
        found.append(find_sample_graph(*given))
        return found[0]

    monkeypatch.setattr(sys.modules["autojac.probe.coupling"], "find_sample_graph", kept)
    autojac.probe(*args, **kwargs)
    return found[0]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_a_graph_read_from_arguments_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    x = points()
    rows = ADJACENCY.double().to_sparse_csr()
    product = graphs_of(monkeypatch, lambda x, a: a @ x.sin() + x, x, a=rows)
    assert product.pattern == Pattern.of(np.eye(B) + ADJACENCY.to_dense().numpy())
    assert product.depends_on_arguments
    assert graphs_of(monkeypatch, lambda x, near: x + x[near].sin().sum(1), x, NEIGHBOURS).depends_on_arguments
    assert graphs_of(monkeypatch, lambda x, near: x + x[near].sin().sum(1), x, near=NEIGHBOURS).depends_on_arguments
    assert graphs_of(monkeypatch, lambda x, near: x + opaque(x)[near].sin().sum(1), x, NEIGHBOURS).depends_on_arguments
    assert not graphs_of(monkeypatch, EXACT["embedding"][0], x).depends_on_arguments
    assert not graphs_of(
        monkeypatch, lambda x, weight: x * x.roll(1, 0) * weight, x, torch.rand(B, 1)
    ).depends_on_arguments


def test_a_batch_as_long_as_a_sample_is_wide() -> None:
    x = points((6, 6))
    for func, right in ((lambda x: x * x.roll(1, 0), True), (lambda x: x + x.T, False)):
        structure = autojac.probe(func, x)
        assert (structure.coupling == "sparse") == right
        if right:
            assert np.array_equal(graph_of(structure), truth(func, x))
    assert autojac.probe(lambda x: x * x.roll(1, 1), x).independent


def test_a_batch_of_one_couples_nothing() -> None:
    assert autojac.probe(lambda x: x * x.roll(1, 0), points((1, 2))).independent


def test_a_diagonal_of_samples_is_followed() -> None:
    structure = autojac.probe(lambda x: torch.diag_embed(x[:, 0]).roll(1, 0).sum(1, keepdim=True) * x, points())
    assert np.array_equal(graph_of(structure), np.eye(B, dtype=bool) | np.roll(np.eye(B, dtype=bool), 1, 0))


def test_random_neighbours_are_no_graph() -> None:
    def shuffled(x: Tensor) -> Tensor:
        return x * x[torch.randperm(len(x))]

    jac = autojac.AutoJacobian(shuffled, randomness="different", on_miss="estimate", store=":memory:")
    x = points()
    jac(x)
    assert jac.plan(x).structure.coupling == "dense"


def test_several_inputs_and_outputs_share_a_graph() -> None:
    def func(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return x * z.roll(1, 0).sum(-1, keepdim=True), (x.roll(-1, 0) + z.sum(-1, keepdim=True)).sin()

    graph = graph_of(autojac.probe(func, points(), points((B, 3)), argnums=(0, 1)))
    near = np.eye(B, dtype=bool)
    assert np.array_equal(graph, near | np.roll(near, 1, 0) | np.roll(near, -1, 0))


@pytest.mark.parametrize("func", [EXACT["roll by 1"][0], OPAQUE["roll"]], ids=["followed", "probed"])
def test_evaluations_do_not_grow_with_the_batch(func: Func, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autojac.planning.problem_builder.PROBE_BUDGET_S", {"quick": 60.0})
    counts = []
    for batch in (64, 1024):
        counted = Counted(func)
        structure = autojac.probe(counted, points((batch, 2)))
        assert structure.coupling == "sparse", structure.evidence
        pairs = 4 * 2 * (batch - 1).bit_length()
        counts.append(counted.calls - pairs)
    # the masks of the pair layers stop at the first coupled pair
    assert counts[1] - counts[0] <= 0


def test_probes_grow_with_the_degree_and_hardly_with_the_batch() -> None:
    passes = []
    for batch in (64, 1024):
        line = autojac.probe(OPAQUE["roll"], points((batch, 2))).evidence[-1]
        passes.append(int(line.split(" by ")[1].split()[0]))
    assert passes[1] < 2 * passes[0]


@st.composite
def programs(draw: st.DrawFn) -> tuple[Func, int]:
    """A function of (batch, 2) made of operators that move, mix and index samples."""
    batch = draw(st.integers(2, 9))
    index = st.integers(0, batch - 1)
    rows = torch.tensor(draw(st.lists(index, min_size=batch, max_size=batch)))
    pairs = torch.tensor(draw(st.lists(st.tuples(index, index), min_size=1, max_size=6))).T
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=batch, max_size=batch)))[:, None]
    shift = draw(st.integers(-3, 3))
    group = draw(st.sampled_from([size for size in range(1, batch + 1) if batch % size == 0]))
    steps: list[Func] = [
        lambda x: x * x.roll(shift, 0),
        lambda x: x.roll(shift) + x.sin(),
        lambda x: x[rows] - x.tanh(),
        lambda x: x.index_add(0, pairs[0], x[pairs[1]].sin()),
        lambda x: x.scatter(0, pairs[0][:, None].expand(-1, 2), x[pairs[1]] * 2),
        lambda x: torch.where(mask, x.flip(0), x.exp()),
        lambda x: x.masked_fill(mask, 0.5) + x.relu(),
        lambda x: attention(x.view(-1, group, 2)).reshape(batch, 2),
        lambda x: x.view(group, -1, 2).transpose(0, 1).reshape(batch, 2),
        lambda x: torch.cat([x[1:], x[:1] * 3]),
        lambda x: F.avg_pool1d(x.T, 3, 1, 1).T,
        lambda x: x.reshape(-1).unfold(0, 2, 1).sum(-1).repeat(2)[: 2 * batch].view(batch, 2),
        lambda x: x.T.reshape(batch, 2).sin(),
        lambda x: x.repeat_interleave(2, 0)[batch:],
        lambda x: torch.stack([x, x[rows]]).prod(0),
        lambda x: x - x[draw_first : draw_first + 1],
    ]
    draw_first = draw(index)
    chosen = draw(st.lists(st.sampled_from(steps), min_size=1, max_size=4))

    def func(x: Tensor) -> Tensor:
        for step in chosen:
            x = step(x)
        return x

    return func, batch


@given(programs())
@settings(max_examples=60)
def test_what_is_followed_contains_what_any_point_shows(program: tuple[Func, int]) -> None:
    func, batch = program
    x = points((batch, 2))
    recording = record(lambda leaves, kwargs: (func(leaves[0]),), [x], {}, [0])
    assert recording.graph is not None
    own = torch.arange(batch)[:, None]
    samples = propagate(recording.graph, [x], [own], batch, follow_values=True).samples()
    assert samples is not None
    for scale in (0.0, 0.3, 1.0):
        assert not (truth(func, x + scale * torch.randn_like(x)) & ~samples.toarray()).any()


@given(st.lists(st.sampled_from([1, 2, 3]), max_size=5), st.data())
def test_views_keep_what_stands_behind_each_entry(factors: list[int], data: st.DataObject) -> None:
    def shape() -> list[int]:
        cuts = sorted(data.draw(st.sets(st.integers(0, len(factors)))))
        sizes = []
        for start, stop in zip([0, *cuts], [*cuts, len(factors)], strict=True):
            sizes.append(int(np.prod(factors[start:stop], dtype=int)))
        return sizes

    before, after = shape(), shape()
    told = [size if size > 1 and data.draw(st.booleans()) else 1 for size in before]
    index = torch.arange(int(np.prod(told, dtype=int))).reshape(told)
    made = SetAlgebra(None).reshape(IndexSets(singles(1), index), before, after).index
    assert all(size in (1, full) for size, full in zip(made.shape, after, strict=True))
    assert torch.equal(made.expand(after), index.expand(before).reshape(after))


@given(st.integers(1, 40), st.integers(0, 80), st.integers(1, 12), st.integers(0, 9))
def test_no_class_has_two_samples_with_one_neighbour(batch: int, entries: int, wide: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    matrix = np.zeros((batch, batch), dtype=bool)
    matrix[random.integers(0, batch, entries), random.integers(0, batch, entries)] = True
    colors = spread_colors(Pattern.of(matrix).scipy(), wide, random)
    assert colors.min() >= 0
    for color in range(colors.max() + 1):
        assert matrix[colors == color].sum(0).max(initial=0) <= 1
