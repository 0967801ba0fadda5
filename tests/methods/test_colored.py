"""Colored Jacobians: every layout, every engine, with patterns that are declared; and what a wrong pattern leads to."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import autojac
import autojac.sparse.colorings
from autojac import AutoJacobian, Pattern, Sparsity, Structure
from autojac.methods.base import build, registry
from autojac.problem.empty_events import without_empty_parts
from autojac.problem.problem import Problem
from harness import Counted, planned
from oracle import jacobian_full
from scenarios.arrays import arrowhead

COLORED = [
    {"method": name, "engine": engine, "chunk": chunk}
    for name, engines in (("ColoredPull", ("loop", "vmap", "batched")), ("ColoredPush", ("loop", "vmap")))
    for engine, chunk in itertools.product(engines, (None, 2))
]


def named(spec: dict[str, Any]) -> str:
    return "-".join(map(str, spec.values()))


def stencil(x: Tensor) -> Tensor:
    """Burgers' equation on a ring."""
    left, right = torch.roll(x, 1, -1), torch.roll(x, -1, -1)
    return 0.1 * (left - 2 * x + right) - x * (right - left) / 2


def differences(x: Tensor) -> Tensor:
    return (x[:, 1:] - x[:, :-1]) ** 2


def neighbours(x: Tensor) -> Tensor:
    """Each sample with the next and the one after the next."""
    return torch.sin(x) * torch.roll(x, -1, 0).sum(-1, keepdim=True) + torch.roll(x, -2, 0) ** 2


def pairs(x: Tensor) -> Tensor:
    """Groups of two samples, and features that stay apart."""
    groups = x.view(-1, 2, x.shape[1])
    return (groups * groups.sum(1, keepdim=True)).view(x.shape)


def partly(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two outputs; the second of another shape, with an empty row and an input that nothing reads."""
    first = x[:, :3] * x[:, 1:4]
    return first, torch.stack((x[:, :2].prod(-1), torch.ones_like(x[:, 0])), -1).unsqueeze(1)


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "stencil": (stencil, (3, 9)),
    "square": (stencil, (9, 9)),
    "differences": (differences, (4, 6)),
    "neighbours": (neighbours, (7, 3)),
    "pairs": (pairs, (6, 4)),
    "partly": (partly, (3, 5)),
    "one sample": (stencil, (1, 6)),
    "nothing": (lambda x: torch.ones_like(x) * x.detach().sign(), (3, 4)),
}

RECTANGULAR = ("differences", "partly")


def truth(func: Callable[..., Any], x: Tensor) -> list[Tensor]:
    """For each output the oracle's whole Jacobian as (B, m, B, n)."""
    whole = jacobian_full(func, (x,))
    wholes = [whole] if isinstance(whole, Tensor) else list(whole)
    return [one.reshape(len(x), -1, len(x), x[0].numel()) for one in wholes]


def structure_of(wholes: list[Tensor]) -> Structure:
    """A declaration that covers some Jacobians."""
    entries = [one != 0 for one in wholes]
    features = Pattern.of(torch.cat([one.any(2).any(0) for one in entries]))
    own = torch.eye(len(wholes[0]), dtype=torch.bool)
    samples = torch.stack([one.any(3).any(1) for one in entries]).any(0) | own
    if torch.equal(samples, own):
        return Structure("independent", "declared", sparsity=Sparsity(None, features))
    return Structure("sparse", "declared", False, sparsity=Sparsity(Pattern.of(samples), features))


def arranged(wholes: list[Tensor], layout: str) -> list[Tensor]:
    """The oracle's Jacobians in a layout; a sparse one as its dense matrix."""
    if layout in ("full", "sparse"):
        return [one.reshape(one.shape[0] * one.shape[1], -1) for one in wholes]
    own = [one.diagonal(dim1=0, dim2=2).movedim(-1, 0) for one in wholes]
    return [one.diagonal(dim1=1, dim2=2) for one in own] if layout == "diagonal" else own


def posed(name: str, layout: str) -> tuple[Problem, Tensor, list[Tensor]]:
    """A function as its methods see it, a point, and the oracle's Jacobians in the layout."""
    func, shape = FUNCTIONS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wholes = truth(func, x)
    problem = planned(func, (x,), layout=layout, coupling=structure_of(wholes))[2]
    return problem, x, arranged(wholes, layout)


def dense(problem: Problem, jacobian: Tensor, output: int) -> Tensor:
    return problem.entries(output, 0).matrix(jacobian).to_dense() if problem.layout == "sparse" else jacobian


@pytest.mark.by_day(6)
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (name, layout)
        for name in FUNCTIONS
        for layout in ("blocks", "full", "sparse", "diagonal")
        if layout != "diagonal" or name not in RECTANGULAR
    ],
)
def test_every_method_is_right_in_every_layout(name: str, layout: str) -> None:
    problem, x, expected = posed(name, layout)
    tried = set()
    for method in (*map(build, COLORED), *(m for kind in registry().values() for m in kind.candidates(problem, 0))):
        if method.unsupported(problem) is None and not method.compiles:
            found = method.prepare_call(without_empty_parts(problem))([x], {})
            for output, (one, right) in enumerate(zip(found.jacobians, expected, strict=True)):
                got = dense(problem, one[0], output).reshape(right.shape)
                torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12, msg=lambda m, r=method: f"{r}: {m}")
            tried.add(type(method).__name__)
    assert layout != "sparse" or {"ColoredPull", "ColoredPush"} <= tried


