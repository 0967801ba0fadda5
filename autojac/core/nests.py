"""Nests of arguments and outputs: which of their leaves have derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from autojac.core import pytree
from autojac.errors import InputError, OptionError, kind_of, plural

Positions = tuple[int | None, ...]


def is_differentiable(value: Any) -> bool:
    """Check whether a value has derivatives; a complex tensor counts, to be refused by its name."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def tensor_leaves(nest: Any) -> list[Tensor]:
    """Return the tensors of a nest, flat."""
    return [value for value in pytree.tree_leaves(nest) if isinstance(value, Tensor)]


def chosen_arguments(args: Sequence[Any], argnums: int | tuple[int, ...]) -> tuple[int, ...]:
    """Return which arguments are differentiated, counted from the front.

    Raises:
        OptionError: if there are no such arguments, or one is named twice.
    """
    chosen = argnums if isinstance(argnums, tuple) else (argnums,)
    if not args:
        raise OptionError(
            "the positional arguments of a call of func were expected, got none. To plan(), tune() and explain() "
            "too, pass by position what is to be differentiated, as in jac.explain(x)"
        )
    for number in chosen:
        if not -len(args) <= number < len(args):
            raise OptionError(
                f"argnums names argument {number}, but the call has {plural(len(args), 'positional argument')}. "
                "Keyword arguments are not differentiated: pass by position what is to be"
            )
    chosen = tuple(number % len(args) for number in chosen)
    if len(set(chosen)) != len(chosen):
        raise OptionError(f"argnums names an argument twice: {argnums!r}. Name each once")
    return chosen


def differentiated_places(args: Sequence[Any], chosen: Sequence[int]) -> list[tuple[pytree.TreeSpec, Positions]]:
    """Return each differentiated argument's nesting, and where its tensors are among those of all arguments.

    None where a nest holds what has no derivative besides what has one: ids, masks, strings.
    """
    flat = pytree.tree_leaves(tuple(args))
    tensor_at = (index for index, value in enumerate(flat) if isinstance(value, Tensor))
    order = {index: position for position, index in enumerate(tensor_at)}
    start = 0
    groups: list[tuple[pytree.TreeSpec, Positions]] = []
    starts = [start := start + len(pytree.tree_leaves(arg)) for arg in args]
    for number in chosen:
        computed = pytree.computed_field(args[number])
        if computed is not None:
            raise InputError(
                f"argument {number} is to be differentiated, but its class computes the field {computed} (init=False) "
                "itself, maybe from other fields, and no derivative would go through that. Compute it inside func, or "
                "pass what is differentiated as an argument of its own"
            )
        values, spec = pytree.tree_flatten(args[number])
        first = starts[number] - len(values)
        tensors = [isinstance(value, Tensor) for value in values]
        differentiable = [is_differentiable(value) for value in values]
        if not any(differentiable) and not (values and all(tensors)):
            others = [value for value, has in zip(values, tensors, strict=True) if not has]
            what = kind_of(others[0]) if others else "nothing"
            why = next(filter(None, map(pytree.why_constant, others)), None)
            raise InputError(
                f"argument {number} is to be differentiated, but holds {what}; tensors were expected"
                f"{', and ' + why if why else ''}. Pass tensors, or leave it out of argnums"
            )
        # where nothing has a derivative, the error is about the tensors
        included = differentiable if any(differentiable) else tensors
        groups.append((spec, tuple(order[first + at] if has else None for at, has in enumerate(included))))
    return groups


class SplitOutput(NamedTuple):
    """What func returned, flat.

    Attributes:
        values: what is to be differentiated.
        rest: what passes through: None, integers, strings, and tensors of integers or booleans.
        spec: of the nest of both; None for one tensor.
        kept: which of its leaves are values; None where all are.
    """

    values: list[Any]
    rest: list[Any]
    spec: pytree.TreeSpec | None
    kept: tuple[bool, ...] | None


def split_output(output: Any) -> SplitOutput:
    """Return an output's values apart from what passes through; all of it, to be refused by name, without values."""
    if isinstance(output, Tensor):
        return SplitOutput([output], [], None, None)
    leaves, spec = pytree.tree_flatten(output)
    kept = [not _passes_through(value) for value in leaves]
    if all(kept) or not any(map(is_differentiable, leaves)):
        return SplitOutput(leaves, [], spec, None)
    parts: tuple[list[Any], list[Any]] = ([], [])
    for value, has in zip(leaves, kept, strict=True):
        parts[not has].append(value)
    return SplitOutput(*parts, spec, tuple(kept))


def _passes_through(value: Any) -> bool:
    # a float may have been computed from the input, and is refused
    if isinstance(value, Tensor):
        return not is_differentiable(value)
    return value is None or isinstance(value, (int, str, bytes))
