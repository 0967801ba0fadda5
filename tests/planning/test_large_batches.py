"""Searches for large batches: a slice of the batch says what is worth a run on all of it, whatever time there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian
from autojac.methods.base import build
from autojac.methods.batch_chunk import BatchChunk
from autojac.methods.per_sample import PerSample
from autojac.methods.pull import Pull
from autojac.methods.replay import Replay
from autojac.methods.threads import Threads
from autojac.planning import exploration
from autojac.planning.search import looks, measure, race, trial
from autojac.planning.search.space import of_one_chunk, waits_for_compiler, with_all_threads
from harness import Scripted, Ticking, compare

SLICE = 1024
BATCH = 4 * SLICE


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double().requires_grad_(False)


def exact(net: Any, x: Tensor) -> Tensor:
    first, _, last = net
    return torch.einsum("oh,bh,hi->boi", last.weight, 1 - first(x).tanh() ** 2, first.weight)


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, Any]]:
    """The looks of a search, in order: whether each was on the slice, and the candidate."""
    found: list[tuple[bool, Any]] = []

    def watch(module: Any, on_slice: bool) -> None:
        true = module.look

        def look(session: Any, method: Any, *rest: Any) -> Any:
            found.append((on_slice, method))
            return true(session, method, *rest)

        monkeypatch.setattr(module, "look", look)

    watch(looks, on_slice=True)
    watch(race, on_slice=False)
    monkeypatch.setattr(looks, "SLICE", SLICE)
    return found


@pytest.mark.parametrize("tick", [0.01, 0.03, 0.1, 0.3])
def test_the_slice_leaves_time_for_the_batch(
    net: nn.Module, looked: list[tuple[bool, Any]], tick: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-3, tick=tick))
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    jac = AutoJacobian(net, store=":memory:", on_miss="tune", budget_s=3.0)
    compare(jac(x), exact(net, x))
    on_slice = [method for was_on_slice, method in looked if was_on_slice]
    on_batch = [method for was_on_slice, method in looked if not was_on_slice]
    assert on_slice
    assert of_one_chunk(on_batch[0]) in on_slice
    plan = jac.plan(x)
    left = [method for t in plan.trials if t.is_untried and not waits_for_compiler(method := build(t.method))]
    assert plan.finished == (not left)
    assert not set(left) & set(on_batch)


def test_where_time_is_up_the_batch_is_computed_by_what_was_fastest_on_the_slice(
    net: nn.Module, looked: list[tuple[bool, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Ticking(tick=0.0)
    monkeypatch.setattr(measure, "clock", clock)
    true = looks.look

    def look(session: Any, method: Any, *rest: Any) -> Any:
        clock.time += 100.0 * (len(looked) > 3)
        return true(session, method, *rest)

    monkeypatch.setattr(looks, "look", look)
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    jac = AutoJacobian(net, store=":memory:", on_miss="tune", budget_s=4.0)
    compare(jac(x), exact(net, x))
    assert [was_on_slice for was_on_slice, _ in looked] == [True] * (len(looked) - 1) + [False]
    assert any(method.makes_flat_programs for _, method in looked[:-1])
    assert of_one_chunk(looked[-1][1]).makes_flat_programs


def test_the_cost_model_says_in_which_form_a_method_is_run_first(
    net: nn.Module, looked: list[tuple[bool, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-3, tick=0.0))
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    true = looks.predicted_seconds

    def first_on_batch(favors_chunks: bool) -> Any:
        looked.clear()
        monkeypatch.setattr(
            looks,
            "predicted_seconds",
            lambda problem, method: (
                true(problem, method) * (1 if isinstance(method, BatchChunk) == favors_chunks else 9)
            ),
        )
        compare(AutoJacobian(net, store=":memory:", on_miss="tune")(x), exact(net, x))
        return next(method for was_on_slice, method in looked if not was_on_slice)

    assert isinstance(first_on_batch(favors_chunks=True), BatchChunk)
    assert not isinstance(first_on_batch(favors_chunks=False), BatchChunk)


class FastPrograms(Scripted):
    """A clock by which recorded programs take a tenth of what all else does."""

    def cost(self, spec: dict[str, Any]) -> float:
        """Return 1 ms for programs, and 10 ms for others."""
        return 1e-3 if of_one_chunk(build(spec)).makes_flat_programs else 1e-2


def test_what_is_far_faster_on_the_slice_is_used_before_the_rest_is_looked_at(
    net: nn.Module, looked: list[tuple[bool, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    FastPrograms(monkeypatch)
    monkeypatch.setattr(exploration, "SHARE", 1e6)  # a step before each call
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    jac = AutoJacobian(net, store=":memory:")
    first = jac.plan(x).method
    assert not of_one_chunk(build(first)).makes_flat_programs
    for _ in range(20):
        compare(jac(x), exact(net, x))
        if jac.plan(x).method != first:
            break
    assert of_one_chunk(build(jac.plan(x).method)).makes_flat_programs
    assert [on_slice for on_slice, _ in looked].count(False) == 1
    on_slice = [method for was_on_slice, method in looked if was_on_slice]
    assert [method.makes_flat_programs for method in on_slice].count(True) == 1, "the others come later"
    for _ in range(20):
        compare(jac(x), exact(net, x))
    assert [method.makes_flat_programs for was_on_slice, method in looked if was_on_slice].count(True) > 1


def test_what_is_far_faster_on_the_slice_and_will_not_run_on_the_batch_holds_nothing_up(
    net: nn.Module, looked: list[tuple[bool, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    FastPrograms(monkeypatch)
    monkeypatch.setattr(exploration, "SHARE", 1e6)
    true, failed = race.look, []

    def look(session: Any, method: Any, *rest: Any) -> Any:
        if of_one_chunk(method).makes_flat_programs and len(failed) < 3:
            failed.append(method)
            state = ("skipped", "infeasible", "rejected")[len(failed) - 1]
            return session.record(method, state, reason="it does not run in this test")
        return true(session, method, *rest)

    monkeypatch.setattr(race, "look", look)
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    jac = AutoJacobian(net, store=":memory:")
    for _ in range(60):
        compare(jac(x), exact(net, x))
    assert len(failed) == 3
    assert of_one_chunk(build(jac.plan(x).method)).makes_flat_programs


def test_plans_with_one_thread_are_hints_for_a_large_batch_with_all() -> None:
    program = Replay(Pull("shared", "loop"))
    assert with_all_threads(Threads(1, program)) == program
    assert with_all_threads(BatchChunk(256, Threads(1, program))) == BatchChunk(256, program)
    assert with_all_threads(BatchChunk(256, program)) == BatchChunk(256, program)


def test_a_candidate_that_the_budget_cuts_short_is_tried_again(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was given much more time than the best takes has failed."""
    monkeypatch.setattr(trial, "LEAST_S", 0.1)
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 0.02, tick=0.0))
    true, slow = Replay.prepare, [True]

    def prepare(self: Replay, problem: Any) -> Any:
        compute = true(self, problem)

        def run(leaves: Any, kwargs: Any) -> Any:
            while slow:
                pass
            return compute(leaves, kwargs)

        return run if isinstance(self.inner, PerSample) else compute

    monkeypatch.setattr(Replay, "prepare", prepare)
    x = torch.randn(8, 3, dtype=torch.float64)

    def states(budget_s: float) -> dict[Any, str]:
        trials = AutoJacobian(net, store=None).tune(x, budget_s=budget_s).trials
        return {build(t.method): "not tried" if t.is_untried else t.state for t in trials}

    cut = Replay(PerSample("reverse"))
    assert states(0.39)[cut] == "not tried"
    slow.clear()
    assert states(60.0)[cut] == "complete"


