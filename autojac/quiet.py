"""Evaluation without a trace: random state and captured tensors are put back.

Probing, tuning and checking call func many times. `Quiet` gives each of those calls the same random state and the
same captured tensors, and puts both back afterwards.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff import saved_tensors_apart, version_kept
from autojac.escapes import home


def random_state() -> tuple[Any, ...]:
    """The state of every generator that a function may draw from: torch, its GPUs, Python and NumPy."""
    numpy_random = sys.modules.get("numpy.random")
    return (
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        random.getstate(),
        numpy_random.get_state() if numpy_random is not None else None,
    )


def restore_random_state(state: tuple[Any, ...]) -> None:
    cpu, cuda, python, numpy_state = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    if numpy_state is not None:
        sys.modules["numpy.random"].set_state(numpy_state)


def same_random_state(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return (
        torch.equal(one[0], other[0])
        and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=False))
        and one[2] == other[2]
        # a generator that was only imported in between has not been drawn from
        and (one[3] is None or repr(one[3]) == repr(other[3]))
    )


@contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection, in which code runs and memory goes that is not the function's."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keep the user's tensor hooks from firing on gradients that tuning takes for itself."""
    hooked = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]
    for tensor, _ in hooked:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks


def same_bits(copy: Tensor, leaf: Tensor) -> bool:
    """Whether two tensors hold the same bytes, nan included."""
    if not copy.numel() or copy.layout != torch.strided:
        return True
    # a single element counts as contiguous whatever its strides, but can't be viewed as bytes with them
    flat = (t.detach().contiguous().as_strided((t.numel(),), (1,)) for t in (copy, leaf))
    one, other = (t.view(torch.uint8) for t in flat)
    return torch.equal(one, other)


def without_graph(tensors: Sequence[Tensor]) -> None:
    """Take away the graph that came with what func wrote into its own tensors: they hold numbers and train nothing."""
    for tensor in tensors:
        if tensor.requires_grad:
            with suppress(RuntimeError):  # a view has the graph of what it is a view of
                tensor.detach_()


class Quiet:
    """Evaluations of func that leave random state and captured tensors as they were.

    Args:
        captured: tensors that func reaches and might write into.
        state: random state that every evaluation starts from; the current one by default.

    Attributes:
        written: the captured tensors that an evaluation wrote into, or gave other memory.
        exchanged: whether one was given other memory.
    """

    def __init__(self, captured: Sequence[Tensor], state: tuple[Any, ...] | None = None) -> None:
        self.captured = [tensor for tensor in captured if not (tensor.is_inference() or tensor.is_meta)]
        self.state = random_state() if state is None else state
        self.written: list[Tensor] = []
        self.exchanged = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        outside = random_state()
        hooks = saved_tensors_apart()
        versions = [tensor._version for tensor in self.captured]
        plain = [tensor for tensor in self.captured if not tensor.requires_grad]
        saved = [tensor.detach().clone() for tensor in self.captured]
        memory = [(home(tensor), tensor.data) for tensor in self.captured]
        restore_random_state(self.state)
        try:
            with hooks:
                yield
        finally:
            restore_random_state(outside)
            with torch.no_grad():
                for tensor, version, copy, (place, data) in zip(self.captured, versions, saved, memory, strict=True):
                    exchanged = home(tensor) != place
                    if exchanged:
                        tensor.data = data
                        self.exchanged = True
                    # Batch norm's kernel writes its running statistics without moving their version, and they are put
                    # back so too: graphs that have saved them stay what they were.
                    moved = exchanged or tensor._version != version
                    if moved or not same_bits(tensor, copy):
                        if not any(tensor is known for known in self.written):
                            self.written.append(tensor)
                        with nullcontext() if moved else version_kept(tensor):
                            tensor.detach().copy_(copy)
            without_graph(plain)
