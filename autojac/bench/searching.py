"""What a search costs, when its plan comes, and how good it is: the promises of the planner."""

from __future__ import annotations

import dataclasses
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

import autojac
from autojac.bench.fresh import SIGNATURES
from autojac.bench.jacobians import wrap
from autojac.bench.results import BenchResult, Facts, Figure
from autojac.bench.run import Settings, admit, at_rest, in_fresh_process, race_entrants
from autojac.bench.workloads import WORKLOADS
from autojac.planning.search import measure

LOADED_TORCH = "import time, torch\nloaded_torch = time.perf_counter()"
STARTS = 3
STORED_S, TUNED_S = 0.5, 2.5
FIRST_CALLS: dict[str, tuple[float, int | None]] = {
    "sin": (0.1, 25),
    "mlp-6-64-64-6": (0.15, None),
    "normals-3-64-64-1-200k": (2.0, None),
    "attention": (0.5, None),
}
TUNES: dict[str, tuple[float, int | None]] = {
    "sin": (0.7, 150),
    "mlp-6-64-64-6": (1.0, None),
    "mlp-4-32-4-200k": (4.0, None),
}
"""CPU seconds and evaluations that a first call and a search may take at most."""
SIGNATURES_S = {"sequence lengths": 2.0, "batch sizes": 2.0, "molecule sizes": 3.0}
LOOPED = ("mlp-4-32-4-200k", "mlp-3-64-64-3")
LOOP_S, SETTLED_S, SHARE = 25.0, 15.0, 1.2
"""Seconds of a loop of calls; when the best plan is in use; what exploring may cost at every moment."""
ENOUGH_CALLS = 5
"""Calls before which their mean says little about what the first plan takes."""
COMPARED_CALLS = 32
"""Calls that are each compared with one by the first plan; of later ones one in as many is."""
SHORT_BUDGET_S = 0.5
SEARCHES, SPREAD = 5, 1.05
QUICK = ("fresh processes", "first call: sin", "tune at quick: sin", "batch sizes", "overshoot of budget_s")
SPIN = "while True: pass"


def first_calls(settings: Settings, workload: str) -> BenchResult:
    """Time a first call with the default options and an empty store, in a process of its own."""
    return _first(f"first call: {workload}", workload, {}, *FIRST_CALLS[workload])


def tunes(settings: Settings, workload: str) -> BenchResult:
    """Time a search at effort `quick` with an empty store, in a process of its own."""
    options = {"on_miss": "tune", "effort": "quick"}
    return _first(f"tune at quick: {workload}", workload, options, *TUNES[workload])


def _first(name: str, workload: str, options: dict[str, Any], seconds: float, evaluations: int | None) -> BenchResult:
    found = [in_fresh_process("fresh:cold_call", workload, options) for _ in range(STARTS)]
    middle = {key: statistics.median(each[key] for each in found) for key in found[0]}
    figures = (
        Figure("CPU seconds after imports", middle["cpu s"], seconds),
        Figure("evaluations", middle["evaluations"], evaluations),
    )
    return BenchResult(name, (), figures, {"wall s": middle["wall s"]})


def fresh_processes(settings: Settings) -> BenchResult:
    """Time fresh processes since torch was loaded: the first tune, and a first call that finds its plan."""
    with tempfile.TemporaryDirectory() as folder:
        stores = [str(Path(folder) / f"{turn}.db") for turn in range(STARTS)]
        run = partial(in_fresh_process, "fresh:since_torch", preload=LOADED_TORCH)
        tuned = [run(store, "quick", "tune") for store in stores]
        stored = [run(store, "quick", "online") for store in stores]
    figures = (
        Figure("first tune, imports included, s", statistics.median(each["seconds"] for each in tuned), TUNED_S),
        Figure("first call, plan in the store, s", statistics.median(each["seconds"] for each in stored), STORED_S),
    )
    loaded = sorted({name for each in stored for name in each["loaded"]})
    sources = sorted({each["source"] for each in stored})
    return BenchResult("fresh processes", (), figures, {"plan from": ", ".join(sources), "loaded": ", ".join(loaded)})


def many_signatures(settings: Settings, kind: str) -> BenchResult:
    """Time one call for each of many signatures."""
    found = in_fresh_process("fresh:signatures", kind)
    figure = Figure(f"{found['signatures']} {kind}, one call each, CPU s", found["cpu s"], SIGNATURES_S[kind])
    return BenchResult(kind, (), (figure,), {"wall s": found["wall s"]})


