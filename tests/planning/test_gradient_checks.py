"""The gradient through J is checked wherever J is, and not in the search alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autojac import StructureChangedWarning
from harness import forced

PUSH = {"method": "Push", "seeds": "shared", "engine": "loop", "chunk": None}
FORWARD = [
    PUSH,
    {**PUSH, "engine": "vmap"},
    {"method": "PerSample", "mode": "forward", "chunk": None},
    {"method": "Replicate", "mode": "forward"},
]
# under another name than its own, by which it would be ruled out as something that may run
NORMS = {"layer": torch.nn.functional.layer_norm}


class LaterNormed(torch.nn.Module):
    """A network that comes to normalize its features when it is told to: forward mode is right until then."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(2, 6).double()
        self.state = {"normed": False}

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        return (NORMS["layer"](h, (6,)) if self.state["normed"] else h).tanh()


def gradients(jacobian: Tensor, net: LaterNormed, x: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 2, jacobian.numel(), dtype=jacobian.dtype).view_as(jacobian)
    return list(torch.autograd.grad((jacobian * weight).sum(), [x, net.lin.weight], retain_graph=True))


def expected(net: LaterNormed, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    y = net(x)
    rows = [torch.autograd.grad(y[:, k].sum(), x, create_graph=True)[0] for k in range(y.shape[1])]
    jacobian = torch.stack(rows, 1)
    return jacobian, gradients(jacobian, net, x)


def off(jacobian: Tensor, net: LaterNormed, x: Tensor) -> float:
    right, pulled = expected(net, x)
    pairs = zip([jacobian, *gradients(jacobian, net, x)], [right, *pulled], strict=True)
    return max(float(((one - other).abs().amax() / other.abs().amax()).detach()) for one, other in pairs)


@pytest.mark.parametrize("method", FORWARD, ids=str)
def test_a_scheduled_check_sees_a_wrong_gradient(method: dict[str, Any]) -> None:
    net = LaterNormed()
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2).requires_grad_()
    jac = forced(net, (x,), method)
    for _ in range(4):
        assert off(jac(x), net, x) < 1e-12
    assert jac.plan(x).method == method
    net.state["normed"] = True
    with pytest.warns(StructureChangedWarning, match="gradient through J"):
        jacobians = [jac(x) for _ in range(4)]
    # at the latest the eighth call is checked, and what it returns is right already
    assert off(jacobians[-1], net, x) < 1e-12
    assert off(jac(x), net, x) < 1e-12
    # what couples with what was not in doubt
    assert jac.plan(x).structure.independent


@pytest.mark.parametrize("method", FORWARD, ids=str)
def test_a_replay_that_is_recorded_again_is_right_at_once(method: dict[str, Any]) -> None:
    net = LaterNormed()
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2).requires_grad_()
    jac = forced(net, (x,), {"method": "Replay", "inner": method})
    for _ in range(3):
        assert off(jac(x), net, x) < 1e-12
    net.state["normed"] = True
    with pytest.warns(StructureChangedWarning, match="gradient through J"):
        assert off(jac(x), net, x) < 1e-12
    assert off(jac(x), net, x) < 1e-12


def test_a_stored_plan_is_checked_with_its_gradient_at_its_first_use() -> None:
    net = LaterNormed()
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2).requires_grad_()
    jac = forced(net, (x,), PUSH)
    jac.plan(x)
    net.state["normed"] = True
    with pytest.warns(StructureChangedWarning, match="gradient through J"):
        assert off(jac(x), net, x) < 1e-12


def test_a_check_uses_nothing_up_and_fires_no_hook() -> None:
    fired: list[str] = []

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            fired.append("caller")
            return grad

    net = LaterNormed()
    jac = forced(net, (torch.zeros(4, 2, dtype=torch.float64, requires_grad=True),), PUSH, verify="always")
    net.lin.weight.register_hook(lambda grad: fired.append("weight"))
    source = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2).requires_grad_()
    x = Once.apply(source)
    jacobian = jac(x)
    assert fired == []
    jacobian.sum().backward()
    assert sorted(fired) == ["caller", "weight"]


def test_functions_without_a_second_derivative_are_served() -> None:
    net = torch.nn.Linear(2, 3).double()

    def distances(x: Tensor) -> Tensor:
        return torch.cdist(net(x)[:, None], torch.ones(2, 3, dtype=torch.float64))[:, 0]

    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2).requires_grad_()
    jac = forced(distances, (x,), {"method": "Pull", "seeds": "shared", "engine": "loop", "chunk": None})
    for _ in range(5):
        assert jac(x).shape == (4, 2, 2)
