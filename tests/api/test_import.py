"""`import autojac` loads torch and nothing heavier, and neither mode loads torch's compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HEAVY = {"alembic", "click", "optuna", "plotly", "rich", "rustworkx", "scipy", "sqlalchemy"}

LOADED_BEYOND_TORCH = """
import gc, json, sys, torch
before = set(sys.modules)
gc.set_threshold(100, 1, 1)
collected = []
gc.callbacks.append(lambda phase, info: collected.append(info["generation"]))
import autojac
del gc.callbacks[:]
gc.set_threshold(700, 10, 10)
autojac.AutoJacobian
print(json.dumps([sorted(set(sys.modules) - before), gc.isenabled(), len(collected) // 2]))
"""


def test_import_loads_nothing_heavy_beyond_torch(printed: list[Any]) -> None:
    loaded, _, _ = printed[0]
    heavy = [name for name in loaded if name.split(".")[0] in HEAVY or name.startswith("torch._dynamo")]
    assert not heavy


def test_nothing_is_collected_while_autojac_is_imported(printed: list[Any]) -> None:
    _, enabled, collections = printed[0]
    assert enabled
    assert collections <= 5  # before it begins and after it ends; hundreds on the way otherwise


DIFFERENTIATED = """
import json, sys, torch
import autojac
from autojac.autodiff.primitives import functional_jvp, functional_vjp, vmap
from autojac.graph.recorder import record
from autojac.guards.guard import Guard
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5), torch.nn.Tanh())
x, func = torch.randn(4, 3), lambda x: (2 * net(x) + 1,)
J = autojac.AutoJacobian(net, effort="estimate", store=":memory:")(x)
(y,), pullback = functional_vjp(func, (x,))
(pulled,) = vmap(lambda seed: pullback((seed.expand(4, 5),)))(torch.eye(5))
pushed = vmap(lambda seed: functional_jvp(func, (x,), (seed.expand(4, 3),))[1][0])(torch.eye(3))
norm = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
assert record(lambda leaves, kwargs: (norm(leaves[0]),), [torch.randn(5, 3)], {}, [0]).graph
guard = Guard(norm)
assert guard.is_unchanged() and guard.diff().what == ""
apart = [(2 * J - pulled.movedim(0, 1)).abs().max().item(), (2 * J - pushed.movedim(0, 2)).abs().max().item()]
print(json.dumps([apart, [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]]))
"""


def test_first_calls_transforms_recordings_and_guards_load_no_compiler(printed: list[Any]) -> None:
    apart, loaded = printed[1]
    assert max(apart) < 1e-12
    assert not loaded


SERVED = """
import json, sys, torch
import autojac
from harness import forced
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh()).double()
def func(x):
    y = net(x)
    return y, 2 * y.sum(1) + 1
x = torch.randn(4, 3, dtype=torch.float64)
expected = autojac.AutoJacobian(func, effort="estimate", store=":memory:")(x)
pull = {"method": "Pull", "seeds": "shared", "engine": "vmap", "chunk": None}
methods = [
    pull,
    {"method": "PerSample", "mode": "reverse", "chunk": None},
    {"method": "PerSample", "mode": "reverse", "chunk": 3},
    {"method": "Push", "seeds": "shared", "engine": "loop", "chunk": None},
]
methods += [{"method": "Replay", "inner": inner} for inner in methods]
apart = []
for method in methods:
    jac = forced(func, (x,), method)
    found = jac(x)
    assert jac.plan(x).method == method
    apart += [(one - other).abs().max().item() for one, other in zip(found, expected)]
print(json.dumps([apart, [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]]))
"""


@pytest.fixture(scope="module")
def printed() -> list[Any]:
    """What the three scripts print, run one after the other by one fresh process."""
    tests = str(Path(__file__).parents[1])
    paths = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", LOADED_BEYOND_TORCH + DIFFERENTIATED + SERVED]
    environment = {**os.environ, "PYTHONPATH": paths}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [json.loads(line) for line in output.stdout.splitlines()]


def test_neither_methods_nor_their_replays_load_the_compiler(printed: list[Any]) -> None:
    apart, loaded = printed[2]
    assert max(apart) < 1e-12
    assert not loaded
