"""Outputs that move with the inputs and have no graph to them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian, ModesDisagreeWarning, OutputError

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
    with pytest.warns(ModesDisagreeWarning, match="output 1 of func moves") as caught:
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
