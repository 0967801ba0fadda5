"""The only place that traces: one call of a function, recorded as a graph of aten operators.

A graph is recorded again in each call, below autograd and alongside it: the call is the user's own, its side effects
happen once, its branch and its constants are those of the moment. So no trace is ever stale, and what is learned from
one is remembered by the structure of the graph (`Graph.key`), not by the function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from autojac.autodiff.pullback import fresh_inputs
from autojac.core.structure import Branches
from autojac.core.tensor_kinds import own_class
from autojac.errors import UnsupportedError
from autojac.graph.capture import Capture
from autojac.graph.decompositions import decompose
from autojac.graph.finalize import graph_of
from autojac.graph.ir import Graph, Operation, Value
from autojac.graph.module_of_frame import running_module
from autojac.graph.operators import (
    LITERALS,
    PARTITIONS,
    VIEWS_IN_PLACE,
    call,
    functional,
    makes_shapes,
    reads_data,
)
from autojac.guards.escapes import home
from autojac.torch_internals import pytree

MOST_OPERATIONS = 4000


@dataclass(frozen=True)
class FunctionRecording:
    """A call that ran once.

    Attributes:
        values: what the function returned, with its graph of autograd.
        inputs: the tensors that stood for the differentiated leaves; `values` lead back to them.
        graph: None if there is none, for the `reason`.
        captured: the tensors that no operator of the call has made, but for literals and random numbers.
        owners: for each tensor the id of the module in whose code it was made, where names were asked for.
        escaped: the method by which func hands its data to other code; empty if it does not.
        branches: as of `Structure`.
        memory: the memory of each tensor that an operator made, and its bytes, where names were asked for.
    """

    values: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    graph: Graph | None
    reason: str = ""
    captured: tuple[Tensor, ...] = ()
    owners: Mapping[int, int] = dataclasses.field(default_factory=dict)
    escaped: str = ""
    branches: Branches = "perhaps"
    memory: tuple[tuple[StorageWeakRef, int], ...] = ()

    def pass_bytes(self) -> int:
        """Return what an evaluation and one VJP take at their peak; 0 if the graph is not known.

        What autograd has saved is what is still there now. Besides it backward holds cotangents of the outputs, and at
        an operator those of its result and its argument.
        """
        if self.graph is None:
            return 0
        saved = sum(size for memory, size in self.memory if not memory.expired())
        cotangents = sum(value.numel() * value.element_size() for value in self.values)
        return saved + cotangents + 2 * max((size for _, size in self.memory), default=0)


def record(
    fn: Callable[[Sequence[Tensor], Mapping[str, Any]], tuple[Tensor, ...]],
    leaves: Sequence[Tensor],
    kwargs: Mapping[str, Any],
    differentiated: Sequence[int],
    differentiable: bool = False,
    named: bool = False,
    watched: bool = True,
) -> FunctionRecording:
    """Call a function once and write down what it does.

    Args:
        fn: maps (leaves, kwargs) to a tuple of tensors.
        leaves, kwargs: the call.
        differentiated: indices of the leaves that autograd follows.
        differentiable: whether the recorded tensors stay connected to the caller's.
        named: write down too which module was running.
        watched: look for what no operator shows: without it, `Graph.reads_data` says less.
    """
    with torch.enable_grad():
        inputs = fresh_inputs([leaves[position] for position in differentiated], differentiable)
        given = list(leaves)
        for position, tensor in zip(differentiated, inputs, strict=True):
            given[position] = tensor
        recorder = Recorder(given, named, watched)
        with recorder:
            values = tuple(fn(given, kwargs))
    recorder.finish()
    try:
        graph, reason = graph_of(recorder, values, inputs), ""
    except UnsupportedError as error:
        graph, reason = None, str(error)
    captured = tuple(t for number, t in recorder.constants.items() if number not in recorder.passing)
    memory = recorder.memory() if named else ()
    return FunctionRecording(
        values, inputs, graph, reason, captured, recorder.owners, recorder.monitor.escaped, recorder.branches, memory
    )


class Recorder(Capture):
    """Writes down the operators that run under it, in-place ones as what they do to a tensor's value."""

    def __init__(self, leaves: Sequence[Tensor], named: bool = False, watched: bool = True) -> None:
        super().__init__(MOST_OPERATIONS, watched)
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.dtypes: dict[int, torch.dtype] = {}
        self.constants: dict[int, Tensor] = {}
        self.operations: list[Operation] = []
        self.marks: dict[int, str] = {}
        self.named = named
        self.owners: dict[int, int] = {}
        self.tensors: list[tuple[int, Tensor]] = []
        self.numbers: dict[int, int] = {}
        self.passing: set[int] = set()
        self.apart: list[set[int]] = []
        self.stale: set[int] = set()
        self.written: dict[int, str] = {}
        self.fixed: set[int] = set()
        self.reads_data = False
        self.reads_values = False
        self.inputs = tuple(self.number(leaf) for leaf in leaves)
        if any(map(own_class, leaves)):
            self.refuse("an argument is of a subclass of torch.Tensor, which may run operators its own way")

    @property
    def written_operators(self) -> int:
        return len(self.operations)

    def write(
        self, func: Any, name: str, written: Sequence[int | str], draws: bool, args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        literal = bool(self.literal_of_tensors(name))
        reads = reads_data(func, args) and not self._is_fixed(args)
        self.reads_data |= reads or literal
        self.reads_values |= (reads and not makes_shapes(func)) or literal
        count = len(self.shapes)
        several, made = decompose(self, name, func, args, kwargs)
        if not several:
            made = self._write_one(func, name, written, draws, args, kwargs)
        if self.named:
            owner = running_module(record.__code__)
            self.owners |= dict.fromkeys(range(count, len(self.shapes)), owner)
        return made

    def _write_one(
        self, func: Any, name: str, written: Sequence[int | str], draws: bool, args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        seen = self.to_value(args), {key: self.to_value(value) for key, value in kwargs.items()}
        made = call(func, args, kwargs)
        detached = not torch.is_grad_enabled()
        if name in LITERALS:
            # what was written out in the code, made again in each call
            self.passing.update(value.number for value in seen[0] if type(value) is Value)
        if draws:
            self._draw(made if isinstance(made, (tuple, list)) else (made,), name)
        elif written:
            self._write(func, name, written, args, seen, detached)
        else:
            many = isinstance(made, (tuple, list))
            parts = made if many else (made,)
            fixed = self._is_fixed((*args, *kwargs.values()))
            outputs = tuple(self.number(part) if isinstance(part, Tensor) else None for part in parts)
            self.fixed |= {number for number in outputs if fixed and number is not None}
            self.operations.append(Operation(func, *seen, outputs, many, detached))
            if name in PARTITIONS:
                self.apart.append({id(part) for part in made})
        return made

    def _is_fixed(self, args: Sequence[Any]) -> bool:
        """Check whether all tensors among arguments are made of nothing but numbers, such as `torch.arange(3)`."""
        tensors = (part for part in pytree.tree_leaves(args) if isinstance(part, Tensor))
        return all(self.numbers.get(id(tensor)) in self.fixed for tensor in tensors)

    def finish(self) -> None:
        """Note what no operator has shown."""
        self.reads_data |= bool(self.monitor.escaped)
        self.reads_values |= bool(self.monitor.escaped)
        for tensor in self.constants.values():
            self.require_home(tensor)

    @property
    def branches(self) -> Branches:
        """As of `Structure`; what ran since there is a `reason` went unseen."""
        return "by values" if self.reads_values else "perhaps" if self.reads_data or self.reason else ""

    def memory(self) -> tuple[tuple[StorageWeakRef, int], ...]:
        """Return the memory that was allocated, each piece once, and its bytes."""
        strided = [
            (index, tensor.untyped_storage())
            for index, tensor in self.tensors
            if id(tensor) in self.homes and tensor.layout == torch.strided
        ]
        given = {storage._cdata for index, storage in strided if index in self.inputs or index in self.constants}
        pieces: dict[int, tuple[StorageWeakRef, int]] = {}
        for _, storage in strided:
            if storage._cdata not in given and storage._cdata not in pieces:
                pieces[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return tuple(pieces.values())

    def number(self, tensor: Tensor) -> int:
        """Return a number for the tensor's value as it is now."""
        index = self.numbers[id(tensor)] = self.symbol(tensor.shape, tensor.dtype)
        self.settle(tensor)
        self.tensors.append((index, tensor))
        return index

    def symbol(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return a number for a tensor that no operator of the call has made."""
        index = len(self.shapes)
        self.shapes[index], self.dtypes[index] = tuple(shape), dtype
        return index

    def to_value(self, value: Any) -> Any:
        """Return an argument with its tensors as `Value`; a tensor that nobody made was captured."""
        if isinstance(value, Tensor):
            if id(value) not in self.numbers:
                self._capture(value)
            self.require_home(value)
            if id(value) in self.stale:
                self.refuse("func reads a tensor whose memory was written in place before")
            return Value(self.numbers[id(value)])
        if isinstance(value, (tuple, list)):
            return type(value)(self.to_value(part) for part in value) if type(value) in (tuple, list) else value
        return value

    def _capture(self, tensor: Tensor) -> None:
        """Number a tensor that no operator of the call has made; it must not be another face of one that was."""
        if any(self.numbers[id(other)] not in self.constants for other in self._sharing_with(tensor)):
            self.refuse("func makes a tensor of another's memory where no operator is seen")
        self.constants[self.number(tensor)] = tensor

    def _sharing_with(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return the tensors met that share the memory of one."""
        place = home(tensor)
        return self.sharing.get(place[1], ()) if len(place) > 1 else ()

    def _draw(self, parts: Sequence[Any], name: str) -> None:
        """Record random numbers as constants of the call."""
        for part in parts:
            if isinstance(part, Tensor):
                index = self.number(part)
                # it may be written into afterwards
                self.constants[index] = part.detach().clone()
                self.passing.add(index)
                self.written[index] = f"draws random numbers in the operator {name}, which has a derivative"

    def _write(
        self, func: Any, name: str, written: Sequence[int | str], args: Any, seen: tuple[Any, Any], detached: bool
    ) -> None:
        if list(written) != [0] or not isinstance(args[0], Tensor):
            self.refuse(f"func uses the operator {name} that writes into several tensors")
            return
        target, before = args[0], seen[0][0].number
        if before in self.inputs:
            self.refuse("func writes into its argument")
        elif before in self.constants and before not in self.written:
            # a counter or a running statistic: right as long as nothing else reads it
            self.stale.add(id(target))
            return
        view = VIEWS_IN_PLACE.get(name)
        if view is not None:
            view = getattr(view, func._overloadname) if name == "squeeze_" else view
            self.operations.append(Operation(view, *seen, (self.number(target),), False, detached))
            return
        siblings = set[int]().union(*(group for group in self.apart if id(target) in group))
        sharing = (id(other) for other in self._sharing_with(target))
        self.stale.update(other for other in sharing if other != id(target) and other not in siblings)
        after = self.number(target)
        operation = functional(func, name, seen, after, self.shapes[before], self.dtypes[before], detached)
        if operation is None:
            self.refuse(f"func writes in place by the operator {name}, which has no other form")
            return
        self.operations.append(operation)

    def current(self) -> Iterator[tuple[int, Tensor]]:
        """Return the tensors whose value is still the one that has the number."""
        return ((index, tensor) for index, tensor in self.tensors if self.numbers[id(tensor)] == index)
