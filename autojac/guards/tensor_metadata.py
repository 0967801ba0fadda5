"""The metadata of tensors that a trace depends on: types, shapes, strides, devices, and which require grad."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from autojac.errors import InputError, kind_of
from autojac.torch_internals import DisableTorchFunction, tensor_guards

MODES = 4
"""Combinations of autocast, inference mode and vmap that tensors are compared quickly in."""


def describe_metadata(tensor: Tensor) -> tuple[Any, ...]:
    """Return everything but the values that a trace depends on in a tensor."""
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    kind = type(tensor), tensor.dtype, tensor.device, tensor.layout
    bits = tensor.requires_grad, tensor.is_conj(), tensor.is_neg(), tensor.is_inference()
    return *kind, tensor.shape, strides, *bits


def require_initialized(tensors: Iterable[Tensor]) -> None:
    """Raise `InputError` for a parameter or buffer of a lazy module that has no shape yet."""
    for tensor in tensors:
        if is_lazy(tensor):
            raise InputError(
                f"parameters and buffers with shapes were expected, but func holds {kind_of(tensor)} of a lazy module, "
                "such as torch.nn.LazyLinear. Call func once on such an input, which initializes it, before it is "
                "differentiated"
            )


class Metadata:
    """The metadata of some tensors at one moment.

    Attributes:
        tensors: the tensors.
        known: their metadata, in the same order.
        hooked: which of them carried hooks.
        quick: checks in C that the metadata is unchanged; False says nothing. None where torch has no such check.
    """

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        require_initialized(tensors)
        self.tensors = tensors
        self.known = tuple(map(describe_metadata, tensors))
        self.hooked = tuple(bool(tensor._backward_hooks) for tensor in tensors)
        self.quick = metadata_check(self.tensors)
        self._others: tuple[Callable[..., bool], ...] = ()

    def same(self) -> bool:
        """Check whether the metadata is unchanged, in whatever mode this runs."""
        if any(check(*self.tensors) for check in self._others):
            return True
        with DisableTorchFunction():  # a mode of the caller's would see it
            if tuple(map(describe_metadata, self.tensors)) != self.known:
                return False
        check = metadata_check(self.tensors)
        if check is not None and self.quick is not None:
            self._others = (*self._others, check)[-MODES:]
        return True


def metadata_check(tensors: tuple[Tensor, ...]) -> Callable[..., bool] | None:
    """Return a check in C that tensors have the metadata of these, in the current modes; None where torch has none.

    False says nothing: a tensor that occurs twice, say, never passes. Another number of tensors is a `TypeError`.
    """
    if tensor_guards is None or any(tensor.layout is not torch.strided for tensor in tensors):
        return None
    try:
        sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
        strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
        check: Callable[..., bool] = tensor_guards(
            *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
        ).check
        return check if check(*tensors) else None
    except (AttributeError, TypeError, SystemError, RuntimeError):
        return None
