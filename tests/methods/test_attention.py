"""Fused attention has no forward mode, and on a CPU no second derivative: its plain formula stands in where needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from autojac import AutoJacobian, probe
from autojac.planning.search import looks, measure
from harness import Ticking, compare
from oracle import jacobian_blocks


class Attend(nn.Module):
    """Attention between the tokens of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.mix(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).squeeze(1)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 4, dtype=torch.float64)


def rows_with_graph(func: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = func(x).flatten(1)
    rows = [torch.autograd.grad(y[:, k].sum(), x, create_graph=True)[0] for k in range(y.shape[1])]
    return torch.stack(rows, 1)


@pytest.mark.parametrize("on_miss", ["estimate", "tune"])
def test_a_loss_on_the_jacobian_trains_attention(on_miss: str, x: Tensor) -> None:
    net = Attend().double()
    jac = AutoJacobian(net, store=":memory:", on_miss=on_miss, budget_s=2.0)
    J = jac(x)
    compare(J.detach(), jacobian_blocks(net, (x,)))
    J.square().sum().backward()
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.grad(rows_with_graph(net, x).square().sum(), list(net.parameters()))
    compare([p.grad for p in net.parameters()], expected)
    assert "PlainAttention" in str(jac.plan(x))


def test_forward_mode_competes_by_the_formula_and_the_kernel_in_reverse(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Attend().double()
    monkeypatch.setattr(measure, "clock", Ticking())
    monkeypatch.setattr(looks, "COMPILED_PROGRAMS", 0)
    jac = AutoJacobian(net, store=":memory:", on_miss="tune", budget_s=30.0)
    with torch.no_grad():
        compare(jac(x), jacobian_blocks(net, (x,)))
        tried = {str(trial.method): trial.state for trial in jac.plan(x).trials}
    assert any(
        "Push" in method and "Plain" in method and state in ("complete", "pruned") for method, state in tried.items()
    )
    # "pruned" was right too, and slower than its own replay
    assert any(
        "Pull" in method and "Plain" not in method and state in ("complete", "pruned")
        for method, state in tried.items()
    )
    assert "fused scaled_dot_product_attention" in jac.explain(x)


def test_no_method_is_tried_that_the_kernel_has_no_derivative_for(x: Tensor) -> None:
    """Such a trial takes a budget in which a model's training step finds nothing else."""
    jac = AutoJacobian(Attend().double(), store=":memory:", on_miss="tune", budget_s=0.5)
    failed = [str(trial.method) for trial in jac.plan(x).trials if "not implemented" in (trial.reason or "")]
    assert failed == []
    with torch.no_grad():
        assert not [t for t in jac.plan(x).trials if "not implemented" in (t.reason or "")]


def test_other_functions_are_not_bothered(x: Tensor) -> None:
    assert probe(torch.sin, x).kernels == ()
    plan = AutoJacobian(torch.sin, store=":memory:", on_miss="tune", budget_s=1.0).plan(x)
    assert not any("PlainAttention" in str(trial.method) for trial in plan.trials)
