"""Outputs, samples and inputs of very different scales: what is small is looked at as closely as what is large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import autojac
from autojac import AutoJacobian, StructureChangedWarning, jacobian_from
from autojac.methods.pull import Pull
from autojac.methods.replay import Replay
from autojac.problem.reference import Reference
from harness import forced, planned
from oracle import jacobian_blocks

BATCH = 6


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def finite(x: Tensor) -> Tensor:
    assert torch.isfinite(x).all()
    return x


FRONTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "nan_to_num": torch.nan_to_num,
    "clamp": lambda x: x.clamp(-1e6, 1e6),
    "where": lambda x: torch.where(x.isnan(), torch.zeros_like(x), x),
    "finite": finite,
    "Function": Same.apply,
    "branch": lambda x: x * 1 if x.amax() < 1e2 else x * 2,
}


def heavy(scale: float, like: Tensor) -> Tensor:
    """A factor per sample: one is heavy."""
    return torch.tensor([scale, *[1.0] * (BATCH - 1)]).to(like)[:, None]


COUPLED: dict[str, Callable[[Tensor, float], Any]] = {
    "centered columns beside a large one": lambda h, s: torch.cat([s * h.sin()[:, :1], h - h.mean(0)], 1),
    "neighbours beside a large one": lambda h, s: torch.cat([s * h.sin()[:, :1], h * h.roll(1, 0)], 1),
    "tiny columns": lambda h, s: torch.cat([h.sin()[:, :1], (h - h.mean(0)) / s], 1),
    "beside a large sample": lambda h, s: heavy(s, h) * h.sin() + (h - h.mean(0)),
    "an output beside a large one": lambda h, s: (s * h.sin(), h - h.mean(0)),
    "a tiny input": lambda h, s: h[:, 1:].sin() + (h[:, :1] - h[:, :1].mean(0)) / s,
    "beside an offset": lambda h, s: torch.cat([s**0.5 + h.sin()[:, :1], h - h.mean(0)], 1),
}
SCALES = [(torch.float32, 1e10), (torch.float64, 1e19)]


def rowwise(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    """Each sample's derivative of each output coordinate agrees by its own scale."""
    for one, other in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        scale = other.abs().amax(-1) + torch.finfo(dtype).tiny
        assert ((one.double() - other).abs().amax(-1) <= 1e3 * torch.finfo(dtype).eps * scale).all()


@pytest.mark.by_day(2)
@pytest.mark.parametrize(
    ("kind", "front"),
    [(kind, "nan_to_num") for kind in COUPLED] + [(next(iter(COUPLED)), front) for front in FRONTS],
)
@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=["float32", "float64"])
def test_small_coupling_is_found_beside_large_numbers(kind: str, front: str, dtype: torch.dtype, scale: float) -> None:
    def func(x: Tensor) -> Any:
        return COUPLED[kind](FRONTS[front](x), scale)

    x = torch.randn(BATCH, 3, dtype=dtype)
    right = jacobian_blocks(func, (x.double(),))
    assert not autojac.probe(func, x).independent
    if kind != "a tiny input":  # its derivatives are compared by the scale of the row
        jac = AutoJacobian(func, on_miss="estimate", store=":memory:")
        for _ in range(2):
            rowwise(jac(x), right, dtype)
    leaf = x.clone().requires_grad_()
    rowwise(jacobian_from(func(leaf), leaf), right, dtype)


@pytest.mark.parametrize("kind", ["columns", "sample", "outputs", "inputs"])
@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=["float32", "float64"])
def test_independent_samples_of_many_scales_stay_independent(kind: str, dtype: torch.dtype, scale: float) -> None:
    sizes = torch.tensor([scale, 1.0, 1 / scale]).to(dtype)

    def func(x: Tensor) -> Any:
        h = torch.nan_to_num(x)
        if kind == "outputs":
            return h.sin(), h.softmax(1) * scale
        if kind == "sample":
            return heavy(scale, h) * h.softmax(1)
        return h.softmax(1) * sizes if kind == "columns" else (h * sizes).tanh().softmax(1)

    x = torch.randn(BATCH, 3, dtype=dtype)
    assert autojac.probe(func, x / sizes if kind == "inputs" else x).independent