def measure_exploration(settings: Settings, workload: str) -> BenchResult:
    """Call a wrapper with the default options for some time, and see what exploring costs and when it settles.

    Besides one that keeps to its first plan, called in turn: both are checked as often, and drift affects both.
    """
    with at_rest():
        func, x = WORKLOADS[workload].make(settings.device)
        jac = autojac.AutoJacobian(func, store=autojac.PlanStore(":memory:"))
        start = measure.clock.now()
        jac(x)
        facts: Facts = {"first call s": measure.clock.now() - start}
        rest = autojac.AutoJacobian(func, store=autojac.PlanStore(":memory:"), on_miss="estimate")
        rest(x)
        before = jac.plan(x)
        share, settled, spent, first, count, seconds = 0.0, 0.0, 0.0, 0.0, 0, 0.0
        while spent < (LOOP_S / 5 if settings.quick else LOOP_S):
            spent += _seconds_of(lambda: jac(x))
            if count < COMPARED_CALLS or count % COMPARED_CALLS == 0:
                seconds = _seconds_of(lambda: rest(x))
            first += seconds
            count += 1
            if count >= ENOUGH_CALLS:
                share = max(share, spent / first)
            plan = jac.plan(x)
            if plan.method != before.method:
                before, settled = plan, spent
        runs = [lambda: jac(x), lambda: rest(x)]
        pairs = measure.time_interleaved(runs, x.device, settings.shortest_s, settings.rounds, math.inf)
        last, once = map(measure.summary, pairs)
    facts |= {"calls": count, "first plan": str(rest.plan(x)), "last plan": str(before)}
    figures = (
        Figure("worst cost so far over the first plan's", share, SHARE),
        Figure("seconds of calls until the plan in use is the last", settled, SETTLED_S),
        Figure("last plan over the first", last.seconds / once.seconds, 1.0),
    )
    return BenchResult(f"exploring: {workload}", (), figures, facts)


def _seconds_of(run: Callable[[], object]) -> float:
    """Return the seconds of a call, or the CPU seconds of this process and its compilers where these are fewer.

    A busy machine adds nothing, and neither do torch's threads, of which several work, or wait by spinning, at a time.
    """
    start, cpu_start = time.perf_counter(), _cpu_seconds()
    run()
    return min(time.perf_counter() - start, _cpu_seconds() - cpu_start)


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def overshoot(settings: Settings, workloads: Sequence[str] = tuple(TUNES)) -> BenchResult:
    """Tune with a budget that is too short, and see by how much it is overshot, over one candidate's longest run."""
    figures = []
    with at_rest():
        for name in workloads:
            func, x = WORKLOADS[name].make(settings.device)
            short = dataclasses.replace(settings, effort="quick", budget_s=SHORT_BUDGET_S, store=None)
            jac = wrap(func, short)
            start = time.perf_counter()
            jac.tune(x)
            beyond = time.perf_counter() - start - SHORT_BUDGET_S
            trials = jac.plan(x).trials
            longest = max((trial.seconds for trial in trials if trial.seconds), default=math.nan)
            figures.append(Figure(f"{name}: seconds beyond {SHORT_BUDGET_S}", beyond, max(0.1, 2 * longest)))
    return BenchResult("overshoot of budget_s", (), tuple(figures), {})


def beside_load(settings: Settings, workload: str = "mlp-6-64-64-6") -> BenchResult:
    """Search the same several times while another process keeps a core busy, and race the plans found."""
    with at_rest():
        func, x = WORKLOADS[workload].make(settings.device)
        quick = dataclasses.replace(settings, effort="quick", store=None, budget_s=None)
        busy = subprocess.Popen([sys.executable, "-c", SPIN])
        try:
            found = []
            for _ in range(SEARCHES):
                found.append(wrap(func, quick))
                found[-1](x)
        finally:
            busy.kill()
            busy.wait()
        truth = found[0](x)
        entrants = [admit(f"search {turn}", _call(jac, x), truth) for turn, jac in enumerate(found, 1)]
        timed = [entrant.outcome for entrant in race_entrants(entrants, x.device, settings, math.inf)]
    seconds = [outcome.seconds or math.inf for outcome in timed]
    plans = {str(jac.plan(x)) for jac in found}
    figure = Figure(
        f"slowest plan of {SEARCHES} searches on a busy machine over the fastest", max(seconds) / min(seconds), SPREAD
    )
    return BenchResult("searches on a busy machine", tuple(timed), (figure,), {"plans": " ".join(sorted(plans))})


def _call(jac: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    return lambda: jac(x)


def search_cases() -> dict[str, Callable[[Settings], BenchResult]]:
    """Return what is measured of searches, by name."""
    found: dict[str, Callable[[Settings], BenchResult]] = {"fresh processes": fresh_processes}
    found |= {f"first call: {name}": partial(first_calls, workload=name) for name in FIRST_CALLS}
    found |= {f"tune at quick: {name}": partial(tunes, workload=name) for name in TUNES}
    found |= {kind: partial(many_signatures, kind=kind) for kind in SIGNATURES}
    found |= {f"exploring: {name}": partial(measure_exploration, workload=name) for name in LOOPED}
    return found | {"overshoot of budget_s": overshoot, "searches on a busy machine": beside_load}
