"""The benchmark's results are complete and true, at sizes where times mean nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from autojac.bench import asdex
from autojac.bench.baselines import BYTES_LIMIT, DEFAULT, WAYS, reference
from autojac.bench.command import bench as command
from autojac.bench.coupled import brusselator
from autojac.bench.overhead import UNWANTED, overhead, startup
from autojac.bench.points import points
from autojac.bench.results import Figure, Outcome, Promised, Race, Regret, Report, ratio
from autojac.bench.run import Settings, admitted, bench
from autojac.bench.table import print_report
from autojac.bench.workloads import ALL, CODES, WORKLOADS, Workload, batch_norm, convolution, mlp, sine
from autojac.bench.zeros import RACES, as_blocks, layouts, reaction
from oracle import jacobian_blocks

SMALL = (
    Workload("sin", "dense", 8, 3, 3, 3, lambda: sine),
    mlp("mlp", 6, 3, 8, 4),
    convolution("conv", 4, 7, channels=2),
    batch_norm("norm", 6, 3, 5, 2),
)
SETTINGS = Settings(effort="quick", rounds=3, budget_s=0.2, shortest_s=1e-5, race_s=1.0)


@pytest.fixture(scope="module")
def report() -> Report:
    return bench(SMALL, replace(SETTINGS, regret=True))


def test_every_way_is_raced_on_every_workload(report: Report) -> None:
    for race, workload in zip(report.races, SMALL, strict=True):
        assert (race.workload, race.batch, race.n, race.m) == (workload.name, workload.batch, workload.n, workload.m)
        assert [way.name for way in race.ways] == [way.name for way in WAYS]
        assert race.autojac.state == "right"
        assert len(race.autojac.samples) == SETTINGS.rounds
        assert race.plan.endswith(")")


def test_all_ways_are_right_where_samples_are_independent(report: Report) -> None:
    for race in report.races:
        if race.kind != "coupled":
            assert {way.state for way in race.ways} == {"right"}
            assert race.default == DEFAULT
            assert not race.substituted


def test_coupled_samples_fail_what_treats_them_one_by_one(report: Report) -> None:
    race = report.races[-1]
    states = {way.name: way.state for way in race.ways}
    assert states == {
        "jacobian": "right",
        "jacobian vec": "right",
        "Σ jacobian": "wrong",
        "Σ jacobian vec": "wrong",
        "Σ loop": "wrong",
        "vmap(jacrev)": "error",
        "vmap(jacfwd)": "error",
    }
    assert all(way.reason for way in race.ways if way.state != "right")
    assert race.coupling == "statistics"
    assert race.substituted
    assert race.default in ("jacobian", "jacobian vec")


def test_ratios_are_positive(report: Report) -> None:
    for race in report.races:
        assert race.speedup is not None
        assert race.speedup > 0
    figures = report.figures()
    assert all(figures[name] for name in ("geometric_mean_speedup_dense", "worst_tuned_over_default"))


def test_regret_is_at_least_one(report: Report) -> None:
    for race in report.races:
        assert race.regret is not None
        assert race.regret.ratio >= 1
        assert race.plan in [candidate.name for candidate in race.regret.candidates]
        assert {candidate.state for candidate in race.regret.candidates} <= {"right", "slow", "error", "skipped"}


def test_json_round_trip(report: Report) -> None:
    text = json.dumps(report.to_json(), allow_nan=False)
    assert Report.from_json(json.loads(text)) == report


def test_environment_names_no_machine(report: Report) -> None:
    assert set(report.environment) == {"autojac", "torch", "threads", "cpu_capability", "device"}


def test_table_shows_every_workload_and_way(report: Report) -> None:
    console = Console(record=True, file=io.StringIO())
    print_report(report, console)
    text = console.export_text()
    for name in [workload.name for workload in SMALL] + [way.name for way in WAYS]:
        assert name in text
    assert "wrong" in text
    assert "geometric mean speed-up over 2 dense workloads" in text


@pytest.mark.parametrize("workload", SMALL, ids=lambda workload: workload.name)
def test_reference_agrees_with_rows_one_by_one(workload: Workload) -> None:
    func, x = workload.make()
    expected = jacobian_blocks(func, (x,), to_double=True)
    torch.testing.assert_close(reference(workload, func, x), expected.to(x.dtype))


@pytest.mark.parametrize("workload", (*ALL, *CODES), ids=lambda workload: workload.name)
def test_workloads_have_the_shapes_they_state(workload: Workload) -> None:
    func, x = workload.make()
    assert x.shape == (workload.batch, workload.n)
    y = func(x[:64])
    assert y.shape == (min(workload.batch, 64), workload.m)
    assert not y.requires_grad
    again, same = workload.make()
    assert torch.equal(x, same)
    assert torch.equal(y, again(same[:64]))


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
    outcome = admitted("it", run, torch.ones(2, 2)).outcome
    assert outcome.state == state
    assert (reason or "") in (outcome.reason or "")
    assert (outcome.seconds is None) == (state != "right")


def test_ratio_pairs_rounds() -> None:
    slow, fast = Outcome("a", "right", 2.0, (2.0, 20.0, 4.0)), Outcome("b", "right", 1.0, (1.0, 10.0, 1.0))
    assert ratio(slow, fast) == 2.0
    assert ratio(replace(slow, samples=()), fast) == 2.0
    assert ratio(Outcome("c", "wrong"), fast) is None


def test_figures_of_hand_made_races() -> None:
    def race(name: str, kind: str, default: float, own: float, best: float) -> Race:
        candidates = (Outcome("own", "right", own, (own,)), Outcome("other", "right", best, (best,)))
        ways = (Outcome(DEFAULT, "right", default, (default,)),)
        own_outcome = Outcome("autojac", "right", own, (own,))
        return Race(
            name, kind, 1, 1, 1, DEFAULT, False, "own", "independent", 0.0, own_outcome, ways, Regret("own", candidates)
        )

    races = (
        race("a", "dense", 4.0, 1.0, 1.0),
        race("b", "dense", 9.0, 1.0, 0.8),
        race("c", "sparse", 1.0, 2.0, 1.0),
    )
    figures = Report({}, {}, races).figures()
    assert figures["geometric_mean_speedup_dense"] == pytest.approx(6)
    assert figures["worst_tuned_over_default"] == pytest.approx(2)
    assert figures["regret_median"] == pytest.approx(1.25)
    assert figures["regret_worst"] == pytest.approx(2)
    assert figures["import_ratio"] is None


def test_overhead_is_a_number_of_seconds() -> None:
    assert -1 < overhead(SETTINGS, SMALL[0], rounds=3) < 1


@pytest.mark.nightly
def test_fresh_processes_find_the_plan() -> None:
    fresh = startup(runs=1, effort="estimate")
    assert fresh.source == "store"
    assert set(fresh.loaded) <= set(UNWANTED)
    assert fresh.first_seconds[0] > 0
    assert fresh.import_ratio > 0
    whole = Report({}, {"effort": "quick"}, (), 1e-6, fresh)
    assert Report.from_json(json.loads(json.dumps(whole.to_json()))) == whole


def test_command_prints_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "sin", SMALL[0])
    arguments = ["--quick", "--budget", "0.1", "--rounds", "3", "--workload", "sin", "--json"]
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert [race["workload"] for race in data["races"]] == ["sin"]
    assert data["settings"]["effort"] == "quick"
    assert data["figures"]["geometric_mean_speedup_dense"] > 0


@pytest.mark.parametrize(
    "arguments", [["--workload", "nothing"], ["--device", "nowhere"], ["--rounds", "1"], ["--effort", "estimates"]]
)
def test_command_refuses_what_it_does_not_know(arguments: list[str]) -> None:
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 2
    assert "Traceback" not in done.output


def test_help_has_an_example() -> None:
    assert "autojac bench --quick --workload sin" in CliRunner().invoke(command, ["--help"]).output


@pytest.mark.parametrize("name", ["sparse over", "blocks over"])
def test_layouts_are_raced_against_the_best_that_knows_no_zeros(layouts_raced: Promised, name: str) -> None:
    (figure,) = (figure for figure in layouts_raced.figures if figure.what.startswith(name))
    base = figure.what.removeprefix(f"{name} ")
    outcomes = {outcome.name: outcome for outcome in layouts_raced.outcomes}
    assert base in (*(way.name for way in WAYS), "autojac without zeros")
    raced = [outcomes[each] for each in ("blocks", "sparse", base)]
    assert {outcome.state for outcome in raced} == {"right"}
    assert figure.value == pytest.approx(ratio(outcomes[name.split(maxsplit=1)[0]], outcomes[base]))
    assert "Colored" in str(layouts_raced.facts["plan, sparse"])
    assert "Colored" not in str(layouts_raced.facts["plan, without zeros"])
    assert layouts_raced.facts["colors of rows"] == 5


@pytest.fixture(scope="module")
def layouts_raced() -> Promised:
    with torch.no_grad():
        return layouts(convolution("conv", 64, 64, channels=2), replace(SETTINGS, effort="estimate"), 1.0, 1.0)


def test_a_wrong_sparse_jacobian_is_not_taken_for_blocks() -> None:
    like = torch.zeros(2, 2, 2)
    own = torch.block_diag(torch.ones(2, 2), 2 * torch.eye(2)).to_sparse_csr()
    right = torch.stack([torch.ones(2, 2), 2 * torch.eye(2)])
    assert torch.equal(as_blocks(own, like), right)
    with pytest.raises(ValueError, match="between samples"):
        as_blocks(torch.ones(4, 4).to_sparse_csr(), like)


def test_brusselator_is_held_against_passes_of_its_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autojac.bench.asdex.prepared", lambda size, x: "left out")
    with torch.no_grad():
        found = reaction(SETTINGS, size=6, rounds=3)
    assert found.facts["entries"] == 6 * 2 * 36
    assert 6 <= float(found.facts["colors of columns"]) <= 10
    assert found.facts["asdex"] == "left out"
    assert {"func", "detection", "coloring", "JVPs", "VJPs", "sparse"} == {outcome.name for outcome in found.outcomes}
    assert [figure.bound for figure in found.figures[1:]] == [3.0, 3.0]
    report = Report({}, {"effort": "quick"}, (), zeros=(found,))
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    console = Console(record=True, file=io.StringIO())
    print_report(report, console)
    assert "sparse over JVPs" in console.export_text()


def test_asdex_says_why_it_is_left_out_or_agrees() -> None:
    x = torch.rand(72)
    rival = asdex.prepared(6, x)
    if isinstance(rival, str):
        assert "autojac[bench]" in rival
        return
    expected = torch.autograd.functional.jacobian(brusselator(6), x)
    torch.testing.assert_close(rival.dense(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
def test_points_are_measured_in_processes_of_their_own() -> None:
    found = points(SETTINGS, counts=(300, 600))
    assert [outcome.state for outcome in found.outcomes] == ["right"] * 4
    assert found.figures[0].what == "blocks over a VJP"
    assert found.facts["colors, 600 points"] >= 4
    assert "Colored" in str(found.facts["plan, 600 points"])
    assert found.figures[-1].bound == pytest.approx(2.4)
    assert all(figure.value > 0 for figure in found.figures)


def test_command_races_zeros_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Promised("it", (), (Figure("a over b", 2.0, 1.0),), {"entries": 3})
    monkeypatch.setitem(RACES, "burgers", lambda settings: made)
    done = CliRunner().invoke(command, ["--quick", "--zeros", "burgers", "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["races"] == []
    assert data["zeros"][0]["figures"] == [{"what": "a over b", "value": 2.0, "bound": 1.0}]
    assert "missed" in CliRunner().invoke(command, ["--quick", "--zeros", "burgers"]).output
