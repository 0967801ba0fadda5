"""Kernels, Gauss-Newton products and gradient norms, which training uses of Jacobians in parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autojac.api.chunks import Chunks
from autojac.api.grams import PART
from autojac.api.jacobian_matrices import MatrixSizes, as_one_matrix
from autojac.api.planned_call import PlannedCall
from autojac.api.product_arguments import CallShapes, checked_vectors
from autojac.api.products import without_last
from autojac.autodiff.second_order import hessian_product
from autojac.core import pytree
from autojac.core.nests import is_differentiable, tensor_leaves
from autojac.core.product_functions import AlongTangents, WeightedOutput
from autojac.errors import InputError, UnsupportedError


class Kernels(Chunks):
    """The methods of `AutoJacobian` that are mostly used for Jacobians in parameters."""

    def ntk(self, x: Any, y: Any = None, **kwargs: Any) -> Tensor:
        """Return J_b(x) J_c(y)ᵀ for all pairs of samples: of `of_parameters`, the empirical neural tangent kernel.

        Jacobians are formed as far as they fit into the memory limit, some samples at a time.

        Args:
            x: the argument of the call, or a tuple of all its positional arguments.
            y: the same of another call; x again by default, whose Jacobian is then computed once.
            kwargs: those of both calls.

        Returns:
            (B, C, m, m), where m counts all outputs of a sample of each call. Differentiable where J is.

        Raises:
            InputError: if the Jacobians of the calls have not equally many columns, or func has no batch.
            UnsupportedError: for a layout other than "blocks".

        Example:
            >>> import torch
            >>> from autojac import AutoJacobian
            >>> jac = AutoJacobian.of_parameters(torch.nn.Linear(2, 1), store=":memory:", on_miss="estimate")
            >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
            >>> jac.ntk(x).squeeze().detach()
            tensor([[ 6., 12.],
                    [12., 26.]])
        """
        arguments = (x,) if y is None else (x, y)
        return tangent_kernel([(self, each if isinstance(each, tuple) else (each,)) for each in arguments], kwargs)

    def ggn_product(self, *args: Any, loss: Callable[[Any], Tensor] | None = None, **kwargs: Any) -> Any:
        """Return JᵀH J v for the whole batch: a product with the generalized Gauss-Newton matrix, or the Fisher matrix.

        One pass along v and one back, whatever couples; neither J nor the matrix is formed.

        Args:
            args: those of func, and at last v, nested and shaped as what is differentiated, or several vectors along a
                first axis.
            loss: function of func's outputs that returns a scalar; H is its Hessian there. The identity by default, as
                for half the sum of squares.
            kwargs: those of func.

        Returns:
            Nested and shaped as v; for parameters a dict by their names. aux is left out.

        Raises:
            InputError: if v is not nested or shaped as what is differentiated, or the loss is no scalar.
            UnsupportedError: if func updates buffers or draws random numbers.

        Example:
            >>> import torch
            >>> from autojac import AutoJacobian
            >>> net = torch.nn.Linear(2, 1, bias=False)
            >>> jac = AutoJacobian.of_parameters(net, store=":memory:", on_miss="estimate")
            >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
            >>> jac.ggn_product(x, {"weight": torch.ones(1, 2)}, loss=lambda y: y.square().sum())["weight"].detach()
            tensor([[48., 68.]])
        """
        inputs, tangents = without_last(args, "ggn_product")
        func_args = self._func_args(inputs, kwargs)
        cotangents = self._push(func_args, kwargs, tangents, loss)
        return self._without_aux(self._product(WeightedOutput, func_args, kwargs, cotangents, True))

    def _push(
        self, func_args: Sequence[Any], kwargs: Mapping[str, Any], tangents: Any, loss: Callable[[Any], Tensor] | None
    ) -> Any:
        """Return H J v."""
        shapes = self._shapes(func_args, kwargs)
        shapes.require_repeatable("ggn_product")
        jvps = self._without_aux(self._product(AlongTangents, func_args, kwargs, tangents, True))
        if loss is None:
            return jvps
        leaves, spec = pytree.tree_flatten(self._without_aux(self.func(*func_args, **kwargs)))
        flat, vectors = list(filter(is_differentiable, leaves)), tensor_leaves(jvps)

        def of_flat(*ys: Tensor) -> Tensor:
            given = iter(ys)
            return loss(pytree.tree_unflatten([next(given) if is_differentiable(y) else y for y in leaves], spec))

        times = functools.partial(hessian_product, of_flat, flat)
        if vectors[0].dim() == flat[0].dim():
            return shapes.nested_outputs(times(vectors))
        products = zip(*(times(each) for each in zip(*vectors, strict=True)), strict=True)
        return shapes.nested_outputs([torch.stack(parts) for parts in products])

    def gradient_norms(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return ‖u_bᵀ J_b‖ for each sample: of `of_parameters`, the norms of per-sample gradients.

        J is not formed. The gradients are, as far as they fit into the memory limit, some samples at a time.

        Args:
            args: those of func, and at last u, nested as its outputs: (B, *out), such as the gradient of each sample's
                loss in the outputs.
            kwargs: those of func.

        Returns:
            (B,), over all that is differentiated together. Differentiable where J is. aux is left out.

        Raises:
            InputError: if u is not nested or shaped as the outputs, or func has no batch.

        Example:
            >>> import torch
            >>> from autojac import AutoJacobian
            >>> net = torch.nn.Linear(2, 1, bias=False)
            >>> jac = AutoJacobian.of_parameters(net, store=":memory:", on_miss="estimate")
            >>> jac.gradient_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.ones(2, 1))
            tensor([5., 1.])
        """
        inputs, cotangents = without_last(args, "gradient_norms")
        call, room = self._gradients_call(self._func_args(inputs, kwargs), kwargs, cotangents)
        if room is not None:
            parts = call.wrapper.chunks(*call.args, bytes=room, **call.kwargs)
            return torch.cat([_norms(part) for _, part in parts])
        return _norms(self._without_aux(call.wrapper(*call.args, **call.kwargs)))

    def _gradients_call(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], cotangents: Any
    ) -> tuple[PlannedCall, int | None]:
        """Return the call for per-sample gradients, and the bytes for a part of them where they do not fit."""
        shapes = self._shapes(args, kwargs)
        if shapes.batch is None:
            raise InputError(
                "gradient_norms expects a function with a batch, but in_dims=None says that there is none. Call vjp, "
                "and take the norm of that"
            )
        wanted = [(shapes.batch, *shape) for shape in shapes.outputs]
        checked_vectors(cotangents, shapes.outputs_nest, wanted, "u", several=False)
        call = self._product_call(WeightedOutput, args, kwargs, cotangents)[1]
        fits = self._fits(MatrixSizes.of(shapes, False).columns * shapes.batch * shapes.item_bytes, shapes)
        return call, None if fits else self._memory_limit(shapes) // PART


