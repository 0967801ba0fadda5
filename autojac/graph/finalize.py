"""From what was written down of a call to the graph that autograd would follow, or to a sentence why there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from autojac.errors import UnsupportedError
from autojac.graph.ir import Graph, Operation, Value
from autojac.graph.operators import autograd_nodes, reaches
from autojac.torch_internals import FunctionBase

aten = torch.ops.aten


class Notes(Protocol):
    """What a recorder has written down."""

    shapes: dict[int, tuple[int, ...]]
    dtypes: dict[int, torch.dtype]
    constants: dict[int, Tensor]
    operations: list[Operation]
    marks: dict[int, str]
    tensors: list[tuple[int, Tensor]]
    numbers: dict[int, int]
    stale: set[int]
    written: dict[int, str]
    inputs: tuple[int, ...]
    reason: str
    reads_data: bool

    def refuse(self, reason: str) -> None: ...
    def current(self) -> Iterator[tuple[int, Tensor]]: ...


def graph_of(notes: Notes, values: Sequence[Tensor], inputs: Sequence[Tensor]) -> Graph:
    """Return what was recorded, without what no output depends on.

    Args:
        notes: of the call.
        values, inputs: what it returned, and the tensors that stood for the differentiated leaves.

    Raises:
        UnsupportedError: if the graph is not what autograd would follow.
    """
    outputs = []
    for value in values:
        if id(value) not in notes.numbers:
            notes.refuse("an output comes from where no operator was seen")
            break
        if id(value) in notes.stale:
            notes.refuse("an output is a view of a tensor that was written in place")
        outputs.append(notes.numbers[id(value)])
    if notes.reason:
        raise UnsupportedError(notes.reason)
    _require_plain(notes, values)
    operations, unseen = _reconnect(notes)
    connected = {index for index, tensor in notes.current() if tensor.requires_grad}
    whole = Graph(tuple(operations), notes.inputs, tuple(outputs), {}, notes.shapes, notes.dtypes, notes.reads_data)
    needed = [operations[place] for place in whole.find_needed(outputs, frozenset(notes.inputs))]
    read = {index for operation in needed for index in operation.sources} | set(outputs)
    if read & unseen:
        raise UnsupportedError("autograd brings back a tensor that was not seen before")
    for index in read & notes.written.keys():
        if index in connected:
            raise UnsupportedError(f"func {notes.written[index]}")
    constants = {index: tensor for index, tensor in notes.constants.items() if index in read}
    for index, tensor in constants.items():
        if id(tensor) in notes.stale:
            raise UnsupportedError("func writes into a captured tensor that it also reads")
        if tensor.grad_fn is not None and reaches(tensor, inputs):
            raise UnsupportedError(f"a tensor {notes.shapes[index]} comes from where no operator was seen")
    drawn = frozenset(notes.written)
    return dataclasses.replace(whole, operations=tuple(needed), constants=constants, marks=notes.marks, drawn=drawn)


def _reconnect(notes: Notes) -> tuple[list[Operation], set[int]]:
    """Return the operators, with what autograd saved and brought back as what it was: recorded are detached copies.

    Returns:
        the operators, and the values brought back of which nobody saw what they were.
    """
    functions = {index: tensor.grad_fn for index, tensor in notes.current() if tensor.grad_fn is not None}
    sources: dict[int, int] = {}
    operations: list[Operation] = []
    unseen: set[int] = set()
    for operation in notes.operations:
        if operation.target is aten.detach.default:
            copy, source = operation.outputs[0], operation.sources[0]
            assert copy is not None
            sources[copy] = source
            if copy in functions:
                while functions.get(source) is not functions[copy] and source in sources:
                    source = sources[source]
                if functions.get(source) is functions[copy]:
                    operations.append(Operation(aten.alias.default, (Value(source),), {}, operation.outputs))
                    continue
                unseen.add(copy)
        operations.append(operation)
    return operations, unseen


def _require_plain(notes: Notes, values: Sequence[Tensor]) -> None:
    """Refuse what differentiates otherwise than its operators do."""
    for _, tensor in notes.tensors:
        if tensor.grad_fn is not None and tensor._backward_hooks:
            raise UnsupportedError("func hangs a hook on a tensor, which may change gradients")
    for node in autograd_nodes(values):
        if isinstance(node, FunctionBase):
            name = type(node).__name__.removesuffix("Backward")
            raise UnsupportedError(f"func uses the custom autograd Function {name}, whose derivative is its own")
