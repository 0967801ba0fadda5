"""What is raced is right and complete, at sizes where times mean nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

import autojac
from autojac.bench import suites
from autojac.bench.baselines import BYTES_LIMIT, DEFAULT, PARAMETER_WAYS, WAYS, reference
from autojac.bench.fresh import SIGNATURES, count_evaluations
from autojac.bench.growth import growth_cases
from autojac.bench.jacobians import OVER_BEST, OVER_DEFAULT, ROOFLINE, race_workload
from autojac.bench.overhead import CALL_US, FINER, cached_call, time_tracing
from autojac.bench.regret import race_candidates, regret_of
from autojac.bench.results import BenchResult, Figure
from autojac.bench.roofline import least_seconds, machine
from autojac.bench.run import Settings, admit, in_fresh_process, race_with_best
from autojac.bench.suites import SUITES, Suite, run_suites
from autojac.bench.training import OF_WHOLE, WHOLE, race_step
from autojac.bench.workloads import EVERY, WORKLOADS, Workload, mlp, of_kind, pointwise, sine
from autojac.methods.pull import Pull
from autojac.methods.replay import Replay
from autojac.planning.search import measure
from autojac.replay.replayer import Replayer
from harness import Ticking, forced, in_use
from oracle import jacobian_blocks

SETTINGS = Settings(effort="estimate", rounds=3, budget_s=0.2, shortest_s=1e-5, race_s=0.2, quick=True)
SMALL = (
    pointwise("sin", "tiny", 8, 3, sine),
    mlp("norm", "coupled", 6, 3, 5, 2, norm=True),
    mlp("weights", "parameters", 4, 3, 4, 2),
)


class Part(nn.Module):
    """Some of the outputs of a function."""

    def __init__(self, func: Callable[[torch.Tensor], torch.Tensor], outputs: slice) -> None:
        super().__init__()
        self.func, self.outputs = func, outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.func(x)[:, self.outputs]


def tiny(workload: Workload) -> Workload:
    """The same with few samples, but for an index tensor over all of them."""
    return workload if workload.name == "neighbours" else dataclasses.replace(workload, batch=2)


@pytest.mark.parametrize("workload", EVERY, ids=lambda workload: workload.name)
def test_workloads_have_the_shapes_they_state_and_the_jacobian_of_the_oracle(workload: Workload) -> None:
    small = tiny(workload)
    func, x = small.make()
    assert x.shape == (small.batch, workload.n)
    y = func(x)
    assert y.shape == (small.batch, workload.m)
    assert y.requires_grad == (workload.kind in ("parameters", "training"))
    again, same = small.make()
    assert torch.equal(x, same)
    assert torch.equal(y, again(same))
    if workload.kind != "parameters":
        # the oracle takes a VJP for each row
        part = slice(None, None, max(1, workload.m // 2)) if workload.batch < 1000 else slice(None)
        expected = jacobian_blocks(Part(func, part), (x,), to_double=True)
        torch.testing.assert_close(reference(small, func, x)[:, part], expected.to(x.dtype))


def test_there_are_workloads_of_each_kind() -> None:
    assert len(EVERY) == len(WORKLOADS) >= 24
    assert {w.kind for w in EVERY} >= {"dense", "wide", "tall", "bottleneck", "sparse", "coupled", "tiny", "large"}
    assert max(w.batch for w in EVERY) == 10**6
    assert not {w.kind for w in of_kind()} & {"parameters", "training"}


@pytest.fixture(scope="module")
def races() -> dict[str, BenchResult]:
    return {workload.name: race_workload(workload, SETTINGS) for workload in SMALL}


def test_every_way_is_raced_and_told_with_the_plan(races: dict[str, BenchResult]) -> None:
    for workload in SMALL:
        own, *others = races[workload.name].outcomes
        ways = PARAMETER_WAYS if workload.kind == "parameters" else WAYS
        assert [way.name for way in others] == [way.name for way in ways]
        assert own.state == "right"
        assert len(own.samples) >= 1
        facts = races[workload.name].facts
        assert (facts["kind"], facts["B"], facts["n"], facts["m"]) == (
            workload.kind, workload.batch, workload.n, workload.m,
        )  # fmt: skip
        assert float(facts.get(ROOFLINE, 1.0)) > 0
        assert str(facts["plan"]).endswith(")")


def test_where_samples_are_independent_ratios_refer_to_torchs_default_and_to_its_best(
    races: dict[str, BenchResult],
) -> None:
    assert {way.state for way in races["sin"].outcomes} == {"right"}
    assert [figure.what for figure in races["sin"].figures] == [OVER_DEFAULT, OVER_BEST]
    assert all(figure.value > 0 for figure in races["sin"].figures)


def test_coupled_samples_fail_what_treats_them_one_by_one(races: dict[str, BenchResult]) -> None:
    race = races["norm"]
    states = {way.name: way.state for way in race.outcomes}
    assert states == {
        "autojac": "right",
        "jacobian": "right",
        "jacobian vec": "right",
        "Σ jacobian": "wrong",
        "Σ jacobian vec": "wrong",
        "Σ loop": "wrong",
        "vmap(jacrev)": "error",
        "vmap(jacfwd)": "error",
    }
    assert all(way.reason for way in race.outcomes if way.state != "right")
    assert [figure.what for figure in race.figures] == [OVER_BEST]


def test_ways_that_need_too_much_are_skipped_with_a_reason() -> None:
    reasons = {way.name: way.too_large(WORKLOADS["mlp-3-64-64-3-100k"]) for way in WAYS}
    assert "passes" in str(reasons["jacobian"])
    assert "GiB" in str(reasons["jacobian vec"])
    assert reasons[DEFAULT] is None
    assert BYTES_LIMIT < 2**34


@pytest.mark.parametrize(
    ("run", "state", "reason"),
    [
        (lambda: torch.ones(2, 2), "right", None),
        (lambda: torch.full((2, 2), 1.5), "wrong", "off by 0.5"),
        (lambda: torch.full((2, 2), torch.nan), "wrong", "off by inf"),
        (lambda: torch.ones(2, 3), "wrong", r"shape (2, 3) instead of (2, 2)"),
        (lambda: torch.ones(2, 2) @ torch.ones(3, 3), "error", "RuntimeError"),
    ],
)
def test_numbers_are_checked_before_they_are_timed(
    run: Callable[[], torch.Tensor], state: str, reason: str | None
) -> None:
    outcome = admit("it", run, torch.ones(2, 2)).outcome
    assert outcome.state == state
    assert (reason or "") in (outcome.reason or "")
    assert (outcome.seconds is None) == (state != "right")


def test_only_ways_that_may_be_the_fastest_are_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "clock", Ticking(tick=1e-3))
    truth = torch.ones(1)
    entrants = {name: admit(name, lambda: truth, truth) for name in ("own", "best", "near", "far", DEFAULT)}
    for name, seconds in {"own": 1.0, "best": 2.0, "near": 2.5, "far": 9.0, DEFAULT: 9.0}.items():
        outcome = dataclasses.replace(entrants[name].outcome, seconds=seconds)
        entrants[name] = dataclasses.replace(entrants[name], outcome=outcome)
    own, *ways = entrants.values()
    outcomes = race_with_best([own], ways, torch.device("cpu"), dataclasses.replace(SETTINGS, race_s=9.0), DEFAULT)
    assert {o.name: len(o.samples) for o in outcomes} == {"own": 3, "best": 3, "near": 3, "far": 0, DEFAULT: 3}
    assert outcomes[3].seconds == 9.0


def test_a_race_of_long_calls_takes_enough_rounds_for_a_quartile() -> None:
    calls: list[int] = []
    table = measure.time_interleaved([lambda: calls.append(0)] * 2, torch.device("cpu"), 0.0, 15, until=-math.inf)
    assert [len(samples) for samples in table] == [measure.LEAST_ROUNDS] * 2


def test_training_steps_are_compared_by_the_gradients_they_leave() -> None:
    result = race_step(mlp("net", "training", 6, 3, 5, 2), SETTINGS)
    assert [outcome.name for outcome in result.outcomes[:3]] == ["autojac", WHOLE, DEFAULT]
    assert {outcome.state for outcome in result.outcomes} == {"right"}
    assert [figure.what for figure in result.figures] == [OVER_DEFAULT, OVER_BEST, OF_WHOLE]
    assert result.figures[2].bound == 0.9


def test_regret_is_at_least_one() -> None:
    result = race_candidates(SMALL[0], dataclasses.replace(SETTINGS, race_s=0.5))
    (figure,) = result.figures
    assert figure.what == regret_of("quick")
    assert figure.value >= 1
    assert str(result.facts["plan of quick"]) in [outcome.name for outcome in result.outcomes]
    assert {outcome.state for outcome in result.outcomes} <= {"right", "slow", "error", "skipped"}


def test_the_roofline_is_the_larger_of_arithmetic_and_traffic() -> None:
    operations, bandwidth = machine("cpu", torch.get_num_threads())
    a, x = torch.rand(64, 64), torch.rand(4)
    assert least_seconds([lambda: a @ a, lambda: a @ a @ a], x, x) == pytest.approx(2 * 64**3 / operations)
    assert least_seconds([], x, x) is None
    assert least_seconds([x.sin], x, x) == pytest.approx(2 * 4 * 4 / bandwidth)


def test_calls_of_replays_are_compared_with_their_programs() -> None:
    result = cached_call(dataclasses.replace(SETTINGS, race_s=0.05), WORKLOADS["mlp-2-16-2"])
    assert [outcome.name for outcome in result.outcomes] == ["call", "program", "guard"]
    assert all(1 <= len(outcome.samples) <= FINER * SETTINGS.rounds for outcome in result.outcomes)
    assert [figure.bound for figure in result.figures] == [CALL_US["mlp-2-16-2"], 2.0]


def test_both_signatures_are_traced() -> None:
    first, second = time_tracing(["sin"], "loop")
    assert min(first, second) > 0


def test_evaluations_of_a_first_call_are_counted() -> None:
    with count_evaluations() as evaluations:
        autojac.AutoJacobian(torch.sin, effort="estimate", store=":memory:")(torch.randn(5, 3))
    assert 1 < len(evaluations) <= 25


def test_counting_evaluations_keeps_no_program_from_being_recorded() -> None:
    jac = forced(torch.sin, (torch.randn(5, 3),), Replay(Pull("shared")).spec())
    with count_evaluations() as evaluations:
        jac(torch.randn(5, 3))
        once = len(evaluations)
        for _ in range(2):
            jac(torch.randn(5, 3))
    assert once > 1
    replayer = in_use(jac).compute
    assert isinstance(replayer, Replayer)
    assert replayer.bound is not None


@pytest.mark.parametrize("kind", SIGNATURES)
def test_signatures_differ_from_call_to_call(kind: str) -> None:
    func, points = SIGNATURES[kind]()
    assert len({x.shape for x in points}) == len(points)
    assert len(points) - 1 == {"sequence lengths": 12, "batch sizes": 60, "molecule sizes": 8}[kind]
    assert len(func(points[0])) == len(points[0])


def test_growth_reaches_from_a_hundred_to_a_million_samples() -> None:
    names = list(growth_cases())
    assert names[0].endswith(" at 100")
    assert names[-1].endswith(" at 1000000")


def test_a_fresh_process_has_this_ones_threads() -> None:
    found = in_fresh_process("roofline:machine", "cpu", torch.get_num_threads())
    assert len(found) == 2


def broken(settings: Settings) -> BenchResult:
    raise ValueError("no\nmore")


def made(name: str) -> Callable[[Settings], BenchResult]:
    return lambda settings: BenchResult(name, (), (Figure("a", 1.0, 2.0),), {})


def test_a_case_that_fails_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"lib/a": made("lib/a"), "broken": broken, "c": made("c")}
    monkeypatch.setattr(
        suites, "SUITES", {"own": Suite("own", "", lambda: cases, chosen=("broken", "c"), quick=("c",))}
    )

    def names(only: Sequence[str], quick: bool = False) -> list[str]:
        return [result.name for result in run_suites(["own"], only, dataclasses.replace(SETTINGS, quick=quick))]

    assert names([]) == ["broken", "c"]
    assert names([], quick=True) == ["c"]
    assert names(["lib"]) == ["lib/a"]
    failed, right = run_suites(["own"], [], dataclasses.replace(SETTINGS, quick=False))
    assert (failed.suite, failed.outcomes[0].state, failed.outcomes[0].reason) == ("own", "error", "ValueError: no")
    assert right.figures == (Figure("a", 1.0, 2.0),)


def test_every_suite_chooses_among_its_cases() -> None:
    for suite in SUITES.values():
        names = set(suite.cases())
        assert set(suite.chosen or ()) <= names
        assert set(suite.quick or ()) <= names
        assert suite.what


def test_parameters_are_frozen_unless_they_are_trained() -> None:
    for name, trained in {"mlp-2-16-2": False, "parameters-8-16-4": True, "train-64-32-16": True}.items():
        func, _ = WORKLOADS[name].make()
        assert isinstance(func, nn.Module)
        assert {p.requires_grad for p in func.parameters()} == {trained}
