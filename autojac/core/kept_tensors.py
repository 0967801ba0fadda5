"""Tensors that are made once for each device, or device and dtype, that asks for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class KeptTensors(Generic[T]):
    """What was made under a key, to be used again; a compiler that traces gets what is made for it.

    What it sees while it traces stands for tensors of its own, which nobody else may be given.
    """

    def __init__(self) -> None:
        self.made: dict[Hashable, T] = {}

    def get(self, key: Hashable, make: Callable[..., T], *arguments: Any) -> T:
        """Return what is kept under a key; at its first use it is made of the arguments."""
        if torch.compiler.is_compiling():
            return make(*arguments)
        if key not in self.made:
            self.made[key] = make(*arguments)
        return self.made[key]
