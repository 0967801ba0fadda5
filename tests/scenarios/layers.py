"""Layers of torch.nn, one or two at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scenarios.base import Draw, Scenario, traits

ROWS = 4


class Read(nn.Module):
    """A recurrent layer, of which the last state is read."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.layer(x)
        return self.head(states[:, -1])


class Steps(nn.Module):
    """A recurrent cell, stepped by hand; returns every state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        states = []
        for step in x.unbind(1):
            state = self.cell(step, state)
            states.append(state)
        return torch.stack(states, 1)


class LongShort(nn.Module):
    """An LSTM cell with its two states in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(2, 3)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.cell(x, state)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]


class Weighted(nn.Module):
    """Attention that returns its weights too."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(x, x.sin(), x)


def layer(build: Callable[[], nn.Module], *shape: int) -> Callable[[Draw], Any]:
    """A layer with an input of such samples."""
    return lambda draw: (draw.module(build), (draw.normal(ROWS, *shape),))


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)


def recurrent_cell(cell: Callable[[], nn.Module]) -> Callable[[Draw], Any]:
    return lambda draw: (draw.module(lambda: Steps(cell())), (draw.normal(ROWS, 3, 2), draw.normal(ROWS, 3)))


def bilinear(draw: Draw) -> Any:
    return draw.module(lambda: nn.Bilinear(3, 2, 2)), (draw.normal(ROWS, 3), draw.normal(ROWS, 2))


def bilinear_jacobian(net: nn.Bilinear, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    weight = net.weight.detach()
    return torch.einsum("jkl,bl->bjk", weight, z), torch.einsum("jkl,bk->bjl", weight, x)


def attended(x: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x.sin(), x, attn_mask=mask[:, None])


def keeping_own(draw: Draw, *shape: int) -> Tensor:
    """A mask in which every query may see itself."""
    return draw.mask(*shape) | torch.eye(shape[-1], dtype=torch.bool)


SCENARIOS = [
    Scenario("LSTM", layer(lambda: Read(nn.LSTM(2, 3, batch_first=True)), 3, 2), traits=traits("no_vmap")),
    Scenario(
        "RNN of two layers", layer(lambda: Read(nn.RNN(2, 3, 2, batch_first=True)), 3, 2), traits=traits("no_vmap")
    ),
    Scenario("GRU cell", recurrent_cell(lambda: nn.GRUCell(2, 3)), argnums=(0, 1)),
    Scenario("RNN cell", recurrent_cell(lambda: nn.RNNCell(2, 3)), argnums=(0, 1)),
    Scenario(
        "LSTM cell, states nested",
        lambda d: (d.module(LongShort), (d.normal(ROWS, 2), (d.normal(ROWS, 3), d.normal(ROWS, 3)))),
        argnums=(0, 1),
    ),
    Scenario(
        "attention of three axes",
        lambda d: (lambda x: F.scaled_dot_product_attention(x, x.sin(), x), (d.normal(ROWS, 3, 2),)),
    ),
    Scenario(
        "causal attention",
        lambda d: (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), (d.normal(ROWS, 2, 3, 2),)),
        traits=traits("no_forward_ad"),
    ),
    Scenario(
        "masked attention",
        lambda d: (attended, (d.normal(ROWS, 2, 3, 2), keeping_own(d, ROWS, 3, 3))),
        traits=traits("masked", "no_forward_ad"),
    ),
    Scenario(
        "MultiheadAttention with padding",
        lambda d: (d.module(SelfAttention), (d.normal(ROWS, 3, 4), torch.arange(3) >= d.integers(3, ROWS, 1) + 1)),
        traits=traits("masked", "no_forward_ad"),
    ),
    Scenario("MultiheadAttention with its weights", layer(Weighted, 3, 4)),
    Scenario("TransformerEncoderLayer in train mode", layer(transformer, 3, 4), traits=traits("no_forward_ad")),
    Scenario(
        "TransformerEncoderLayer in eval mode",
        layer(lambda: transformer().eval(), 3, 4),
        traits=traits("no_forward_ad"),
    ),
    Scenario("Bilinear", bilinear, argnums=(0, 1), jacobian=bilinear_jacobian),
    Scenario("GroupNorm", layer(lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Tanh()), 4, 2)),
    Scenario("InstanceNorm", layer(lambda: nn.Sequential(nn.InstanceNorm1d(2, affine=True), nn.Tanh()), 2, 4)),
    Scenario("RMSNorm", layer(lambda: nn.RMSNorm(4, eps=1e-5), 4)),
    Scenario("LocalResponseNorm", layer(lambda: nn.LocalResponseNorm(2, alpha=1.0), 3, 2)),
    Scenario(
        "PReLU",
        layer(lambda: nn.PReLU(3), 3),
        jacobian=lambda net, x: torch.where(x > 0, 1, net.weight.detach()).diag_embed(),
        traits=traits("no_vmap_jacrev"),
    ),
    Scenario("gated linear unit", layer(lambda: nn.Sequential(nn.Linear(3, 6), nn.GLU()), 3)),
    Scenario("Conv1d, strided and dilated", layer(lambda: nn.Conv1d(2, 2, 3, stride=2, dilation=2), 2, 8)),
    Scenario(
        "Conv2d by depth, circular",
        layer(lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2, padding_mode="circular"), 2, 3, 3),
    ),
    Scenario("Conv3d", layer(lambda: nn.Conv3d(1, 2, 2), 1, 2, 3, 2)),
    Scenario("ConvTranspose1d", layer(lambda: nn.ConvTranspose1d(2, 1, 3, stride=2), 2, 3)),
    Scenario("ConvTranspose2d", layer(lambda: nn.ConvTranspose2d(1, 2, 2, stride=2), 1, 2, 2)),
    Scenario("max pooling", layer(lambda: nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), 1, 4, 4)),
    Scenario("average pooling", layer(lambda: nn.Sequential(nn.Tanh(), nn.AvgPool1d(3, 1)), 2, 5)),
    Scenario("adaptive pooling", layer(lambda: nn.Sequential(nn.Tanh(), nn.AdaptiveAvgPool2d((2, 1))), 1, 3, 3)),
    Scenario(
        "bilinear upsampling", layer(lambda: nn.Sequential(nn.Tanh(), nn.Upsample((3, 4), mode="bilinear")), 1, 2, 2)
    ),
    Scenario("pixel shuffle", layer(lambda: nn.Sequential(nn.Tanh(), nn.PixelShuffle(2)), 4, 1, 2)),
    Scenario("pixel unshuffle", layer(lambda: nn.Sequential(nn.Tanh(), nn.PixelUnshuffle(2)), 1, 2, 4)),
]
