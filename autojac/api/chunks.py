"""Jacobians that do not fit into memory, some samples at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from autojac.api.jacobian_matrices import one_hot_seeds
from autojac.api.linear_systems import LinearSystems
from autojac.api.planned_call import PlannedCall
from autojac.api.product_arguments import CallShapes
from autojac.autodiff.seeds import spans
from autojac.core import pytree
from autojac.core.nests import is_differentiable, tensor_leaves
from autojac.core.options import parse_bytes
from autojac.core.product_functions import SampleWindow, WeightedOutput
from autojac.errors import InputError, OptionError, kind_of, plural

if TYPE_CHECKING:
    import numpy as np


class Chunks(LinearSystems):
    """The method of `AutoJacobian` that computes a Jacobian some samples at a time."""

    def chunks(self, *args: Any, bytes: int | str = "1GiB", out: Any = None, **kwargs: Any) -> Any:
        """Yield the Jacobian some samples at a time: (start, J) with J[0] that of sample number `start`.

        Independent samples are computed apart. Where they are coupled, each part evaluates the whole batch.

        Args:
            args, kwargs: the call.
            bytes: what the Jacobian of a part may take, as bytes or a size such as `"1GiB"`; half of memory_limit at
                most, and one sample's at least.
            out: a tensor, a NumPy array or a memory map in the shape of the whole Jacobian, or such in its nest:
                everything is computed now and written there, without a graph.

        Returns:
            An iterator over pairs (start, J) with J of shape (b, *out, *in), (b, *out, B, *in) for `layout="full"`, (b,
            n) for `"diagonal"`, nested as J is; aux is left out. With `out`, that.

        Raises:
            OptionError: for `layout="sparse"`, which holds no zeros, or a size that is none.
            InputError: for a function without a batch, or if `out` has not the shape and dtype of J or is read-only.
            UnsupportedError: if func updates buffers or draws random numbers.

        Example:
            >>> import numpy
            >>> import torch
            >>> from autojac import AutoJacobian
            >>> jac = AutoJacobian(lambda x: x**2, store=":memory:", on_miss="estimate")
            >>> x = torch.ones(5, 2)
            >>> [(start, J.shape) for start, J in jac.chunks(x, bytes=48)]
            [(0, torch.Size([3, 2, 2])), (3, torch.Size([2, 2, 2]))]
            >>> jac.chunks(x, bytes=48, out=numpy.zeros((5, 2, 2), "float32"))[4]
            array([[2., 0.],
                   [0., 2.]], dtype=float32)
        """
        func_args = self._func_args(args, kwargs)
        shapes, step = self._division(func_args, kwargs, bytes)
        targets = None if out is None else _check_targets(out, self._jacobian_shapes(shapes), func_args, shapes)
        parts = self._parts(func_args, kwargs, shapes, step)
        if targets is None:
            return parts
        with torch.no_grad():
            for start, J in parts:
                for target, part in zip(targets, tensor_leaves(J), strict=True):
                    target[start : start + len(part)].copy_(part)
        return out

    def _division(self, args: Sequence[Any], kwargs: Mapping[str, Any], room: int | str) -> tuple[CallShapes, int]:
        """Return the shapes of a call, and how many samples have a Jacobian that fits into `room` bytes."""
        size = parse_bytes(room, "bytes")
        if size is None or self.options.layout == "sparse":
            got = "bytes=None" if size is None else "layout='sparse', which holds no zeros"
            raise OptionError(
                f"chunks expects a size and layout='blocks', 'full' or 'diagonal', got {got}. Pass bytes='1GiB', or "
                "call jac(x) for the sparse Jacobian"
            )
        shapes = self._shapes(args, kwargs, probing=True)
        if shapes.batch is None:
            raise InputError(
                "chunks expects a function with a batch, whose samples it divides, but in_dims=None says that there is "
                "none. Pass in_dims, or differentiate fewer inputs at a time"
            )
        shapes.require_repeatable("a Jacobian in parts")
        each = sum(prod(shape[1:]) for shape in self._jacobian_shapes(shapes)) * shapes.item_bytes
        return shapes, max(1, min(size, self._memory_limit(shapes) // 2) // max(each, 1))

    def _jacobian_shapes(self, shapes: CallShapes) -> list[tuple[int, ...]]:
        """Return the shape of each Jacobian, those of an output side by side."""
        assert shapes.batch is not None
        jacobians: list[tuple[int, ...]] = []
        for event in shapes.outputs:
            for position, columns in zip(shapes.differentiated, shapes.inputs, strict=True):
                if self.options.layout == "diagonal":
                    jacobians.append((shapes.batch, prod(columns)))
                    continue
                lead = (shapes.batch,) if self._is_whole and shapes.axes[position] is not None else ()
                jacobians.append((shapes.batch, *event, *lead, *columns))
        return jacobians

    def _parts(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: CallShapes, step: int
    ) -> Iterator[tuple[int, Any]]:
        for start, stop in spans(int(shapes.batch or 0), step):
            if self._is_whole:
                yield start, self._rows(args, kwargs, shapes, start, stop)
                continue
            plan, result = self._part_call(args, kwargs, shapes, start, stop).run()
            if shapes.is_sliceable:
                yield start, plan.jacobian(result)
            else:
                leaves, count = tensor_leaves(plan.jacobian(result)), len(shapes.differentiated)
                rows = [leaves[first : first + count] for first in range(0, len(leaves), count)]
                yield start, shapes.nested_outputs([self._nested_inputs(args, row) for row in rows])

    def _part_call(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: CallShapes, start: int, stop: int
    ) -> PlannedCall:
        """Return the call for the Jacobians of some samples: alone, or among the others."""
        if shapes.is_sliceable:
            return PlannedCall(self, _slice(args, shapes.axes, start, stop), kwargs)
        flat = [t for t in tensor_leaves(self._pick_differentiated(args)) if is_differentiable(t)]
        axes = [shapes.axes[position] for position in shapes.differentiated]
        parts = [x if axis is None else x.narrow(axis, start, stop - start) for x, axis in zip(flat, axes, strict=True)]
        index = torch.arange(start, stop, device=shapes.device)
        return PlannedCall(self._window(args, tuple(axes)), (index, *parts, *args), kwargs)

    def _rows(self, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: CallShapes, start: int, stop: int) -> Any:
        """Return the rows of some samples, of the whole batch's Jacobian."""
        rows = []
        for event, cotangents in zip(shapes.outputs, self._row_seeds(args, shapes, start, stop), strict=True):
            vjps = self._without_aux(self._product(WeightedOutput, args, kwargs, cotangents, True))
            shape = (stop - start, *event)
            rows.append(pytree.tree_map_only(Tensor, functools.partial(_unflatten, shape), vjps))
        return shapes.nested_outputs(rows)

    @staticmethod
    def _row_seeds(args: Sequence[Any], shapes: CallShapes, start: int, stop: int) -> Iterator[Any]:
        """Yield the cotangents that give the rows of some samples, output by output."""
        offset = 0
        for event in shapes.outputs:
            count = prod(event)
            seeds = one_hot_seeds(shapes, args, offset + start * count, offset + stop * count, False, True)
            yield shapes.nested_outputs(seeds)
            offset += int(shapes.batch or 0) * count

    def _window(self, args: Sequence[Any], axes: tuple[int | None, ...]) -> Self:
        """Return the wrapper for the Jacobians of some samples among the others."""
        key = (axes, len(args))
        if key in self._others:
            return self._others[key]
        function = SampleWindow(self.func, self._argnums(args), self.options.has_aux, axes)
        options = dataclasses.replace(
            self.options,
            argnums=tuple(range(1, len(axes) + 1)),
            in_dims=(0, *axes, *[None] * len(args)),
            coupling=self.options.coupling if isinstance(self.options.coupling, str) else "auto",
        )
        return self._others.setdefault(key, self._rewrap(function, options))


