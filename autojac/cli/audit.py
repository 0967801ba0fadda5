"""`autojac audit`: how good the stored plans are on this machine, by racing them again."""

from __future__ import annotations

import json
from typing import Any

import click

import autojac
from autojac.cli.calls import Calls, call_options, grad_mode, json_option, require_store, search_options, using_threads
from autojac.core.plan import expression
from autojac.planning.audit import Audit, RaceResult, audit_call, rank_accuracy
from autojac.planning.explain import format_seconds
from autojac.planning.plans_in_use import PlansInUse


@click.command()
@call_options
@search_options
@json_option
def audit(
    target: str, shapes: Any, dtypes: Any, device: str, threads: int | None, grad: bool | None, location: str | None,
    as_json: bool, budget_s: float | None, **options: Any,
) -> None:  # fmt: skip
    """Race the stored plans of TARGET again, and say how good they are.

    Each plan is raced with the fastest candidates of its search and with torch's default, in several fresh races; the
    regret is its time over that of the fastest. It is raced on the smallest batch that shares the plan too. --effort
    says how many races there are. How well the cost model ranks candidates is told from all trials in the store.
    Nothing is changed. TARGET, --shape and the options are those of `autojac tune`, which makes the plans.

    \b
    Examples:
      autojac audit model.py:make_model --shape 1024x3
      autojac audit torch:sin --shape 256x8 --no-grad --effort measure --json
    """
    with using_threads(threads):
        store = require_store(location)
        calls = Calls.of(target, shapes, dtypes, device)
        jac = autojac.AutoJacobian(calls.func, store=store, **options)
        plans = PlansInUse(jac.func, jac.options)
        listed = []
        for args in calls.all:
            with calls.blame(args), grad_mode(grad, args):
                found = audit_call(plans.planner, plans.describe(args, {}), jac.options.effort, budget_s)
            listed.append({**calls.to_json(args), **_to_json(found)})
            if not as_json:
                click.echo("\n".join([f"{target}: {calls.describe(args)}", *_lines(found)]))
        accuracy, searches = rank_accuracy([stored.plan.trials for stored in store.listing()])
    if as_json:
        model = {"rank_correlation": accuracy, "searches": searches}
        click.echo(json.dumps({"store": store.description, "plans": listed, "model": model}, indent=2))
    elif accuracy is None:
        click.echo("cost model: no search in the store has timed three candidates")
    else:
        click.echo(f"cost model: rank correlation {accuracy:.2f}, the median of {searches} searches in the store")


def _to_json(found: Audit) -> dict[str, Any]:
    shared = None if found.shared is None else found.shared.to_json()
    return {"plan": expression(found.plan.method), "own": found.own.to_json(), "shared": shared}


def _lines(found: Audit) -> list[str]:
    """Return what races have shown, human-readable."""
    lines = [f"  plan: {found.plan}", f"  {_sentence(found.own)}"]
    if found.shared is not None:
        lines.append(f"  shared with a batch of {found.shared.batch}: {_sentence(found.shared)}")
    lines += [f"    {format_seconds(seconds):>8}  {method}" for method, seconds in found.own.seconds.items()]
    return lines


def _sentence(result: RaceResult) -> str:
    if result.regret is None:
        return "the plan did not run, or is not right any more: tune again"
    won = f"another method won {result.flips:.0%} of {result.races} races"
    return f"regret {result.regret:.2f} over {result.fastest}; {won}"
