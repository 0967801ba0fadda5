"""Train a physics-informed network for the viscous Burgers equation, with every derivative from AutoJacobian.

    u_t + u u_x = ν u_xx,   x in [-1, 1], t in [0, 1],   u(0, x) = -sin(πx),   u(t, ±1) = 0

What it shows: Jacobians nest. One AutoJacobian gives (u_x, u_t) of the network; a second one, of a function that calls
the first, gives u_xx. Both are tuned once for the number of points, both are differentiable, and the loss on them
trains the parameters. The network meets the initial and boundary conditions by construction, so that the residual of
the equation is the whole loss. The error is measured against the Cole-Hopf solution in float64.

The default ν = 0.05 is smooth enough for a short run; `--viscosity 0.00318` is the sharp front of the literature
(0.01/π), which wants `--steps 20000` and more.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autojac import AutoJacobian

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


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="A PINN for Burgers' equation, all derivatives by AutoJacobian.")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--points", type=int, default=512, help="collocation points, drawn anew at every step")
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--viscosity", type=float, default=0.05)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds that each of the two searches may take")
    parser.add_argument("--store", default=os.environ.get("AUTOJAC_STORE", str(CACHE)))
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    model = Solution(options.width)
    slope = AutoJacobian(model, on_miss="tune", budget_s=options.budget, store=options.store)

    def value_and_slope(points: Tensor) -> Tensor:
        u, first = slope.value_and_jacobian(points)
        return torch.cat([u, first[:, 0, :1]], dim=1)

    derivatives = AutoJacobian(value_and_slope, on_miss="tune", budget_s=options.budget, store=options.store)

    def draw() -> Tensor:
        return torch.rand(options.points, 2) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])

    start = time.perf_counter()
    plans = {"slope": slope.plan(draw()), "derivatives": derivatives.plan(draw())}
    tuning_s = time.perf_counter() - start

    error_before = relative_error(model, options.viscosity)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    losses: list[float] = []
    start = time.perf_counter()
    for _ in range(options.steps):
        values, second = derivatives.value_and_jacobian(draw())
        u, u_x, u_t, u_xx = values[:, 0], values[:, 1], second[:, 0, 1], second[:, 1, 0]
        loss = (u_t + u * u_x - options.viscosity * u_xx).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    training_s = time.perf_counter() - start
    error = relative_error(model, options.viscosity)

    for name, plan in plans.items():
        print(f"{name:12} {plan}, from {plan.source}")
    print(f"plans ready after {tuning_s:.1f} s, {options.steps} steps in {training_s:.1f} s")
    print(f"mean squared residual {losses[0]:.3g} -> {losses[-1]:.3g}")
    print(f"relative L2 error against Cole-Hopf {error_before:.1%} -> {error:.2%}")
    return {
        "plans": plans,
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
