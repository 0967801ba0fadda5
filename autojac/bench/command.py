"""`autojac bench`."""

from __future__ import annotations

import dataclasses
import json

import click
import torch

from autojac.bench.contests import against_torch
from autojac.bench.extra import loaded
from autojac.bench.interop.case import cases
from autojac.bench.interop.race import interop, together
from autojac.bench.jitted import against_jax
from autojac.bench.overhead import overhead, startup
from autojac.bench.replayed import replayed
from autojac.bench.results import Report
from autojac.bench.run import Settings
from autojac.bench.run import bench as run_bench
from autojac.bench.table import print_report
from autojac.bench.workloads import ALL, WORKLOADS
from autojac.bench.zeros import RACES
from autojac.bench.zeros import zeros as put_to_use
from autojac.core.plan import EFFORTS


@click.command()
@click.option("--effort", type=click.Choice(EFFORTS), default=None, help="How hard to search.  [default: measure]")
@click.option(
    "--workload",
    "names",
    multiple=True,
    type=click.Choice(list(WORKLOADS)),
    help="Only this one; may be repeated.  [default: those of the README's table]",
)
@click.option(
    "--zeros",
    "spared",
    multiple=True,
    type=click.Choice(list(RACES)),
    help="Put the zeros of this one to use; may be repeated.",
)
@click.option(
    "--replay", "with_replay", is_flag=True, help="Race replays, uncompiled, against torch's default; what they cost."
)
@click.option("--jax", "with_jax", is_flag=True, help="Race against jitted JAX; needs autojac[bench].")
@click.option("--interop", "with_interop", is_flag=True, help="Race on models of other libraries that are installed.")
@click.option("--only", multiple=True, help="Of --interop only this library or case; may be repeated.")
@click.option("--training", is_flag=True, help="Of --interop race training steps: J, a loss, and its backward.")
@click.option("--rounds", type=click.IntRange(min=3), default=None, help="Rounds of each race.  [default: 15]")
@click.option("--budget", type=click.FloatRange(min=0), default=None, help="Seconds for each search.")
@click.option("--regret", is_flag=True, help="Race every fixed candidate too.")
@click.option("--overhead", "with_overhead", is_flag=True, help="What a call adds to its bare method.")
@click.option("--startup", "with_startup", is_flag=True, help="First Jacobian of a fresh process; import time.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--store", default=None, help="Path or URL of the plans to use; by default every run tunes afresh.")
@click.option("--quick", is_flag=True, help="Effort quick, 5 rounds, short races.")
@click.option("--json", "as_json", is_flag=True, help="Print everything measured as JSON.")
def bench(
    effort: str | None,
    names: tuple[str, ...],
    spared: tuple[str, ...],
    with_replay: bool,
    with_jax: bool,
    with_interop: bool,
    only: tuple[str, ...],
    training: bool,
    rounds: int | None,
    budget: float | None,
    regret: bool,
    with_overhead: bool,
    with_startup: bool,
    device: str,
    store: str | None,
    quick: bool,
    as_json: bool,
) -> None:
    """Race autojac against torch's own ways, interleaved in one run.

    Every way's Jacobian is checked before it is timed. Ratios refer to vmap(jacrev), which torch recommends. With
    --zeros, --replay, --jax or --interop no workload is raced beside theirs but those named.

    \b
    Examples:
      autojac bench --quick --workload sin
      autojac bench --zeros burgers --zeros brusselator
      autojac bench --replay --jax
      autojac bench --interop --only kornia --only timm/vit
      autojac bench --regret --overhead --startup --json > bench.json
    """
    _require(device)
    if with_jax:
        _require_jax(device)
    settings = Settings(
        effort=next(e for e in EFFORTS if e == (effort or ("quick" if quick else "measure"))),
        rounds=rounds or (5 if quick else 15),
        budget_s=budget,
        device=device,
        store=store,
        regret=regret,
        race_s=10.0 if quick else 60.0,
    )
    chosen = [WORKLOADS[name] for name in names] or ([] if spared or with_replay or with_jax or with_interop else ALL)
    report = run_bench(chosen, settings, _announce)
    report = dataclasses.replace(report, zeros=tuple(put_to_use(spared, settings, _announce)))
    if with_replay:
        races, costs = against_torch(settings, _announce), replayed(settings, _announce)
        report = dataclasses.replace(report, contests=tuple(races), costs=tuple(costs))
    if with_jax:
        report = dataclasses.replace(report, contests=(*report.contests, *against_jax(settings, _announce)))
    if with_interop:
        report = _with_interop(report, settings, only, training)
    if with_overhead:
        _announce("overhead of a call")
        report = dataclasses.replace(report, overhead_seconds=overhead(settings))
    if with_startup:
        _announce("fresh processes")
        report = dataclasses.replace(report, startup=startup())
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1))
    else:
        print_report(report)


def _with_interop(report: Report, settings: Settings, only: tuple[str, ...], training: bool) -> Report:
    races = interop(cases(only), settings, training, _announce)
    costs = (*report.costs, together(races, training))
    return dataclasses.replace(report, contests=(*report.contests, *races), costs=costs)


def _require(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        line = next(iter(str(error).splitlines()), "")
        raise click.BadParameter(f"{device!r} can't be used here: {line}", param_hint="--device") from error


def _require_jax(device: str) -> None:
    found = loaded("jax")
    if isinstance(found, str):
        raise click.ClickException(f"jax is {found}")
    if torch.device(device).type != "cpu":
        raise click.BadParameter("JAX is raced on the CPU", param_hint="--device")


def _announce(what: str) -> None:
    click.echo(f"autojac bench: {what} ...", err=True)
