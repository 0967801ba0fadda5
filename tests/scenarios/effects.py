"""State, random numbers, and derivatives that are told to differ from the function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from scenarios.base import Draw, Scenario, traits
from scenarios.maths import eye_like

ROWS = 5


class Smoothed(nn.Module):
    """Keeps a running mean of what it sees, and does not use it."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.1)
        return x.sin()


class Cached(nn.Module):
    """Keeps its last activation as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(3, 2), None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.inner(x).detach()
        return self.inner(x).tanh()


class Quantised(nn.Module):
    """The nearest entry of a codebook, with a straight-through estimator, and the commitment to it."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        nearest = self.codes[(x[:, None] - self.codes).square().sum(-1).argmin(-1)]
        return x + (nearest - x).detach(), (x - nearest.detach()).square().sum(-1)


def layer(build: Callable[[], nn.Module], *shape: int) -> Callable[[Draw], Any]:
    return lambda draw: (draw.module(build), (draw.normal(ROWS, *shape),))


def reversed_by_a_hook(x: Tensor) -> Tensor:
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda grad: -grad)
    return y


def partly_frozen(x: Tensor) -> Tensor:
    with torch.no_grad():
        frozen = x[:, :1].exp()
    return frozen + x**2


def recorded_again(x: Tensor) -> Tensor:
    """Gradients switched on within a region without them."""
    with torch.no_grad():
        outer = x.sin()
        with torch.enable_grad():
            inner = x.cos()
    return outer * inner


def gumbel_softmax(draw: Draw) -> Any:
    return lambda x: F.gumbel_softmax(x, tau=2.0), (draw.normal(ROWS, 3),)


def reparameterised(draw: Draw) -> Any:
    net = draw.mlp(3, 4, 4)

    def func(x: Tensor) -> Tensor:
        mean, log_scale = net(x).chunk(2, -1)
        return torch.distributions.Normal(mean, log_scale.exp(), validate_args=False).rsample()

    return func, (draw.normal(ROWS, 3),)


def common_noise(x: Tensor) -> Tensor:
    """One draw that all samples share."""
    return x * torch.rand(3, dtype=x.dtype)


def batch_norm(**options: Any) -> Callable[[Draw], Any]:
    return layer(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **options), nn.Tanh()), 3)


SCENARIOS = [
    Scenario(
        "BatchNorm2d in train mode",
        layer(lambda: nn.BatchNorm2d(2), 2, 2, 2),
        "dense",
        traits=traits("stateful", "conserved"),
    ),
    Scenario("BatchNorm with a cumulative average", batch_norm(momentum=None), "dense", traits=traits("stateful")),
    Scenario("BatchNorm without running statistics", batch_norm(track_running_stats=False), "dense"),
    Scenario(
        "BatchNorm without running statistics, in eval mode",
        lambda d: (d.module(lambda: nn.BatchNorm1d(3, track_running_stats=False)).eval(), (d.normal(ROWS, 3),)),
        "dense",
        traits=traits("conserved"),
    ),
    Scenario(
        "InstanceNorm with running statistics",
        layer(lambda: nn.Sequential(nn.InstanceNorm1d(2, track_running_stats=True), nn.Tanh()), 2, 4),
        traits=traits("stateful", "no_vmap"),
    ),
    Scenario(
        "spectral_norm in train mode",
        layer(lambda: parametrizations.spectral_norm(nn.Linear(3, 2)), 3),
        traits=traits("stateful"),
    ),
    Scenario(
        "running mean that nothing reads",
        layer(Smoothed, 3),
        jacobian=lambda _, x: x.cos().diag_embed(),
        traits=traits("stateful", "no_vmap", "no_functorch_vjp"),
    ),
    Scenario("last activation kept", layer(Cached, 3)),
    Scenario(
        "dropout of channels",
        layer(lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Dropout1d(0.5)), 2, 3),
        traits=traits("random", "not_sliceable"),
    ),
    Scenario(
        "dropout in the eval mode",
        layer(lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).eval(), 3),
        jacobian=lambda net, x: net[0].weight.detach().expand(len(x), 4, 3),
    ),
    # it draws a number for each negative entry alone, so signs decide who gets which
    Scenario("randomised leaky ReLU", layer(nn.RReLU, 3), traits=traits("random", "not_sliceable", "dense_accepted")),
    Scenario("Gumbel softmax", gumbel_softmax, traits=traits("random", "not_sliceable", "conserved")),
    Scenario("reparameterised sample", reparameterised, traits=traits("random", "not_sliceable")),
    Scenario("noise that all samples share", lambda d: (common_noise, (d.normal(ROWS, 3),)), traits=traits("random")),
    Scenario(
        "BatchNorm and dropout",
        layer(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2)), 3),
        "dense",
        traits=traits("random", "stateful"),
    ),
    Scenario(
        "straight-through codebook",
        layer(Quantised, 2),
        jacobian=lambda net, x: (eye_like(x), 2 * (x - net(x)[0].detach())),
        traits=traits("kink"),
    ),
    Scenario(
        "gradient reversed without a Function",
        lambda d: (lambda x: 2 * x.sin().detach() - x.sin(), (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (-x.cos()).diag_embed(),
        traits=traits("kink"),
    ),
    Scenario(
        "gradient reversed by a hook",
        lambda d: (reversed_by_a_hook, (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (-x.cos()).diag_embed(),
        traits=traits("modes_differ", "wrong_vmap_jacfwd", "kink"),
    ),
    Scenario(
        "partly under no_grad",
        lambda d: (partly_frozen, (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (2 * x).diag_embed(),
        traits=traits("modes_differ", "wrong_vmap_jacfwd", "kink"),
    ),
    Scenario(
        "enable_grad within no_grad",
        lambda d: (recorded_again, (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (-(x.sin() ** 2)).diag_embed(),
        traits=traits("modes_differ", "wrong_vmap_jacfwd", "kink"),
    ),
]
