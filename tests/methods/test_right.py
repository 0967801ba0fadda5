"""No wrong number: every scenario through the public API, and through every method, against the oracle."""

from __future__ import annotations

import dataclasses
import random
import warnings

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import autojac
from autojac.core.sandbox import Sandbox
from autojac.methods.base import Method, registry
from autojac.methods.threads import threads
from autojac.problem.problem import Problem
from autojac.problem.reference import Reference
from harness import compare, planned, wrapped
from oracle import jacobian_blocks, jacobian_full
from scenarios import BY_NAME, SCENARIOS, Scenario

SAFE = [scenario for scenario in SCENARIOS if "mutates_input" not in scenario.traits]


@pytest.mark.by_day(2, 1)  # the other half by day in another layout
@pytest.mark.parametrize("scenario", SAFE, ids=str)
def test_blocks_equal_the_oracles(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make(0, torch.float64)
    expected = jacobian_blocks(func, args, scenario.argnums, shared=scenario.shared, kwargs=kwargs)
    compare(wrapped(scenario, func)(*args, **kwargs), expected)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("scenario", SAFE, ids=str)
def test_tuned_blocks_equal_the_oracles(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make(3, torch.float64)
    expected = jacobian_blocks(func, args, scenario.argnums, shared=scenario.shared, kwargs=kwargs)
    jacobian = wrapped(scenario, func, on_miss="tune", budget_s=0.2)(*args, **kwargs)
    compare(pytree.tree_map(Tensor.detach, jacobian), expected)


@pytest.mark.by_day(6, 0)
@pytest.mark.parametrize("scenario", [s for s in SAFE if not s.shared], ids=str)
def test_full_equals_the_oracle(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make(1, torch.float64)
    expected = jacobian_full(func, args, scenario.argnums, kwargs=kwargs)
    compare(wrapped(scenario, func, layout="full")(*args, **kwargs), expected)


@pytest.mark.by_day(6, 2)
@pytest.mark.parametrize("scenario", [s for s in SAFE if not s.shared], ids=str)
def test_sparse_is_the_full_jacobian_as_a_matrix(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make(1, torch.float64)
    expected = pytree.tree_leaves(jacobian_full(func, args, scenario.argnums, kwargs=kwargs))
    found = pytree.tree_leaves(wrapped(scenario, func, layout="sparse")(*args, **kwargs))
    assert all(one.layout == torch.sparse_csr for one in found)
    compare([one.to_dense() for one in found], [y.reshape(x.shape) for y, x in zip(expected, found, strict=True)])


@pytest.mark.by_day(6, 4)
@pytest.mark.parametrize("scenario", [s for s in SAFE if s.argnums == 0], ids=str)
def test_diagonal_is_the_blocks_diagonal(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make(1, torch.float64)
    expected = jacobian_blocks(func, args, 0, shared=scenario.shared, kwargs=kwargs)
    jac = wrapped(scenario, func, layout="diagonal")
    sizes = [x.numel() if 0 in scenario.shared else x[0].numel() for x in pytree.tree_leaves(args[0])]
    blocks = pytree.tree_leaves(expected)
    # the inputs vary fastest
    sizes *= len(blocks) // len(sizes)
    if any(block[0].numel() != n * n for block, n in zip(blocks, sizes, strict=True)):
        with pytest.raises((autojac.OutputError, autojac.InputError), match="as many outputs as inputs"):
            jac(*args, **kwargs)
    else:
        diagonals = [block.reshape(-1, n, n).diagonal(dim1=1, dim2=2) for block, n in zip(blocks, sizes, strict=True)]
        compare(jac(*args, **kwargs), diagonals)


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s not in SAFE], ids=str)
def test_a_function_that_writes_into_its_input_is_refused(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make(0, torch.float64)
    before = [arg.clone() for arg in args]
    with pytest.raises(autojac.MutationError, match="argument number 0"):
        wrapped(scenario, func)(*args, **kwargs)
    assert all(torch.equal(arg, kept) for arg, kept in zip(args, before, strict=True))


@pytest.mark.by_day(24)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "differentiable"])
@pytest.mark.parametrize("scenario", SAFE, ids=str)
def test_every_candidate_is_right_or_caught(scenario: Scenario, grad: bool) -> None:
    func, args, kwargs = scenario.make(2, torch.float64)
    expected = jacobian_blocks(func, args, scenario.argnums, shared=scenario.shared, kwargs=kwargs)
    if grad:
        args = pytree.tree_map_only(torch.Tensor, _trained, args)
    with torch.set_grad_enabled(grad):
        request, seen, problem = planned(func, args, kwargs, argnums=scenario.argnums)
        right = 0
        sandbox = Sandbox(seen.sandbox.captured, seen.sandbox.state)
        reference = Reference(problem, request.leaves, request.keywords, sandbox)
        for method in _tried(problem, scenario.name):
            try:
                with sandbox(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    result = method.prepare(problem)(request.leaves, request.keywords)
            except Exception:  # an infeasible candidate; the reason is the search's business
                continue
            if reference.check(result) is None:
                right += 1
                compare(request.layout.jacobian(result.jacobians), expected)
                assert grad or not any(J.requires_grad for row in result.jacobians for J in row)
    assert right


def _tried(problem: Problem, name: str) -> list[Method]:
    """The candidates for a problem, but for compiled ones, and of replays a few: test_replay.py is about these."""
    found = [m for kind in registry().values() for m in kind.candidates(problem, 1) if "Compiled" not in repr(m)]
    found = [method for method in found if method.unsupported(problem) is None]
    replays = [method for method in found if "Replay" in repr(method)]
    few = random.Random(name).sample(replays, min(1, len(replays)))
    return [method for method in found if method in few or method not in replays]


def _trained(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if x.is_floating_point() else x


def test_every_method_serves_some_scenario() -> None:
    served = set()
    with threads(2):
        _collect(served)
    assert served == set(registry()) - (set() if torch.cuda.is_available() else {"CudaGraph"})


def _collect(served: set[str]) -> None:
    """Add the names of the methods that serve a scenario."""
    extra = ("scaled_dot_product_attention in a sample", "autoencoder", "BatchNorm in train mode", "arrowhead")
    for scenario in (*SAFE[:12], *map(BY_NAME.__getitem__, extra)):
        func, args, kwargs = scenario.make(0, torch.float64)
        _, _, problem = planned(func, args, kwargs, argnums=scenario.argnums)
        large = problem.resize(8192)
        served |= {
            name
            for name, kind in registry().items()
            for one in (problem, large, dataclasses.replace(problem, of=(((0,),),)))
            if any(method.unsupported(one) is None for method in kind.candidates(one, 1))
        }


@pytest.mark.parametrize("coupled", [False, True])
def test_a_derivative_that_is_all_rounding_is_no_failure(coupled: bool) -> None:
    def func(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.nn.functional.layer_norm(x.flip(0) if coupled else x, (4,))
        return y.sin(), y.sum(1)

    x = torch.randn(4, 4, dtype=torch.float64)
    for layout in ("blocks", "full"):
        _, J = autojac.AutoJacobian(func, on_miss="estimate", store=":memory:", layout=layout)(x)
        assert float(J.abs().amax()) < 1e-14
