"""A plan and the search behind it, as human-readable text."""

from __future__ import annotations

from autojac.core.options import format_bytes
from autojac.core.plan import Trial, expression
from autojac.core.signature import Signature
from autojac.planning.plan_repository import PlanRepository
from autojac.planning.prepared_plan import PreparedPlan
from autojac.problem.compression import colored
from autojac.problem.problem import Problem


def format_seconds(value: float | None) -> str:
    """Format a duration with a readable unit."""
    if value is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def explanation(prepared: PreparedPlan, repository: PlanRepository) -> str:
    """Say what was probed, what was tried, what won, and what it gains.

    Args:
        prepared: the plan.
        repository: the stored plans of its function.
    """
    signature, plan = prepared.signature, prepared.plan
    trials = plan.trials or (repository.trials(prepared.keys) if prepared.keys else ())
    made = "derivatives by columns" if prepared.problem.of else f"{signature.layout} Jacobian"
    lines = [f"{repository.function_name}: {_arguments(signature)} -> {made} of B = {signature.batch}"]
    if signature.differentiable:
        lines[0] += ", differentiable"
    lines.append(f"plan: {plan}")
    lines.append(f"  from {plan.source}, effort {plan.effort}, made in {format_seconds(plan.tuning_seconds)}")
    if plan.seconds is not None:
        lines.append(f"  {format_seconds(plan.seconds)} a call, {format_bytes(plan.memory_bytes)} at its peak")
    if plan.seconds and plan.default_seconds:
        ratio = plan.default_seconds / plan.seconds
        lines.append(f"  torch's default takes {format_seconds(plan.default_seconds)}: {ratio:.3g} times as long")
        saved = plan.default_seconds - plan.seconds
        if saved > 0:
            lines.append(f"  tuning has paid for itself after {int(plan.tuning_seconds / saved) + 1} calls")
    structure = plan.structure
    lines.append(f"structure: {structure.coupling}, {structure.assurance}")
    lines += [f"  {line}" for line in (*structure.evidence, *_graph_lines(prepared.problem))]
    if trials:
        lines.append(f"candidates: {len(trials)}")
        lines += [_row(trial) for trial in sorted(trials, key=_rank)]
    return "\n".join(lines)


def _graph_lines(problem: Problem) -> list[str]:
    """Say what the graph of a call shows, and what of it was colored and traced."""
    lines = problem.analysis.lines(problem.out_size, problem.in_size) if problem.analysis is not None else []
    lines += colored(problem)
    return lines + (problem.function_state.lines() if problem.function_state is not None else [])


def _rank(trial: Trial) -> tuple[bool, float]:
    return trial.state != "complete", trial.seconds or 0.0


def _row(trial: Trial) -> str:
    facts = f"{format_seconds(trial.seconds):>8} {format_bytes(trial.memory_bytes):>9}  {expression(trial.method)}"
    fate = None if trial.state == "complete" else trial.state
    return f"  {facts}{': ' if fate or trial.reason else ''}{', '.join(filter(None, (fate, trial.reason)))}"


def _arguments(signature: Signature) -> str:
    shapes = [f"{tuple(leaf.shape)} {leaf.dtype}" for leaf in signature.leaves]
    return ", ".join(shapes) + f" on {signature.leaves[0].device}"
