"""Adjoint Functions of other libraries: J has a graph where plain double backward has one, else the user is told.

Skipped, by name, where a library isn't installed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac import AutoJacobian
from autojac.bench.interop.ways import exact
from harness import compare


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(3, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y * self.gain)


@pytest.mark.parametrize("effort", ["estimate", "quick"])
@pytest.mark.parametrize("adjoint", [False, True])
def test_torchdiffeq(adjoint: bool, effort: Any, recwarn: pytest.WarningsRecorder) -> None:
    library = pytest.importorskip("torchdiffeq")
    solve = library.odeint_adjoint if adjoint else library.odeint
    flow, x = Flow(), torch.rand(4, 3, dtype=torch.float64)
    times = torch.linspace(0, 1, 3, dtype=torch.float64)
    jac = AutoJacobian(
        lambda x: solve(flow, x, times, method="rk4")[-1], store=":memory:", on_miss="tune", effort=effort, budget_s=0.3
    )
    right = exact(lambda x: library.odeint(flow, x, times, method="rk4")[-1])(x)
    for _ in range(3):
        J = jac(x)
        compare(J.detach(), right.detach(), rtol=1e-3 if adjoint else 1e-10)
        assert J.requires_grad == (not adjoint)
    told = [one for one in recwarn if issubclass(one.category, autojac.AutojacWarning)]
    assert [("OdeintAdjointMethod" in str(one.message)) for one in told] == [True] * adjoint
    if not adjoint:
        (found,) = torch.autograd.grad(jac(x).square().sum(), flow.gain)
        (expected,) = torch.autograd.grad(right.square().sum(), flow.gain)
        compare(found, expected)
