"""How often a first call evaluates func, and on how many samples: for each effort and class of function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian
from harness import Counted


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def observed(x: Tensor) -> Tensor:
    """Independent, which no graph proves, since Python sees a number."""
    x.detach()[0, 0].item()
    return x.sin()


def attention(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.T, -1) @ x


def centred(x: Tensor) -> Tensor:
    return (x - x.mean(0)).tanh()


CLASSES: dict[str, tuple[Callable[[], Any], int, tuple[int, int], dict[str, Any]]] = {
    "proved, elementwise": (lambda: torch.sin, 600, (24, 6), {}),
    "proved, network": (network, 600, (20, 6), {}),
    "proved, large batch": (network, 5000, (22, 6), {}),
    "statistics": (lambda: centred, 40, (22, 21), {}),
    "coupled": (lambda: attention, 12, (19, 18), {}),
    "unbatched": (lambda: lambda x: x.sin() * x.sum(), 12, (12, 12), {"in_dims": None}),
    "observed": (lambda: observed, 40, (72, 66), {}),
}
"""Functions, samples, and evaluations in all and of the whole batch, or of copies of it."""


@pytest.mark.parametrize("effort", ["estimate", "quick", "measure"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_first_call_evaluates_func_so_often(kind: str, effort: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # by which the masks that every pair of samples takes are found to be affordable
    monkeypatch.setattr(sys.modules["autojac.probe"], "time_one_call", lambda point: (point.values({}), 1e-4)[1])
    build, batch, expected, options = CLASSES[kind]
    func = Counted(build())
    x = torch.linspace(-1, 1, 3 * batch, dtype=torch.float64).reshape(batch, 3)
    jac = AutoJacobian(func, effort=effort, store=":memory:", **options)
    with torch.no_grad():
        jac(x)
    assert (func.calls, sum(size >= batch for size in func.batches)) == expected
    if kind.startswith("proved"):
        assert max(size for size in func.batches if size < batch) <= 256


def test_a_differentiable_first_call_evaluates_a_proved_function_no_more_often() -> None:
    func = Counted(network())
    x = torch.randn(600, 3, dtype=torch.float64)
    AutoJacobian(func, store=":memory:")(x)
    assert sum(size >= 600 for size in func.batches) == 6
