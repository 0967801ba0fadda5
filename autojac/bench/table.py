"""The report in human-readable form."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from autojac.bench.baselines import WAYS
from autojac.bench.results import Figure, Outcome, Promised, Race, Report, ratio

PLAIN_WIDTH = 170
"""Columns where the output is no terminal."""


def print_report(report: Report, console: Console | None = None) -> None:
    """Print a report's tables and figures."""
    console = console or Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    facts = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    console.print(f"{facts}; effort {report.settings['effort']}", highlight=False)
    if report.races:
        console.print(times(report))
        console.print(
            "ms a call, interleaved; ~ too far behind for the race; – too large; "
            "speed-up over torch's default vmap(jacrev), * where that fails over torch's best right way",
            style="dim",
        )
        console.print(plans(report))
    for rows in grouped(report.contests):
        console.print(contests(rows))
    for one in (*report.zeros, *report.costs):
        console.print(promised(one))
    for line in figures(report):
        console.print(line, highlight=False)


def times(report: Report) -> Table:
    """Return one row per workload, one column per way."""
    table = Table(
        "workload", "B", "n→m", *(way.name for way in WAYS), "autojac", "speed-up", "over best", box=box.SIMPLE_HEAD
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for race in report.races:
        best = race.best_way
        over_best = best and ratio(best, race.autojac)
        table.add_row(
            race.workload,
            str(race.batch),
            f"{race.n}→{race.m}",
            *(cell(way, bold=way is best) for way in race.ways),
            cell(race.autojac, bold=True),
            f"{race.speedup:.2f}{'*' if race.substituted else ''}" if race.speedup else "",
            f"{over_best:.2f}" if over_best else "",
        )
    return table


def plans(report: Report) -> Table:
    """Return what was chosen for each workload, and how it compares with the other candidates."""
    table = Table("workload", "coupling", "tuning s", "regret", "plan", "best candidate", box=box.SIMPLE_HEAD)
    for race in report.races:
        regret = race.regret
        other = regret.best.name if regret and regret.best.name != regret.plan else ""
        table.add_row(
            race.workload,
            race.coupling,
            f"{race.tuning_seconds:.1f}",
            f"{regret.ratio:.2f}" if regret else "",
            race.plan,
            other,
        )
    return table


def grouped(parts: Iterable[Promised]) -> list[list[Promised]]:
    """Contests of the same ways together."""
    groups: dict[tuple[str, ...], list[Promised]] = {}
    for part in parts:
        groups.setdefault(tuple(outcome.name for outcome in part.outcomes), []).append(part)
    return list(groups.values())


def contests(rows: Sequence[Promised]) -> Table:
    """Return one row per workload: the same ways in ms, what was promised, and what else is known."""
    names = [outcome.name for outcome in rows[0].outcomes]
    table = Table("workload", *names, "ratio", "at most", *rows[0].facts, box=box.SIMPLE_HEAD)
    for row in rows:
        (figure,) = row.figures
        table.add_row(
            row.name,
            *map(cell, row.outcomes),
            f"{figure.value:.3g}{missed(figure)}",
            f"{figure.bound:.3g}",
            *map(fact, row.facts.values()),
        )
    return table


def promised(part: Promised) -> Table:
    """Return one part: its ways, what was promised, what else is known."""
    table = Table(part.name, "", box=box.SIMPLE_HEAD)
    for outcome in part.outcomes:
        table.add_row(outcome.name, cell(outcome) + (" ms" if outcome.seconds is not None else ""))
    table.add_section()
    for figure in part.figures:
        table.add_row(figure.what, f"{figure.value:.3g}, at most {figure.bound:.3g}{missed(figure)}")
    table.add_section()
    for what, known in part.facts.items():
        table.add_row(what, fact(known))
    return table


def missed(figure: Figure) -> str:
    return "" if figure.value <= figure.bound else ", [red]missed[/red]"


def fact(known: str | float) -> str:
    return known if isinstance(known, str) else f"{known:.4g}"


def cell(outcome: Outcome, bold: bool = False) -> str:
    """Return a time in ms, or why there is none."""
    if outcome.state == "skipped":
        return "–"
    if outcome.state != "right" or outcome.seconds is None:
        return f"[red]{outcome.state}[/red]"
    text = f"{'' if outcome.samples else '~'}{number(outcome.seconds * 1e3)}"
    return f"[bold]{text}[/bold]" if bold else text


def number(value: float) -> str:
    """Three significant digits, never in scientific notation."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def figures(report: Report) -> Iterator[str]:
    """Return the numbers that the rest is there for, one per line."""
    dense = [race for race in report.races if race.kind == "dense"]
    if report.mean_speedup:
        yield f"geometric mean speed-up over {len(dense)} dense workloads: {report.mean_speedup:.2f}"
    worst = report.worst_race
    if worst and worst.speedup:
        yield f"worst of tuned over torch's default: {1 / worst.speedup:.3f} ({worst.workload})"
    regrets: list[tuple[float, Race]] = [(race.regret.ratio, race) for race in report.races if race.regret]
    if regrets:
        highest, at = max(regrets, key=lambda pair: pair[0])
        median = statistics.median(value for value, _ in regrets)
        yield f"regret over the best fixed candidate: median {median:.3f}, worst {highest:.3f} ({at.workload})"
    if report.overhead_seconds is not None:
        yield f"a call adds {report.overhead_seconds * 1e6:.1f} µs to its bare method"
    fresh = report.startup
    if fresh:
        first = statistics.median(fresh.first_seconds) * 1e3
        loaded = ", ".join(fresh.loaded) or "none of them"
        yield f"first Jacobian of a fresh process, plan from the {fresh.source}: {first:.1f} ms after the imports"
        yield f"loaded on that path, of Alembic, Optuna and torch._dynamo: {loaded}"
        yield f"import autojac over import torch: {fresh.import_ratio:.3f}"
