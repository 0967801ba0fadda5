"""torch's compiler around autojac, and inside of what is differentiated."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
K = TypeVar("K", bound=type)


def opaque(function: F) -> F:
    """Keep the compiler out of a function and of all that it calls: where compiled code meets it, it runs as it is.

    `torch.compiler.disable` would import the compiler (1 s) and cost each call 2 µs; what it marks is marked here. A
    torch that has other marks compiles what it can, which is slow and right.
    """
    marked: Any = function
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = "autojac plans, measures and checks while it runs"
    with suppress(AttributeError):
        frames: Any = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(marked.__code__, frames._FrameExecStrategy(skip, skip))
    return function


def opaque_methods(kind: K) -> K:
    """A class whose public methods, inherited ones included, are opaque to the compiler."""
    for base in kind.__mro__:
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType) and (name == "__call__" or not name.startswith("_")):
                opaque(value)
    return kind
