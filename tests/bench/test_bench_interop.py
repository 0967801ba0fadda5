"""Races on other libraries' models are complete and true, on stand-ins that need no other library."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from autojac.bench import command as bench_command
from autojac.bench import suites
from autojac.bench.command import bench as command
from autojac.bench.interop.case import Built, Case, cases, elsewhere
from autojac.bench.interop.race import MEAN, SERVED, WHY, WORST, interop, race_case, together
from autojac.bench.interop.ways import EXACT, WAYS, exact, loss_gradient
from autojac.bench.results import BenchResult, Figure, Outcome, Report
from autojac.bench.run import Settings
from autojac.bench.summary import summarize
from autojac.planning.search import measure
from harness import Ticking
from oracle import jacobian_blocks

SETTINGS = Settings(effort="quick", rounds=3, shortest_s=1e-5, race_s=0.5)


def network() -> Built:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    return Built(model, torch.randn(6, 3), model, {"budget_s": 0.2})


def patient() -> Built:
    return dataclasses.replace(network(), options={"budget_s": 20.0})


def reading() -> Built:
    def func(x: Tensor) -> Tensor:
        return x.sin() * (1 + int(abs(x.detach().numpy()).sum() > 100))

    return Built(func, torch.randn(6, 3), None, {"budget_s": 20.0})


def centered() -> Built:
    return Built(lambda x: (x - x.mean(0)).sin(), torch.randn(6, 3), None, {"budget_s": 0.2})


def broken() -> Built:
    def func(x: Tensor) -> Tensor:
        raise ValueError("no such thing\nand more")

    return Built(func, torch.randn(6, 3))


NET = Case("own/net", ("torch",), network, trains=True)
LOOKS = Case("own/looks", ("torch",), reading)
COUPLED = Case("own/coupled", ("torch",), centered)
BROKEN = Case("own/broken", ("torch",), broken)
ABSENT = Case("absent/thing", ("no_such_library",), network, trains=True)


def test_each_library_has_cases_of_their_own_names() -> None:
    every = cases()
    assert len(every) >= 60
    assert len({case.name for case in every}) == len(every)
    assert {case.library for case in cases(["kornia", "timm/vit"])} == {"kornia", "timm"}
    assert [case.name for case in cases(["timm/vit"])] == ["timm/vit"]
    assert cases(["nothing"]) == []


def test_a_case_is_made_alike_each_time_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    one, other = NET.build(), NET.build()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.x, other.x)
    assert torch.equal(one.func(one.x), other.func(one.x))
    assert not torch.equal(NET.build(seed=1).x, one.x)
    assert elsewhere(one.x).shape == one.x.shape
    assert not torch.equal(elsewhere(one.x), one.x)


@pytest.mark.parametrize("name", [*WAYS, EXACT])
@pytest.mark.parametrize("training", [False, True])
def test_the_ways_are_right_and_have_a_graph_where_grad_mode_is_on(name: str, training: bool) -> None:
    built = NET.build()
    assert built.module is not None
    way: Callable[[Any], Any] = exact if name == EXACT else WAYS[name]
    with torch.set_grad_enabled(training):
        J = way(built.func)(built.x)
    torch.testing.assert_close(J.detach(), jacobian_blocks(built.func, (built.x,)), check_dtype=False)
    assert J.requires_grad is training
    if training:
        weights = list(built.module.parameters())
        torch.testing.assert_close(loss_gradient(J, weights), loss_gradient(exact(built.func)(built.x), weights))


def test_a_case_is_raced_with_torchs_ways_and_told_whether_a_replay_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "clock", Ticking(tick=1e-2))
    settings = dataclasses.replace(SETTINGS, race_s=50.0)
    (found,) = interop(
        [Case("own/net", ("torch",), patient, trains=True), ABSENT], settings, announce=(announced := []).append
    )
    own, *ways = found.outcomes
    assert [way.name for way in ways] == [*WAYS, EXACT]
    assert [way.state for way in (own, *ways)] == ["right"] * 5 + ["skipped"]
    assert found.figures[0].bound == WORST
    assert 0 < found.figures[0].value < math.inf
    assert found.facts[SERVED] == "yes", found.facts
    assert "Replay" in str(found.facts[WHY])
    assert announced == ["own/net", "absent/thing left out, no_such_library is not installed"]


def test_a_training_step_is_raced_where_there_are_parameters() -> None:
    (found,) = interop([NET, LOOKS], SETTINGS, training=True)
    assert found.outcomes[0].state == "right"
    assert found.name == "own/net"
    assert together([found], training=True).figures[2].bound == MEAN[True]


def test_why_no_replay_serves_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "clock", Ticking(tick=1e-2))
    with torch.no_grad():
        found = race_case(LOOKS, SETTINGS)
    assert found.facts[SERVED] == "no"
    assert "looks" in str(found.facts[WHY]) or "reads" in str(found.facts[WHY])


def test_where_samples_couple_every_row_is_raced() -> None:
    with torch.no_grad():
        found = race_case(COUPLED, SETTINGS)
    states = {way.name: way.state for way in found.outcomes}
    assert states[EXACT] == states["autojac"] == "right"
    assert {states[name] for name in WAYS} == {"wrong"}


def test_what_cannot_be_made_is_no_race() -> None:
    found = race_case(BROKEN, SETTINGS)
    assert found.outcomes[0].state == "error"
    assert found.facts[WHY] == "not built: ValueError: no such thing"
    assert together([found]).figures[0] == Figure("share of cases without a right Jacobian", 1.0, 0.0)


def row(name: str, value: float, served: str) -> BenchResult:
    outcome = Outcome("autojac", "right", value, (value,))
    facts: dict[str, str | float] = {"first s": value, "watch µs": 2.0, SERVED: served, WHY: "because"}
    return BenchResult(name, (outcome, Outcome("torch", "right", 1.0, (1.0,))), (Figure("ratio", value, WORST),), facts)


def test_figures_of_all_cases() -> None:
    found = together([row("a", 0.25, "yes"), row("b", 1.0, "no")])
    assert [figure.value for figure in found.figures] == pytest.approx([0.0, 0.5, 0.5, 1.0, 1.0, 2.0])
    assert math.isnan(together([]).figures[2].value)


def test_command_races_the_chosen_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def raced(chosen: list[Case], settings: Settings, training: bool) -> list[BenchResult]:
        asked.append((chosen[0].library, training))
        return [row(chosen[0].name, 0.25, "yes")]

    monkeypatch.setattr(suites, "interop", raced)
    monkeypatch.setattr(bench_command, "load_everything", lambda: None)
    done = CliRunner().invoke(command, ["--quick", "--interop", "--training", "--only", "kornia", "--json"])
    assert done.exit_code == 0, done.output
    report = Report.from_lines(done.stdout.splitlines())
    assert {result.suite for result in report.results} == {"interop"}
    assert {result.name.split("/")[0] for result in report.results} == {"kornia"}
    assert set(asked) == {("kornia", True)}
    assert any("training steps of other" in figure.what for figure in summarize(report))