@pytest.mark.parametrize("scale", [1e10, 1e-10])
def test_a_wrong_gradient_through_small_entries_is_seen(scale: float) -> None:
    def func(x: Tensor) -> Tensor:
        return torch.cat([1e10 * x.sin()[:, :1], x[:, 1:] ** 3], 1) * scale

    x = torch.randn(BATCH, 3).requires_grad_()
    request, seen, problem = planned(func, (x,))
    reference = Reference(problem, request.leaves, {}, seen.sandbox)
    result = Pull("shared", "loop").prepare(problem)(request.leaves, {})
    assert reference.check(result) is None
    assert reference.check_gradient(result) is None
    ((J,),) = result.jacobians
    wrong = torch.cat([J[:, :1], J[:, 1:].detach()], 1)
    assert "gradient through J" in str(reference.check_gradient(result._replace(jacobians=((wrong,),))))


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("shape", [(2, 1), (3, 1), (4, 4)])
def test_rounding_about_a_derivative_of_zero_is_granted_and_nothing_else(
    shape: tuple[int, ...], differentiable: bool
) -> None:
    # of one number a group: terms of 300 cancel; with a graph another kernel computes, exactly
    def func(x: Tensor) -> Tensor:
        return torch.nn.functional.group_norm(x, shape[1])

    for seed in range(3):
        x = torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x = (x + 0.1).requires_grad_(differentiable)
        if differentiable:
            assert float(jacobian_from(func(x), x, create_graph=True).detach().abs().max()) < 1e-11
        request, seen, problem = planned(func, (x,))
        reference = Reference(problem, request.leaves, {}, seen.sandbox)
        result = Pull("shared", "loop").prepare(problem)(request.leaves, {})
        ((J,),) = result.jacobians
        for noise in (0.0, 1e-14):
            J = torch.full_like(J, noise)
            assert reference.check(result._replace(jacobians=((J,),))) is None
        for wrong in (1e-9, 1.0):
            J = torch.zeros_like(J).flatten().index_fill(0, torch.tensor([-1]), wrong).view_as(J)
            assert "is off by" in str(reference.check(result._replace(jacobians=((J,),))))


def cancelling(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, (64,)).sum(1)


@pytest.mark.parametrize(
    ("func", "x", "by_rounding"),
    [
        (cancelling, torch.randn(BATCH, 64), 3e-6),
        (cancelling, torch.randn(1, 64), 1e-6),
        # a step down leads across a jump, one up does not
        (lambda x: (x.floor() - x).sum(1), torch.arange(BATCH * 64.0).reshape(BATCH, 64) % 4 + 1, 1e-5),
    ],
    ids=["all samples", "one sample", "jumps"],
)
def test_rounding_of_values_that_cancel_is_granted_and_nothing_else(
    func: Callable[[Tensor], Tensor], x: Tensor, by_rounding: float
) -> None:
    call, report, problem = planned(func, (x,), effort="estimate", coupling="dense")
    result = Pull("identity", "loop").prepare_call(problem)(call.leaves, call.keywords)
    for added, right in ((by_rounding, True), (0.02, False)):
        reference = Reference(problem, call.leaves, call.keywords, report.sandbox)
        (value,) = result.values
        found = reference.check(
            result._replace(values=(value.index_add(0, torch.tensor([len(x) - 1]), torch.tensor([added])),))
        )
        assert (found is None) == right, found
        assert right or "the value is off by" in str(found)


@pytest.mark.parametrize("seed", range(3))
def test_a_transformer_whose_outputs_sum_to_zero_is_served_by_its_first_plan(seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = torch.randn(4, 5, 16)
    jac = AutoJacobian.of_parameters(layer, store=":memory:", on_miss="estimate")
    assert jac.gradient_norms(x, torch.ones_like(x)).shape == (4,)


class Later:
    """Independent until switched on, then its small outputs couple."""

    def __init__(self, kind: str, scale: float) -> None:
        self.kind, self.scale, self.on = kind, scale, False

    def __call__(self, x: Tensor) -> Tensor:
        other = {"roll": x.roll(1, 0), "mean": x.mean(0).expand_as(x)}[self.kind] if self.on else torch.zeros_like(x)
        return torch.cat([self.scale * x[:, :1].sin(), x.sin() + other], 1)[:, :3]


@pytest.mark.by_day(3)
@pytest.mark.parametrize("layout", ["blocks", "diagonal", "full", "sparse"])
@pytest.mark.parametrize("kind", ["roll", "mean"])
@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=["float32", "float64"])
def test_the_guard_sees_small_coupling(kind: str, layout: str, dtype: torch.dtype, scale: float) -> None:
    func = Later(kind, scale)
    x = torch.randn(BATCH, 3, dtype=dtype)
    structure = autojac.Structure("independent", "declared")
    jac = AutoJacobian(func, on_miss="estimate", store=":memory:", layout=layout, verify="always", coupling=structure)
    jac(x)
    func.on = True
    with pytest.warns(StructureChangedWarning, match="does not hold"):
        jac(x)


@pytest.mark.parametrize(
    "method", [Pull("shared", "loop"), Pull("shared", "batched"), Replay(Pull("shared", "batched"))], ids=str
)
def test_no_method_hides_it_from_the_guard(method: Any) -> None:
    def func(x: Tensor, z: Tensor) -> Tensor:
        return torch.cat([1e10 * x.sin()[:, :1], x + z * x.roll(1, 0)], 1)

    x, off, on = torch.randn(BATCH, 3), torch.zeros(BATCH, 1), torch.ones(BATCH, 1)
    options = {"coupling": "independent", "verify": "always"}
    jac = forced(func, (x, off), method.spec(), **options)
    jac(x, off)
    with pytest.warns(StructureChangedWarning, match="does not hold"):
        J = jac(x, on)
    rowwise(J, jacobian_blocks(func, (x.double(), on.double())), torch.float32)