@pytest.mark.by_day(3)
@pytest.mark.parametrize("spec", COLORED, ids=named)
@pytest.mark.parametrize("layout", ["blocks", "sparse"])
@pytest.mark.parametrize("name", ["stencil", "neighbours"])
def test_the_graph_behind_colors_is_right(name: str, layout: str, spec: dict[str, Any]) -> None:
    func, shape = FUNCTIONS[name]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wholes = truth(func, x.detach())
    problem = planned(func, (x,), layout=layout, coupling=structure_of(wholes))[2]
    weight = torch.randn(shape[0] * shape[1], shape[0] * shape[1], dtype=torch.float64)

    def weighed(jacobian: Tensor) -> Tensor:
        if layout == "sparse":
            return (problem.entries(0, 0).matrix(jacobian) @ weight).sin().sum()
        return (jacobian * weight[: shape[1], : shape[1]]).sin().sum()

    jacobian = build(spec).prepare_call(problem)([x], {}).jacobians[0][0]
    (found,) = torch.autograd.grad(weighed(jacobian), x)
    plain = (
        build({"method": "Pull", "seeds": "identity", "engine": "loop"}).prepare_call(problem)([x], {}).jacobians[0][0]
    )
    (right,) = torch.autograd.grad(weighed(plain), x)
    torch.testing.assert_close(found, right)
    assert found.abs().max() > 0


def test_func_runs_once_and_colors_are_pulled() -> None:
    counted = Counted(stencil)
    x = torch.randn(3, 9)
    problem = planned(counted, (x,), layout="sparse", coupling=structure_of(truth(stencil, x)))[2]
    before = counted.calls
    compute = build(COLORED[0]).prepare_call(problem)
    compute([x], {})
    assert counted.calls == before + 1
    before = counted.calls
    build({"method": "ColoredPush", "engine": "loop"}).prepare_call(problem)([x], {})
    assert counted.calls == before + 3  # nine columns of a ring in three colors


def test_a_sparse_jacobian_goes_into_products_and_solvers() -> None:
    jac = AutoJacobian(neighbours, layout="sparse", store=":memory:", effort="estimate")
    x = torch.randn(6, 2, dtype=torch.float64)
    J = jac(x)
    assert J.layout == torch.sparse_csr
    assert J.shape == (12, 12)
    right = arranged(truth(neighbours, x), "sparse")[0]
    v = torch.randn(12, 3, dtype=torch.float64)
    torch.testing.assert_close(J @ v, right @ v)
    torch.testing.assert_close(torch.from_numpy(autojac.to_scipy(J) @ v.numpy()), right @ v)
    autojac.verify(J, neighbours, x, layout="sparse")
    with pytest.raises(autojac.VerificationError, match="is wrong"):
        autojac.verify(J * 1.01, neighbours, x, layout="sparse")
    with pytest.raises(autojac.VerificationError, match="sparse CSR Jacobian of shape"):
        autojac.verify(right, neighbours, x, layout="sparse")
    with pytest.raises(autojac.InputError, match="sparse CSR tensor"):
        autojac.to_scipy(right)


def without(pattern: Pattern, entry: int) -> Pattern:
    """A pattern that lacks one entry."""
    kept = pattern.scipy().copy()
    kept.data[entry] = 0
    return Pattern.of(kept)


