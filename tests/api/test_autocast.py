"""Under a caller's autocast func is cast, and nothing that autojac computes for itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autojac
from autojac import AutoJacobian
from harness import forced

torch.manual_seed(0)
NETWORK = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
PUSH = {"method": "Push", "seeds": "shared", "engine": "loop", "chunk": None}
PULL = {"method": "Pull", "seeds": "shared", "engine": "batched", "chunk": None}
FORWARD, REVERSE = ({"method": "PerSample", "mode": mode, "chunk": None} for mode in ("forward", "reverse"))
REPLICATE = {"method": "Replicate", "mode": "forward"}
METHODS = (PUSH, PULL, FORWARD, REVERSE, REPLICATE, *({"method": "Replay", "inner": m} for m in (PUSH, PULL, FORWARD)))


def mixed(x: Tensor) -> Tensor:
    """A network in half precision beside arithmetic that has to stay as exact as its input."""
    return x.sin() + 1e-3 * NETWORK(x)


def centred(x: Tensor) -> Tensor:
    return x.exp() - x.mean(0)


# autocast makes these off by so much, in half precision, and not at all
FUNCTIONS = {
    "sin": (lambda x: x.sin(), 1e-6),
    "exp": (lambda x: x.exp() * 2, 1e-6),
    "centred": (centred, 1e-6),
    "mixed": (mixed, 1e-3),
    "network": (NETWORK, 4e-2),
}


def rows(func: Any, x: Tensor, layout: str) -> Tensor:
    """One plain VJP per row; func alone runs under autocast."""
    x = x.detach().requires_grad_()
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        y = func(x)
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        pulled = [torch.autograd.grad(one, x, retain_graph=True)[0] for one in y.flatten()]
    full = torch.stack(pulled).reshape(*y.shape, *x.shape)
    if layout in ("full", "sparse"):
        return full if layout == "full" else full.reshape(y.numel(), x.numel())
    blocks = torch.stack([full[b, :, b] for b in range(len(x))])
    return blocks if layout == "blocks" else blocks.diagonal(dim1=1, dim2=2)


def hold(jacobian: Tensor, func: Any, x: Tensor, layout: str, error: float) -> None:
    expected = rows(func, x, layout)
    dense = jacobian.detach().to_dense()
    assert dense.dtype == torch.float32
    assert float((dense - expected).abs().amax()) <= error * float(expected.abs().amax())


@pytest.mark.by_day(3)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("layout", ["blocks", "full", "diagonal", "sparse"])
@pytest.mark.parametrize("name", ["exp", "centred", "mixed"])
def test_every_layout_is_as_exact_as_func(name: str, layout: str, trained: bool) -> None:
    func, error = FUNCTIONS[name]
    jac = AutoJacobian(func, layout=layout, on_miss="estimate", store=":memory:")
    for scale in (1, 2):
        x = (torch.linspace(-1, 1, 15).reshape(5, 3) * scale).requires_grad_(trained)
        with torch.set_grad_enabled(trained), torch.autocast("cpu", torch.bfloat16):
            hold(jac(x), func, x, layout, error)


@pytest.mark.by_day(4)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_is(method: dict[str, Any], trained: bool) -> None:
    for func, error in FUNCTIONS.values():
        if func is centred:
            continue
        x = torch.linspace(-1, 1, 15).reshape(5, 3).requires_grad_(trained)
        with torch.set_grad_enabled(trained), torch.autocast("cpu", torch.bfloat16):
            jac = forced(func, (x,), method)
            for scale in (1, 2, 3):
                hold(jac(scale * x.detach().requires_grad_(trained)), func, scale * x, "blocks", error)
            assert jac.plan(x).method["method"] == method["method"]


def test_autocast_is_left_as_it_was() -> None:
    x = torch.linspace(-1, 1, 15).reshape(5, 3)
    seen = []

    def func(x: Tensor) -> Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return NETWORK(x)

    jac = AutoJacobian(func, on_miss="estimate", store=":memory:")
    with torch.autocast("cpu", torch.float16):
        jac(x)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.float16
    jac(x)
    assert set(seen) == {(True, torch.float16), (False, torch.get_autocast_dtype("cpu"))}


def test_checks_of_other_jacobians_and_of_graphs_are_exact() -> None:
    x = torch.linspace(-1, 1, 15).reshape(5, 3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        jacobian = autojac.jacobian_from(x.exp() * 2, x)
        autojac.verify(jacobian, lambda x: x.exp() * 2, x)
    hold(jacobian, lambda x: x.exp() * 2, x, "blocks", 1e-6)


def test_a_derivative_of_the_backward_is_exact_outside_of_autocast() -> None:
    x = torch.linspace(-1, 1, 15).reshape(5, 3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        jac = forced(lambda x: x.exp() * 2, (x,), {"method": "Replay", "inner": PULL})
        for _ in range(3):
            jacobian = jac(x)
    (gradient,) = torch.autograd.grad(jacobian.sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(again, 2 * x.exp())


@pytest.mark.parametrize("layout", ["blocks", "full"])
def test_batch_norm_in_train_mode_is_trained(layout: str) -> None:
    """Its noise is measured before the running statistics are put back, which takes its graph away."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.SiLU(), torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    jac = AutoJacobian(lambda x: net(x).sum(1, keepdim=True), layout=layout, on_miss="estimate", store=":memory:")
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert jac(torch.randn(7, 5)).requires_grad


def test_a_gradient_of_little_precision_beside_an_exact_jacobian_is_right() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.GELU(), torch.nn.Linear(16, 3))
    x = torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        jac = forced(lambda x: 1e-5 * net(x) + x, (x,), {"method": "Replay", "inner": PULL}, verify="always")
        for _ in range(5):
            jac(torch.randn(4, 3))
        assert jac.plan(x).method["method"] == "Replay"
