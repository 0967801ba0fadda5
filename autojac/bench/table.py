"""A report as tables: on a terminal, in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autojac.bench.results import BenchResult, Figure, Outcome, Report
from autojac.bench.suites import SUITES
from autojac.bench.summary import summarize

PLAIN_WIDTH = 200
"""Columns where the output is no terminal."""
MOST_WAYS = 10
"""Ways that have columns of their own; of more the figures say enough."""
SHAPES = ("kind", "B", "n", "m")
SUMMARY, HEADING = "what was asked", "heading"
MARK = re.compile(r"(<!-- bench: (.+?) -->)\n(.*?)(<!-- end -->)", re.DOTALL)
FOOTNOTE = (
    "ms a call, interleaved; ~ too far behind for the race; – too large or not asked; ratios are autojac over the other"
)


@dataclass(frozen=True)
class Sheet:
    """A table as data: its title, its columns, and the text of its cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sheets(report: Report) -> list[Sheet]:
    """Return all tables of a report: each suite's ways and figures, and at last what was asked."""
    found = []
    for suite in report.suites:
        groups: dict[tuple[object, ...], list[BenchResult]] = {}
        for result in report.of(suite):
            groups.setdefault(_group(result), []).append(result)
        alone = [each for rows in groups.values() if len(rows) == 1 and not ways(rows[0]) for each in rows]
        found += [_wide(suite, rows) for rows in groups.values() if rows[0] not in alone]
        if alone:
            found.append(_long(suite, alone))
    return [*found, summary_sheet(report)]


def summary_sheet(report: Report) -> Sheet:
    return Sheet(SUMMARY, ("what", "measured", "asked", ""), tuple(map(_asked_row, summarize(report))))


def ways(result: BenchResult) -> tuple[Outcome, ...]:
    """Return the ways that have columns of their own."""
    return result.outcomes if len(result.outcomes) <= MOST_WAYS else ()


def _group(result: BenchResult) -> tuple[object, ...]:
    names = tuple(outcome.name for outcome in ways(result))
    return (names, () if names[:1] == ("autojac",) else tuple(figure.what for figure in result.figures))


def _wide(suite: str, rows: Sequence[BenchResult]) -> Sheet:
    """Return one row for each result: its shapes, its ways in ms, its figures, its facts."""
    names = _in_order(outcome.name for row in rows for outcome in ways(row))
    figures = _in_order(figure.what for row in rows for figure in row.figures)
    facts = _in_order(fact for row in rows for fact in row.facts)
    shapes = [name for name in facts if name in SHAPES]
    rest = [name for name in facts if name not in SHAPES]
    columns = (suite, *shapes, *names, *figures, *rest)
    return Sheet(suite, columns, tuple(_cells(row, shapes, names, figures, rest) for row in rows))


def _cells(
    row: BenchResult, shapes: Sequence[str], names: Sequence[str], figures: Sequence[str], facts: Sequence[str]
) -> tuple[str, ...]:
    outcomes = {outcome.name: outcome for outcome in row.outcomes}
    return (
        row.name,
        *(_fact(row.facts.get(name)) for name in shapes),
        *(cell(outcomes.get(name)) for name in names),
        *(_value(row.figure(name)) for name in figures),
        *(_fact(row.facts.get(name)) for name in facts),
    )


def _long(suite: str, results: Sequence[BenchResult]) -> Sheet:
    """Return one row for each figure and each fact."""
    rows = [(result.name, *_asked_row(figure)) for result in results for figure in result.figures]
    rows += [(result.name, name, _fact(fact), "", "") for result in results for name, fact in result.facts.items()]
    return Sheet(suite, (suite, "what", "measured", "asked", ""), tuple(rows))


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _asked_row(figure: Figure) -> tuple[str, str, str, str]:
    bound = "–" if figure.bound is None else f"{'at least' if figure.least else 'at most'} {number(figure.bound)}"
    return figure.what, number(figure.value), bound, "missed" if figure.missed else ""


