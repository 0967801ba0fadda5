"""Leave out what nothing needs."""

from __future__ import annotations

from torch import fx

from autojac.replay.passes.ordering import EXTERNAL

RANK = (1, 100)


def dead_code(graph: fx.Graph) -> None:
    """Erase operators that lead to no output, and writes into memory that nothing reads afterwards."""
    seen = {node.meta["storage"] for node in graph.nodes if node.meta.get("role") in EXTERNAL} - {None, 0}

    def is_needed(node: fx.Node) -> bool:
        # asked from the last node to the first, about those without users
        if node.op in ("placeholder", "output"):
            return True
        return bool(node.meta["draws"] or seen & node.meta["writes"])

    for node in reversed(list(graph.nodes)):
        if not node.users and not is_needed(node):
            graph.erase_node(node)
        else:
            seen |= {source.meta.get("storage") or 0 for source in node.all_input_nodes} - {0}
