"""What is raced: functions of a batch, as data."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autojac.bench.coupled import Neighbours

Func = Callable[[Tensor], Tensor]
Kind = Literal[
    "tiny", "dense", "wide", "tall", "bottleneck", "large", "sparse", "coupled", "parameters", "training"
]  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """A function of (batch, n) → (batch, m), float32.

    Attributes:
        name: as the command line takes it.
        kind: what it is there for. Samples are independent unless it is `coupled`; the Jacobian is that in the
            parameters for `parameters`, and is trained through for `training`. Other kinds have frozen parameters.
        batch: number of samples B.
        n: elements of one sample's input.
        m: elements of one sample's output.
        width: elements of one sample's widest intermediate result; how much a transform must hold depends on it.
        build: makes the function.
    """

    name: str
    kind: Kind
    batch: int
    n: int
    m: int
    width: int
    build: Callable[[], Func]

    def make(self, device: torch.device | str = "cpu") -> tuple[Func, Tensor]:
        """Return the function and a point, the same ones each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            func, x = self.build(), torch.randn(self.batch, self.n)
        if isinstance(func, nn.Module):
            func.requires_grad_(self.kind in ("parameters", "training"))
        return move_to(func, device, x.dtype), x.to(device)


def move_to(func: Func, device: torch.device | str, dtype: torch.dtype) -> Func:
    """Return a copy of a function's module on a device and in a dtype; plain functions go wherever their input does."""
    return copy.deepcopy(func).to(device, dtype) if isinstance(func, nn.Module) else func


def sine(x: Tensor) -> Tensor:
    return torch.sin(x)


def burgers(u: Tensor) -> Tensor:
    """Right-hand side of viscous Burgers on a periodic grid over [0, 2π): −u·u_x + ν·u_xx, central differences."""
    step = 2 * math.pi / u.shape[-1]
    left, right = torch.roll(u, 1, -1), torch.roll(u, -1, -1)
    return -u * (right - left) / (2 * step) + 0.01 * (left - 2 * u + right) / step**2


def lorenz96(x: Tensor) -> Tensor:
    """Lorenz' model of 1996: (x_{i+1} − x_{i−2})·x_{i−1} − x_i + 8 on a ring."""
    return (torch.roll(x, -1, -1) - torch.roll(x, 2, -1)) * torch.roll(x, 1, -1) - x + 8


def attention(x: Tensor) -> Tensor:
    """Softmax attention of all samples to all samples: every block of J sees the whole batch."""
    return torch.tanh(torch.softmax(x @ x.T / x.shape[-1] ** 0.5, -1) @ x)


class Residual(nn.Sequential):
    """x plus what its layers make of x."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]
        return out


class Pooled(nn.Module):
    """A network whose samples see the mean of all samples' features."""

    def __init__(self, n: int, width: int, m: int) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(n, width), nn.Linear(width, m)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.features(x))
        out: Tensor = self.head(torch.tanh(hidden + hidden.mean(0)))
        return out


class Ring(Neighbours):
    """Points on a ring, near enough to their neighbours that no weight vanishes."""

    def forward(self, points: Tensor) -> Tensor:
        return super().forward(0.3 * points)


def layers(sizes: Sequence[int], activation: type[nn.Module], norm: bool = False) -> nn.Sequential:
    """Linear layers with an activation between them, after BatchNorm in train mode where asked for."""
    found: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        found += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if norm else []), activation()]
    return nn.Sequential(*found[: -2 if norm else -1])


def mlp(
    name: str, kind: Kind, batch: int, *sizes: int, activation: type[nn.Module] = nn.Tanh, norm: bool = False
) -> Workload:
    """Linear layers with an activation between them; BatchNorm couples samples through their mean and variance."""
    return Workload(
        name, kind, batch, sizes[0], sizes[-1], max(sizes), lambda: layers(sizes, activation, norm)
    )  # fmt: skip


def convolution(name: str, batch: int, length: int, channels: int = 8) -> Workload:
    """Conv1d, tanh, Conv1d along a signal: each output sees five inputs."""

    def build() -> Func:
        pair: list[Any] = [nn.Conv1d(1, channels, 3, padding=1), nn.Tanh(), nn.Conv1d(channels, 1, 3, padding=1)]
        return nn.Sequential(nn.Unflatten(1, (1, length)), *pair, nn.Flatten())

    return Workload(name, "sparse", batch, length, length, length * channels, build)


