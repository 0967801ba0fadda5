"""Replacing a plan that ran out of memory by a slower one that takes less."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from autojac.core.options import format_bytes
from autojac.core.plan import Plan, expression
from autojac.core.ranks import silent
from autojac.errors import PerformanceWarning, warn
from autojac.methods.base import Method, build, build_if_known
from autojac.methods.batch_chunk import BatchChunk
from autojac.methods.pull import Pull
from autojac.planning.call import Call
from autojac.planning.plans_in_use import PlansInUse
from autojac.planning.prepared_plan import PreparedPlan
from autojac.planning.search.memory import is_out_of_memory
from autojac.problem.empty_events import without_empty_parts
from autojac.problem.problem import Problem


def demote(plans: PlansInUse, plan: PreparedPlan, call: Call) -> PreparedPlan | None:
    """Return a plan that has room for a call, instead of one that ran out of memory; None if there is none.

    It serves this process: where a plan is stored, another call may have more room.

    Args:
        plans: of the function.
        plan: the one that ran out of memory.
        call: the call.
    """
    problem, planner = without_empty_parts(plan.problem), plans.planner
    trials = planner.known.trials(plan.keys, plan.plan)
    for method in smaller(problem, dataclasses.replace(plan.plan, trials=trials)):
        if method.unsupported(problem) is not None:
            continue
        if call.leaves[problem.inputs[0]].device.type != "cpu":
            torch.accelerator.empty_cache()
        stored = dataclasses.replace(plan.plan, method=method.spec(), seconds=None, memory_bytes=None, source="demoted")
        try:
            with silent(call.captured.modules):
                smaller_plan = planner.make(call.detach(), plan, plan.problem, stored, method)
                smaller_plan.run(call.leaves, call.keywords)
        except Exception as error:
            if not is_out_of_memory(error):
                return None
            continue
        smaller_plan.keys = None  # it is not in the store, to be refuted or replaced
        plans.keep(call, smaller_plan)
        peak = plan.plan.memory_bytes
        took = "" if peak is None else f", which took {format_bytes(peak)} when tuned"
        warn(
            f"{planner.repository.function_name}: memory ran out in the plan {plan.plan}{took}. In use from now on: "
            f"{expression(stored.method)}, which takes less memory and more time. Pass memory_limit=, so that the "
            "search leaves room for what else is on the device",
            PerformanceWarning,
        )
        return smaller_plan
    return None


def smaller(problem: Problem, plan: Plan) -> Iterator[Method]:
    """Yield methods that take less memory than a plan: the fastest first of those measured, then smaller chunks."""
    peak = plan.memory_bytes or 0
    comparable = (trial for trial in plan.trials if trial.seconds is not None and trial.memory_bytes is not None)
    fitting = [trial for trial in comparable if (trial.memory_bytes or 0) < peak]
    for trial in sorted(fitting, key=lambda trial: trial.seconds or 0.0):
        if (method := build_if_known(trial.method)) is not None:
            yield method
    method = build(plan.method)
    size, inner = (method.size, method.inner) if isinstance(method, BatchChunk) else (problem.batch, method)
    while size > 1:
        size = (size + 1) // 2
        yield BatchChunk(size, inner)
    yield Pull.suiting(problem, "loop")
