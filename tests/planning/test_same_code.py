"""Functions made anew in each step of a loop: right each time, begun with the last plan, and told once."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autojac import AutoJacobian, PerformanceWarning
from autojac.planning import same_code
from autojac.planning.search import optimize
from harness import compare
from oracle import jacobian_blocks


def scaled(x: Tensor, factor: float) -> Tensor:
    return factor * x.sin()


def weighted(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: weight * x.sin()


def shifted(by: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.sin() + x.roll(by, 0) * bool(by)


KINDS: dict[str, Callable[[float], Callable[..., Any]]] = {
    "a closure": lambda c: lambda x: c * x.sin(),
    "a default": lambda c: lambda x, c=c: c * x.sin(),
    "a partial": lambda c: functools.partial(scaled, factor=c),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_changes_with_each_wrapper_is_named_once(kind: str) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for turn in range(2 * same_code.TOLD_AT):
            func = KINDS[kind](1.0 + turn)
            compare(AutoJacobian(func, store=":memory:")(x), jacobian_blocks(func, (x,)))
    (one,) = [warning for warning in told if issubclass(warning.category, PerformanceWarning)]
    name = "factor" if kind == "a partial" else "c"
    assert f"another value of `{name}`" in str(one.message)
    assert "outside of the loop" in str(one.message)


def test_equal_functions_and_other_tensors_are_no_reason_to_warn() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    for _ in range(2 * same_code.TOLD_AT):
        weight = torch.randn(3, dtype=torch.float64)
        compare(AutoJacobian(lambda x, c=2.0: c * x.sin(), store=":memory:")(x), torch.diag_embed(2 * x.cos()))
        func = weighted(weight)
        compare(AutoJacobian(func, store=":memory:")(x), jacobian_blocks(func, (x,)))


def test_the_next_function_starts_from_the_last_ones_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    hints: list[Any] = []
    real = optimize.search

    def watched(problem: Any, **options: Any) -> Any:
        hints.append([method.spec() for method in options["prior"].hints])
        return real(problem, **options)

    monkeypatch.setattr(optimize, "search", watched)
    AutoJacobian(KINDS["a closure"](1.0), store=":memory:")(x)
    one = AutoJacobian(KINDS["a closure"](2.0), store=":memory:")
    one(x)
    assert not hints[0]
    assert hints[-1] == [one.plan(x).method]


def test_a_plan_of_another_constant_is_never_trusted() -> None:
    """The constant decides whether samples couple."""
    x = torch.randn(5, 3, dtype=torch.float64)
    for shift in (0, 1, 0, 2):
        func = shifted(shift)
        compare(AutoJacobian(func, store=":memory:")(x), jacobian_blocks(func, (x,)))
