"""Nests as `torch.func` has them, and besides these dataclasses that hold tensors and that nobody has registered.

The names are those of `torch.utils._pytree`, whose registry stays as its owner left it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.torch_internals import pytree as of_torch

TreeSpec = of_torch.TreeSpec
tree_unflatten = of_torch.tree_unflatten
PARENTS = (dict, list, tuple, set, frozenset, str, bytes, int, float, BaseException)
"""Kinds of objects that hold more than attributes."""


class Record:
    """Stands for a dataclass in a nest; what is unflattened is the dataclass.

    It is rebuilt from the values of its fields, past `__init__`, which might compute with them.

    Args:
        value: the dataclass.
        every: dataclasses in its fields count whatever they hold.
    """

    __slots__ = ("every", "value")

    def __init__(self, value: Any, every: bool) -> None:
        self.value = value
        self.every = every


def _children(record: Record) -> tuple[list[Any], tuple[type, tuple[str, ...]]]:
    value = record.value
    names = tuple(field.name for field in dataclasses.fields(value) if hasattr(value, field.name))
    return [with_records(getattr(value, name), record.every) for name in names], (type(value), names)


def _rebuilt(children: Sequence[Any], context: tuple[type, tuple[str, ...]]) -> Any:
    kind, names = context
    made: Any = object.__new__(kind)
    for name, child in zip(names, children, strict=True):
        object.__setattr__(made, name, child)  # also where it is frozen
    return made


of_torch.register_pytree_node(Record, _children, _rebuilt)  # type: ignore[arg-type]


def is_record(value: Any, every: bool = False) -> bool:
    """Check whether a leaf of torch's is a dataclass that holds tensors, or `every` one; others are constants."""
    return _is_dataclass(value) and why_constant(value) is None and (every or _holds_tensors(value))


def why_constant(value: Any, above: tuple[Any, ...] = ()) -> str | None:
    """Return why a dataclass can't be rebuilt from its fields, so that it is a constant; None for all others."""
    if not _is_dataclass(value):
        return None
    kind = type(value)
    if any(value is one for one in above):
        return f"{kind.__name__} holds itself by way of its fields"
    new: Any = kind.__new__
    if new is not object.__new__ or isinstance(value, PARENTS):
        return f"{kind.__name__} is derived from {kind.__mro__[-2].__name__}, which is more than its fields"
    fields = {field.name for field in dataclasses.fields(value)}
    for name in getattr(value, "__dict__", ()):
        if name not in fields and not isinstance(getattr(kind, name, None), functools.cached_property):
            return f"{kind.__name__} holds {name!r} besides its fields"
    inner = (why_constant(leaf, (*above, value)) for leaf in _held(value))
    return next(filter(None, inner), None)


def _is_dataclass(value: Any) -> bool:
    return hasattr(type(value), "__dataclass_fields__") and not isinstance(value, (Tensor, torch.nn.Module, type))


def _held(value: Any) -> list[Any]:
    return of_torch.tree_leaves([getattr(value, field.name, None) for field in dataclasses.fields(value)])


def _holds_tensors(value: Any) -> bool:
    return any([isinstance(leaf, Tensor) or (_is_dataclass(leaf) and _holds_tensors(leaf)) for leaf in _held(value)])


def with_records(tree: Any, every: bool = False) -> Any:
    """Return a nest with `Record` in the place of dataclasses."""
    leaves, spec = of_torch.tree_flatten(tree)
    found = [is_record(leaf, every) for leaf in leaves]
    if not any(found):
        return tree
    return tree_unflatten([Record(x, every) if has else x for x, has in zip(leaves, found, strict=True)], spec)


def tree_flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """Return the leaves of a nest, and how they are nested."""
    leaves, spec = of_torch.tree_flatten(tree)
    if not any(map(is_record, leaves)):
        return leaves, spec
    return of_torch.tree_flatten(with_records(tree))


def tree_leaves(tree: Any, every: bool = False) -> list[Any]:
    """Return the leaves of a nest; with `every`, a dataclass without tensors is a nest as well."""
    leaves = of_torch.tree_leaves(tree)
    if not any([is_record(leaf, every) for leaf in leaves]):
        return leaves
    return of_torch.tree_leaves(with_records(tree, every))


def tree_map(change: Callable[[Any], Any], tree: Any) -> Any:
    """Return a nest of changed leaves."""
    leaves, spec = tree_flatten(tree)
    return tree_unflatten([change(leaf) for leaf in leaves], spec)


def tree_map_only(kind: type, change: Callable[[Any], Any], tree: Any) -> Any:
    """Return a nest with leaves of one kind changed."""
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, kind) else leaf, tree)


def flatten_up_to(spec: TreeSpec, tree: Any) -> list[Any]:
    """Return what of a nest stands at the leaves of another one.

    Raises:
        ValueError: if it is nested otherwise above these.
    """
    return spec.flatten_up_to(with_records(tree))


def flatten_prefix(prefix: Any, spec: TreeSpec) -> list[Any]:
    """Return for each leaf of a nest what a nest of its outer levels says of it, as torch.vmap reads in_dims.

    Raises:
        ValueError: if the levels differ.
    """
    entries, outer = of_torch.tree_flatten(with_records(prefix, every=True))
    # of tensors, without which a dataclass is a constant
    below = flatten_up_to(outer, tree_unflatten([torch.empty(0)] * spec.num_leaves, spec))
    return [entry for entry, part in zip(entries, below, strict=True) for _ in tree_leaves(part)]


def computed_field(tree: Any) -> str | None:
    """Return the name of a field that a dataclass computes itself, if one holds a floating-point tensor."""
    for leaf in of_torch.tree_leaves(tree):
        if not is_record(leaf):
            continue
        for field in dataclasses.fields(leaf):
            value = getattr(leaf, field.name, None)
            tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor) and x.is_floating_point()]
            if not field.init and tensors:
                return f"{type(leaf).__name__}.{field.name}"
            if inner := computed_field(value):
                return inner
    return None
