"""Objects among the arguments: what they hold may decide what func does, and may be trained."""

from __future__ import annotations

import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian, TrainingStep
from harness import compare
from oracle import jacobian_full

X = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Mode(enum.IntEnum):
    OFF = 0
    ON = 1


class Settings:
    """An object whose repr tells nothing."""

    def __init__(self, on: Any = False) -> None:
        self.on = on

    def __repr__(self) -> str:
        return "Settings"


class Slotted:
    __slots__ = ("on",)

    def __repr__(self) -> str:
        return "Slotted"


class Switched(nn.Module):
    on = False

    def forward(self, x: Tensor) -> Tensor:
        return coupled(x, self.on)


def coupled(x: Tensor, on: bool) -> Tensor:
    return x.sin() + x.roll(1, 0) if on else x.sin()


def switch(settings: Any, on: bool) -> None:
    settings.on = on


def switch_in_array(array: Any, on: bool) -> None:
    array[1000] = on


OBJECTS: dict[str, tuple[Callable[[], Any], Callable[[Any, bool], None], Callable[[Any], bool]]] = {
    "an attribute": (Settings, switch, lambda s: s.on),
    "a slot": (Slotted, switch, lambda s: s.on),
    "a module": (Switched, switch, lambda s: s.on),
    "an enum": (lambda: Settings(Mode.OFF), lambda s, on: switch(s, Mode(on)), lambda s: s.on == Mode.ON),
    "a float": (lambda: Settings(0.0), lambda s, on: switch(s, float(on)), lambda s: s.on > 0),
    "a dict in an object": (lambda: Settings({}), lambda s, on: s.on.update(on=on), lambda s: s.on["on"]),
    "an object in a dict": (lambda: {"s": Settings(), "w": X}, lambda d, on: switch(d["s"], on), lambda d: d["s"].on),
    "an object in an object": (lambda: Settings(Settings()), lambda s, on: switch(s.on, on), lambda s: s.on.on),
    "a large array": (lambda: np.zeros(2001), switch_in_array, lambda a: bool(a[1000])),
}


@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning")
@pytest.mark.parametrize("by", ["position", "keyword"])
@pytest.mark.parametrize("kind", OBJECTS)
def test_what_an_object_holds_may_couple_samples_at_any_call(kind: str, by: str) -> None:
    make, turn, is_on = OBJECTS[kind]
    held = make()

    def func(x: Tensor, held: Any) -> Tensor:
        return held(x) if isinstance(held, nn.Module) else coupled(x, is_on(held))

    jac = AutoJacobian(func, layout="full", on_miss="estimate", store=":memory:")
    for call in range(8):
        turn(held, call in (2, 5))
        J = jac(X, held) if by == "position" else jac(X, held=held)
        compare(J, jacobian_full(lambda x, on=call in (2, 5): coupled(x, on), (X,)))


@pytest.mark.parametrize("by", ["position", "keyword"])
@pytest.mark.parametrize("hold", [lambda net: net, lambda net: SimpleNamespace(net=net), lambda net: net.forward])
def test_what_an_object_holds_is_trained_through_the_jacobian(hold: Callable[[Any], Any], by: str) -> None:
    net = nn.Linear(3, 2).double()
    held = hold(net)

    def func(x: Tensor, held: Any) -> Tensor:
        return (held.net if isinstance(held, SimpleNamespace) else held)(x).sin()  # type: ignore[no-any-return]

    jac = AutoJacobian(func, on_miss="estimate", store=":memory:")

    def jacobian() -> Tensor:
        return jac(X, held) if by == "position" else jac(X, held=held)  # type: ignore[no-any-return]

    for trains in (True, False, True):
        net.requires_grad_(trains)
        J = jacobian()
        assert J.requires_grad == trains
        if trains:
            net.zero_grad()
            J.square().sum().backward()
            found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
            wanted = net(X).cos()[..., None] * net.weight
            compare(found, torch.autograd.grad(wanted.square().sum(), list(net.parameters())))


def test_a_step_trains_what_its_loss_gets_in_an_object() -> None:
    net = nn.Linear(3, 2).double()
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    held = SimpleNamespace(scale=scale, net=net)
    step = TrainingStep(net, lambda y, J, held: (held.scale * J).square().mean(), store=":memory:")
    step(X, held)
    assert scale.grad is not None
    compare(scale.grad, 2 * net.weight.detach().square().mean())
