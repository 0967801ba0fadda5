"""Tensors other than plain blocks of numbers: of a class of their own, made of other tensors, nested, sparse."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from autojac.torch_internals import FAKES_HOME, DisableTorchFunctionSubclass

PLAIN: Final = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})
"""The classes of tensors that run every operator as it is."""
NESTED: Final = (
    "an argument is a nested tensor; tensors of one shape for all samples were expected. Pass a padded tensor, as "
    "x.to_padded_tensor(0.0), or build the nested one inside func"
)


def own_class(tensor: Tensor) -> str:
    """Return the full name of the class of a tensor that may run operators its own way; empty if it is a plain one."""
    kind = type(tensor)
    return "" if kind in PLAIN else f"{kind.__module__}.{kind.__qualname__}"


def not_dense(tensor: Tensor) -> tuple[str, str]:
    """Return what a tensor is, where it isn't a plain block of numbers, and what to use instead; else empty strings."""
    kind = type(tensor)
    if tensor.is_nested:
        return "is nested", "a padded tensor, as x.to_padded_tensor(0.0)"
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not kind.__module__.startswith(FAKES_HOME):
        return f"is a {kind.__qualname__}, which is made of other tensors", "the tensor inside, as x.to_local()"
    if tensor.layout != torch.strided:
        return f"is stored as {tensor.layout}", "x.to_dense()"
    return "", ""


def without_subclass(value: Any) -> Any:
    """Return a tensor of a subclass, whose arithmetic may differ, as a plain one with the same graph.

    One whose class has more than one tensor inside stays what it is.
    """
    if type(value) is Tensor or not isinstance(value, Tensor):
        return value
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return value
    with DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)
