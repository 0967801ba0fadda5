"""Forward and reverse mode may disagree: reverse mode's number is returned, and the user is told what a step says."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac import AutoJacobian, ModesDisagreeWarning
from harness import compare
from oracle import jacobian_blocks
from scenarios import Scenario, select


def estimated(func: Any, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


def gated(x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = x.sum(-1, keepdim=True).sin()
    return x * gate


class WrongPush(torch.autograd.Function):
    """A square whose forward formula forgot a factor."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return ctx.saved_tensors[0] * tangent


class StraightThrough(torch.autograd.Function):
    """Rounds, and passes gradients through in both modes."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_difference_that_sides_with_forward_mode_is_told(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, dtype=dtype)
    jac = estimated(gated)
    with pytest.warns(ModesDisagreeWarning, match="finite difference in float64 agrees with forward mode") as told:
        J = jac(x)
    assert len(told) == 1
    compare(J, jacobian_blocks(gated, (x,)), rtol=1e-6)
    compare(jac(2 * x), jacobian_blocks(gated, (2 * x,)), rtol=1e-6)
    assert "forward and reverse mode disagree" in jac.explain(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_that_sides_with_reverse_mode_is_explained(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, dtype=dtype)
    jac = estimated(WrongPush.apply)
    compare(jac(x), jacobian_blocks(WrongPush.apply, (x,)), rtol=1e-6)
    assert "disagree" in jac.explain(x) and "finite difference in float64 agrees with reverse mode" in jac.explain(x)


def test_no_forward_candidate_wins_where_modes_disagree() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    jac = AutoJacobian(gated, store=":memory:", on_miss="tune", budget_s=2.0)
    with pytest.warns(ModesDisagreeWarning):
        plan = jac.plan(x)
    fates = {trial.state for trial in plan.trials if trial.method["method"] == "Push"}
    assert "complete" not in fates and "rejected" in fates


@pytest.mark.parametrize(
    "func",
    [StraightThrough.apply, lambda x: x + (x.round() - x).detach(), torch.sin, nn.Linear(3, 2).double()],
    ids=["Function", "detach", "sin", "linear"],
)
def test_what_both_modes_say_is_no_news(func: Any) -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(estimated(func)(x).detach(), jacobian_blocks(func, (x,)))
        assert any("modes" in line for line in autojac.probe(func, x).evidence)


@pytest.mark.by_day(4)
@pytest.mark.parametrize("scenario", select(lacking=("mutates_input", "modes_differ")), ids=str)
def test_no_false_alarm(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make(3, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ModesDisagreeWarning)
        autojac.probe(func, *args, argnums=scenario.argnums, **kwargs)
