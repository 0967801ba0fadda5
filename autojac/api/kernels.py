"""Kernels, Gauss-Newton products and gradient norms: what training wants of Jacobians in parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.api.chunks import Chunks
from autojac.api.jacobian_matrices import MatrixSizes, as_one_matrix
from autojac.api.product_arguments import CallShapes
from autojac.api.products import without_last
from autojac.autodiff.second_order import hessian_product
from autojac.core.nests import is_differentiable, tensor_leaves
from autojac.core.product_functions import AlongTangents, WeightedOutput
from autojac.errors import InputError, UnsupportedError

PART = 4
"""What share of the memory limit the Jacobian of a part may take."""


class Kernels(Chunks):
    """The methods of `AutoJacobian` that are mostly asked of Jacobians in parameters."""

    def ntk(self, x: Any, y: Any = None, **kwargs: Any) -> Tensor:
        """Return J_b(x) J_c(y)ᵀ for all pairs of samples: of `of_parameters`, the empirical neural tangent kernel.

        Jacobians are formed as far as they fit into the memory limit, some samples at a time.

        Args:
            x: the argument of the call, or a tuple of all its positional arguments.
            y: the same of another call; x again by default, whose Jacobian is then computed once.
            kwargs: those of both calls.

        Returns:
            (B, C, m, m), where m counts all outputs of a sample. Differentiable where J is.

        Raises:
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
        if self.options.layout != "blocks":
            raise UnsupportedError(
                f"ntk expects layout='blocks', got {self.options.layout!r}: it is made of each sample's own Jacobian. "
                "Wrap the function with that"
            )
        given = (x,) if y is None else (x, y)
        calls = [self._func_args(call if isinstance(call, tuple) else (call,), kwargs) for call in given]
        shapes = [self._shapes(call, kwargs, probing=True) for call in calls]
        for each in shapes:
            if each.batch is None:
                raise InputError(
                    "ntk expects a function with a batch, whose samples it pairs, but in_dims=None says that there is "
                    "none. Call gram(x, outer=True) for the kernel of one"
                )
        sizes = [MatrixSizes.of(each, False) for each in shapes]
        if self._fits(sum(size.bytes for size in sizes), shapes[0]):
            blocks = [
                next(self._matrices(call, each, kwargs, size.matrices))
                for call, each, size in zip(calls, shapes, sizes, strict=True)
            ]
            return _all_pairs(blocks[0], blocks[-1])
        for each in shapes:
            each.require_repeatable("a kernel of Jacobians that do not fit into the memory limit")
        room = self._memory_limit(shapes[0]) // PART
        steps = [max(1, room * size.matrices // size.bytes) for size in sizes]
        rows = []
        for left in self._matrices(calls[0], shapes[0], kwargs, steps[0]):
            right = self._matrices(calls[-1], shapes[-1], kwargs, steps[-1])
            rows.append(torch.cat([_all_pairs(left, other) for other in right], 1))
        return torch.cat(rows)

    def _matrices(
        self, args: Sequence[Any], shapes: CallShapes, kwargs: Mapping[str, Any], step: int
    ) -> Iterator[Tensor]:
        """Yield the matrices (b, m, n) of some samples at a time, or of all."""
        if step >= int(shapes.batch or 0):
            plan, result = self._run(args, kwargs)
            yield as_one_matrix(plan.jacobian(result), shapes, False)
            return
        for start, J in self._parts(args, kwargs, shapes, step):
            yield as_one_matrix(J, shapes._replace(batch=min(step, int(shapes.batch or 0) - start)), False)

    def ggn_product(self, *args: Any, loss: Callable[[Any], Tensor] | None = None, **kwargs: Any) -> Any:
        """Return JᵀH J v for the whole batch: a product with the generalized Gauss-Newton matrix, or the Fisher matrix.

        One pass along v and one back, whatever couples; neither J nor the matrix is formed.

        Args:
            args: those of func, and at last v, nested and shaped as what is differentiated.
            loss: function of func's outputs that returns a scalar; H is its Hessian there. The identity by default, as
                for half the sum of squares.
            kwargs: those of func.

        Returns:
            Nested and shaped as what is differentiated; for parameters a dict by their names. aux is left out.

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
        own = self._func_args(inputs, kwargs)
        shapes = self._shapes(own, kwargs)
        shapes.require_repeatable("ggn_product")
        pushed = self._product(AlongTangents, own, kwargs, tangents, True)
        pushed = pushed[0] if self.options.has_aux else pushed
        if loss is not None:
            outputs = self.func(*own, **kwargs)
            outputs = outputs[0] if self.options.has_aux else outputs
            flat = list(filter(is_differentiable, tensor_leaves(outputs)))
            pushed = shapes.nested_outputs(
                hessian_product(lambda *ys: loss(shapes.nested_outputs(ys)), flat, tensor_leaves(pushed))
            )
        pulled = self._product(WeightedOutput, own, kwargs, pushed, True)
        return pulled[0] if self.options.has_aux else pulled

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
        own = self._func_args(inputs, kwargs)
        shapes = self._shapes(own, kwargs)
        if shapes.batch is None:
            raise InputError(
                "gradient_norms expects a function with a batch, but in_dims=None says that there is none. Call vjp, "
                "and take the norm of that"
            )
        if self._fits(MatrixSizes.of(shapes, False).columns * shapes.batch * shapes.item_bytes, shapes):
            pulled = self._product(WeightedOutput, own, kwargs, cotangents)
            return _norms(pulled[0] if self.options.has_aux else pulled)
        product = self._prepared(WeightedOutput, own, kwargs, cotangents, False)
        room = self._memory_limit(shapes) // PART
        parts = product.jacobian.chunks(*product.nest.flat(cotangents), *own, bytes=room, **kwargs)
        return torch.cat([_norms(part) for _, part in parts])


def _all_pairs(left: Tensor, right: Tensor) -> Tensor:
    """Return the products (b, c, m, m) of matrices (b, m, n) and (c, m, n)."""
    both = left.flatten(0, 1) @ right.flatten(0, 1).T
    return both.reshape(len(left), left.shape[1], len(right), right.shape[1]).transpose(1, 2)


def _norms(gradients: Any) -> Tensor:
    parts = [torch.linalg.vector_norm(part.flatten(1), dim=1) for part in tensor_leaves(gradients)]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return norms
