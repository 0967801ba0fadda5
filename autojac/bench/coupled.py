"""Functions with many zeros that are no `Workload`: one without a batch, and points that see their neighbours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

A, B, DIFFUSION = 3.4, 1.0, 0.1


def brusselator(size: int) -> Callable[[Tensor], Tensor]:
    """Right-hand side of the 2-D Brusselator on a periodic grid of `size` × `size` cells: u and v, (2·size²,).

    u' = B + u²v − (A + 1)u + α Δu and v' = Au − u²v + α Δv, as in Hairer & Wanner, "Solving Ordinary Differential
    Equations II", IV.10; the unit square, 5-point differences.
    """
    strength = DIFFUSION * size * size

    def laplacian(z: Tensor) -> Tensor:
        return z.roll(1, 0) + z.roll(-1, 0) + z.roll(1, 1) + z.roll(-1, 1) - 4 * z

    def func(state: Tensor) -> Tensor:
        u, v = state.view(2, size, size)
        reaction = u * u * v
        du = B + reaction - (A + 1) * u + strength * laplacian(u)
        dv = A * u - reaction + strength * laplacian(v)
        return torch.stack((du, dv)).view(-1)

    return func


class Neighbours(nn.Module):
    """A round of messages between points (B, 3), each from its nearest neighbours, weighed by softmax: (B, 3)."""

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)

    def forward(self, points: Tensor) -> Tensor:
        offsets = points[self.index] - points[:, None]
        weights = torch.softmax(-offsets.square().sum(-1), dim=1)
        return torch.tanh(points + (weights[..., None] * offsets).sum(1))


def cloud(count: int, neighbours: int) -> tuple[Neighbours, Tensor]:
    """Points in the unit cube, in an order in which near ones are near, and what they say to each other."""
    # scipy takes 0.2 s to import
    from scipy.spatial import cKDTree

    points = np.random.default_rng(0).random((count, 3), dtype=np.float32)
    points = points[cKDTree(points).indices]
    _, found = cKDTree(points).query(points, neighbours + 1)
    return Neighbours(torch.from_numpy(found[:, 1:].astype(np.int64))), torch.from_numpy(points)
