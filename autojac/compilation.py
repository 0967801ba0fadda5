"""Programs that torch's compiler has made one graph of."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

from autojac.autodiff import compile_flat, levels_restored
from autojac.process import unwarned
from autojac.program import Run

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
        with _silently():
            made = flat(*args, **kwargs)
        warmed = True
        return made

    return run


def lowered(run: Run) -> Run:
    """A program of plain operators as what Inductor makes of it for the tensors of its first call.

    What Dynamo would guard in each call, 35 µs, a trace's own guards have looked at.
    """
    made: Callable[..., tuple[torch.Tensor, ...]] | None = None
    lock = threading.Lock()

    def program(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nonlocal made
        if made is None:
            with lock:
                made = made or _inducted(run, [x.detach() for x in inputs])
        return tuple(made(*inputs))

    return program


def _inducted(run: Run, inputs: list[Any]) -> Callable[..., tuple[torch.Tensor, ...]]:
    with _silently(), torch.no_grad(), torch._C._DisableAutocast():
        from torch.fx.experimental.proxy_tensor import make_fx

        graph = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        made: Callable[..., tuple[torch.Tensor, ...]] = torch._inductor.compile(graph, inputs)
    return made


@contextmanager
def _silently() -> Iterator[None]:
    # the compiler's own imports warn, which must not reach a user who turns warnings into errors
    with unwarned(), levels_restored():
        yield