def _unflatten(shape: tuple[int, ...], rows: Tensor) -> Tensor:
    return rows.reshape(*shape, *rows.shape[1:])


def _slice(args: Sequence[Any], axes: Sequence[int | None], start: int, stop: int) -> tuple[Any, ...]:
    """Return the arguments of some samples alone."""
    remaining = iter(axes)

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        axis = next(remaining)
        return value if axis is None else value.narrow(axis, start, stop - start)

    return tuple(pytree.tree_map(cut, tuple(args)))


def _check_targets(
    out: Any, wanted: Sequence[tuple[int, ...]], args: Sequence[Any], shapes: CallShapes
) -> list[Tensor]:
    """Return the parts of `out` as tensors that share its memory."""
    tensors = tensor_leaves(tuple(args))
    dtypes = [tensors[position].dtype for position in shapes.differentiated] * len(shapes.outputs)
    flat = [value for value in pytree.tree_leaves(out) if value is not None]
    if len(flat) != len(wanted):
        raise InputError(
            f"out was expected to hold {plural(len(wanted), 'tensor')} or arrays, one per Jacobian, got {len(flat)}. "
            "Nest them as J is nested"
        )
    return [_target(*each) for each in zip(flat, wanted, dtypes, strict=True)]


def _target(target: Tensor | np.ndarray[Any, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    wanted = str(dtype).removeprefix("torch.")
    got, name = None, str(getattr(target, "dtype", "")).removeprefix("torch.")
    if isinstance(target, Tensor):
        got = "one that requires grad" if target.requires_grad else None
    elif not (hasattr(target, "flags") and hasattr(target, "__array__")):
        got = kind_of(target)
    elif not target.flags.writeable:
        got = "one that is read-only"
    if got is None and (tuple(target.shape) != shape or name != wanted):
        got = f"{name} of shape {tuple(target.shape)}"
    if got is not None:
        raise InputError(
            f"out was expected to be a writable tensor or array of shape {shape} and dtype {wanted}, got {got}. "
            "Make one by torch.empty, or by numpy.memmap with mode='w+'"
        )
    return target if isinstance(target, Tensor) else torch.from_numpy(target)
