"""Train and eval flags come back, submodule by submodule; those that a call changes are left as by a plain call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac import AutoJacobian
from harness import compare
from oracle import jacobian_blocks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.0)
        self.inner = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        self.calls = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(self.drop(self.norm(self.first(x).tanh())))
        assert isinstance(found, Tensor)
        return found


class SetsOne(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        return super().forward(x)


class SetsAll(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.eval()
        return super().forward(x)


class SetsTheAttribute(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.drop.training = False
        return super().forward(x)


class PutsBack(Net):
    def forward(self, x: Tensor) -> Tensor:
        before = {module: module.training for module in self.modules()}
        self.eval()
        try:
            return super().forward(x)
        finally:
            for module, mode in before.items():
                module.training = mode


class Alternates(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.drop.training = not self.drop.training
        return super().forward(x)


class FirstOnly(Net):
    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        if self.calls == 0:
            self.calls = 1
            self.norm.eval()
        return found


def mixed(net: Net) -> None:
    net.norm.eval()
    net.inner.eval()
    net.inner[1].train()


MODES: dict[str, Callable[[Net], Any]] = {
    "train": lambda net: net.train(),
    "eval": lambda net: net.eval(),
    "frozen": lambda net: net.norm.eval(),
    "mixed": mixed,
}
KINDS = [Net, SetsOne, SetsAll, SetsTheAttribute, PutsBack, Alternates]


def flags(net: Net) -> list[bool]:
    return [module.training for module in net.modules()]


def left_alike(kind: type[Net], modes: str, effort: Any) -> None:
    plain, x = kind(), torch.randn(5, 3, dtype=torch.float64)
    MODES[modes](plain)
    net = copy.deepcopy(plain)
    jac = AutoJacobian(net, store=":memory:", on_miss="tune", effort=effort, budget_s=0.2)
    for turn in range(4):
        right = jacobian_blocks(copy.deepcopy(plain), (x,), 0)
        with torch.no_grad():
            plain(x)
            compare(jac(x), right)
        assert flags(net) == flags(plain)
        compare(list(net.state_dict().values()), list(plain.state_dict().values()))
        if turn == 1:  # the user changes some
            for one in (net, plain):
                one.drop.train()
                one.inner[1].train()


@pytest.mark.by_day(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("modes", MODES)
def test_flags_are_left_as_by_a_plain_call(kind: type[Net], modes: str) -> None:
    left_alike(kind, modes, "estimate")


@pytest.mark.by_day(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("modes", ["eval", "mixed"])
def test_a_search_leaves_flags_as_a_plain_call(kind: type[Net], modes: str) -> None:
    left_alike(kind, modes, "quick")


def test_a_first_call_whose_flag_changes_later_results_is_refused() -> None:
    net, x = FirstOnly().train(), torch.randn(5, 3, dtype=torch.float64)
    jac = AutoJacobian(net, store=":memory:", effort="estimate")
    with torch.no_grad(), pytest.raises(autojac.RandomnessError, match="two different outputs"):
        jac(x)
    with torch.no_grad():
        compare(jac(x), jacobian_blocks(copy.deepcopy(net), (x,), 0))
