"""Train a physics-informed network for the viscous Burgers equation, its derivatives and whole steps planned.

    u_t + u u_x = ν u_xx,   x in [-1, 1], t in [0, 1],   u(0, x) = -sin(πx),   u(t, ±1) = 0

What it shows: `Derivatives` gives u, u_t, u_x and u_xx by their columns, and only these; `TrainingStep` plans them, the
loss on them and its gradients as one program, tuned once for the number of points. `--compare` times the step beside
the same one written by hand with `torch.autograd.grad`. The network meets the initial and boundary conditions by
construction, so that the residual of the equation is the whole loss. The error is measured against the Cole-Hopf
solution in float64.

The default ν = 0.05 is smooth enough for a short run; `--viscosity 0.00318` is the sharp front of the literature
(0.01/π), which wants `--steps 20000` and more.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autojac import Derivatives, TrainingStep

COLUMNS = ((), (1,), (0,), (0, 0))
"""u, u_t, u_x, u_xx by the columns of points (x, t)."""
CACHE = Path(__file__).resolve().parents[1] / "cache" / "autojac.db"


class Solution(nn.Module):
    """u(x, t) for points (B, 2), shape (B, 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [2, width, width, width, 1]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, points: Tensor) -> Tensor:
        x, t = points[:, :1], points[:, 1:]
        return t * (1 - x.square()) * self.net(points) - torch.sin(torch.pi * x)


def cole_hopf(points: Tensor, viscosity: float, order: int = 200) -> Tensor:
    """The exact solution at points (B, 2) with t > 0, by Gauss-Hermite quadrature in float64; shape (B,).

    Cole (1951) and Hopf (1950): u = -∫ sin(πy) w dη / ∫ w dη with y = x - η, w = exp(-cos(πy)/(2πν) - η²/(4νt)).
    """
    nodes, weights = (torch.from_numpy(array) for array in np.polynomial.hermite.hermgauss(order))
    x, t = points.double().unbind(1)
    y = math.pi * (x[:, None] - nodes * (4 * viscosity * t).sqrt()[:, None])
    # the largest exponent is taken out of both integrals: 0.01/π makes it 50
    density = weights * torch.exp(-(1 + torch.cos(y)) / (2 * math.pi * viscosity))
    return -(density * torch.sin(y)).sum(1) / density.sum(1)


def relative_error(model: nn.Module, viscosity: float) -> float:
    """Relative L2 error of the network on a grid of 101 positions and 50 times."""
    positions, times = torch.linspace(-1, 1, 101), torch.linspace(0.02, 1, 50)
    grid = torch.cartesian_prod(positions, times)
    exact = cole_hopf(grid, viscosity)
    with torch.no_grad():
        found = model(grid).squeeze(1).double()
    return float((found - exact).norm() / exact.norm())


def step_by_hand(model: nn.Module, residual: Callable[..., Tensor], points: Tensor) -> Tensor:
    """The same step as PINN codes write it."""
    points = points.requires_grad_()
    u = model(points)
    (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    (curvature,) = torch.autograd.grad(slope[:, 0].sum(), points, create_graph=True)
    loss = residual(u, slope[:, 1:], slope[:, :1], curvature[:, :1])
    loss.backward()
    return loss.detach()


def compared(
    model: nn.Module, step: TrainingStep, residual: Callable[..., Tensor], points: Tensor, rounds: int = 100
) -> dict[str, float]:
    """Milliseconds of a step either way, the lower quartile of rounds in turn."""
    ways = {"planned": lambda: step(points.detach()), "by_hand": lambda: step_by_hand(model, residual, points.detach())}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            model.zero_grad()
            start = time.perf_counter()
            way()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(taken)[rounds // 4] for name, taken in times.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="A PINN for Burgers' equation, whole steps planned.")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--points", type=int, default=512, help="collocation points, drawn anew at every step")
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--viscosity", type=float, default=0.05)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds that each search may take")
    parser.add_argument("--compare", action="store_true", help="time a step beside one written by hand")
    parser.add_argument("--store", default=os.environ.get("AUTOJAC_STORE", str(CACHE)))
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    model = Solution(options.width)
    derivatives = Derivatives(model, of=COLUMNS, on_miss="tune", budget_s=options.budget, store=options.store)

    def residual(u: Tensor, u_t: Tensor, u_x: Tensor, u_xx: Tensor) -> Tensor:
        return (u_t + u * u_x - options.viscosity * u_xx).square().mean()

    def draw() -> Tensor:
        return torch.rand(options.points, 2) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])

    step = TrainingStep(derivatives, residual)
    start = time.perf_counter()
    plan = step.plan(draw())
    tuning_s = time.perf_counter() - start

    error_before = relative_error(model, options.viscosity)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    losses: list[float] = []
    start = time.perf_counter()
    for _ in range(options.steps):
        optimizer.zero_grad()
        loss = step(draw())
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    training_s = time.perf_counter() - start
    error = relative_error(model, options.viscosity)

    print(f"{plan}, from {plan.source}")
    print(f"plan ready after {tuning_s:.1f} s, {options.steps} steps in {training_s:.1f} s")
    print(f"mean squared residual {losses[0]:.3g} -> {losses[-1]:.3g}")
    print(f"relative L2 error against Cole-Hopf {error_before:.1%} -> {error:.2%}")
    found = {}
    if options.compare:
        found = compared(model, step, residual, draw())
        print(f"one step takes {found['planned']:.3g} ms, by hand {found['by_hand']:.3g} ms")
    return {
        "compared": found,
        "plan": plan,
        "tuning_s": tuning_s,
        "training_s": training_s,
        "losses": losses,
        "error_before": error_before,
        "error": error,
        "model": model,
        "derivatives": derivatives,
    }


if __name__ == "__main__":
    main()
