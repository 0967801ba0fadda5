"""A plan and the search behind it, as human-readable text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autojac.core.options import format_bytes
from autojac.core.plan import Plan, Trial, expression
from autojac.core.signature import Signature
from autojac.planning.plan_repository import PlanRepository
from autojac.planning.prepared_plan import PreparedPlan
from autojac.problem.compression import describe_colors
from autojac.problem.problem import Problem

FEW = 3
"""How many of the candidates that were not tried are named."""
LARGE_JITTER = 0.2


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
    result = "derivatives by columns" if prepared.problem.of else f"{signature.layout} Jacobian"
    lines = [f"{repository.function_name}: {_arguments(signature)} -> {result} of B = {signature.batch}"]
    if signature.differentiable:
        lines[0] += ", differentiable"
    lines.append(f"plan: {plan}")
    lines.append(f"  from {plan.source}, effort {plan.effort}, made in {format_seconds(plan.tuning_seconds)}")
    lines += _gain_lines(plan)
    structure = plan.structure
    lines.append(f"structure: {structure.coupling}, {structure.assurance}")
    lines += [f"  {line}" for line in (*structure.evidence, *_graph_lines(prepared.problem))]
    return "\n".join([*lines, *_search_lines(prepared, trials)])


def _gain_lines(plan: Plan) -> list[str]:
    """Say how long a call takes, and what that gains over torch's default."""
    lines = []
    if plan.seconds is not None:
        lines.append(f"  {format_seconds(plan.seconds)} a call, {format_bytes(plan.memory_bytes)} at its peak")
    if plan.seconds and plan.default_seconds:
        ratio = plan.default_seconds / plan.seconds
        lines.append(f"  torch's default takes {format_seconds(plan.default_seconds)}: {ratio:.3g} times as long")
        gain = plan.default_seconds - plan.seconds
        if gain > 0:
            lines.append(f"  tuning has paid for itself after {int(plan.tuning_seconds / gain) + 1} calls")
    if plan.jitter is not None and plan.jitter > LARGE_JITTER:
        lines.append(
            f"  timings varied by {plan.jitter:.0%} in the last comparison: smaller differences say nothing. Tune "
            "again on an idle machine"
        )
    return lines


def _search_lines(prepared: PreparedPlan, trials: Sequence[Trial]) -> list[str]:
    """Say what became of the candidates: the plan's own first, then by time; those without a trial in one line."""
    if not trials:
        return []
    plan = prepared.plan
    tried = [trial for trial in trials if not trial.is_untried]
    with_time = [trial for trial in trials if trial.seconds is not None]
    heading = f"candidates: {len(with_time)} of {len(trials)} timed"
    if (agreement := rank_correlation(with_time)) is not None:
        heading += f"; rank correlation of predicted and measured times {agreement:.2f}"
    lines = [heading, *(_row(trial) for trial in sorted(tried, key=lambda trial: _rank(trial, plan)))]
    untried = [expression(trial.method) for trial in trials if trial.is_untried]
    if untried:
        more = f", and {len(untried) - FEW} more" if len(untried) > FEW else ""
        lines.append(f"  not tried: {'; '.join(untried[:FEW])}{more}")
    if prepared.exploration is not None:
        lines.append(f"  {prepared.exploration.line()}")
    elif not plan.finished:
        lines.append("  the search was not finished: jac.tune(x), a larger budget_s or later calls go on with it")
    return lines


def rank_correlation(trials: Sequence[Trial]) -> float | None:
    """Return how well the cost model ranks candidates: Spearman's coefficient of predicted and measured times.

    None where fewer than three candidates were timed. Spearman, "The proof and measurement of association between two
    things", 1904.
    """
    pairs = [(t.predicted, t.seconds) for t in trials if t.predicted is not None and t.seconds is not None]
    if len(pairs) < 3:
        return None
    one, other = (np.argsort(np.argsort(np.array(column), kind="stable")) for column in zip(*pairs, strict=True))
    return float(np.corrcoef(one, other)[0, 1])


def _graph_lines(problem: Problem) -> list[str]:
    """Say what the graph of a call shows, and how it was colored and traced."""
    lines = problem.analysis.lines(problem.out_size) if problem.analysis is not None else []
    lines += describe_colors(problem)
    return lines + (problem.function_state.lines() if problem.function_state is not None else [])


def _rank(trial: Trial, plan: Plan) -> tuple[bool, bool, float]:
    return trial.method != plan.method, trial.seconds is None, trial.seconds or 0.0


def _row(trial: Trial) -> str:
    predicted = "" if trial.predicted is None else f" (predicted {format_seconds(trial.predicted)})"
    facts = f"{format_seconds(trial.seconds):>8} {format_bytes(trial.memory_bytes):>9}  {expression(trial.method)}"
    fate = None if trial.state == "complete" else trial.state
    return f"  {facts}{predicted}{': ' if fate or trial.reason else ''}{', '.join(filter(None, (fate, trial.reason)))}"


def _arguments(signature: Signature) -> str:
    shapes = [f"{tuple(leaf.shape)} {leaf.dtype}" for leaf in signature.leaves]
    return ", ".join(shapes) + f" on {signature.leaves[0].device}"
