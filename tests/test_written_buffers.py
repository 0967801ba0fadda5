"""Functions that write into buffers: their checks and gradients hang on graphs that were recorded before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autojac
from harness import compare
from oracle import jacobian_blocks, jacobian_full


class Normed(nn.Module):
    """Batch statistics of two samples, whose derivative is nothing but what rounding leaves: checks are calibrated."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(x).cumsum(0) * 1.3).sin()


@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_a_derivative_that_cancels_behind_written_statistics(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    net = Normed().to(dtype).requires_grad_(False)
    x = torch.randn(2, 3, dtype=dtype)
    jacobian = autojac.AutoJacobian(net, on_miss="estimate", store=":memory:")(x)
    expected = jacobian_blocks(net, (x,))
    assert float((jacobian - expected).abs().max()) < (1e-2 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize("layout", ["blocks", "full"])
def test_a_jacobian_that_was_checked_or_made_anew_can_be_differentiated(layout: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.BatchNorm1d(3)).double()
    mask = torch.tensor([True, False, True])

    def func(x: Tensor, a: Tensor) -> Tensor:
        return net(torch.where(a, x, x.sum(1, keepdim=True)))

    jac = autojac.AutoJacobian(func, layout=layout, on_miss="estimate", store=":memory:")
    for size in (5, 5, 2, 2, 5):
        x = torch.randn(size, 3, dtype=torch.float64)
        a = mask.roll(size).expand(size, 3).clone()
        a[0] = ~a[0]
        jacobian = jac(x, a)
        oracle = jacobian_full if layout == "full" else jacobian_blocks
        compare(jacobian.detach(), oracle(func, (x, a)).detach(), rtol=1e-7)
        jacobian.square().sum().backward()
