"""The search: right whatever the timings say, within its budget, and the default is never lost from sight."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac import AutoJacobian
from autojac.autodiff.open_modes import levels_restored, transforming
from autojac.core.plan import expression
from autojac.core.sandbox import Sandbox
from autojac.methods.base import Method, build, registry
from autojac.methods.batch_chunk import BatchChunk
from autojac.methods.compiled import Compiled
from autojac.methods.pull import Pull
from autojac.methods.replay import Replay, twin_by_autograd
from autojac.methods.threads import Threads
from autojac.planning.search import looks, measure, optimize, race, space, steps, trial
from autojac.planning.search.optimize import start_race
from autojac.planning.search.point import SearchPoint
from autojac.planning.search.space import candidates, choose, default_methods, path_of
from autojac.problem.problem import Problem
from autojac.problem.reference import Reference
from harness import Counted, Ticking, compare, planned
from oracle import jacobian_blocks


def tuned(func: Any, **options: Any) -> AutoJacobian:
    """A wrapper that searches before it answers."""
    return AutoJacobian(func, **{"store": ":memory:", "on_miss": "tune", **options})


CLOCKS: dict[str, Callable[[], Callable[[float], float]]] = {
    "inverted": lambda: lambda true: 1e-6 / max(true, 1e-9),
    "constant": lambda: lambda true: 1e-3,
    "random": lambda: partial(lambda draws, true: 10 ** draws.uniform(-5, -2), random.Random(0)),
    "drifting": lambda: partial(lambda turns, true: 1e-5 * next(turns), itertools.count(1)),
}
"""Clocks that make the worst of what is measured: whatever they say, results are right and budgets hold."""


def problem_of(func: Any, *args: Tensor, **options: Any) -> Problem:
    return planned(func, args, **options)[2]


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double().requires_grad_(False)


@pytest.mark.by_day(3)
@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_misleading_timings_still_give_right_results(
    net: nn.Module, clock: str, coupled: bool, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def func(x: Tensor) -> Tensor:
        return net(x - x.mean(0)) if coupled else net(x)

    monkeypatch.setattr(measure, "clock", Ticking(CLOCKS[clock]()))
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=grad)
    jac = tuned(func)
    compare(jac(x).detach(), jacobian_blocks(func, (x,)))
    compare(jac(x[:5]).detach(), jacobian_blocks(func, (x[:5],)))


def test_wrong_candidates_are_rejected_by_name_whatever_their_speed() -> None:
    """torch's own vmap(jacrev) through cdist is wrong without a word."""
    centres = torch.randn(4, 3, dtype=torch.float64)

    def func(x: Tensor) -> Tensor:
        return torch.cdist(x, centres)

    x = torch.randn(7, 3, dtype=torch.float64)
    jac = tuned(func)
    compare(jac(x), jacobian_blocks(func, (x,)))
    wrong = [t for t in jac.plan(x).trials if t.state == "rejected"]
    assert any(t.method == {"method": "PerSample", "mode": "reverse", "chunk": None} for t in wrong)
    assert all("off by" in str(t.reason) for t in wrong)
    assert "rejected" in jac.explain(x)


def test_infeasible_candidates_keep_their_reason_and_the_others_go_on() -> None:
    class Doubler(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    def func(x: Tensor) -> Tensor:
        return Doubler.apply(x.sin())  # type: ignore[no-any-return, no-untyped-call]

    x = torch.randn(5, 3, dtype=torch.float64)
    jac = tuned(func)
    compare(jac(x), jacobian_blocks(func, (x,)))
    broken = [t for t in jac.plan(x).trials if t.state == "infeasible"]
    assert broken
    assert all(t.reason for t in broken)


def test_the_default_is_timed_in_every_search(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "FINALISTS", 1)
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-3))
    plan = tuned(net).plan(torch.randn(64, 3, dtype=torch.float64))
    assert plan.default_seconds == 1e-3


