"""What a callable reaches: the modules and tensors that its result may depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from autojac.walk import Walk


@dataclass(frozen=True)
class Captures:
    """What a callable reaches besides its arguments.

    Attributes:
        modules: distinct modules, submodules included.
        tensors: distinct parameters, buffers and captured tensors.
        opaque: something could not be followed, so there may be more.
    """

    modules: tuple[torch.nn.Module, ...]
    tensors: tuple[torch.Tensor, ...]
    opaque: bool


def captures(func: Callable[..., Any]) -> Captures:
    """List what a callable reaches through closures, globals, defaults, attributes and helper functions.

    Args:
        func: a function, module, partial, bound method or callable object.

    Returns:
        The modules and tensors in the order in which they were met.
    """
    walk = Walk()
    walk.visit(func)
    return Captures(tuple(walk.modules), tuple(walk.tensors), walk.opaque)
