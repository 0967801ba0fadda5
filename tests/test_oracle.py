"""The oracle against Jacobians by hand and against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import oracle
from scenarios import BY_NAME, SCENARIOS, Scenario, select

ANALYTIC = [scenario for scenario in SCENARIOS if scenario.jacobian is not None]
# functions with state or random numbers differ from call to call, and kinks are no place for differences
SMOOTH = select(lacking=("kink", "nan", "stateful", "random", "mutates_input", "hidden"))


def assert_same(actual: Any, expected: Any, **tolerance: float) -> None:
    """Equal nests of nearly equal tensors; where one of them is not finite, anything goes."""
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    for a, e in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        assert a.shape == e.shape
        finite = a.isfinite() & e.isfinite()
        torch.testing.assert_close(a[finite].detach(), e[finite].detach(), **tolerance)


def central_difference(scenario: Scenario) -> list[Tensor]:
    """The full Jacobian a column at a time: (*out, *in) for each pair, outputs outermost."""
    func, args, kwargs = scenario.make()
    argnums = (scenario.argnums,) if isinstance(scenario.argnums, int) else scenario.argnums
    values, spec = pytree.tree_flatten(tuple(args[k] for k in argnums))
    values = [v.contiguous().clone() for v in values]

    def outputs() -> list[Tensor]:
        given = list(args)
        for k, value in zip(argnums, pytree.tree_unflatten([v.clone() for v in values], spec), strict=True):
            given[k] = value
        return [y.detach() for y in pytree.tree_leaves(func(*given, **kwargs))]

    columns: list[list[Tensor]] = []
    step = 1e-5
    for value in values:
        flat = value.reshape(-1)
        slopes = []
        for i in range(flat.numel()):
            original = flat[i].item()
            flat[i] = original + step
            ahead = outputs()
            flat[i] = original - step
            behind = outputs()
            flat[i] = original
            slopes.append([(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)])
        columns.append(
            [torch.stack(column, -1).reshape(*column[0].shape, *value.shape) for column in zip(*slopes, strict=True)]
        )
    return [column[output] for output in range(len(columns[0])) for column in columns]


@pytest.mark.parametrize("scenario", ANALYTIC, ids=str)
def test_blocks_agree_with_the_jacobian_by_hand(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make()
    expected = scenario.jacobian(func, *args, **kwargs)
    blocks = oracle.jacobian_blocks(func, args, scenario.argnums, shared=scenario.shared, kwargs=kwargs)
    assert_same(blocks, expected)
    if "nan" not in scenario.traits:
        assert all(block.isfinite().all() for block in pytree.tree_leaves(blocks))


@pytest.mark.by_day(4)
@pytest.mark.parametrize("scenario", SMOOTH, ids=str)
def test_full_jacobian_agrees_with_central_differences(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make()
    full = oracle.jacobian_full(func, args, scenario.argnums, kwargs=kwargs)
    assert_same(pytree.tree_leaves(full), central_difference(scenario), rtol=1e-5, atol=1e-6)


def test_blocks_are_the_diagonal_of_the_full_jacobian() -> None:
    func, args, _ = BY_NAME["attention over the batch"].make()
    full = oracle.jacobian_full(func, args)
    diagonal = torch.stack([full[b, :, b] for b in range(len(full))])
    torch.testing.assert_close(oracle.jacobian_blocks(func, args), diagonal)


def test_results_nest_as_jacrev_nests() -> None:
    def func(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return x * z, x.sum(-1)

    args = (torch.randn(2, 3), torch.randn(2, 3))
    for argnums in (0, 1, (0,), (0, 1), (1, 0)):
        expected = torch.func.jacrev(func, argnums=argnums)(*args)
        assert_same(oracle.jacobian_full(func, args, argnums), expected)


def test_float32_problem_is_solved_in_float64_on_request() -> None:
    net = nn.Linear(3, 2)
    jacobian = oracle.jacobian_blocks(net, (torch.randn(4, 3),), to_double=True)
    assert jacobian.dtype == torch.float64
    assert net.weight.dtype == torch.float32


def test_empty_batch_has_an_empty_jacobian() -> None:
    assert oracle.jacobian_blocks(torch.sin, (torch.randn(0, 3),)).shape == (0, 3, 3)
    assert oracle.jacobian_full(torch.sin, (torch.randn(0, 3),)).shape == (0, 3, 0, 3)


def test_arguments_and_random_state_are_left_alone() -> None:
    func, args, kwargs = BY_NAME["writes into its argument"].make()
    before, state = args[0].clone(), torch.get_rng_state()
    oracle.jacobian_blocks(func, args, kwargs=kwargs)
    noisy, noisy_args, _ = BY_NAME["additive noise"].make()
    oracle.jacobian_blocks(noisy, noisy_args)
    assert torch.equal(args[0], before)
    assert args[0].grad is None
    assert torch.equal(torch.get_rng_state(), state)
