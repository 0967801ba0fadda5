"""Quantities of a Jacobian: its inverse, determinant, trace and factors."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from autojac.api.linalg import as_matrices, inverse, slogdet
from autojac.api.low_rank_factors import LowRankJacobian
from autojac.api.planned_call import PlannedCall
from autojac.core.options import OnMiss, Options
from autojac.core.signature import Layout
from autojac.errors import InputError
from autojac.planning.plans_in_use import PlansInUse
from autojac.planning.prepared_plan import PreparedPlan
from autojac.problem.problem import Result


class MatrixQuantities(ABC):
    """The methods of `AutoJacobian` for quantities of one Jacobian, of one output in one input."""

    func: Callable[..., Any]
    options: Options
    _plans: PlansInUse
    _others: dict[Any, Self]

    @abstractmethod
    def _run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[PreparedPlan, Result]: ...

    @abstractmethod
    def _func_args(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]: ...

    @abstractmethod
    def __getstate__(self) -> dict[str, Any]: ...

    @abstractmethod
    def __setstate__(self, state: dict[str, Any]) -> None: ...

    def inverse(self, *args: Any, **kwargs: Any) -> Any:
        """Return the inverse of each sample's Jacobian, or its Moore-Penrose inverse where it is rectangular.

        Zeros that all samples share choose the way (reciprocals, substitution, LU, QR); the derivative is that of a
        general matrix.

        Args:
            args, kwargs: the call.

        Returns:
            (B, *in, *out); with `layout="full"` the inverse of the whole, (B, *in, B, *out), or (*in, B, *out) for an
            input that all samples share. Differentiable where J is. With `has_aux=True` the pair (inverse, aux).

        Raises:
            InputError: if there are several outputs or inputs.
            SingularJacobianError: naming the samples whose Jacobian is singular, rank-deficient or not finite.
        """
        return self._of_matrices(lambda matrices, restore: restore(inverse(matrices)), args, kwargs)

    def slogdet(self, *args: Any, **kwargs: Any) -> Any:
        """Return sign and logarithm of each sample's absolute Jacobian determinant, as a normalizing flow needs them.

        Args:
            args, kwargs: the call.

        Returns:
            (sign, logabsdet), each (B,); with `layout="full"` of the whole, without a batch of the one Jacobian. A
            singular sample has sign 0 and logarithm -inf. With `has_aux=True` the pair ((sign, logabsdet), aux).

        Raises:
            InputError: if there are several outputs or inputs, or not as many rows as columns.
        """
        return self._of_matrices(lambda matrices, _: slogdet(matrices), args, kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """Return the trace of each sample's Jacobian: the divergence of a vector field. Only the diagonal is computed.

        Args:
            args, kwargs: the call.

        Returns:
            (B,), or () without a batch. With `has_aux=True` the pair (trace, aux).

        Raises:
            InputError: if there are several outputs or inputs.
            OutputError: if a sample has not as many outputs as inputs.
        """
        plan, result = self._other("diagonal")._run(self._func_args(args, kwargs), kwargs)
        total = only(plan, result).sum(-1)
        return self._beside_aux(total.squeeze(0) if plan.layout.unbatched else total, result)

    def factors(self, *args: Any, **kwargs: Any) -> LowRankJacobian:
        """Return the batch's Jacobian as block diagonal plus low rank, where samples meet in shared statistics alone.

        A million samples under BatchNorm have a Jacobian that no memory holds, but its factors fit: `factors @ v` is
        J·v.

        Args:
            args, kwargs: the call.

        Returns:
            (D, U, V) of shapes (B, *out, *in), (B, *out, k) and (k, B, *in), for k shared numbers; k is 0 for
            independent samples. Differentiable where J is.

        Raises:
            InputError: if there are several outputs or inputs.
            UnsupportedError: if samples meet elsewhere; `layout="full"` then has all.
        """
        return self._other("blocks")._factors(self._func_args(args, kwargs), kwargs)

    @abstractmethod
    def _factors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LowRankJacobian: ...

    def _of_matrices(
        self,
        function: Callable[[Tensor, Callable[[Tensor], Tensor]], Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        plan, result = self._matrices_call(self._func_args(args, kwargs), kwargs).run()
        problem, jacobian = plan.problem, only(plan, result)
        if plan.layout.unbatched:
            jacobian = jacobian.squeeze(0)
        leaf = problem.leaves[problem.inputs[0]]
        shared = problem.layout == "full" and not leaf.batched
        matrices, restore = as_matrices(jacobian, problem.outputs[0], leaf.event_shape, shared)
        return self._beside_aux(function(matrices, restore), result)

    def _matrices_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> PlannedCall:
        """Return the call for dense matrices, of each sample or of the whole batch."""
        return PlannedCall(self if self.options.layout == "full" else self._other("blocks"), args, kwargs)

    def _beside_aux(self, value: Any, result: Result) -> Any:
        return (value, result.aux) if self.options.has_aux else value

    def _without_aux(self, result: Any) -> Any:
        return result[0] if self.options.has_aux else result

    def _other(self, layout: Layout) -> Self:
        """Return the same wrapper for another layout, with separate plans."""
        if layout == self.options.layout:
            return self
        if layout not in self._others:
            self._others[layout] = self._rewrap(self.func, dataclasses.replace(self.options, layout=layout))
        return self._others[layout]

    def _rewrap(self, func: Callable[..., Any], options: Options) -> Self:
        """Return a wrapper of the same kind, with separate plans."""
        other = type(self).__new__(type(self))
        other.__setstate__({**self.__getstate__(), "func": func, "options": options})
        return other

    def _replace_on_miss(self, on_miss: OnMiss) -> Self:
        """Return the same Jacobian where another value of `on_miss` says what to do without a plan."""
        return self._rewrap(self.func, self.options.replace(on_miss=on_miss))


def only(plan: PreparedPlan, result: Result) -> Tensor:
    """Return the one Jacobian of a call."""
    require_one_pair(len(result.jacobians), len(plan.problem.inputs))
    return result.jacobians[0][0]


def require_one_pair(outputs: int, inputs: int) -> None:
    """Raise `InputError` unless there is one output and one input."""
    if (outputs, inputs) != (1, 1):
        raise InputError(
            f"one output and one input were expected, but func has {outputs} and {inputs}: each pair has a Jacobian of "
            "its own. Wrap a function that concatenates them"
        )
