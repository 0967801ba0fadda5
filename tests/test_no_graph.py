"""Outputs that move with the inputs and have no graph to them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian, NoGraphWarning, OutputError

net = nn.Linear(3, 3).double()

CUT = {
    "numpy": lambda x: torch.from_numpy(x.detach().numpy() ** 2),
    "literal": lambda x: torch.tensor([[v.item() ** 2 for v in row] for row in x], dtype=x.dtype),
    "detached": lambda x: x.detach().sin(),
    "no_grad around": torch.no_grad()(lambda x: x * 2),
    "item": lambda x: torch.full_like(x, x.sum().item()),
    "parameters alone": lambda x: net(torch.from_numpy(x.detach().numpy())),
}
CONSTANT = {
    "ones": torch.ones_like,
    "rounded": lambda x: x.detach().round(),
    "sign": lambda x: x.detach().sign(),
    "times zero": lambda x: x.detach() * 0,
}


def estimated(func: Any, **options: Any) -> Any:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CUT)
def test_no_graph_is_an_error(name: str, dtype: torch.dtype) -> None:
    if name == "parameters alone":
        dtype = torch.float64
    with pytest.raises(OutputError, match="none has a graph"):
        estimated(CUT[name])(torch.randn(4, 3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CONSTANT)
def test_constants_and_steps_have_zero_jacobians_without_a_word(name: str, dtype: torch.dtype) -> None:
    assert not estimated(CONSTANT[name])(torch.randn(4, 3, dtype=dtype)).any()


def test_one_output_of_several_without_a_graph_is_named_once() -> None:
    def func(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.sin(), x.detach().cos(), torch.ones_like(x)

    jac, x = estimated(func), torch.randn(4, 3, dtype=torch.float64)
    with pytest.warns(NoGraphWarning, match="output 1 of func moves") as caught:
        jac(x)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second, third = jac(x)
    assert first.any() and not second.any() and not third.any()


def test_a_stopped_gradient_inside_an_output_is_no_matter_for_a_warning() -> None:
    def func(x: Tensor) -> Tensor:
        return x + (x.round() - x).detach()

    assert estimated(func)(torch.randn(4, 3, dtype=torch.float64)).any()


def test_an_output_whose_graph_leads_to_nothing_but_zeros_is_named() -> None:
    def func(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # a dead unit has no derivative, and does not move
        return 0 * x + torch.from_numpy(x.detach().numpy() ** 2), x.sin(), (x - 100).relu()

    jac, x = estimated(func), torch.randn(4, 3, dtype=torch.float64)
    with pytest.warns(NoGraphWarning, match="output 0 of func moves") as caught:
        first, _, _ = jac(x)
    assert len(caught) == 1 and not first.any()


class Asked(torch.autograd.Function):
    """Its backward is differentiated by nobody, as an adjoint solver's is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x * weight).sin()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        with torch.no_grad():
            slope = (x * weight).cos() * cotangent
            return slope * weight, (slope * x).sum(0)


class Adjoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return Asked.apply(x, self.weight)


@pytest.mark.parametrize(
    "options", [{}, {"on_miss": "tune", "effort": "quick", "budget_s": 0.3}], ids=["estimate", "quick"]
)
def test_a_jacobian_that_can_not_be_trained_is_told_once(options: dict[str, Any]) -> None:
    module, x = Adjoint(), torch.randn(4, 3, dtype=torch.float64)
    jac = estimated(module, **options)
    with pytest.warns(NoGraphWarning, match="the backward of Asked can't be differentiated") as caught:
        J = jac(x)
        jac(x)
        jac(x[:2])
    assert len(caught) == 1
    torch.testing.assert_close(J, ((x * module.weight).cos() * module.weight).diag_embed().detach())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        estimated(module, **options)(x)


def test_a_linear_module_that_trains_is_told_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        J = estimated(nn.Linear(3, 2))(torch.randn(4, 3))
    assert J.requires_grad
