"""The cost model: the order of candidates follows from the graph, the machine and earlier trials."""

from __future__ import annotations

import dataclasses
import itertools
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian, PlanStore
from autojac.core.options import Options
from autojac.core.plan import Plan, Trial
from autojac.errors import StoreWarning
from autojac.methods.base import Method, registry
from autojac.methods.per_sample import PerSample
from autojac.methods.pull import Pull
from autojac.methods.push import Push
from autojac.methods.replay import Replay
from autojac.planning.plan_repository import PlanRepository
from autojac.planning.search import calibrate, measure
from autojac.planning.search.corrections import LARGEST, correction_kind, corrections_from
from autojac.planning.search.space import candidates, hopeless, predicted_seconds
from autojac.problem.machine import DEFAULT, SIZES, Machine
from autojac.problem.problem import Problem
from autojac.store.keys import Key, environment_key
from harness import planned


def problem_on(machine: Machine, func: Any, x: Tensor) -> Problem:
    return dataclasses.replace(planned(func, (x,))[2], machine=machine)


def net(*sizes: int) -> nn.Module:
    layers = [layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).requires_grad_(False)


LOOP, MANY = Pull("shared", "loop"), Pull("shared", "batched")


def test_slow_dispatch_favours_fewer_passes_and_slow_transforms_loops() -> None:
    func, x = net(3, 16, 8), torch.randn(8, 3)
    slow_host = problem_on(dataclasses.replace(DEFAULT, pulled_s=1e-3), func, x)
    assert MANY.cost(slow_host) < LOOP.cost(slow_host)
    slow_transforms = problem_on(dataclasses.replace(DEFAULT, batched_s=1e-3), func, x)
    assert LOOP.cost(slow_transforms) < MANY.cost(slow_transforms)


def test_the_side_with_fewer_seeds_is_predicted_to_win_where_work_counts() -> None:
    machine = dataclasses.replace(DEFAULT, flops_per_s=1e6)
    wide, tall = (
        problem_on(machine, net(2, 32, 64), torch.randn(32, 2)),
        problem_on(machine, net(64, 32, 2), torch.randn(32, 64)),
    )
    push = Push("shared", "vmap")
    assert push.cost(wide) < MANY.cost(wide)
    assert MANY.cost(tall) < push.cost(tall)


def test_seeds_that_overflow_the_cache_are_dearer_many_at_a_time() -> None:
    machine = dataclasses.replace(DEFAULT, batched_s=1e-7, pulled_s=1e-7, rates=(1e12, 1e10, 1e8), flops_per_s=1e15)
    problem = problem_on(machine, net(4, 256, 128), torch.randn(256, 4))
    assert Pull("shared", "batched", 4).cost(problem) < MANY.cost(problem)


def test_a_replay_is_predicted_without_what_transforms_add() -> None:
    problem = problem_on(DEFAULT, net(3, 16, 3), torch.randn(8, 3))
    assert Replay(PerSample("reverse")).cost(problem) < 0.2 * PerSample("reverse").cost(problem)
    slow = dataclasses.replace(problem, machine=dataclasses.replace(DEFAULT, batched_s=1.0, dual_s=1.0, pulled_s=1.0))
    assert Replay(MANY).cost(slow) == Replay(MANY).cost(problem)


@pytest.mark.parametrize("kind", registry())
def test_every_candidate_has_a_finite_price(kind: str) -> None:
    problem = planned(net(8, 4, 8), (torch.randn(6, 8),))[2]
    for method in registry()[kind].candidates(problem, 1):
        if method.unsupported(problem) is None:
            assert 0 < method.cost(problem) < 60


def test_rates_lie_between_those_that_were_measured() -> None:
    machine = dataclasses.replace(DEFAULT, rates=(8e9, 4e9, 1e9))
    assert [machine.rate(size) for size in SIZES] == pytest.approx([8e9, 4e9, 1e9])
    assert machine.rate(1) == pytest.approx(8e9)
    assert machine.rate(2**40) == pytest.approx(1e9)
    assert 1e9 < machine.rate(2**24) < 4e9


