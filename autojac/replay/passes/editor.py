"""Changing a graph of operators: nodes that know what they stand for, and sweeps that put better ones in place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autojac.replay.passes.layout_facts import PLACED, aliases, is_known, is_layout_independent, spreads
from autojac.replay.passes.node_facts import has_entries, layout_of, overlapping, placement_of, shares, values
from autojac.replay.passes.ordering import last_writes, storages_of
from autojac.replay.passes.view_search import moves
from autojac.torch_internals import BelowAutograd

aten = torch.ops.aten
MOST_ENTRIES = 10**6
"""Constants are looked at up to this size."""
LONGEST_CHAIN = 8
"""How far views of views are looked through."""
RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
"""Operators of the kind `view`, which some layouts don't permit."""
Rule = Callable[["Editor", fx.Node], "fx.Node | None"]


class Editor:
    """Makes nodes for a graph and puts them in the place of others.

    A replacement has the shape, dtype and device of what it replaces, its layout in memory may be another. Then what
    uses it is made again for that layout, up to where the layouts agree again. Whatever minds its arguments' layout is
    given a copy in the old one, or left as it is.

    Args:
        graph: changed in place.

    Attributes:
        users: of the node that a rule is asked about.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.unsteady = set(last_writes(graph))
        self.better: dict[fx.Node, fx.Node] = {}
        self.shifted: dict[fx.Node, set[int]] = {}
        self.users: dict[fx.Node, None] = {}
        self.stale: list[fx.Node] = []

    def free(self, node: fx.Node) -> bool:
        """Check whether a node is one tensor from an aten operator that may be merged, moved and left out."""
        if node.op != "call_function" or node.meta["draws"] or node.meta["writes"] or not has_entries(node):
            return False
        return is_known(node.target) and not (self.unsteady and storages_of(node) & self.unsteady)

    def is_read_once(self, node: Any, target: Any) -> bool:
        """Check whether a node is an operator's and free, and is left out once its only reader is."""
        return has_entries(node) and node.target is target and len(node.users) == 1 and self.free(node)

    def make(self, at: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node | None:
        """Return a new node before `at`, in its phase; None if the operator can't do that."""
        value = _try_to_compute(target, args, kwargs)
        return None if value is None else self._make(at, target, args, kwargs, value)

    def reshape(self, at: fx.Node, source: fx.Node, shape: Sequence[int]) -> fx.Node | None:
        """Return the entries of a node in another shape, by a view if its layout permits one."""
        if list(source.meta["value"].shape) == list(shape):
            return source
        targets = aten.view.default, aten.reshape.default
        return next(filter(None, (self.make(at, target, source, list(shape)) for target in targets)), None)

    def copy(self, at: fx.Node, source: fx.Node) -> fx.Node | None:
        """Return a copy of a node whose entries lie in the order of its axes."""
        return self.make(at, aten.clone.default, source, memory_format=torch.contiguous_format)

    def remake(self, node: fx.Node, instead: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
        """Return a node's operator with other nodes in the place of some of its arguments."""
        args, kwargs = _substitute(node, instead)
        return self.make(node, node.target, *args, **kwargs)

    def same(self, wanted: Tensor, nodes: Sequence[fx.Node]) -> fx.Node | None:
        """Return one of the nodes that is `wanted`."""
        place = placement_of(wanted)
        return next((node for node in nodes if placement_of(node.meta["value"]) == place), None)

    def reach(self, at: fx.Node, wanted: Tensor, nodes: Sequence[fx.Node]) -> fx.Node | None:
        """Return a node that is `wanted`, one operator away from one of the nodes."""
        place = placement_of(wanted)
        for node in nodes:
            for target, args in moves(node.meta["value"], wanted):
                moved = _try_to_compute(target, (node, *args), {})
                if moved is not None and placement_of(moved) == place:
                    return self._make(at, target, (node, *args), {}, moved)
        return None

    def narrow(self, at: fx.Node, node: fx.Node, wanted: Tensor) -> fx.Node | None:
        """Return a node for some entries of another one: `wanted` is a view of its value."""
        if node.meta["role"] == "constant":
            return self.constant(wanted)
        if node.op == "call_function" and not self.free(node):
            return None
        nodes = [*chain(self, node), node]
        return self.same(wanted, nodes) or self.reach(at, wanted, nodes)

    def constant(self, value: Tensor) -> fx.Node:
        """Return a tensor that is the same in every run."""
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.create_node("placeholder", "constant")
        node.meta = {"role": "constant", "value": value, "storage": None, "order": 0, "phase": 0}
        node.meta |= {"writes": frozenset(), "draws": False}
        return node

    def sweep(self, rule: Rule, targets: Container[Any] | None = None) -> None:
        """Ask a rule for something better in the place of each free node, or of those of some operators alone."""
        for node in list(self.graph.nodes):
            if node.op == "output":
                self._end(node)
            elif node.op == "call_function":
                self.shift(node)
                here = self._absorb(node)
                self.users = node.users
                if (targets is None or here.target in targets) and self.free(here):
                    here = rule(self, here) or here
                if here is not node:
                    self._replace(node, here)
        self._clear()

    def _make(self, at: fx.Node, target: Any, args: Sequence[Any], kwargs: Any, value: Tensor) -> fx.Node:
        with self.graph.inserting_before(at):
            node = self.graph.call_function(target, tuple(args), dict(kwargs))
        storage = _storage(value, node.all_input_nodes)
        node.meta = {"role": "operator", "value": value, "storage": storage, "order": at.meta["order"]}
        node.meta |= {"phase": at.meta.get("phase", 0), "writes": frozenset(), "draws": False}
        self.stale.append(node)
        return node

    def _replace(self, node: fx.Node, found: fx.Node) -> None:
        old, new = node.meta["value"], found.meta["value"]
        assert old.shape == new.shape and old.dtype == new.dtype and old.device == new.device, (node, found)
        self.stale.append(node)
        settled = old.stride() == new.stride() or not spreads(node)
        if settled and placement_of(old) == placement_of(new):
            node.replace_all_uses_with(found)
        elif settled and layout_of(old) == layout_of(new):
            self.shifts(node, {old.untyped_storage()._cdata})
            node.replace_all_uses_with(found, delete_user_cb=lambda user: user.target not in PLACED)
        else:
            self.better[node] = found

    def shifts(self, node: fx.Node, homes: set[int]) -> None:
        """Note that what is at these places will be somewhere else, for what uses a node."""
        for user in node.users:
            self.shifted.setdefault(user, set()).update(homes)

    def shift(self, node: fx.Node) -> None:
        """Let a view of what has been replaced be one of the replacement."""
        homes = self.shifted.get(node)
        if not homes:
            return
        value = node.meta["value"]
        if not isinstance(value, Tensor):
            self.shifts(node, homes)
        elif has_entries(node) and value.untyped_storage()._cdata in homes and self.free(node):
            origin: Any = node.args[0]
            if node.target is operator.getitem:
                value = _run(origin.target, origin.args, origin.kwargs)[node.args[1]]
                origin = origin.args[0]
            else:
                value = _run(node.target, node.args, node.kwargs)
            self.shifts(node, homes)
            node.meta |= {"value": value, "storage": _storage(value, [origin])}

    def _absorb(self, node: fx.Node) -> fx.Node:
        """Return a node with better arguments: the same one if its own layout stays as it is."""
        changed = {source: self.better[source] for source in node.all_input_nodes if source in self.better}
        if not changed:
            return node
        if not is_layout_independent(node, changed):
            self._conform(node, changed)
            return node
        args, kwargs = _substitute(node, changed)
        if node.meta["writes"] or not isinstance(node.meta["value"], Tensor):
            if node.meta["writes"] or self._alike(node, args, kwargs):
                node.args, node.kwargs = args, kwargs
            else:
                self._conform(node, changed)
            return node
        target = node.target
        value = _try_to_compute(target, args, kwargs)
        if value is None and target in RESHAPES:
            target, value = aten.reshape.default, _try_to_compute(aten.reshape.default, args, kwargs)
        if value is None or value.shape != node.meta["value"].shape or value.dtype != node.meta["value"].dtype:
            self._conform(node, changed)
            return node
        steady = not (self.unsteady and storages_of(node) & self.unsteady)
        alike = target is node.target and layout_of(value) == layout_of(node.meta["value"])
        sources = [changed.get(source, source) for source in node.all_input_nodes]
        if alike and (not steady or not (aliases(node) or any(shares(value, s) for s in sources))):
            node.args, node.kwargs = args, kwargs
            return node
        if not steady:
            self._conform(node, changed)
            return node
        return self._make(node, target, args, kwargs, value)

    def _alike(self, node: fx.Node, args: Any, kwargs: Any) -> bool:
        """Check whether each part of an operator with several results keeps its layout, in memory of its own."""
        parts: Any = _run(node.target, args, kwargs)
        if not isinstance(parts, (tuple, list)):
            return False
        for user in node.users:
            place: Any = user.args[1] if user.target is operator.getitem else 0
            if user.target is not operator.getitem or not isinstance(parts[place], Tensor):
                return False
            old = user.meta["value"]
            if layout_of(old) != layout_of(parts[place]) or any(shares(old, s) for s in node.all_input_nodes):
                return False
        return True

    def _conform(self, node: fx.Node, changed: dict[fx.Node, fx.Node]) -> None:
        """Give a node that minds layouts its arguments in the old ones, where a copy does that."""
        for old, new in changed.items():
            if node.target in PLACED or old.target is aten.clone.default or aliases(old):
                continue
            if old.meta["value"].is_contiguous():
                copy = self.copy(node, new)
                if copy is not None and layout_of(copy.meta["value"]) == layout_of(old.meta["value"]):
                    node.replace_input_with(old, copy)

    def _end(self, output: fx.Node) -> None:
        """Keep the layout of results, or give them the plain one."""
        for old in output.all_input_nodes:
            new = self.better.get(old)
            if new is not None and not new.meta["value"].is_contiguous() and old.meta["value"].is_contiguous():
                new = self.copy(output, new)
                if new is not None:
                    new.meta["phase"] = old.meta["phase"]
            if new is not None:
                output.replace_input_with(old, new)

    def _clear(self) -> None:
        """Erase what has been replaced."""
        stale = set(self.stale)
        for node in reversed(list(self.graph.nodes)):
            if node in stale and not node.users and not (node.meta["writes"] or node.meta["draws"]):
                stale.update(s for s in node.all_input_nodes if s.op == "call_function")
                self.graph.erase_node(node)


def source(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Return what a node is a view of."""
    if not editor.free(node):
        return None
    origin = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(origin, fx.Node):
        origin = origin.args[0]
    if has_entries(origin) and shares(node.meta["value"], origin):
        return origin
    return None


def chain(editor: Editor, node: fx.Node) -> list[fx.Node]:
    """Return what a node is a view of, and so on, the last first; nothing where places do not tell entries apart."""
    found: list[fx.Node] = []
    at: fx.Node | None = node
    while at is not None and len(found) < LONGEST_CHAIN:
        at = source(editor, at)
        if at is not None:
            found.append(at)
    if found and found[-1].meta["role"] != "constant" and overlapping(found[-1].meta["value"]):
        return []
    return found[::-1]


def _substitute(node: fx.Node, instead: Mapping[fx.Node, fx.Node]) -> Any:
    return fx.node.map_arg((node.args, node.kwargs), lambda source: instead.get(source, source))


def _storage(value: Tensor, sources: Sequence[fx.Node]) -> int | None:
    """Return what tells memory apart on the tape: that of a constant is nobody's."""
    home: int | None = value.untyped_storage()._cdata
    for source in sources:
        if shares(value, source):
            home = source.meta["storage"]
    return home


def _try_to_compute(target: Any, args: Any, kwargs: Any) -> Tensor | None:
    value = _run(target, args, kwargs)
    return value if isinstance(value, Tensor) else None


def _run(target: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = values((tuple(args), dict(kwargs)))
    try:
        with torch.no_grad(), BelowAutograd():
            return target(*args, **kwargs)
    except (RuntimeError, IndexError, TypeError, NotImplementedError):
        return None
