"""Tensors that are made once for each device, or device and dtype, that asks for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class KeptTensors(Generic[T]):
    """What was made under a key, to be used again."""

    def __init__(self) -> None:
        self.made: dict[Hashable, T] = {}

    def get(self, key: Hashable, make: Callable[..., T], *arguments: Any) -> T:
        """Return what is kept under a key; at its first use it is made of the arguments."""
        if key not in self.made:
            self.made[key] = make(*arguments)
        return self.made[key]
