"""Where each tensor of a call carries the batch, as `in_dims` says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from torch import Tensor

from autojac.core import pytree
from autojac.errors import OptionError, plural

AUTO: Final = "auto"
"""In place of an axis: infer whether axis 0 of these tensors runs over samples."""
Axis = int | None | str

EXPECTED = (
    "in_dims must be 'auto', an int, None, or a tuple of these, or of nests of these, one per positional argument"
)


def batch_axes(args: Sequence[Any], in_dims: Any) -> tuple[Axis, ...]:
    """Return the batch axis of every tensor argument, counted from the front; `AUTO` where it is to be inferred.

    Args:
        args: positional arguments of a call.
        in_dims: one entry for all arguments, or a tuple of one for each, which is an entry or a nest of entries whose
            outer levels are those of the argument, as in `torch.vmap`.

    Raises:
        OptionError: if `in_dims` does not fit the arguments.
    """
    per_argument = tuple(in_dims) if isinstance(in_dims, (tuple, list)) else (in_dims,) * len(args)
    if len(per_argument) != len(args):
        raise OptionError(
            f"in_dims has entries for {plural(len(per_argument), 'argument')}, but the call has {len(args)}. Give "
            "one for each positional argument, or a single one for all"
        )
    axes: list[Axis] = []
    for number, (arg, entry) in enumerate(zip(args, per_argument, strict=True)):
        flat, spec = pytree.tree_flatten(arg)
        try:
            entries = pytree.flatten_prefix(entry, spec)
        except ValueError as error:
            raise OptionError(f"in_dims is {entry!r} for argument {number}, whose nest differs. {EXPECTED}") from error
        axes += [
            _axis(value, axis, number) for value, axis in zip(flat, entries, strict=True) if isinstance(value, Tensor)
        ]
    return tuple(axes)


def _axis(tensor: Tensor, axis: Any, number: int) -> Axis:
    if axis is None or axis == AUTO:
        return AUTO if axis is not None else None
    assert isinstance(axis, int)
    if not -tensor.dim() <= axis < tensor.dim():
        raise OptionError(
            f"in_dims is {axis!r} for argument {number}, but its shape is {tuple(tensor.shape)}. Name one of its axes, "
            "or None where all samples share it"
        )
    return axis % tensor.dim()
