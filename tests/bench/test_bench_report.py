"""A report keeps what was measured, says what was asked, and is told as tables."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from autojac.bench import command as bench_command
from autojac.bench.baselines import DEFAULT
from autojac.bench.command import bench as command
from autojac.bench.jacobians import OVER_BEST, OVER_DEFAULT
from autojac.bench.page import make_plots, write_page
from autojac.bench.regret import regret_of
from autojac.bench.results import BenchResult, Figure, Outcome, Report, fastest, ratio
from autojac.bench.run import Settings, environment
from autojac.bench.summary import summarize
from autojac.bench.table import markdown, number, print_report, sheets, with_tables
from autojac.bench.training import OF_WHOLE
from autojac.errors import UnsupportedError


def race(name: str, own: float, default: float, best: float, suite: str = "jacobians", **facts: Any) -> BenchResult:
    outcomes = (
        Outcome("autojac", "right", own, (own,)),
        Outcome(DEFAULT, "right", default, (default,)),
        Outcome("Σ loop", "right", best),
        Outcome("jacobian", "skipped", reason="passes"),
    )
    figures = (Figure(OVER_DEFAULT, own / default), Figure(OVER_BEST, own / best, 1.03))
    return BenchResult(
        name, outcomes, figures, {"kind": "dense", "B": 8, "n": 3, "m": 2, "plan": "P()", **facts}, suite
    )


ENVIRONMENT = {"torch": "2", "device": "cpu"}
RESULTS = (
    race("a", 1.0, 4.0, 2.0),
    race("b", 1.0, 9.0, 0.5),
    race("w", 1.0, 3.0, 2.0, kind="parameters"),
    dataclasses.replace(
        race("step", 1.0, 2.0, 1.5, "training"), figures=(Figure(OVER_BEST, 0.5, 1.03), Figure(OF_WHOLE, 0.6, 0.62))
    ),
    BenchResult("sin", (), (Figure("CPU seconds", 0.2, 0.1), Figure("evaluations", 12, 25)), {"wall s": 0.3}, "search"),
    BenchResult("none", (), (Figure("speed", 5.0, 4.0, least=True), Figure("lost", math.inf, 1.0)), {}, "search"),
    BenchResult("c", (), (Figure(regret_of("quick"), 1.1, 1.15),), {}, "regret"),
    BenchResult("d", (), (Figure(regret_of("quick"), 1.3, 1.15),), {}, "regret"),
)
REPORT = Report(ENVIRONMENT, {"effort": "measure"}, RESULTS)


def test_ratio_pairs_rounds() -> None:
    slow, fast = Outcome("a", "right", 2.0, (2.0, 20.0, 4.0)), Outcome("b", "right", 1.0, (1.0, 10.0, 1.0))
    assert ratio(slow, fast) == 2.0
    assert ratio(dataclasses.replace(slow, samples=()), fast) == 2.0
    assert ratio(Outcome("c", "wrong"), fast) is None


def test_the_fastest_is_one_of_those_in_the_race() -> None:
    raced, lucky = Outcome("a", "right", 2.0, (2.0,)), Outcome("b", "right", 1.0)
    assert fastest([lucky, raced, Outcome("c", "wrong")]) == raced
    assert fastest([lucky]) == lucky
    assert fastest([Outcome("c", "error")]) is None


def test_json_lines_round_trip() -> None:
    lines = list(REPORT.lines())
    assert len(lines) == 1 + len(RESULTS)
    for line in lines:
        assert json.loads(line)
        assert "Infinity" not in line
    assert Report.from_lines(lines) == REPORT


def test_a_stopped_run_keeps_what_it_measured_and_a_repeated_case_counts_once() -> None:
    lines = [*REPORT.lines()]
    again = race("a", 2.0, 4.0, 2.0)
    joined = Report.from_lines([*lines, *Report(ENVIRONMENT, {"effort": "quick"}, (again,)).lines(), '{"name": "cut'])
    assert joined.results == (again, *RESULTS[1:])
    assert joined.settings == {"effort": "quick"}
    with pytest.raises(ValueError, match="no line"):
        Report.from_lines(lines[1:])


def test_the_summary_answers_what_was_asked() -> None:
    found = {figure.what: figure for figure in summarize(REPORT)}
    over_default = found[f"Jacobians: times faster than {DEFAULT}, geometric mean of 2"]
    assert (over_default.value, over_default.bound, over_default.missed) == (pytest.approx(6), 12.0, True)
    assert found["Jacobians: times faster than torch's best way, geometric mean of 2"].value == pytest.approx(1)
    assert found["Jacobians: worst over torch's best way (b)"].value == 2
    assert found["Jacobians in parameters: worst over torch's best way (w)"].value == 0.5
    assert not found["whole training steps over torch's best way, geometric mean"].missed
    assert found["regret of quick, median"].value == pytest.approx(1.2)
    assert found["regret of quick, worst (d)"].missed
    assert found["sin: CPU seconds"].missed
    assert not found["none: speed"].missed
    assert found["none: lost"].missed
    assert summarize(Report({}, {})) == []


def test_what_is_not_right_is_named() -> None:
    wrong = BenchResult("x", (Outcome("autojac", "wrong", reason="off"),), (), {}, "jacobians")
    (figure,) = summarize(Report({}, {}, (wrong,)))
    assert figure == Figure("without a right result: x", 1, 0)


def test_tables_have_every_case_way_figure_and_fact() -> None:
    text = markdown(REPORT)
    assert "| a | dense | 8 | 3 | 2 | 1000 | 4000 | ~2000 | – | 0.25 | 0.5 | P() |" in text
    assert "| sin | evaluations | 12 | at most 25 |  |" in text
    assert "| sin | CPU seconds | 0.2 | at most 0.1 | missed |" in text
    assert "| none | speed | 5 | at least 4 |  |" in text
    assert "| c | 1.1 |" in text
    assert text.count("### jacobians") == 1
    for sheet in sheets(REPORT):
        assert {len(row) for row in sheet.rows} == {len(sheet.columns)}
    console = Console(record=True, file=io.StringIO())
    print_report(REPORT, console)
    printed = console.export_text()
    assert "missed" in printed
    assert "regret of quick, worst (d)" in printed


PAGE = """Before.
<!-- bench: heading -->
old
<!-- end -->
<!-- bench: jacobians: jacobians; B; autojac; absent -->
<!-- end -->
<!-- bench: zeros -->
kept
<!-- end -->
After <!-- bench: what was asked -->
| old |
<!-- end -->
"""


def test_tables_are_put_between_the_marks_of_a_page() -> None:
    page = with_tables(PAGE, REPORT)
    assert "old" not in page
    assert "<!-- bench: zeros -->\nkept\n<!-- end -->" in page
    assert "torch 2, device cpu; effort measure" in page
    assert "| jacobians | B | autojac |\n| --- | --- | --- |\n| a | 8 | 1000 |" in page
    assert "| regret of quick, median | 1.2 | at most 1.05 | missed |" in page
    assert page.startswith("Before.")
    assert with_tables(page, REPORT) == page
    for mark, message in (("nothing", "no table 'nothing'"), ("jacobians: B", "first must be named")):
        with pytest.raises(KeyError, match=message):
            with_tables(f"<!-- bench: {mark} -->\n<!-- end -->", REPORT)


def test_the_page_of_plots_has_every_figure_and_needs_no_network(tmp_path: Path) -> None:
    grown = [
        dataclasses.replace(race(f"f at {b}", b / 1e6, b / 1e5, b / 1e5, "growth"), facts={"B": b}) for b in (10, 100)
    ]
    path = write_page(dataclasses.replace(REPORT, results=(*RESULTS, *grown)), tmp_path / "sub" / "page")
    text = path.read_text(encoding="utf-8")
    assert path.suffix == ".html"
    for figure in summarize(REPORT):
        assert escape(figure.what) in text
    assert not re.search(r"<(script|link)[^>]+(src|href)=", text)
    assert text.count('class="plotly-graph-div"') == len(make_plots(REPORT)) + 1
    assert "f: autojac" in text


def test_without_plotly_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(UnsupportedError, match=r"autojac\[report\]"):
        write_page(REPORT, "page.html")


@pytest.mark.parametrize(("value", "text"), [(0.0123, "0.0123"), (123.6, "124"), (-0.5, "-0.5"), (math.inf, "inf")])
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_environment_and_settings_name_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    facts = {"autojac", "torch", "threads", "cpu_capability", "device", "load"}
    assert set(environment("cpu")) == facts
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert set(environment("cpu")) == facts | {"omp_wait_policy"}
    assert not {"store", "peers"} & set(Settings(store="/home/me/plans.db", peers="/usr/bin/python").describe())


@pytest.fixture(autouse=True)
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is searched here, so nothing is loaded for it."""
    monkeypatch.setattr(bench_command, "load_everything", lambda: None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The command, with cases that are made already; the last of `stopped` is never reached."""
    seen: list[Any] = []

    def run(names: list[str], only: tuple[str, ...], settings: Settings, announce: Any) -> Iterator[BenchResult]:
        seen.extend([names, only, settings])
        announce("a")
        yield RESULTS[0]
        if "stopped" in only:
            raise KeyboardInterrupt
        yield from RESULTS[1:]

    monkeypatch.setattr(bench_command, "run_suites", run)
    return seen


def test_command_prints_a_line_for_each_result(asked: list[Any]) -> None:
    done = CliRunner().invoke(command, ["--quick", "--json", "--only", "a"])
    assert done.exit_code == 0, done.output
    assert Report.from_lines(done.stdout.splitlines()).results == RESULTS
    names, only, settings = asked
    assert "interop" not in names
    assert "jacobians" in names
    assert (only, settings.effort, settings.rounds) == (("a",), "quick", 5)


def test_command_stopped_keeps_what_was_measured(asked: list[Any]) -> None:
    done = CliRunner().invoke(command, ["--only", "stopped"])
    assert done.exit_code == 0
    assert "stopped; what 1 cases gave is kept" in done.stderr
    assert "over torch's best" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "names", "training"),
    [
        (["--interop"], ["interop"], False),
        (["--interop", "--training"], ["interop"], True),
        (["--training"], ["training"], True),
        (["--suite", "zeros", "--suite", "growth"], ["zeros", "growth"], False),
    ],
)
def test_command_runs_the_suites_asked_for(
    asked: list[Any], arguments: list[str], names: list[str], training: bool
) -> None:
    CliRunner().invoke(command, arguments)
    assert asked[0] == names
    assert asked[2].training is training


def test_command_reads_what_runs_have_written(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, results in ((first, RESULTS[:3]), (second, RESULTS[3:])):
        path.write_text("\n".join(Report(ENVIRONMENT, {"effort": "measure"}, results).lines()), encoding="utf-8")
    source = ["--from", str(first), "--from", str(second)]
    assert CliRunner().invoke(command, [*source, "--tables"]).output == f"{markdown(REPORT)}\n"
    assert Report.from_lines(CliRunner().invoke(command, [*source, "--json"]).output.splitlines()) == REPORT
    assert "what was asked" in CliRunner().invoke(command, source).output
    page, plots = tmp_path / "page.md", tmp_path / "plots.html"
    page.write_text(PAGE, encoding="utf-8")
    done = CliRunner().invoke(command, [*source, "--into", str(page), "--html", str(plots)])
    assert (done.exit_code, done.stdout) == (0, "")
    assert page.read_text(encoding="utf-8") == with_tables(PAGE, REPORT)
    assert plots.exists()
    page.write_text("<!-- bench: nothing -->\n<!-- end -->", encoding="utf-8")
    assert "page.md: there is no table" in CliRunner().invoke(command, [*source, "--into", str(page)]).output
    first.write_text("nothing", encoding="utf-8")
    refused = CliRunner().invoke(command, ["--from", str(first)])
    assert refused.exit_code == 2
    assert "autojac bench --json" in refused.output


@pytest.mark.parametrize(
    "arguments", [["--suite", "nothing"], ["--device", "nowhere"], ["--rounds", "1"], ["--effort", "estimates"]]
)
def test_command_refuses_what_it_does_not_know(arguments: list[str]) -> None:
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 2
    assert "Traceback" not in done.output


def test_command_says_where_nothing_has_that_name() -> None:
    done = CliRunner().invoke(command, ["--suite", "jacobians", "--only", "nothing"])
    assert done.exit_code == 1
    assert "no case of jacobians is 'nothing'" in done.output


def test_help_has_an_example() -> None:
    assert "autojac bench --quick --suite jacobians --only sin" in CliRunner().invoke(command, ["--help"]).output
