"""What autojac itself costs: at every call, at a process's first call, and at its import."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from autojac.bench.results import Startup
from autojac.bench.run import Settings, tune
from autojac.bench.workloads import WORKLOADS, Workload
from autojac.core.plan import Effort
from autojac.planning.search import measure

UNWANTED = ("alembic", "optuna", "torch._dynamo")
"""Modules that take long to load and that a first Jacobian from a warm store does without."""
PAST_CHECKS = 1025
"""Calls after which the runtime guard checks only every thousandth."""

# Only autojac's part is timed: not torch, not SQLAlchemy, not the making of the function and its input.
FIRST = """
import json, sys, time
import torch, sqlalchemy, sqlalchemy.orm, sqlalchemy.dialects.sqlite, autojac
from autojac.bench.workloads import WORKLOADS
store, threads, effort, *unwanted = sys.argv[1:]
torch.set_num_threads(int(threads))
func, x = WORKLOADS["sin"].make()
with torch.no_grad():
    start = time.perf_counter()
    jac = autojac.AutoJacobian(func, store=store, on_miss="tune", effort=effort)
    jac(x)
    seconds = time.perf_counter() - start
loaded = [name for name in unwanted if name in sys.modules]
with torch.no_grad():
    print(json.dumps({"seconds": seconds, "source": jac.plan(x).source, "loaded": loaded}))
"""

IMPORT = "import time; start = time.perf_counter(); import {name}; print(time.perf_counter() - start)"


def overhead(settings: Settings, workload: Workload = WORKLOADS["sin"], rounds: int = 31) -> float:
    """Return seconds that `jac(x)` adds to its bare method with the plan's seeds: the median over paired rounds."""
    with torch.no_grad():
        tuned = tune(workload, settings)
        x, compute = tuned.x, tuned.entry.compute
        for _ in range(PAST_CHECKS):
            tuned.jac(x)
        until = time.monotonic() + settings.race_s
        called, bare = measure.interleaved(
            [lambda: tuned.jac(x), lambda: compute((x,), {})], x.device, settings.shortest_s, rounds, until
        )
    return statistics.median(a - b for a, b in zip(called, bare, strict=True))


def startup(runs: int = 5, effort: Effort = "quick") -> Startup:
    """Time fresh processes; the first of them tunes, the others find its plan."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store.db")
        arguments = (store, str(torch.get_num_threads()), effort, *UNWANTED)
        _fresh(FIRST, *arguments)
        firsts = [json.loads(_fresh(FIRST, *arguments)) for _ in range(runs)]
    imports: dict[str, list[float]] = {"torch": [], "autojac": []}
    for turn in range(runs):
        for name in sorted(imports, reverse=turn % 2 == 0):
            imports[name].append(float(_fresh(IMPORT.format(name=name))))
    return Startup(
        tuple(first["seconds"] for first in firsts),
        _common(first["source"] for first in firsts),
        tuple(sorted({name for first in firsts for name in first["loaded"]})),
        tuple(imports["torch"]),
        tuple(imports["autojac"]),
    )


def _fresh(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a fresh process failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def _common(values: Any) -> str:
    return ", ".join(sorted(set(values)))
