"""Programs that torch's compiler makes one graph of, and what runs where it does not."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

from autojac.autodiff.open_modes import levels_restored
from autojac.autodiff.primitives import compile_flat
from autojac.guards.process_state import unwarned
from autojac.replay.codegen import Run
from autojac.torch_internals import DisableAutocast, compile_graph

P = ParamSpec("P")
T = TypeVar("T")
USUAL = {"darwin": "clang++", "win32": "cl"}
"""The C++ compiler that torch asks for where the variable CXX names none; g++ elsewhere."""


def missing(device: str) -> str | None:
    """Return what torch's compiler lacks on this machine, as a sentence; None if it has what it needs.

    Without a C++ compiler it would spend 13 s on finding out, in every process.
    """
    name = os.environ.get("CXX", USUAL.get(sys.platform, "g++"))
    if not _installed(name, os.environ.get("PATH")):
        return f"torch.compile needs a C++ compiler, and {name} was not found. Install it, or name another one in CXX"
    if device.startswith("cuda") and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton on a CUDA device. Install triton"
    return None


@functools.cache
def _installed(name: str, path: str | None) -> bool:
    return shutil.which(name, path=path) is not None


def compiled(program: Callable[P, T], strict: bool) -> Callable[P, T]:
    """Return a program as one compiled graph, whose first call compiles it and leaves no trace.

    Args:
        program: it does nothing but return.
        strict: raise what the compiler raises; the program itself runs from then on otherwise.
    """
    # the compiler keeps its entries, and its limit on them, on the code object: each plan needs its own
    code, names = program.__code__.replace(), program.__globals__
    flat = compile_flat(types.FunctionType(code, names, program.__name__, None, program.__closure__))

    def first(*args: P.args, **kwargs: P.kwargs) -> T:
        with _silently():
            made: T = flat(*args, **kwargs)
        return made

    return _Attempt(program, first, flat, strict)


def lowered(run: Run, strict: bool, repeatable: bool) -> Run:
    """Return a program of plain operators as what Inductor makes of it for the tensors of its first call.

    What Dynamo would guard in each call, 35 µs, a trace's own guards have looked at.

    Args:
        run: the program.
        strict: raise what the compiler raises; the program itself runs from then on otherwise.
        repeatable: whether the program does nothing but return, so that it may run after a compiled run that failed.
    """
    made: Run | None = None
    lock = threading.Lock()

    def program(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nonlocal made
        if made is None:
            with lock:
                made = made or _compiled_or_itself(run, inputs, strict, repeatable)
        return tuple(made(*inputs))

    return program


def _compiled_or_itself(run: Run, inputs: tuple[torch.Tensor, ...], strict: bool, repeatable: bool) -> Run:
    try:
        made = _inducted(run, [x.detach() for x in inputs])
    except Exception:  # whatever a compiler raises
        if strict:
            raise
        return run
    return _Attempt(run, made, made, strict) if repeatable else made


class _Attempt:
    """A program that runs compiled until that raises what it does not raise itself.

    Args:
        program: as it is.
        first, flat: compiled, for the first call and for all others.
        strict: raise what the compiled one raises.
    """

    def __init__(self, program: Callable[..., Any], first: Any, flat: Any, strict: bool) -> None:
        self.program, self.next, self.flat, self.strict = program, first, flat, strict

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            made = self.next(*args, **kwargs)
        except Exception:
            if self.strict or self.next is self.program:
                raise
            made = self.program(*args, **kwargs)
            self.next = self.flat = self.program
            return made
        self.next = self.flat
        return made


def _inducted(run: Run, inputs: list[Any]) -> Callable[..., tuple[torch.Tensor, ...]]:
    with _silently(), torch.no_grad(), DisableAutocast():
        from torch.fx.experimental.proxy_tensor import make_fx

        graph = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        return compile_graph(graph, inputs)


@contextmanager
def _silently() -> Iterator[None]:
    # the compiler's own imports warn, which must not reach a user who turns warnings into errors
    with unwarned(), levels_restored():
        yield
