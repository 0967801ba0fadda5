"""Constant folding: what depends on nothing that changes from run to run is computed once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from autojac.graph.operator_kinds import Kind
from autojac.replay.passes.node_facts import facts
from autojac.replay.passes.ordering import last_writes, storages_of

RANK = 10
MOST_BYTES = 2**24
"""What a constant may take: larger ones are made again in each run."""


def fold_constants(graph: fx.Graph) -> None:
    """Put in the place of seeds, masks and index tensors what the recorded run has computed for them."""
    constant = _constant(graph)
    for node in [n for n in graph.nodes if n in constant and n.op != "placeholder"]:
        varying = [user for user in node.users if user not in constant]
        if any(not _written_into(node, user) for user in varying) and node.meta["value"] is not None:
            value = node.meta["value"].detach()
            with graph.inserting_before(next(iter(graph.nodes))):
                folded = graph.create_node("placeholder", f"folded_{node.name}")
            # apart from the memory that it was made in, into which nothing writes any more
            folded.meta = {**node.meta, "role": "constant", "value": value, "storage": None}
            folded.meta |= {"writes": frozenset(), "draws": False}
            node.replace_all_uses_with(folded, delete_user_cb=lambda user: user not in constant)


def _written_into(node: fx.Node, user: fx.Node) -> bool:
    """Check whether an operator scatters into fresh memory: into a constant's copy it would, which takes longer."""
    return _looks_at_shapes(node) and facts(user).kind is Kind.SCATTER and user.args[0] is node


def _constant(graph: fx.Graph) -> set[fx.Node]:
    """Return nodes that are the same in every run, with all that share their memory.

    Memory that is written into is constant as a whole or not at all; it is taken as it is after the last write, so
    nothing else may look at it before.
    """
    last = last_writes(graph)
    tainted: set[int] = set()
    while True:
        constant = set(_steady(graph, tainted))
        unfit = {storage for node in graph.nodes if node not in constant for storage in _early(node, last)}
        if unfit <= tainted:
            return constant
        tainted |= unfit


def _steady(graph: fx.Graph, tainted: set[int]) -> Iterator[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            fit = node.meta["role"] in ("literal", "constant")
        else:
            fit = node.op == "call_function" and not node.meta["draws"]
            fit = fit and (_looks_at_shapes(node) or all(source in found for source in node.all_input_nodes))
        if fit and not _storages_touched(node) & tainted and not node.meta["writes"] & tainted and _small(node):
            found.add(node)
            yield node


def _looks_at_shapes(node: fx.Node) -> bool:
    """Check whether of an operator's tensors the shapes and dtypes count alone."""
    return facts(node).kind is Kind.FACTORY


def _storages_touched(node: fx.Node) -> set[int]:
    if _looks_at_shapes(node):
        return {int(node.meta["storage"] or 0)} - {0}
    return storages_of(node)


def _early(node: fx.Node, last: dict[int, int]) -> set[int]:
    """Return storages that are not constant because this node, which is not, writes into them or reads them early."""
    if node.op == "output":
        return set()
    early: set[int] = {storage for storage in _storages_touched(node) if node.meta["order"] < last.get(storage, -1)}
    return early.union(node.meta["writes"])


def _small(node: fx.Node) -> bool:
    value = node.meta["value"]
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value._is_zerotensor():
        return True
    return value.untyped_storage().nbytes() <= MOST_BYTES
