"""Hessians: each sample's own, exact by every method, in every form, trained through, and sparse ones by few passes."""

from __future__ import annotations

import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracle
from autojac import AutoHessian, AutoJacobian, OptionError, OutputError, PlanStore, UnsupportedError
from autojac.bench.molecules import PackedEnergy
from autojac.problem.compression import colors_of, mirrored_rows
from autojac.replay.replayer import Replayer
from harness import compare, in_use

PULL = {"method": "Pull", "seeds": "shared", "engine": "loop", "chunk": None}
METHODS: dict[str, dict[str, Any]] = {
    "reverse over reverse": PULL,
    "forward over reverse": {**PULL, "method": "Push"},
    "per sample": {"method": "PerSample", "mode": "forward", "chunk": None},
    "replayed reverse over reverse": {"method": "Replay", "inner": PULL, "without": None},
    "replayed forward over reverse": {"method": "Replay", "inner": {**PULL, "method": "Push"}, "without": None},
    "replayed per sample": {
        "method": "Replay",
        "inner": {"method": "PerSample", "mode": "reverse", "chunk": None},
        "without": None,
    },
}


def estimated(func: Callable[..., Any], **options: Any) -> AutoHessian:
    return AutoHessian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


def by(method: dict[str, Any], func: Callable[..., Any], x: Tensor, **more: Any) -> AutoHessian:
    """Hessians by one method, which is found in the store."""
    store = PlanStore(":memory:")
    maker = estimated(func, store=store, **more)
    plan, keys = maker.plan(x), in_use(maker.planned).keys
    assert keys is not None
    maker.planned._plans.planner.repository.save(keys, dataclasses.replace(plan, method=method))
    return estimated(func, store=store, **more)


