"""What zeros save: sparse layouts and blocks against the best that knows of no zeros, all in one run."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

from autojac.bench.baselines import reference
from autojac.bench.coupled import brusselator
from autojac.bench.jacobians import torch_ways, wrap
from autojac.bench.molecules import packed_molecules
from autojac.bench.points import points
from autojac.bench.results import BenchResult, Facts, Figure, Outcome
from autojac.bench.run import FAR, Entrant, Settings, admit, at_rest, race_entrants
from autojac.bench.workloads import WORKLOADS, Workload
from autojac.core.sandbox import Sandbox
from autojac.core.structure import Structure
from autojac.planning.prepared_plan import PreparedPlan
from autojac.planning.search import measure
from autojac.probe.feature_pattern import Features, find_feature_pattern
from autojac.probe.sample_pairs import ProbePoint
from autojac.problem.compression import colors_of
from autojac.sparse.colorings import Colorings, Side

FEW_ROUNDS = 3
"""Enough to tell which two dense ways to race in earnest."""
SIDES: tuple[Side, ...] = ("rows", "columns")


def layouts(workload: Workload, settings: Settings, sparse_bound: float, blocks_bound: float) -> BenchResult:
    """Race a function's entries and its blocks against the best of torch's ways and of autojac without a pattern.

    Args:
        workload: of independent samples.
        settings: how to measure.
        sparse_bound, blocks_bound: what each is to take at most, as a multiple of the best.
    """
    func, x = workload.make(settings.device)
    truth = reference(workload, func, x)
    tuned = wrap(func, settings)
    colored = wrap(func, settings, layout="sparse")
    dense = wrap(func, settings, coupling=Structure("independent", "declared"))
    ways = list(torch_ways(workload, func, x, truth, lambda J: J))
    ways.append(admit("autojac without zeros", lambda: dense(x), truth))
    ways = race_entrants(ways, x.device, dataclasses.replace(settings, rounds=FEW_ROUNDS), FAR, always=())
    # a busy machine may have favoured one
    finalists = sorted((way for way in ways if way.outcome.samples), key=_seconds)[:2]
    entries = admit("sparse", lambda: as_blocks(colored(x), truth), truth)
    entries = dataclasses.replace(entries, run=entries.run and (lambda: colored(x)))
    rivals = [admit("blocks", lambda: tuned(x), truth), entries, *finalists]
    names = [rival.outcome.name for rival in rivals]
    timed = [entrant.outcome for entrant in race_entrants(rivals, x.device, settings, math.inf, always=names)]
    blocks, sparse, *last = timed
    best = min(last, key=lambda outcome: outcome.seconds or math.inf)
    left = tuple(way.outcome for way in ways if way.outcome.name not in names)
    entry, _ = colored._run((x,), {})
    facts = _facts({"blocks": tuned._run((x,), {})[0], "sparse": entry, "without zeros": dense._run((x,), {})[0]})
    figures = (Figure.over(sparse, best, sparse_bound), Figure.over(blocks, best, blocks_bound))
    return BenchResult(workload.name, (*timed, *left), figures, {**facts, **_colors(entry)})


def reaction(settings: Settings, size: int = 32, rounds: int = 31) -> BenchResult:
    """The Brusselator on a grid: detection against a plain call, its Jacobian against JVPs and VJPs.

    Args:
        settings: how to measure.
        size: cells along a side; 2·size² unknowns.
        rounds: of the race, which takes milliseconds.
    """
    func, x = brusselator(size), torch.rand(2 * size * size, generator=torch.Generator().manual_seed(0)) + 1
    jac = wrap(func, settings, layout="sparse", in_dims=None)
    entry, _ = jac._run((x,), {})
    colors = _colors(entry)
    pattern = detect(func, x).pattern
    assert pattern is not None
    seeds = torch.randn(int(min(colors.values())), len(x), generator=torch.Generator().manual_seed(1))
    runs: dict[str, Callable[[], object]] = {
        "func": lambda: func(x),
        "detection": lambda: detect(func, x),
        "coloring": lambda: Colorings().orthogonal(pattern, "columns"),
        "JVPs": lambda: jvps(func, x, seeds),
        "VJPs": lambda: vjps(func, x, seeds),
        "sparse": lambda: jac(x),
    }
    facts = {**_facts({"sparse": entry}), **colors, "entries": pattern.count}
    until = measure.clock.now() + settings.race_s
    table = measure.time_interleaved(list(runs.values()), x.device, settings.shortest_s, rounds, until)
    timed = {name: Outcome(name, "right").with_samples(samples) for name, samples in zip(runs, table, strict=True)}
    # whoever else is on the machine
    found, plain = (cpu_seconds(runs[name], rounds) for name in ("detection", "func"))
    figures = (
        Figure("detection, CPU ms", 1e3 * found, max(50.0, 30e3 * plain)),
        Figure.over(timed["sparse"], timed["JVPs"], 3.0),
        Figure.over(timed["sparse"], timed["VJPs"], 3.0),
    )
    return BenchResult(f"brusselator-{size}", tuple(timed.values()), figures, facts)


def detect(func: Callable[[Tensor], Tensor], x: Tensor) -> Features:
    """Return the pattern of a function without a batch, from nothing."""
    point = ProbePoint(lambda leaves, _: (func(leaves[0][0])[None],), (x[None],), {}, (0,), (), 1, Sandbox(()))
    return find_feature_pattern(point, (0,), torch.Generator().manual_seed(0), sliceable=False)


def jvps(func: Callable[[Tensor], Tensor], x: Tensor, seeds: Tensor) -> list[Tensor]:
    """Return one JVP per seed, as a user of dual numbers writes it."""
    pushed = []
    for seed in seeds:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(func(forward_ad.make_dual(x, seed))).tangent
        pushed.append(tangent)
    return pushed


def vjps(func: Callable[[Tensor], Tensor], x: Tensor, seeds: Tensor) -> list[Tensor]:
    """Return one VJP per seed, all through one graph."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = func(x)
        return [torch.autograd.grad(y, x, seed, retain_graph=True)[0] for seed in seeds]


