"""Fewer threads for small Jacobians: right as ever, and the caller's number is put back whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from autojac import AutoJacobian
from autojac.methods.base import build
from autojac.methods.threads import Threads, threads
from autojac.planning.search import looks, measure
from harness import Scripted, Ticking, compare, forced, planned
from oracle import jacobian_blocks

LOOP = {"method": "Pull", "seeds": "shared", "engine": "loop", "chunk": None}
METHODS = [LOOP, {"method": "Replay", "inner": LOOP, "without": None}]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    with threads(2):
        yield


class Seen:
    """A function that notes by how many threads its operators would run."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.counts.append(torch.get_num_threads())
        return x.sin()

    def __autojac_reach__(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("method", METHODS, ids=["eager", "replay"])
@pytest.mark.parametrize("grad", [False, True])
def test_results_are_right_and_the_callers_threads_stay(method: dict[str, Any], grad: bool) -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=grad)
    jac = forced(torch.sin, (x,), {"method": "Threads", "count": 1, "inner": method})
    for scale in (1, 2, 3):
        J = jac(scale * x)
        compare(J.detach(), jacobian_blocks(torch.sin, (scale * x.detach(),)))
        assert torch.get_num_threads() == 2
    if grad:
        (second,) = torch.autograd.grad(J.sum(), x)
        compare(second, -3 * (3 * x).sin().detach())
    assert torch.get_num_threads() == 2
    assert "Threads" in str(jac.plan(x))


def test_func_runs_with_the_threads_of_its_plan() -> None:
    func = Seen()
    x = torch.randn(6, 3)
    _, _, problem = planned(func, (x,))
    func.counts.clear()
    build({"method": "Threads", "count": 1, "inner": LOOP}).prepare_call(problem)([x], {})
    assert set(func.counts) == {1}


@pytest.mark.parametrize("method", METHODS, ids=["eager", "replay"])
def test_an_interrupt_puts_the_callers_threads_back(method: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 3)
    _, _, problem = planned(torch.sin, (x,))
    compute = build({"method": "Threads", "count": 1, "inner": method}).prepare_call(problem)
    compute([x], {})

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    if hasattr(compute, "bound"):
        monkeypatch.setattr(type(compute), "_run_program", interrupt)
    else:
        monkeypatch.setattr(torch.autograd, "grad", interrupt)
        monkeypatch.setattr(type(problem), "fn", property(lambda self: interrupt), raising=False)
    with pytest.raises(KeyboardInterrupt):
        compute([x], {})
    assert torch.get_num_threads() == 2


def test_they_are_no_candidate_where_torch_has_one_anyway() -> None:
    _, _, problem = planned(torch.sin, (torch.randn(6, 3),))
    method = build({"method": "Threads", "count": 1, "inner": LOOP})
    assert method.unsupported(problem) is None
    with threads(1):
        assert "no more than 1 threads" in str(method.unsupported(problem))


def test_a_search_tries_them_for_its_fastest_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-3, tick=0.0))
    monkeypatch.setattr(looks, "COMPILED_PROGRAMS", 0)
    x = torch.randn(8, 3)
    tried = AutoJacobian(torch.sin, store=":memory:", on_miss="tune").plan(x).trials
    single = [trial for trial in tried if trial.method["method"] == "Threads"]
    assert len(single) >= looks.THREADED
    assert torch.get_num_threads() == 2


class SlowToWake(Scripted):
    """A machine whose threads take so long to wake that all threads say nothing of what methods take with one."""

    def cost(self, spec: dict[str, Any]) -> float:
        """Return 1 ms, or with one thread a tenth of that for `Push` and half of it for others."""
        if spec["method"] != "Threads":
            return 1e-3
        return 1e-4 if "Push" in str(spec) else 5e-4


@pytest.mark.parametrize("effort", ["quick", "measure", "exhaustive"])
def test_where_one_thread_pays_other_methods_are_tried_with_one(effort: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    SlowToWake(monkeypatch, tick=0.0)
    monkeypatch.setattr(looks, "COMPILED_PROGRAMS", 0)
    x = torch.randn(64, 3, dtype=torch.float64)
    jac = AutoJacobian(torch.sin, store=":memory:", on_miss="tune", effort=effort)
    compare(jac(x), jacobian_blocks(torch.sin, (x,)))
    chosen = build(jac.plan(x).method)
    assert isinstance(chosen, Threads)
    assert "Push" in str(chosen)
    assert not any("Threads" in str(trial.method["inner"]) for trial in jac.plan(x).trials if "inner" in trial.method)


def test_one_thread_that_wins_for_few_samples_says_nothing_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slice of the batch it may be so fast that nothing else is run on the batch."""
    SlowToWake(monkeypatch, tick=0.0)
    monkeypatch.setattr(looks, "COMPILED_PROGRAMS", 0)
    monkeypatch.setattr(looks, "SLICE", 1024)
    jac = AutoJacobian(torch.sin, store=":memory:", on_miss="tune")
    assert isinstance(build(jac.plan(torch.randn(64, 3)).method), Threads)
    plan = jac.plan(torch.randn(4096, 3))
    looked_at = [build(trial.method) for trial in plan.trials if trial.seconds is not None]
    assert any(not isinstance(method, Threads) for method in looked_at)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before
