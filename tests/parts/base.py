"""What a part is: a named function from (B, n) to (B, m), float64, with bounded growth.

A part is made for a width and may hold weights. It says whether it couples samples, whether it is smooth, and how many
columns it needs. Where an order counts, columns are set apart first: a tie has no one derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scenarios.base import Draw

Fn = Callable[[Tensor], Tensor]


class Shop:
    """Where weights come from; it keeps what it made."""

    def __init__(self, seed: int, trains: bool) -> None:
        self.draw = Draw(seed, torch.float64)
        self.trains = trains
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = []

    def module(self, build: Callable[[], nn.Module]) -> Any:
        made = self.draw.module(build).requires_grad_(self.trains)
        self.modules.append(made)
        return made

    def tensor(self, *shape: int) -> Tensor:
        made = (0.7 * self.draw.normal(*shape)).requires_grad_(self.trains)
        self.tensors.append(made)
        return made


@dataclass(frozen=True)
class Kind:
    """How to make a part for a width, and what is true of it.

    Attributes:
        make: gives the function for a width.
        coupled: whether an output row depends on other input rows, in its values at least.
        smooth: whether it has a second derivative everywhere, and autograd's first one is that of the values.
        least: the columns it needs.
        lone: whether it takes one sample alone.
    """

    make: Callable[[Shop, int], Fn]
    coupled: bool = False
    smooth: bool = True
    least: int = 1
    lone: bool = True


KINDS: dict[str, Kind] = {}


def plain(names: dict[str, Fn], **facts: Any) -> None:
    """Parts without weights."""
    for name, fn in names.items():
        KINDS[name] = Kind(lambda shop, width, fn=fn: fn, **facts)


def made(names: dict[str, Callable[[Shop, int], Fn]], **facts: Any) -> None:
    """Parts with weights, or that look at the width."""
    for name, make in names.items():
        KINDS[name] = Kind(make, **facts)


def layer(build: Callable[[int], nn.Module], run: Callable[[Any, Tensor], Tensor]) -> Callable[[Shop, int], Fn]:
    """A part that calls a module in its own way."""

    def make(shop: Shop, width: int) -> Fn:
        module = shop.module(lambda: build(width))
        return lambda x: run(module, x)

    return make


def apart(x: Tensor) -> Tensor:
    """Columns that differ even where a rectifier made them equal."""
    return x + 0.37 * torch.arange(x.shape[1], dtype=x.dtype, device=x.device)


def images(x: Tensor, rows: int = 2) -> Tensor:
    """(B, rows, columns): as many columns as divide."""
    return x[:, : x.shape[1] // rows * rows].unflatten(1, (rows, -1))


def matrix(x: Tensor) -> Tensor:
    """(B, 2, 2), far from singular and not symmetric."""
    return 0.3 * x[:, :4].tanh().unflatten(1, (2, 2)) + torch.tensor([[2.0, 0.5], [-0.4, 1.5]], dtype=x.dtype)
