"""Loops that the whole batch stops or paces: what declaring them independent would assume and save is said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac import AutoJacobian, SearchError
from autojac.autodiff import pullback
from autojac.probe import coupling
from harness import compare
from oracle import jacobian_blocks

WEIGHT = torch.tensor([[0.5, -0.3, 0.2], [0.3, 0.2, -0.5], [-0.2, 0.5, 0.3]], dtype=torch.float64)
Function = Callable[[Tensor], Tensor]


class FixedPoint(nn.Module):
    """z = tanh(z W + x), iterated until the whole batch has settled, coarsely."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(60):
            before, z = z, torch.tanh(z @ WEIGHT + x)
            if (z - before).norm() < 1e-2:
                break
        return z


def slope(x: Tensor) -> Tensor:
    return torch.tanh(x @ WEIGHT) - x


def adaptive(keeps_error: bool) -> Function:
    """Heun's method with Euler's inside, in steps of one size for all samples, until time one.

    Args:
        keeps_error: the size of the steps has a graph.
    """

    def solve(x: Tensor) -> Tensor:
        time, size = torch.zeros((), dtype=x.dtype), torch.tensor(0.3, dtype=x.dtype)
        for _ in range(40):
            size = torch.minimum(size, 1 - time)
            first = slope(x)
            second = slope(x + size * first)
            error = (size * (second - first) / 2).abs().amax()
            error = error if keeps_error else error.detach()
            if bool(error < 1e-2):
                time, x = time + size, x + size * (first + second) / 2
            if bool(time >= 1):
                break
            size = 0.9 * size * (1e-2 / error).sqrt().clamp(0.2, 3)
        return x

    return solve


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def hint(func: Function, x: Tensor) -> str:
    lines = AutoJacobian(func, on_miss="estimate", store=":memory:").explain(x).splitlines()
    return next((line.strip() for line in lines if line.strip().startswith("hint:")), "")


@pytest.mark.parametrize("func", [FixedPoint(), adaptive(False)], ids=["fixed point", "adaptive solver"])
def test_what_a_declaration_saves_is_said_where_values_alone_couple(
    func: Function, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as where clearing it takes too long
    monkeypatch.setattr(coupling, "PATIENCE", 0.0)
    assert not autojac.probe(func, x).independent
    said = hint(func, x)
    assert "coupling='independent' takes 3 VJPs, where a dense Jacobian takes 18" in said
    assert "assumes that no derivative ever reaches another sample" in said


@pytest.mark.parametrize("func", [FixedPoint(), adaptive(False)], ids=["fixed point", "adaptive solver"])
def test_a_declaration_keeps_that_promise(func: Function, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    jac = AutoJacobian(func, coupling="independent", on_miss="estimate", store=":memory:")
    for _ in range(3):
        jac(x)
    count = 0
    original = pullback.run_backward

    def counted(*args: object) -> object:
        nonlocal count
        count += 1
        return original(*args)

    monkeypatch.setattr(pullback, "run_backward", counted)
    jac(x + 0.1)  # the fourth call is checked
    before = count
    J = jac(x)
    assert count - before <= 3
    compare(J, jacobian_blocks(func, (x,)))


def test_steps_that_are_differentiated_couple_and_are_held_exactly(x: Tensor) -> None:
    func = adaptive(True)
    said = hint(func, x)
    assert "detach what decides" in said
    assert "3 VJPs, where a dense Jacobian takes 18" in said
    compare(AutoJacobian(func, on_miss="estimate", store=":memory:")(x), jacobian_blocks(func, (x,)), rtol=1e-8)
    declared = AutoJacobian(func, coupling="independent", on_miss="estimate", store=":memory:")
    with pytest.raises(SearchError, match="coupling='independent' was declared"):
        declared(x)


@pytest.mark.parametrize(
    "func",
    [
        lambda x: (x @ x.T).softmax(1) @ x if bool(x.sum() < 1e9) else x,
        lambda x: x - x.mean(0),
        lambda x: x.sin(),
        lambda x: x.sin() if bool(x.sum() < 1e9) else x,
    ],
    ids=["attention", "mean", "independent", "branch"],
)
def test_others_get_no_such_hint(func: Function, x: Tensor) -> None:
    assert hint(func, x) == ""
