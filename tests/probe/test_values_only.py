"""Samples that meet in values alone, as in a solver that stops by the whole batch: no derivative is paid for that."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import autojac
from autojac import AutoJacobian, StructureChangedWarning
from autojac.methods.base import registry
from harness import compare, planned
from oracle import jacobian_blocks

WEIGHT = torch.tensor([[0.5, -0.3, 0.2], [0.3, 0.2, -0.5], [-0.2, 0.5, 0.3]], dtype=torch.float64)


class Equilibrium(torch.autograd.Function):
    """z = tanh(z W + x), iterated until the whole batch has settled; its derivative is that of the limit."""

    pulls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(200):
            before, z = z, torch.tanh(z @ WEIGHT + x)
            if (z - before).norm() < 1e-5 * z.norm():
                break
        ctx.save_for_backward(x, z)
        return z

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Equilibrium.pulls += 1
        x, z = ctx.saved_tensors
        slope = 1 - torch.tanh(z @ WEIGHT + x) ** 2
        u = gradient
        for _ in range(100):
            u = gradient + (u * slope) @ WEIGHT.T
        return u * slope


def equilibrium(x: Tensor) -> Tensor:
    out: Tensor = Equilibrium.apply(x)
    return out


def steps(x: Tensor) -> Tensor:
    """Euler's steps, as many as the whole batch needs."""
    count = 2 + int(4 * float(x.detach().nan_to_num().norm().clamp(max=8)) / 2)
    for _ in range(count):
        x = x + (torch.tanh(x @ WEIGHT) - x) / count
    return x


def others(x: Tensor) -> Tensor:
    return x.roll(1, 0).nan_to_num()


SLEEPING: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda h: (h - 100).relu(),
    "threshold": lambda h: torch.where(h > 50, h, 0),
    "saturated at both ends": lambda h: h.clamp(100, 100.5),
    "sigmoid": lambda h: 0.01 * torch.sigmoid(50 * (h - 30)),
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, dtype=torch.float64)


@pytest.mark.parametrize("func", [equilibrium, steps])
def test_a_stopping_rule_of_the_batch_couples_no_derivatives(func: Callable[[Tensor], Tensor], x: Tensor) -> None:
    _, _, problem = planned(func, (x,))
    structure = problem.structure
    assert structure.independent and not structure.sliceable and structure.assurance == "observed"
    for method in (cls for name, cls in registry().items() if name in ("BatchChunk", "PerSample", "Replicate")):
        assert all(made.unsupported(problem) for made in method.candidates(problem, 2))
    jac = AutoJacobian(func, on_miss="estimate", store=":memory:")
    assert "derivatives: not" in jac.explain(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            y = torch.randn_like(x)
            compare(jac(y), jacobian_blocks(func, (y,)), rtol=1e-8)


def test_it_costs_one_pass_per_output_coordinate(x: Tensor) -> None:
    jac = AutoJacobian(equilibrium, on_miss="estimate", store=":memory:")
    for _ in range(2):
        jac(x)
    before = Equilibrium.pulls
    jac(x)
    assert Equilibrium.pulls - before <= 3


@pytest.mark.by_day(2)
@pytest.mark.parametrize("kind", SLEEPING)
def test_coupling_that_sleeps_behind_it_is_found(kind: str, x: Tensor) -> None:
    for seed in range(1):
        torch.manual_seed(seed)
        x = torch.randn_like(x)
        assert not autojac.probe(lambda x: equilibrium(x) + SLEEPING[kind](others(x)), x).independent
        assert not autojac.probe(lambda x: steps(x) + SLEEPING[kind](others(x)), x).independent


def test_the_guard_looks_on(x: Tensor) -> None:
    on = [False]
    jac = AutoJacobian(
        lambda x: equilibrium(x) + (others(x) if on[0] else 0), on_miss="estimate", store=":memory:", verify="always"
    )
    jac(x)
    on[0] = True
    with pytest.warns(StructureChangedWarning, match="does not hold"):
        J = jac(x)
    compare(J, jacobian_blocks(lambda x: equilibrium(x) + others(x), (x,)), rtol=1e-8)


def test_a_threshold_that_the_whole_batch_crosses_later_is_not_looked_for_in_parts() -> None:
    def func(x: Tensor) -> Tensor:
        return torch.where(x.detach().abs().amax() > 10, x.sin(), x * 2)

    x = torch.rand(6, 3, dtype=torch.float64)
    structure = autojac.probe(func, x)
    assert not structure.sliceable
    jac = AutoJacobian(func, on_miss="tune", effort="quick", budget_s=0.5, store=":memory:")
    compare(jac(x), jacobian_blocks(func, (x,)))
    x[0] = 20
    for _ in range(3):
        compare(jac(x), jacobian_blocks(func, (x,)))
