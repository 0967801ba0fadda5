"""Fit the poses of many cameras at a time to what they see: Levenberg-Marquardt with a step per sample.

Each of B cameras sees the same landmarks at pixels of its own. Its pose (rotation vector and translation) and focal
length are found by iterating d = argmin ‖J d + r‖² + λ‖d‖², with a damping λ that each sample raises or lowers by its
own success.

What it shows: `jac.solve(pose, residual, damping=...)` is one such step for the whole batch. The same loop by
`vmap(jacrev)` and `torch.linalg.lstsq` takes the same iterations to the same poses, and a multiple of the time.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autojac import AutoJacobian

CACHE = Path(__file__).resolve().parents[1] / "cache" / "autojac.db"
UNKNOWNS = 7
Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def rotate(vectors: Tensor, points: Tensor) -> Tensor:
    """Rotate points (P, 3) by rotation vectors (B, 3), by the formula of Rodrigues: (B, P, 3)."""
    square = vectors.square().sum(1)[:, None, None] + 1e-12
    angle = square.sqrt()
    axis = vectors[:, None, :].expand(-1, len(points), -1)
    turned = points.expand(len(vectors), -1, -1)
    across = torch.linalg.cross(axis, turned)
    along = (axis * turned).sum(-1, keepdim=True) * axis
    return turned * angle.cos() + across * (angle.sin() / angle) + along * ((1 - angle.cos()) / square)


class Reprojection:
    """What pixels (B, P, 2) miss the projections of landmarks (P, 3) by: (B, 2 P), for poses (B, 7)."""

    def __init__(self, landmarks: Tensor) -> None:
        self.landmarks = landmarks

    def project(self, pose: Tensor) -> Tensor:
        seen = rotate(pose[:, :3], self.landmarks) + pose[:, None, 3:6]
        return pose[:, None, 6:] * seen[..., :2] / seen[..., 2:]

    def __call__(self, pose: Tensor, pixels: Tensor) -> Tensor:
        return (self.project(pose) - pixels).flatten(1)


def by_hand(function: Reprojection) -> Step:
    """Return a step as one writes it without autojac."""

    def single(pose: Tensor, pixels: Tensor) -> Tensor:
        return function(pose[None], pixels[None])[0]

    jacobian = torch.vmap(torch.func.jacrev(single))

    def step(pose: Tensor, pixels: Tensor, residual: Tensor, damping: Tensor) -> Tensor:
        roots = damping.sqrt()[:, None, None] * torch.eye(UNKNOWNS)
        stacked = torch.cat([jacobian(pose, pixels), roots], 1)
        right = torch.cat([residual, residual.new_zeros(len(pose), UNKNOWNS)], 1)
        return -torch.linalg.lstsq(stacked, right[..., None]).solution[..., 0]

    return step


def fit(
    function: Reprojection, step: Step, pose: Tensor, pixels: Tensor, most: int, tolerance: float
) -> tuple[Tensor, int, float]:
    """Return fitted poses, the iterations, and the seconds that they took after the first one, which prepares."""
    damping = torch.full((len(pose),), 1e-2)
    residual = function(pose, pixels)
    cost, start = residual.square().sum(1), time.perf_counter()
    for iteration in range(1, most + 1):
        trial = pose + step(pose, pixels, residual, damping)
        tried = function(trial, pixels)
        better = tried.square().sum(1) < cost
        change = (trial - pose).abs().amax(1)
        pose, residual = torch.where(better[:, None], trial, pose), torch.where(better[:, None], tried, residual)
        cost, damping = residual.square().sum(1), torch.where(better, damping / 10, damping * 10)
        if iteration == 1:
            start = time.perf_counter()
        if bool((change < tolerance).all()):
            break
    return pose, iteration, time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cameras", type=int, default=4096)
    parser.add_argument("--landmarks", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=30, help="at most")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds for the search")
    parser.add_argument("--store", default=os.environ.get("AUTOJAC_STORE", str(CACHE)), help="where plans are kept")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    function = Reprojection(torch.rand(options.landmarks, 3) * 2 - 1)
    truth = torch.cat([0.5 * torch.randn(options.cameras, 3), 0.2 * torch.randn(options.cameras, 3)], 1)
    truth = torch.cat([truth, 1 + 0.1 * torch.rand(options.cameras, 1)], 1)
    truth[:, 5] += 5
    pixels = function.project(truth)
    start = truth + 0.1 * torch.randn(truth.shape)

    jac = AutoJacobian(function, effort="measure", budget_s=options.budget, store=options.store)

    def by_autojac(pose: Tensor, pixels: Tensor, residual: Tensor, damping: Tensor) -> Tensor:
        step: Tensor = jac.solve(pose, pixels, residual, damping=damping)
        return step

    found: dict[str, Any] = {"truth": truth, "start": start}
    with torch.no_grad():
        for name, step in (("autojac", by_autojac), ("vmap(jacrev) and lstsq", by_hand(function))):
            pose, iterations, seconds = fit(function, step, start, pixels, options.iterations, 1e-5)
            found[name] = {"pose": pose, "iterations": iterations, "seconds": seconds}
            error = (pose - truth).abs().amax()
            each = 1e3 * seconds / max(iterations - 1, 1)
            print(f"{name}: {iterations} iterations, {each:.1f} ms each, {error:.1e} off")
        print(jac.plan(start, pixels))
    return found


if __name__ == "__main__":
    main()
