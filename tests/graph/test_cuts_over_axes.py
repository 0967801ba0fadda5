"""Cuts of a batch with several axes: found as those of a flat batch are, and as exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autojac import AutoJacobian
from autojac.core.batch_grid import BatchGrid
from autojac.core.product_functions import FlattenedBatch
from autojac.methods.bottleneck import Bottleneck
from autojac.methods.statistics import Statistics
from autojac.methods.support import shared_statistics
from harness import compare, seeds_counted, supported
from oracle import jacobian_blocks, jacobian_full

LEAD = (4, 5)
WEIGHT = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Normalized(nn.Module):
    """A network for sequences (B, T, 3) whose BatchNorm has channels on axis 1, or takes the flattened batch."""

    def __init__(self, flat: bool, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.flat = flat
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        made = self.norm(h.flatten(0, 1)).view(h.shape) if self.flat else self.norm(h.mT).mT
        return self.last(made.tanh())


FUNCS: dict[str, Callable[..., Any]] = {
    "minus the mean": lambda x: x - x.mean((0, 1)),
    "one axis after the other": lambda x: x * x.mean(0).mean(0).sin(),
    "kept axes": lambda x: (x / x.std((0, 1), keepdim=True)).softmax(-1),
    "expanded": lambda x: torch.cat([x.sin(), x.amax((0, 1)).expand(x.shape)], -1),
    "transposed": lambda x: (x.transpose(0, 1) * x.sum((0, 1)).cos()).transpose(0, 1),
    "flattened": lambda x: (x.reshape(-1, 3) @ WEIGHT * x.mean()).view(*x.shape[:2], 2),
    "channels first": Normalized(flat=False),
    "flattened for the norm": Normalized(flat=True),
    "a matrix of the batch": lambda x: x @ (x.flatten(0, 1).T @ x.flatten(0, 1)).sin(),
    "scalars": lambda x: (x * x.mean((0, 1))).prod(-1),
}


def over_axes(func: Callable[..., Any], lead: tuple[int, ...], shared: int = 0) -> FlattenedBatch:
    return FlattenedBatch(func, BatchGrid(lead, (True,) + (False,) * shared))


@pytest.mark.parametrize("grad", [False, pytest.param(True, marks=pytest.mark.by_day(3))], ids=["plain", "trained"])
@pytest.mark.parametrize("name", FUNCS)
def test_blocks_and_all_are_exact(name: str, grad: bool) -> None:
    func, x = over_axes(FUNCS[name], LEAD), normal(20, 3).requires_grad_(grad)
    rights = jacobian_blocks(func, (x,)), jacobian_full(func, (x,))
    with torch.set_grad_enabled(grad):
        for layout, right in zip(("blocks", "full"), rights, strict=True):
            found = supported(Statistics, func, (x,), layout=layout)
            assert {method.local for method, _ in found} == {"copies", "mixed", "push"}  # type: ignore[attr-defined]
            for _, J in found:
                compare(J.detach(), right, 1e-11)


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "channels first"])
def test_weights_are_pulled_as_copies(flat: bool) -> None:
    net = Normalized(flat)

    def func(x: Tensor, weight: Tensor) -> Tensor:
        h = x @ weight
        made = net.norm(h.flatten(0, 1)).view(h.shape) if flat else net.norm(h.mT).mT
        return net.last(made.tanh())

    args, whole = (normal(20, 3), normal(3, 4)), over_axes(func, LEAD, 1)
    right = jacobian_blocks(whole, args, (0, 1), shared=(1,))
    found = supported(Statistics, whole, args, argnums=(0, 1), in_dims=(0, None))
    assert found
    for _, J in found:
        compare(J, right, 1e-11)


@settings(max_examples=8)
@given(data=st.data())
def test_any_statistics_over_any_axes(data: st.DataObject) -> None:
    lead = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=3), "batch"))
    event = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2), "in"))
    axes = tuple(sorted(data.draw(st.sets(st.integers(0, len(lead) - 1), min_size=1), "reduced")))
    keeps, turns = data.draw(st.booleans(), "kept axes"), data.draw(st.booleans(), "transposed")

    def func(x: Tensor) -> Tensor:
        own = x.transpose(0, 1) if turns else x
        given = own.square().mean(axes, keepdim=True)
        y = own.sin() * (given if keeps or axes[0] or axes != tuple(range(len(axes))) else given.squeeze(axes))
        return y.transpose(0, 1) if turns else y

    x = normal(*lead, *event)
    full = jacobian_full(func, (x,))
    for layout in ("blocks", "full"):
        jac = AutoJacobian(func, batch_dims=len(lead), layout=layout, on_miss="estimate", store=":memory:")  # type: ignore[arg-type]
        with torch.no_grad():
            found = jac(x)
        if layout == "full":
            compare(found, full)
        else:
            samples, rest = len(x.flatten(0, len(lead) - 1)), x[(0,) * len(lead)].numel()
            right = full.reshape(samples, rest, samples, rest)[range(samples), :, range(samples)]
            compare(found.reshape(right.shape), right)


def test_a_large_batch_takes_passes_for_the_statistics_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = seeds_counted(monkeypatch, shared_statistics)
    net, x = Normalized(flat=False), normal(16, 32, 3)
    jac = AutoJacobian(net, batch_dims=2, on_miss="estimate", store=":memory:")
    with torch.no_grad():
        plan = jac.plan(x)
        assert plan.structure.coupling == "statistics"
        assert "Statistics" in str(plan)
        jac(x)
        seeds.clear()
        jac(x)
        assert 0 < sum(seeds) <= 2 + 3 * 8
        factors = jac.factors(x)
    v = normal(16, 32, 3)
    (along,) = torch.autograd.functional.jvp(net, (x,), (v,))[1:]
    compare(factors @ v.flatten(0, 1), along.flatten(0, 1), 1e-9)


def test_what_samples_share_along_one_axis_alone_stays_a_graph_of_samples() -> None:
    # it grows with the number of rows, as no statistics do
    with torch.no_grad():
        for func in (lambda x: x * x.mean(1, keepdim=True), lambda x: x * x.mean(0)):
            jac = AutoJacobian(func, batch_dims=2, on_miss="estimate", store=":memory:")
            assert jac.plan(normal(32, 16, 2)).structure.coupling == "grouped"


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "by axes"])
def test_a_narrow_place_is_cut_too(flat: bool) -> None:
    down, up = nn.Linear(10, 2).double(), nn.Linear(2, 10).double()

    def func(x: Tensor) -> Tensor:
        code = down(x.sin()).tanh()
        return up(code.flatten(0, 1)).view(*code.shape[:2], 10) if flat else up(code)

    x, whole = normal(20, 10), over_axes(func, LEAD)
    right = jacobian_blocks(whole, (x,))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = supported(Bottleneck, whole, (x,))
            assert found
            for _, J in found:
                compare(J.detach(), right, 1e-11)