@settings(max_examples=10)
@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning")
@given(data=st.data(), layout=st.sampled_from(["blocks", "full", "sparse", "diagonal"]))
def test_a_pattern_that_misses_an_entry_is_caught(data: st.DataObject, layout: str) -> None:
    x = torch.randn(data.draw(st.integers(1, 4)), data.draw(st.integers(3, 8)), dtype=torch.float64)
    wholes = truth(stencil, x)
    features = structure_of(wholes).sparsity.features
    entry = data.draw(st.integers(0, features.count - 1))
    wrong = Structure("independent", "declared", sparsity=Sparsity(None, without(features, entry)))
    jac = AutoJacobian(stencil, layout=layout, coupling=wrong, store=":memory:", effort="estimate")
    found = jac(x)
    found = found.to_dense() if layout == "sparse" else found
    torch.testing.assert_close(found.reshape(arranged(wholes, layout)[0].shape), arranged(wholes, layout)[0])


@settings(max_examples=10)
@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning")
@given(data=st.data(), layout=st.sampled_from(["blocks", "full", "sparse"]))
def test_a_sample_graph_that_misses_an_edge_is_caught(data: st.DataObject, layout: str) -> None:
    x = torch.randn(data.draw(st.integers(4, 9)), 2, dtype=torch.float64)
    wholes = truth(neighbours, x)
    structure = structure_of(wholes)
    samples = structure.sparsity.samples
    off = [e for e in range(samples.count) if samples.rows[e] != samples.columns[e]]
    missing = without(samples, data.draw(st.sampled_from(off)))
    wrong = Structure("sparse", "declared", False, sparsity=Sparsity(missing, structure.sparsity.features))
    jac = AutoJacobian(neighbours, layout=layout, coupling=wrong, store=":memory:", effort="estimate")
    found = jac(x)
    found = found.to_dense() if layout == "sparse" else found
    torch.testing.assert_close(found.reshape(arranged(wholes, layout)[0].shape), arranged(wholes, layout)[0])


def test_a_pattern_that_stops_holding_is_noticed_and_mended() -> None:
    reach = [1]

    def func(x: Tensor) -> Tensor:
        return x * torch.roll(x, reach[0], -1)

    x = torch.randn(3, 8, dtype=torch.float64)
    structure = structure_of(truth(func, x))
    jac = AutoJacobian(func, layout="sparse", coupling=structure, store=":memory:", effort="estimate", verify="always")
    jac(x)
    reach[0] = 2
    with pytest.warns(autojac.StructureChangedWarning):
        found = jac(x)
    torch.testing.assert_close(found.to_dense(), arranged(truth(func, x), "sparse")[0])


def test_index_tensors_of_other_content_are_checked() -> None:
    def func(x: Tensor, index: Tensor) -> Tensor:
        return x * x[index]

    x = torch.randn(8, 2, dtype=torch.float64)
    index = torch.roll(torch.arange(8), 1)
    wholes = truth(lambda z: func(z, index), x)
    declared = structure_of(wholes)
    structure = Structure("sparse", "declared", False, sparsity=declared.sparsity, depends_on_arguments=True)
    jac = AutoJacobian(func, coupling=structure, store=":memory:", effort="estimate", in_dims=(0, None), layout="full")
    for _ in range(5):
        jac(x, index)
    index.copy_(torch.roll(index, 1))
    found = jac(x, index)
    torch.testing.assert_close(found.reshape(16, 16), arranged(truth(lambda z: func(z, index), x), "full")[0])


@pytest.mark.parametrize("layout", ["blocks", "full", "sparse"])
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_rows_and_columns_together_need_few_colors(layout: str, engine: str) -> None:
    x = torch.randn(2, 12, dtype=torch.float64)
    wholes = truth(arrowhead, x)
    counted = Counted(arrowhead)
    problem = planned(counted, (x,), layout=layout, coupling=structure_of(wholes))[2]
    method = build({"method": "ColoredBoth", "engine": engine})
    assert method.unsupported(problem) is None
    compute = method.prepare_call(problem)
    before = counted.calls
    found = dense(problem, compute([x], {}).jacobians[0][0], 0)
    assert counted.calls - before <= 4
    right = arranged(wholes, layout)[0]
    torch.testing.assert_close(found.reshape(right.shape), right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 5)])
def test_a_sparse_jacobian_of_next_to_nothing(shape: tuple[int, int]) -> None:
    found = AutoJacobian(stencil, layout="sparse", store=":memory:", effort="estimate")(torch.randn(shape))
    assert found.layout == torch.sparse_csr
    assert found.shape == (shape[0] * shape[1],) * 2


