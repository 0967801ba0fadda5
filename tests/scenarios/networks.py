"""Independent functions as people train them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scenarios.base import Draw, Scenario, traits

ROWS = 5


class TwoStreams(nn.Module):
    """Two inputs, two masks, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.joint = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x1: Tensor, x2: Tensor, mask1: Tensor, mask2: Tensor) -> tuple[Tensor, Tensor]:
        h1 = self.first(x1 * mask1).tanh()
        h2 = self.second(x2 * mask2).tanh()
        return self.joint(h1 * h2), h1.sum(-1) + h2.prod(-1)


class Tokens(nn.Module):
    """A continuous input beside integer tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.head((x * self.table(tokens)).tanh())


def two_streams(draw: Draw) -> Any:
    masks = (draw.mask(ROWS, 4).to(draw.dtype), draw.mask(ROWS, 3).to(draw.dtype))
    return draw.module(TwoStreams), (draw.normal(ROWS, 4), draw.normal(ROWS, 3), *masks)


def score(draw: Draw) -> Any:
    net = draw.mlp(3, 6, 1)

    def gradient_of_net(x: Tensor) -> Tensor:
        return torch.vmap(torch.func.grad(lambda row: net(row).sum()))(x)

    return gradient_of_net, (draw.normal(ROWS, 3),)


def zero_headed(draw: Draw) -> nn.Module:
    net = draw.mlp(3, 6, 2)
    for parameter in net[-1].parameters():  # type: ignore[index]
        nn.init.zeros_(parameter)
    return net


def linear_jacobian(net: nn.Linear, x: Tensor) -> Tensor:
    return net.weight.detach().expand(len(x), *net.weight.shape)


def layer_norm_jacobian(_: Any, x: Tensor) -> Tensor:
    n = x.shape[-1]
    deviation = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    z = (x - x.mean(-1, keepdim=True)) / deviation
    eye = torch.eye(n, dtype=x.dtype)
    return (eye - 1 / n - z[..., None] * z[..., None, :] / n) / deviation[..., None]


SCENARIOS = [
    Scenario("linear", lambda d: (d.module(lambda: nn.Linear(5, 3)), (d.normal(ROWS, 5),)), jacobian=linear_jacobian),
    Scenario("MLP, wide to narrow", lambda d: (d.mlp(12, 8, 2), (d.normal(ROWS, 12),))),
    Scenario("MLP, narrow to wide", lambda d: (d.mlp(2, 8, 12), (d.normal(ROWS, 2),))),
    Scenario("MLP, square", lambda d: (d.mlp(3, 8, 8, 3), (d.normal(ROWS, 3),))),
    Scenario("MLP, batch as long as input and output", lambda d: (d.mlp(4, 4, 4), (d.normal(4, 4),))),
    Scenario("autoencoder", lambda d: (d.mlp(10, 6, 2, 6, 10), (d.normal(4, 10),))),
    Scenario(
        "convolution in a sample",
        lambda d: (
            d.module(lambda: nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv1d(2, 1, 3, padding=1))),
            (d.normal(3, 1, 8),),
        ),
    ),
    Scenario(
        "image convolution",
        lambda d: (
            d.module(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Softplus(), nn.Flatten())),
            (d.normal(3, 2, 4, 4),),
        ),
    ),
    Scenario(
        "LayerNorm inside",
        lambda d: (
            d.module(lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))),
            (d.normal(ROWS, 4),),
        ),
    ),
    Scenario(
        "LayerNorm last",
        lambda d: (d.module(lambda: nn.LayerNorm(4)), (d.normal(ROWS, 4),)),
        jacobian=layer_norm_jacobian,
        traits=traits("conserved"),
    ),
    Scenario(
        "softmax inside",
        lambda d: (
            d.module(lambda: nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 3))),
            (d.normal(ROWS, 4),),
        ),
    ),
    Scenario(
        "last layer initialised to zero",
        lambda d: (zero_headed(d), (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: torch.zeros(len(x), 2, 3, dtype=x.dtype),
    ),
    Scenario(
        "BatchNorm in eval mode",
        lambda d: (
            d.module(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))).eval(),
            (d.normal(ROWS, 4),),
        ),
    ),
    Scenario("two inputs, two masks, two outputs", two_streams, argnums=(0, 1), traits=traits("masked")),
    Scenario(
        "embedding of a side input",
        lambda d: (d.module(Tokens), (d.normal(ROWS, 4), d.integers(7, ROWS))),
        traits=traits("masked"),
    ),
    Scenario("score of a network", score),
]
