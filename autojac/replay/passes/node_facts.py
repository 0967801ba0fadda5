"""What nodes of a graph stand for, as the recorded run has left it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from autojac.graph.operator_facts import UNKNOWN, Facts, Kind, facts_of
from autojac.torch_internals import OpOverload


def facts(node: fx.Node) -> Facts:
    """Return what the table of operators says of a node."""
    return facts_of(node.target) if isinstance(node.target, OpOverload) else UNKNOWN


def acts_by_entry(node: fx.Node) -> bool:
    """Whether each entry of the result comes of the entries at its place."""
    tagged = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
    return tagged or (facts(node).kind is Kind.POINTWISE and facts(node).any_layout)


def plain(node: fx.Node) -> bool:
    """Whether a node stands for one tensor with entries in memory."""
    value = node.meta.get("value")
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return value.device.type != "meta" and not value._is_zerotensor()


def laid(value: Tensor) -> tuple[Any, ...]:
    """What an operator may see of a tensor beside its entries."""
    bits = (value.is_conj(), value.is_neg()) if value.dtype.is_complex or value.is_neg() else ()
    # a step along one entry says nothing
    steps = tuple(step if size != 1 else 0 for step, size in zip(value.stride(), value.shape, strict=True))
    return value.shape, steps, value.dtype, value.device, bits


def placed(value: Tensor) -> tuple[Any, ...]:
    """The same, and where its entries are."""
    return *laid(value), value.storage_offset(), value.untyped_storage()._cdata


def shares(value: Tensor, node: fx.Node) -> bool:
    """Whether a tensor lies in the memory of a node."""
    return plain(node) and value.untyped_storage()._cdata == node.meta["value"].untyped_storage()._cdata


def overlapping(value: Tensor) -> bool:
    """Whether entries of a tensor share memory."""
    return any(step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True))


def narrowed(value: Tensor) -> Tensor:
    """One entry of each axis along which a tensor repeats itself."""
    for axis, (step, size) in enumerate(zip(value.stride(), value.shape, strict=True)):
        if step == 0 and size > 1:
            value = value.narrow(axis, 0, 1)
    return value


def values(arguments: Any) -> Any:
    """Arguments of a node with the recorded tensors in the place of nodes."""
    return fx.node.map_arg(arguments, lambda node: node.meta["value"])