def right(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(B, *out, n, n), entry by entry."""
    n = x[0].numel()
    entries = [[oracle.derivative(func, x, (i, j)) for j in range(n)] for i in range(n)]
    return torch.stack([torch.stack(row, -1) for row in entries], -2).detach()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 1), nn.Flatten(0)
    ).double()


def points(batch: int = 4, columns: int = 3) -> Tensor:
    return torch.rand(batch, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.3


def two_outputs(x: Tensor) -> Tensor:
    return torch.stack([x.prod(1), (x**3).sum(1) * x[:, 0]], 1)


def coupled(x: Tensor) -> Tensor:
    return (x - x.mean(0)).pow(3).sum(1) * torch.softmax(x[:, 0], 0)


@pytest.mark.parametrize("func", [network(), two_outputs, coupled], ids=["network", "two outputs", "coupled"])
def test_blocks_diagonals_laplacians_and_products(func: Any) -> None:
    x, hessian = points(), estimated(func)
    expected = right(func, x)
    compare(hessian(x), expected)
    compare(hessian.laplacian(x), expected.diagonal(dim1=-2, dim2=-1).sum(-1))
    vectors = torch.rand(2, *x.shape).double()
    products = torch.einsum("b...ij,kbj->kb...i", expected, vectors)
    compare(hessian.hvp(x, vectors[0]), products[0])
    compare(hessian.hvp(x, vectors), products)
    if func is not two_outputs:
        compare(hessian.diagonal(x), expected.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_right_and_trained_through(method: str) -> None:
    model, x = network(), points().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    rows = [torch.autograd.grad(slope[:, k].sum(), x, create_graph=True)[0] for k in range(3)]
    expected = torch.stack(rows, 1)
    sources = [x, *model.parameters()][:-1]  # the last bias moves no derivative
    trained = torch.autograd.grad((expected**3).sum(), sources)
    hessian = by(METHODS[method], model, x)
    for _ in range(2):
        found = hessian(x)
        compare(found.detach(), expected.detach())
        compare(list(torch.autograd.grad((found**3).sum(), sources)), list(trained))
    compute = in_use(hessian.planned).compute
    if "replayed" in method:
        assert isinstance(compute, Replayer)
        assert compute.bound is not None


def test_laplacians_are_trained_through() -> None:
    model, x = network(), points()
    expected = right(model, x).diagonal(dim1=1, dim2=2).sum(1)
    found = estimated(model).laplacian(x)
    compare(found.detach(), expected)
    weights = [p for name, p in model.named_parameters() if name != "4.bias"]
    assert all(bool(gradient.any()) for gradient in torch.autograd.grad(found.square().sum(), weights))
    assert torch.autograd.gradcheck(estimated(lambda x: x.prod(1) ** 2).laplacian, points(2).requires_grad_())


@given(batch=st.integers(1, 3), event=st.sampled_from([(), (2,), (2, 1), (1,)]), tail=st.sampled_from([(), (1,), (2,)]))
@settings(max_examples=6)
def test_any_shape(batch: int, event: tuple[int, ...], tail: tuple[int, ...]) -> None:
    def func(x: Tensor) -> Tensor:
        powers = (x.reshape(batch, -1) ** 3).prod(1)
        return torch.stack([powers, powers.sin()][: max(sum(tail), 1)], 1).reshape(batch, *tail)

    x = points(batch, torch.Size(event).numel()).reshape(batch, *event)
    compare(estimated(func)(x), right(func, x).reshape(batch, *tail, *event, *event))


def test_a_function_without_a_batch_is_that_of_torch() -> None:
    def energy(x: Tensor, y: Tensor) -> Tensor:
        return (x.sin() * y[:2].prod()).sum() + (y**4).sum()

    x, y = points(1)[0, :2], points(1)[0]
    for argnums in (0, (0, 1)):
        expected = torch.func.hessian(energy, argnums=argnums)(x, y)
        compare(estimated(energy, argnums=argnums, in_dims=None)(x, y), expected)
    nested = estimated(lambda d: energy(d["x"], d["y"]), in_dims=None)({"x": x, "y": y})
    compare(nested, torch.func.hessian(lambda d: energy(d["x"], d["y"]))({"x": x, "y": y}))
    compare(estimated(lambda y: energy(x, y), in_dims=None).laplacian(y), 12 * y.square().sum())


def chain(x: Tensor) -> Tensor:
    """Neighbors alone meet: tridiagonal."""
    return (x[1:] - x[:-1].square()).square().sum() + (1 - x).pow(4).sum()


def test_sparse_hessians_take_few_passes() -> None:
    x = points(1, 2000)[0]
    hessian = estimated(chain, in_dims=None, layout="sparse")
    found = hessian(x)
    plan = in_use(hessian.planned)
    assert found.layout == torch.sparse_csr
    assert found.values().numel() == 3 * 2000 - 2
    assert colors_of(plan.problem, "rows").count <= 6
    assert plan.plan.method["method"].startswith("Colored")
    few = x[:6]
    compare(estimated(chain, in_dims=None, layout="sparse")(few).to_dense(), torch.func.hessian(chain)(few))


def test_sparse_hessians_of_a_batch() -> None:
    x = points(3, 4)
    found = estimated(torch.vmap(chain), layout="sparse")(x).to_dense()
    compare(found, torch.block_diag(*(torch.func.hessian(chain)(one) for one in x)))
    with pytest.raises(UnsupportedError, match="coupled"):
        estimated(coupled, layout="sparse")(points())


def test_what_is_no_scalar_has_no_diagonal() -> None:
    with pytest.raises(OutputError, match=r"\(4, 2\)"):
        estimated(two_outputs).diagonal(points())


def test_a_jacobian_of_a_jacobian_is_recorded_whoever_planned_first() -> None:
    x = points()
    for tuned in (False, True):
        inner = AutoJacobian(network(), store=":memory:", on_miss="estimate")
        if tuned:
            inner(x)
        outer = AutoJacobian(inner, store=":memory:", on_miss="tune", effort="quick", budget_s=0.5)
        compare(outer(x).detach(), right(network(), x))
        reasons = [str(trial.reason) for trial in outer.plan(x).trials]
        assert reasons
        assert not any("not reachable" in reason for reason in reasons)
        assert "Derivatives(func" in outer.explain(x)


def test_copies_and_names() -> None:
    hessian = estimated(network())
    compare(pickle.loads(pickle.dumps(hessian))(points()).detach(), hessian(points()).detach())
    assert repr(hessian) == "AutoHessian(Sequential(Linear, Tanh, ..., Flatten), 1 plan in use)"
    assert "AutoJacobian of Sequential" in hessian.explain(points())
    assert "hint" not in hessian.explain(points())


def test_symmetry_saves_passes_where_rows_alone_take_one_each() -> None:
    def hub(x: Tensor) -> Tensor:
        return (x[0] * x[1:].square()).sum() + x.pow(4).sum()

    x = points(1, 12)[0]
    hessian = estimated(hub, in_dims=None, layout="sparse")
    compare(hessian(x).to_dense(), torch.func.hessian(hub)(x))
    method = {"method": "ColoredPull", "engine": "loop", "chunk": None, "coloring": "star"}
    star = by(method, hub, x, in_dims=None, layout="sparse")
    compare(star(x).to_dense(), torch.func.hessian(hub)(x))
    problem = in_use(star.planned).problem
    found = mirrored_rows(problem)
    assert found is not None
    assert found[0].count == 2
    assert colors_of(problem, "rows").count == 12
    compare(by(method, hub, x, in_dims=None)(x), torch.func.hessian(hub)(x))
    assert star.planned.plan(x).method == method


def graph_energy(x: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
    """Let points interact along the edges; the last coordinate enters linearly, so that its row is empty."""
    i, j = edges
    return (weights * x[:, i] * x[:, j].square()).sum(1) + x[:, -1]


@given(
    size=st.integers(3, 12), density=st.floats(0.05, 0.5), decades=st.sampled_from([0, 4, 8]), seed=st.integers(0, 99)
)
@settings(max_examples=4)
def test_small_entries_keep_all_digits_beside_large_ones(size: int, density: float, decades: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    edges = (torch.rand(size, size, generator=generator).triu(1) < density).triu(1).nonzero().T
    edges = torch.cat([edges[:, (edges != size - 1).all(0)], torch.tensor([[0], [1]])], 1)
    exponents = (2 * torch.rand(edges.shape[1], generator=generator, dtype=torch.float64) - 1) * decades
    func = functools.partial(graph_energy, edges=edges, weights=10.0**exponents)
    x = points(2, size).requires_grad_()
    method = {"method": "ColoredPull", "engine": "loop", "chunk": None, "coloring": "star"}
    expected = torch.stack([torch.func.hessian(lambda row: func(row[None])[0])(row) for row in x])
    scale = torch.where(expected == 0, 1, expected).detach().reciprocal()
    slope = torch.autograd.grad((expected * scale.square()).sum(), x)[0]
    found = by(method, func, x)(x)
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-12, atol=0)
    trained = torch.autograd.grad((found * scale.square()).sum(), x)[0]
    torch.testing.assert_close(trained, slope, rtol=1e-9, atol=0)


def test_what_is_not_finite_spreads_to_no_entry_that_is_finite_both_ways() -> None:
    edges = torch.tensor([[0, 0, 0, 1, 3, 4], [1, 2, 3, 2, 4, 5]])

    def func(x: Tensor) -> Tensor:
        # the second derivative in the first coordinate is infinite at zero
        return graph_energy(x, edges, torch.ones(6, dtype=x.dtype)) + x[:, 0].abs().pow(1.5) * x[:, 1]

    x = points(2, 8)
    x[0, 0] = 0
    method = {"method": "ColoredPull", "engine": "loop", "chunk": None, "coloring": "star"}
    found = by(method, func, x)(x)
    rows = oracle.jacobian_blocks(torch.func.grad(lambda x: func(x).sum()), (x,))
    known = rows.isfinite() & rows.mT.isfinite()
    assert not bool(rows.isfinite().all())
    torch.testing.assert_close(found[known], rows[known])


def test_packed_molecules_take_as_many_passes_as_the_largest_has_coordinates() -> None:
    sizes = torch.tensor([2, 4, 3])
    energy, positions = PackedEnergy(sizes), torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).double()
    alone = [
        torch.func.hessian(PackedEnergy(torch.tensor([len(part)])))(part) for part in positions.split(sizes.tolist())
    ]
    expected = torch.block_diag(*(block.reshape(3 * len(block), -1) for block in alone))
    for layout in ("sparse", "blocks"):
        hessian = estimated(energy, in_dims=None, layout=layout)
        for _ in range(2):
            found = hessian(positions)
            compare(found.to_dense() if layout == "sparse" else found.reshape(27, 27), expected)
        problem = in_use(hessian.planned).problem
        assert colors_of(problem, "rows").count == colors_of(problem, "columns").count == 12


def test_each_form_is_tuned_and_explained_by_its_own_plan() -> None:
    x, hessian = points(), estimated(network())
    for of, call in (("diagonal", hessian.diagonal), ("laplacian", hessian.laplacian)):
        plan = hessian.tune(x, of=of, budget_s=0.3, effort="quick")
        assert plan.source == "search"
        call(x)
        assert hessian.plan(x, of=of).method == plan.method
        assert hessian.explain(x, of=of).splitlines()[1] == f"plan: {plan}"
    assert hessian.plan(x).source == "estimate"
    assert "derivatives by columns" in hessian.explain(x, of="laplacian")
    assert "diagonal Jacobian" in hessian.explain(x, of="diagonal")
    with pytest.raises(OptionError, match=r"must be one of 'hessian'.*did you mean 'laplacian'"):
        hessian.tune(x, of="laplace")  # type: ignore[arg-type]
    grid = estimated(lambda x: x.prod(-1), batch_dims=2)
    assert "derivatives by columns" in grid.explain(x.reshape(2, 2, 3), of="laplacian")
