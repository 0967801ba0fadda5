"""Go on with the search behind a plan in use, and put a faster plan in its place when one is found."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

from torch import Tensor

from autojac.autodiff.open_modes import transforming
from autojac.core.ranks import several
from autojac.graph.analysis import GraphAnalysis
from autojac.methods.base import Method
from autojac.planning.call import Call, not_overwritten
from autojac.planning.exploration import Exploration
from autojac.planning.isolation import isolate_planning
from autojac.planning.planner import Planner
from autojac.planning.prepared_plan import PreparedPlan
from autojac.planning.search import measure
from autojac.planning.search.optimize import result_of
from autojac.planning.search.point import SearchPoint
from autojac.problem.empty_events import without_empty_parts
from autojac.problem.problem import Problem

logger = logging.getLogger("autojac")


def explore(planner: Planner, prepared: PreparedPlan, call: Call, buffers: Sequence[Tensor]) -> PreparedPlan | None:
    """Take the next step of the search behind a plan in use; return a plan to use in its place, if one was found.

    Args:
        planner: of the function.
        prepared: the plan.
        call: the call before which there is time for it.
        buffers: the tensors that func may write into now.
    """
    exploration = prepared.exploration
    assert exploration is not None
    trained, call = call.trained, call.detach()
    with isolate_planning(call, trained) as inside:
        if inside or several() or transforming():
            return None
        sandbox = prepared.sandbox.now(None, buffers)
        point = SearchPoint(call.leaves, call.keywords, not_overwritten(trained, sandbox.written), sandbox)

        def problem() -> Problem:
            analysis = GraphAnalysis(
                (prepared.problem.fn, call.leaves, call.keywords),
                call.layout.differentiated,
                prepared.plan.batched,
                prepared.signature.batch,
                sandbox,
                call.captured,
            )
            machine = prepared.problem.machine
            if prepared.keys is not None:
                machine = planner.repository.machine(prepared.keys[1], str(call.leaves[0].device))
            return without_empty_parts(dataclasses.replace(prepared.problem, analysis=analysis, machine=machine))

        start, before = measure.clock.working_s(), exploration.spent
        better = exploration.take_step(problem, point)
        replacement = _after_step(planner, prepared, call, exploration, better)
        # storing and preparing the plan are paid for as well
        exploration.spent = before + max(measure.clock.working_s() - start, 0.0)
        if exploration.is_over:
            (replacement or prepared).exploration = None
            prepared.schedule.next_step = math.inf
        return replacement


def _after_step(
    planner: Planner, prepared: PreparedPlan, call: Call, exploration: Exploration, better: Method | None
) -> PreparedPlan | None:
    """Store what a step of a search has shown, and return the plan that replaces the one in use."""
    race, plan = exploration.race, prepared.plan
    if race is None:
        return None
    trial = race.session.trials.get(exploration.method)
    if trial is None or trial.state != "complete":
        return None
    finished = exploration.is_over and race.next_step() is None
    result = result_of(race, finished)
    plan = dataclasses.replace(
        plan,
        method=exploration.method.spec(),
        effort=exploration.effort,
        seconds=trial.seconds,
        default_seconds=result.default_seconds,
        memory_bytes=trial.memory_bytes,
        tuning_seconds=plan.tuning_seconds if better is None else exploration.spent,
        source="search",
        trials=result.trials,
        finished=finished,
        jitter=result.jitter,
    )
    if prepared.keys is not None:
        planner.repository.save(prepared.keys, plan)
    planner.known.remember(prepared.signature, plan)
    if better is None:
        prepared.plan = plan
        return None
    logger.info(
        "%s: %s, found after %d calls by %.2g s of search, takes %.3g s where %s took more",
        planner.repository.function_name, plan, prepared.schedule.calls, exploration.spent, trial.seconds or 0.0,
        prepared.plan,
    )  # fmt: skip
    replacement = planner.make(call, prepared, prepared.problem, plan, better)
    replacement.exploration, replacement.is_fresh = exploration, True
    return replacement
