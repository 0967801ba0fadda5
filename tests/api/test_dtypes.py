"""Every precision: near the float64 truth of the same rounded problem; and no complex numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import autojac
from autojac import AutoJacobian
from autojac.autodiff.tolerance import tolerance
from autojac.methods.base import registry
from autojac.problem.reference import Reference
from harness import compare, planned, wrapped
from oracle import jacobian_blocks
from scenarios import BY_NAME, Draw, Scenario

HALVES = [torch.bfloat16, torch.float16]
# modules, which the oracle can double, and functions that capture nothing
WELL_CONDITIONED = [
    BY_NAME[name]
    for name in (
        "sin",
        "robot arm",
        "cumsum in a sample",
        "softmax last",
        "MLP, square",
        "LayerNorm inside",
        "BatchNorm in eval mode",
        "image convolution",
        "bilinear upsampling",
        "GRU cell",
        "LSTM cell, states nested",
        "attention of three axes",
        "two inputs, two masks, two outputs",
        "weight and bias",
        "namedtuple in, namedtuple out",
        "argnums out of order, nested",
        "minus the batch mean",
        "attention over the batch",
    )
]


def near(actual: Any, expected: Any, dtype: torch.dtype, slack: float = 1.0) -> None:
    """Equal nests, up to the tolerance of a dtype relative to the largest entry of each tensor."""
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    for one, other in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        assert one.shape == other.shape
        error, scale = (one.detach().double() - other).abs().amax(), other.abs().amax()
        assert float(error) <= slack * tolerance(dtype) * float(scale)


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def estimated(func: Any, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


def network() -> nn.Module:
    return Draw(0, torch.float32).mlp(3, 8, 8, 3)


@pytest.mark.by_day(3)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("scenario", WELL_CONDITIONED, ids=str)
def test_jacobian_is_near_the_exact_one_of_the_rounded_problem(scenario: Scenario, dtype: torch.dtype) -> None:
    func, args, kwargs = scenario.make(0, dtype)
    exact = jacobian_blocks(func, args, scenario.argnums, shared=scenario.shared, kwargs=kwargs, to_double=True)
    value, jacobian = wrapped(scenario, func).value_and_jacobian(*args, **kwargs)
    near(jacobian, exact, dtype)
    assert {leaf.dtype for leaf in pytree.tree_leaves((value, jacobian))} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_tuned_plan_is_as_near(dtype: torch.dtype) -> None:
    net, x = network().to(dtype), torch.randn(16, 3).to(dtype)
    exact = jacobian_blocks(net, (x,), to_double=True)
    near(AutoJacobian(net, on_miss="tune", budget_s=0.5, store=":memory:")(x), exact, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["around the call", "inside func"])
def test_autocast(dtype: torch.dtype, inside: bool) -> None:
    net, x = network(), torch.randn(16, 3)
    exact = jacobian_blocks(net, (x,), to_double=True)

    def func(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return net(x)

    with torch.autocast("cpu", dtype=dtype, enabled=not inside):
        value, jacobian = estimated(func if inside else net).value_and_jacobian(x)
    assert value.dtype == dtype
    assert jacobian.dtype == torch.float32
    near(jacobian, exact, dtype, slack=2)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_plan_made_under_autocast_is_not_used_without(dtype: torch.dtype) -> None:
    net, x = network(), torch.randn(16, 3)
    jac = estimated(net)
    exact = jacobian_blocks(net, (x,), to_double=True)
    with torch.autocast("cpu", dtype=dtype):
        near(jac(x), exact, dtype, slack=2)
    near(jac(x), exact, torch.float32)
    assert "2 plans" in repr(jac)


@pytest.mark.parametrize(
    ("given", "returned"),
    [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("dense", [False, True], ids=["independent", "dense"])
def test_output_of_another_dtype_than_the_input(given: torch.dtype, returned: torch.dtype, dense: bool) -> None:
    def func(x: Tensor) -> Tensor:
        y = x.to(returned).sin()
        return y - y.mean(0) if dense else y

    x = torch.randn(5, 3).to(given)
    jacobian = estimated(func)(x)
    assert jacobian.dtype == given
    coarse = max(given, returned, key=lambda dtype: torch.finfo(dtype).eps)
    near(jacobian, torch.diag_embed(x.double().cos()) * (1 - 1 / 5 if dense else 1), coarse)


def test_every_method_gives_the_dtype_of_the_input() -> None:
    x = torch.randn(5, 3)
    request, seen, problem = planned(lambda x: x.double().sin(), (x,))
    reference = Reference(problem, request.leaves, {}, seen.sandbox)
    methods = [method for kind in registry().values() for method in kind.candidates(problem, 1)]
    for method in methods:
        if not method.compiles and method.unsupported(problem) is None:
            assert reference.check(method.prepare(problem)(request.leaves, {})) is None, method


def test_inputs_of_different_dtypes_keep_their_own() -> None:
    x, z = torch.randn(5, 3), doubles(5, 3)
    by_x, by_z = estimated(lambda x, z: x.double() * z, argnums=(0, 1))(x, z)
    assert (by_x.dtype, by_z.dtype) == (torch.float32, torch.float64)
    near((by_x, by_z), (torch.diag_embed(z), torch.diag_embed(x.double())), torch.float32)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_matter(default: torch.dtype) -> None:
    before, x = torch.get_default_dtype(), torch.randn(5, 3)
    torch.set_default_dtype(default)
    try:
        jacobian = estimated(lambda x: x.sin() - 1e-3 * x.mean(0))(x)
    finally:
        torch.set_default_dtype(before)
    assert jacobian.dtype == torch.float32
    exact = torch.diag_embed(x.double().cos()) - 1e-3 / 5 * torch.eye(3, dtype=torch.float64)
    near(jacobian, exact, torch.float32)


COMPLEX = torch.ones(4, 2, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("error", "func", "x"),
    [
        (autojac.InputError, torch.abs, COMPLEX),
        (autojac.InputError, lambda x: x["z"].abs() * x["r"], {"r": COMPLEX.real.clone(), "z": COMPLEX}),
        (autojac.OutputError, torch.fft.fft, COMPLEX.real.clone()),
        (autojac.OutputError, lambda x: {"real": x, "more": [torch.fft.rfft(x)]}, COMPLEX.real.clone()),
    ],
    ids=["input", "nested input", "output", "nested output"],
)
@pytest.mark.parametrize("use", ["__call__", "value_and_jacobian", "tune", "plan", "explain"])
def test_complex_numbers_are_refused_with_a_way_out(error: type[Exception], func: Any, x: Any, use: str) -> None:
    with pytest.raises(error, match=r"torch\.view_as_real"):
        getattr(estimated(func), use)(x)


def test_a_complex_side_input_is_no_obstacle() -> None:
    x, c = doubles(4, 3), torch.randn(4, 3, dtype=torch.complex128)
    compare(estimated(lambda x, c: (x * c).imag)(x, c), torch.diag_embed(c.imag))
