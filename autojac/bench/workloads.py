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

Func = Callable[[Tensor], Tensor]
Kind = Literal["dense", "sparse", "coupled"]


@dataclass(frozen=True)
class Workload:
    """A function of (batch, n) → (batch, m), float32, with frozen parameters.

    Attributes:
        name: as the command line takes it.
        kind: `dense` or `sparse` blocks of independent samples, or `coupled` samples.
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
        return moved_to(func, device, x.dtype), x.to(device)


def moved_to(func: Func, device: torch.device | str, dtype: torch.dtype) -> Func:
    """Return a copy of a function's module on a device and in a dtype; plain functions go wherever their input does."""
    return copy.deepcopy(func).to(device, dtype) if isinstance(func, nn.Module) else func


def sine(x: Tensor) -> Tensor:
    return torch.sin(x)


def burgers(u: Tensor) -> Tensor:
    """Right-hand side of viscous Burgers on a periodic grid over [0, 2π): −u·u_x + ν·u_xx, central differences."""
    step = 2 * math.pi / u.shape[-1]
    left, right = torch.roll(u, 1, -1), torch.roll(u, -1, -1)
    return -u * (right - left) / (2 * step) + 0.01 * (left - 2 * u + right) / step**2


def frozen(module: nn.Module) -> Func:
    return module.requires_grad_(False)


def tanh_layers(sizes: Sequence[int], norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if norm else []), nn.Tanh()]
    return nn.Sequential(*layers[: -2 if norm else -1])


def mlp(name: str, batch: int, *sizes: int) -> Workload:
    """Linear layers with tanh between them."""
    return Workload(
        name, "dense", batch, sizes[0], sizes[-1], max(sizes), lambda: frozen(tanh_layers(sizes, norm=False))
    )


def batch_norm(name: str, batch: int, *sizes: int) -> Workload:
    """Return the same with BatchNorm in train mode: samples are coupled through their mean and variance."""
    return Workload(
        name, "coupled", batch, sizes[0], sizes[-1], max(sizes), lambda: frozen(tanh_layers(sizes, norm=True))
    )


def convolution(name: str, batch: int, length: int, channels: int = 8) -> Workload:
    """Conv1d, tanh, Conv1d along a signal: each output sees five inputs."""

    def build() -> Func:
        pair: list[Any] = [nn.Conv1d(1, channels, 3, padding=1), nn.Tanh(), nn.Conv1d(channels, 1, 3, padding=1)]
        return frozen(nn.Sequential(nn.Unflatten(1, (1, length)), *pair, nn.Flatten()))

    return Workload(name, "sparse", batch, length, length, length * channels, build)


ALL: tuple[Workload, ...] = (
    Workload("sin", "dense", 1024, 3, 3, 3, lambda: sine),
    mlp("mlp-3-64-64-3", 1024, 3, 64, 64, 3),
    mlp("mlp-3-64-64-3-100k", 100_000, 3, 64, 64, 3),
    mlp("mlp-64-256-256-64", 256, 64, 256, 256, 64),
    mlp("mlp-3-256-512", 256, 3, 256, 512),
    mlp("mlp-512-256-3", 256, 512, 256, 3),
    mlp("autoencoder", 128, 256, 128, 4, 128, 256),
    Workload("burgers", "sparse", 64, 512, 512, 512, lambda: burgers),
    convolution("conv1d", 64, 256),
    batch_norm("batchnorm", 256, 8, 32, 32, 8),
)
"""The workloads of the project's table of measured facts, by the order in which it lists them."""

CODES: tuple[Workload, ...] = tuple(
    mlp(f"autoencoder-{width}", 128, 256, 128, width, 128, 256) for width in (2, 8, 16, 32, 64)
)
"""The autoencoder with other widths of its code, raced when asked for: where a cut stops paying must be found."""

REPLAYED: tuple[Workload, ...] = (
    mlp("mlp-2-16-2", 64, 2, 16, 2),
    mlp("mlp-6-128-128-6", 64, 6, 128, 128, 6),
    mlp("mlp-10-layers", 64, *[16] * 11),
    mlp("mlp-20-layers", 64, 3, *[32] * 19, 3),
)
"""Networks so small, or so deep, that the host's work between operators is most of their Jacobian's time."""

WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in (*ALL, *CODES, *REPLAYED)}
