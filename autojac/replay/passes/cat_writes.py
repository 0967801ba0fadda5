"""Tensors that are filled part by part, put together by one operator instead."""

from __future__ import annotations

from typing import Any

from torch import fx

from autojac.graph.operator_kinds import Kind
from autojac.replay.passes.editor import Editor, aten
from autojac.replay.passes.node_facts import facts, has_entries, layout_of
from autojac.replay.passes.ordering import storages_of

RANK = 8


def cat_writes(graph: fx.Graph) -> None:
    """Concatenate what is copied into the slices of fresh memory, where these make up all of it.

    That leaves no write into memory, and what reads the whole is free to be simplified.
    """
    homes: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        for storage in storages_of(node) if node.op == "call_function" else ():
            homes.setdefault(storage, []).append(node)
        for storage in node.meta.get("writes", ()):
            if node not in homes.get(storage, ()):
                homes.setdefault(storage, []).append(node)
    editor = Editor(graph)
    for storage in sorted(editor.unsteady):
        nodes = homes.get(storage, [])
        if nodes and facts(nodes[0]).kind is Kind.FACTORY and nodes[0].meta["storage"] == storage:
            _concatenate(editor, storage, nodes)


def _concatenate(editor: Editor, storage: int, nodes: list[fx.Node]) -> None:
    buffer, writes = nodes[0], [node for node in nodes if storage in node.meta["writes"]]
    last = nodes.index(writes[-1])
    parts = [_part(buffer, write) for write in writes]
    targets = {write.args[0] for write in writes}
    if not has_entries(buffer) or not buffer.meta["value"].is_contiguous() or None in parts:
        return
    # nothing looks at it before it is full, and the slices are there for the writes alone
    if any(node is not buffer and node not in targets and node not in writes for node in nodes[: last + 1]):
        return
    if any(set(target.users) - set(writes) for target in targets - {buffer} if isinstance(target, fx.Node)):
        return
    slices: list[tuple[int, int, int, fx.Node]] = sorted(part for part in parts if part is not None)
    axis, many = slices[0][0], buffer.meta["value"].dim() and buffer.meta["value"].size(slices[0][0])
    ends = [0, *(end for _, _, end, _ in slices)]
    if any(part[0] != axis for part in slices) or [start for _, start, _, _ in slices] != ends[:-1] or ends[-1] != many:
        return
    sources = [source for *_, source in slices]
    if any(storages_of(source) & editor.unsteady or source.meta["phase"] > buffer.meta["phase"] for source in sources):
        return
    if any(write.meta["phase"] != buffer.meta["phase"] or write.users for write in writes):
        return
    _replace(editor, buffer, writes, sources, axis)


def _replace(editor: Editor, buffer: fx.Node, writes: list[fx.Node], sources: list[fx.Node], axis: int) -> None:
    whole = editor.make(writes[-1], aten.cat.default, sources, axis)
    if whole is None or layout_of(whole.meta["value"]) != layout_of(buffer.meta["value"]):
        return
    # the memory of the recorded run has the same content, and views of it are there already
    whole.meta |= {"value": buffer.meta["value"], "storage": buffer.meta["storage"]}
    targets = {write.args[0] for write in writes}
    for write in writes:
        editor.graph.erase_node(write)
    for target in targets - {buffer}:
        assert isinstance(target, fx.Node)
        editor.graph.erase_node(target)
    buffer.replace_all_uses_with(whole)
    editor.graph.erase_node(buffer)


def _part(buffer: fx.Node, write: fx.Node) -> tuple[int, int, int, fx.Node] | None:
    """Return axis, start and end of the slice that is written, and what is written; None for other writes."""
    if write.target is not aten.copy_.default:
        return None
    target: Any = write.args[0]
    source: Any = write.args[1]
    if not has_entries(source):
        return None
    whole, value = buffer.meta["value"], source.meta["value"]
    if (value.dtype, value.device) != (whole.dtype, whole.device) or not whole.dim():
        return None
    if target is buffer:
        axis, start, end = 0, 0, whole.size(0)
    elif target.target is aten.slice.Tensor and target.args[0] is buffer and len(target.args) == 4:
        _, axis, start, end = target.args
        axis, end = axis % whole.dim(), min(end, whole.size(axis))
    else:
        return None
    shape = [*whole.shape[:axis], end - start, *whole.shape[axis + 1 :]]
    return (axis, start, end, source) if start >= 0 and list(value.shape) == shape else None
