"""The search that goes on while a plan is used: paid for by the calls, never a worse plan, no trace left."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autojac import AutoJacobian
from autojac.methods.pull import Pull
from autojac.methods.push import Push
from autojac.planning import exploration
from autojac.planning.exploration import SHARE, Exploration
from autojac.planning.search import finals, looks, trial
from autojac.planning.search.optimize import PriorKnowledge
from harness import Counted, Scripted, compare, in_threads, in_use
from oracle import jacobian_blocks

FEW_CALLS = 400


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double().requires_grad_(False)


@pytest.fixture(autouse=True)
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds, and what compiled plans do is tested elsewhere."""
    monkeypatch.setattr(looks, "COMPILED_PROGRAMS", 0)


def explored(jac: AutoJacobian) -> Exploration | None:
    return in_use(jac).exploration


def run_to_the_end(jac: AutoJacobian, *args: Any, most: int = 200_000) -> int:
    """Call until the search is over; how often that was."""
    for number in range(1, most):
        jac(*args)
        if explored(jac) is None:
            return number
    raise AssertionError("the search has no end")


def test_the_first_call_is_answered_by_the_cost_model_and_explores_nothing(net: nn.Module) -> None:
    func = Counted(net)
    x = torch.randn(16, 3, dtype=torch.float64)
    jac = AutoJacobian(func, store=":memory:")
    compare(jac(x), jacobian_blocks(net, (x,)))
    plan = jac.plan(x)
    assert (plan.source, plan.effort, plan.finished, plan.seconds) == ("estimate", "quick", False, None)
    started = explored(jac)
    assert started is not None
    assert started.race is None
    assert "the search goes on as the plan is used" in jac.explain(x)


