"""Batch statistics of a network, differentiated in what all samples share: its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from autojac import AutoJacobian
from autojac.core.module_function import ModuleFunction
from autojac.core.sandbox import Sandbox
from autojac.methods.pull import Pull
from autojac.methods.statistics import Statistics
from harness import compare, planned
from oracle import jacobian_blocks

EXACT = 1e-12


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def together(actual: Any, expected: Any, rtol: float = EXACT) -> None:
    """As `compare`, relative to the largest of all entries: a bias before a mean is taken off has none but rounding."""
    parts = pytree.tree_leaves(expected)
    unit = max(float(part.abs().max()) for part in parts)
    ones = [torch.full((1,), unit, dtype=torch.float64)]
    ours, right = (
        torch.cat([part.detach().flatten() for part in (*pytree.tree_leaves(tree), *ones)])
        for tree in (actual, expected)
    )
    assert [part.shape for part in pytree.tree_leaves(actual)] == [part.shape for part in parts]
    compare(ours, right, rtol)


class Pooled(nn.Module):
    """Weights before, in and behind what samples share; one weight is used on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.mix, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        code = self.encode(x).tanh()
        context = self.mix(code.mean(0)).sin()
        return self.head(torch.cat([self.mix(code) * context, x], -1))


class Sets(nn.Module):
    """Samples (T, d): a linear layer sees (B·T, d), a table of positions and a class token are broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)
        self.positions, self.token = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), 1, 4), self.layer(x)], 1) + self.positions
        h = self.norm(h).tanh()
        return (h - h.mean(0))[:, :2].flatten(1)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.PReLU(4), nn.GroupNorm(2, 4))
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x).flatten(1))


class Reparametrized(nn.Module):
    """What is read of the weights is made of several of them."""

    def __init__(self) -> None:
        super().__init__()
        self.direction, self.size, self.unused = (nn.Parameter(torch.randn(s)) for s in ((4, 3), (4, 1), (2,)))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.size * self.direction / self.direction.norm(dim=1, keepdim=True)
        y = F.linear(x, weight)
        return y / y.std(0)


MODULES: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "BatchNorm": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
        (normal(9, 3),),
    ),
    "two BatchNorms": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.SiLU(), nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)),
        (normal(9, 3),),
    ),
    "weights on both sides": lambda: (Pooled(), (normal(8, 3),)),
    "sets": lambda: (Sets(), (normal(6, 4, 3),)),
    "images": lambda: (Images(), (normal(5, 2, 2, 2),)),
    "reparametrized": lambda: (Reparametrized(), (normal(7, 3),)),
    "batch as long as everything": lambda: (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4)),
        (normal(4, 4),),
    ),
}


@pytest.mark.by_day(2)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "differentiable"])
@pytest.mark.parametrize("name", MODULES)
def test_every_way_is_exact_in_the_weights(name: str, grad: bool) -> None:
    module, args = MODULES[name]()
    func = ModuleFunction(module.double())
    parameters = func.parameters()
    given = (parameters, args)
    expected = jacobian_blocks(func, given, 0, shared=(0,))
    with torch.set_grad_enabled(grad):
        request, seen, problem = planned(func, given, in_dims=(None, 0))
        assert problem.structure.coupling == "statistics"
        methods = list(Statistics.candidates(problem, 1))
        # a layer norm is not pushed through where J is differentiated
        assert {method.local for method in methods} == {"copies"} | ({"mixed"} if name != "sets" or not grad else set())
        for method in methods:
            sandbox = Sandbox(seen.sandbox.captured, seen.sandbox.state)
            try:
                with sandbox():
                    result = method.prepare(problem)(request.leaves, {})
            except RuntimeError:
                # torch differentiates a batched gradient through group norm for no method
                assert name == "images" and grad and method.engine == "batched"
                with pytest.raises(RuntimeError), sandbox():
                    Pull("identity", "batched").prepare(problem)(request.leaves, {})
                continue
            J = request.layout.jacobian(result.jacobians)
            try:
                together(J, expected)
            except AssertionError as error:
                raise AssertionError(f"{method}: {error}") from error


@pytest.mark.parametrize("layout", ["blocks", "full"])
def test_samples_and_weights_may_be_differentiated_together(layout: Any) -> None:
    def func(x: Tensor, w: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ w
        return (y - y.mean(0) * z).sin(), (y / y.std()).sum(1)

    args = (normal(6, 3), normal(3, 2), normal(6, 1))
    request, _, problem = planned(func, args, argnums=(0, 1), in_dims=(0, None, 0), layout=layout)
    expected = Pull("identity").prepare(problem)(request.leaves, {})
    if layout == "blocks":
        compare(request.layout.jacobian(expected.jacobians), jacobian_blocks(func, args, (0, 1), shared=(1,)))
    methods = list(Statistics.candidates(problem, 1))
    assert methods
    for method in methods:
        compare(method.prepare(problem)(request.leaves, {}).jacobians, expected.jacobians, EXACT)


def test_a_wrapper_of_parameters_takes_the_cheap_way_and_moves_statistics_once() -> None:
    module = MODULES["two BatchNorms"]()[0].double()
    twin, x = copy.deepcopy(module), normal(600, 3)
    with torch.no_grad():
        jac = AutoJacobian.of_parameters(module, on_miss="estimate", store=":memory:")
        for _ in range(2):
            J = jac(x)
            twin(x)
    assert "Statistics" in str(jac.plan(x))
    for own, true in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(own, true)
    single = copy.deepcopy(module)
    row = torch.autograd.grad(single(x)[7, 1], list(single.parameters()))
    together([part[7, 1] for part in J.values()], list(row), 1e-10)


def test_numbers_that_change_between_calls_are_those_of_the_call() -> None:
    scale = [2.0]

    def func(x: Tensor, w: Tensor) -> Tensor:
        y = x * w
        return torch.add(y, y.mean(0), alpha=scale[0]) * scale[0]

    args = (normal(5, 3), normal(3))
    request, _, problem = planned(func, args, argnums=(0, 1), in_dims=(0, None))
    methods = list(Statistics.candidates(problem, 1))
    assert methods
    for method in methods:
        compute = method.prepare(problem)
        for scale[0] in (2.0, 0.5):
            J = request.layout.jacobian(compute(request.leaves, {}).jacobians)
            compare(J, jacobian_blocks(func, args, (0, 1), shared=(1,)), EXACT)


def test_passes_do_not_grow_with_the_batch() -> None:
    counts = []
    for batch in (8, 64):
        func = ModuleFunction(MODULES["BatchNorm"]()[0].double())
        _, _, problem = planned(func, (func.parameters(), (normal(batch, 3),)), in_dims=(None, 0))
        counts.append([method.passes(problem) for method in Statistics.candidates(problem, 0)])
    # 2 outputs and 4 + 4 shared numbers
    assert counts[0] == counts[1]
    assert min(counts[0]) == 10


def test_operators_without_copies_are_left_to_other_methods() -> None:
    def func(x: Tensor, w: Tensor) -> Tensor:
        return F.embedding_bag(torch.tensor([[0, 1], [1, 2]]), w, mode="sum") * (x - x.mean(0))

    args = (normal(2, 3), normal(3, 3))
    jac = AutoJacobian(func, argnums=(0, 1), in_dims=(0, None), on_miss="estimate", store=":memory:")
    compare(jac(*args), jacobian_blocks(func, args, (0, 1), shared=(1,)), EXACT)
