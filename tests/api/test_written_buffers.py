"""Functions that write into buffers: their checks and gradients hang on graphs that were recorded before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac.methods.base import registry
from autojac.problem.reference import Reference
from harness import compare, planned
from oracle import jacobian_blocks, jacobian_full


class Normed(nn.Module):
    """Batch statistics of two samples, whose derivative is nothing but what rounding leaves: checks are calibrated."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(x).cumsum(0) * 1.3).sin()


@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_a_derivative_that_cancels_behind_written_statistics(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    net = Normed().to(dtype).requires_grad_(False)
    x = torch.randn(2, 3, dtype=dtype)
    jacobian = autojac.AutoJacobian(net, on_miss="estimate", store=":memory:")(x)
    expected = jacobian_blocks(net, (x,))
    assert float((jacobian - expected).abs().max()) < (1e-2 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize("layout", ["blocks", "full"])
def test_a_jacobian_that_was_checked_or_made_anew_can_be_differentiated(layout: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.BatchNorm1d(3)).double()
    mask = torch.tensor([True, False, True])

    def func(x: Tensor, a: Tensor) -> Tensor:
        return net(torch.where(a, x, x.sum(1, keepdim=True)))

    jac = autojac.AutoJacobian(func, layout=layout, on_miss="estimate", store=":memory:")
    for size in (5, 5, 2, 2, 5):
        x = torch.randn(size, 3, dtype=torch.float64)
        a = mask.roll(size).expand(size, 3).clone()
        a[0] = ~a[0]
        jacobian = jac(x, a)
        oracle = jacobian_full if layout == "full" else jacobian_blocks
        compare(jacobian.detach(), oracle(func, (x, a)).detach(), rtol=1e-7)
        jacobian.square().sum().backward()


class Decayed(nn.Module):
    """A product with a buffer that each call writes into, so that the versions of what a graph has saved move."""

    def __init__(self, trained: bool = True) -> None:
        super().__init__()
        self.register_buffer("decay", torch.full((3,), 0.9, dtype=torch.float64))
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 3, dtype=torch.float64), trained)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.decay.mul_(0.97)
        x = x if mask is None else torch.where(mask, x, x.sum(0))
        return (x * self.decay).sin() * self.weight.exp()


def as_plain_calls(net: nn.Module, calls: list[tuple[Tensor, ...]]) -> tuple[Tensor, dict[str, Any]]:
    """The diagonal and the state that plain calls give: each changes what the next one reads."""
    twin = copy.deepcopy(net)
    for args in calls[:-1]:
        twin(*args)
    J = jacobian_blocks(copy.deepcopy(twin), calls[-1]).detach()
    twin(*calls[-1])
    return J, twin.state_dict()


@pytest.mark.parametrize("trained", [False, True])
def test_verify_of_a_diagonal_of_a_function_that_writes(trained: bool) -> None:
    net, x = Decayed(trained), torch.randn(4, 3, dtype=torch.float64)
    J, _ = as_plain_calls(net, [(x,)])
    diagonal = J.diagonal(dim1=1, dim2=2).clone()
    autojac.verify(diagonal, net, x, layout="diagonal")
    diagonal[2, 1] *= 1.01
    with pytest.raises(autojac.VerificationError):
        autojac.verify(diagonal, net, x, layout="diagonal")


def test_a_wrong_gradient_is_seen_behind_what_is_written() -> None:
    net, x = Decayed(), torch.randn(4, 3, dtype=torch.float64)
    request, seen, problem = planned(net, (x,))
    reference = Reference(problem, request.leaves, {}, seen.sandbox, trained=request.trained)
    with seen.sandbox():
        result = registry()["Pull"](seeds="shared", engine="loop").prepare(problem)(request.leaves, {})  # type: ignore[call-arg]
        assert reference.check_gradient(result) is None
        ((J,),) = result.jacobians
        detached = result._replace(jacobians=((J.detach() + 0 * J,),))
        assert "gradient through J" in str(reference.check_gradient(detached))
    assert not reference.trains_nothing


@pytest.mark.parametrize("layout", ["blocks", "full"])
def test_a_jacobian_made_anew_has_its_graph_and_leaves_the_state_of_one_call(layout: str) -> None:
    torch.manual_seed(0)
    net = Decayed()
    jac = autojac.AutoJacobian(net, layout=layout, on_miss="estimate", store=":memory:")
    oracle = jacobian_full if layout == "full" else jacobian_blocks
    for coupled in (False, False, True, True):
        x = torch.randn(4, 3, dtype=torch.float64)
        mask = torch.ones(4, 3, dtype=torch.bool)
        mask[1, :] = not coupled
        twin = copy.deepcopy(net)
        expected = oracle(copy.deepcopy(net), (x, mask))
        twin(x, mask)
        J = jac(x, mask)
        compare(J.detach(), expected.detach())
        J.sum().backward()
        compare(net.decay, twin.decay)
        assert net.weight.grad is not None
        compare(net.weight.grad, expected.detach().movedim(1, -1).reshape(-1, 3).sum(0))
        net.weight.grad = None


def test_statistics_put_in_the_place_of_others_are_left_as_by_one_call() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(3)).double()
    jac = autojac.AutoJacobian(net, layout="full", on_miss="estimate", store=":memory:")
    for number in range(8):
        x = torch.randn(5, 3, dtype=torch.float64)
        if number % 2:
            net[1].running_var = net[1].running_var * 2
        twin = copy.deepcopy(net)
        compare(jac(x).detach(), jacobian_full(twin, (x,)).detach())
        for name, value in twin.state_dict().items():
            compare(net.state_dict()[name].double(), value.double())
