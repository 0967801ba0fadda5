"""What steps of a search are expected to take, before they are begun, and that budgets count all that they should."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from autojac import AutoJacobian
from autojac.methods.compiled import Compiled
from autojac.methods.pull import Pull
from autojac.methods.push import Push
from autojac.methods.replay import Replay
from autojac.planning.exploration import Exploration
from autojac.planning.problem_builder import ProblemBuilder
from autojac.planning.search import measure, race, steps
from autojac.planning.search.finals import CLEAR_ROUNDS, ENOUGH_ROUNDS
from autojac.planning.search.optimize import PriorKnowledge, start_race
from autojac.planning.search.point import SearchPoint
from autojac.planning.search.race import CandidateRace
from autojac.planning.search.steps import Step, StepCosts, operators
from autojac.planning.search.trial import look
from autojac.problem.machine import DEFAULT
from harness import Ticking, planned

LOOK = Step("look", Pull("shared"))


def race_for(func: Any, x: torch.Tensor) -> CandidateRace:
    call, report, problem = planned(func, (x,))
    return start_race(problem, SearchPoint(call.leaves, {}, (), report.sandbox), "quick")


def test_what_was_dear_lately_is_expected_again_and_forgotten_by_and_by() -> None:
    costs = StepCosts()
    assert costs.expected_s(LOOK, 0.1) == 0.1
    costs.note(LOOK, 0.1, 0.4)
    assert costs.expected_s(LOOK, 0.1) == pytest.approx(0.4)
    costs.note(LOOK, 0.1, 0.1)
    assert costs.expected_s(LOOK, 0.1) == pytest.approx(0.25)
    for _ in range(20):
        costs.note(LOOK, 0.1, 0.02)
    assert costs.expected_s(LOOK, 0.1) == pytest.approx(0.02, rel=1e-3)
    assert costs.expected_s(Step("memory", Pull("shared")), 0.1) == 0.1, "another kind"


def test_a_step_is_expected_to_take_as_long_as_its_runs() -> None:
    found = race_for(torch.sin, torch.randn(8, 3))
    short = found.expected_s(LOOK)
    found.usual_s = 1.0
    assert found.expected_s(LOOK) == pytest.approx(short + steps.LOOK_RUNS, rel=1e-2)
    assert found.expected_s(Step("look", Push("shared", "vmap"))) > found.expected_s(LOOK) + steps.FORWARD_S / 2


def test_a_duel_whose_outcome_is_clear_is_expected_to_take_fewer_rounds() -> None:
    found = race_for(torch.sin, torch.randn(8, 3))
    duel = Step("duel", Pull("shared"))
    rounds = [steps.step_seconds(duel, found.session, [share, 1.0]) for share in (0.9, 0.4, 1 / 0.4)]
    assert rounds[0] == pytest.approx(steps.RUN_S + (ENOUGH_ROUNDS + steps.DUEL_ROUNDS) * 1.9)
    assert rounds[1] == pytest.approx(steps.RUN_S + (CLEAR_ROUNDS + steps.DUEL_ROUNDS) * 1.4)
    assert rounds[2] == pytest.approx(steps.RUN_S + (CLEAR_ROUNDS + steps.DUEL_ROUNDS) * 3.5)


def test_compiling_takes_longer_the_more_operators_a_program_has() -> None:
    short, long = race_for(torch.sin, torch.randn(8, 2)), race_for(torch.sin, torch.randn(8, 64))
    program = Replay(Pull("shared"))
    times = [found.expected_s(Step("look", Compiled(program))) for found in (short, long)]
    assert times[1] > times[0] + 50 * steps.COMPILE_OPERATOR_S
    machine = dataclasses.replace(DEFAULT, batched_s=2 * DEFAULT.batched_s)
    long.session.problem = dataclasses.replace(long.session.problem, machine=machine)
    assert long.expected_s(Step("look", Compiled(program))) == pytest.approx(2 * times[1]), "Python is half as fast"
    predicted = operators(long.session, Compiled(program))
    look(long.session, program)
    recorded = operators(long.session, Compiled(program))
    assert 64 <= recorded < predicted, "what was recorded is counted"


def test_a_program_whose_compilation_does_not_fit_the_budget_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[bool] = []

    def watched(session: Any, method: Any, *rest: Any) -> Any:
        looked_at.append(method.compiles)
        if method.compiles:
            return session.record(method, "infeasible", reason="no compiler in this test")
        return look(session, method, *rest)

    monkeypatch.setattr(race, "look", watched)
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-4, tick=0.0))
    for each, wanted in ((0.0, True), (1e3, False)):
        monkeypatch.setattr(steps, "COMPILE_OPERATOR_S", each)
        looked_at.clear()
        jac = AutoJacobian(nn.Linear(3, 2).requires_grad_(False), store=":memory:", on_miss="tune", effort="measure")
        plan = jac.plan(torch.randn(8, 3))
        assert any(looked_at) == wanted
        assert plan.finished == wanted


def test_a_budget_counts_what_was_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking(lambda true: 1e-3, tick=1e-3)
    monkeypatch.setattr(measure, "clock", clock)
    probe = ProblemBuilder.probe
    timed = []
    for probing in (0.0, 4.0):

        def slowly(self: Any, *args: Any, probing: float = probing) -> Any:
            clock.time += probing
            return probe(self, *args)

        monkeypatch.setattr(ProblemBuilder, "probe", slowly)
        jac = AutoJacobian(torch.sin, store=":memory:", on_miss="tune", budget_s=4.0)
        trials = jac.plan(torch.randn(8, 3)).trials
        timed.append(sum(trial.seconds is not None for trial in trials))
    assert timed[1] <= 1 < timed[0]


def test_the_first_call_by_a_plan_that_was_found_is_a_part_of_exploring(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking(tick=0.0)
    monkeypatch.setattr(measure, "clock", clock)
    account = Exploration(PriorKnowledge(incumbent=Pull("shared")), "quick", None)
    account.credit(1, 1e-3)
    with account.charging_first_call():
        clock.time += 0.1
    assert account.spent == 0, "the plan was not found by exploring"
    account.race = race_for(torch.sin, torch.randn(8, 3))
    for seconds in (0.1, 1e-4):
        with account.charging_first_call():
            clock.time += seconds
        assert account.spent == pytest.approx(0.099), "a fast one earns nothing"


def test_what_is_far_behind_is_not_in_the_last_comparison() -> None:
    found = race_for(torch.sin, torch.randn(8, 3))
    near, far = Replay(Pull("shared")), Pull("shared")
    for method, seconds in ((near, 1e-5), (far, 1e-3)):
        found.session.record(method, "complete", seconds=seconds)
    assert found.racers() == [near]
