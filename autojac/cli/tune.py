"""`autojac tune`, `probe` and `explain`: what `AutoJacobian` does at a first call, from a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

import autojac
from autojac.cli.calls import (
    Calls,
    batch_option,
    call_options,
    grad_mode,
    json_option,
    method_option,
    require_store,
    search_options,
    using_threads,
)
from autojac.core.plan import Plan
from autojac.planning.explain import format_seconds

if TYPE_CHECKING:
    from autojac.store import PlanStore


@click.command()
@call_options
@search_options
@method_option
@batch_option
@json_option
def tune(
    target: str, shapes: Any, dtypes: Any, device: str, threads: int | None, grad: bool | None, location: str | None,
    of: Any, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Find and keep the fastest right Jacobian of TARGET.

    TARGET is `package.module:attribute` or `path/file.py:attribute`: a function of tensors with the batch on axis 0, a
    module, or a factory of either, which can be called without arguments. A program that wraps the same function with
    the same options finds the plan for any batch of the same power of two, and searches no more. The number of threads
    and a module's train or eval mode are part of what a plan is made for.

    \b
    Examples:
      autojac tune model.py:make_model --shape 1024x3 --effort measure
      autojac tune torch:sin --shape 256x8 --shape 4096x8 --no-grad
      autojac tune package.physics:residual --shape 512x2,512x1 --argnums 0,1 --budget 30s --json
      autojac tune model.py:make_model --shape 1024x3 --of jvp
    """
    with using_threads(threads):
        store = require_store(location)
        calls = Calls.of(target, shapes, dtypes, device)
        jac = autojac.AutoJacobian(calls.func, store=store, **options)
        found = []
        for args in calls.all:
            with calls.blame(args), grad_mode(grad, args):
                given = calls.of_method(of, args, options["argnums"])
                plan = jac.tune(*given, of=of)
                found.append((plan, serving(calls.func, given, of, store, options)))
            if not as_json:
                click.echo(_summary(f"{target}: {calls.describe(args)}", *found[-1], store))
    if as_json:
        listed = [
            {**calls.to_json(args), **plan_json(plan), "kept": is_kept(plan, kept)}
            for args, (plan, kept) in zip(calls.all, found, strict=True)
        ]
        click.echo(json.dumps({"store": store.description, "plans": listed}, indent=2))


@click.command()
@call_options
@batch_option
@json_option
def probe(
    target: str, shapes: Any, dtypes: Any, device: str, threads: int | None, as_json: bool, **options: Any
) -> None:
    """Say what couples with what across the batch of TARGET.

    Nothing is timed and nothing is kept. TARGET and --shape are those of `autojac tune`.

    \b
    Examples:
      autojac probe model.py:make_model --shape 1024x3
      autojac probe package.physics:residual --shape 512x2,512x1 --json
    """
    with using_threads(threads):
        calls = Calls.of(target, shapes, dtypes, device)
        listed = []
        for args in calls.all:
            with calls.blame(args):
                structure = autojac.probe(calls.func, *args, **options)
            listed.append({**calls.to_json(args), **structure.to_json()})
            if not as_json:
                lines = [f"{target}: {calls.describe(args)}", f"structure: {structure.coupling}, {structure.assurance}"]
                lines += [f"  {line}" for line in (*structure.evidence, *structure.effects)]
                lines += ["  suspect: the layers disagree, so every Jacobian is checked"] * structure.needs_every_check
                click.echo("\n".join(lines))
    if as_json:
        click.echo(json.dumps(listed, indent=2))


@click.command()
@call_options
@search_options
@method_option
@batch_option
def explain(
    target: str, shapes: Any, dtypes: Any, device: str, threads: int | None, grad: bool | None, location: str | None,
    **options: Any,
) -> None:  # fmt: skip
    """Explain the plan for TARGET and the search behind it.

    What was probed, every candidate's time or why it was rejected, and what the plan pays.

    The plan comes from the store; where there is none, one is made and kept, as by `autojac tune`.

    \b
    Example:
      autojac explain model.py:make_model --shape 1024x3
    """
    of = options.pop("of")
    with using_threads(threads):
        store = require_store(location)
        calls = Calls.of(target, shapes, dtypes, device)
        jac = autojac.AutoJacobian(calls.func, store=store, **options)
        for args in calls.all:
            with calls.blame(args), grad_mode(grad, args):
                given = calls.of_method(of, args, options["argnums"])
                if jac.plan(*given, of=of).source == "estimate":
                    jac.tune(*given, of=of)
                click.echo(jac.explain(*given, of=of))


def serving(func: Callable[..., Any], args: Sequence[Any], of: Any, store: PlanStore, options: dict[str, Any]) -> Plan:
    """Return the plan that another program finds, looked up as it would: one of higher effort is not replaced."""
    return autojac.AutoJacobian(func, store=store, **{**options, "on_miss": "error"}).plan(*args, of=of)


def is_kept(plan: Plan, served: Plan) -> bool:
    """Check whether the plan that is served is the one just found."""
    return (plan.method, plan.effort) == (served.method, served.effort)


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return a plan with its trials, for programs."""
    trials = [trial.to_json() for trial in plan.trials]
    return {**plan.to_json(), "expression": str(plan), "source": plan.source, "trials": trials}


def trial_count(plan: Plan) -> int:
    """Return how many candidates were run."""
    return sum(trial.state != "skipped" for trial in plan.trials)


def pace(plan: Plan) -> str:
    """Return how fast a plan was measured to be, in words."""
    if plan.seconds is None:
        return "not timed"
    measured = f"{format_seconds(plan.seconds)} a call"
    if plan.default_seconds is None:
        return f"{measured}; torch's default was not timed"
    ratio = plan.default_seconds / plan.seconds
    return f"{measured}, {ratio:.3g} times as fast as torch's default ({format_seconds(plan.default_seconds)})"


def _summary(call: str, plan: Plan, kept: Plan, store: PlanStore) -> str:
    where = f"kept in {store.description}"
    if not is_kept(plan, kept):
        where = f"not kept: {store.description} holds {kept} of effort {kept.effort}"
    count = f"{trial_count(plan)} candidate{'s' * (trial_count(plan) != 1)} tried" if plan.trials else "chosen"
    return f"{call}\n  {plan}: {pace(plan)}\n  {count} in {format_seconds(plan.tuning_seconds)}; {where}"
