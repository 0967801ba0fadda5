"""Solvers, flows and mechanics: functions that loop, some until they have converged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scenarios.base import Draw, Scenario, traits
from scenarios.maths import eye_like

ROWS = 4


def neural_ode(draw: Draw) -> Any:
    """Three steps of the classical Runge-Kutta method."""
    field, h = draw.mlp(2, 4, 2), 0.2

    def func(x: Tensor) -> Tensor:
        for _ in range(3):
            a = field(x)
            b = field(x + h / 2 * a)
            c = field(x + h / 2 * b)
            x = x + h / 6 * (a + 2 * b + 2 * c + field(x + h * c))
        return x

    return func, (draw.normal(ROWS, 2),)


def lorenz(x: Tensor) -> Tensor:
    a, b, c = x.unbind(-1)
    return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)


def lorenz_jacobian(_: Any, x: Tensor) -> Tensor:
    a, b, c = x.unbind(-1)
    one = torch.ones_like(a)
    rows = [[-10 * one, 10 * one, 0 * one], [28 - c, -one, -a], [b, a, -8 / 3 * one]]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def equilibrium(draw: Draw) -> Any:
    """A fixed point found by unrolled iteration."""
    net = draw.module(lambda: nn.Linear(3, 3))

    def func(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(8):
            z = (0.5 * net(z) + x).tanh()
        return z

    return func, (draw.normal(ROWS, 3),)


def kepler(x: Tensor) -> Tensor:
    """Newton's method on Kepler's equation, until every sample has converged."""
    mean, eccentricity = x.unbind(-1)
    anomaly = mean
    for _ in range(30):
        residual = anomaly - eccentricity * anomaly.sin() - mean
        anomaly = anomaly - residual / (1 - eccentricity * anomaly.cos())
        if residual.abs().max().item() < 1e-12:
            break
    return anomaly


def kepler_jacobian(_: Any, x: Tensor) -> Tensor:
    anomaly, eccentricity = kepler(x), x[:, 1]
    return torch.stack([torch.ones_like(anomaly), anomaly.sin()], -1) / (1 - eccentricity * anomaly.cos())[:, None]


def coupling_layer(draw: Draw) -> Any:
    """An affine coupling, with the logarithm of its determinant."""
    net = draw.mlp(2, 4, 4)

    def func(x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = x.chunk(2, -1)
        log_scale, shift = net(kept).chunk(2, -1)
        return torch.cat([kept, moved * log_scale.exp() + shift], -1), log_scale.sum(-1)

    return func, (draw.normal(ROWS, 4),)


def sinkhorn(x: Tensor) -> Tensor:
    """A few steps towards a doubly stochastic matrix."""
    for _ in range(3):
        x = x - x.logsumexp(-1, keepdim=True)
        x = x - x.logsumexp(-2, keepdim=True)
    return x.exp()


def spatial_arm(joints: Tensor) -> Tensor:
    """Tip of an arm in space whose joints turn about z and y in turn."""
    tip = joints.new_zeros(len(joints), 3)
    for k in reversed(range(joints.shape[1])):
        c, s = joints[:, k].cos(), joints[:, k].sin()
        x, y, z = (tip + tip.new_tensor([1.0, 0.0, 0.0])).unbind(-1)
        tip = torch.stack([c * x - s * y, s * x + c * y, z] if k % 2 == 0 else [c * x + s * z, y, c * z - s * x], -1)
    return tip


def hamiltonian(draw: Draw) -> Any:
    """Velocities of a learned energy, by its gradient."""
    energy = draw.mlp(2, 4, 1)

    def func(x: Tensor) -> Tensor:
        slope = torch.func.grad(lambda z: energy(z).sum())(x)
        return torch.stack([slope[:, 1], -slope[:, 0]], -1)

    return func, (draw.normal(ROWS, 2),)


def bounce(x: Tensor) -> Tensor:
    """A ball that falls a fixed time and bounces, the branch taken in a tensor."""
    height, speed = x.unbind(-1)
    time = (speed + (speed**2 + 2 * height).sqrt()).clamp(max=5.0)
    left = 1 - time
    after = (2 * height + speed**2).sqrt() * 0.8
    free = torch.stack([height + speed - 0.5, speed - 1], -1)
    bounced = torch.stack([after * left - left**2 / 2, after - left], -1)
    return torch.where((left > 0)[:, None], bounced, free)


def gated(draw: Draw) -> Any:
    """A mixture of two experts; each sample is sent to one of them, row by row."""
    experts = [draw.mlp(3, 4, 2), draw.mlp(3, 4, 2)]
    return lambda x: torch.cat([experts[int(row[0, 0] > 0)](row) for row in x.split(1)]), (draw.normal(ROWS, 3),)


def doubled_until_large(x: Tensor) -> Tensor:
    """How often depends on the values of each sample."""
    rows = []
    for row in x:
        grown = row
        while float(grown.detach().norm()) < 4:
            grown = 2 * grown
        rows.append(grown)
    return torch.stack(rows)


def doubled_until_large_jacobian(_: Any, x: Tensor) -> Tensor:
    scale = doubled_until_large(x).norm(dim=-1) / x.norm(dim=-1)
    return eye_like(x) * scale[:, None, None]


def written_step_by_step(draw: Draw) -> Any:
    """A trajectory stored into a tensor made beforehand."""
    matrix = draw.normal(2, 2)

    def func(x: Tensor) -> Tensor:
        path = x.new_empty(len(x), 4, 2)
        for step in range(4):
            path[:, step] = x
            x = (x @ matrix).tanh()
        return path

    return func, (draw.normal(ROWS, 2),)


SCENARIOS = [
    Scenario("neural ODE by Runge-Kutta", neural_ode),
    Scenario("Lorenz system", lambda d: (lorenz, (d.normal(ROWS, 3),)), jacobian=lorenz_jacobian),
    Scenario("equilibrium, unrolled", equilibrium),
    Scenario(
        "Kepler's equation by Newton's method",
        lambda d: (kepler, (torch.stack([d.uniform(ROWS, high=3.0), d.uniform(ROWS, high=0.5)], -1),)),
        jacobian=kepler_jacobian,
        traits=traits("no_vmap", "data_dependent"),
    ),
    Scenario("affine coupling", coupling_layer),
    Scenario("Sinkhorn in a sample", lambda d: (sinkhorn, (d.normal(ROWS, 2, 3),))),
    Scenario("robot arm in space", lambda d: (spatial_arm, (d.normal(ROWS, 5),))),
    Scenario("Hamiltonian network", hamiltonian),
    Scenario("bouncing ball", lambda d: (bounce, (d.uniform(ROWS, 2, high=0.5),))),
    Scenario("each sample to one expert", gated, traits=traits("no_vmap", "data_dependent")),
    Scenario(
        "loop of data-dependent length",
        lambda d: (doubled_until_large, (d.normal(ROWS, 3),)),
        jacobian=doubled_until_large_jacobian,
        traits=traits("no_vmap", "data_dependent"),
    ),
    Scenario("trajectory written into torch.empty", written_step_by_step, traits=traits("in_place")),
]
