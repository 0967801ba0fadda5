"""Programs that a CUDA graph replays: one launch from the host for all of their kernels."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from autojac.errors import UnsupportedError
from autojac.replay.codegen import Run

WARM_UPS = 3
"""Runs before the capture, in which libraries set themselves up."""


def capture_on_first_call(run: Run) -> Run:
    """Return a program as a CUDA graph that its first call captures.

    A graph reads and writes the memory that it was captured with, so every call copies its arguments there, and
    returns copies. While the caller captures a graph of its own, the program runs as it is, as a part of that.
    """
    return _CapturedProgram(run)


class _CapturedProgram:
    def __init__(self, run: Run) -> None:
        self.run = run
        self.lock = threading.Lock()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.arguments: list[Tensor] = []
        self.outputs: tuple[Tensor, ...] = ()

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        if torch.cuda.is_current_stream_capturing():
            return self.run(*arguments)
        # one memory for all threads
        with self.lock:
            graph = self.graph or self._capture(arguments)
            for own, given in zip(self.arguments, arguments, strict=True):
                own.copy_(given)
            graph.replay()
            return tuple(output.clone() for output in self.outputs)

    def _capture(self, arguments: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        if not all(argument.is_cuda for argument in arguments):
            raise UnsupportedError("it reads a tensor on the CPU, whose value would be frozen into a CUDA graph")
        self.arguments = [argument.detach().clone() for argument in arguments]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.run(*self.arguments)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            self.outputs = self.run(*self.arguments)
        self.graph = graph
        return graph
