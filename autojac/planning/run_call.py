"""Serve a call: look its plan up, notice what has changed, run the plan, and check it when that is due."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff.open_modes import transforming
from autojac.core.autocast import outside_autocast
from autojac.core.call import outside_inference_mode
from autojac.core.keywords import Keywords
from autojac.core.signature import current_flags
from autojac.core.structure import SETS_ARGUMENTS
from autojac.errors import UnsupportedError
from autojac.graph.capture import open_capture
from autojac.graph.recorder import Recorder
from autojac.guards.captures import captures
from autojac.methods.pull import Pull
from autojac.planning.call import Call, describe_keywords
from autojac.planning.check import Check
from autojac.planning.demotion import demote
from autojac.planning.fast_path import fast_path
from autojac.planning.plans_in_use import PlansInUse
from autojac.planning.prepare_compute import prepare_compute
from autojac.planning.prepared_plan import UNCHANGED, PreparedPlan
from autojac.planning.search import measure
from autojac.planning.search.memory import is_out_of_memory
from autojac.problem.problem import Result

HOST = torch.device("cpu")


def run_call(plans: PlansInUse, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[PreparedPlan, Result]:
    """Compute a call of a function by its plan, made now if there is none.

    Args:
        plans: of the function.
        args, kwargs: as the function gets them.
    """
    with plans.alone:
        if torch.is_inference_mode_enabled():
            with outside_inference_mode(args, kwargs) as call:
                return _run(plans, *call)
        return _run(plans, args, kwargs)


def _run(plans: PlansInUse, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[PreparedPlan, Result]:
    if transforming():
        return _run_inside_transform(plans, args, kwargs)
    served = None
    while served is None:
        state = plans.observe()
        plan, call = plans.look_up(args, kwargs)
        plan.schedule.calls += 1
        if call.settable is None:
            served = _serve_in_memory(plans, plan, call, state)
            continue
        with leaving_in_arguments(plan, call):
            served = _serve_in_memory(plans, plan, call, state)
    return served


@contextmanager
def leaving_in_arguments(plan: PreparedPlan, call: Call) -> Iterator[None]:
    """Leave in the arguments what one plain call leaves there: func is called once more where it sets something.

    Args:
        plan: serves the call.
        call: described before it is served, with the arguments as the plain call would find them.
    """
    settable = call.settable
    if settable is None:
        yield
        return
    sandbox = plan.sandbox.now()
    restore = sandbox.save()
    yield
    if settable.are_changed or SETS_ARGUMENTS in plan.problem.structure.effects:
        # the other side effects of the plain call were left already
        with sandbox(), outside_autocast(), settable.keeping():
            restore()
            call.layout.fn(call.leaves, call.keywords)


def _serve_in_memory(
    plans: PlansInUse, plan: PreparedPlan, call: Call, state: int | None
) -> tuple[PreparedPlan, Result] | None:
    """Serve a call, by a plan that takes less memory where it runs out; None if there is a better plan now."""
    try:
        return _serve(plans, plan, call, state)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or plan.problem.structure.effects:
            raise
        error.__traceback__ = None  # its frames hold what filled the memory
        smaller = demote(plans, plan, call)
        if smaller is None:
            raise
    smaller.schedule.calls = 1
    return Check(plans, smaller, call).run()


def _serve(plans: PlansInUse, plan: PreparedPlan, call: Call, state: int | None) -> tuple[PreparedPlan, Result] | None:
    """Compute a call by its plan, checked where that is due; None if there is a better plan now."""
    schedule = plan.schedule
    if (capture := open_capture()) is not None:
        # a check reads values, which would end the recording; recordings are compared with calls that are checked
        run = plan.run_plainly if isinstance(capture, Recorder) else plan.run
        return plan, run(call.leaves, call.keywords)
    difference = UNCHANGED if schedule.is_off else plan.diff(call, state)
    if difference.what or schedule.is_due(call.keywords):
        search = None if schedule.last_check else plan.exploration
        with nullcontext() if search is None else search.charging_first_call():
            plan, result = Check(plans, plan, call, difference).run()
        plan.checked_states.add(-1 if state is None else state)
        plans.absorb(plan)
        return plan, result
    if plan.exploration is not None and schedule.calls >= schedule.next_step and plans.explore(plan, call):
        # look up the faster plan, which is checked at its first use
        return None
    served: Result | None = None
    try:
        served = _run_timed(plan, call) if plan.exploration is not None else _run_unchecked(plan, call)
    except RuntimeError as error:  # other shapes, another branch, or the plan fails: check the call
        is_stop = type(error).__module__ == "torch.utils.checkpoint"
        if schedule.is_off or is_stop or is_out_of_memory(error):
            raise
    if served is None or not plan.fits(served):
        plan, served = Check(plans, plan, call).run()
    elif not call.keywords:
        if plan.fast_path is None:
            plan.fast_path = fast_path(plan, call.args)
        plans.fast_path = plan.fast_path
    plans.absorb(plan)
    return plan, served


def _run_unchecked(plan: PreparedPlan, call: Call) -> Result:
    """Run a plan, or raise `AstrayError` before func runs, where the call is to be checked after all."""
    return plan.run(call.leaves, call.keywords, not plan.schedule.is_off)


def _run_timed(plan: PreparedPlan, call: Call) -> Result:
    """Run a plan, and credit the search that goes on behind it with the time."""
    exploration, schedule = plan.exploration, plan.schedule
    assert exploration is not None
    start = measure.clock.start(HOST)  # without waiting for a device: the caller may not need the result yet
    result = _run_unchecked(plan, call)
    exploration.credit(schedule.calls, measure.clock.since(start))
    schedule.next_step = exploration.next_call()
    return result


def find_plan(plans: PlansInUse, args: Sequence[Any], kwargs: Mapping[str, Any]) -> PreparedPlan:
    """Return the plan for a call without running it, after a step of its search if one is due."""
    with plans.alone:
        while True:
            plans.observe()
            plan, call = plans.look_up(args, kwargs)
            is_due = plan.exploration is not None and plan.schedule.calls + 1 >= plan.schedule.next_step
            if not is_due or not plans.explore(plan, call):
                return plan


@contextmanager
def crediting(plan: PreparedPlan) -> Iterator[None]:
    """Credit the search behind a plan with the time of what runs inside, whether or not that calls the plan."""
    exploration, schedule = plan.exploration, plan.schedule
    if exploration is None:  # another thread has just finished it
        yield
        return
    calls, earned, spent = schedule.calls, exploration.earned, exploration.spent
    start = measure.clock.start(HOST)
    yield
    seconds = max(measure.clock.since(start) - (exploration.spent - spent), 0.0)
    if schedule.calls > calls:
        exploration.credit_around(earned, schedule.calls, seconds)
    else:
        schedule.calls += 1
        exploration.credit(schedule.calls, seconds)
    schedule.next_step = exploration.next_call()


def _run_inside_transform(
    plans: PlansInUse, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[PreparedPlan, Result]:
    """Compute inside a caller's transform by torch.func's own VJP, since not every plan composes with every transform.

    Nothing can be probed, timed or checked there, where tensors are batched or carry tangents.
    """
    if plans.options.layout == "sparse":
        raise UnsupportedError(
            "a torch.func transform or forward mode is active, in which torch makes no sparse "
            "matrices. Wrap the function with layout='blocks' or 'full' for use there"
        )
    captured = captures(plans.func)
    layout = plans.planner.builder.layout(captured, args)
    leaves = layout.leaves(args)
    # a structure holds for one kind of call: other flags or keywords may couple samples
    keywords_key, flags = describe_keywords(kwargs), current_flags(captured.modules)
    for key, plan in plans.items():
        problem = plan.problem
        shapes = [leaf.event_shape for leaf in problem.leaves]
        same = key.keywords == keywords_key and key.flags == flags and plan.layout.context == layout.context
        if same and len(leaves) == len(shapes) and not plan.is_provisional:
            events = [tuple(x.shape[leaf.batched :]) for x, leaf in zip(leaves, problem.leaves, strict=True)]
            if events == shapes:
                batch = next(len(x) for x, leaf in zip(leaves, problem.leaves, strict=True) if leaf.batched)
                resized = dataclasses.replace(problem.resize(batch), differentiable=True)
                compute = prepare_compute(plan.layout, resized, Pull.suiting(resized, "vmap"))
                keywords = plan.layout.keywords(args, kwargs)
                with outside_autocast():
                    result = compute(leaves, keywords)
                    _leave_inside_transform(plan, leaves, keywords)
                    return plan, result
    raise UnsupportedError(
        "a torch.func transform or forward mode is active, in which nothing can be probed. Call "
        "jac(x) or jac.tune(x) once outside of it, with tensors of these shapes, and then again inside"
    )


def _leave_inside_transform(plan: PreparedPlan, leaves: Sequence[Tensor], keywords: Mapping[str, Any]) -> None:
    settable = keywords.settable if isinstance(keywords, Keywords) else None
    if settable is not None and (settable.are_changed or SETS_ARGUMENTS in plan.problem.structure.effects):
        with settable.keeping():
            plan.layout.fn(leaves, keywords)
