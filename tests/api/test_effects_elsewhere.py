"""What a call leaves behind in nested containers, classes, globals and numbers, and where func converts itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_effects import METHODS
from torch import Tensor

from autojac import AutoJacobian
from harness import compare, forced

LAST: Any = None
OTHER: Any = None


class Slots:
    __slots__ = ("last",)


class Elsewhere(torch.nn.Module):
    """Keeps its last result where `keep` puts it."""

    shared: Any = None

    def __init__(self, keep: Callable[[Elsewhere, Tensor], None]) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3).double()
        self.held: dict[str, Any] = {}
        self.slots = Slots()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).tanh()
        self.keep(self, y)
        return y


def nested(module: Elsewhere, y: Tensor) -> None:
    module.held.setdefault("all", {}).setdefault("y", []).append(y.detach())


def by_name(module: Elsewhere, y: Tensor) -> None:
    Elsewhere.shared = y.detach()


def by_type(module: Elsewhere, y: Tensor) -> None:
    type(module).shared = y.detach()


def in_slots(module: Elsewhere, y: Tensor) -> None:
    module.slots.last = y.detach()


def in_a_global(module: Elsewhere, y: Tensor) -> None:
    global LAST  # noqa: PLW0603  # what is tested
    LAST = y.detach()


def in_globals(module: Elsewhere, y: Tensor) -> None:
    globals()["OTHER"] = y.detach()


def as_a_number(module: Elsewhere, y: Tensor) -> None:
    module.held["sum"] = y.detach().sum().item()


def as_an_attribute(module: Elsewhere, y: Tensor) -> None:
    module.last = y.detach().sum().item()  # type: ignore[assignment]


PLACES: dict[str, tuple[Any, Callable[[Elsewhere], Any]]] = {
    "nested": (nested, lambda module: module.held["all"]["y"][-1]),
    "class by its name": (by_name, lambda module: Elsewhere.shared),
    "class by its object": (by_type, lambda module: Elsewhere.shared),
    "slots": (in_slots, lambda module: module.slots.last),
    "global": (in_a_global, lambda module: LAST),
    "globals()": (in_globals, lambda module: OTHER),
    "number in a dict": (as_a_number, lambda module: module.held["sum"]),
    "number": (as_an_attribute, lambda module: module.last),
}


@pytest.mark.by_day(3)
@pytest.mark.parametrize("method", [None, "pull", "replicate", "chunks", "replay"])
@pytest.mark.parametrize("place", PLACES)
def test_a_result_is_left_wherever_it_is_kept(place: str, method: str | None) -> None:
    torch.manual_seed(0)
    keep, left = PLACES[place]
    module = Elsewhere(keep)
    x = torch.randn(6, 3, dtype=torch.float64)
    jac = AutoJacobian(module, store=":memory:") if method is None else forced(module, (x,), METHODS[method])
    for calls in (1, 2, 3):
        module.held.clear()
        x = torch.randn(6, 3, dtype=torch.float64)
        jac(x)
        with torch.no_grad():
            y = module.linear(x).tanh()
        found = left(module)
        if isinstance(found, float):
            assert found == pytest.approx(float(y.sum()), rel=1e-12), calls
        else:
            compare(found, y)
    if place == "nested":
        assert len(module.held["all"]["y"]) == 1


def test_a_number_that_is_computed_once_is_served_by_a_replay() -> None:
    class Scaled(torch.nn.Module):
        scale: float | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.scale is None:
                self.scale = x.detach().std().item()
            return (x / self.scale).sin()

    module, x = Scaled(), torch.randn(6, 3, dtype=torch.float64)
    jac = forced(module, (x,), METHODS["replay"])
    compare(jac(x), torch.diag_embed((x / x.std()).cos() / x.std()))
    assert "operators left" in jac.explain(x)


class Converting(torch.nn.Module):
    """Takes the dtype of its input, as BoTorch's models do."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.norm = torch.nn.BatchNorm1d(3).eval() if norm else torch.nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.to(x.dtype)
        return self.norm(self.linear(x)).tanh()


@pytest.mark.by_day(2)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("effort", ["estimate", "quick"])
def test_a_module_that_converts_itself_has_the_dtype_of_one_plain_call(effort: Any, norm: bool, before: bool) -> None:
    torch.manual_seed(0)
    module = Converting(norm)
    double = torch.randn(5, 3, dtype=torch.float64)
    weight = module.linear.weight
    if before:
        module(double.float()).sum().backward()
    jac = AutoJacobian(module, store=":memory:", on_miss="tune", effort=effort)
    for x in (double, double + 1, double.float(), double.float(), double, double):
        wanted = None if weight.grad is None else weight.grad.to(x.dtype)
        jacobian = jac(x)
        assert weight.dtype == jacobian.dtype == x.dtype
        assert weight is module.linear.weight
        if wanted is None:
            assert weight.grad is None
        else:
            compare(weight.grad, wanted)
        with torch.no_grad():
            slope = 1 - module.norm(module.linear(x)).tanh() ** 2
        if norm:
            slope = slope / (1 + 1e-5) ** 0.5
        compare(
            jacobian.detach(), slope[:, :, None] * weight.detach(), rtol=1e-6 if x.dtype == torch.float32 else 1e-10
        )
        jacobian.sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_serves_a_module_that_converts_itself(method: str) -> None:
    module, x = Converting(norm=False), torch.randn(5, 3, dtype=torch.float64)
    jac = forced(module, (x,), METHODS[method])
    for _ in range(3):
        module.float()
        jacobian = jac(x)
        with torch.no_grad():
            slope = 1 - module.double().linear(x).tanh() ** 2
        compare(jacobian.detach(), slope[:, :, None] * module.linear.weight.detach())


@pytest.mark.parametrize("method", METHODS)
def test_buffers_are_converted_with_the_weights_while_a_plan_is_in_use(method: str) -> None:
    module, x = Converting(norm=True), torch.randn(5, 3, dtype=torch.float64)
    jac = forced(module, (x,), METHODS[method])
    for dtype in (torch.float64, torch.float32, torch.float64, torch.float32, torch.float64):
        jac(x.to(dtype))
        tensors = [*module.parameters(), module.norm.running_mean]
        assert {tensor.dtype for tensor in tensors} == {dtype}
