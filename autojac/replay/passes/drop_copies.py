"""Copies of what nobody writes into."""

from __future__ import annotations

from typing import Any

from torch import fx

from autojac.graph.operator_kinds import Kind
from autojac.replay.passes.editor import RESHAPES, Editor, aten
from autojac.replay.passes.node_facts import acts_by_entry, facts, has_entries, layout_of, overlapping, shares

RANK = 40
COPIES = {aten.clone.default, aten._to_copy.default, aten.contiguous.default, aten.lift_fresh_copy.default}
COPIES |= {aten.repeat.default}


def drop_copies(graph: fx.Graph) -> None:
    """Read the original in the place of a copy, where neither is written into, and reshape views directly.

    A copy that puts entries into another order is left out only if a single operator reads it, as others would each
    gather the entries again; one that repeats entries, if all that read it do so one by one.
    """
    Editor(graph).sweep(_drop, COPIES | RESHAPES)


def _reads_one_by_one(user: fx.Node) -> bool:
    return acts_by_entry(user) or (facts(user).kind is Kind.REDUCTION and facts(user).any_layout)


def _drop(editor: Editor, node: fx.Node) -> fx.Node | None:
    origin: Any = node.args[0] if node.args else None
    if not has_entries(origin):
        return None
    if node.target in COPIES and not node.meta.get("wanted"):
        ours, right = origin.meta["value"], node.meta["value"]
        if (ours.dtype, ours.device, ours.is_conj(), ours.is_neg()) != (right.dtype, right.device, False, False):
            return None
        if ours.shape != right.shape:
            # it has been repeated
            return None
        alike = layout_of(ours) == layout_of(right) or len(editor.users) == 1
        return origin if alike or (overlapping(ours) and all(map(_reads_one_by_one, editor.users))) else None
    if node.target in RESHAPES and origin.target in RESHAPES and editor.free(origin):
        before: Any = origin.args[0]
        if not shares(origin.meta["value"], before):
            # the copy in between was made for a shape that nobody looks at
            return editor.reshape(node, before, list(node.meta["value"].shape))
    return None
