"""What is timed in a process of its own: first calls and searches, with nothing loaded or learnt before."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import autojac
from autojac.bench.workloads import WORKLOADS, Func
from autojac.core.call import CallLayout
from autojac.core.options import OnMiss
from autojac.core.plan import Effort

LOADED = ("sqlalchemy.dialects.sqlite", "scipy.sparse", "torch._functorch.aot_autograd")
HEAVY = ("alembic", "sqlalchemy.orm", "optuna", "torch._dynamo")
"""Modules that take long to load and that a first Jacobian from a warm store does without."""
NOT_NEEDED = ("bench", "cli", "report", "__main__", "migrations")


def since_torch(store: str, effort: Effort, on_miss: OnMiss) -> dict[str, Any]:
    """Time the first Jacobian of this process from when torch was loaded, and list what else was loaded on the way."""
    loaded = sys.modules["__main__"].loaded_torch
    func, x = WORKLOADS["sin"].make()
    jac = autojac.AutoJacobian(func, store=store, on_miss=on_miss, effort=effort)
    jac(x)
    seconds = time.perf_counter() - loaded
    return {
        "seconds": seconds,
        "source": jac.plan(x).source,
        "loaded": [name for name in HEAVY if name in sys.modules],
    }


def load_everything() -> None:
    """Load all that a call or a search imports on its way."""
    for module in pkgutil.walk_packages(autojac.__path__, "autojac."):
        if not any(part in NOT_NEEDED for part in module.name.split(".")):
            importlib.import_module(module.name)
    for name in (*HEAVY, *LOADED):
        importlib.import_module(name)


def _evaluate(self: CallLayout, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    evaluations.append(None)  # type: ignore[name-defined]  # noqa: F821
    return evaluate(self, leaves, kwargs)  # type: ignore[name-defined, no-any-return]  # noqa: F821


@contextmanager
def count_evaluations() -> Iterator[list[None]]:
    """Count how often autojac evaluates functions, which are what they were: nothing keeps them from being recorded.

    A replay of what was recorded is no evaluation.
    """
    evaluations: list[None] = []
    scope = {"__name__": CallLayout.__module__, "evaluations": evaluations, "evaluate": CallLayout.fn}
    # in the namespace of what it replaces, so that guards take it for autojac's own and not for a part of func
    with mock.patch.object(CallLayout, "fn", types.FunctionType(_evaluate.__code__, scope)):
        yield evaluations


def cold_call(workload: str, options: dict[str, Any]) -> dict[str, float]:
    """CPU seconds after imports, wall seconds, and evaluations of a first call with an empty store."""
    load_everything()
    func, x = WORKLOADS[workload].make()
    store = autojac.PlanStore(":memory:")
    with count_evaluations() as evaluations:
        spent = _cpu_seconds(lambda: autojac.AutoJacobian(func, store=store, **options)(x))
    return {**spent, "evaluations": len(evaluations)}


def _cpu_seconds(run: Callable[[], object]) -> dict[str, float]:
    start, spent = time.perf_counter(), time.process_time()
    run()
    return {"cpu s": time.process_time() - spent, "wall s": time.perf_counter() - start}


def signatures(kind: str) -> dict[str, float]:
    """Time one call for each of many signatures of a function, as they come in a data set."""
    load_everything()
    torch.manual_seed(0)
    func, points = SIGNATURES[kind]()
    jac = autojac.AutoJacobian(func, store=autojac.PlanStore(":memory:"))
    # what a process pays once is no matter of signatures
    jac(points[0])
    return {**_cpu_seconds(lambda: [jac(x) for x in points[1:]]), "signatures": len(points) - 1}


class Encoder(nn.Module):
    """Attention within each sequence, (B, L, 16) → (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attend(x, x, x, need_weights=False)
        out: Tensor = self.head(torch.tanh(mixed).mean(1))
        return out


def energy(positions: Tensor) -> Tensor:
    """Lennard-Jones energies of molecules (B, atoms, 3) → (B,)."""
    distant = (positions[:, :, None] - positions[:, None]).square().sum(-1)
    far = distant + 1e3 * torch.eye(distant.shape[-1])
    return (far.pow(-6) - far.pow(-3)).sum((1, 2))


def lengths() -> tuple[Func, Sequence[Tensor]]:
    return Encoder().requires_grad_(False).eval(), [torch.randn(8, length, 16) for length in range(8, 34, 2)]


def batches() -> tuple[Func, Sequence[Tensor]]:
    func, _ = WORKLOADS["mlp-6-64-64-6"].make()
    return func, [torch.randn(batch, 6) for batch in range(16, 16 + 61 * 3, 3)]


def molecules() -> tuple[Func, Sequence[Tensor]]:
    return energy, [torch.randn(16, atoms, 3) for atoms in range(4, 22, 2)]


SIGNATURES: dict[str, Callable[[], tuple[Func, Sequence[Tensor]]]] = {
    "sequence lengths": lengths,
    "batch sizes": batches,
    "molecule sizes": molecules,
}
