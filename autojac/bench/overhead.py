"""What autojac costs besides the operators: at each call, at its guard, and while it records."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

import autojac
from autojac.bench.jacobians import wrap
from autojac.bench.results import BenchResult, Facts, Figure, Outcome
from autojac.bench.run import Settings, at_rest, in_fresh_process
from autojac.bench.workloads import WORKLOADS, Workload
from autojac.guards.function_state import FunctionState
from autojac.methods.base import build
from autojac.methods.threads import threads
from autojac.planning.prepare_compute import prepare_compute
from autojac.planning.search import measure
from autojac.problem.problem import Compute
from autojac.replay.replayer import Replayer

CALL_US, GUARD_US = {"sin": 3.0, "mlp-2-16-2": 3.0, "mlp-10-layers": 5.0}, 2.0
PARTS = ("call", "program", "guard")
FINER = 10
"""Rounds are that many times as many, their blocks as much shorter, and mostly shorter than a scheduler's slice: a busy
machine spoils some rounds then and not the median. It takes ways that leave each other's caches warm."""
PAST_CHECKS = 1025
"""Calls after which the runtime guard checks only every thousandth."""
DEEP, BEFORE = "mlp-10-layers", "sin"
ENGINES = ("vmap", "loop")
TRACE_MS = (300.0, 150.0)
"""Of the first signature, and of another."""
STARTS = 3


def replay(engine: str) -> dict[str, Any]:
    return {"method": "Replay", "inner": {"method": "Pull", "seeds": "shared", "engine": engine}}


def cached_call(settings: Settings, workload: Workload) -> BenchResult:
    """Return what `jac(x)` adds to its flat program, and what of that is the guard, in paired rounds.

    Args:
        settings: how to measure.
        workload: a function whose plan is a replay, by force.
    """
    # waking threads takes longer than what is measured
    with threads(1), at_rest():
        samples = _time_calls(workload, settings)
    outcomes = tuple(Outcome(name, "right").with_samples(row) for name, row in zip(PARTS, samples, strict=True))
    call, program, guard = samples
    added = statistics.median(a - b for a, b in zip(call, program, strict=True))
    figures = (
        Figure("call over its program, µs", 1e6 * added, CALL_US[workload.name]),
        Figure("guard, µs", 1e6 * statistics.median(guard), GUARD_US),
    )
    return BenchResult(f"cached call of {workload.name}", outcomes, figures, {})


def _time_calls(workload: Workload, settings: Settings) -> list[list[float]]:
    func, x = workload.make(settings.device)
    jac = wrap(func, dataclasses.replace(settings, effort="estimate"))
    entry, _ = jac._run((x,), {})
    spec = replay("loop")
    entry.plan = dataclasses.replace(entry.plan, method=spec)
    compute = entry.compute = prepare_compute(entry.layout, entry.problem, build(spec))
    entry.fast_path = None
    for _ in range(PAST_CHECKS):
        jac(x)
    # a call that is found wrong gets another plan
    assert jac._run((x,), {})[0].compute is compute
    replaying = find_replayer(compute)
    bound = replaying.bound
    assert bound is not None
    captured = bound.captured if bound.hoisted is None else bound.hoisted()
    forward, steady = bound.trace.forward, replaying.function_state.is_unchanged
    shortest, rounds = settings.shortest_s / FINER, FINER * settings.rounds
    until = measure.clock.now() + settings.race_s
    runs = [lambda: jac(x), lambda: forward(x, *captured), steady]
    return measure.time_interleaved(runs, x.device, shortest, rounds, until)


def find_replayer(compute: Compute) -> Replayer:
    """Return what replays, after its first call.

    Raises:
        RuntimeError: if there is no trace, with the reason.
    """
    assert isinstance(compute, Replayer)
    if compute.bound is None:
        raise RuntimeError("; ".join(compute.function_state.lines()))
    return compute


def tracing(settings: Settings, engine: str, runs: int = STARTS) -> BenchResult:
    """Time first calls of a replay for one signature and then for another of the same function, in fresh processes.

    Something else is traced before, so that imports and torch's own caches are warm; one process goes without that.

    Args:
        settings: the device.
        engine: of the recorded method.
        runs: processes.
    """
    found = [in_fresh_process("overhead:time_tracing", [BEFORE, DEEP], engine, settings.device) for _ in range(runs)]
    cold = in_fresh_process("overhead:time_tracing", [DEEP], engine, settings.device)[0]
    figures = tuple(
        Figure(f"{which} signature, ms", 1e3 * statistics.median(seconds), bound)
        for which, bound, seconds in zip(("first", "second"), TRACE_MS, zip(*found, strict=True), strict=True)
    )
    facts: Facts = {"first trace of a cold process, ms": 1e3 * cold}
    return BenchResult(f"tracing {DEEP} by {engine}", (), figures, facts)


def time_tracing(names: Sequence[str], engine: str, device: str = "cpu") -> list[float]:
    """Time a replay's first call, with everything that is done once: guard, recording, simplifying, comparing.

    Args:
        names: workloads, of which the last is timed; its whole batch is one signature, half of it another.
        engine: of the recorded method.
        device: where to run.
    """
    seconds: list[float] = []
    with at_rest():
        for name in names:
            func, x = WORKLOADS[name].make(device)
            jac = autojac.AutoJacobian(func, effort="estimate", store=autojac.PlanStore(":memory:"))
            # planned first, and then watched again, so that neither signature finds the other's work done by its
            # planning
            problems = [(jac._run((z,), {})[0].problem, z) for z in (x, x[: len(x) // 2])]
            state = FunctionState(func)
            seconds = list(_firsts([(dataclasses.replace(p, function_state=state), z) for p, z in problems], engine))
    return seconds


def _firsts(problems: Sequence[tuple[Any, Tensor]], engine: str) -> Iterator[float]:
    for problem, z in problems:
        start = time.perf_counter()
        compute = build(replay(engine)).prepare(problem)
        compute((z,), {})
        measure.synchronize(z.device)
        yield time.perf_counter() - start
        find_replayer(compute)


def overhead_cases() -> dict[str, Callable[[Settings], BenchResult]]:
    """Return cached calls and tracing, by name."""
    found: dict[str, Callable[[Settings], BenchResult]] = {
        f"cached call of {name}": partial(cached_call, workload=WORKLOADS[name]) for name in CALL_US
    }
    return found | {f"tracing by {engine}": partial(tracing, engine=engine) for engine in ENGINES}
