"""Functions that assign to a tensor's `.data`: torch.func's transforms crash on them, so no plan goes through these.

A crash would take the suite with it, so these calls are made by another process.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian, PlanStore
from autojac.core.structure import EXCHANGES
from harness import compare, forced, in_use
from oracle import jacobian_blocks

HERE = Path(__file__).parent


class Normalized(nn.Module):
    """As activation normalization does at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.data = -x.std(0).log()
        return x * self.scale.exp()


class Moved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        self.to(x.device)
        return torch.tanh(self.linear(x))


class Like(Moved):
    def forward(self, x: Tensor) -> Tensor:
        self.to(x)
        return torch.tanh(self.linear(x))


class Quantized(nn.Module):
    """As quantization-aware layers do with their ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.range: Tensor
        self.register_buffer("range", torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.range.data = x.detach().abs().amax(0)
        return torch.sin(x / self.range)


class Rounded(Moved):
    """With its weights in the place of others for the length of a call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight.data
        self.linear.weight.data = (8 * weight).round() / 8
        y = torch.tanh(self.linear(x))
        self.linear.weight.data = weight
        return y


class Local(Moved):
    def forward(self, x: Tensor) -> Tensor:
        gain = torch.zeros(2, dtype=x.dtype)
        gain.data = x.detach()[:, :2]
        return self.linear(x) * gain


CASES: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind for kind in (Normalized, Moved, Like, Quantized, Rounded, Local)
}


def right(name: str) -> None:
    """Call such a module through each kind of plan, and look whether its tensors are where they were."""
    for options in ({"on_miss": "estimate"}, {"effort": "quick", "budget_s": 0.3}):
        for differentiable in (False, True):
            model = CASES[name]().requires_grad_(differentiable)
            tensors = [*model.parameters(), *model.buffers()]
            addresses = [tensor.data_ptr() for tensor in tensors]
            jac = AutoJacobian(model, store=":memory:", **options)
            x = torch.linspace(-1, 2, 24, dtype=torch.float64).reshape(8, 3).sin()
            plan = jac.plan(x)
            assert EXCHANGES in plan.structure.effects
            assert [tensor.data_ptr() for tensor in tensors] == addresses
            for turn in range(3):
                compare(jac(x + turn), jacobian_blocks(model, (x + turn,)))


def stored(name: str) -> None:
    """A plan that was made when the function did not do that."""
    x = torch.linspace(-1, 2, 24, dtype=torch.float64).reshape(8, 3).sin()
    for method in (
        {"method": "PerSample", "mode": "reverse"},
        {"method": "Replay", "inner": {"method": "Pull", "seeds": "shared", "engine": "vmap"}},
        {"method": "Push", "seeds": "shared", "engine": "vmap"},
    ):
        for effects in ((EXCHANGES,), ()):
            options: dict[str, Any] = {"on_miss": "estimate", "store": PlanStore(":memory:")}
            maker = AutoJacobian(CASES[name](), **options)
            plan = maker.plan(x)
            entry = in_use(maker)
            assert entry.keys is not None
            structure = dataclasses.replace(plan.structure, effects=effects)
            maker._plans.planner.repository.save(
                entry.keys, dataclasses.replace(plan, method=method, structure=structure)
            )
            jac = AutoJacobian(maker.func, **options)
            compare(jac(x), jacobian_blocks(maker.func, (x,)))
            assert jac.plan(x).method["method"] not in ("PerSample", "Push")


class Later(nn.Module):
    """Takes to it while its plan is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).double()
        self.assigns = False

    def forward(self, x: Tensor) -> Tensor:
        if self.assigns:
            self.to(x.device)
        return torch.tanh(self.linear(x))


METHODS: dict[str, list[dict[str, Any]]] = {
    "PerSample": [{"method": "PerSample", "mode": mode} for mode in ("reverse", "forward")],
    "Pull": [{"method": "Pull", "seeds": "shared", "engine": "vmap"}],
    "Push": [{"method": "Push", "seeds": "shared", "engine": "vmap"}],
    "Replay": [{"method": "Replay", "inner": {"method": "Pull", "seeds": "shared", "engine": "vmap"}}],
}


def later(name: str) -> None:
    """One for each method that goes through transforms."""
    x = torch.linspace(-1, 2, 24, dtype=torch.float64).reshape(8, 3).sin()
    for method in METHODS[name]:
        for differentiable in (False, True):
            model = Later().requires_grad_(differentiable)
            jac = forced(model, (x,), method)
            assert jac.plan(x).method["method"] == name
            for turn in range(6):
                model.assigns = turn > 2
                compare(jac(x + turn), jacobian_blocks(model, (x + turn,)))


NAMES = {"right": CASES, "stored": CASES, "later": METHODS}


@pytest.mark.parametrize(
    ("what", "every"),
    [("right stored later", 5), *(pytest.param(what, 1, marks=pytest.mark.nightly) for what in NAMES)],
)
def test_no_transform_meets_an_assignment_to_data(what: str, every: int) -> None:
    code = f"""
import test_data_assigned as t
for what in {what.split()}:
    for name in list(t.NAMES[what])[::{every}]:
        print(name, flush=True)
        getattr(t, what)(name)
"""
    path = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout.split()[-1:]}\n{done.stderr}"
