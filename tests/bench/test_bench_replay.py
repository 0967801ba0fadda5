"""The contests of replays are complete and true, at sizes where times mean nothing."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from dataclasses import replace

import numpy
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn

from autojac.bench import extra
from autojac.bench.baselines import DEFAULT
from autojac.bench.command import bench as command
from autojac.bench.contests import BOUNDS, contest, torch_contest
from autojac.bench.jitted import MODES, NAMES, jax_contest, of_jax
from autojac.bench.replayed import CALLED, DEEP, FINER, _fresh, calls, traced, tracing
from autojac.bench.results import Figure, Outcome, Promised, Report, ratio
from autojac.bench.run import Settings, admitted, tune
from autojac.bench.table import print_report
from autojac.bench.workloads import ALL, REPLAYED, WORKLOADS, Workload, convolution, mlp, sine
from autojac.planning.search import measure

SIN = Workload("sin", "dense", 8, 3, 3, 3, lambda: sine)
NET = mlp("net", 6, 3, 8, 4)
SETTINGS = Settings(effort="quick", rounds=3, budget_s=0.2, shortest_s=1e-5, race_s=1.0)


@pytest.mark.parametrize("workload", REPLAYED, ids=lambda workload: workload.name)
def test_workloads_of_replays_have_the_shapes_they_state(workload: Workload) -> None:
    func, x = workload.make()
    assert x.shape == (workload.batch, workload.n)
    assert func(x).shape == (workload.batch, workload.m)
    assert workload not in ALL


def test_every_contest_is_on_a_workload() -> None:
    assert {*BOUNDS, *NAMES, *CALLED, DEEP} <= set(WORKLOADS)


def test_torch_is_contested_without_compilers() -> None:
    with torch.no_grad():
        found = torch_contest(NET, SETTINGS, 0.25)
    own, default = found.outcomes
    assert [own.name, default.name] == ["autojac", DEFAULT]
    assert len(own.samples) == len(default.samples) == SETTINGS.rounds
    assert found.figures == (Figure(f"autojac over {DEFAULT}", ratio(own, default) or math.nan, 0.25),)
    assert "Compiled" not in str(found.facts["plan"])


def test_the_promise_refers_to_the_fastest_right_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "interleaved", lambda *_: [[6.0, 6.0, 8.0], [4.0, 4.0, 4.0], [2.0, 3.0, 2.0]])
    with torch.no_grad():
        tuned = tune(SIN, replace(SETTINGS, effort="estimate"))
        rivals = [admitted(name, lambda: tuned.truth, tuned.truth) for name in ("slow", "fast")]
        wrong = admitted("wrong", lambda: tuned.truth + 1, tuned.truth)
        found = contest(tuned, [*rivals, wrong], SETTINGS, 1.0)
    assert found.figures == (Figure("autojac over fast", 3.0, 1.0),)
    assert [outcome.seconds for outcome in found.outcomes] == [6.0, 4.0, 2.0, None]
    assert found.outcomes[-1].state == "wrong"


def test_without_a_right_rival_nothing_is_promised_to_hold() -> None:
    with torch.no_grad():
        tuned = tune(SIN, replace(SETTINGS, effort="estimate"))
        found = contest(tuned, [admitted("wrong", lambda: tuned.truth + 1, tuned.truth)], SETTINGS, 1.0)
    assert found.figures[0].value == math.inf


def test_calls_of_replays_are_held_against_their_graphs() -> None:
    found = calls([SIN, NET], SETTINGS)
    expected = [f"{name}: {what}" for name in ("sin", "net") for what in ("call", "graph", "guard")]
    assert [outcome.name for outcome in found.outcomes] == expected
    assert all(len(outcome.samples) == FINER * SETTINGS.rounds for outcome in found.outcomes)
    assert [figure.bound for figure in found.figures] == [5.0, 2.0, 5.0, 2.0]
    assert all(-1e6 < figure.value < 1e6 for figure in found.figures)


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_both_signatures_are_traced(engine: str) -> None:
    first, second = traced(NET, engine)
    assert min(first, second) > 0


def test_what_cannot_be_traced_has_no_time() -> None:
    def branching(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * (2 if x.detach().sum() > 100 else 1)

    with pytest.raises(RuntimeError, match="not possible"):
        traced(Workload("branching", "dense", 4, 2, 2, 2, lambda: branching), "loop")


def test_a_fresh_process_times_both_signatures() -> None:
    assert min(_fresh("loop", "cpu", "sin")) > 0


def test_tracing_is_held_to_half_the_time_for_a_second_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "autojac.bench.replayed._fresh", lambda engine, device, *names: [0.2 if names[1:] else 0.7, 0.05]
    )
    found = tracing(SETTINGS, runs=3)
    assert [figure.value for figure in found.figures] == pytest.approx([200, 50] * 2)
    assert [figure.bound for figure in found.figures] == [300.0, 150.0] * 2
    assert list(found.facts.values()) == pytest.approx([0.25, 700.0] * 2)
    assert {len(outcome.samples) for outcome in found.outcomes} == {3}


@pytest.mark.parametrize("name", NAMES)
def test_what_jax_is_given_is_the_same_function(name: str) -> None:
    func, x = WORKLOADS[name].make()
    same = of_jax(func, numpy)
    for sample in x[:3]:
        torch.testing.assert_close(torch.from_numpy(same(sample.numpy())), func(sample[None])[0])


def test_what_is_not_written_for_jax_is_refused_by_name() -> None:
    for func in (convolution("conv", 4, 7).make()[0], nn.ReLU()):
        with pytest.raises(NotImplementedError, match="not written for JAX"):
            of_jax(func, numpy)


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is an extra")
@pytest.mark.parametrize("workload", [SIN, NET], ids=["sin", "net"])
def test_jax_is_right_before_it_is_timed(workload: Workload) -> None:
    with torch.no_grad():
        found = jax_contest(workload, SETTINGS)
    assert [outcome.name for outcome in found.outcomes] == ["autojac", *(f"jit(vmap({mode}))" for mode in MODES)]
    assert {outcome.state for outcome in found.outcomes} == {"right"}
    assert found.figures[0].bound == 1.0


def report() -> Report:
    outcomes = (Outcome("autojac", "right", 2.0, (2.0,)), Outcome(DEFAULT, "right", 1.0, (1.0,)))
    rows = [Promised(n, outcomes, (Figure.over(*outcomes, 0.5),), {"plan": f"Replay({n})"}) for n in ("one", "two")]
    cost = Promised("calls of replays", outcomes[:1], (Figure("guard, µs", 1.0, 2.0),), {})
    return Report({}, {"effort": "quick"}, (), contests=tuple(rows), costs=(cost,))


def test_contests_are_one_table_and_survive_json() -> None:
    made = report()
    assert Report.from_json(json.loads(json.dumps(made.to_json()))) == made
    console = Console(record=True, file=io.StringIO(), width=120)
    print_report(made, console)
    text = console.export_text()
    assert text.count("at most  ") == 1
    assert text.count("2, missed") == 2
    assert "Replay(two)" in text
    assert "1, at most 2\n" in "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def test_command_contests_replays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = report()
    monkeypatch.setattr("autojac.bench.command.against_torch", lambda settings, announce: list(made.contests))
    monkeypatch.setattr("autojac.bench.command.replayed", lambda settings, announce: list(made.costs))
    done = CliRunner().invoke(command, ["--quick", "--replay", "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["races"] == []
    assert [part["name"] for part in data["contests"]] == ["one", "two"]
    assert [part["name"] for part in data["costs"]] == ["calls of replays"]


def test_command_says_how_to_get_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra.importlib, "import_module", _missing)
    done = CliRunner().invoke(command, ["--jax", "--replay"])
    assert done.exit_code == 1
    assert "pip install 'autojac[bench]'" in done.output
    assert "replay of" not in done.output


def test_command_contests_jax_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autojac.bench.command.loaded", lambda name: [name])
    monkeypatch.setattr("autojac.bench.command.against_jax", lambda settings, announce: list(report().contests))
    data = json.loads(CliRunner().invoke(command, ["--quick", "--jax", "--json"]).stdout)
    assert data["races"] == []
    assert len(data["contests"]) == 2
    assert data["costs"] == []


def test_help_has_an_example() -> None:
    assert "autojac bench --replay --jax" in CliRunner().invoke(command, ["--help"]).output


def _missing(name: str) -> None:
    raise ImportError(f"No module named {name!r}")