def residual(name: str, kind: Kind, batch: int, n: int, width: int, blocks: int) -> Workload:
    """Residual blocks of two layers with SiLU between them."""
    return Workload(
        name, kind, batch, n, n, width,
        lambda: nn.Sequential(*[Residual(nn.Linear(n, width), nn.SiLU(), nn.Linear(width, n)) for _ in range(blocks)]),
    )  # fmt: skip


def ring(name: str, batch: int, count: int) -> Workload:
    """Points that see a few others through an index tensor: a sparse graph of samples."""

    def build() -> Func:
        steps = torch.arange(1, count + 1) * torch.tensor([1, -1]).repeat(count)[:count]
        return Ring((torch.arange(batch)[:, None] + steps) % batch)

    return Workload(name, "coupled", batch, 3, 3, 3 * count, build)


def pointwise(name: str, kind: Kind, batch: int, n: int, func: Func) -> Workload:
    """A plain function that keeps its input's shape."""
    return Workload(name, kind, batch, n, n, n, lambda: func)


EVERY: tuple[Workload, ...] = (
    pointwise("sin", "tiny", 1024, 3, sine),
    mlp("mlp-2-16-2", "tiny", 64, 2, 16, 2),
    mlp("mlp-6-64-64-6", "tiny", 256, 6, 64, 64, 6),
    mlp("mlp-10-layers", "tiny", 64, *[16] * 11),
    mlp("mlp-3-64-64-3", "dense", 1024, 3, 64, 64, 3),
    mlp("gelu-6-128-128-6", "dense", 2000, 6, 128, 128, 6, activation=nn.GELU),
    residual("silu-residual-16", "dense", 512, 16, 16, 4),
    mlp("mlp-64-256-256-64", "dense", 256, 64, 256, 256, 64),
    mlp("mlp-3-256-512", "wide", 256, 3, 256, 512),
    mlp("mlp-4-192-384", "wide", 128, 4, 192, 384),
    mlp("mlp-512-256-3", "tall", 256, 512, 256, 3),
    mlp("normals-3-64-64-1", "tall", 4096, 3, 64, 64, 1),
    mlp("autoencoder-256-4", "bottleneck", 128, 256, 128, 4, 128, 256),
    mlp("autoencoder-200-6", "bottleneck", 128, 200, 96, 6, 96, 200),
    mlp("mlp-3-64-64-3-100k", "large", 100_000, 3, 64, 64, 3),
    mlp("mlp-4-32-4-200k", "large", 200_000, 4, 32, 4),
    mlp("normals-3-64-64-1-200k", "large", 200_000, 3, 64, 64, 1),
    pointwise("sin-1m", "large", 1_000_000, 3, sine),
    mlp("normals-2-16-1-1m", "large", 1_000_000, 2, 16, 1),
    pointwise("burgers", "sparse", 64, 512, burgers),
    convolution("conv1d", 64, 256),
    pointwise("lorenz-96", "sparse", 128, 96, lorenz96),
    mlp("batchnorm", "coupled", 256, 8, 32, 32, 8, norm=True),
    Workload("pooled-context", "coupled", 128, 6, 4, 32, lambda: Pooled(6, 32, 4)),
    pointwise("attention", "coupled", 64, 3, attention),
    ring("neighbours", 256, 4),
    mlp("parameters-3-32-32-1", "parameters", 256, 3, 32, 32, 1),
    mlp("parameters-8-16-4", "parameters", 64, 8, 16, 4),
    mlp("pinn-2-50-50-50-1", "training", 2048, 2, 50, 50, 50, 1),
    mlp("train-12-128-128-12", "training", 256, 12, 128, 128, 12),
    mlp("train-64-32-16", "training", 256, 64, 32, 16),
    mlp("train-3-64-64-40", "training", 400, 3, 64, 64, 40),
    residual("train-flow-8", "training", 512, 8, 32, 2),
)
WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in EVERY}
"""All workloads by name, in the order of the tables."""


def of_kind(*kinds: Kind) -> list[Workload]:
    """Return the workloads of these kinds; of all whose Jacobian in the input is raced without a graph by default."""
    return [w for w in EVERY if (w.kind in kinds if kinds else w.kind not in ("parameters", "training"))]