def tangent_kernel(calls: Sequence[tuple[Kernels, tuple[Any, ...]]], kwargs: Mapping[str, Any]) -> Tensor:
    """Return J_b J_cᵀ for all pairs of a sample of the first call and one of the last.

    Args:
        calls: one or two, each with the wrapper that serves it.
        kwargs: those of both.
    """
    for jac, _ in calls:
        if jac.options.layout != "blocks":
            raise UnsupportedError(
                f"ntk expects layout='blocks', got {jac.options.layout!r}: it is made of each sample's own Jacobian. "
                "Wrap the function with that"
            )
    sides = [_Side.of(jac, args, kwargs) for jac, args in calls]
    first, last = sides[0], sides[-1]
    if first.sizes.columns != last.sizes.columns:
        raise InputError(
            "ntk expects two calls whose Jacobians have equally many columns, got "
            f"{first.sizes.columns} and {last.sizes.columns} for a sample. Pass inputs of equal shapes, or "
            "differentiate in what both share, such as parameters"
        )
    if first.jac._fits(sum(side.sizes.bytes for side in sides), first.shapes):
        blocks = [next(side.matrices(side.sizes.matrices)) for side in sides]
        return _all_pairs(blocks[0], blocks[-1])
    for side in sides:
        side.shapes.require_repeatable("a kernel of Jacobians that do not fit into the memory limit")
    room = first.jac._memory_limit(first.shapes) // PART
    rows = [
        torch.cat([_all_pairs(left, right) for right in last.matrices(last.fitting(room))], 1)
        for left in first.matrices(first.fitting(room))
    ]
    return torch.cat(rows)


class _Side(NamedTuple):
    """One of the calls that a kernel pairs.

    Attributes:
        jac: the wrapper that serves it.
        args, kwargs: as the function gets them.
        shapes: of the call.
        sizes: of its Jacobians.
    """

    jac: Kernels
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    shapes: CallShapes
    sizes: MatrixSizes

    @classmethod
    def of(cls, jac: Kernels, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Side:
        func_args = jac._func_args(args, kwargs)
        shapes = jac._shapes(func_args, kwargs, probing=True)
        if shapes.batch is None:
            raise InputError(
                "ntk expects a function with a batch, whose samples it pairs, but in_dims=None says that there is "
                "none. Call gram(x, outer=True) for the kernel of one"
            )
        return cls(jac, func_args, kwargs, shapes, MatrixSizes.of(shapes, False))

    def fitting(self, room: int) -> int:
        """Return how many samples' Jacobians fit into that many bytes, one at least."""
        return max(1, room * self.sizes.matrices // self.sizes.bytes)

    def matrices(self, step: int) -> Iterator[Tensor]:
        """Yield the matrices (b, m, n) of some samples at a time, or of all."""
        batch = int(self.shapes.batch or 0)
        if step >= batch:
            plan, result = self.jac._run(self.args, self.kwargs)
            yield as_one_matrix(plan.jacobian(result), self.shapes, False)
            return
        for start, J in self.jac._parts(self.args, self.kwargs, self.shapes, step):
            yield as_one_matrix(J, self.shapes._replace(batch=min(step, batch - start)), False)


def _all_pairs(left: Tensor, right: Tensor) -> Tensor:
    """Return the products (b, c, m, m) of matrices (b, m, n) and (c, m, n)."""
    both = left.flatten(0, 1) @ right.flatten(0, 1).T
    return both.reshape(len(left), left.shape[1], len(right), right.shape[1]).transpose(1, 2)


def _norms(gradients: Any) -> Tensor:
    flat = [part.reshape(len(part), prod(part.shape[1:])) for part in tensor_leaves(gradients)]
    parts = [torch.linalg.vector_norm(part, dim=1) for part in flat]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return norms
