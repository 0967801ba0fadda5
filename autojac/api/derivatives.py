"""Derivatives by single columns of the input, as partial differential equations and PINNs need them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self, Unpack

import torch

from autojac.api.autojacobian import AutoJacobian, jacobian_of, require_function
from autojac.api.flat_calls import BatchAxesChoice
from autojac.api.joined_columns import JoinedColumns, NamedColumn
from autojac.api.over_batch_axes import PlannedOverBatchAxes
from autojac.core import pytree
from autojac.core.joined_arguments import position_of
from autojac.core.options import OnMiss, Options, OptionValues
from autojac.core.plan import Effort, Plan
from autojac.errors import OptionError, kind_of
from autojac.guards.compiled_functions import opaque_methods


@opaque_methods
class Derivatives(BatchAxesChoice):
    """Derivatives of a function by columns of its input, of any order and mixed ones, each sample's own.

    Only what is asked for is computed, in one plan that shares what the derivatives have in common: nested reverse
    mode and Taylor mode compete, each also recorded as a flat program or compiled. The plan is found, verified
    against plain nested `torch.autograd.grad` on a few samples, stored and checked as those of `AutoJacobian` are.

        >>> import torch
        >>> from autojac import Derivatives
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
        >>> derivatives = Derivatives(net, of=((), (0,), (1,), (1, 1)))
        >>> u, u_t, u_x, u_xx = derivatives(torch.rand(256, 2))  # (256, 1) each
        >>> (u_t + u * u_x - 0.05 * u_xx).square().mean().backward()

    The variables may also be tensors of their own, which `of` then names as func does:

        >>> def wave(t, x):
        ...     return torch.sin(t) * torch.exp(x[:, :1] * x[:, 1:])
        >>> derivatives = Derivatives(wave, of=((), ("t", "t"), (("x", 0), ("x", 1))))
        >>> u, u_tt, u_xy = derivatives(torch.rand(256, 1), torch.rand(256, 2))

    Args:
        func: a function or module of the whole batch: x of shape (B, n) gives y of shape (B, *out).
        of: a sequence with one entry per derivative, each a tuple of columns: `()` is the value, `(0,)` the derivative
            by column 0, `(1, 1)` the second one by column 1, `(0, 1)` a mixed one. Of an input (B, *in) the columns
            of a sample are counted as `x.flatten(1)` has them. Where func is of several tensors, (B, *in) each, a
            column is the name of an argument, `("x", "x")`, or, of one with several columns, a name and a number,
            `(("x", 0), ("x", 0))`. These are passed by position, and all are planned as one tensor.
        batch_dims: as of `AutoJacobian`: with 2 an input (B1, B2, n) gives derivatives (B1, B2, *out).
        options: those of `AutoJacobian` but `layout` and `has_aux`; `argnums` names the one tensor that is
            differentiated in.

    Raises:
        OptionError: for an unknown option, a value that is not accepted, or an `of` that names no derivatives.

    Nested reverse mode is what hand-written PINN codes do; Taylor mode follows Griewank and Walther, Evaluating
    Derivatives (2008), chapter 13.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        of: Sequence[Sequence[Any]],
        *,
        argnums: int = 0,
        in_dims: Any = "auto",
        batch_dims: int = 1,
        **options: Unpack[OptionValues],
    ) -> None:
        require_function(func)
        for name in ("layout", "has_aux"):
            if name in options:
                raise OptionError(f"derivatives by columns have no {name}. Leave it out")
        if not isinstance(argnums, int):
            raise OptionError(
                f"argnums must be one int, the tensor that `of` counts columns of, got {argnums!r}. Name columns of "
                "several as func names them: of=((), ('t',), ('x', 'x'))"
            )
        columns = _columns(of)
        named = (column for part in columns for column in part if isinstance(column, NamedColumn))
        names = tuple(dict.fromkeys(column.argument for column in named))
        positions: Any = tuple(position_of(func, name) for name in names)
        checked = Options.from_keywords({"argnums": positions or argnums, "in_dims": in_dims, **options})
        self.planned: AutoJacobian | JoinedColumns
        if names:
            self.planned = JoinedColumns(func, checked, names, columns, jacobian_of)
        else:
            self.planned = jacobian_of(func, checked, tuple((part,) for part in columns))
        self.func = self.planned.func
        self.of = columns

    def _of_one_axis(self, func: Callable[..., Any], in_dims: Any) -> Derivatives:
        """Return the same derivatives of another function, by the same options, with one batch axis."""
        derivatives, options = Derivatives.__new__(Derivatives), self.planned.options
        if isinstance(self.planned, JoinedColumns):
            derivatives.planned = self.planned.replace(func, in_dims=in_dims)
        else:
            derivatives.planned = jacobian_of(func, options.replace(in_dims=in_dims), options.of)
        derivatives.func, derivatives.of = func, self.of
        return derivatives

    def _replace_on_miss(self, on_miss: OnMiss) -> Self:
        """Return the same derivatives where another value of `on_miss` says what to do without a plan."""
        derivatives = copy.copy(self)
        derivatives.planned = self.planned._replace_on_miss(on_miss)
        return derivatives

    def __repr__(self) -> str:
        return f"Derivatives{repr(self.planned).removeprefix('AutoJacobian')}".replace("(", f"(of={self.of}, ", 1)

    def __autojac_reach__(self) -> dict[str, Any]:
        """Return what another wrapper's fingerprint sees of this one."""
        return {"jacobian": self.planned, "of": self.of}

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the derivatives at these arguments.

        Returns:
            One entry per derivative in `of`, each of the shape of func's output, (B, *out), and nested as that is.
            Differentiable in the inputs and parameters that require grad.

        Raises:
            InputError: if more than one tensor is to be differentiated in, or it has not the columns in `of`.
            OutputError, MutationError, RandomnessError: where there are no such derivatives.
            SearchError: if no method is right within the limits.
        """
        stacked = self.planned(*args, **kwargs)
        if isinstance(stacked, torch.Tensor):
            return stacked.unbind(-1)
        flat, spec = pytree.tree_flatten(stacked)
        return tuple(
            pytree.tree_unflatten(list(part), spec) for part in zip(*(x.unbind(-1) for x in flat), strict=True)
        )

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """Return the plan for such a call; made now if there is none."""
        return self.planned.plan(*args, **kwargs)

    def tune(self, *args: Any, effort: Effort | None = None, budget_s: float | None = None, **kwargs: Any) -> Plan:
        """Search for the best plan for such a call, as `AutoJacobian.tune` does."""
        return self.planned.tune(*args, effort=effort, budget_s=budget_s, **kwargs)

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """Explain the plan, as `AutoJacobian.explain` does."""
        return self.planned.explain(*args, **kwargs)


def _columns(of: Any) -> tuple[Any, ...]:
    """Return derivatives as sorted tuples of columns, all of them numbers, or all `NamedColumn`.

    Raises:
        OptionError: if it is not a sequence of tuples of columns, at least one of them a derivative.
    """
    expected = "of must be a sequence of tuples of columns, such as ((), (0,), (1,), (1, 1))"
    if not isinstance(of, (tuple, list)) or not all(isinstance(columns, (tuple, list)) for columns in of):
        raise OptionError(f"{expected}; got {of!r}")
    parsed = [[_column(column, expected) for column in columns] for columns in of]
    if not any(parsed):
        raise OptionError(f"{expected}; got {of!r}, which names no derivative. Call func itself for its value")
    if len({type(column) for columns in parsed for column in columns}) > 1:
        raise OptionError(
            f"{expected}, or as ((), ('t',), ('x', 'x')) for several tensors; got both, {of!r}. Name all of them"
        )
    return tuple(tuple(sorted(columns, key=_order)) for columns in parsed)


def _column(column: Any, expected: str) -> int | NamedColumn:
    if isinstance(column, str):
        return NamedColumn(column, None)
    name, number = column if isinstance(column, (tuple, list)) and len(column) == 2 else ("", column)
    if not isinstance(name, str) or not isinstance(number, int) or isinstance(number, bool) or number < 0:
        what = repr(column) if isinstance(column, (int, tuple, list)) else kind_of(column)
        raise OptionError(f"{expected}, columns counted from 0, or as ('t',) and (('x', 0),) by name; got {what}")
    return NamedColumn(name, number) if name else number


def _order(column: int | NamedColumn) -> Any:
    return column if isinstance(column, int) else (column.argument, column.column or 0)


@opaque_methods
class _DerivativesOverBatchAxes(PlannedOverBatchAxes, Derivatives):
    """`Derivatives` for several batch axes."""

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        call = self._calls.flat(args)
        return tuple(call.lead(derivative) for derivative in call.wrapper(*call.args, **kwargs))


Derivatives.over_batch_axes = _DerivativesOverBatchAxes
