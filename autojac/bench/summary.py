"""What a report says of the promises, line by line."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

from autojac.bench.baselines import DEFAULT
from autojac.bench.interop.race import together
from autojac.bench.jacobians import OVER_BEST, OVER_DEFAULT, WORST
from autojac.bench.peers.race import OVER_ASDEX, OVER_JAX, OVER_TENSORFLOW, STEP_BOUND
from autojac.bench.regret import EFFORTS, regret_of
from autojac.bench.results import BenchResult, Figure, Report
from autojac.bench.training import OF_WHOLE, WHOLE_BOUND

AGGREGATED = ("jacobians", "training", "regret", "growth", "interop", "peers")
"""Suites of which single figures say less than what they give together."""
MEDIAN_REGRET = {"quick": 1.05, "measure": 1.02}
JAX_BOUND = 1.3
WITH_COMPILER = ("measure", "exhaustive")


def summarize(report: Report) -> list[Figure]:
    """Return the figures that were promised, those of many workloads together first."""
    found = list(_jacobians(report.of("jacobians")))
    found += _training(report.of("training"), report.settings.get("effort") in WITH_COMPILER)
    found += _growth(report.of("growth"))
    found += _regret(report.of("regret"))
    found += _peers(report.of("peers"))
    models = report.of("interop")
    if models:
        training = bool(report.settings.get("training"))
        what = f"{len(models)} {'training steps' if training else 'Jacobians'} of other libraries' models"
        found += [dataclasses.replace(f, what=f"{what}: {f.what}") for f in together(models, training).figures]
    for result in report.results:
        if result.suite not in AGGREGATED:
            found += [Figure(f"{result.name}: {f.what}", f.value, f.bound, f.least) for f in result.figures]
    failed = [result.name for result in report.results if _is_wrong(result)]
    if failed:
        found.append(Figure(f"without a right result: {', '.join(failed)}", len(failed), 0))
    return found


def _is_wrong(result: BenchResult) -> bool:
    return any(o.state in ("wrong", "error") for o in result.outcomes[:1]) and result.suite != "regret"


def _jacobians(results: Sequence[BenchResult]) -> Iterator[Figure]:
    inputs = [result for result in results if result.facts.get("kind") != "parameters"]
    yield from _faster(inputs, OVER_DEFAULT, f"Jacobians: times faster than {DEFAULT}", 12.0)
    yield from _faster(inputs, OVER_BEST, "Jacobians: times faster than torch's best way", 7.0)
    yield from _worst(inputs, OVER_BEST, "Jacobians: worst over torch's best way", WORST)
    parameters = [result for result in results if result.facts.get("kind") == "parameters"]
    yield from _worst(parameters, OVER_BEST, "Jacobians in parameters: worst over torch's best way", WORST)


def _training(results: Sequence[BenchResult], compilers: bool) -> Iterator[Figure]:
    yield from _faster(results, OVER_DEFAULT, f"training steps: times faster than {DEFAULT}", 2.0)
    yield from _faster(results, OVER_BEST, "training steps: times faster than torch's best way", 1.3)
    yield from _worst(results, OVER_BEST, "training steps: worst over torch's best way", WORST)
    found = figures_of(results, OF_WHOLE)
    if found:
        mean = statistics.geometric_mean(found.values())
        yield Figure("whole training steps over torch's best way, geometric mean", mean, WHOLE_BOUND[compilers])
    yield from _worst(results, OF_WHOLE, "whole training steps: worst over torch's best way", WORST)


def _growth(results: Sequence[BenchResult]) -> Iterator[Figure]:
    yield from _worst(results, OVER_BEST, "100 to a million samples: worst over torch's best way", WORST)


def _regret(results: Sequence[BenchResult]) -> Iterator[Figure]:
    for effort, bound in EFFORTS.items():
        found = figures_of(results, regret_of(effort))
        if found:
            yield Figure(f"regret of {effort}, median", statistics.median(found.values()), MEDIAN_REGRET[effort])
        yield from _worst(results, regret_of(effort), f"regret of {effort}, worst", bound)


def _peers(results: Sequence[BenchResult]) -> Iterator[Figure]:
    for count in dict.fromkeys(result.facts.get("threads") for result in results):
        same = [result for result in results if result.facts.get("threads") == count]
        where = f"{count} thread{'s' if count != 1 else ''}"
        steps = [result for result in same if result.facts.get("kind") == "training"]
        dense = [r for r in same if r not in steps and r.facts.get("kind") != "sparse"]
        yield from _faster(
            dense, OVER_JAX, f"{where}: times faster than jitted JAX, dense", JAX_BOUND if count == 1 else None
        )
        yield from _faster(same, OVER_TENSORFLOW, f"{where}: times faster than TensorFlow", None)
        yield from _faster(same, OVER_ASDEX, f"{where}: times faster than asdex", None)
        yield from _worst(steps, OVER_JAX, f"{where}: whole training step over a jitted JAX step, worst", STEP_BOUND)


def figures_of(results: Iterable[BenchResult], what: str) -> dict[str, float]:
    """Return a figure of all results that have it, by name."""
    found = {result.name: result.figure(what) for result in results}
    return {name: figure.value for name, figure in found.items() if figure is not None and math.isfinite(figure.value)}


def _faster(results: Iterable[BenchResult], what: str, label: str, bound: float | None) -> Iterator[Figure]:
    found = figures_of(results, what)
    if found:
        mean = statistics.geometric_mean(found.values())
        yield Figure(f"{label}, geometric mean of {len(found)}", 1 / mean, bound, least=True)


def _worst(results: Sequence[BenchResult], what: str, label: str, bound: float) -> Iterator[Figure]:
    found = figures_of(results, what)
    if found:
        name = max(found, key=found.__getitem__)
        yield Figure(f"{label} ({name})", found[name], bound)
