"""Linear systems with a Jacobian: Gauss-Newton and Levenberg-Marquardt steps, and an operator for SciPy."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autojac.api.grams import Grams
from autojac.api.jacobian_matrices import MatrixSizes, as_one_matrix
from autojac.api.least_squares import least_squares, matrix_free_least_squares, sparse_least_squares
from autojac.api.matrix_quantities import only, require_one_pair
from autojac.api.planned_call import PlannedCall
from autojac.api.product_arguments import CallShapes, checked_vectors
from autojac.api.products import without_last
from autojac.core import pytree
from autojac.core.nests import is_differentiable, tensor_leaves
from autojac.core.product_functions import AlongTangents, ProductFunction, WeightedOutput
from autojac.errors import InputError, UnsupportedError, kind_of

if TYPE_CHECKING:
    from autojac.api.linear_operator import JacobianOperator


class LinearSystems(Grams):
    """The methods of `AutoJacobian` for linear systems with the Jacobian."""

    def solve(self, *args: Any, damping: float | Tensor = 0.0, **kwargs: Any) -> Any:
        """Return argmin ‖J_b d + r_b‖² + λ‖d‖² for each sample: a Gauss-Newton or Levenberg-Marquardt step.

        The layout decides which Jacobian that is:

        * blocks: each sample's own, by batched Cholesky factors, and QR for the samples that are ill-conditioned. Where
          it does not fit into the memory limit, by conjugate gradients on products with it.
        * `layout="full"`: that of the whole batch, in the same ways. So samples may be coupled.
        * `layout="sparse"`: that of the whole batch, by sparse factors of SciPy's.

        Args:
            args: those of func, and at last r, nested and shaped as its outputs, (B, *out): what func returns, for a
                step that makes it smaller.
            damping: λ, zero or more; a tensor (B,) for one per sample. With zero the step is the shortest one, if there
                are fewer outputs than inputs.
            kwargs: those of func.

        Returns:
            d, (B, *in), nested as what is differentiated; what all samples share has (*arg) for the whole batch.
            Differentiable in r, λ, and in whatever J is: twice from blocks, once from sparse factors and conjugate
            gradients. With `has_aux=True` the pair (d, aux).

        Raises:
            InputError: if r is not nested or shaped as the outputs, or damping is negative or not (B,).
            SingularJacobianError: naming the samples that are rank-deficient, or not finite.
            SearchError: if conjugate gradients do not converge.

        Example:
            One step solves a linear problem.

            >>> import torch
            >>> from autojac import AutoJacobian
            >>> target = torch.tensor([[3.0, 4.0, 7.0]])
            >>> def residual(x):
            ...     return torch.cat([x, x.sum(1, keepdim=True)], 1) - target
            >>> jac = AutoJacobian(residual, store=":memory:", on_miss="estimate")
            >>> x = torch.zeros(1, 2)
            >>> x + jac.solve(x, residual(x))
            tensor([[3., 4.]])
        """
        inputs, residual = without_last(args, "solve")
        func_args = self._func_args(inputs, kwargs)
        shapes = self._shapes(func_args, kwargs)
        wanted = [(*shapes.lead, *shape) for shape in shapes.outputs]
        flat = checked_vectors(residual, shapes.outputs_nest, wanted, "r", several=False)[1]
        whole = self._is_whole or shapes.batch is None
        count = 1 if whole else int(shapes.batch or 0)
        r = torch.cat([t.reshape(count, -1) for t in flat], 1)
        shift = _check_damping(damping, r, None if whole else count)
        aux: list[Any] = []
        planned = self._solve_call(func_args, kwargs, shapes)
        if planned is None:
            step = self._by_products(func_args, kwargs, shapes, r, shift, aux)
        else:
            plan, result = planned.run()
            aux.append(result.aux)
            if self.options.layout == "sparse":
                values, problem = only(plan, result), plan.problem
                entries = problem.entries(0, problem.inputs[0])
                samples = problem.batch if problem.leaves[problem.inputs[0]].batched else 1
                step = sparse_least_squares(entries, values, r[0], shift, samples)[None]
            else:
                matrices = as_one_matrix(plan.jacobian(result), shapes, self._is_whole)
                step = least_squares(matrices[None] if whole else matrices, r, shift)
        nested = self._nested_inputs(func_args, _divide(step, shapes, whole))
        return (nested, aux[0]) if self.options.has_aux else nested

    def _solve_call(self, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: CallShapes) -> PlannedCall | None:
        """Return the call for the Jacobian of a system; None where products have to do."""
        if self.options.layout == "sparse":
            return PlannedCall(self, args, kwargs)
        if self._fits(MatrixSizes.of(shapes, self._is_whole).bytes, shapes):
            return self._matrices_call(args, kwargs)
        shapes.require_repeatable("a Jacobian that does not fit into the memory limit")
        whole = self._is_whole or shapes.batch is None
        if not whole and any(shapes.axes[position] is None for position in shapes.differentiated):
            raise UnsupportedError(
                "a Jacobian that fits into the memory limit was expected where samples share what is differentiated, "
                "since each has a step of its own there. Raise memory_limit, or wrap the function with layout='full'"
            )
        return None

    def linear_operator(self, *args: Any, **kwargs: Any) -> JacobianOperator:
        """Return the Jacobian of the whole batch at this point as an operator for SciPy's solvers and for tensors.

        What it multiplies with is computed once, where that fits into the memory limit: the sparse Jacobian for
        `layout="sparse"`; else the factors of `factors` where samples are independent or meet in shared statistics
        alone. Otherwise it is matrix-free: each product is one pass, which evaluates func with its parameters as they
        are then, and may be several vectors wide.

        Args:
            args, kwargs: the call, with one differentiated tensor and one output.

        Returns:
            A `scipy.sparse.linalg.LinearOperator` of shape (B·m, B·n), (B·m, n) for an input that all samples share,
            that takes tensors as well. It carries no graph. aux is left out.

        Raises:
            InputError: if there are several outputs or inputs.
            UnsupportedError: if it would be matrix-free and func updates buffers or draws random numbers.

        Example:
            >>> import torch
            >>> from autojac import AutoJacobian
            >>> jac = AutoJacobian(lambda x: x**2, store=":memory:", on_miss="estimate")
            >>> operator = jac.linear_operator(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
            >>> operator.shape
            (4, 4)
            >>> operator @ torch.ones(2, 2)
            tensor([[2., 4.],
                    [6., 8.]])
        """
        # 0.2 s to import
        from autojac.api import linear_operator as operators

        func_args = self._func_args(args, kwargs)
        with torch.no_grad():
            shapes = self._shapes(func_args, kwargs)
            require_one_pair(len(shapes.outputs), len(shapes.inputs))
            lead = shapes.lead
            axis = shapes.axes[shapes.differentiated[0]]
            outputs, inputs = (*lead, *shapes.outputs[0]), (*(lead if axis is not None else ()), *shapes.inputs[0])
            if self.options.layout == "sparse":
                plan, result = self._run(func_args, kwargs)
                entries = plan.problem.entries(0, plan.problem.inputs[0])
                return operators.JacobianOperator(operators.of_entries(entries, only(plan, result), outputs, inputs))
            if axis is not None and self._fits(MatrixSizes.of(shapes, False).bytes, shapes):
                blocks = self._other("blocks")
                coupling = PlannedCall(blocks, func_args, kwargs).prepare().plan.structure.coupling
                if coupling in ("independent", "statistics"):
                    return operators.JacobianOperator(operators.of_factors(blocks.factors(*args, **kwargs)))
            shapes.require_repeatable("an operator that is matrix-free")
            point = pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, tuple(func_args))

            def product(kind: type[ProductFunction], vectors: Tensor) -> Tensor:
                is_jvp = kind is AlongTangents
                flat = [vectors.movedim(1, 1 + axis) if axis and is_jvp else vectors]
                nested = self._nested_inputs(func_args, flat) if is_jvp else shapes.nested_outputs(flat)
                return tensor_leaves(self._without_aux(self._product(kind, point, kwargs, nested, True)))[0]

            times, back = (functools.partial(product, kind) for kind in (AlongTangents, WeightedOutput))
            like = next(t for t in tensor_leaves(self._pick_differentiated(point)) if is_differentiable(t))
            return operators.JacobianOperator(operators.LinearMap("matrix-free", times, back, outputs, inputs, like))

    def _by_products(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: CallShapes, r: Tensor, shift: Tensor,
        aux: list[Any],
    ) -> Tensor:  # fmt: skip
        """Return the step by conjugate gradients."""
        whole = self._is_whole or shapes.batch is None

        def product(kind: type[ProductFunction], vectors: Any) -> Tensor:
            found = self._product(kind, args, kwargs, vectors, whole)
            if self.options.has_aux:
                found, aux[:] = found[0], [found[1]]
            return torch.cat([t.reshape(len(r), -1) for t in tensor_leaves(found)], 1)

        def times(v: Tensor) -> Tensor:
            flat = _divide(v, shapes, whole)
            axes = [shapes.axes[position] for position in shapes.differentiated]
            moved = [t.movedim(0, axis) if axis else t for t, axis in zip(flat, axes, strict=True)]
            return product(AlongTangents, self._nested_inputs(args, moved))

        def back(u: Tensor) -> Tensor:
            parts = u.split([prod(shape) * (shapes.batch or 1 if whole else 1) for shape in shapes.outputs], 1)
            flat = [part.reshape(*shapes.lead, *shape) for part, shape in zip(parts, shapes.outputs, strict=True)]
            return product(WeightedOutput, shapes.nested_outputs(flat))

        shift = shift if shift.dim() == 0 else shift[:, None]
        return matrix_free_least_squares(times, back, r, shift, MatrixSizes.of(shapes, whole).columns)


def _divide(step: Tensor, shapes: CallShapes, whole: bool) -> list[Tensor]:
    """Return the parts (B, *in) of steps (B, n), or (1, n) for the whole batch."""
    batched = [shapes.batch is not None and shapes.axes[p] is not None for p in shapes.differentiated]
    times = [int(shapes.batch or 0) if whole and has else 1 for has in batched]
    parts = step.split([count * prod(shape) for count, shape in zip(times, shapes.inputs, strict=True)], 1)
    lead = [(shapes.batch,) if has or not whole else () for has in batched]
    return [part.reshape(*n, *shape) for part, n, shape in zip(parts, lead, shapes.inputs, strict=True)]


def _check_damping(damping: Any, like: Tensor, batch: int | None) -> Tensor:
    wanted = "a number, zero or more" + ("" if batch is None else f", or a tensor of shape () or {(batch,)}")
    shift = damping if isinstance(damping, Tensor) else None
    if shift is None and isinstance(damping, (int, float)) and not isinstance(damping, bool):
        shift = like.new_tensor(float(damping))
    if shift is None or tuple(shift.shape) not in ((), (batch,)):
        came = kind_of(damping) if shift is None else f"a tensor of shape {tuple(shift.shape)}"
        raise InputError(f"damping was expected to be {wanted}, got {came}. Pass 0.0 for a Gauss-Newton step")
    if bool((shift < 0).any()):
        raise InputError(
            f"damping was expected to be {wanted}, got {float(shift.min()):.3g}. Pass what is to be "
            "added to the diagonal of JᵀJ"
        )
    return shift.to(like.dtype)
