"""Calls of functions whose batch runs over several axes, and the wrappers with one batch axis that serve them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor

from autojac.api.product_arguments import CallShapes, VectorNest, checked_vectors, nested_axes
from autojac.core import pytree
from autojac.core.batch_axes import AUTO, Axis, batch_axes
from autojac.core.batch_grid import BatchGrid, split_axis
from autojac.core.module_function import ModuleFunction
from autojac.core.nests import chosen_arguments, is_differentiable
from autojac.core.options import Options
from autojac.core.product_functions import FlattenedBatch
from autojac.core.tensor_kinds import NESTED, not_dense
from autojac.errors import InputError, OptionError, VerificationError


class BatchAxesChoice:
    """A base of wrapper classes whose constructor returns an instance of another class for several batch axes.

    Attributes:
        over_batch_axes: that class.
    """

    over_batch_axes: ClassVar[type]

    def __new__(cls, *args: Any, batch_dims: Any = 1, **options: Any) -> Self:
        if not has_several_axes(batch_dims):
            return super().__new__(cls)
        if "over_batch_axes" not in vars(cls):
            raise OptionError(
                f"batch_dims={batch_dims} was expected for a wrapper of autojac's own class, got {cls.__name__}, which "
                "is derived from it. Let it hold a wrapper instead"
            )
        instance: Self = object.__new__(cls.over_batch_axes)
        return instance


def has_several_axes(batch_dims: Any) -> bool:
    """Check whether the batch runs over more axes than one.

    Raises:
        OptionError: if that is no number of axes.
    """
    if not isinstance(batch_dims, int) or isinstance(batch_dims, bool) or batch_dims < 1:
        raise OptionError(
            f"batch_dims must be a number of axes, 1 or more, got {batch_dims!r}. For a function without a batch "
            "pass in_dims=None"
        )
    return batch_dims > 1


class FlattenedCall(NamedTuple):
    """A call with its batch flattened to one axis.

    Attributes:
        wrapper: what serves it.
        args: the arguments with one batch axis.
        sizes: of the batch axes.
        inputs: for each differentiated tensor the number of its axes besides the batch's; None where all samples share
            it.
        given: the arguments as the caller passed them.
        argnums: which of them are differentiated; an empty tuple for a module in its parameters.
    """

    wrapper: Any
    args: tuple[Any, ...]
    sizes: tuple[int, ...]
    inputs: tuple[int | None, ...]
    given: tuple[Any, ...]
    argnums: int | tuple[int, ...]

    def lead(self, nest: Any, axis: int = 0) -> Any:
        """Return results with all batch axes instead of one."""
        if isinstance(nest, Tensor):
            return split_axis(nest, axis, self.sizes)
        return pytree.tree_map_only(Tensor, lambda t: split_axis(t, axis, self.sizes), nest)

    def value(self, nest: Any) -> Any:
        """Return func's value; what has no derivative was never flattened."""
        return pytree.tree_map(lambda y: split_axis(y, 0, self.sizes) if is_differentiable(y) else y, nest)

    def loss(self, loss: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        """Return a function of outputs with all batch axes as one of the flattened batch's."""
        return lambda outputs: loss(self.value(outputs))

    def like_inputs(self, nest: Any, several: bool = False, shared: bool = True) -> Any:
        """Return values nested as the inputs, for one or several vectors, with all batch axes.

        Args:
            nest: values for the differentiated tensors.
            several: they have one more axis in front.
            shared: those for what all samples share have a batch axis as well.
        """
        if shared or not self.inputs:
            return self.lead(nest, int(several)) if shared else nest
        leaves, spec = pytree.tree_flatten(nest)
        inputs = iter(self.inputs)
        out = [self.lead(t, int(several)) if isinstance(t, Tensor) and next(inputs) is not None else t for t in leaves]
        return pytree.tree_unflatten(out, spec)

    def jacobian(self, nest: Any, layout: str) -> Any:
        """Return a Jacobian with all batch axes; a sparse one stays the matrix that it is."""
        if layout == "sparse":
            return nest
        if layout != "full" or not self.inputs:
            return self.lead(nest)
        leaves, spec = pytree.tree_flatten(nest)
        numbers = iter(range(len(leaves)))
        split = [self._full(t, next(numbers)) if isinstance(t, Tensor) else t for t in leaves]
        return pytree.tree_unflatten(split, spec)

    def _full(self, jacobian: Tensor, number: int) -> Tensor:
        axes = self.inputs[number % len(self.inputs)]
        if axes is not None:
            jacobian = split_axis(jacobian, jacobian.dim() - axes - 1, self.sizes)
        return split_axis(jacobian, 0, self.sizes)

    def flat_jacobian(self, nest: Any, layout: str) -> Any:
        """Return a Jacobian with one batch axis instead of several: the inverse of `jacobian`.

        Raises:
            VerificationError: if it has not these axes.
        """
        leaves, spec = pytree.tree_flatten(nest)
        numbers = iter(range(len(leaves)))
        flat = [self._flatten(t, next(numbers), layout) if isinstance(t, Tensor) else t for t in leaves]
        return pytree.tree_unflatten(flat, spec)

    def _flatten(self, jacobian: Tensor, number: int, layout: str) -> Tensor:
        if layout == "sparse":
            return jacobian
        count = len(self.sizes)
        axes = self.inputs[number % len(self.inputs)] if layout == "full" else None
        starts = (0,) if axes is None else (0, jacobian.dim() - axes - count)
        sizes = {tuple(jacobian.shape[first : first + count]) for first in starts}
        if sizes != {self.sizes} or (axes is not None and starts[-1] < count):
            where = "in front" if axes is None else "in front and before the input's own"
            raise VerificationError(
                f"a Jacobian with the batch axes {self.sizes} {where} was expected, got {tuple(jacobian.shape)}. Pass "
                "the layout and batch_dims that it was computed with"
            )
        for first in reversed(starts):
            jacobian = jacobian.flatten(first, first + count - 1)
        return jacobian

    def shapes(self, kwargs: Mapping[str, Any]) -> CallShapes:
        """Return the shapes of the flattened call."""
        shapes: CallShapes = self.wrapper._shapes(self.wrapper._func_args(self.args, kwargs), kwargs)
        return shapes

    def cotangents(self, vectors: Any, kwargs: Mapping[str, Any], name: str, several: bool = True) -> tuple[Any, bool]:
        """Return vectors shaped as the outputs with one batch axis, and whether there are several."""
        shapes = self.shapes(kwargs)
        wanted = [(*self.sizes, *shape) for shape in shapes.outputs]
        many, flat = checked_vectors(vectors, shapes.outputs_nest, wanted, name, several)
        last = len(self.sizes) - 1
        return shapes.nested_outputs([u.flatten(int(many), int(many) + last) for u in flat]), many

    def tangents(self, vectors: Any) -> tuple[Any, bool]:
        """Return vectors shaped as the inputs with one batch axis, and whether there are several."""
        like: Any
        if self.argnums == ():
            like = self.wrapper._pick_differentiated(self.wrapper._func_args(self.args, {}))
        elif isinstance(self.argnums, tuple):
            like = tuple(self.given[n] for n in self.argnums)
        else:
            like = self.given[self.argnums]
        leaves, spec = pytree.tree_flatten(like)
        places = tuple(number for number, value in enumerate(leaves) if is_differentiable(value))
        nest = VectorNest(None if isinstance(like, Tensor) else spec, places)
        many, flat = checked_vectors(vectors, nest, [tuple(leaves[number].shape) for number in places], "v")
        if not self.inputs:
            return vectors, many
        last = len(self.sizes) - 1
        with_one_axis = iter(
            v if axes is None else v.flatten(int(many), int(many) + last)
            for v, axes in zip(flat, self.inputs, strict=True)
        )
        return pytree.tree_unflatten(
            [next(with_one_axis) if at in places else None for at in range(len(leaves))], spec
        ), many


class CallsOverBatchAxes:
    """The calls of a function whose batch has several axes.

    Args:
        make: returns the wrapper of a function with one batch axis, given its in_dims.
        func: the function.
        batch_dims: number of batch axes.
        options: `argnums`, `in_dims` and `has_aux` say how to read a call.
    """

    def __init__(
        self,
        make: Callable[[Callable[..., Any], Any], Any],
        func: Callable[..., Any],
        batch_dims: int,
        options: Options,
    ) -> None:
        self.make, self.func, self.batch_dims, self.options = make, func, batch_dims, options
        self.in_dims, self.argnums = options.in_dims, options.argnums
        if isinstance(func, ModuleFunction):
            # a call has the module's own arguments
            self.in_dims, self.argnums = options.in_dims[1], ()
        for axis in pytree.tree_leaves(self.in_dims, every=True):
            if axis not in (0, None, AUTO):
                raise OptionError(
                    f"batch_dims={batch_dims} expects in_dims of 0, None and 'auto', since the batch axes come first, "
                    f"got {axis!r}. Move the axes before the call"
                )
        self._wrappers: dict[Any, Any] = {}
        self._known: dict[Any, tuple[Any, BatchGrid, tuple[int | None, ...]]] = {}

    @property
    def wrappers(self) -> tuple[Any, ...]:
        """The wrappers with one batch axis that have been needed so far."""
        return tuple(self._wrappers.values())

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: wrappers are made again."""
        return {**vars(self), "_wrappers": {}, "_known": {}}

    def flat(self, args: tuple[Any, ...]) -> FlattenedCall:
        """Return a call with its batch flattened to one axis."""
        is_plain = all([isinstance(arg, Tensor) for arg in args])
        leaves, spec = (args, None) if is_plain else pytree.tree_flatten(args)
        try:
            key = spec, tuple([(x.shape, x.dtype) if isinstance(x, Tensor) else None for x in leaves])
        except RuntimeError as error:  # a nested tensor has no shape
            raise InputError(NESTED) from error
        wrapper, grid, inputs = self._known.get(key) or self._analyze(args, key)
        flattened = grid.flat_leaves(leaves)
        flat = tuple(flattened) if spec is None else pytree.tree_unflatten(flattened, spec)
        return FlattenedCall(wrapper, flat, grid.sizes, inputs, args, self.argnums)

    def _analyze(self, args: tuple[Any, ...], key: Any) -> tuple[Any, BatchGrid, tuple[int | None, ...]]:
        """Return the wrapper that serves a call, how the call is flattened, and its `inputs`."""
        leaves, spec = pytree.tree_flatten(args)
        axes = iter(batch_axes(args, self.in_dims))
        groups = [[(x, next(axes)) for x in pytree.tree_leaves(arg) if isinstance(x, Tensor)] for arg in args]
        chosen = (groups[number] for number in chosen_arguments(args, self.argnums))
        differentiated = [each for group in chosen for each in group if is_differentiable(each[0])]
        every = [each for group in groups for each in group]
        count, sizes = self.batch_dims, self._sizes(every, differentiated)

        def carries(x: Tensor, axis: Axis) -> bool:
            return axis == 0 or (axis == AUTO and tuple(x.shape[:count]) == sizes)

        carriers = [carries(*each) for each in every]
        for (x, _), has_axes in zip(every, carriers, strict=True):
            what, instead = not_dense(x)
            if has_axes and what:
                raise InputError(
                    f"a dense tensor with batch axes was expected, got one that {what}. Pass {instead}, or None in "
                    "in_dims where all samples share it"
                )
        has = iter(carriers)
        grid = BatchGrid(sizes, tuple(isinstance(x, Tensor) and next(has) for x in leaves), self.options.has_aux)
        place = grid.sizes, grid.carriers, spec
        if place not in self._wrappers:
            in_dims: Any = nested_axes(args, [0 if one else None for one in carriers])
            if isinstance(self.func, ModuleFunction):
                self._wrappers[place] = self.make(self.func.over(grid), (None, in_dims))
            else:
                self._wrappers[place] = self.make(FlattenedBatch(self.func, grid), in_dims)
        inputs = tuple(each[0].dim() - count if carries(*each) else None for each in differentiated)
        self._known[key] = self._wrappers[place], grid, inputs
        return self._known[key]

    def _sizes(
        self, tensors: Sequence[tuple[Tensor, Axis]], differentiated: Sequence[tuple[Tensor, Axis]]
    ) -> tuple[int, ...]:
        """Return the sizes of the batch axes, by the tensors declared to have them, else by a differentiated one."""
        count = self.batch_dims
        declared = [x for x, axis in tensors if axis == 0]
        likely = [x for x, axis in (*differentiated, *tensors) if axis is not None and x.dim() >= count]
        short = [tuple(x.shape) for x in declared if x.dim() < count]
        if short or not (declared or likely):
            shapes = ", ".join(map(str, short or [tuple(x.shape) for x, _ in tensors])) or "no tensor"
            raise InputError(
                f"batch_dims={count} expects tensors with {count} batch axes in front, got {shapes}. Add the axes, "
                "lower batch_dims, or say by in_dims what all samples share"
            )
        sizes = {tuple(x.shape[:count]) for x in declared or likely[:1]}
        if len(sizes) > 1:
            raise InputError(
                f"in_dims says that arguments share batch axes, but theirs are {sorted(sizes)}. Pass equal sizes, or "
                "None in in_dims for what all samples share"
            )
        return sizes.pop()
