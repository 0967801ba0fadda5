"""How time grows with the number of samples, from a hundred to a million."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from autojac.bench.jacobians import race_workload
from autojac.bench.results import BenchResult
from autojac.bench.run import Settings
from autojac.bench.workloads import WORKLOADS, Workload

GROWN = ("sin", "mlp-2-16-2")
BATCHES = (100, 1_000, 10_000, 100_000, 1_000_000)


def race_grown(settings: Settings, workload: Workload, batch: int) -> BenchResult:
    """Race one workload with another number of samples, at effort `quick`: what compilers gain is told elsewhere."""
    other = dataclasses.replace(workload, name=f"{workload.name} at {batch}", batch=batch)
    settings = dataclasses.replace(settings, effort="quick", rounds=min(settings.rounds, 7))
    return race_workload(other, settings)


def growth_cases() -> dict[str, Callable[[Settings], BenchResult]]:
    return {
        f"{name} at {batch}": partial(race_grown, workload=WORKLOADS[name], batch=batch)
        for name in GROWN
        for batch in BATCHES
    }
