"""Operators whose forward mode has a wrong derivative in torch: which ones, and that nothing trained pushes them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autojac import AutoJacobian
from autojac.graph.operators import FORWARD_ONCE
from autojac.graph.special_kernels import ATTENTION
from autojac.methods.base import build, registry
from harness import forced, planned

F = torch.nn.functional
UNTESTED = {"cudnn_batch_norm"}
"""It runs on a GPU alone, by the formula of `native_batch_norm`."""
WRONG = (
    *("native_layer_norm", "nn.functional.layer_norm", "native_batch_norm", "_native_batch_norm_legit"),
    *("_batch_norm_with_update", "nn.functional.instance_norm", "linalg.det", "linalg.slogdet", "linalg.solve_ex"),
    "linalg.householder_product",
)
RIGHT = ("nn.functional.group_norm", "nn.functional.rms_norm", "nn.functional.prelu", "logit", "linalg.inv", "var")
PUSH = {"method": "Push", "seeds": "shared", "engine": "loop", "chunk": None}
FORWARD = [
    PUSH,
    {**PUSH, "engine": "vmap"},
    {**PUSH, "seeds": "identity"},
    {"method": "PerSample", "mode": "forward", "chunk": None},
    {"method": "Replicate", "mode": "forward"},
    {"method": "Replay", "inner": PUSH, "without": None},
]


def report(names: Sequence[str]) -> dict[str, Any]:
    script = Path(__file__).parents[1] / "forward_formulas.py"
    done = subprocess.run([sys.executable, str(script), *names], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def hold(found: dict[str, Any]) -> None:
    for name, entry in found.items():
        for operators in entry["wrong"]:
            assert operators, f"forward mode's derivative of {name} is wrong: add its operator to FORWARD_ONCE"
    seen = {operator for entry in found.values() for operators in entry["wrong"] for operator in operators}
    assert seen - {ATTENTION} == FORWARD_ONCE - UNTESTED, "torch has mended some: take them out of FORWARD_ONCE"


@pytest.mark.nightly  # of torch alone
def test_the_table_is_what_torch_shows() -> None:
    found = report([*WRONG, *RIGHT])
    hold(found)
    assert all(found[name]["compared"] for name in (*WRONG, *RIGHT))
    assert not any(found[name]["wrong"] for name in RIGHT)


@pytest.mark.nightly
def test_no_other_operator_is_wrong() -> None:
    found = report([])
    hold(found)
    assert sum(entry["compared"] for entry in found.values()) > 5000


def matrices(x: Tensor) -> Tensor:
    return x.reshape(len(x), 3, 3) + 4 * torch.eye(3, dtype=x.dtype)


LIN = torch.nn.Linear(9, 9).double()
RUN: dict[str, tuple[str, Any]] = {
    "layer norm": ("native_layer_norm", lambda x: F.layer_norm(LIN(x), (9,)).tanh()),
    "instance norm": ("native_batch_norm", lambda x: F.instance_norm(x.reshape(len(x), 3, 3)).flatten(1)),
    "determinant": ("_linalg_det", lambda x: torch.linalg.det(matrices(x))[:, None]),
    "its logarithm": ("_linalg_slogdet", lambda x: torch.linalg.slogdet(matrices(x))[1][:, None]),
    "solve": ("_linalg_solve_ex", lambda x: torch.linalg.solve(matrices(x), x[:, :3])),
    "reflections": (
        "linalg_householder_product",
        lambda x: torch.linalg.householder_product(matrices(x), x[:, :3]).flatten(1),
    ),
    "not taken": (
        "native_layer_norm",
        lambda x: torch.where(x.abs().amax() > 5, F.layer_norm(LIN(x), (9,)), LIN(x)).tanh(),
    ),
}
POINT = torch.linspace(-0.9, 0.8, 36, dtype=torch.float64).reshape(4, 9)


def pushing(problem: Any) -> list[Any]:
    """Every candidate that may push, and those forced here."""
    every = [m for kind in registry().values() for m in kind.candidates(problem, 2)]
    return [m for m in (*every, *map(build, FORWARD)) if m.pushes]


@pytest.mark.parametrize("name", RUN)
def test_no_trained_jacobian_is_pushed_through_such_an_operator(name: str) -> None:
    operator, func = RUN[name]
    *_, trained = planned(func, (POINT.clone().requires_grad_(),))
    assert operator in trained.structure.kernels
    for method in pushing(trained):
        # a method that needs slices is ruled out before, where the graph reads several samples
        otherwise = method.unsupported(dataclasses.replace(trained, differentiable=False))
        assert (otherwise or operator) in str(method.unsupported(trained)), method
    with torch.no_grad():
        *_, plain = planned(func, (POINT,))
    assert build(PUSH).unsupported(plain) is None


@pytest.mark.parametrize("method", FORWARD, ids=str)
def test_a_stored_plan_that_pushes_is_not_used(method: dict[str, Any]) -> None:
    func = RUN["not taken"][1]
    x = POINT.clone().requires_grad_()
    jac = forced(func, (x,), method)
    far = (POINT * 10).requires_grad_()
    jac(x)
    jacobian = jac(far)
    assert jac.plan(x).method["method"] != method["method"]
    (found,) = torch.autograd.grad(jacobian.square().sum(), far)
    rows = [torch.autograd.grad(y.sum(), far, create_graph=True)[0] for y in func(far).unbind(1)]
    (right,) = torch.autograd.grad(torch.stack(rows, 1).square().sum(), far)
    torch.testing.assert_close(found, right)


class Later(torch.nn.Module):
    """A network that comes to use the layer that it holds."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.lin, self.layer, self.norm = LIN, layer, torch.nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.lin(x)).tanh()


