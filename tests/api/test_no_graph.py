"""Outputs that move with the inputs and have no graph to them."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autojac import AutoJacobian, NoGraphWarning, OutputError
from autojac.probe.side_effects import moving_with
from harness import Counted, compare
from oracle import jacobian_blocks

net = nn.Linear(3, 3).double()

CUT = {
    "numpy": lambda x: torch.from_numpy(x.detach().numpy() ** 2),
    "literal": lambda x: torch.tensor([[v.item() ** 2 for v in row] for row in x], dtype=x.dtype),
    "detached": lambda x: x.detach().sin(),
    "no_grad around": torch.no_grad()(lambda x: x * 2),
    "item": lambda x: torch.full_like(x, x.sum().item()),
    "parameters alone": lambda x: net(torch.from_numpy(x.detach().numpy())),
}
EFFORTS: list[dict[str, Any]] = [{}, {"on_miss": "tune", "effort": "quick", "budget_s": 0.3}]
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


ROUNDING = {
    "literal": lambda x: torch.tensor(x.tolist()) * 2,
    "output": lambda x: (x.detach() * 2).float(),
    "half": lambda x: x.detach().sin().half(),
    "in between": lambda x: x.detach().float().cos().double(),
}


@pytest.mark.parametrize("options", EFFORTS, ids=["estimate", "quick"])
@pytest.mark.parametrize("name", ROUNDING)
def test_no_graph_is_an_error_where_func_rounds_to_less_than_the_inputs(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(OutputError, match="none has a graph"):
        estimated(ROUNDING[name], **options)(torch.randn(5, 3, dtype=torch.float64))


PARTLY = {
    "numpy": lambda x: torch.cat([x.sin(), torch.from_numpy(np.sin(x.detach().numpy()))], 1),
    "columns": lambda x: torch.stack([x[:, 0].sin(), x[:, 1].detach().cos()], 1),
    "one sample": lambda x: torch.cat([x[:1].detach() * 2, x[1:].sin()]),
    "beside dead units": lambda x: torch.cat([x.relu(), x.sin(), (x - 100).relu(), 3 * x.detach()], 1),
    "rounded": lambda x: torch.cat([x.sin(), x.detach().float().cos().to(x.dtype)], 1),
    "coupled": lambda x: torch.cat([x - x.mean(0), x.detach() * x.detach().sum(0)], 1),
    "written": lambda x: x.sin().index_copy(1, torch.tensor([1]), x.detach()[:, 1:2].exp()),
}


@pytest.mark.by_day(3)
@pytest.mark.parametrize(
    "dtype, options",
    [(torch.float64, EFFORTS[0]), (torch.float32, EFFORTS[0]), (torch.float64, EFFORTS[1])],
    ids=["float64", "float32", "quick"],
)
@pytest.mark.parametrize("name", PARTLY)
def test_some_entries_without_a_graph_are_named(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    func, x = PARTLY[name], torch.randn(4, 3, dtype=dtype)
    with pytest.warns(NoGraphWarning, match="some entries of output 0 of func move with") as caught:
        J = estimated(func, **options)(x)
    assert len(caught) == 1
    compare(J, jacobian_blocks(func, (x,)))


def test_every_cut_output_is_named_however_coarse_the_others_are() -> None:
    def func(x: Tensor) -> tuple[Tensor, ...]:
        return x.sin(), x.detach().exp(), x.detach().float().cos().double(), x.detach().half()

    with pytest.warns(NoGraphWarning, match="output 1 and output 2 and output 3 of func moves"):
        estimated(func)(torch.randn(4, 3, dtype=torch.float64))


def test_whole_and_partly_cut_outputs_are_named_together() -> None:
    def func(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat([x.sin(), x.detach()], 1), x.cos(), x.detach().exp()

    with pytest.warns(NoGraphWarning, match="some entries of output 0 and output 2 of func move with") as caught:
        estimated(func)(torch.randn(4, 3, dtype=torch.float64))
    assert len(caught) == 1


STILL = {
    "dead relu": lambda x: torch.cat([x.relu(), (x - 100).relu()], 1),
    "relu at its kink": lambda x: (x * (x > 0)).detach() * 0 + (x - x.detach() + torch.tensor([0.0, 1.0, -1.0])).relu(),
    "kink": lambda x: (x - x.detach()).abs() + torch.cat([x[:, :1].sin(), x[:, 1:] * 0], 1),
    "flat point": lambda x: (x - x.detach()) ** 2 + (x - x.detach()) ** 3 * x.new_tensor([0.0, 1.0, 2.0]),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "bound": lambda x: F.hardtanh(x, 0.0, 1.0),
    "max": lambda x: x.amax(1, keepdim=True) + F.max_pool1d(x[:, None], 2)[:, 0],
    "sorted": lambda x: x.sort(1).values * torch.tensor([1.0, 0.0, 0.0]),
    "losers": lambda x: torch.where(x == x.amax(1, keepdim=True), x, 0),
    "mask": lambda x: x.sin() * torch.tensor([1.0, 0.0, 1.0]),
    "tril": lambda x: (x[:, :, None] * x[:, None]).tril(),
    "saturated": lambda x: torch.cat([(1e4 * x.abs() + 1e4).sigmoid(), x], 1),
    "certain": lambda x: (1e5 * x).softmax(1),
    "sums to one": lambda x: torch.cat([x.softmax(1).sum(1, keepdim=True), x.sin()], 1),
    "steps": lambda x: torch.cat([x.round(), x.sign(), (x > 0).to(x.dtype), x.sin()], 1),
    "one hot": lambda x: F.one_hot(x.argmax(1), 3).to(x.dtype) + x * torch.tensor([1.0, 0.0, 0.0]),
    "straight through": lambda x: x + (x.round() - x).detach(),
    "constant part": lambda x: torch.cat([x.sin(), torch.ones_like(x)], 1),
    "zero": lambda x: torch.cat([0 * x, x], 1),
    "dropout": lambda x: F.dropout(x, 0.5),
}


@pytest.mark.by_day(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", STILL)
def test_entries_that_do_not_move_in_proportion_are_no_matter_for_a_warning(name: str, dtype: torch.dtype) -> None:
    for seed in range(2):
        x = torch.randn(16, 3, dtype=dtype, generator=torch.Generator().manual_seed(seed))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            estimated(STILL[name], randomness="different")(x)


def test_steps_are_taken_where_derivatives_are_zero_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = []

    def watched(*args: Any) -> tuple[int, ...]:
        before = len(func.batches)
        found = moving_with(*args)
        spent.append(len(func.batches) - before)
        return found

    monkeypatch.setattr(importlib.import_module("autojac.probe"), "moving_with", watched)
    x = torch.randn(8, 3, dtype=torch.float64)
    for inner, expected in ((torch.sin, []), (lambda x: torch.cat([x, (x - 100).relu()], 1), [3])):
        func = Counted(inner)
        estimated(func)(x)
        assert spent == expected


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


@pytest.mark.parametrize("options", EFFORTS, ids=["estimate", "quick"])
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
