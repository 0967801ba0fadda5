"""Nests as `torch.func` has them, and also unregistered dataclasses that hold tensors.

The names are those of `torch.utils._pytree`, whose registry stays as its owner left it.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from autojac.torch_internals import pytree as of_torch

TreeSpec = of_torch.TreeSpec
tree_unflatten = of_torch.tree_unflatten
PARENTS = (dict, list, tuple, set, frozenset, str, bytes, int, float, BaseException)
"""Kinds of objects that hold more than attributes."""
_names: weakref.WeakKeyDictionary[type, tuple[str, ...]] = weakref.WeakKeyDictionary()


class Record:
    """A wrapper that makes a dataclass a node of a nest; unflattening gives the dataclass.

    It is rebuilt from the values of its fields without `__init__`, which might compute with them.

    Args:
        value: the dataclass.
        every: dataclasses in its fields are nodes even where they hold no tensors.
    """

    __slots__ = ("every", "value")

    def __init__(self, value: Any, every: bool) -> None:
        self.value = value
        self.every = every


def _children(record: Record) -> tuple[list[Any], tuple[type, tuple[str, ...]]]:
    value = record.value
    names = tuple([name for name in _field_names(type(value)) if hasattr(value, name)])
    return [with_records(getattr(value, name), record.every) for name in names], (type(value), names)


def _rebuild(children: Sequence[Any], context: tuple[type, tuple[str, ...]]) -> Any:
    kind, names = context
    instance: Any = object.__new__(kind)
    for name, child in zip(names, children, strict=True):
        object.__setattr__(instance, name, child)  # also where it is frozen
    return instance


of_torch.register_pytree_node(Record, _children, _rebuild)  # type: ignore[arg-type]


def is_record(value: Any, every: bool = False) -> bool:
    """Check whether a leaf is a dataclass that holds tensors, or with `every` any dataclass; others are constants."""
    return _is_dataclass(value) and (every or _holds_tensors(value)) and why_constant(value) is None


def why_constant(value: Any, above: tuple[Any, ...] = ()) -> str | None:
    """Return why a dataclass can't be rebuilt from its fields, so that it is a constant; None for all others."""
    if not _is_dataclass(value):
        return None
    kind = type(value)
    if any([value is one for one in above]):
        return f"{kind.__name__} holds itself by way of its fields"
    new: Any = kind.__new__
    if new is not object.__new__ or isinstance(value, PARENTS):
        return f"{kind.__name__} is derived from {kind.__mro__[-2].__name__}, which is more than its fields"
    fields = _field_names(kind)
    for name in getattr(value, "__dict__", ()):
        if name not in fields and not isinstance(getattr(kind, name, None), functools.cached_property):
            return f"{kind.__name__} holds {name!r} besides its fields"
    for leaf in _field_values(value):
        if why := why_constant(leaf, (*above, value)):
            return why
    return None


def _is_dataclass(value: Any) -> bool:
    return hasattr(type(value), "__dataclass_fields__") and not isinstance(value, (Tensor, torch.nn.Module, type))


def _field_names(kind: Any) -> tuple[str, ...]:
    names = _names.get(kind)
    if names is None:
        names = _names[kind] = tuple(field.name for field in dataclasses.fields(kind))
    return names


def _field_values(value: Any) -> list[Any]:
    values = [getattr(value, name, None) for name in _field_names(type(value))]
    return values if all([_is_plain(part) for part in values]) else of_torch.tree_leaves(values)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (Tensor, str, int, float, NoneType))


def _holds_tensors(value: Any, above: tuple[Any, ...] = ()) -> bool:
    path = (*above, value)
    for leaf in _field_values(value):
        if isinstance(leaf, Tensor):
            return True
        if _is_dataclass(leaf) and all([leaf is not one for one in path]) and _holds_tensors(leaf, path):
            return True
    return False


def with_records(tree: Any, every: bool = False) -> Any:
    """Return a nest with dataclasses wrapped in `Record`."""
    if _is_plain(tree):
        return tree
    return _record(tree, *of_torch.tree_flatten(tree), every)


def _record(tree: Any, leaves: list[Any], spec: TreeSpec, every: bool = False) -> Any:
    wrap = [is_record(leaf, every) for leaf in leaves]
    if not any(wrap):
        return tree
    return tree_unflatten([Record(x, every) if has else x for x, has in zip(leaves, wrap, strict=True)], spec)


def tree_flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """Return the leaves of a nest, and how they are nested."""
    leaves, spec = of_torch.tree_flatten(tree)
    wrapped = _record(tree, leaves, spec)
    return (leaves, spec) if wrapped is tree else of_torch.tree_flatten(wrapped)


def tree_leaves(tree: Any, every: bool = False) -> list[Any]:
    """Return the leaves of a nest; with `every`, a dataclass without tensors is a nest as well."""
    leaves = of_torch.tree_leaves(tree)
    if not any(map(_is_dataclass, leaves)):
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
    """Return the parts of a nest that stand where another nest has its leaves.

    Raises:
        ValueError: if it is nested otherwise above these.
    """
    return spec.flatten_up_to(with_records(tree))


def flatten_prefix(prefix: Any, spec: TreeSpec) -> list[Any]:
    """Return for each leaf of a nest the entry of a nest of its outer levels, as torch.vmap reads in_dims.

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
