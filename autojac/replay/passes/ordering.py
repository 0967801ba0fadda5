"""What of a graph must stay in its order: operators that write into memory, those that look at it, random draws."""

from __future__ import annotations

from torch import fx

EXTERNAL = ("given", "captured")
"""Roles of what belongs to the caller: a write there is seen."""


def last_writes(graph: fx.Graph) -> dict[int, int]:
    """Return the storages that some operator writes into, with the order of the last write."""
    last: dict[int, int] = {}
    for node in graph.nodes:
        for storage in node.meta.get("writes", ()):
            last[storage] = node.meta["order"]
    return last


def storages_of(node: fx.Node) -> set[int]:
    """Return the storages that a node reads or makes."""
    return {int(n.meta.get("storage") or 0) for n in (node, *node.all_input_nodes)} - {0}


def immovable_operators(graph: fx.Graph) -> set[fx.Node]:
    """Return operators that may not be merged with others or moved: what they do depends on when they run."""
    unsteady = set(last_writes(graph))
    return {
        node
        for node in graph.nodes
        if node.op == "call_function" and (node.meta["draws"] or node.meta["writes"] or storages_of(node) & unsteady)
    }
