"""What a plan is made for: the shapes, roles and flags of one kind of call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from autojac.torch_internals import deterministic_algorithms, is_any_autocast_enabled, matmul_precision

Layout = Literal["blocks", "full", "sparse", "diagonal"]


def bucket(batch: int) -> int:
    """Return the smallest power of two that holds `batch` samples; batch sizes of one bucket share a plan."""
    return 1 << (batch - 1).bit_length() if batch > 0 else 0


FLAG_NAMES = ("default_dtype", "threads", "deterministic", "matmul_precision", "autocast", "training")


def current_flags(modules: Iterable[torch.nn.Module]) -> tuple[Any, ...]:
    """Return what besides shapes changes numerics or speed, in the order of `FLAG_NAMES`; part of every call."""
    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        deterministic_algorithms(),
        matmul_precision(),
        _autocast() if is_any_autocast_enabled() else (False, False),
        tuple([module.training for module in modules]),
    )


def _autocast() -> tuple[Any, Any]:
    """Return the dtype that autocast casts to on the CPU and on CUDA, or False."""
    cpu, cuda = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return cpu and torch.get_autocast_dtype("cpu"), cuda and torch.get_autocast_dtype("cuda")


def named_flags(flags: tuple[Any, ...]) -> tuple[tuple[str, Any], ...]:
    """Return flags as JSON values with their names, for a key."""
    dtype, threads, deterministic, precision, autocast, training = flags
    modes = "".join("t" if mode else "e" for mode in training)
    plain = (str(dtype), threads, deterministic, precision, str(autocast), modes)
    return tuple(zip(FLAG_NAMES, plain, strict=True))


@dataclass(frozen=True)
class Leaf:
    """One tensor among the positional arguments.

    Attributes:
        shape: full shape, batch axis first if `batched`.
        dtype, device: as strings, e.g. `float32` and `cpu`.
        batched: whether axis 0 runs over samples.
        differentiated: whether the Jacobian is taken with respect to it.
    """

    shape: tuple[int, ...]
    dtype: str
    device: str
    batched: bool
    differentiated: bool

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape without the batch axis."""
        return self.shape[1:] if self.batched else self.shape


@dataclass(frozen=True)
class Signature:
    """Shapes, roles and flags of a call; equal signatures share a plan.

    Attributes:
        leaves: the tensors of the positional arguments, in pytree order.
        outputs: event shapes of the function's outputs, in pytree order.
        batch: number of samples B.
        context: the arguments' nesting, constants among them and the keyword arguments' kinds, as text.
        layout: layout of the Jacobian.
        differentiable: whether the Jacobian itself carries a graph.
        flags: (name, value) pairs that change numerics or speed (autocast, threads, train/eval, ...).
    """

    leaves: tuple[Leaf, ...]
    outputs: tuple[tuple[int, ...], ...]
    batch: int
    context: str
    layout: Layout
    differentiable: bool
    flags: tuple[tuple[str, Any], ...]

    def round_up_batch(self) -> Signature:
        """Return the signature with its batch size rounded up to its bucket: what a stored plan is keyed by."""
        size = bucket(self.batch)
        leaves = tuple(replace(leaf, shape=(size, *leaf.shape[1:])) if leaf.batched else leaf for leaf in self.leaves)
        return replace(self, leaves=leaves, batch=size)

    def without_batch(self) -> Signature:
        """Return the signature with its batch size left open: what neighbouring shapes have in common."""
        leaves = tuple(replace(leaf, shape=(-1, *leaf.shape[1:])) if leaf.batched else leaf for leaf in self.leaves)
        return replace(self, leaves=leaves, batch=-1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
