"""Every plan, replayed or not, proved or not, notices in the very next call that Python has changed what func reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian, StructureChangedWarning
from autojac.guards.function_state import MOST_CHANGES
from harness import Counted, compare, forced
from oracle import jacobian_blocks, jacobian_full

PULL = {"method": "Pull", "seeds": "shared", "engine": "loop"}
GLOBAL = {"coupled": False}


def mixed(x: Tensor) -> Tensor:
    return x.softmax(-1)  # no zeros inside a sample, so that no pattern is read


def coupled(x: Tensor) -> Tensor:
    return x * x.roll(1, 0)


class Own(nn.Module):
    by = 0

    def forward(self, x: Tensor) -> Tensor:
        return x * x.roll(self.by, 0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coupled = False
        self.options = {"steps": [0]}
        self.inner = nn.Sequential(Own())
        self.plain = lambda x: x.exp()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = mixed(x) * self.inner(x) * self.plain(x) * self.scale
        if self.coupled or GLOBAL["coupled"]:
            y = y + coupled(x)
        for step in self.options["steps"]:
            y = y + x.roll(step, 0).sin()
        return y


CHANGES: dict[str, Callable[[Model, pytest.MonkeyPatch], Any]] = {
    "attribute": lambda model, patch: setattr(model, "coupled", True),
    "item": lambda model, patch: model.options["steps"].append(1),
    "list replaced": lambda model, patch: model.options.update(steps=[2]),
    "layer replaced": lambda model, patch: model.inner.__setitem__(0, nn.BatchNorm1d(3).double()),
    "function replaced": lambda model, patch: setattr(model, "plain", coupled),
    "class attribute": lambda model, patch: patch.setattr(Own, "by", 2),
    "method": lambda model, patch: patch.setattr(Own, "forward", lambda self, x: coupled(x)),
    "global": lambda model, patch: patch.setitem(GLOBAL, "coupled", True),
    "function of a module": lambda model, patch: patch.setitem(globals(), "mixed", coupled),
    "hook": lambda model, patch: model.inner.register_forward_hook(lambda module, args, y: coupled(y)),
    "pre-hook": lambda model, patch: model.inner.register_forward_pre_hook(lambda module, args: (coupled(args[0]),)),
    "library": lambda model, patch: patch.setattr(Tensor, "sin", coupled),
}


@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning")
@pytest.mark.parametrize("layout", ["blocks", "full"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_in_the_next_call(change: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Model(), torch.randn(6, 3, dtype=torch.float64)
    jac = forced(model, (x,), PULL, layout=layout)
    for _ in range(5):  # past the fourth call's check, before the eighth's
        jac(x)
    CHANGES[change](model, monkeypatch)
    for _ in range(2):
        oracle = jacobian_blocks if layout == "blocks" else jacobian_full
        compare(jac(x).detach(), oracle(model, (x,)))
    if change != "attribute":
        model.coupled = True
        compare(jac(x).detach(), oracle(model, (x,)))


def test_closures_are_looked_at_and_the_user_is_told() -> None:
    gate = False

    def func(x: Tensor) -> Tensor:
        return mixed(x) + (coupled(x) if gate else 0)

    x = torch.randn(6, 3, dtype=torch.float64)
    jac = AutoJacobian(func, store=":memory:", on_miss="estimate")
    for _ in range(5):
        jac(x)
    gate = True
    with pytest.warns(StructureChangedWarning, match="noticed at once"):
        compare(jac(x), jacobian_blocks(func, (x,)))


def test_a_parameter_that_comes_later_is_trained() -> None:
    model, x = Model(), torch.randn(6, 3, dtype=torch.float64)
    jac = forced(model, (x,), PULL)
    for _ in range(5):
        assert not jac(x).requires_grad
    model.scale = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    J = jac(x)
    compare(J.detach(), jacobian_blocks(model, (x,)))
    (ours,) = torch.autograd.grad(J.square().sum(), model.scale)
    assert ours.abs().sum() > 0


def test_a_state_that_was_checked_is_not_checked_again() -> None:
    model = Model()
    x = torch.randn(6, 3, dtype=torch.float64)
    counted = Counted(model.plain)
    model.plain = lambda x: torch.cat([counted(part) for part in (x,)])
    jac = AutoJacobian(model, store=":memory:", on_miss="estimate", coupling="independent")
    for _ in range(17):
        jac(x)
    before = counted.calls
    for step in (4, 4, 0, 0):  # rolling by nothing
        model.options["steps"][0] = 0 * step
        jac(x)
    assert counted.calls == before + 4


def test_what_changes_itself_in_every_call_is_not_checked_in_every_call() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return mixed(x)

    func = Counted(Counting())
    x = torch.randn(6, 3, dtype=torch.float64)
    jac = forced(func, (x,), PULL)
    checks = []
    for call in range(1, 40):
        before = func.calls
        jac(x)
        # a plain call leaves the count right
        checks += [call] * (func.calls > before + 2)
    assert checks[-5:] == [2, 4, 8, 16, 32]


def test_what_is_changed_before_every_call_is_checked_a_few_times() -> None:
    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = 0

        def forward(self, x: Tensor) -> Tensor:
            return mixed(x) * self.step

    model = Stepped()
    runs: list[int] = []
    model.register_forward_hook(lambda module, args, y: None)
    x = torch.randn(6, 3, dtype=torch.float64)
    jac = forced(model, (x,), PULL)
    entry_checks = 0
    for step in range(60):
        model.step = step
        compare(jac(x), jacobian_blocks(model, (x,)))
        (entry,) = jac._entries.values()
        entry_checks += entry.last_check == entry.calls
    assert MOST_CHANGES <= entry_checks <= MOST_CHANGES + 10
    assert not runs
