"""Memory that runs out in a call: a plan that takes less serves it, which is told once, and nothing is lost."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from autojac import AutoJacobian, PerformanceWarning, PlanStore
from autojac.core.plan import Trial
from autojac.methods.batch_chunk import BatchChunk
from autojac.methods.pull import Pull
from autojac.planning.demotion import smaller
from autojac.problem.problem import Problem
from harness import compare, forced, in_use, planned
from oracle import jacobian_blocks

PULL = Pull("shared", "batched").spec()
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


def func(x: Tensor) -> Tensor:
    return x.sin() * x.sum(1, keepdim=True)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """For how many samples at a time there is memory."""
    left = {"samples": 1e9}
    real = Pull.prepare

    def prepare(self: Pull, problem: Problem) -> Any:
        compute = real(self, problem)

        def run(leaves: Any, kwargs: Any) -> Any:
            if problem.batch > left["samples"]:
                raise torch.OutOfMemoryError(FULL)
            return compute(leaves, kwargs)

        return run

    monkeypatch.setattr(Pull, "prepare", prepare)
    return left


@pytest.mark.parametrize("verify", ["auto", "always", "never"])
def test_a_call_without_room_is_served_in_smaller_chunks_and_told_once(verify: Any, room: dict[str, float]) -> None:
    store = PlanStore(":memory:")
    x = torch.randn(64, 3, dtype=torch.float64)
    jac = forced(func, (x,), PULL, store=store, verify=verify)
    compare(jac(x), jacobian_blocks(func, (x,)))
    before, keys = jac.plan(x).method, in_use(jac).keys
    assert keys is not None
    room["samples"] = 8
    with pytest.warns(PerformanceWarning, match="memory ran out in the plan") as told:
        compare(jac(2 * x), jacobian_blocks(func, (2 * x,)))
        for scale in (3, 4, 5):
            compare(jac(scale * x), jacobian_blocks(func, (scale * x,)))
    assert len(told) == 1
    plan = jac.plan(x)
    assert (plan.method["method"], plan.method["size"], plan.source) == ("BatchChunk", 8, "demoted")
    stored = store.find(*keys)
    assert stored is not None
    assert stored.method == before


def test_memory_that_runs_out_at_the_first_check_refutes_nothing(room: dict[str, float]) -> None:
    store = PlanStore(":memory:")
    x = torch.randn(64, 3, dtype=torch.float64)
    plan = forced(func, (x,), PULL, store=store).plan(x)
    room["samples"] = 16
    jac = AutoJacobian(func, on_miss="estimate", randomness="different", store=store)
    with pytest.warns(PerformanceWarning):
        compare(jac(x), jacobian_blocks(func, (x,)))
    assert AutoJacobian(func, on_miss="error", randomness="different", store=store).plan(x).method == plan.method


def test_where_nothing_has_room_the_error_reaches_the_user(room: dict[str, float]) -> None:
    x = torch.randn(64, 3, dtype=torch.float64)
    jac = forced(func, (x,), PULL)
    jac(x)
    room["samples"] = 0
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        jac(x)
    room["samples"] = 1e9
    compare(jac(x), jacobian_blocks(func, (x,)))


def test_plans_that_were_measured_to_take_less_come_first_by_time() -> None:
    x = torch.randn(64, 3, dtype=torch.float64)
    _, _, problem = planned(func, (x,))
    plan = AutoJacobian(func, on_miss="estimate", store=":memory:").plan(x)
    slow, fast, large = (BatchChunk(size, Pull("shared")) for size in (4, 32, 48))
    trials = (
        Trial(slow.spec(), "complete", 3.0, memory_bytes=10),
        Trial(large.spec(), "complete", 1.0, memory_bytes=200),
        Trial(fast.spec(), "complete", 2.0, memory_bytes=50),
    )
    method = Pull("shared")
    chosen = dataclasses.replace(plan, method=method.spec(), memory_bytes=100, trials=trials)
    found = list(smaller(problem, chosen))
    assert found[:2] == [fast, slow]
    assert [m.size for m in found[2:] if isinstance(m, BatchChunk)] == [32, 16, 8, 4, 2, 1]
    assert found[-1] == Pull.suiting(problem, "loop")
