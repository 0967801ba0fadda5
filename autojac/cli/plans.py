"""`autojac plans`: what the store holds."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from autojac.cli.calls import json_option, store_option
from autojac.cli.shell import Group
from autojac.core.options import format_bytes
from autojac.core.plan import expression
from autojac.planning.explain import format_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from autojac.store import PlanStore, StoredPlan

WIDTH = 160
"""Columns for readers that are no terminal."""


@click.group(cls=Group)
def plans() -> None:
    """List, show and remove the plans in the store.

    \b
    Example:
      autojac plans list
    """


@plans.command("list")
@store_option
@json_option
def list_plans(location: str | None, as_json: bool) -> None:
    """List the plans, latest first.

    \b
    Examples:
      autojac plans list
      autojac plans list --store cache/autojac.db --json
    """
    store = _open(location)
    rows = store.listing()
    if as_json:
        click.echo(json.dumps([_brief(row) for row in rows], indent=2))
    elif rows:
        show(_table(rows))
    else:
        click.echo(f"there are no plans in {store.description}")


@plans.command("show")
@click.argument("number", metavar="ID", type=int)
@store_option
@json_option
def show_plan(number: int, location: str | None, as_json: bool) -> None:
    """Show one plan and the search behind it.

    What it is for, what was probed, and the fate of every candidate.

    \b
    Example:
      autojac plans show 1
    """
    row = _open(location).get(number)
    if as_json:
        click.echo(json.dumps(_whole(row), indent=2))
        return
    plan = row.plan
    click.echo(f"plan {row.id} for {row.function_name}: {_arguments(row)} -> {_result(row)}")
    click.echo(f"{plan}: {_times(row)}")
    click.echo(
        f"  effort {plan.effort}, made in {format_seconds(plan.tuning_seconds)} on {row.updated_at:%Y-%m-%d %H:%M} UTC"
    )
    click.echo(f"  on {_machine(row)}")
    if row.refuted_reason:
        click.echo(f"  refuted, not used any more: {row.refuted_reason}")
    click.echo(f"structure: {plan.structure.coupling}, {plan.structure.assurance}")
    for name, pattern in (plan.structure.sparsity.parts() if plan.structure.sparsity else {}).items():
        rows, columns = pattern.shape
        click.echo(f"  {name}: {pattern.count} entries in {rows} x {columns} ({pattern.density:.2g} of all)")
    for line in plan.structure.evidence:
        click.echo(f"  {line}")
    if plan.trials:
        click.echo(f"candidates: {len(plan.trials)}")
        show(trials_table(plan.trials))


@plans.command("rm")
@click.argument("numbers", metavar="[ID]...", type=int, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Remove every plan.")
@store_option
def remove_plans(numbers: tuple[int, ...], everything: bool, location: str | None) -> None:
    """Remove plans.

    The next program that needs them searches again.

    \b
    Examples:
      autojac plans rm 1 2
      autojac plans rm --all
    """
    if bool(numbers) == everything:
        raise click.UsageError("the IDs of plans were expected, as `autojac plans list` shows them, or --all")
    store = _open(location)
    if everything:
        count = len(store.listing())
        if count:
            store.clear()
        click.echo(f"removed {count} plan{'s' * (count != 1)} from {store.description}")
        return
    for number in numbers:
        store.get(number)  # so that a wrong ID among several removes nothing
    for number in dict.fromkeys(numbers):
        store.remove(number)
        click.echo(f"removed plan {number}")


def trials_table(trials: Any) -> Table:
    """Return every candidate's fate, the fastest first."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("  candidate", overflow="fold")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for trial in sorted(trials, key=lambda trial: (trial.state != "complete", trial.seconds or 0.0)):
        verdict = "" if trial.state == "complete" else f"{trial.state}: {trial.reason}"
        cells = (
            f"  {expression(trial.method)}",
            format_seconds(trial.seconds),
            format_bytes(trial.memory_bytes),
            verdict,
        )
        table.add_row(*map(Text, cells))
    return table


def show(table: Table) -> None:
    """Print a table as wide as the terminal, or wide enough where there is none."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    with console.capture() as capture:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _open(location: str | None) -> PlanStore:
    from autojac.store import PlanStore

    return PlanStore(location)


def _table(rows: list[StoredPlan]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("ID", "function", "arguments", "Jacobian", "plan", "measured", "effort", "made"):
        table.add_column(name, overflow="fold", no_wrap=name in ("ID", "effort"))
    for row in rows:
        state = "refuted" if row.refuted_reason else row.plan.effort
        cells = (str(row.id), row.function_name, _arguments(row), _result(row), str(row.plan), _times(row), state,
                 f"{row.updated_at:%Y-%m-%d}")  # fmt: skip
        table.add_row(*map(Text, cells))
    return table


def _times(row: StoredPlan) -> str:
    plan = row.plan
    if not plan.seconds:
        return "not timed"
    ratio = f" (default {plan.default_seconds / plan.seconds:.3g}x)" if plan.default_seconds else ""
    return f"{format_seconds(plan.seconds)}{ratio}"


def _arguments(row: StoredPlan) -> str:
    leaves = row.op.fields.get("signature", {}).get("leaves", [])
    return ", ".join(f"{'x'.join(map(str, leaf['shape']))} {leaf['dtype']} on {leaf['device']}" for leaf in leaves)


def _result(row: StoredPlan) -> str:
    signature = row.op.fields.get("signature", {})
    return f"{signature.get('layout', '?')}{', differentiable' if signature.get('differentiable') else ''}"


def _machine(row: StoredPlan) -> str:
    env = row.env.fields
    accelerator = (env.get("accelerator") or {}).get("name")
    return f"{accelerator or env.get('cpu', '?')}, {env.get('cores', '?')} cores, torch {env.get('torch', '?')}"


def _brief(row: StoredPlan) -> dict[str, Any]:
    return {
        "id": row.id,
        "function": row.function_name,
        "signature": row.op.fields.get("signature"),
        "expression": str(row.plan),
        **row.plan.to_json(),
        "environment": row.env.fields,
        "created_at": row.created_at.isoformat(),
        "updated_at": row.updated_at.isoformat(),
        "refuted_reason": row.refuted_reason,
    }


def _whole(row: StoredPlan) -> dict[str, Any]:
    return {**_brief(row), "options": row.op.fields.get("options"),
            "trials": [trial.to_json() for trial in row.plan.trials]}  # fmt: skip
