"""Tuning changes nothing that belongs to the user: modes, flags, generators, weights, gradients, hooks."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian
from scenarios import Draw


@contextmanager
def untouched(model: nn.Module, *inputs: Tensor) -> Iterator[None]:
    """All that can be seen of it from outside is the same afterwards."""

    def modes() -> list[Any]:
        return [
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_anomaly_enabled(),
            torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            # sympy adds one of its own when torch first loads it
            [entry for entry in warnings.filters if not entry[2].__module__.startswith("sympy")],
            random.getstate(),
            repr(np.random.get_state()),
            torch.get_rng_state().tolist(),
        ]

    def own() -> list[Any]:
        flags = [(module.training, dict(module._forward_hooks)) for module in model.modules()]
        tensors = [*model.parameters(), *inputs]
        hooks = [t._backward_hooks and dict(t._backward_hooks) for t in tensors]
        return [flags, hooks, [t.requires_grad for t in tensors], [t._version for t in tensors]]

    tensors = [*model.state_dict().values(), *inputs]
    gradients = [t.grad for t in (*model.parameters(), *inputs)]
    values = [t.detach().clone() for t in (*tensors, *(g for g in gradients if g is not None))]
    before = (modes(), own())
    yield
    assert (modes(), own()) == before
    after = [t.grad for t in (*model.parameters(), *inputs)]
    assert all(one is other for one, other in zip(gradients, after, strict=True))
    kept = [*model.state_dict().values(), *inputs, *(g for g in after if g is not None)]
    assert all(torch.equal(one, other) for one, other in zip(values, kept, strict=True))


def furnished() -> tuple[nn.Module, list[str]]:
    """A model partly in eval mode, partly frozen, with gradients and hooks; what the gradient hooks have seen."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Tanh(), nn.Linear(4, 3)))
    model[1].eval()
    fired: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.grad = torch.randn_like(parameter)
        parameter.register_hook(lambda grad, name=name: fired.append(name))
    model[0].bias.requires_grad_(False)
    model[2].register_forward_hook(lambda module, args, y: None)
    return model, fired


@pytest.mark.by_day(2)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["plain", "autocast"])
def test_tuning_leaves_everything_as_it_was(grad: bool, dtype: torch.dtype | None) -> None:
    (model, fired), x = furnished(), torch.randn(6, 3)
    if grad:
        x.requires_grad_().grad = torch.ones_like(x)
    jac = AutoJacobian(model, on_miss="tune", effort="quick", budget_s=0.3, store=":memory:")
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        for _ in range(2):
            with untouched(model, x):
                jacobian = jac(x)
    assert jacobian.requires_grad == grad
    assert fired == []


@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
def test_tuning_keeps_the_default_dtype(default: torch.dtype) -> None:
    model, x = Draw(0, torch.float32).mlp(3, 8, 3), torch.randn(6, 3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with untouched(model, x):
            AutoJacobian(model, on_miss="tune", effort="quick", budget_s=0.3, store=":memory:")(x)
    finally:
        torch.set_default_dtype(before)


def test_a_random_function_leaves_the_state_that_one_call_leaves() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)), torch.randn(6, 3)
    state = torch.get_rng_state()
    model(x)
    after = torch.get_rng_state()
    jac = AutoJacobian(model, on_miss="tune", effort="quick", budget_s=0.3, randomness="different", store=":memory:")
    for _ in range(2):
        torch.set_rng_state(state)
        jac(x)
        assert torch.equal(torch.get_rng_state(), after)
