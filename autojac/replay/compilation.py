"""Programs that torch's compiler makes one graph of, and what runs where it does not."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from autojac.autodiff.open_modes import levels_restored
from autojac.guards.process_state import ignore_warnings
from autojac.replay.codegen import Run
from autojac.torch_internals import DisableAutocast, compile_graph

USUAL = {"darwin": "clang++", "win32": "cl"}
"""The C++ compiler that torch asks for where the variable CXX names none; g++ elsewhere."""


def missing(device: torch.device) -> str | None:
    """Return what torch's compiler lacks on this machine, as a sentence; None if it has what it needs.

    Without a C++ compiler it would spend 13 s on finding out, in every process.
    """
    name = os.environ.get("CXX", USUAL.get(sys.platform, "g++"))
    if not _installed(name, os.environ.get("PATH")):
        return f"torch.compile needs a C++ compiler, and {name} was not found. Install it, or name another one in CXX"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton on a CUDA device. Install triton"
    return None


@functools.cache
def _installed(name: str, path: str | None) -> bool:
    return shutil.which(name, path=path) is not None


def lower(run: Run, strict: bool, repeatable: bool) -> Run:
    """Return a program of plain operators as what Inductor makes of it for the tensors of its first call.

    Dynamo, whose guards take 35 µs in each call, is left out: the trace has guards of its own.

    Args:
        run: the program.
        strict: raise what the compiler raises; the program itself runs from then on otherwise.
        repeatable: whether the program does nothing but return, so that it may run after a compiled run that failed.
    """
    compiled: Run | None = None
    lock = threading.Lock()

    def program(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nonlocal compiled
        if compiled is None:
            with lock:
                compiled = compiled or _compile_if_possible(run, inputs, strict, repeatable)
        return tuple(compiled(*inputs))

    return program


def _compile_if_possible(run: Run, inputs: tuple[torch.Tensor, ...], strict: bool, repeatable: bool) -> Run:
    try:
        compiled = _run_inductor(run, [x.detach() for x in inputs])
    except Exception:  # whatever a compiler raises
        if strict:
            raise
        return run
    return _Attempt(run, compiled, strict) if repeatable else compiled


class _Attempt:
    """A program that runs compiled until that raises what it does not raise itself.

    Args:
        program: as it is.
        compiled: what the compiler made of it.
        strict: raise what the compiled one raises.
    """

    def __init__(self, program: Run, compiled: Run, strict: bool) -> None:
        self.program, self.next, self.strict = program, compiled, strict

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        try:
            return self.next(*inputs)
        except Exception:
            if self.strict or self.next is self.program:
                raise
        outputs = self.program(*inputs)
        self.next = self.program
        return outputs


def _run_inductor(run: Run, inputs: list[Any]) -> Callable[..., tuple[torch.Tensor, ...]]:
    # the compiler's own imports warn, which must not reach a user who turns warnings into errors
    with ignore_warnings(), levels_restored(), torch.no_grad(), DisableAutocast():
        from torch.fx.experimental.proxy_tensor import make_fx

        graph = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        return compile_graph(graph, inputs)
