"""J behaves like any torch result: a loss on it trains inputs and captured parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian
from autojac.core.sandbox import Sandbox
from autojac.methods.base import registry
from autojac.problem.reference import Reference
from harness import compare, planned
from oracle import jacobian_blocks
from scenarios import BY_NAME


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def estimated(func: Any, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


def gradients(J: Tensor, module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    loss = torch.linalg.pinv(J).square().sum()
    return list(torch.autograd.grad(loss, [*module.parameters(), *inputs], allow_unused=True, materialize_grads=True))


def test_a_loss_on_the_inverse_reaches_the_parameters() -> None:
    model, x = network(), torch.randn(6, 3, dtype=torch.float64)
    J = estimated(model)(x)
    right = torch.func.vmap(torch.func.jacrev(model))(x)
    compare(gradients(J, model), gradients(right, model), rtol=1e-8)


def test_a_training_loop_with_the_pseudo_inverse_makes_progress() -> None:
    model = network()
    jac = estimated(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.randn(16, 3, dtype=torch.float64)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (torch.linalg.pinv(jac(x)) - torch.eye(3, dtype=torch.float64)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_value_keeps_its_graph() -> None:
    model, x = network(), torch.randn(6, 3, dtype=torch.float64)
    y, J = estimated(model).value_and_jacobian(x)
    found = torch.autograd.grad(y.square().sum() + J.square().sum(), list(model.parameters()), allow_unused=True)
    right_J = torch.func.vmap(torch.func.jacrev(model))(x)
    right = torch.autograd.grad(
        model(x).square().sum() + right_J.square().sum(), list(model.parameters()), allow_unused=True
    )
    compare([g for g in found if g is not None], [g for g in right if g is not None], rtol=1e-8)


def test_parameters_that_are_frozen_and_trained_again_are_seen() -> None:
    model, x = network(), torch.randn(6, 3, dtype=torch.float64)
    jac = estimated(model)
    assert jac(x).requires_grad
    model.requires_grad_(False)
    assert not jac(x).requires_grad
    model[0].requires_grad_(True)
    assert jac(x).requires_grad


def test_a_function_that_closes_over_parameters() -> None:
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 3, dtype=torch.float64)
    J = estimated(lambda z: (z @ weight).sin())(x)
    (found,) = torch.autograd.grad(J.square().sum(), weight)
    right = (x @ weight).cos()[:, :, None] * weight.T
    compare(found, torch.autograd.grad(right.square().sum(), weight)[0], rtol=1e-8)


def test_hooks_and_grad_fields_are_untouched() -> None:
    model, x = network(), torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    seen: list[int] = []
    x.register_hook(lambda gradient: seen.append(1))
    J = estimated(model)(x)
    assert J.requires_grad
    assert seen == []
    assert x.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("coupled", [False, True])
def test_the_gradient_through_every_candidate_agrees(coupled: bool) -> None:
    model = network()

    def func(x: Tensor) -> Tensor:
        return model(x - x.mean(0)) if coupled else model(x)

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    request, _, problem = planned(func, (x,))
    assert problem.differentiable
    reference = Reference(problem, request.leaves, {}, Sandbox(()), trained=request.trained)
    right: list[Tensor] = []
    for kind in registry().values():
        for method in kind.candidates(problem, 1):
            if "Compiled" in repr(method) or method.unsupported(problem) is not None:
                continue
            result = method.prepare(problem)(request.leaves, {})
            assert reference.check(result) is None
            assert reference.check_gradient(result) is None
            found = gradients(result.jacobians[0][0], model, x)
            right = right or found
            compare(found, right, rtol=1e-8)
    assert right


def test_a_wrong_graph_is_caught() -> None:
    model, x = network(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    request, _, problem = planned(model, (x,))
    reference = Reference(problem, request.leaves, {}, Sandbox(()), trained=request.trained)
    result = registry()["PerSample"](mode="reverse").prepare(problem)(request.leaves, {})  # type: ignore[call-arg]
    J = result.jacobians[0][0]
    detached = result._replace(jacobians=((J.detach() + 0 * J,),))
    assert reference.check(detached) is None
    assert "gradient through J" in str(reference.check_gradient(detached))


@pytest.mark.parametrize("nested", [False, True])
def test_a_keyword_argument_that_is_trained_is_reached(nested: bool) -> None:
    w, x = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.randn(6, 3, dtype=torch.float64)
    jac = estimated(lambda x, *, w: (x * (w[0] if nested else w)).sin())
    J = jac(x, w=[w] if nested else w)
    (found,) = torch.autograd.grad(J.sum(), w)
    compare(found, ((x * w).cos() - x * w * (x * w).sin()).sum(0).detach())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_function_without_a_second_derivative_is_tuned_all_the_same() -> None:
    func, (x,), _ = BY_NAME["TransformerEncoderLayer in eval mode"].make()
    jac = AutoJacobian(func, on_miss="tune", budget_s=0.1, store=":memory:")
    compare(jac(x).detach(), jacobian_blocks(func, (x,)))
