"""How the arguments of a call become flat tensors with the batch on axis 0, and flat results their nest again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from autojac.core import pytree
from autojac.core.autocast import current_autocast, inside_autocast
from autojac.core.batch_axes import AUTO, batch_axes
from autojac.core.keywords import Keywords
from autojac.core.module_function import ModuleFunction
from autojac.core.nests import chosen_arguments, differentiated_places, split_output, tensor_leaves
from autojac.core.options import Options
from autojac.core.settable_arguments import SettableArguments, find_settable_places, is_settable, write_back_copies
from autojac.core.signature import Leaf
from autojac.core.tensor_kinds import NESTED, not_dense, own_class, without_subclass
from autojac.errors import InputError, OutputError, kind_of


class CallLayout:
    """The layout of one kind of call, made once and used at every call.

    Args:
        func: the user's function.
        args: positional arguments of an example call.
        options: `argnums`, `in_dims` and `has_aux` say how to read the call.

    Raises:
        InputError: if a differentiated argument holds no real floating-point tensor.
        OptionError: if `argnums` or `in_dims` do not fit the arguments.
    """

    def __init__(self, func: Callable[..., Any], args: Sequence[Any], options: Options) -> None:
        self.func = func
        # part of the key of a plan, as func is
        self.autocast = current_autocast()
        self.has_aux = options.has_aux
        self.of = options.of
        self.argnums = argnums = options.argnums
        chosen = chosen_arguments(args, argnums)
        flat, self.spec = pytree.tree_flatten(tuple(args))
        self.tensor_at = tuple(index for index, value in enumerate(flat) if isinstance(value, Tensor))
        self.constants = {index: value for index, value in enumerate(flat) if index not in set(self.tensor_at)}
        self.classes = tuple(own_class(flat[index]) for index in self.tensor_at)
        self.size = len(flat)
        self.plain = all(isinstance(arg, Tensor) for arg in args)
        # a module's parameters are passed by autojac, not by the caller
        self.is_settable = bool(find_settable_places(args[1:] if isinstance(func, ModuleFunction) else args)[0])
        self.axes = batch_axes(args, options.in_dims)
        self.declared = tuple(axis != AUTO for axis in self.axes)
        self.unbatched = all(axis is None for axis in self.axes)
        # the axes to bring to the front; 0 where the batch is there already
        self.sources = tuple(axis if isinstance(axis, int) else 0 for axis in self.axes)
        self.moved = any(self.sources) or self.unbatched
        self.groups = differentiated_places(args, chosen)
        self.differentiated = tuple(sorted(self.order))
        # one tensor in and one out, the usual case, costs no nesting
        self.single = self.plain and not self.unbatched and isinstance(argnums, int)
        self._require_floats(flat)
        self.out_spec: pytree.TreeSpec | None = None
        # which outputs have derivatives, where some have none, such as ids and None
        self.out_kept: tuple[bool, ...] | None = None

    @property
    def returns_more(self) -> bool:
        """Whether func returns more than is differentiated."""
        return self.has_aux or self.out_kept is not None

    @property
    def order(self) -> list[int]:
        """The positions of the differentiated tensors among the leaves, in the order of `argnums` and their nests."""
        return [position for _, group in self.groups for position in group if position is not None]

    @property
    def context(self) -> str:
        """The nesting and the constants of the arguments, as text for a key."""
        constants = [f"{index}={describe(value)}" for index, value in self.constants.items()]
        constants += [f"{index}: {kind}" for index, kind in enumerate(self.classes) if kind]
        axes = self.axes if any(self.declared) else AUTO
        aux = " aux" if self.has_aux else ""
        of = f" of={self.of}" if self.of else ""
        return f"{self.spec} {' '.join(constants)} argnums={self.argnums} axes={axes}{aux}{of}"

    def leaves(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """Return the tensors among the arguments, batch first."""
        if self.plain:
            tensors = tuple(args)
        else:
            flat = pytree.tree_leaves(tuple(args))
            tensors = tuple(flat[index] for index in self.tensor_at)
        if any(map(Tensor.is_inference, tensors)) and not torch.is_inference_mode_enabled():
            tensors = tuple(_recordable(t) for t in tensors)
        if not self.moved:
            return tensors
        if self.unbatched:
            differentiated = set(self.differentiated)
            return tuple(t.unsqueeze(0) if index in differentiated else t for index, t in enumerate(tensors))
        return tuple(t.movedim(axis, 0) if axis else t for t, axis in zip(tensors, self.sources, strict=True))

    def keywords(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the keyword arguments with the non-tensor positional ones, which may change, as a time does."""
        if kwargs and any(isinstance(value, Tensor) and value.is_inference() for value in kwargs.values()):
            kwargs = {name: _recordable(value) for name, value in kwargs.items()}
        constants: dict[int, Any] = {}
        if self.constants:
            flat = pytree.tree_leaves(tuple(args))
            constants = {index: flat[index] for index in self.constants}
        settable = None
        if self.is_settable or (kwargs and is_settable(kwargs.values())):
            settable = SettableArguments(args, kwargs, constants.values(), self.func)
        return Keywords(kwargs, constants, settable=settable) if constants or settable else kwargs

    def fn(self, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Call the user's function on flat tensors under the autocast of the call; return its outputs flat."""
        if not self.autocast:
            return self._fn(leaves, kwargs)
        with inside_autocast(self.autocast):
            return self._fn(leaves, kwargs)

    def _fn(self, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        if self.moved:
            leaves = self._restore_axes(leaves)
        args = leaves if self.plain else self._nested_inputs(leaves, kwargs)
        if isinstance(kwargs, Keywords) and kwargs.settable is not None:
            with kwargs.settable.evaluation(args):
                out = self.func(*args, **kwargs)
        else:
            out = self.func(*args, **kwargs)
        if self.has_aux:
            if not isinstance(out, tuple) or len(out) != 2:
                what = f"{len(out)} values" if isinstance(out, tuple) else kind_of(out)
                raise OutputError(
                    f"has_aux=True expects func to return a pair (output, aux), but it returned {what}. Return such a "
                    "pair, or leave has_aux out"
                )
            out, aux = out
        else:
            aux = None
        values, rest, self.out_spec, self.out_kept = split_output(out)
        if isinstance(kwargs, Keywords) and kwargs.aux is not None:
            kwargs.aux.append((aux, rest))
        values = [without_subclass(value) for value in values]
        if not self.unbatched:
            return tuple(values)
        # non-tensors go on as they are, to be refused by name
        return tuple(value.unsqueeze(0) if isinstance(value, Tensor) else value for value in values)

    def _nested_inputs(self, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        flat: list[Any] = [None] * self.size
        if isinstance(kwargs, Keywords):
            for index, value in kwargs.constants.items():
                flat[index] = value
        for index, tensor in zip(self.tensor_at, leaves, strict=True):
            flat[index] = tensor
        args: Sequence[Any] = pytree.tree_unflatten(flat, self.spec)
        return args

    def value(self, values: Sequence[Tensor], rest: Iterable[Any] = ()) -> Any:
        """Return the function's result from its flat outputs, and from what it returned without a derivative."""
        if self.out_spec is None and not self.unbatched:
            return values[0]
        results = [value.squeeze(0) for value in values] if self.unbatched else list(values)
        return self._nested_outputs(results, rest)

    def _nested_outputs(self, results: Sequence[Any], rest: Iterable[Any]) -> Any:
        if self.out_spec is None:
            return results[0]
        if self.out_kept is not None:
            differentiable, others = iter(results), iter(rest)
            results = [next(differentiable) if has else next(others) for has in self.out_kept]
        return pytree.tree_unflatten(list(results), self.out_spec)

    def jacobian(self, rows: Sequence[Sequence[Tensor]]) -> Any:
        """Return the Jacobians, nested as `torch.func.jacrev` nests them: outputs outside, arguments inside.

        In the place of what has no derivative, such as ids in a dict of an argument, there is None.
        """
        if self.single and self.out_spec is None:
            return rows[0][0]
        nested = [self._nest_row(row) for row in rows]
        return self._nested_outputs(nested, itertools.repeat(None))

    def unnest(self, jacobian: Any) -> tuple[tuple[Tensor, ...], ...]:
        """Return the flat rows of a nested Jacobian: what `jacobian` was given, for each output and input."""
        flat, order, rows = tensor_leaves(jacobian), self.order, []
        for start in range(0, len(flat), len(order)):
            at = dict(zip(order, flat[start : start + len(order)], strict=True))
            row = [at[position] for position in self.differentiated]
            rows.append(tuple(t.unsqueeze(0) if self.unbatched and t.layout == torch.strided else t for t in row))
        return tuple(rows)

    def roles(self, leaves: Sequence[Tensor], batched: Sequence[bool]) -> tuple[Leaf, ...]:
        """Return shape and role of each leaf."""
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

    def batched_leaves(self, guess: Sequence[bool]) -> tuple[bool, ...]:
        """Return which leaves carry the batch: as the user said, else as guessed."""
        if self.unbatched:
            return tuple(position in self.differentiated for position in range(len(self.axes)))
        return tuple(has if axis == AUTO else axis is not None for axis, has in zip(self.axes, guess, strict=True))

    def _restore_axes(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        if self.unbatched:
            differentiated = set(self.differentiated)
            return [t.squeeze(0) if index in differentiated else t for index, t in enumerate(leaves)]
        return [t.movedim(0, axis) if axis else t for t, axis in zip(leaves, self.sources, strict=True)]

    def _nest_row(self, row: Sequence[Tensor]) -> Any:
        at = dict(zip(self.differentiated, row, strict=True))
        if self.unbatched:
            # a sparse matrix has no axis for the batch
            at = {p: one.squeeze(0) if one.layout == torch.strided else one for p, one in at.items()}
        at_places = (
            (spec, [None if position is None else at[position] for position in group]) for spec, group in self.groups
        )
        nests = tuple(pytree.tree_unflatten(filled, spec) for spec, filled in at_places)
        return nests if isinstance(self.argnums, tuple) else nests[0]

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
                    "was expected. Where it holds indices, as an embedding takes them, name other arguments in "
                    "argnums, or differentiate in the weights by AutoJacobian.of_parameters; pass quantities as floats"
                )
            what, instead = not_dense(tensor)
            if tensor.is_meta:
                what, instead = "is on the meta device, without values", "a tensor on a device with memory"
            if what:
                raise InputError(
                    f"tensor argument {position} {what}; a dense tensor with values was expected. Pass {instead}, or "
                    "leave it out of argnums"
                )
        # besides a tensor that can carry the batch, a scalar is shared by all samples
        if not self.unbatched and not any(flat[index].dim() for index in self.tensor_at):
            raise InputError(
                "every tensor argument is a scalar; the batch was expected on axis 0: shape (B, ...). For a function "
                "without a batch pass in_dims=None"
            )


@contextmanager
def outside_inference_mode(args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """Leave inference mode, in which autograd records nothing, with arguments that it can save."""
    if not torch.is_inference_mode_enabled():
        yield args, kwargs
        return
    with torch.inference_mode(False), torch.no_grad():
        copies = pytree.tree_map(_recordable, args), pytree.tree_map(_recordable, kwargs)
        with write_back_copies((args, kwargs), copies):
            yield copies


def _recordable(value: Any) -> Any:
    """Return a tensor that autograd can save; one made in inference mode is copied."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def describe(value: Any) -> Any:
    """Return what the choice of a plan depends on in an argument: shapes and dtypes of tensors, values of the rest.

    Of floats only the type counts: a time or a step size changes with every call.
    """
    if isinstance(value, Tensor):
        if value.is_nested:
            raise InputError(NESTED)
        return (value.shape, value.dtype, value.device, value.requires_grad, own_class(value))
    if isinstance(value, float):
        return float
    if isinstance(value, (int, str, bool, bytes, type(None), torch.dtype, torch.device)):
        return (type(value), value)
    flat, spec = pytree.tree_flatten(value)
    if len(flat) == 1 and flat[0] is value:
        return (type(value), repr(value), any(tensor.requires_grad for tensor in find_settable_places([value])[1]))
    return (str(spec), tuple(describe(item) for item in flat))