def test_func_may_refuse_a_slice(net: nn.Module, looked: list[tuple[bool, Any]]) -> None:
    def picky(x: Tensor) -> Tensor:
        if len(x) == SLICE:
            raise ValueError("no batches of this size")
        out: Tensor = net(x)
        return out

    x = torch.randn(BATCH, 3, dtype=torch.float64)
    for on_miss in ("tune", "online"):
        jac = AutoJacobian(picky, store=":memory:", on_miss=on_miss, budget_s=0.5)
        for _ in range(3):
            compare(jac(x), exact(net, x))
    assert not any(was_on_slice for was_on_slice, _ in looked)


def test_a_candidate_that_hangs_on_the_slice_is_given_up(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "SLICE", SLICE)
    monkeypatch.setattr(trial, "LEAST_S", 0.1)
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-3, tick=0.02))

    def endless(*_: Any) -> Any:
        while True:
            pass

    monkeypatch.setattr(Replay, "prepare", lambda self, problem: endless)
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    jac = AutoJacobian(net, store=":memory:", on_miss="tune", budget_s=1.0)
    compare(jac(x), exact(net, x))


@pytest.mark.parametrize("batch", [64, BATCH])
@pytest.mark.parametrize("call_s", [0.02, 0.1, 0.3])
def test_each_search_gets_further_however_slow_calls_are(
    net: nn.Module, batch: int, call_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "SLICE", SLICE)
    x, timed = torch.randn(batch, 3, dtype=torch.float64), [0]
    for _ in range(20):
        monkeypatch.setattr(measure, "clock", Ticking(lambda true: call_s, tick=1e-4))
        plan = AutoJacobian(net, store=None, on_miss="tune").plan(x)  # the test's own store, another process each time
        timed.append(sum(t.seconds is not None for t in plan.trials))
        if plan.finished:
            break
    assert plan.finished
    assert timed == sorted(timed)


def test_a_program_that_hangs_leaves_its_method_to_be_tried(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Online, too, where a candidate is given what makes it one that has failed."""
    monkeypatch.setattr(trial, "LEAST_S", 0.05)
    monkeypatch.setattr(exploration, "SHARE", 1e6)
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 0.004, tick=1e-5))

    def endless(*_: Any) -> Any:
        while True:
            pass

    monkeypatch.setattr(Replay, "prepare", lambda self, problem: endless)
    x = torch.randn(16, 3, dtype=torch.float64)
    jac = AutoJacobian(net, store=":memory:")
    for _ in range(80):
        compare(jac(x), exact(net, x))
    trials = {build(t.method): t for t in jac.plan(x).trials}
    hung = [t for method, t in trials.items() if isinstance(method, Replay)]
    assert hung
    assert {t.state for t in hung if not waits_for_compiler(build(t.method))} == {"infeasible"}
    assert trials[Pull("shared", "loop")].seconds is not None
