"""Functions composed of another one, whose Jacobians are products with that one's, or a part of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from autojac.core import pytree
from autojac.core.batch_grid import BatchGrid
from autojac.core.module_function import ModuleFunction, ModuleLock
from autojac.core.nests import is_differentiable
from autojac.core.selection import Select, pick
from autojac.core.settable_arguments import write_back_copies


class ComposedFunction(ABC):
    """A function composed of another one.

    Args:
        func: the function.
        argnums: the arguments of func that are differentiated.
        has_aux: func returns a pair (output, aux).
    """

    kind = ""

    def __init__(self, func: Callable[..., Any], argnums: tuple[int, ...], has_aux: bool) -> None:
        self.func = func
        self.argnums = argnums
        self.has_aux = has_aux

    def __autojac_reach__(self) -> dict[str, Any]:
        """Return what makes two of them compute the same."""
        return {"func": self.func, **{name: value for name, value in vars(self).items() if name != "func"}}

    @property
    def lock(self) -> ModuleLock | None:
        """The lock to be held while func runs, if it has one."""
        return self.func.lock if isinstance(self.func, ModuleFunction) else None

    def _call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
        """Return func's output, and its aux in a tuple that is empty without one."""
        out = self.func(*args, **kwargs)
        if not self.has_aux:
            return out, ()
        out, aux = out
        return out, (aux,)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute; the first arguments are this function's, each a tensor, and the rest are func's."""


class ProductFunction(ComposedFunction):
    """A function whose Jacobian is a product with another one's.

    Args:
        func, argnums, has_aux: as of `ComposedFunction`.
        whole: the product is with the Jacobian of the whole batch, not with each sample's own.
        several: there are several vectors, on a first axis of their own.
    """

    def __init__(
        self, func: Callable[..., Any], argnums: tuple[int, ...], has_aux: bool, whole: bool, several: bool
    ) -> None:
        super().__init__(func, argnums, has_aux)
        self.whole = whole
        self.several = several


class AlongTangents(ProductFunction):
    """t ↦ func(x + t v), whose derivative at t = 0 is J v.

    A sample's step t moves that sample alone, so the blocks in t are J_b v_b, however samples are coupled.

    Args:
        axes: for each differentiated tensor the axis that runs over samples; None where all of them share it.
        others: as of `ProductFunction`.
    """

    kind = "along tangents"

    def __init__(self, *others: Any, axes: tuple[int | None, ...]) -> None:
        super().__init__(*others)
        self.axes = axes

    @property
    def steps(self) -> tuple[bool, ...]:
        """For each step argument whether samples have steps of their own: (B,) or (B, k), else () or (k,)."""
        return tuple(sorted({axis is not None for axis in self.axes}, reverse=True))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first, last = len(self.steps), len(self.steps) + len(self.axes)
        steps = dict(zip(self.steps, args[:first], strict=True))
        vectors, inner_args = zip(args[first:last], self.axes, strict=True), list(args[last:])
        for number in self.argnums:
            flat, spec = pytree.tree_flatten(inner_args[number])
            shifted = [x + self._shift(x, *next(vectors), steps) if is_differentiable(x) else x for x in flat]
            inner_args[number] = pytree.tree_unflatten(shifted, spec)
        with write_back_copies(args[last:], tuple(inner_args)):
            out, aux = self._call(inner_args, kwargs)
        return (out, *aux) if aux else out

    def _shift(self, x: Tensor, tangent: Tensor, axis: int | None, steps: dict[bool, Tensor]) -> Tensor:
        """Return t v, for one tensor."""
        step = steps[axis is not None].to(x.dtype)
        before, after = (0, x.dim()) if axis is None else (axis, x.dim() - axis - 1)
        if self.several and axis is not None:
            step = step.T
        lead = step.shape[: self.several]
        step = step.reshape((*lead, *[1] * before, *step.shape[self.several :], *[1] * after))
        return (step * tangent).sum(0) if self.several else step * tangent


class WeightedOutput(ProductFunction):
    """x ↦ the sum of u · func(x), for each sample or over the whole batch, whose derivative is uᵀJ.

    Args:
        count: number of outputs.
        reads_past: func reads the differentiated parameters directly, not as arguments.
        others: as of `ProductFunction`.
    """

    kind = "weighed by cotangents"

    def __init__(self, *others: Any, count: int, reads_past: bool) -> None:
        super().__init__(*others)
        self.count = count
        self.reads_past = reads_past

    @property
    def __autojac_originals__(self) -> Callable[[], Sequence[Tensor]] | None:
        # cotangents may have a graph to these, which is no part of the derivative
        return getattr(self.func, "__autojac_originals__", None) if self.reads_past else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out, aux = self._call(args[self.count :], kwargs)
        values = filter(is_differentiable, pytree.tree_leaves(out))
        scalars = [self._sum(y, u) for y, u in zip(values, args, strict=False)]
        total = sum(scalars[1:], scalars[0])
        return (total, *aux) if aux else total

    def _sum(self, y: Tensor, cotangent: Tensor) -> Tensor:
        lead, product = self.several + (not self.whole), cotangent * y
        scalar = product if product.dim() == lead else product.flatten(lead).sum(-1)
        return scalar.T if self.several and not self.whole else scalar


class SampleWindow(ComposedFunction):
    """Some samples of func, as a function of these samples' inputs: index, parts ↦ func(x with parts at index)[index].

    Its blocks are those of the samples, however they are coupled with the others, which stay as they are.

    Args:
        func, argnums, has_aux: as of `ComposedFunction`.
        axes: for each differentiated tensor the axis that runs over samples; None where all of them share it, which is
            replaced as a whole.
    """

    kind = "at some samples"

    def __init__(
        self, func: Callable[..., Any], argnums: tuple[int, ...], has_aux: bool, axes: tuple[int | None, ...]
    ) -> None:
        super().__init__(func, argnums, has_aux)
        self.axes = axes

    @property
    def __autojac_originals__(self) -> Callable[[], Sequence[Tensor]] | None:
        return getattr(self.func, "__autojac_originals__", None)

    def __call__(self, index: Tensor, *args: Any, **kwargs: Any) -> Any:
        parts, inner_args = zip(args[: len(self.axes)], self.axes, strict=True), list(args[len(self.axes) :])
        for number in self.argnums:
            flat, spec = pytree.tree_flatten(inner_args[number])
            replaced = []
            for x in flat:
                part, axis = next(parts) if is_differentiable(x) else (x, None)
                replaced.append(part if axis is None else x.index_copy(axis, index, part))
            inner_args[number] = pytree.tree_unflatten(replaced, spec)
        with write_back_copies(args[len(self.axes) :], tuple(inner_args)):
            out, aux = self._call(inner_args, kwargs)
        selected = pytree.tree_map(lambda y: y[index] if is_differentiable(y) else y, out)
        return (selected, *aux) if aux else selected


class SelectedOutput(ComposedFunction):
    """A function that returns the selected part of another one's output, and all of it as aux."""

    kind = "as selected"

    def __init__(self, func: Callable[..., Any], select: Select) -> None:
        super().__init__(func, (), False)
        self.select = select

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.func(*args, **kwargs)
        return pick(output, self.select), output


class FlattenedBatch(ComposedFunction):
    """A function of a batch with several axes, as a function of a batch with one."""

    kind = "over several batch axes"

    def __init__(self, func: Callable[..., Any], grid: BatchGrid) -> None:
        super().__init__(func, (), grid.has_aux)
        self.grid = grid

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.grid.call(self.func, args, kwargs)