def _value(figure: Figure | None) -> str:
    return "" if figure is None else f"{number(figure.value)}{' missed' if figure.missed else ''}"


def _fact(fact: str | float | None) -> str:
    return "" if fact is None else fact if isinstance(fact, str) else number(fact)


def cell(outcome: Outcome | None) -> str:
    """Return a time in ms, or why there is none."""
    if outcome is None or outcome.state == "skipped":
        return "–"
    if outcome.state not in ("right", "slow") or outcome.seconds is None:
        return outcome.state
    return f"{'' if outcome.samples else '~'}{number(outcome.seconds * 1e3)}"


def number(value: float) -> str:
    """Return three significant digits, never in scientific notation."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def heading(report: Report) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    return f"{facts}; effort {report.settings.get('effort', 'of each case')}"


def print_report(report: Report, console: Console | None = None) -> None:
    """Print a report's tables, and at last what was asked."""
    console = console or Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print(heading(report), highlight=False)
    for sheet in sheets(report):
        table = Table(*map(escape, sheet.columns), title=sheet.title, box=box.SIMPLE_HEAD)
        for row in sheet.rows:
            table.add_row(*(_mark(text) for text in row))
        console.print(table)
    console.print(FOOTNOTE, style="dim")


def _mark(text: str) -> str:
    states = ("missed", "wrong", "error")
    return f"[red]{escape(text)}[/red]" if text.rsplit(" ", maxsplit=1)[-1] in states else escape(text)


def markdown(report: Report) -> str:
    """Return a report's tables in Markdown."""
    parts = [f"### {sheet.title}\n\n{_lines(sheet)}" for sheet in sheets(report)]
    return "\n\n".join([heading(report), *parts, FOOTNOTE])


def with_tables(page: str, report: Report) -> str:
    """Return a page of Markdown with the tables of a report between its marks.

    `<!-- bench: jacobians -->` and `<!-- end -->` stand around the tables of a suite. After the name, and a colon, may
    stand the columns that are shown, separated by semicolons: `<!-- bench: jacobians: jacobians; autojac -->`. The name
    `heading` is what the numbers depend on, and `what was asked` the summary. What the report did not measure stays.

    Raises:
        KeyError: for a name that no suite has, and for columns without the first one.
    """
    return MARK.sub(lambda found: f"{found[1]}\n{_marked_part(found[2], report) or found[3]}{found[4]}", page)


def _marked_part(mark: str, report: Report) -> str:
    """Return what belongs behind a mark; nothing if it was not measured."""
    name, _, chosen = (part.strip() for part in mark.partition(":"))
    if name == HEADING:
        return f"{heading(report)}\n"
    if name not in (SUMMARY, *SUITES):
        raise KeyError(f"there is no table {name!r}; there are {', '.join((HEADING, SUMMARY, *SUITES))}")
    found = [sheet for sheet in sheets(report) if sheet.title == name]
    columns = [column.strip() for column in chosen.split(";")] if chosen else []
    return "".join(f"\n{_lines(_columns(sheet, columns))}\n\n" for sheet in found)


def _columns(sheet: Sheet, names: Sequence[str]) -> Sheet:
    """Return some columns of a table; all if none are named."""
    if not names:
        return sheet
    places = {name: sheet.columns.index(name) for name in names if name in sheet.columns}
    if sheet.columns[0] not in places:
        raise KeyError(f"{sheet.title!r} has the columns {'; '.join(sheet.columns)}, of which the first must be named")
    return Sheet(sheet.title, tuple(places), tuple(tuple(row[at] for at in places.values()) for row in sheet.rows))


def _lines(sheet: Sheet) -> str:
    return "\n".join([_line(sheet.columns), _line(["---"] * len(sheet.columns)), *map(_line, sheet.rows)])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in cells)} |"
