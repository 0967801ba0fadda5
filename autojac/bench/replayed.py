"""What replays cost beside their operators: at each call, at its guard, and while they are traced."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import autojac
from autojac.bench.contests import Announce, at_rest
from autojac.bench.overhead import PAST_CHECKS
from autojac.bench.results import Figure, Outcome, Promised
from autojac.bench.run import Settings, tune
from autojac.bench.workloads import WORKLOADS, Workload
from autojac.guards.function_state import FunctionState
from autojac.methods.base import build
from autojac.planning.prepare_compute import prepare_compute
from autojac.planning.search import measure
from autojac.problem.problem import Compute
from autojac.replay.replayer import Replayer

CALLED = ("sin", "mlp-2-16-2", "mlp-10-layers")
CALL_US, GUARD_US = 5.0, 2.0
FINER = 10
"""Rounds are that many times as many, their blocks as much shorter, and mostly shorter than a scheduler's slice: a busy
machine spoils some rounds then and not the median. It takes ways that leave each other's caches warm."""
DEEP = "mlp-20-layers"
ENGINES = ("vmap", "loop")
FIRST_MS, SECOND_MS = 300.0, 150.0

SCRIPT = """
import json, sys, torch
from autojac.bench.replayed import traced
from autojac.bench.workloads import WORKLOADS
threads, engine, device, *names = sys.argv[1:]
torch.set_num_threads(int(threads))
*_, last = (traced(WORKLOADS[name], engine, device) for name in names)
print(json.dumps(last))
"""


def replayed(settings: Settings, announce: Announce = lambda name: None) -> list[Promised]:
    """Both parts.

    Args:
        settings: how to measure.
        announce: called with what is measured before its turn.
    """
    announce("calls of replays")
    called = calls([WORKLOADS[name] for name in CALLED], settings)
    announce("tracing in fresh processes")
    return [called, tracing(settings)]


def replay(engine: str) -> dict[str, Any]:
    return {"method": "Replay", "inner": {"method": "Pull", "seeds": "shared", "engine": engine}}


def calls(workloads: Sequence[Workload], settings: Settings) -> Promised:
    """Return what `jac(x)` adds to its flat graph, and what of that is the guard, in paired rounds.

    Args:
        workloads: functions whose plan is a replay, by force.
        settings: how to measure.
    """
    outcomes: list[Outcome] = []
    figures: list[Figure] = []
    with at_rest():
        for workload in workloads:
            names = [f"{workload.name}: {what}" for what in ("call", "graph", "guard")]
            samples = _called(workload, settings)
            outcomes += [Outcome(name, "right").raced(row) for name, row in zip(names, samples, strict=True)]
            call, graph, guard = samples
            added = statistics.median(a - b for a, b in zip(call, graph, strict=True))
            figures.append(Figure(f"{workload.name}: call less graph, µs", 1e6 * added, CALL_US))
            figures.append(Figure(f"{workload.name}: guard, µs", 1e6 * statistics.median(guard), GUARD_US))
    return Promised("calls of replays", tuple(outcomes), tuple(figures), {})


def _called(workload: Workload, settings: Settings) -> list[list[float]]:
    tuned = tune(workload, dataclasses.replace(settings, effort="estimate"))
    jac, x, entry = tuned.jac, tuned.x, tuned.entry
    spec = replay("loop")
    entry.plan = dataclasses.replace(entry.plan, method=spec)
    compute = entry.compute = prepare_compute(entry.layout, entry.problem, build(spec))
    entry.fast_path = None
    for _ in range(PAST_CHECKS):
        jac(x)
    # a call that is found wrong gets another plan
    assert jac._run((x,), {})[0].compute is compute
    replaying = served(compute)
    bound = replaying.bound
    assert bound is not None
    captured = bound.captured if bound.kept is None else bound.kept()
    forward, steady = bound.trace.forward, replaying.function_state.is_unchanged
    shortest, rounds, until = settings.shortest_s / FINER, FINER * settings.rounds, time.monotonic() + settings.race_s
    runs = [lambda: jac(x), lambda: forward(x, *captured), steady]
    return measure.interleaved(runs, x.device, shortest, rounds, until)


def served(compute: Compute) -> Replayer:
    """Return what replays, after its first call.

    Raises:
        RuntimeError: if there is no trace, with the reason.
    """
    assert isinstance(compute, Replayer)
    if compute.bound is None:
        raise RuntimeError("; ".join(compute.function_state.lines()))
    return compute


def tracing(settings: Settings, runs: int = 3, engines: Sequence[str] = ENGINES) -> Promised:
    """First calls of a replay for one signature and then for another of the same function, in fresh processes.

    Something else is traced before, so that imports and torch's own caches are warm; one process goes without that.

    Args:
        settings: the device.
        runs: processes for each engine.
        engines: of the recorded method.
    """
    outcomes: list[Outcome] = []
    figures: list[Figure] = []
    facts: dict[str, str | float] = {}
    for engine in engines:
        found = [_fresh(engine, settings.device, "sin", DEEP) for _ in range(runs)]
        first, second = ([each[at] for each in found] for at in (0, 1))
        outcomes += [
            Outcome(f"{engine}: first signature", "right").raced(first),
            Outcome(f"{engine}: second signature", "right").raced(second),
        ]
        figures.append(Figure(f"{engine}: first signature, ms", 1e3 * statistics.median(first), FIRST_MS))
        figures.append(Figure(f"{engine}: second signature, ms", 1e3 * statistics.median(second), SECOND_MS))
        facts[f"{engine}: second over first"] = statistics.median(b / a for a, b in zip(first, second, strict=True))
        facts[f"{engine}: first trace of a cold process, ms"] = 1e3 * _fresh(engine, settings.device, DEEP)[0]
    return Promised(f"tracing of {DEEP}", tuple(outcomes), tuple(figures), facts)


def _fresh(engine: str, device: str, *names: str) -> list[float]:
    """Return the seconds of the last of these workloads, after the others in the same process."""
    command = [sys.executable, "-c", SCRIPT, str(torch.get_num_threads()), engine, device, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a fresh process failed: {done.stderr.strip().splitlines()[-1:]}")
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def traced(workload: Workload, engine: str, device: str = "cpu") -> list[float]:
    """Seconds of a replay's first call, with everything that is done once: guard, recording, simplifying, comparing.

    Args:
        workload: the function; its whole batch is one signature, half of it another.
        engine: of the recorded method.
        device: where to run.
    """
    with at_rest():
        func, x = workload.make(device)
        jac = autojac.AutoJacobian(func, effort="estimate", store=autojac.PlanStore(":memory:"))
        # planned first, and then watched again, so that neither signature finds the other's work done by its planning
        problems = [(jac._run((z,), {})[0].problem, z) for z in (x, x[: len(x) // 2])]
        function_state = FunctionState(func)
        return list(_firsts([(dataclasses.replace(p, function_state=function_state), z) for p, z in problems], engine))


def _firsts(problems: Sequence[tuple[Any, Tensor]], engine: str) -> Iterator[float]:
    for problem, z in problems:
        start = time.perf_counter()
        compute = build(replay(engine)).prepare(problem)
        compute((z,), {})
        measure.synchronize(z.device)
        yield time.perf_counter() - start
        served(compute)