def far_apart(x: Tensor) -> Tensor:
    h = LIN(x)
    return F.layer_norm(h, (9,)) if x.abs().amax() > 5 else h


@pytest.mark.parametrize(
    "func",
    [Later(torch.nn.LayerNorm(9).double()), Later(torch.nn.InstanceNorm1d(3).double()), far_apart],
    ids=["a layer", "another layer", "a branch"],
)
def test_what_another_branch_may_run_counts_too(func: Any) -> None:
    x = POINT.clone().requires_grad_()
    *_, problem = planned(func, (x,))
    for method in pushing(problem):
        # one with fewer threads is ruled out before, where torch has no more
        otherwise = method.unsupported(dataclasses.replace(problem, differentiable=False))
        assert (otherwise or "may run native") in str(method.unsupported(problem)), method
    with torch.no_grad():
        *_, problem = planned(func, (POINT,))
    assert build(PUSH).unsupported(problem) is None


@pytest.mark.parametrize(
    "func",
    [
        torch.nn.Sequential(torch.nn.Linear(9, 5), torch.nn.BatchNorm1d(5)).double().eval(),
        lambda x: F.group_norm(LIN(x), 3),
        lambda x: torch.linalg.solve(torch.eye(9, dtype=x.dtype) * 2, LIN(x)[..., None])[..., 0],
    ],
    ids=["running statistics", "group norm", "of a constant matrix"],
)
def test_others_are_pushed_as_ever(func: Any) -> None:
    x = POINT.clone().requires_grad_()
    jac = forced(func, (x,), PUSH)
    jac(x)
    assert jac.plan(x).method == PUSH


def test_what_is_said_names_the_operator() -> None:
    jac = AutoJacobian(RUN["layer norm"][1], on_miss="estimate", store=":memory:")
    x = POINT.clone().requires_grad_()
    assert "it may use native_layer_norm" in jac.explain(x)
    assert "native_layer_norm, whose forward mode" in str(build(PUSH).unsupported(planned(jac.func, (x,))[2]))
