"""Programs that a CUDA graph replays: one launch from the host for all of their kernels.

A graph reads and writes the memory that it was captured with. What func holds is read where it is, so no call copies
parameters, and what an optimizer writes into them is seen; a graph is captured again when one of them has other memory.
The arguments of a call are copied to memory of the graph's own, and results are returned as copies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autojac.errors import UnsupportedError
from autojac.replay.codegen import Run
from autojac.replay.trace import ProgramInputs

WARM_UPS = 3
"""Runs before the capture, in which libraries set themselves up."""
MOST_MOVES = 3
"""Captures in close succession because captured tensors moved; those that moved last are copied from then on.

A copy is one launch, and a capture several runs.
"""
STEADY_REPLAYS = 100
"""A capture that is replayed more often is worth another one."""


class RecordedKernels(NamedTuple):
    """A program's kernels: `replay` launches them, and they write `outputs`."""

    replay: Callable[[], object]
    outputs: tuple[Tensor, ...]


def capture_on_first_call(run: Run, inputs: ProgramInputs) -> Run:
    """Return a program as a CUDA graph that its first call captures.

    While the caller captures a graph of its own, the program runs as it is, as a part of that.

    Raises:
        UnsupportedError: if it writes into its inputs: the runs before a capture would do that as well.
    """
    if inputs.written:
        raise UnsupportedError("it writes into a tensor that func is given or holds, and a capture takes several runs")
    return _CapturedProgram(run, inputs.captured)


def record_kernels(run: Run, arguments: Sequence[Tensor]) -> RecordedKernels:
    """Capture a program that reads these very arguments."""
    if not all(argument.is_cuda for argument in arguments):
        raise UnsupportedError("it reads a tensor on the CPU, whose value would be frozen into a CUDA graph")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(*arguments)
    return RecordedKernels(graph.replay, outputs)


class _CapturedProgram:
    """A program and its last capture.

    Args:
        run: the program.
        captured: positions of the inputs that func holds.
    """

    def __init__(self, run: Run, captured: Sequence[int]) -> None:
        self.run = run
        self.captured = set(captured)
        self.lock = threading.Lock()
        self.kernels: RecordedKernels | None = None
        # where the kernels read captured tensors: no tensor, since what counts is where a call has it
        self.places: dict[int, tuple[Any, ...]] = {}
        self.copies: dict[int, Tensor] = {}
        self.moves = self.replays = 0

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return self.run(*arguments)
        # one memory for all threads
        with self.lock:
            moved = [at for at, place in self.places.items() if _place(arguments[at]) != place]
            kernels = self._capture(arguments, moved) if self.kernels is None or moved else self.kernels
            for at, copy in self.copies.items():
                copy.copy_(arguments[at])
            kernels.replay()
            self.replays += 1
            return tuple(output.clone() for output in kernels.outputs)

    def _capture(self, arguments: Sequence[Tensor], moved: Sequence[int]) -> RecordedKernels:
        self.moves = bool(moved) + (self.moves if self.replays <= STEADY_REPLAYS else 0)
        self.replays = 0
        if self.moves >= MOST_MOVES:
            self.captured.difference_update(moved)
        static = {at: arguments[at].detach() for at in self.captured if arguments[at].layout is torch.strided}
        copies = {at: x.detach().clone() for at, x in enumerate(arguments) if at not in static}
        homes = {tensor.untyped_storage().data_ptr() for tensor in static.values()}

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            # a view of a captured tensor would be read after that has other memory
            return tuple(y.clone() if _is_within(y, homes) else y for y in self.run(*inputs))

        inputs = [static[at] if at in static else copies[at] for at in range(len(arguments))]
        with torch.no_grad():
            kernels = record_kernels(run, inputs)
        self.places = {at: _place(tensor) for at, tensor in static.items()}
        self.kernels, self.copies = kernels, copies
        return kernels


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return where a tensor's numbers lie, and how they are read there."""
    bits = tensor.is_conj(), tensor.is_neg()
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, *bits


def _is_within(tensor: Tensor, homes: set[int]) -> bool:
    return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in homes