def cpu_seconds(run: Callable[[], object], rounds: int) -> float:
    """Return seconds of this process's own threads that a call takes, the median."""
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        spent.append(time.process_time() - start)
    return statistics.median(spent)


def as_blocks(jacobian: Tensor, like: Tensor) -> Tensor:
    """Return the blocks (B, m, n) of independent samples in a sparse matrix (B·m, B·n)."""
    batch, m, n = like.shape
    counts = jacobian.crow_indices().diff()
    rows = torch.arange(batch * m, device=like.device).repeat_interleave(counts)
    samples, columns = rows // m, jacobian.col_indices()
    if jacobian.shape != (batch * m, batch * n) or not torch.equal(samples, columns // n):
        raise ValueError("it holds entries between samples")
    return torch.zeros_like(like).index_put((samples, rows % m, columns % n), jacobian.values())


def _seconds(entrant: Entrant) -> float:
    return entrant.outcome.seconds or math.inf


def _facts(entries: Mapping[str, PreparedPlan]) -> Facts:
    plans: Facts = {f"plan, {name}": str(entry.plan) for name, entry in entries.items()}
    return plans | {f"tuning s, {name}": entry.plan.tuning_seconds for name, entry in entries.items()}


def _colors(entry: PreparedPlan) -> dict[str, float]:
    return {f"colors of {side}": colors_of(entry.problem, side).count for side in SIDES}


RACES: dict[str, Callable[[Settings], BenchResult]] = {
    "burgers": lambda settings: layouts(WORKLOADS["burgers"], settings, 1 / 15, 1 / 2),
    "conv1d": lambda settings: layouts(WORKLOADS["conv1d"], settings, 1 / 6, 1 / 6),
    "brusselator": reaction,
    "points": points,
    "molecules": packed_molecules,
}


def zeros(name: str, settings: Settings) -> BenchResult:
    """Put the zeros of a function to use."""
    with at_rest():
        return RACES[name](settings)