def test_a_machine_survives_json_and_another_versions_is_unknown() -> None:
    machine = dataclasses.replace(DEFAULT, plain_s=1e-6, corrections={"Pull": 2.0})
    data = machine.to_json()
    assert Machine.from_json(data) == dataclasses.replace(machine, corrections={})
    for wrong in ({}, {**data, "more": 1.0}, {**data, "plain_s": "1"}, {**data, "plain_s": -1.0}, {**data, "rates": 1}):
        assert Machine.from_json(wrong) is None


# corrections from trials


def trial(method: Method, seconds: float | None, predicted: float | None = 1.0) -> Trial:
    return Trial(method.spec(), "complete", seconds, predicted=predicted)


def test_kinds_name_what_goes_around_what() -> None:
    assert correction_kind(Replay(MANY).spec()) == "Replay/Pull/batched"
    assert correction_kind(PerSample("forward", 256).spec()) == "PerSample/forward"


def test_a_kind_is_corrected_by_the_median_of_its_trials() -> None:
    trials = [trial(LOOP, 4.0)] * 40 + [trial(LOOP, 1e6), trial(LOOP, None), trial(LOOP, 1.0, None)]
    found = corrections_from(trials)
    assert found["Pull/loop"] == pytest.approx(4.0)
    assert found[""] == pytest.approx(4.0)
    assert corrections_from([]) == {}


def test_a_kind_with_few_trials_stays_near_all_others_and_no_correction_is_extreme() -> None:
    found = corrections_from([trial(LOOP, 1.0)] * 30 + [trial(MANY, 8.0)])
    assert 1.0 < found["Pull/batched"] < 2.0
    assert corrections_from([trial(MANY, 1e9)] * 9)["Pull/batched"] == pytest.approx(LARGEST)


def test_corrections_decide_the_order_of_candidates_and_what_is_hopeless() -> None:
    problem = planned(net(3, 16, 3), (torch.randn(8, 3),))[2]
    first = candidates(problem, 0)[0]
    corrected = dataclasses.replace(
        problem, machine=dataclasses.replace(DEFAULT, corrections={correction_kind(first.spec()): 1e4})
    )
    assert candidates(corrected, 0)[-1] == first
    assert predicted_seconds(corrected, first) == pytest.approx(1e4 * predicted_seconds(problem, first))
    slow = MANY
    corrected = dataclasses.replace(
        problem, machine=dataclasses.replace(DEFAULT, corrections={correction_kind(slow.spec()): 1e4})
    )
    dropped = hopeless(corrected, [LOOP, slow, Replay(slow)])
    assert dropped == {slow, Replay(slow)}  # a replay is as hopeless as its method


# what is known of a machine


class Turns(measure.Clock):
    """One by which each call takes what `seconds` says of how many were timed before."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds, self.calls = seconds, 0

    def per_call(self, run: measure.Run, device: torch.device, calls: int) -> float:
        run()
        self.calls += 1
        return self.seconds(self.calls)


def test_a_machine_is_measured_by_few_operators_and_no_clock_of_the_search() -> None:
    clock = Turns(lambda turn: 1e-2)
    machine = calibrate.measure_machine(torch.device("cpu"), clock)
    assert clock.calls == 8 * 2  # two long timings that agree are enough
    assert machine.plain_s == machine.dual_s == 1e-2 / calibrate.OPERATORS
    assert machine.rates[:2] == tuple(size / 1e-2 for size in SIZES[:2])
    assert machine.flops_per_s == 2 * calibrate.ROWS * calibrate.SIDE**2 / 1e-2
    assert [machine.has_measured(size) for size in (1, SIZES[1], SIZES[1] + 1, 2 * SIZES[2])] == [
        True,
        True,
        False,
        False,
    ]
    machine = calibrate.measure_large_operators(machine, torch.device("cpu"), clock)
    assert clock.calls == 9 * 2
    assert machine.rates == tuple(size / 1e-2 for size in SIZES)
    assert machine.has_measured(2 * SIZES[2])
    assert Machine.from_json(machine.to_json()) == machine


@pytest.mark.parametrize("seconds", [lambda turn: 1e-6, lambda turn: 1.0 / turn], ids=["short", "unsteady"])
def test_timings_that_are_short_or_differ_are_repeated(seconds: Callable[[int], float]) -> None:
    clock = Turns(seconds)
    calibrate.measure_large_operators(DEFAULT, torch.device("cpu"), clock)
    assert clock.calls == calibrate.TURNS


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine that is fast in all things; how often it was measured."""
    times: list[str] = []

    def measured(device: str, threads: str, large: bool) -> Machine:
        times.append(f"{device} {threads}{' large' * large}")
        return dataclasses.replace(DEFAULT, plain_s=7e-7, largest=float(SIZES[2 if large else 1]))

    monkeypatch.setattr(calibrate, "measured_machine", measured)
    return times