@pytest.mark.parametrize("effort", ["estimate", "quick"])
def test_estimates_and_ranks_of_a_group_never_explore(
    net: nn.Module, effort: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if effort == "quick":
        monkeypatch.setattr("autojac.planning.planner.several", lambda: True)
    jac = AutoJacobian(net, effort=effort, store=":memory:")
    jac(torch.randn(16, 3, dtype=torch.float64))
    assert explored(jac) is None


@given(seed=st.integers(0, 1000))
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_exploring_costs_a_fifth_of_the_calls_but_for_what_nobody_foresaw_and_no_slower_plan_comes(
    net: nn.Module, seed: int
) -> None:
    """By how much one step took longer than expected, since all later ones wait until the calls have paid for that."""
    x = torch.randn(16, 3, dtype=torch.float64)
    right = jacobian_blocks(net, (x,))
    with pytest.MonkeyPatch.context() as patch:
        clock = Scripted(patch, seed, tick=0.0)
        unforeseen = 0.0
        jac = AutoJacobian(net, store=":memory:")
        jac(x)
        own = clock.cost(in_use(jac).plan.method)
        paid, costs = 0.0, [own]
        search = explored(jac)
        assert search is not None
        for turn in range(FEW_CALLS):
            before, expected = search.spent, search.expected_s
            J = jac(x)
            if (cost := search.spent - before) > 0:
                assert before + expected <= SHARE * (paid + own) + 1e-9
                unforeseen = max(unforeseen, cost - expected)
            costs.append(clock.cost(in_use(jac).plan.method))
            paid += costs[-1]
            assert search.spent <= SHARE * (paid + own) + unforeseen + 1e-9
            if turn % 50 == 0:
                compare(J, right)
        assert all(after <= before * 1.0001 for before, after in itertools.pairwise(costs))


def test_an_end_is_reached_and_the_best_candidate_stays(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Scripted(monkeypatch, seed=3)
    x = torch.randn(16, 3, dtype=torch.float64)
    jac = AutoJacobian(net)
    run_to_the_end(jac, x)
    plan = jac.plan(x)
    assert plan.finished
    assert (plan.source, plan.effort) == ("search", "quick")
    timed = [t for t in plan.trials if t.seconds is not None]
    assert clock.cost(plan.method) <= 1.1 * min(clock.cost(t.method) for t in timed)
    again = AutoJacobian(net)
    assert again.plan(x).source == "store"
    assert explored(again) is None


def test_another_process_goes_on_where_one_stopped(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, seed=5)
    x = torch.randn(16, 3, dtype=torch.float64)
    first = AutoJacobian(net)
    while not first.plan(x).seconds:
        first(x)
    assert explored(first) is not None
    known = {str(t.method) for t in first.plan(x).trials if t.seconds is not None}
    assert known
    second = AutoJacobian(net)
    second(x)
    assert not second.plan(x).finished
    run_to_the_end(second, x)
    assert known <= {str(t.method) for t in second.plan(x).trials if t.seconds is not None or t.reason}


def test_an_interrupt_in_any_step_reaches_the_user_and_harms_nothing(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted(monkeypatch, seed=12)
    x = torch.randn(16, 3, dtype=torch.float64)
    jac = AutoJacobian(net, store=":memory:")
    kinds: list[str] = []
    true = Exploration._take

    def interrupted(self: Exploration, race: Any, point: Any) -> Any:
        step = self._next_step(race)
        if step is not None and step.kind not in kinds:
            kinds.append(step.kind)
            raise KeyboardInterrupt
        return true(self, race, point)

    monkeypatch.setattr(Exploration, "_take", interrupted)
    seen = 0
    for _ in range(5000):
        try:
            jac(x)
        except KeyboardInterrupt:
            seen += 1
            compare(jac(x), jacobian_blocks(net, (x,)))
        if explored(jac) is None:
            break
    assert {"look", "longer", "memory", "round", "duel"} <= set(kinds)
    assert seen == len(kinds)
    compare(jac(x), jacobian_blocks(net, (x,)))


def test_a_step_that_fails_fails_no_call(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, seed=2)

    def broken(self: Exploration, race: Any, point: Any) -> Any:
        raise RuntimeError("out of something")

    monkeypatch.setattr(Exploration, "_take", broken)
    x = torch.randn(16, 3, dtype=torch.float64)
    jac = AutoJacobian(net, store=":memory:")
    run_to_the_end(jac, x)
    compare(jac(x), jacobian_blocks(net, (x,)))
    assert exploration.MOST_FAILURES < 10


def test_a_hung_candidate_holds_one_call_up_for_its_limit(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "LEAST_S", 0.2)
    monkeypatch.setattr(exploration, "SHARE", 1e6)

    def endless(*_: Any) -> Any:
        while True:
            pass

    monkeypatch.setattr(Push, "prepare", lambda self, problem: endless)
    x = torch.randn(16, 3, dtype=torch.float64)
    jac = AutoJacobian(net, store=":memory:")
    for _ in range(60):
        compare(jac(x), jacobian_blocks(net, (x,)))
    hung = [t for t in jac.plan(x).trials if t.method["method"] == "Push" and t.reason is not None]
    assert any("TimeoutError" in str(t.reason) for t in hung)


def test_nothing_is_explored_while_a_caller_observes(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(exploration, "SHARE", 1e6)
    x = torch.randn(16, 3, dtype=torch.float64)
    jac = AutoJacobian(net, store=":memory:")
    jac(x)
    with Seeing(), torch.profiler.profile(acc_events=True):
        for _ in range(5):
            jac(x)
    with torch.profiler.profile(acc_events=True):
        for _ in range(5):
            jac(x)
    search = explored(jac)
    assert search is not None
    assert search.race is None
    jac(x)
    assert search.race is not None


def test_exploring_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, seed=11)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(8, 3, dtype=torch.float64)
    monkeypatch.setattr(exploration, "SHARE", 1e6)
    jac = AutoJacobian(model, store=":memory:")
    torch.manual_seed(0)
    for _ in range(30):
        jac(x).square().sum().backward()
        plain(x)
    assert sum(t.seconds is not None for t in jac.plan(x).trials) > 1
    for one, other in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.rand(3), drawn)


def test_training_goes_on_through_plans_that_are_exchanged(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, seed=14)
    net.requires_grad_(True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    jac = AutoJacobian(net, store=":memory:")
    methods = set()
    for turn in range(FEW_CALLS):
        x = torch.randn(8, 3, dtype=torch.float64)
        J = jac(x)
        methods.add(str(in_use(jac).plan))
        if turn % 40 == 0:
            compare(J.detach(), jacobian_blocks(net, (x,)))
            expected = torch.autograd.grad(
                torch.func.vmap(torch.func.jacrev(net))(x).square().sum(), [*net.parameters()][:1]
            )
            found = torch.autograd.grad(J.square().sum(), [*net.parameters()][:1], retain_graph=True)
            compare(found, expected)
        optimizer.zero_grad()
        J.square().sum().backward()
        optimizer.step()
    assert len(methods) > 1


def test_threads_explore_one_at_a_time(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(16, 3, dtype=torch.float64)
    right = jacobian_blocks(net, (x,))
    jac = AutoJacobian(net, store=":memory:")
    inside, most, lock = 0, 0, threading.Lock()
    true = Exploration.take_step

    def watched(self: Exploration, *args: Any) -> Any:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        try:
            return true(self, *args)
        finally:
            with lock:
                inside -= 1

    monkeypatch.setattr(Exploration, "take_step", watched)
    monkeypatch.setattr(exploration, "SHARE", 1e6)

    def work() -> None:
        for _ in range(15):
            compare(jac(x), right)

    in_threads(3, work)
    assert most == 1


def test_each_batch_size_keeps_its_own_account(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, seed=17)
    jac = AutoJacobian(net, store=":memory:")
    for turn in range(60):
        x = torch.randn(1 + turn % 6, 3, dtype=torch.float64)
        J = jac(x)
        if turn % 7 == 0:
            compare(J, jacobian_blocks(net, (x,)))
    assert len(jac._plans) == 6


def test_a_budget_ends_exploring_and_a_later_process_goes_on(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, seed=19)
    x = torch.randn(16, 3, dtype=torch.float64)
    jac = AutoJacobian(net, budget_s=0.01)
    run_to_the_end(jac, x)
    assert not jac.plan(x).finished
    assert "the search was not finished" in jac.explain(x)
    more = AutoJacobian(net)
    more(x)
    assert explored(more) is not None


def test_tune_takes_over_what_was_explored(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, seed=24)
    x = torch.randn(16, 3, dtype=torch.float64)
    jac = AutoJacobian(net, store=":memory:")
    for _ in range(100):
        jac(x)
    known = {str(t.method): t.seconds for t in jac.plan(x).trials if t.seconds is not None}
    plan = jac.tune(x, budget_s=60)
    assert known
    assert plan.finished
    assert known.keys() <= {str(t.method) for t in plan.trials}
    assert explored(jac) is None


@pytest.fixture
def fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(finals, "MOST_ROUNDS", dict.fromkeys(finals.MOST_ROUNDS, 3))
    yield


@pytest.mark.usefixtures("fewer_rounds")
def test_true_times_find_a_replay_in_a_loop_of_calls() -> None:
    x = torch.randn(64, 3)
    jac = AutoJacobian(torch.sin, store=":memory:")
    for _ in range(20_000):
        jac(x)
        if "Replay" in str(in_use(jac).plan):
            break
    assert "Replay" in str(in_use(jac).plan)
    compare(jac(x), torch.diag_embed(x.cos()), rtol=1e-6)


def test_credit_counts_calls_that_nobody_timed() -> None:
    account = Exploration(PriorKnowledge(incumbent=Pull("shared")), "quick", None)
    account.credit(1, 1e-3)
    assert account.earned == pytest.approx(1e-3)
    account.credit(11, 1e-3)
    assert account.earned == pytest.approx(11e-3)
    account.credit(12, 10.0)
    assert account.earned == pytest.approx(10.0 + 11e-3)
    assert account.next_call() == 13
    account.spent = 3.0
    assert 13 < account.next_call() < math.inf
