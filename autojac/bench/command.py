"""`autojac bench`."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from autojac.bench.fresh import load_everything
from autojac.bench.page import write_page
from autojac.bench.results import BenchResult, Report, json_line
from autojac.bench.run import Settings, environment
from autojac.bench.suites import SUITES, run_suites
from autojac.bench.table import markdown, print_report, with_tables
from autojac.core.plan import EFFORTS

QUICK_S, BUDGET_S = 2.0, 12.0
"""Seconds of each search."""


@click.command()
@click.option(
    "--suite",
    "names",
    multiple=True,
    type=click.Choice(list(SUITES)),
    help="Only this part; may be repeated.  [default: all but peers and interop]",
)
@click.option("--only", multiple=True, help="Only this workload, case or library; may be repeated.")
@click.option("--interop", is_flag=True, help="The suite of other libraries' models that are installed.")
@click.option("--training", is_flag=True, help="The suite of training steps; with --interop those of other libraries.")
@click.option("--effort", type=click.Choice(EFFORTS), default=None, help="How hard to search.  [default: measure]")
@click.option("--budget", type=click.FloatRange(min=0), default=None, help="Seconds for each search.  [default: 12]")
@click.option("--rounds", type=click.IntRange(min=3), default=None, help="Rounds of each race.  [default: 15]")
@click.option("--quick", is_flag=True, help="Effort quick, short searches and races.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--store", default=None, help="Path or URL of the plans to use; by default every run tunes afresh.")
@click.option(
    "--peers",
    envvar="AUTOJAC_BENCH_PEERS",
    default=None,
    type=click.Path(file_okay=False),
    help="Folder of the environments of --suite peers.  [default: .venv-peers]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each result as soon as it is measured.")
@click.option(
    "--from",
    "sources",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure nothing: read what --json has printed; may be repeated.",
)
@click.option("--tables", is_flag=True, help="Print the tables in Markdown.")
@click.option(
    "--into",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Put the tables into this Markdown page, between its marks; may be repeated.",
)
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page of plots; needs autojac[report]."
)
def bench(
    names: tuple[str, ...],
    only: tuple[str, ...],
    interop: bool,
    training: bool,
    effort: str | None,
    budget: float | None,
    rounds: int | None,
    quick: bool,
    device: str,
    store: str | None,
    peers: str | None,
    as_json: bool,
    sources: tuple[Path, ...],
    tables: bool,
    into: tuple[Path, ...],
    html: Path | None,
) -> None:
    """Race autojac against torch's own ways, interleaved in one run.

    Every way's result is checked before it is timed. Ratios are autojac's time over the other's, both of one run. At
    last stands what was asked and what was measured. A run that is stopped keeps what it has measured.

    \b
    Examples:
      autojac bench --quick --suite jacobians --only sin
      autojac bench --json > bench.jsonl
      autojac bench --from bench.jsonl --tables
      autojac bench --from bench.jsonl --html bench.html --into docs/measured.md
      autojac bench --interop --only kornia --only timm/vit
    """
    if sources:
        report = _read_report(sources)
    else:
        _require(device)
        settings = Settings(
            effort=next(e for e in EFFORTS if e == (effort or ("quick" if quick else "measure"))),
            rounds=rounds or (5 if quick else 15),
            budget_s=budget if budget is not None else (QUICK_S if quick else BUDGET_S),
            device=device,
            store=store,
            race_s=1.5 if quick else 5.0,
            quick=quick,
            training=training,
            peers=peers,
        )
        report = _measure(_suites(names, interop, training), only, settings, as_json)
    for page in into:
        _refresh(page, report)
    if html is not None:
        click.echo(f"plots: {write_page(report, html)}", err=True)
    if tables:
        click.echo(markdown(report))
    elif as_json and sources:
        click.echo("\n".join(report.lines()))
    elif not (as_json or into or html):
        print_report(report)


def _suites(names: tuple[str, ...], interop: bool, training: bool) -> list[str]:
    """Return the suites asked for, or those of the whole benchmark."""
    asked = [*names]
    if interop:
        asked.append("interop")
    elif training:
        asked.append("training")
    return asked or [suite.name for suite in SUITES.values() if suite.by_default]


def _measure(names: list[str], only: tuple[str, ...], settings: Settings, as_json: bool) -> Report:
    report = Report(environment(settings.device), settings.describe())
    found: list[BenchResult] = []
    # what a process pays once would starve the first search, and no other
    load_everything()
    if as_json:
        click.echo(report.head())
    try:
        for result in run_suites(names, only, settings, _announce):
            found.append(result)
            if as_json:
                click.echo(json_line(result))
    except KeyboardInterrupt:
        _announce(f"stopped; what {len(found)} cases gave is kept")
    if not found:
        asked = ", ".join(map(repr, only)) or "any case"
        raise click.ClickException(f"nothing was measured: no case of {', '.join(names)} is {asked}")
    return Report(report.environment, report.settings, tuple(found))


def _refresh(page: Path, report: Report) -> None:
    text = page.read_text(encoding="utf-8")
    try:
        page.write_text(with_tables(text, report), encoding="utf-8")
    except KeyError as error:
        raise click.BadParameter(f"{page.name}: {error.args[0]}", param_hint="--into") from error


def _read_report(sources: tuple[Path, ...]) -> Report:
    lines = [line for source in sources for line in source.read_text(encoding="utf-8").splitlines()]
    try:
        return Report.from_lines(lines)
    except ValueError as error:
        raise click.BadParameter(
            f"{error}; pass what `autojac bench --json` has printed", param_hint="--from"
        ) from error


def _require(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        line = next(iter(str(error).splitlines()), "")
        raise click.BadParameter(f"{device!r} can't be used here: {line}", param_hint="--device") from error


def _announce(what: str) -> None:
    click.echo(f"autojac bench: {what} ...", err=True)
