"""A million points that are coupled through their nearest neighbours, and the exact Jacobian of each: (B, 3, 3).

Each point of a cloud is moved by messages from its six nearest neighbours, weighed by a softmax over their distances,
as in a step of a graph network or of mean shift (Comaniciu & Meer, "Mean shift: a robust approach toward feature space
analysis", 2002). Who hears whom stands in an index tensor. How far each point follows its own motion, all others held
still, is its block ∂y_b/∂x_b.

What it shows: the samples are coupled, so summing over the batch is wrong, and one pass a row would be 3B passes.
autojac follows the index tensor through the graph of the call, finds which points can reach each other, and colors
them: points of one color share their passes. Seven colors of points or so, times three rows, whatever B is. Some blocks
are held against plain autograd, and the second wrapper finds plan, graph and coloring in the store. A picture of
the graph of the first points and its coloring is written, if plotly is installed.

    python examples/million_points.py --points 1000000

takes minutes, most of them once; 20 000 points are the default.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from autojac import AutoJacobian, Pattern, UnsupportedError
from autojac.report import spy
from autojac.sparse.colorings import apart

CACHE = Path(__file__).resolve().parents[1] / "cache" / "autojac.db"


class Messages(nn.Module):
    """Move points (B, 3) towards their neighbours, given by number, (B, k); the near ones count most."""

    neighbours: Tensor

    def __init__(self, neighbours: Tensor) -> None:
        super().__init__()
        self.register_buffer("neighbours", neighbours)
        # distances shrink with the number of points, and weights are to differ all the same
        self.sharpness = len(neighbours) ** (2 / 3)

    def forward(self, points: Tensor) -> Tensor:
        offsets = points[self.neighbours] - points[:, None]
        weights = torch.softmax(-self.sharpness * offsets.square().sum(-1), dim=1)
        return points + (weights[..., None] * offsets).sum(1)


def cloud(count: int, neighbours: int) -> tuple[Messages, Tensor]:
    """Random points of the unit cube (B, 3), ordered so that near ones have near numbers, and their messages."""
    points = np.random.default_rng(0).random((count, 3), dtype=np.float32)
    points = points[cKDTree(points).indices]
    _, found = cKDTree(points).query(points, neighbours + 1)  # the nearest point of all is the point itself
    return Messages(torch.from_numpy(found[:, 1:].astype(np.int64))), torch.from_numpy(points)


def block_by_rows(model: Messages, points: Tensor, sample: int) -> Tensor:
    """∂y[sample]/∂x[sample] by plain autograd, a row at a time, (3, 3)."""
    points = points.detach().requires_grad_()
    moved = model(points)[sample]
    return torch.stack([torch.autograd.grad(value, points, retain_graph=True)[0][sample] for value in moved])


def blocks_of_sums(model: Messages, points: Tensor) -> Tensor:
    """The blocks as if points did not see each other: gradients of sums over the batch, (B, 3, 3)."""
    points = points.detach().requires_grad_()
    totals = model(points).sum(0)
    return torch.stack([torch.autograd.grad(total, points, retain_graph=True)[0] for total in totals], dim=1)


def vjp(model: Messages, points: Tensor) -> Tensor:
    points = points.detach().requires_grad_()
    moved = model(points)
    (pulled,) = torch.autograd.grad(moved, points, torch.ones_like(moved))
    return pulled


def timed(run: Any) -> tuple[Any, float]:
    begun = time.perf_counter()
    result = run()
    return result, time.perf_counter() - begun


def draw(graph: Pattern, path: str) -> str:
    """Write the picture; what to say of it."""
    try:
        return f"picture of who hears whom: {spy(graph, path, apart(graph), 'rows')}"
    except UnsupportedError as error:
        return f"no picture: {error}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Exact Jacobian blocks of points coupled through neighbours.")
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--neighbours", type=int, default=6)
    parser.add_argument("--picture", default=str(CACHE.parent / "points.html"), help="where to write it")
    parser.add_argument("--store", default=os.environ.get("AUTOJAC_STORE", str(CACHE)))
    options = parser.parse_args(argv)

    model, points = cloud(options.points, options.neighbours)
    with torch.no_grad():
        # the cost model's choice, since candidates take long to time at such sizes
        jac = AutoJacobian(model, effort="estimate", store=options.store)
        plan, ready_s = timed(lambda: jac.plan(points))
        explanation = jac.explain(points)
        blocks, _ = timed(lambda: jac(points))
        _, blocks_s = timed(lambda: jac(points))
        again = AutoJacobian(model, effort="estimate", store=options.store)
        source = again.plan(points).source
    _, vjp_s = timed(lambda: vjp(model, points))
    _, vjp_s = timed(lambda: vjp(model, points))

    scale = float(blocks.abs().max())
    checked = (0, options.points // 2, options.points - 1)
    errors = [float((blocks[sample] - block_by_rows(model, points, sample)).abs().max()) for sample in checked]
    block_error = max(errors) / scale
    sum_error = float((blocks_of_sums(model, points) - blocks).abs().max()) / scale
    following = blocks.diagonal(dim1=1, dim2=2).mean(1)
    graph = plan.structure.samples
    assert graph is not None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    print(explanation)
    print(f"{options.points} points: plan {plan}, from {plan.source}, ready after {ready_s:.1f} s; then from {source}")
    print(f"blocks {tuple(blocks.shape)} in {blocks_s:.2f} s, the time of {blocks_s / vjp_s:.1f} VJPs")
    print(f"  peak of the process {peak:.2f} GB; the whole Jacobian would be {9 * options.points**2 * 4 / 1e9:.3g} GB")
    print(f"blocks {checked} against autograd row by row: relative error {block_error:.1e}")
    print(f"  if points had been summed over: {sum_error:.1e}")
    print(f"a point follows its own motion by {following.mean():.2f} of it on average, {following.max():.2f} at most")
    drawn = draw(graph, options.picture)
    print(drawn)
    return {
        "plan": plan,
        "explanation": explanation,
        "graph": graph,
        "blocks": blocks,
        "block_error": block_error,
        "sum_error": sum_error,
        "source": source,
        "following": following,
        "drawn": drawn,
    }


if __name__ == "__main__":
    main()
