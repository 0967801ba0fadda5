"""Record what one run does, operator by operator, below autograd and every transform: a flat graph that can run again.

A tape records any computation, torch.func's transforms and autograd's own backward passes included, because it sits
below them, where only plain tensors and aten operators are left. It records verbatim: operators in the order in which
they ran, in-place ones as they are. What may be simplified is decided by `autojac.replay.passes`.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from autojac.errors import UnsupportedError
from autojac.graph.capture import Capture
from autojac.graph.operators import BATCH_NORMS, LITERALS, call, reads_data
from autojac.guards.escapes import home
from autojac.replay.outcomes import is_guarded, only_mask, require_outcome, require_shape
from autojac.torch_internals import pytree

MOST_OPERATORS = 2000
"""Loops are unrolled up to here."""
MOST_READ = 1024
"""The most elements of a captured tensor whose values Python may read: they are compared in every call."""

Role = Literal["given", "captured", "unknown", "literal", "constant", "operator"]


class Tape(Capture):
    """Records what runs under it as an `fx.Graph` of aten operators.

    Every node has in its `meta`: `role`; `value`, the tensor it stood for, whose content is that of the end of the run;
    `storage`, the same for all that share memory; `order`, when it ran; `phase`, counted up by whoever runs several
    things; `writes`, the storages that an operator writes into; and `draws`, whether it moves a random generator or may
    raise an error, and so must run whatever becomes of its result.

    Args:
        given: the tensors that stand for the arguments of the run, no two of them the same object.
        captured: the tensors that the function holds. Those that it reads become part of the graph.
        most_bytes: what may stay allocated; nothing is freed while the tape runs.
        repeatable: whether a program may break off where Python would take another way, and func run instead.

    Attributes:
        graph: without an output node.
        draws: whether random numbers were drawn.
        guarded: whether Python has learned something that other calls may not share.
        read: captured tensors whose values Python has read, as they were.
    """

    def __init__(
        self, given: Sequence[Tensor], captured: Sequence[Tensor], most_bytes: int, repeatable: bool = False
    ) -> None:
        super().__init__(MOST_OPERATORS)
        self.repeatable = repeatable
        self.graph = fx.Graph()
        self.draws = self.guarded = False
        self.read: dict[int, Tensor] = {}
        self._written: set[int] = set()
        self._counted: set[fx.Node | object] = set()
        self.phase = 0
        self.most_bytes = most_bytes
        self._bytes = 0
        self._nodes: dict[int, fx.Node] = {}
        self._external: set[int] = set()
        # a freed tensor's identity would be given to another
        self._alive: list[Any] = []
        self._captured = {id(tensor): tensor for tensor in captured}
        self.homes = {id(tensor): home(tensor) for tensor in captured}
        for tensor in given:
            self.give(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # who watches the function need not watch this; Python inside an operator runs again in each replay
        watching = sys.getprofile()
        sys.setprofile(None)
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            sys.setprofile(watching)

    @property
    def written_operators(self) -> int:
        return len(self.graph.nodes)

    def write(
        self, func: Any, name: str, written: Sequence[int | str], draws: bool, args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        nodes = pytree.tree_map_only(Tensor, self.node, (tuple(args), dict(kwargs)))
        tells = self._inspect(func, name, args, nodes)
        try:
            result = call(func, args, kwargs)
        except Exception:
            # who catches it takes another way where the operator succeeds
            self.refuse(f"the operator {name} fails as it runs")
            raise
        parts = result if isinstance(result, (tuple, list)) else (result,)
        if tells and not (self.repeatable and self.phase == 0 and all(map(is_guarded, parts))):
            self.refuse(f"{name} reads values of a tensor in Python, so a recording may not hold for other inputs")
        if self.reason:
            return result
        checks = not func._schema.returns
        if not checks and not any(isinstance(part, Tensor) for part in parts):
            if tells:
                self._require(require_outcome, func, result, *nodes[0], **nodes[1])
            return result
        # what is written out in the code is made again in each run, and may be written into
        node = self.graph.call_function(torch.ops.aten.clone.default if name in LITERALS else func, *nodes)
        self._describe(node, "operator", None)
        self.draws |= draws
        # what returns nothing raises an error where something is wrong
        node.meta |= {"writes": frozenset(_written_storages(name, written, args, kwargs)), "draws": draws or checks}
        self._written |= node.meta["writes"]
        if name in LITERALS:
            # torch gives the very tensor back
            self._nodes.pop(id(result), None)
        if isinstance(result, Tensor):
            self._bind(node, result)
        else:
            for place, part in enumerate(parts):
                if isinstance(part, Tensor) and id(part) not in self._nodes:
                    item = self.graph.call_function(operator.getitem, (node, place))
                    self._describe(item, "operator", None)
                    self._bind(item, part)
        for part in parts if tells else ():
            self._require(require_shape, tuple(part.shape), self.node(part))
            self._counted.add(only_mask(name, nodes, self._written))
        return result

    def give(self, tensor: Tensor) -> None:
        """Take a tensor for an argument of what follows."""
        self._enter(tensor, "given")

    def node(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor; one that no operator has made enters the graph as there from the start."""
        known = self._nodes.get(id(tensor))
        self.require_home(tensor)
        if known is None and id(tensor) in self._captured:
            return self._enter(tensor, "captured")
        if known is None:
            known = self._find_alias(tensor)
        if known is None:
            # one that is known to be zero is made in places that nobody sees
            known = self._enter(tensor, "literal" if tensor._is_zerotensor() else "unknown")
        return known

    def finish(self) -> None:
        """Take note of what no operator has shown."""
        if self.monitor.escaped:
            self.refuse(f"it reads or writes values of a tensor by {self.monitor.escaped}, where no operator is seen")
        if self.guarded and self.draws:
            self.refuse("it reads values of a tensor in Python, and draws random numbers before or after")
        for tensor in self._captured.values():
            self.require_home(tensor)

    def knows(self, tensor: Tensor) -> bool:
        """Check whether the tensor was given or has been met."""
        return id(tensor) in self._nodes

    def _require(self, check: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Make the program break off where Python would learn something else than it did in this run."""
        node = self.graph.call_function(check, args, kwargs)
        self._describe(node, "operator", None)
        node.meta["draws"] = True
        self.guarded = True

    def _inspect(self, func: Any, name: str, args: Any, nodes: Any) -> bool:
        """Refuse what no program can do, and mark literals.

        Returns:
            whether the operator tells Python, by a number or a shape, of values that other calls may not share.
        """
        tells = False
        if name in LITERALS:
            (literal,) = nodes[0]
            if maker := self.literal_of_tensors(name):
                self.refuse(f"it reads values of a tensor: {maker} is given a list that holds one (use torch.stack)")
            if literal.meta["role"] == "unknown":
                # as it is now: what comes of it may be written into
                literal.meta |= {"role": "literal", "value": args[0].clone(), "storage": None}
        if reads_data(func, args):
            sources: list[fx.Node] = [n for n in pytree.tree_leaves(nodes) if isinstance(n, fx.Node)]
            read: set[fx.Node] = set()
            # `is_set_to` asks for the memory, and no values tell of that
            if name != "is_set_to" and all(self._is_certain(node, read) for node in sources):
                captured = [node.meta["value"] for node in read if node.meta["role"] == "captured"]
                self.read |= {id(tensor): tensor.detach().clone() for tensor in captured if id(tensor) not in self.read}
            else:
                tells = only_mask(name, nodes, self._written) not in self._counted
        if name.startswith("as_strided") and any(node.meta["storage"] in self._external for node in nodes[0][:1]):
            self.refuse("it reads an argument's memory by positions, which may be others in another call")
        if any(isinstance(value, torch.Generator) for value in pytree.tree_leaves(args)):
            self.refuse("it draws from a random generator of its own")
        return tells

    def _is_certain(self, node: fx.Node, seen: set[fx.Node]) -> bool:
        """Check whether a tensor is the same in every run: made of literals, numbers and small captured ones alone.

        Replays compare the values of these in each call.
        """
        if node.meta["storage"] in self._written:  # by whatever operator, in place
            return False
        if node.meta["role"] == "captured":
            seen.add(node)
            value: Tensor = node.meta["value"]
            return value.layout == torch.strided and not value.requires_grad and value.numel() <= MOST_READ
        if node.meta["role"] != "operator":
            return bool(node.meta["role"] == "literal")
        if node in seen:
            return True
        seen.add(node)
        # what was written into is not looked through
        calm = not node.meta.get("draws") and not node.meta.get("writes")
        return calm and all(self._is_certain(source, seen) for source in node.all_input_nodes)

    def _enter(self, tensor: Tensor, role: Role) -> fx.Node:
        node = self.graph.create_node("placeholder", f"given_{len(self._nodes)}")
        # placeholders lead, whenever they are met
        first = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
        if first is not None:
            first.prepend(node)
        self._describe(node, role, tensor)
        self._bind(node, tensor)
        if role in ("given", "captured"):
            self._external.add(_storage(tensor))
        return node

    def _find_alias(self, tensor: Tensor) -> fx.Node | None:
        """Return another object for memory that is known, which no operator has shown: a saved tensor, say."""
        sharing = self.sharing.get(_storage(tensor), ())
        if not sharing:
            return None
        alike = [other for other in sharing if _place(other) == _place(tensor)]
        source = self._nodes[id((alike or sharing)[-1])]
        if not alike:
            if sharing[-1].dtype != tensor.dtype or _storage(tensor) in self._external:
                self.refuse("it reads or writes a tensor's memory where no operator is seen")
                return source
            places = list(tensor.shape), list(tensor.stride()), tensor.storage_offset()
            source = self.graph.call_function(torch.ops.aten.as_strided.default, (source, *places))
            self._describe(source, "operator", None)
        self._bind(source, tensor, new=not alike)
        return source

    def _describe(self, node: fx.Node, role: Role, value: Tensor | None) -> None:
        node.meta |= {"role": role, "value": value, "storage": None, "writes": frozenset(), "draws": False}
        node.meta |= {"order": len(self.graph.nodes), "phase": self.phase}

    def _bind(self, node: fx.Node, tensor: Tensor, new: bool = True) -> None:
        """Note that a tensor is what a node stands for; one that is known already was written into, and stays."""
        before, now = self.homes.get(id(tensor)), home(tensor)
        if before is None or before[:2] == now[:2]:
            # a view in place has another shape
            self.homes[id(tensor)] = now
        if id(tensor) in self._nodes:
            return
        storage = _storage(tensor)
        if new:
            node.meta["value"], node.meta["storage"] = tensor, storage
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)
        if storage and storage not in self.sharing and node.op != "placeholder":
            self._bytes += tensor.untyped_storage().nbytes()
            if self._bytes > self.most_bytes:
                self.exceed(f"recording it takes more than {self.most_bytes / 2**30:.2g} GiB")
        if storage:
            self.sharing.setdefault(storage, []).append(tensor)

    def exceed(self, reason: str) -> None:
        """Break off what would take time or memory to no end."""
        self.refuse(reason)
        raise UnsupportedError(reason)


def _storage(tensor: Tensor) -> int:
    """Return what tensors that share memory have in common; 0 for those without memory to speak of."""
    if tensor.layout != torch.strided or tensor._is_zerotensor():
        return 0
    identity: int = tensor.untyped_storage()._cdata
    return identity


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _written_storages(
    name: str, written: Sequence[int | str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> set[int]:
    """Return the storages that an operator writes into."""
    targets = [kwargs.get(at) if isinstance(at, str) else (args[at] if at < len(args) else None) for at in written]
    if name in BATCH_NORMS:
        # their running statistics, which the schema of some does not tell
        targets += args[3:5] if args[5] else []
    return {_storage(t) for t in pytree.tree_leaves(targets) if isinstance(t, Tensor)} - {0}
