"""Results written over arguments that nothing needs any more: less memory for a cache to hold, and none to ask for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx

from autojac.replay.passes.node_facts import acts_by_entry, has_entries, layout_of, overlapping, shares
from autojac.torch_internals import OpOverload

INTO_FIRST = frozenset({"addmm", "baddbmm", "index_copy", "index_add", "scatter", "scatter_add"})
"""Operators that add to their first argument, or write into a copy of it."""
OUT = ("out", "grad_input")
"""Overloads that write where they are told to; those that torch has generated compute as ever and copy."""
Homes = frozenset[object]
ELSEWHERE = object()
"""What stands for memory that the program is handed."""
HANDED: Homes = frozenset([ELSEWHERE])


def find_overwritable(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return for operators of a program the argument that their result may be written over.

    That is memory which the program itself has asked for, laid out as the result is, and read by nothing later.

    Args:
        nodes: operators that run in this order; whatever else they read, the program is handed.
        outputs: what is returned.
    """
    homes = _homes(nodes)
    last: dict[object, float] = {}
    for place, node in enumerate(nodes):
        for shown in (node, *node.all_input_nodes):
            last |= dict.fromkeys(homes.get(shown, ()), place)
    last |= dict.fromkeys(HANDED.union(*(homes.get(node, ()) for node in outputs)), math.inf)
    overwritable = {}
    for place, node in enumerate(nodes):
        for argument in _candidates(node):
            memory = homes.get(argument, HANDED)
            others = (homes.get(source, HANDED) for source in node.all_input_nodes if source is not argument)
            if all(last[home] <= place for home in memory) and all(map(memory.isdisjoint, others)):
                overwritable[node] = argument
                break
    return overwritable


def _homes(nodes: Sequence[fx.Node]) -> dict[fx.Node, Homes]:
    """Return for each node the operators whose memory it may show, by what operators promise and what was recorded."""
    homes: dict[fx.Node, Homes] = {}
    for node in nodes:
        views = _may_show(node)
        shown = [s for s in node.all_input_nodes if views or (has_entries(node) and shares(node.meta["value"], s))]
        memory: Homes = frozenset() if shown else frozenset([node])
        homes[node] = memory.union(*(homes.get(source, HANDED) for source in shown))
    return homes


def name_of(target: Any) -> str:
    """Return the name of an aten operator."""
    name: str = target._schema.name.removeprefix("aten::")
    return name


def _may_show(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace not in ("aten", "prims"):
        return True
    return any(result.alias_info is not None for result in target._schema.returns)


def _candidates(node: fx.Node) -> Iterator[fx.Node]:
    """Yield arguments that an operator could write its result over, if nothing else needed them."""
    if not has_entries(node) or node.meta["writes"] or node.meta["draws"] or writes_into(node.target) is None:
        return
    if name_of(node.target) in INTO_FIRST:
        # what is multiplied as well is read while the result is written
        arguments: Sequence[Any] = [] if node.args[0] in node.args[1:] else node.args[:1]
    elif acts_by_entry(node):
        arguments = node.args
    else:
        return
    right = node.meta["value"]
    for argument in arguments:
        if has_entries(argument) and layout_of(argument.meta["value"]) == layout_of(right) and not overlapping(right):
            yield argument


@cache
def writes_into(target: Any) -> tuple[Any, str] | None:
    """Return the overload that takes memory for its result, and what it calls that; None where there is none."""
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return None
    packet = target.overloadpacket
    for name in OUT:
        if name in packet.overloads():
            other = getattr(packet, name)
            *arguments, result = other._schema.arguments
            if torch.Tag.generated not in other.tags and [a.name for a in arguments] == [
                a.name for a in target._schema.arguments
            ]:
                return other, result.name
    return None
