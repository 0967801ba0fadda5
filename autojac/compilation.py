"""Programs that torch.compile has made one graph of."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from autojac.autodiff import compile_flat, levels_restored

P = ParamSpec("P")
T = TypeVar("T")


def compiled(program: Callable[P, T]) -> Callable[P, T]:
    """A program as one compiled graph, whose first call compiles it and leaves no trace."""
    # the compiler keeps its entries, and its limit on them, on the code object: each plan needs its own
    code, names = program.__code__.replace(), program.__globals__
    flat = compile_flat(types.FunctionType(code, names, program.__name__, None, program.__closure__))
    warmed = False

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal warmed
        if warmed:
            made: T = flat(*args, **kwargs)
            return made
        with warnings.catch_warnings(), levels_restored():
            # the compiler's own imports warn, which must not reach a user who turns warnings into errors
            warnings.simplefilter("ignore")
            made = flat(*args, **kwargs)
        warmed = True
        return made

    return run
