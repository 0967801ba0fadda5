"""What the layout of a node matters for: its users, and operators that do not care."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from autojac.replay.passes.node_facts import acts_by_entry, facts, has_entries, shares

aten = torch.ops.aten

PLACED = {aten.as_strided.default, aten.as_strided_scatter.default, aten.set_.source_Storage_storage_offset}
"""Operators that look at how their argument lies in its memory."""


def is_known(target: Any) -> bool:
    """Check whether an operator is one that passes know how to repeat."""
    return target is operator.getitem or getattr(target, "namespace", "") in ("aten", "prims")


def spreads(node: fx.Node) -> bool:
    """Check whether a user spreads an axis of one entry over several: its step counts for their layout then."""
    shape = node.meta["value"].shape
    for user in node.users:
        value = user.meta.get("value")
        if not isinstance(value, Tensor):
            continue
        if aliases(user):
            if spreads(user):
                return True
        elif any(a == 1 < b for a, b in zip(reversed(shape), reversed(value.shape), strict=False)):
            return True
    return False


def aliases(node: fx.Node) -> bool:
    """Check whether a node shares memory with one of its arguments."""
    return any(shares(node.meta["value"], s) for s in node.all_input_nodes) if has_entries(node) else False


def is_layout_independent(node: fx.Node, changed: dict[fx.Node, fx.Node]) -> bool:
    """Check whether an operator does the same whatever the layout of these arguments."""
    if node.target in PLACED or not is_known(node.target) or node.target is operator.getitem or node.meta["draws"]:
        return False
    if node.meta["writes"]:
        return node.target is aten.copy_.default and node.args[0] not in changed
    return acts_by_entry(node) or aliases(node) or facts(node).any_layout