def test_inside_the_noise_the_default_stays(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-3))
    plan = tuned(net).plan(torch.randn(16, 3, dtype=torch.float64))
    assert plan.method == {"method": "PerSample", "mode": "reverse", "chunk": None}


def test_inside_the_noise_the_plan_so_far_stays(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(16, 3, dtype=torch.float64)
    jac = tuned(net)
    before = jac.tune(x, effort="estimate").method
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-3))
    assert jac.tune(x, effort="quick").method == before


def test_the_same_clock_gives_the_same_plan_twice(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(16, 3, dtype=torch.float64)
    plans = []
    for _ in range(2):
        ticks = itertools.count(1)
        monkeypatch.setattr(measure, "clock", Ticking(lambda true, ticks=ticks: 1e-3 + 1e-6 * (next(ticks) % 7)))
        plans.append(tuned(net).plan(x).method)
    assert plans[0] == plans[1]


def test_estimate_times_nothing(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> float:
        raise AssertionError("estimate must not time")

    monkeypatch.setattr(measure.Clock, "per_call", forbidden)
    x = torch.randn(16, 3, dtype=torch.float64)
    for jac in (tuned(net, effort="estimate"), tuned(net, on_miss="estimate")):
        plan = jac.plan(x)
        assert plan.effort == "estimate"
        assert plan.seconds is None


@pytest.mark.parametrize(("n", "m", "wanted"), [(64, 2, ("Pull", "reverse")), (2, 64, ("Push", "forward"))])
def test_estimate_goes_by_the_number_of_passes(n: int, m: int, wanted: tuple[str, str]) -> None:
    plan = tuned(nn.Linear(n, m).double(), on_miss="estimate").plan(torch.randn(128, n, dtype=torch.float64))
    assert plan.method["method"] == wanted[0] or plan.method.get("mode") == wanted[1]


def test_a_budget_of_nothing_still_gives_a_plan(net: nn.Module) -> None:
    x = torch.randn(16, 3, dtype=torch.float64)
    jac = tuned(net, budget_s=0)
    compare(jac(x), jacobian_blocks(net, (x,)))
    timed = [t for t in jac.plan(x).trials if t.state == "complete"]
    assert len(timed) <= 2


def test_the_budget_stops_the_search_after_one_candidate(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking(lambda true: 1e-3, tick=0.3)
    monkeypatch.setattr(measure, "clock", clock)
    plan = tuned(net).tune(torch.randn(16, 3, dtype=torch.float64), effort="quick", budget_s=4)
    timed = sum(trial.seconds is not None for trial in plan.trials)
    assert 1 <= timed < 8
    assert not plan.finished
    assert any(trial.reason == "not tried yet" for trial in plan.trials)


def test_an_unfinished_search_goes_on_where_it_stopped(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-3, tick=0.3))
    x = torch.randn(16, 3, dtype=torch.float64)
    timed, rounds = [0], 0
    while rounds < 40:
        plan = tuned(net, store=None).plan(x)  # the test's own store, by another wrapper each time
        timed.append(sum(trial.seconds is not None for trial in plan.trials))
        rounds += 1
        if plan.finished:
            break
    assert plan.finished
    assert rounds > 2
    assert all(before <= after for before, after in itertools.pairwise(timed))
    assert tuned(net, store=None).plan(x).source == "store"


def test_quick_leaves_the_compiler_out_and_measure_includes_it(net: nn.Module) -> None:
    problem = problem_of(net, torch.randn(16, 3, dtype=torch.float64))
    names = [{type(m).__name__ for m in candidates(problem, depth)} for depth in (0, 1)]
    assert "Compiled" not in names[0]
    assert "Compiled" in names[1]


def test_memory_is_a_hard_bound(net: nn.Module) -> None:
    x = torch.randn(256, 3, dtype=torch.float64)
    jac = tuned(net, memory_limit="64KiB")
    compare(jac(x), jacobian_blocks(net, (x,)))
    plan = jac.plan(x)
    assert plan.memory_bytes is not None
    assert plan.memory_bytes <= 64 * 1024
    lacking = [str(t.reason) for t in plan.trials if t.state == "infeasible" and "64 KiB allowed" in str(t.reason)]
    assert lacking
    assert all("it takes" in reason and "raise memory_limit" in reason for reason in lacking)
    with pytest.raises(autojac.SearchError, match="the Jacobian alone takes 12 KiB"):
        tuned(net, memory_limit="1KiB")(x)


def test_coupled_blocks_are_streamed_and_never_held_whole() -> None:
    batch, width = 48, 8
    x = torch.randn(batch, width, dtype=torch.float64)
    whole = batch * width * batch * width * 8
    jac = tuned(lambda x: (x @ x.T).softmax(1) @ x, memory_limit=whole // 4, budget_s=0.5)
    compare(jac(x), jacobian_blocks(lambda x: (x @ x.T).softmax(1) @ x, (x,)))
    memory = jac.plan(x).memory_bytes
    assert memory is not None
    assert memory < whole // 4


def test_every_path_of_the_space_is_a_candidate(net: nn.Module) -> None:
    space = candidates(problem_of(net, torch.randn(64, 3, dtype=torch.float64)).resize(8192), 2)
    for method in space:
        decisions = path_of(space, method)
        assert choose(space, lambda name, options, d=decisions: d[name]) == method


def test_optuna_proposes_where_there_are_many_candidates(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "MOST_IN_ORDER", 0)
    monkeypatch.setattr(looks, "_is_surpassed", lambda session, method: False)
    x = torch.randn(8, 3, dtype=torch.float64)
    level = optuna.logging.get_verbosity()
    asked: list[int] = []
    true = optuna.study.Study.ask
    monkeypatch.setattr(optuna.study.Study, "ask", lambda self, *rest: (asked.append(1), true(self, *rest))[1])
    compare(tuned(net)(x), jacobian_blocks(net, (x,)))
    assert asked
    assert optuna.logging.get_verbosity() == level


def test_a_search_to_its_end_leaves_out_only_what_it_says(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-3, tick=0.0))
    x = torch.randn(8, 3, dtype=torch.float64)
    plan = tuned(net).plan(x)
    problem = problem_of(net, x)
    tried = {build(t.method): t for t in plan.trials}
    for method in [*candidates(problem, 0), *default_methods(problem)]:
        programs = {Replay(method), Replay(twin_by_autograd(method) or method)}
        assert method in tried or programs & set(tried), "neither it nor its flat program had a look"
    assert all(t.reason for t in plan.trials if t.state != "complete")


def test_compilers_come_last_and_for_the_best_programs(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    true = race.look

    def watched(session: Any, method: Any, *rest: Any) -> Any:
        order.append("compiled" if method.compiles else "other")
        if method.compiles:
            return session.record(method, "infeasible", reason="no compiler in this test")
        return true(session, method, *rest)

    monkeypatch.setattr(race, "look", watched)
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-3, tick=0.0))
    tuned(net, effort="measure").plan(torch.randn(8, 3, dtype=torch.float64))
    assert order == sorted(order, reverse=True)
    assert order.count("compiled") == looks.COMPILED_PROGRAMS


def test_ctrl_c_during_a_search_reaches_the_user(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> float:
        raise KeyboardInterrupt

    x = torch.randn(8, 3, dtype=torch.float64)
    jac = tuned(net)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(measure.Clock, "per_call", interrupt)
        jac(x)
    compare(jac(x), jacobian_blocks(net, (x,)))


@pytest.fixture
def specs() -> Iterator[dict[str, Any]]:
    yield {"method": "BatchChunk", "size": 4, "inner": {"method": "Pull", "seeds": "shared"}}


def test_specs_describe_methods_and_refuse_strangers(specs: dict[str, Any]) -> None:
    method = build(specs)
    assert build(method.spec()) == method
    with pytest.raises(autojac.StoreError, match="Pull"):
        build({"method": "Exec"})
    with pytest.raises(autojac.StoreError, match="fields"):
        build({"method": "Pull", "seeds": "shared", "code": "import os"})


CALLS = [
    ({"method": "Pull", "seeds": "shared", "engine": "loop"}, 1),
    ({"method": "Pull", "seeds": "shared", "engine": "vmap"}, 1),
    ({"method": "Pull", "seeds": "shared", "engine": "batched"}, 1),
    ({"method": "Pull", "seeds": "identity", "engine": "loop"}, 1),
    ({"method": "Push", "seeds": "shared", "engine": "loop"}, 3),
    ({"method": "Push", "seeds": "shared", "engine": "vmap"}, 1),
    ({"method": "Push", "seeds": "identity", "engine": "loop"}, 24),
    ({"method": "PerSample", "mode": "reverse"}, 1),
    ({"method": "PerSample", "mode": "forward"}, 1),
    ({"method": "PerSample", "mode": "reverse", "chunk": 3}, 3),
    ({"method": "Replicate", "mode": "reverse"}, 1),
    ({"method": "Replicate", "mode": "forward"}, 1),
    ({"method": "BatchChunk", "size": 3, "inner": {"method": "Pull", "seeds": "shared", "engine": "loop"}}, 3),
]


@pytest.mark.parametrize(("spec", "evaluations"), CALLS, ids=[str(spec) for spec, _ in CALLS])
def test_how_often_func_runs(spec: dict[str, Any], evaluations: int) -> None:
    func = Counted(torch.sin)
    x = torch.randn(8, 3)
    problem = problem_of(func, x)
    before = func.calls
    build(spec).prepare(problem)((x,), {})
    assert func.calls - before == evaluations


def test_one_compiled_candidate_is_right_and_differentiable(net: nn.Module) -> None:
    net.requires_grad_(True)
    x = torch.randn(6, 3, dtype=torch.float64)
    request, _, problem = planned(net, (x,))
    method = build(
        {"method": "Compiled", "inner": {"method": "Replay", "inner": {"method": "PerSample", "mode": "reverse"}}}
    )
    reference = Reference(problem, request.leaves, {}, Sandbox(()), trained=request.trained)
    result = method.prepare(problem)(request.leaves, {})
    assert reference.check(result) is None
    assert reference.check_gradient(result) is None
    compare(result.jacobians[0][0].detach(), jacobian_blocks(net, (x,)))


def test_methods_say_in_a_sentence_why_they_do_not_apply() -> None:
    coupled = problem_of(lambda x: x - x.mean(0), torch.randn(8, 3))
    reasons = {reason for spec, _ in CALLS for reason in [build(spec).unsupported(coupled)] if reason is not None}
    assert len(reasons) >= 4
    assert all(len(reason.split()) > 6 for reason in reasons)
    assert {spec["method"] for spec, _ in CALLS} <= set(registry())


def test_levels_that_a_failed_compilation_leaves_open_are_closed() -> None:
    def breaks_off() -> None:
        torch._C._enter_dual_level()
        torch._C._set_grad_enabled(False)
        raise RuntimeError("in the middle of a JVP")

    with pytest.raises(RuntimeError, match="middle"), levels_restored():
        breaks_off()
    assert torch.is_grad_enabled()
    with torch.autograd.forward_ad.dual_level(), levels_restored():
        assert transforming()
    assert not transforming()


@pytest.mark.parametrize(("spec", "_evaluations"), CALLS, ids=[str(spec) for spec, _ in CALLS])
def test_every_method_takes_one_sample_and_expanded_inputs(spec: dict[str, Any], _evaluations: int) -> None:
    for x in (torch.randn(1, 3), torch.randn(1, 3).expand(8, 3), torch.randn(8, 1).expand(8, 3)):
        problem = problem_of(torch.sin, x)
        (row,) = build(spec).prepare(problem)((x,), {}).jacobians
        compare(row[0], torch.diag_embed(x.cos()), rtol=1e-6)


@pytest.mark.parametrize(("waits", "seconds"), [((3, 3), 1.0), ((3, 4), 5.0), ((None, None), 5.0)])
def test_what_other_processes_took_is_no_part_of_a_time(
    waits: tuple[Any, Any], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread worked for two of ten seconds: it was stopped in the others, unless it waited by itself."""
    shown, worked, counted = iter((100.0, 110.0)), iter((7.0, 9.0)), iter(waits)
    clocks = SimpleNamespace(perf_counter=lambda: next(shown), thread_time=lambda: next(worked))
    monkeypatch.setattr(measure, "time", clocks)
    monkeypatch.setattr(measure, "_waits", lambda: next(counted))
    assert measure.Clock().per_call(lambda: None, torch.device("cpu"), 2) == seconds


@pytest.mark.parametrize(
    "method",
    [
        Replay(Pull("shared")),
        BatchChunk(4, Replay(Pull("shared"))),
        Threads(1, Replay(Pull("shared"))),
        Compiled(Replay(Pull("shared"))),
        BatchChunk(4, Compiled(Replay(Pull("shared")))),
    ],
    ids=lambda method: expression(method.spec()),
)
def test_recording_and_compiling_are_no_part_of_a_time_when_the_budget_is_used_up(
    method: Method, net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, report, problem = planned(net, (torch.randn(8, 3, dtype=torch.float64),))
    session = start_race(problem, SearchPoint(call.leaves, {}, (), report.sandbox), "measure").session
    compute, runs, shown = Pull("shared").prepare_call(problem), [0], [0.0]

    def slow_at_first(*args: Any) -> Any:
        runs[0] += 1
        shown[0] += 20.0 if runs[0] == 1 else 2.0
        return compute(*args)

    monkeypatch.setattr(type(method), "prepare_call", lambda self, problem: slow_at_first)
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: shown[0]))
    session.end = 0.0  # a run that alone outlasts the budget is not repeated
    assert trial.look(session, method).seconds == 2.0
    assert runs == [2]


class Scaling(nn.Module):
    """A layer whose result depends on a buffer that each call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64).requires_grad_(False)
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        result = torch.tanh(self.layer(x)) * self.scale.clone()
        self.scale.mul_(1.5)
        return result


def test_what_a_recording_moves_is_put_back_before_its_program_is_checked() -> None:
    func, x = Scaling(), torch.randn(8, 3, dtype=torch.float64)
    jac = tuned(func)
    compare(jac(x), (1 - torch.tanh(func.layer(x)) ** 2)[:, :, None] * func.layer.weight)
    assert torch.equal(func.scale, torch.full_like(func.scale, 1.5)), "one call's worth"
    programs = [t for t in jac.plan(x).trials if isinstance(build(t.method), Replay)]
    assert any(t.state == "complete" for t in programs), programs
    assert not any(t.state == "rejected" for t in programs), programs


def test_each_search_gets_further_however_short_its_budget(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-3, tick=1e-3))
    x = torch.randn(8, 3, dtype=torch.float64)
    jac = AutoJacobian(net, store=":memory:")
    timed = [0]
    for _ in range(60):
        plan = jac.tune(x, budget_s=1e-3)
        timed.append(sum(trial.seconds is not None for trial in plan.trials))
        if plan.finished:
            break
    assert plan.finished
    assert timed == sorted(timed)
    assert max(timed) > 5


def test_a_flat_program_is_looked_at_instead_of_what_it_is_made_of(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's first choice and torch's default run as they are; of other methods the recorded program does."""
    order: list[Any] = []
    true = race.look
    monkeypatch.setattr(race, "look", lambda session, method, *rest: (order.append(method), true(session, method))[1])
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-3, tick=0.0))
    tuned(net).plan(torch.randn(8, 3, dtype=torch.float64))
    flat = [method for method in order if isinstance(method, Replay)]
    assert len(flat) > 3
    before = order[: order.index(flat[0])]
    assert len(before) <= 2
    late = {method.inner for method in flat} & set(order[len(before) :])
    assert not late, f"{late} in {order}"


def test_where_func_cannot_be_recorded_the_other_methods_come_before_more_attempts(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[Any] = []
    true = race.look

    def refusing(session: Any, method: Any, *rest: Any) -> Any:
        order.append(method)
        if method.makes_flat_programs:
            return session.record(method, "infeasible", reason="nothing is recorded in this test")
        return true(session, method, *rest)

    monkeypatch.setattr(race, "look", refusing)
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-3, tick=0.0))
    tuned(net).plan(torch.randn(8, 3, dtype=torch.float64))
    programs = [method.makes_flat_programs for method in order]
    first = programs.index(True)
    rest = programs[first + 1 :]
    assert rest == sorted(rest)
    assert rest.count(False) > 3


@pytest.mark.parametrize(("effort", "loads"), [("quick", 0), ("measure", 1)])
def test_a_search_loads_a_compiler_only_after_all_that_does_without(
    net: nn.Module, effort: str, loads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quick one never does: what it would find is left to a search that has the time."""
    order: list[Any] = []
    true = race.look

    def watched(session: Any, method: Any, *rest: Any) -> Any:
        order.append(method)
        if method.compiles:
            return session.record(method, "infeasible", reason="no compiler in this test")
        return true(session, method, *rest)

    monkeypatch.setattr(race, "look", watched)
    monkeypatch.setattr(steps, "load_compiler", lambda: order.append("loaded"))
    monkeypatch.setattr(space, "is_compiler_loaded", lambda: "loaded" in order)
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-3, tick=0.0))
    plan = tuned(net, effort=effort).plan(torch.randn(8, 3, dtype=torch.float64))
    assert plan.finished
    assert order.count("loaded") == loads
    before = order[: order.index("loaded")] if loads else order
    assert not any(method.may_load_compiler for method in before)
    assert len(before) > 3


