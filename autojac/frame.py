"""How the arguments of a call become flat tensors with the batch on axis 0, and flat results their nest again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autojac.errors import InputError, OptionError
from autojac.signature import Leaf

CONSTANTS = "autojac constants"
"""The keyword under which positional arguments that are no tensors reach `Frame.fn`; not a name a caller can use."""


class Frame:
    """The layout of one kind of call, made once and used at every call.

    Args:
        func: the user's function.
        args: positional arguments of an example call.
        argnums: which of them to differentiate, as in `torch.func.jacrev`.
        in_dims: where each carries the batch, as in `AutoJacobian`.

    Raises:
        InputError: if a differentiated argument holds no real floating-point tensor.
        OptionError: if `argnums` or `in_dims` do not fit the arguments.
    """

    def __init__(
        self, func: Callable[..., Any], args: Sequence[Any], argnums: int | tuple[int, ...], in_dims: Any
    ) -> None:
        self.func = func
        self.argnums = argnums
        chosen = argnums if isinstance(argnums, tuple) else (argnums,)
        for number in chosen:
            if not -len(args) <= number < len(args):
                raise OptionError(f"argnums names argument {number}, but the call has {len(args)} positional arguments")
        chosen = tuple(number % len(args) for number in chosen)
        if len(set(chosen)) != len(chosen):
            raise OptionError(f"argnums names an argument twice: {argnums!r}")
        flat, self.spec = pytree.tree_flatten(tuple(args))
        self.tensor_at = tuple(index for index, value in enumerate(flat) if isinstance(value, Tensor))
        self.constants = {index: value for index, value in enumerate(flat) if index not in set(self.tensor_at)}
        self.size = len(flat)
        self.plain = all(isinstance(arg, Tensor) for arg in args)
        self.axes, self.declared = self._axes(args, in_dims)
        self.unbatched = self.declared and all(axis is None for axis in self.axes)
        self.moved = any(axis for axis in self.axes) or self.unbatched
        self.groups = self._groups(args, chosen)
        self.differentiated = tuple(sorted(position for _, group in self.groups for position in group))
        # one tensor in and one out, the usual case, costs no nesting
        self.single = self.plain and not self.unbatched and isinstance(argnums, int)
        self._require_floats(flat)
        self.out_spec: pytree.TreeSpec | None = None

    @property
    def context(self) -> str:
        """The nesting and the constants of the arguments, as text for a key."""
        constants = [f"{index}={describe(value)}" for index, value in self.constants.items()]
        return f"{self.spec} {' '.join(constants)} argnums={self.argnums} axes={self.axes if self.declared else 'auto'}"

    def leaves(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """The tensors among the arguments, batch first."""
        if self.plain:
            tensors = tuple(args)
        else:
            flat = pytree.tree_leaves(tuple(args))
            tensors = tuple(flat[index] for index in self.tensor_at)
        if not self.moved:
            return tensors
        if self.unbatched:
            differentiated = set(self.differentiated)
            return tuple(t.unsqueeze(0) if index in differentiated else t for index, t in enumerate(tensors))
        return tuple(t.movedim(axis, 0) if axis else t for t, axis in zip(tensors, self.axes, strict=True))

    def keywords(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The keyword arguments, with those positional arguments that are no tensors: a time, say, may change."""
        if not self.constants:
            return kwargs
        flat = pytree.tree_leaves(tuple(args))
        return {**kwargs, CONSTANTS: {index: flat[index] for index in self.constants}}

    def fn(self, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The user's function on flat tensors, its outputs flat."""
        if self.moved:
            leaves = self._back(leaves)
        if self.plain:
            out = self.func(*leaves, **kwargs)
        else:
            flat: list[Any] = [None] * self.size
            for index, value in kwargs.get(CONSTANTS, {}).items():
                flat[index] = value
            kwargs = {name: value for name, value in kwargs.items() if name != CONSTANTS}
            for index, tensor in zip(self.tensor_at, leaves, strict=True):
                flat[index] = tensor
            out = self.func(*pytree.tree_unflatten(flat, self.spec), **kwargs)
        if isinstance(out, Tensor):
            return (out.unsqueeze(0),) if self.unbatched else (out,)
        values, self.out_spec = pytree.tree_flatten(out)
        return tuple(value.unsqueeze(0) for value in values) if self.unbatched else tuple(values)

    def value(self, values: Sequence[Tensor]) -> Any:
        """The function's result from its flat outputs."""
        if self.out_spec is None and not self.unbatched:
            return values[0]
        own = [value.squeeze(0) for value in values] if self.unbatched else list(values)
        return own[0] if self.out_spec is None else pytree.tree_unflatten(own, self.out_spec)

    def jacobian(self, rows: Sequence[Sequence[Tensor]]) -> Any:
        """The Jacobians, nested as `torch.func.jacrev` nests them: outputs outside, arguments inside."""
        if self.single and self.out_spec is None:
            return rows[0][0]
        nested = [self._nest_row(row) for row in rows]
        return nested[0] if self.out_spec is None else pytree.tree_unflatten(nested, self.out_spec)

    def unnested(self, jacobian: Any) -> tuple[tuple[Tensor, ...], ...]:
        """The flat rows of a nested Jacobian: what `jacobian` was given, for each output and input."""
        flat = pytree.tree_leaves(jacobian)
        order = [position for _, group in self.groups for position in group]
        rows = []
        for start in range(0, len(flat), len(order)):
            at = dict(zip(order, flat[start : start + len(order)], strict=True))
            row = [at[position] for position in self.differentiated]
            rows.append(tuple(tensor.unsqueeze(0) for tensor in row) if self.unbatched else tuple(row))
        return tuple(rows)

    def roles(self, leaves: Sequence[Tensor], batched: Sequence[bool]) -> tuple[Leaf, ...]:
        """Shape and role of each leaf."""
        return tuple(
            Leaf(
                tuple(leaf.shape),
                str(leaf.dtype).removeprefix("torch."),
                leaf.device.type,
                has,
                position in self.differentiated,
            )
            for position, (leaf, has) in enumerate(zip(leaves, batched, strict=True))
        )

    def declared_batched(self) -> tuple[bool, ...] | None:
        """Which leaves carry the batch, where the user said so."""
        if not self.declared:
            return None
        if self.unbatched:
            return tuple(position in self.differentiated for position in range(len(self.axes)))
        return tuple(axis is not None for axis in self.axes)

    def _back(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        if self.unbatched:
            differentiated = set(self.differentiated)
            return [t.squeeze(0) if index in differentiated else t for index, t in enumerate(leaves)]
        return [t.movedim(0, axis) if axis else t for t, axis in zip(leaves, self.axes, strict=True)]

    def _nest_row(self, row: Sequence[Tensor]) -> Any:
        at = dict(zip(self.differentiated, row, strict=True))
        if self.unbatched:
            at = {position: jacobian.squeeze(0) for position, jacobian in at.items()}
        nests = tuple(pytree.tree_unflatten([at[position] for position in group], spec) for spec, group in self.groups)
        return nests if isinstance(self.argnums, tuple) else nests[0]

    def _axes(self, args: Sequence[Any], in_dims: Any) -> tuple[tuple[int | None, ...], bool]:
        """The batch axis of every tensor, and whether the user declared it."""
        if isinstance(in_dims, str):
            if in_dims != "auto":
                raise OptionError(f"in_dims must be 'auto', an int, None or a tuple of these, got {in_dims!r}")
            return (0,) * len(self.tensor_at), False
        per_arg = in_dims if isinstance(in_dims, (tuple, list)) else (in_dims,) * len(args)
        if len(per_arg) != len(args):
            raise OptionError(f"in_dims has {len(per_arg)} entries for {len(args)} positional arguments")
        axes: list[int | None] = []
        for number, (arg, axis) in enumerate(zip(args, per_arg, strict=True)):
            tensors = [value for value in pytree.tree_leaves(arg) if isinstance(value, Tensor)]
            for tensor in tensors:
                if axis is not None and (not isinstance(axis, int) or not -tensor.dim() <= axis < tensor.dim()):
                    raise OptionError(
                        f"in_dims is {axis!r} for argument {number}, a tensor of shape {tuple(tensor.shape)}"
                    )
                axes.append(axis if axis is None else axis % tensor.dim())
        return tuple(axes), True

    def _groups(self, args: Sequence[Any], chosen: Sequence[int]) -> list[tuple[pytree.TreeSpec, tuple[int, ...]]]:
        """For each differentiated argument its nesting and the positions of its tensors among the leaves."""
        order = {index: position for position, index in enumerate(self.tensor_at)}
        starts = [0]
        for arg in args:
            starts.append(starts[-1] + len(pytree.tree_leaves(arg)))
        groups = []
        for number in chosen:
            _, spec = pytree.tree_flatten(args[number])
            indices = range(starts[number], starts[number + 1])
            strangers = [index for index in indices if index not in order]
            if strangers or starts[number] == starts[number + 1]:
                what = type(self.constants[strangers[0]]).__name__ if strangers else "nothing"
                raise InputError(f"argument {number} is to be differentiated, but holds {what}; tensors were expected")
            groups.append((spec, tuple(order[index] for index in indices)))
        return groups

    def _require_floats(self, flat: Sequence[Any]) -> None:
        for position in self.differentiated:
            tensor = flat[self.tensor_at[position]]
            if tensor.is_complex():
                raise InputError(
                    f"tensor argument {position} is {tensor.dtype}; a real Jacobian needs real inputs. Pass "
                    "torch.view_as_real(x) and call torch.view_as_complex inside func"
                )
            if not tensor.is_floating_point():
                raise InputError(
                    f"tensor argument {position} is {tensor.dtype}, which has no derivative; a floating-point tensor "
                    "was expected. Convert it with x.float(), or leave it out of argnums"
                )
            if tensor.dim() == 0 and not self.unbatched and (not self.declared or self.axes[position] is not None):
                raise InputError(
                    f"tensor argument {position} is a scalar; the batch was expected on axis 0: shape (B, ...)"
                )


def describe(value: Any) -> Any:
    """What of an argument counts for the choice of a plan: shapes and dtypes of tensors, values of the rest.

    Of floats only the type counts: a time or a step size changes with every call.
    """
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, value.device, value.requires_grad)
    if isinstance(value, float):
        return float
    if isinstance(value, (int, str, bool, bytes, type(None), torch.dtype, torch.device)):
        return (type(value), value)
    flat, spec = pytree.tree_flatten(value)
    if len(flat) == 1 and flat[0] is value:
        return (type(value), repr(value))
    return (str(spec), tuple(describe(item) for item in flat))
