"""Points that see their nearest neighbours, many of them: time and memory of the exact blocks, a process a size."""

from __future__ import annotations

import math
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import autojac
from autojac.autodiff.tolerance import disagreement
from autojac.bench.coupled import Neighbours, cloud
from autojac.bench.results import BenchResult, Facts, Figure, Outcome, State, ratio
from autojac.bench.run import Settings, in_fresh_process
from autojac.planning.search import measure
from autojac.sparse.colorings import Colorings

NEIGHBOURS = 6
COUNTS = (100_000, 1_000_000)
SAMPLES = 2
"""Blocks that are compared with plain VJPs."""
ROUNDS = 5
RACE_S = 120.0
"""A round of a million points takes tens of seconds."""
FACTS = ("plan", "colors", "detection s", "coloring s", "first s", "from the store s", "peak GB")


def points(settings: Settings, counts: Sequence[int] = COUNTS) -> BenchResult:
    """Race the blocks against plain VJPs for each number of points, in a process of its own for the sake of its peak.

    Args:
        settings: how to measure; plans are estimated, since a search at such sizes takes minutes.
        counts: numbers of points, the largest last.
    """
    runs = {count: _fresh(count, settings) for count in counts}
    facts: Facts = {"neighbours": NEIGHBOURS}
    pulls, blocks = [], []
    for count, run in runs.items():
        pulls.append(Outcome(f"VJP, {count} points", "right").with_samples(run["vjp"]))
        state: State = "wrong" if run["wrong"] else "right"
        blocks.append(Outcome(f"blocks, {count} points", state, reason=run["wrong"]).with_samples(run["blocks"]))
        facts |= {f"{fact}, {count} points": run[fact] for fact in FACTS}
    last, share = runs[counts[-1]], counts[-1] / counts[0]
    over = ratio(blocks[-1], pulls[-1])
    # of two processes, so no round of the one has a partner in the other
    few, many = (each.seconds or math.nan for each in (blocks[0], blocks[-1]))
    figures = (
        Figure("blocks over a VJP", math.inf if over is None or last["wrong"] else over, 30.0),
        Figure("peak of the process, GB", last["peak GB"], 3.5),
        Figure("detection and coloring, s", last["detection s"] + last["coloring s"], 60.0),
        Figure(f"blocks of {share:.3g} times as many points, over those of the fewest", many / few, 1.2 * share),
    )
    return BenchResult("points", (*pulls, *blocks), figures, facts)


def measure_all(count: int, neighbours: int, store: str) -> dict[str, Any]:
    """Measure everything about one number of points, in this process."""
    func, x = cloud(count, neighbours)
    with torch.no_grad():
        start = time.perf_counter()
        jac = autojac.AutoJacobian(func, effort="estimate", store=store)
        blocks = jac(x)
        first = time.perf_counter() - start
        plan, wrong = jac.plan(x), _wrong(func, x, blocks)
        del blocks
        again = autojac.AutoJacobian(func, effort="estimate", store=store)
        start = time.perf_counter()
        again(x)
        found, source = time.perf_counter() - start, again.plan(x).source
        until = measure.clock.now() + RACE_S
        table = measure.time_interleaved([lambda: vjp(func, x), lambda: jac(x)], x.device, 0.0, ROUNDS, until)
        # what follows is timed again, apart from the rest of a first call
        start = time.perf_counter()
        structure = autojac.probe(func, x)
        detection = time.perf_counter() - start
        graph = structure.samples
        start = time.perf_counter()
        colors = 0 if graph is None else int(Colorings().apart(graph).max()) + 1
        coloring = time.perf_counter() - start
    return {
        "plan": str(plan),
        "colors": colors,
        "wrong": wrong or (None if source == "store" else f"its plan came from the {source}"),
        "vjp": table[0],
        "blocks": table[1],
        "first s": first,
        "from the store s": found,
        "detection s": detection,
        "coloring s": coloring,
        "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def vjp(func: Neighbours, x: Tensor) -> Tensor:
    """Return one VJP with ones, as its user writes it."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = func(x)
        (pulled,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return pulled


def _wrong(func: Neighbours, x: Tensor, blocks: Tensor) -> str | None:
    """Hold the blocks of a few points against plain VJPs."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = func(x)
        for sample in torch.linspace(0, len(x) - 1, SAMPLES).long():
            rows = [torch.autograd.grad(value, x, retain_graph=True)[0][sample] for value in y[sample]]
            error = disagreement(blocks[sample], torch.stack(rows))
            if error is not None:
                return f"block {int(sample)} is off by {error:.2g}"
    return None


def _fresh(count: int, settings: Settings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = in_fresh_process(
            "points:measure_all", count, NEIGHBOURS, str(Path(folder) / "store.db")
        )
    return found