def test_a_late_candidate_that_was_lucky_in_its_look_is_compared_before_it_wins(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of the time after a compiler has run may not suffice for another comparison of all."""
    clock = Ticking(lambda true: 1.0 if true > 0.02 else 1e-3, tick=0.0)
    monkeypatch.setattr(measure, "clock", clock)
    monkeypatch.setattr(space, "is_compiler_loaded", lambda: True)
    true, late = race.look, list[Any]()

    def lucky(session: Any, method: Any, *rest: Any) -> Any:
        if not method.compiles:
            return true(session, method, *rest)
        late.append(method)
        fast = next(iter(session.runs.values()))
        session.runs[method] = lambda *args: (time.sleep(0.03), fast(*args))[1]
        clock.time += 1000.0
        return session.record(method, "complete", seconds=1e-6)

    monkeypatch.setattr(race, "look", lucky)
    x = torch.randn(8, 3, dtype=torch.float64)
    jac = tuned(net, effort="measure")
    compare(jac(x), jacobian_blocks(net, (x,)))
    assert late
    assert not build(jac.plan(x).method).compiles


def test_what_others_took_of_a_quick_search_is_given_back_up_to_a_second(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Busy(Ticking):
        def __init__(self, share: float) -> None:
            super().__init__(lambda true: 1e-3, tick=0.04)
            self.share = share

        def waiting_s(self) -> float:
            return self.share * self.time

    def timed(share: float) -> tuple[int, float]:
        clock = Busy(share)
        monkeypatch.setattr(measure, "clock", clock)
        trials = tuned(net).plan(torch.randn(8, 3, dtype=torch.float64)).trials
        return sum(trial.seconds is not None for trial in trials), clock.time

    (few, short), (more, longer), (_, longest) = timed(0.0), timed(0.5), timed(1.0)
    assert few < more
    assert short < longer <= longest < short + optimize.LEAST_QUICK_S + 0.3