def test_a_search_measures_the_machine_once_and_stores_it_and_an_estimate_reads_it(
    measuring: list[str], tmp_path: Path
) -> None:
    func, x, place = net(3, 8, 2), torch.randn(8, 3), tmp_path / "plans.db"
    AutoJacobian(func, store=place, effort="estimate")(x)
    assert measuring == []
    for size in (8, 300):
        AutoJacobian(func, store=place).tune(torch.randn(size, 3), budget_s=0.05)
    threads = str(torch.get_num_threads())
    assert measuring == [f"cpu {threads}"]
    env = environment_key("cpu")
    stored = PlanStore(place).environment(env)
    assert stored is not None
    assert stored[threads]["plain_s"] == 7e-7
    repository = PlanRepository(func, Options.from_keywords({"store": PlanStore(place)}))
    assert repository.machine(env, "cpu").plain_s == 7e-7
    assert measuring == [f"cpu {threads}"]


def test_large_operators_are_measured_when_a_search_first_may_run_one(measuring: list[str]) -> None:
    func, store, threads = net(3, 8, 2), PlanStore(":memory:"), torch.get_num_threads()
    for size in (8, 20_000, 30_000, 8):
        AutoJacobian(func, store=store).tune(torch.randn(size, 3), budget_s=0.05)
    assert measuring == [f"cpu {threads}", f"cpu {threads} large"]


def test_an_estimate_is_corrected_by_the_trials_of_other_functions(tmp_path: Path) -> None:
    x = torch.randn(8, 3)
    store = PlanStore(tmp_path / "plans.db")
    first = AutoJacobian(net(3, 8, 2), store=store, effort="estimate").plan(x)
    env, structure = environment_key("cpu"), first.structure
    slow = [Trial(first.method, "complete", 1.0, predicted=1e-3)] * 30
    quick = [Trial(m.spec(), "complete", 1e-3, predicted=1e-3) for m in (LOOP, MANY) if m.spec() != first.method] * 30
    plan = Plan(first.method, structure, (True,), "quick", 1.0, trials=(*slow, *quick))
    store.save(Key.of({"function": "another"}), env, plan, "another")
    again = AutoJacobian(net(3, 9, 2), store=PlanStore(tmp_path / "plans.db"), effort="estimate").plan(x)
    assert again.method != first.method


def test_a_row_that_something_else_wrote_is_told_and_passed_over(tmp_path: Path) -> None:
    store, env = PlanStore(tmp_path / "plans.db"), environment_key("cpu")
    store.save_environment(env, {"1": DEFAULT.to_json()})
    store.save_environment(env, {"2": "nonsense"})
    assert store.environment(env) == {"2": "nonsense"}
    with closing(sqlite3.connect(tmp_path / "plans.db")) as connection, connection:
        connection.execute("UPDATE environments SET measured = 'no json'")
    with pytest.warns(StoreWarning, match="can't be used"):
        assert PlanStore(tmp_path / "plans.db").environment(env) is None
    assert store.predictions(env) == ()
