"""What nodes of a graph stand for, as the recorded run has left it."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from autojac.graph.operator_facts import UNKNOWN, Facts, facts_of
from autojac.graph.operator_kinds import Kind
from autojac.torch_internals import OpOverload

PRECISE = (torch.float32, torch.float64)
"""Types whose range holds what passes multiply first; in half precision that may vanish or overflow."""


def facts(node: fx.Node) -> Facts:
    """Return what the table of operators says of a node."""
    return facts_of(node.target) if isinstance(node.target, OpOverload) else UNKNOWN


def acts_by_entry(node: fx.Node) -> bool:
    """Check whether each entry of the result comes from the entries at its place."""
    tagged = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
    return tagged or (facts(node).kind is Kind.POINTWISE and facts(node).any_layout)


def has_entries(node: object) -> TypeGuard[fx.Node]:
    """Check whether an argument is a node that stands for one tensor with entries in memory."""
    value = node.meta.get("value") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return value.device.type != "meta" and not value._is_zerotensor()


def layout_of(value: Tensor) -> tuple[Any, ...]:
    """Return what an operator may see of a tensor besides its entries."""
    bits = (value.is_conj(), value.is_neg()) if value.dtype.is_complex or value.is_neg() else ()
    # a step along one entry says nothing
    steps = tuple(step if size != 1 else 0 for step, size in zip(value.stride(), value.shape, strict=True))
    return value.shape, steps, value.dtype, value.device, bits


def placement_of(value: Tensor) -> tuple[Any, ...]:
    """Return the layout of a tensor and where its entries are."""
    return *layout_of(value), value.storage_offset(), value.untyped_storage()._cdata


def shares(value: Tensor, node: fx.Node) -> bool:
    """Check whether a tensor lies in the memory of a node."""
    return has_entries(node) and value.untyped_storage()._cdata == node.meta["value"].untyped_storage()._cdata


def overlapping(value: Tensor) -> bool:
    """Check whether entries of a tensor share memory."""
    return any(step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True))


def narrow_repeats(value: Tensor) -> Tensor:
    """Return one entry of each axis along which a tensor repeats itself."""
    for axis, (step, size) in enumerate(zip(value.stride(), value.shape, strict=True)):
        if step == 0 and size > 1:
            value = value.narrow(axis, 0, 1)
    return value


def values(arguments: Any) -> Any:
    """Return arguments of a node with the recorded tensors in place of nodes."""
    return fx.node.map_arg(arguments, lambda node: node.meta["value"])
