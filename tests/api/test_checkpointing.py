"""Under hooks on saved tensors and inside custom Functions: checkpointing sees what one plan saves, J stays right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev
from torch.utils.checkpoint import checkpoint

from autojac import AutoJacobian
from autojac.methods.base import build
from autojac.planning.search import optimize
from harness import compare, planned


def scalar(x: Tensor) -> Tensor:
    return (x.sin().prod() + x.sum()) * x[0]


def unbatched(**options: Any) -> AutoJacobian:
    return AutoJacobian(scalar, **{"in_dims": None, "on_miss": "estimate", "store": ":memory:", **options})


def gradient(value: Tensor, x: Tensor) -> Tensor | None:
    """By `backward`, which reentrant checkpointing needs."""
    x.grad = None
    value.backward()
    return x.grad


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def expected(x: Tensor) -> Any:
    return grad(lambda x: (jacrev(scalar)(x) ** 2).sum())(x.detach())


@pytest.mark.by_day(8)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("verify", ["auto", "always"])
@pytest.mark.parametrize("on_miss", ["estimate", "tune"])
def test_checkpoints(x: Tensor, expected: Tensor, reentrant: bool, verify: str, on_miss: str) -> None:
    jac = unbatched(verify=verify, on_miss=on_miss)
    # the first call plans and later ones are checked now and then: neither may count among what is saved
    for _ in range(5):
        value = checkpoint(lambda x: (jac(x) ** 2).sum(), x, use_reentrant=reentrant)
        compare(gradient(value, x), expected)


@pytest.mark.parametrize("method", ["Pull vmap", "Pull batched", "PerSample reverse", "Push vmap"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_no_plan_fails_under_checkpoints(
    x: Tensor, expected: Tensor, method: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, setting = method.split()
    spec = {"method": name, "mode": setting}
    if name != "PerSample":
        spec = {"method": name, "seeds": "shared", "engine": setting}
    monkeypatch.setattr(optimize, "candidates", lambda problem, depth: [build(spec)])
    jac = unbatched(verify="always")
    compare(jac(x).detach(), jacrev(scalar)(x.detach()))
    assert jac.plan(x).method["method"] == name
    for _ in range(3):
        compare(gradient(checkpoint(lambda x: (jac(x) ** 2).sum(), x, use_reentrant=reentrant), x), expected)
    assert jac.plan(x).method["method"] == name


def test_a_recomputation_may_plan_anew(x: Tensor, expected: Tensor) -> None:
    value = checkpoint(lambda x: (unbatched()(x) ** 2).sum(), x, use_reentrant=False)
    compare(gradient(value, x), expected)


def test_saved_tensors_on_the_cpu(x: Tensor, expected: Tensor) -> None:
    with torch.autograd.graph.save_on_cpu():
        value = (unbatched()(x) ** 2).sum()
    compare(gradient(value, x), expected)


@pytest.mark.parametrize(
    "spec",
    [
        {"method": "Push", "seeds": "shared", "engine": "loop"},
        {"method": "Push", "seeds": "identity", "engine": "loop"},
        {"method": "Push", "seeds": "shared", "engine": "vmap"},
        {"method": "Replicate", "mode": "forward"},
        {"method": "PerSample", "mode": "forward"},
        {"method": "Pull", "seeds": "shared", "engine": "batched"},
    ],
    ids=lambda spec: " ".join(spec.values()),
)
def test_inside_the_forward_of_a_custom_function(spec: dict[str, Any]) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    _, _, problem = planned(torch.sin, (x,))
    compute = build(spec).prepare(problem)
    found = []

    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            found.append(compute((x,), {}).jacobians[0][0])
            return x.clone()

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            return cotangent

    Inside.apply(x.clone().requires_grad_())
    compare(found[0].detach(), torch.diag_embed(x.cos()))
