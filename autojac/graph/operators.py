"""What is known of single aten operators: what they write, draw and read, and their forms that write nothing."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff.pullback import is_custom
from autojac.graph.ir import Graph, Operation
from autojac.graph.operator_facts import facts_of, names_with
from autojac.graph.operator_kinds import MASKS, Kind
from autojac.torch_internals import DispatchKey, ForceDispatchKeys, excluded_keys, included_keys

aten = torch.ops.aten
BATCH_NORMS = names_with("batch_norm")
FORWARD_ONCE = names_with("forward_formula_once")
PARTITIONS = names_with("partition")
LITERALS = names_with("literal")
VIEWS_IN_PLACE = {
    "transpose_": aten.transpose.int,
    "t_": aten.t.default,
    "unsqueeze_": aten.unsqueeze.default,
    "squeeze_": aten.squeeze,
}
"""What changes a tensor's shape and no element of it."""


_ZERO = DispatchKey.ZeroTensor


def call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator from within a dispatch mode.

    There torch leaves out its handling of tensors that are known to be zero and have no memory: an operator that
    consists of others (`mul.Scalar`) then reads from address 0. So for those it is switched on again.
    """
    if not any(isinstance(arg, Tensor) and arg._is_zerotensor() for arg in args):
        return func(*args, **kwargs)
    included, excluded = included_keys(), excluded_keys()
    with ForceDispatchKeys(included, excluded.remove(_ZERO)):
        return func(*args, **kwargs)


@functools.cache
def traits(func: Any) -> tuple[str, tuple[int | str, ...], bool]:
    """Return an operator's name, the arguments that it writes into, and whether it draws random numbers."""
    schema = func._schema
    written = tuple(
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    return schema.name.removeprefix("aten::"), written, torch.Tag.nondeterministic_seeded in func.tags


@functools.cache
def _looks(func: Any) -> bool:
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
    returns = [str(value.type) for value in func._schema.returns]
    tells = bool(returns) and not any("Tensor" in kind for kind in returns)
    if not any("Tensor" in str(argument.type) for argument in func._schema.arguments):
        return False  # such as promote_types
    facts = facts_of(func)
    decides = facts.shape_by_value or (bool(tags) and "index" not in func._schema.name)
    return decides or (tells and facts.kind is not Kind.SIZES)


def reads_data(func: Any, args: Sequence[Any]) -> bool:
    """Check whether Python, or a shape, may depend on the data after an operator."""
    if _looks(func):
        return True
    # a mask takes as many entries as are set
    indices = args[1] if traits(func)[0] in ("index", "_unsafe_index") and len(args) > 1 else ()
    return any(isinstance(index, Tensor) and index.dtype in MASKS for index in indices)


def makes_shapes(func: Any) -> bool:
    """Check whether an operator that reads data shows it to Python by a shape alone, as `nonzero` does."""
    return torch.Tag.dynamic_output_shape in func.tags or "index" in func._schema.name


def certain(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Check whether an operator that may draw, attention with dropout, was told not to."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return "dropout_p" in names and not given.get("dropout_p")


def functional(
    func: Any, name: str, seen: tuple[Any, Any], after: int, shape: Sequence[int], dtype: torch.dtype, detached: bool
) -> Operation | None:
    """Return an in-place operator as one that makes a tensor; None if there is none."""
    args, kwargs = seen
    if name == "copy_":
        return Operation(_COPY_VALUE, (args[1], list(shape), dtype), {}, (after,), False, detached)
    target = _out_of_place(func, name)
    return None if target is None else Operation(target, args, kwargs, (after,), False, detached)


@functools.cache
def _out_of_place(func: Any, name: str) -> Any:
    """Return the operator that takes the same arguments and makes a tensor; None if there is none.

    Its overload may have another name: `pow.Scalar` is not `pow_.Scalar` but a number to the power of a tensor.
    """
    packet = getattr(aten, name.removesuffix("_"), None)
    overloads = packet.overloads() if packet is not None and name.endswith("_") else ()
    alike = (one for one in (getattr(packet, overload) for overload in overloads) if _takes(one) == _takes(func))
    return next(alike, None)


def _takes(func: Any) -> list[tuple[str, str]]:
    """Return the names and types of an operator's arguments."""
    return [(argument.name, str(argument.type)) for argument in func._schema.arguments]


class _CopyValue:
    """The value of `copy_`: the source in the shape and dtype of the target."""

    _schema = aten.expand.default._schema
    tags: tuple[Any, ...] = ()

    def __call__(self, source: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return source.to(dtype).expand(shape)


_COPY_VALUE = _CopyValue()


def forward_once(graph: Graph) -> tuple[str, ...]:
    """Return the operators of `FORWARD_ONCE` in a graph."""
    return tuple(dict.fromkeys(one.name for one in graph.operations if one.name in FORWARD_ONCE))


def autograd_nodes(values: Sequence[Tensor]) -> Iterator[Any]:
    todo = [value.grad_fn for value in values if value.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for following in map(operator.itemgetter(0), node.next_functions):
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)


def custom_functions(values: Sequence[Tensor]) -> set[str]:
    """Return the names of the `torch.autograd.Function`s in a graph."""
    nodes = (node for node in autograd_nodes(values) if is_custom(node))
    return {type(node).__name__.removesuffix("Backward") for node in nodes}


def reaches(tensor: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Check whether a tensor's graph of autograd leads back to one of the inputs."""
    leaves = {id(x) for x in inputs}
    functions = {x.grad_fn for x in inputs if x.grad_fn is not None}
    return any(node in functions or id(getattr(node, "variable", None)) in leaves for node in autograd_nodes([tensor]))
