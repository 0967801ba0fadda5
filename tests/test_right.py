"""No wrong number: every scenario through the public API, and through every method, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import jacobian_blocks, jacobian_full
from scenarios import SCENARIOS, Scenario
from torch.utils import _pytree as pytree

import autojac
from autojac import AutoJacobian

UNSAFE = {"mutates_input"}


def wrapped(scenario: Scenario, func: Any, **options: Any) -> AutoJacobian:
    defaults = {"on_miss": "estimate", "randomness": "different", "argnums": scenario.argnums, "store": ":memory:"}
    return AutoJacobian(func, **{**defaults, **options})


def compare(actual: Any, expected: Any, rtol: float = 1e-10) -> None:
    ours, right = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(ours) == len(right)
    for one, other in zip(ours, right, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        both = torch.isfinite(one) & torch.isfinite(other)
        scale = float(torch.where(both, other, 0).abs().amax()) if other.numel() else 0.0
        torch.testing.assert_close(
            torch.where(both, one, 0), torch.where(both, other, 0), rtol=rtol, atol=rtol * max(scale, 1e-12)
        )
        assert bool((torch.isfinite(one) == torch.isfinite(other)).all()) or bool((~both).any())


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_blocks_equal_the_oracles(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make(0, torch.float64)
    if scenario.traits & UNSAFE:
        with pytest.raises(autojac.MutationError):
            wrapped(scenario, func)(*args, **kwargs)
        return
    expected = jacobian_blocks(func, args, scenario.argnums, shared=scenario.shared, kwargs=kwargs)
    compare(wrapped(scenario, func)(*args, **kwargs), expected)


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if not s.traits & UNSAFE], ids=str)
def test_full_equals_the_oracle(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make(1, torch.float64)
    expected = jacobian_full(func, args, scenario.argnums, kwargs=kwargs)
    compare(wrapped(scenario, func, layout="full")(*args, **kwargs), expected)
