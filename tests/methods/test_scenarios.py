"""What the scenarios claim about themselves, and about torch."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import oracle
from scenarios import SCENARIOS, TRAITS, Scenario, select


def per_sample(scenario: Scenario, transform: Callable[..., Any]) -> list[Tensor]:
    """vmap(jacrev) or vmap(jacfwd) of the scenario, as its users write it."""
    func, args, kwargs = scenario.make()

    in_tensors = functools.partial(pytree.tree_map_only, Tensor)

    def single(*sample: Any) -> Any:
        batch = [x if k in scenario.shared else in_tensors(lambda t: t[None], x) for k, x in enumerate(sample)]
        return pytree.tree_map(lambda y: y[0], func(*batch, **kwargs))

    in_dims = tuple(
        None if k in scenario.shared else pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, arg)
        for k, arg in enumerate(args)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytree.tree_leaves(torch.vmap(transform(single, argnums=scenario.argnums), in_dims=in_dims)(*args))


def blocks(scenario: Scenario) -> list[Tensor]:
    func, args, kwargs = scenario.make()
    return pytree.tree_leaves(
        oracle.jacobian_blocks(func, args, scenario.argnums, shared=scenario.shared, kwargs=kwargs)
    )


def agree(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.allclose(a, e, rtol=1e-9, atol=1e-9) for a, e in zip(actual, expected, strict=True))


def reaches_other_samples(full: Tensor, x: Tensor) -> bool:
    """Whether dy_i/dx_j (*y.shape, *x.shape) has an entry with i ≠ j."""
    samples = len(x)
    by_pair = full.movedim(full.ndim - x.ndim, 1).reshape(samples, samples, -1).abs().amax(-1)
    return bool((by_pair * (1 - torch.eye(samples, dtype=x.dtype))).any())


def recorded(scenario: Scenario) -> tuple[Tensor, Tensor]:
    """First output and first differentiated tensor of one call."""
    func, args, kwargs = scenario.make()
    k = scenario.argnums if isinstance(scenario.argnums, int) else scenario.argnums[0]
    x = args[k].detach().clone().requires_grad_()
    given = (*args[:k], x.clone(), *args[k + 1 :])
    return pytree.tree_leaves(func(*given, **kwargs))[0], x


def test_names_are_unique() -> None:
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)


def test_every_trait_has_a_scenario() -> None:
    assert TRAITS.keys() == {trait for scenario in SCENARIOS for trait in scenario.traits}


@pytest.mark.by_day(3)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_float32_version_is_the_rounded_float64_version(scenario: Scenario) -> None:
    exact = pytree.tree_leaves(scenario.make(dtype=torch.float64)[1:])
    rounded = pytree.tree_leaves(scenario.make(dtype=torch.float32)[1:])
    for a, b in zip(exact, rounded, strict=True):
        if isinstance(a, Tensor):
            assert b.dtype == (torch.float32 if a.is_floating_point() else a.dtype)
            torch.testing.assert_close(b.to(a.dtype), a)
            assert a.stride() == b.stride()


@pytest.mark.by_day(3)
@pytest.mark.parametrize("scenario", select(lacking=("hidden", "nan")), ids=str)
def test_coupling_is_what_the_full_jacobian_shows(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make()
    argnums = (scenario.argnums,) if isinstance(scenario.argnums, int) else scenario.argnums
    batched = tuple(k for k in argnums if k not in scenario.shared)
    arguments = pytree.tree_leaves(tuple(args[k] for k in batched))
    jacobians = pytree.tree_leaves(oracle.jacobian_full(func, args, batched, kwargs=kwargs))
    # arguments vary fastest, so each output sees all of them in turn
    pairs = zip(jacobians, itertools.cycle(arguments), strict=False)
    assert any(reaches_other_samples(jacobian, x) for jacobian, x in pairs) == (scenario.coupling == "dense")


@pytest.mark.parametrize("scenario", select(having="no_vmap"), ids=str)
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
def test_no_vmap_means_that_it_raises(scenario: Scenario, transform: Callable[..., Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        per_sample(scenario, transform)


@pytest.mark.parametrize("scenario", select(having="no_vmap_jacrev"), ids=str)
def test_vmap_of_jacrev_raises_alone(scenario: Scenario) -> None:
    assert agree(per_sample(scenario, torch.func.jacfwd), blocks(scenario))
    with pytest.raises(RuntimeError):
        per_sample(scenario, torch.func.jacrev)


@pytest.mark.parametrize("scenario", select(having="wrong_vmap_jacrev"), ids=str)
def test_vmap_of_jacrev_is_silently_wrong(scenario: Scenario) -> None:
    assert not agree(per_sample(scenario, torch.func.jacrev), blocks(scenario))


@pytest.mark.parametrize("scenario", select(having="wrong_vmap_jacfwd"), ids=str)
def test_vmap_of_jacfwd_is_silently_wrong(scenario: Scenario) -> None:
    assert not agree(per_sample(scenario, torch.func.jacfwd), blocks(scenario))


@functools.cache
def vmap_reverses_grid_sample() -> bool:
    """Check for what torch 2.11 can't do yet: vmap the VJP of grid_sample with respect to the grid alone."""
    image, grids = torch.randn(1, 1, 4, 4), torch.zeros(2, 1, 1, 1, 2)
    sampled = functools.partial(torch.nn.functional.grid_sample, image, align_corners=True)
    try:
        torch.vmap(torch.func.jacrev(sampled))(grids)
    except RuntimeError:
        return False
    return True


UNREMARKABLE = ("no_vmap", "no_vmap_jacrev", "no_functorch_vjp", "random", "nan", "wrong_vmap_jacrev")


@pytest.mark.by_day(3)
@pytest.mark.parametrize("scenario", select(lacking=UNREMARKABLE, coupling="independent"), ids=str)
def test_vmap_of_jacrev_is_right_where_nothing_else_is_said(scenario: Scenario) -> None:
    if scenario.name == "image warped by grid_sample" and not vmap_reverses_grid_sample():
        with pytest.raises(RuntimeError, match="proper Tensor"):
            per_sample(scenario, torch.func.jacrev)
        return
    assert agree(per_sample(scenario, torch.func.jacrev), blocks(scenario))


@pytest.mark.parametrize("scenario", select(having="no_functorch_vjp"), ids=str)
def test_no_functorch_vjp_means_that_it_raises(scenario: Scenario) -> None:
    func, (x, *rest), kwargs = scenario.make()
    with pytest.raises(RuntimeError):
        torch.func.vjp(lambda z: func(z, *rest, **kwargs), x)


@pytest.mark.parametrize("scenario", select(having="no_forward_ad"), ids=str)
def test_no_forward_ad_means_that_it_raises(scenario: Scenario) -> None:
    func, (x, *rest), kwargs = scenario.make()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda z: func(z, *rest, **kwargs), (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("scenario", select(having="no_batched_grad"), ids=str)
def test_no_batched_grad_means_that_it_raises(scenario: Scenario) -> None:
    y, x = recorded(scenario)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(y, x, torch.ones(2, *y.shape, dtype=y.dtype), is_grads_batched=True)
