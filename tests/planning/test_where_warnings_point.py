"""A warning shows the user's line that called autojac, whatever part of autojac warns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import autojac
from autojac import AutoJacobian, StoreWarning, StructureChangedWarning


class Switch:
    def __init__(self) -> None:
        self.on = False

    def __call__(self, x: Tensor) -> Tensor:
        return x.roll(1, 0) * x if self.on else x.sin()


def changed(call: Callable[[AutoJacobian, Tensor], object]) -> None:
    func, x = Switch(), torch.randn(4, 3)
    jac = AutoJacobian(func, effort="estimate", store=":memory:")
    call(jac, x)
    func.on = True
    call(jac, x)


def unreadable(folder: Path) -> None:
    (folder / "plans.db").write_bytes(b"no database at all" * 100)
    AutoJacobian(torch.sin, effort="estimate", store=str(folder / "plans.db"))(torch.randn(4, 3))


def wrong_pattern() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    autojac.jacobian_from((x * x.roll(1, 0)), x, coupling="independent")


@pytest.mark.parametrize(
    ("category", "run"),
    [
        (StructureChangedWarning, lambda folder: changed(lambda jac, x: jac(x))),
        (StructureChangedWarning, lambda folder: changed(lambda jac, x: jac.value_and_jacobian(x))),
        (StructureChangedWarning, lambda folder: changed(lambda jac, x: jac(x.requires_grad_()).sum().backward())),
        (StoreWarning, unreadable),
        (StructureChangedWarning, lambda folder: wrong_pattern()),
    ],
    ids=["a call", "value_and_jacobian", "inside a loss", "the store", "jacobian_from"],
)
def test_warnings_point_at_the_caller(tmp_path: Path, category: type[Warning], run: Callable[[Path], None]) -> None:
    with pytest.warns(category) as told:
        run(tmp_path)
    assert {warning.filename for warning in told if warning.category is category} == {__file__}
