"""Functions in which samples meet; the blocks are the derivatives of each sample's output in its own input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scenarios.base import Draw, Scenario, traits
from scenarios.maths import eye_like, one_hot_rows

ROWS = 6
SPRINGS = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool() & ~torch.eye(ROWS, dtype=torch.bool)


class BatchAttention(nn.Module):
    """Every sample attends to the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.query(x) @ self.key(x).T).softmax(-1) @ self.value(x)


class Coordinates(nn.Module):
    """Two sets of points, two masks, two outputs; the sets attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, x1: Tensor, x2: Tensor, mask1: Tensor, mask2: Tensor) -> tuple[Tensor, Tensor]:
        h1, h2 = self.first(x1), self.second(x2)
        scores = h1 @ h2.T
        out1 = scores.masked_fill(~mask2, -30.0).softmax(-1) @ x2
        out2 = scores.T.masked_fill(~mask1, -30.0).softmax(-1) @ x1
        return x1.sin() + out1.sum(-1, keepdim=True), out2


class MeanContext(nn.Module):
    """Each sample beside the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.head = nn.Linear(3, 4), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        context = self.encode(x).tanh().mean(0).expand(len(x), 4)
        return self.head(torch.cat([x, context], -1))


class LinearAttention(nn.Module):
    """Attention through sums over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key = nn.functional.softplus(self.query(x)), nn.functional.softplus(self.key(x))
        return query @ (key.T @ self.value(x)) / (query @ key.sum(0))[:, None]


def neighbour(x: Tensor) -> Tensor:
    return x.roll(1, 0)


def packed_springs(x: Tensor) -> Tensor:
    """Return the forces of springs of length 1 between all atoms of each of two molecules, of 2 and of 4 atoms."""
    first, second = torch.where(SPRINGS)
    bonds = x[first] - x[second]
    pulls = (bonds.square().sum(1, keepdim=True) - 1) * bonds
    return torch.zeros_like(x).index_add(0, first, pulls)


def packed_springs_jacobian(_: Any, x: Tensor) -> Tensor:
    bonds = x[:, None] - x
    stretch = torch.eye(3).to(x) * (bonds.square().sum(-1) - 1)[..., None, None]
    return ((stretch + 2 * bonds[..., :, None] * bonds[..., None, :]) * SPRINGS[..., None, None]).sum(1)


def switched(x: Tensor) -> Tensor:
    return x.sin() if x.abs().max().item() < 50 else neighbour(x)


def one_pair(x: Tensor) -> Tensor:
    y = x.sin()
    return torch.cat([y[:3], y[3:4] + x[5:6] ** 2, y[4:]])


def coordinates(draw: Draw) -> Any:
    masks = (draw.mask(ROWS), draw.mask(ROWS))
    return draw.module(Coordinates), (draw.normal(ROWS, 3), draw.normal(ROWS, 2), *masks)


def flattened(draw: Draw) -> Any:
    weight = draw.normal(ROWS * 2, ROWS * 2)

    def func(x: Tensor) -> Tensor:
        return (weight @ x.reshape(-1)).reshape(ROWS, 2)

    func.weight = weight  # type: ignore[attr-defined]
    return func, (draw.normal(ROWS, 2),)


def flattened_jacobian(func: Any, x: Tensor) -> Tensor:
    return torch.stack([func.weight[2 * b : 2 * b + 2, 2 * b : 2 * b + 2] for b in range(len(x))])


def convolution_along_batch(draw: Draw) -> Any:
    kernel = draw.normal(3, 3, 3)
    return lambda x: torch.conv1d(x.T, kernel, padding=1).T.tanh(), (draw.normal(ROWS, 3),)


def gram_jacobian(_: Any, x: Tensor) -> Tensor:
    # entry j of sample b's row is x_b·x_j
    own = torch.eye(len(x), dtype=x.dtype)[:, :, None] * x[:, None, :]
    return x.expand(len(x), *x.shape) + own


def pairs(x: Tensor) -> Tensor:
    groups = x.reshape(-1, 2, *x.shape[1:])
    return (groups * groups.sum(1, keepdim=True)).reshape(x.shape)


def pairs_jacobian(_: Any, x: Tensor) -> Tensor:
    partner = x.reshape(-1, 2, *x.shape[1:]).flip(1).reshape(x.shape)
    return (2 * x + partner).diag_embed()


def amax_jacobian(_: Any, x: Tensor) -> Tensor:
    return (1 + 1e-8 * one_hot_rows(x.argmax(0), len(x), x).T).diag_embed()


def sort_jacobian(_: Any, x: Tensor) -> Tensor:
    own = x.argsort(0) == torch.arange(len(x))[:, None]
    return own.to(x.dtype).diag_embed()


SCENARIOS = [
    Scenario(
        "minus the batch mean",
        lambda d: (lambda x: x - x.mean(0), (d.normal(ROWS, 3),)),
        "dense",
        jacobian=lambda _, x: eye_like(x, 1 - 1 / len(x)),
        traits=traits("conserved"),
    ),
    Scenario(
        "minus the batch mean, scalar samples",
        lambda d: (lambda x: x - x.mean(), (d.normal(ROWS),)),
        "dense",
        jacobian=lambda _, x: torch.full_like(x, 1 - 1 / len(x)),
        traits=traits("conserved"),
    ),
    Scenario(
        "softmax over the batch",
        lambda d: (lambda x: x.softmax(0), (d.normal(ROWS, 3),)),
        "dense",
        jacobian=lambda _, x: (x.softmax(0) * (1 - x.softmax(0))).diag_embed(),
        traits=traits("conserved"),
    ),
    Scenario("attention over the batch", lambda d: (d.module(BatchAttention), (d.normal(ROWS, 3),)), "dense"),
    Scenario("two inputs, coupled by attention", coordinates, "dense", argnums=(0, 1), traits=traits("masked")),
    Scenario("mean of the batch as context", lambda d: (d.module(MeanContext), (d.normal(ROWS, 3),)), "dense"),
    Scenario("linear attention", lambda d: (d.module(LinearAttention), (d.normal(ROWS, 3),)), "dense"),
    Scenario(
        "roll over the batch",
        lambda d: (neighbour, (d.normal(ROWS, 3),)),
        "dense",
        jacobian=lambda _, x: torch.zeros(*x.shape, x.shape[-1], dtype=x.dtype),
    ),
    Scenario(
        "times the neighbour",
        lambda d: (lambda x: x * neighbour(x), (d.normal(ROWS, 3),)),
        "dense",
        jacobian=lambda _, x: neighbour(x).diag_embed(),
    ),
    Scenario(
        "cumsum over the batch",
        lambda d: (lambda x: x.cumsum(0), (d.normal(ROWS, 3),)),
        "dense",
        jacobian=lambda _, x: eye_like(x),
    ),
    Scenario(
        "sort over the batch",
        lambda d: (lambda x: x.sort(0).values, (d.normal(ROWS, 3),)),
        "dense",
        jacobian=sort_jacobian,
    ),
    Scenario(
        "BatchNorm in train mode",
        lambda d: (
            d.module(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))),
            (d.normal(ROWS, 3),),
        ),
        "dense",
        traits=traits("stateful"),
    ),
    Scenario(
        "last sample reads the first",
        lambda d: (lambda x: torch.cat([x[:-1], x[-1:] + x[:1].sin()]), (d.normal(ROWS, 3),)),
        "dense",
        jacobian=lambda _, x: eye_like(x),
    ),
    Scenario(
        "one pair in the middle",
        lambda d: (one_pair, (d.normal(ROWS, 3),)),
        "dense",
        jacobian=lambda _, x: x.cos().diag_embed(),
    ),
    Scenario("groups of two", lambda d: (pairs, (d.normal(ROWS, 3),)), "dense", jacobian=pairs_jacobian),
    Scenario(
        "max over the batch, tiny",
        lambda d: (lambda x: x + 1e-8 * x.amax(0), (d.normal(ROWS, 3),)),
        "dense",
        jacobian=amax_jacobian,
    ),
    Scenario("linear over the flattened batch", flattened, "dense", jacobian=flattened_jacobian),
    Scenario("convolution along the batch", convolution_along_batch, "dense"),
    Scenario("Gram matrix", lambda d: (lambda x: x @ x.T, (d.normal(ROWS, 3),)), "dense", jacobian=gram_jacobian),
    Scenario(
        "neighbours by a side input",
        lambda d: (lambda x, index: x * x[index].sin(), (d.normal(ROWS, 3), (torch.arange(ROWS) + 2) % ROWS)),
        "dense",
        jacobian=lambda _, x, index: x[index].sin().diag_embed(),
        traits=traits("masked"),
    ),
    Scenario(
        "packed molecules",
        lambda d: (packed_springs, (d.normal(ROWS, 3),)),
        "dense",
        jacobian=packed_springs_jacobian,
        traits=traits("conserved"),
    ),
    Scenario(
        "NaN stopped on the way",
        lambda d: (lambda x: x + neighbour(x).nan_to_num(), (d.normal(ROWS, 3),)),
        "dense",
        jacobian=lambda _, x: eye_like(x),
    ),
    Scenario(
        "dead coupling",
        lambda d: (lambda x: x + (neighbour(x) - 100).relu(), (d.normal(ROWS, 3),)),
        "dense",
        jacobian=lambda _, x: eye_like(x),
        traits=traits("hidden"),
    ),
    Scenario(
        "coupling above a threshold",
        lambda d: (lambda x: torch.where(x > 50, neighbour(x), x), (d.normal(ROWS, 3),)),
        "dense",
        jacobian=lambda _, x: eye_like(x),
        traits=traits("hidden"),
    ),
    Scenario(
        "coupling behind a branch",
        lambda d: (switched, (d.normal(ROWS, 3),)),
        "dense",
        jacobian=lambda _, x: x.cos().diag_embed(),
        traits=traits("hidden", "no_vmap", "data_dependent"),
    ),
    Scenario(
        "coupling times zero",
        lambda d: (lambda x: x.sin() + 0 * neighbour(x), (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: x.cos().diag_embed(),
        traits=traits("dense_accepted"),
    ),
    Scenario(
        "coupling detached",
        lambda d: (lambda x: x.sin() + neighbour(x).detach(), (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: x.cos().diag_embed(),
        traits=traits("dense_accepted", "not_sliceable", "kink"),
    ),
]