def test_sparse_jacobians_nest_and_a_shared_input_has_columns_once() -> None:
    def func(x: Tensor, w: Tensor) -> dict[str, Tensor]:
        return {"a": (x * w).sin(), "b": x[:, :0]}

    jac = AutoJacobian(func, argnums=(0, 1), in_dims=(0, None), layout="sparse", store=":memory:", effort="estimate")
    x, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    found = jac(x, w)
    assert [one.shape for one in found["b"]] == [(0, 12), (0, 3)]
    right = jacobian_full(lambda x, w: func(x, w)["a"], (x, w), (0, 1))
    for one, other in zip(found["a"], right, strict=True):
        torch.testing.assert_close(one.to_dense(), other.reshape(one.shape))


def test_without_a_batch_a_sparse_jacobian_is_that_of_all_coordinates() -> None:
    jac = AutoJacobian(lambda x: x.roll(1) * x, in_dims=None, layout="sparse", store=":memory:", effort="estimate")
    x = torch.randn(6, dtype=torch.float64)
    assert jac(x)._nnz() == 12
    torch.testing.assert_close(jac(x).to_dense(), jacobian_full(lambda x: x.roll(1) * x, (x,)))


def test_inside_a_transform_a_sparse_matrix_is_refused_by_name() -> None:
    jac = AutoJacobian(stencil, layout="sparse", store=":memory:", effort="estimate")
    jac(torch.randn(2, 5))
    with pytest.raises(autojac.UnsupportedError, match="no sparse matrices"):
        torch.func.vmap(jac)(torch.randn(3, 2, 5))


def test_a_declared_pattern_of_another_shape_is_refused() -> None:
    declared = Structure("independent", sparsity=Sparsity(None, Pattern.diagonal(4)))
    with pytest.raises(autojac.OptionError, match=r"shape \(4, 4\).*needs \(9, 9\)"):
        AutoJacobian(stencil, coupling=declared, store=":memory:")(torch.randn(3, 9))


def test_a_graph_of_samples_belongs_to_its_batch() -> None:
    jac = AutoJacobian(neighbours, layout="full", store=":memory:", effort="estimate")
    for batch in (8, 7, 8, 5):
        x = torch.randn(batch, 3, dtype=torch.float64)
        torch.testing.assert_close(jac(x), jacobian_full(neighbours, (x,)))


@pytest.mark.by_day(2)
@pytest.mark.parametrize("layout", ["blocks", "sparse"])
def test_colors_compile_and_go_through_slices_of_the_batch(layout: str) -> None:
    problem, x, expected = posed("stencil", layout)
    colored = {"method": "ColoredPull", "engine": "vmap"}
    compiled = {"method": "Compiled", "inner": {"method": "Replay", "inner": colored}}
    for spec in (compiled, {"method": "BatchChunk", "size": 2, "inner": colored}):
        method = build(spec)
        assert method.unsupported(problem) is None
        found = dense(problem, method.prepare_call(problem)([x], {}).jacobians[0][0], 0)
        torch.testing.assert_close(found.reshape(expected[0].shape), expected[0], rtol=1e-12, atol=1e-12)


def test_patterns_and_colors_are_taken_from_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 3, dtype=torch.float64)
    first = AutoJacobian(neighbours, layout="sparse", store=tmp_path / "plans.db", effort="estimate")(x)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this was done before")

    for name in ("orthogonal", "apart", "both"):
        monkeypatch.setattr(sys.modules["autojac.sparse.colorings"], name, never)
    monkeypatch.setattr(sys.modules["autojac.probe"], "find_feature_pattern", never)
    monkeypatch.setattr(sys.modules["autojac.probe.coupling"], "find_sample_graph", never)
    again = AutoJacobian(neighbours, layout="sparse", store=tmp_path / "plans.db", effort="estimate")
    torch.testing.assert_close(again(x).to_dense(), first.to_dense())
    assert again.plan(x).source == "store"
    assert again.plan(x).structure.samples is not None


def test_the_colors_are_explained() -> None:
    x = torch.randn(3, 9)
    structure = structure_of(truth(stencil, x))
    jac = AutoJacobian(stencil, coupling=structure, store=":memory:", effort="estimate")
    assert "colors: passes for 3 of 9 rows or 3 of 9 columns" in jac.explain(x)
