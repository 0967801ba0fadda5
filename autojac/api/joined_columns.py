"""Plans for derivatives by columns of several tensors: those of the tensors side by side, for each of their shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from autojac.api.autojacobian import AutoJacobian
from autojac.autodiff.derivative_terms import Terms
from autojac.core.batch_axes import AUTO
from autojac.core.joined_arguments import JoinedArguments, join_columns
from autojac.core.options import OnMiss, Options
from autojac.core.plan import Effort, Plan
from autojac.errors import InputError, OptionError, kind_of, plural
from autojac.guards.compiled_functions import original
from autojac.planning.plan_repository import function_name


class NamedColumn(NamedTuple):
    """A column of an argument; None for its only one."""

    argument: str
    column: int | None

    def __repr__(self) -> str:
        return repr(self.argument) if self.column is None else repr(tuple(self))


NamedTerms = tuple[tuple[NamedColumn, ...], ...]


class JoinedColumns:
    """Derivatives by columns of several tensors, called as `AutoJacobian` is.

    Args:
        func: the function.
        options: as of `AutoJacobian`, checked; `argnums` are the positions of the arguments in `names`.
        names: of the arguments that are differentiated.
        of: the derivatives.
        make: returns the wrapper of a function with one differentiated tensor.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        options: Options,
        names: tuple[str, ...],
        of: NamedTerms,
        make: Callable[[Callable[..., Any], Options, Terms], AutoJacobian],
    ) -> None:
        self.func, self.options, self.names, self.of = original(func), options, names, of
        self._make = make
        self._wrappers: dict[Any, AutoJacobian] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: wrappers are made again."""
        return {**vars(self), "_wrappers": {}}

    def __repr__(self) -> str:
        count = sum(len(wrapper._plans) for wrapper in self._wrappers.values())
        return f"({function_name(self.func)}, {count} plan{'' if count == 1 else 's'} in use)"

    def __autojac_reach__(self) -> dict[str, Any]:
        """Return what another wrapper's fingerprint sees of this one."""
        return {"func": self.func, "of": self.of, "names": self.names, "in_dims": self.options.in_dims}

    def replace(self, func: Callable[..., Any], **changes: Any) -> JoinedColumns:
        """Return the same derivatives of another function, with some options changed."""
        return JoinedColumns(func, self.options.replace(**changes), self.names, self.of, self._make)

    def _replace_on_miss(self, on_miss: OnMiss) -> JoinedColumns:
        """Return the same derivatives where another value of `on_miss` says what to do without a plan."""
        return self.replace(self.func, on_miss=on_miss)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the derivatives, stacked on the last axis."""
        wrapper, joined_args = self._join(args, kwargs)
        return wrapper(*joined_args, **kwargs)

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        wrapper, joined_args = self._join(args, kwargs)
        return wrapper.plan(*joined_args, **kwargs)

    def tune(self, *args: Any, effort: Effort | None = None, budget_s: float | None = None, **kwargs: Any) -> Plan:
        wrapper, joined_args = self._join(args, kwargs)
        return wrapper.tune(*joined_args, effort=effort, budget_s=budget_s, **kwargs)

    def explain(self, *args: Any, **kwargs: Any) -> str:
        wrapper, joined_args = self._join(args, kwargs)
        return wrapper.explain(*joined_args, **kwargs)

    def _join(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[AutoJacobian, tuple[Any, ...]]:
        """Return the wrapper that serves a call, and its arguments: the joined ones, then the others."""
        positions = self.options.argnums
        assert isinstance(positions, tuple)
        if len(args) <= max(positions):
            keyword = next((name for name in self.names if name in kwargs), None)
            what = f"{keyword!r} as a keyword" if keyword else plural(len(args), "argument")
            raise InputError(
                f"derivatives by columns of {', '.join(self.names)} expect these by position, got {what}. Pass them "
                "as tensors in func's order"
            )
        inputs = [args[number] for number in positions]
        for name, x in zip(self.names, inputs, strict=True):
            if not isinstance(x, Tensor) or not x.is_floating_point() or not x.dim():
                what = f"shape {tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else kind_of(x)
                raise InputError(
                    f"a tensor (B, *in) of floating-point numbers was expected for {name!r}, which `of` names, got "
                    f"{what}. Pass one row per sample"
                )
        key = tuple([(x.shape[1:], x.dtype) for x in inputs])
        others = [x for number, x in enumerate(args) if number not in positions]
        if len({len(x) for x in inputs}) > 1 or len({(x.dtype, x.device) for x in inputs}) > 1:
            got = ", ".join(f"{name}: {tuple(x.shape)} {x.dtype}" for name, x in zip(self.names, inputs, strict=True))
            raise InputError(
                f"tensors that are differentiated in together share batch, dtype and device, got {got}. Convert "
                "them, or expand what all samples share"
            )
        wrapper = self._wrappers.get((key, len(args)))
        if wrapper is None:
            wrapper = self._wrappers[key, len(args)] = self._wrapper([tuple(x.shape[1:]) for x in inputs], len(args))
        return wrapper, (join_columns(inputs), *others)

    def _wrapper(self, events: Sequence[tuple[int, ...]], count: int) -> AutoJacobian:
        positions, in_dims = self.options.argnums, self.options.in_dims
        assert isinstance(positions, tuple)
        each = in_dims if isinstance(in_dims, tuple) and len(in_dims) == count else (in_dims,) * count
        for name, number in zip(self.names, positions, strict=True):
            if each[number] not in (0, AUTO):
                raise OptionError(
                    f"in_dims of 0 or 'auto' was expected for {name!r}, whose columns `of` names, got "
                    f"{each[number]!r}. Move its batch axis to the front"
                )
        others = [axis for number, axis in enumerate(each) if number not in positions]
        widths = [math.prod(event) for event in events]
        starts = {name: sum(widths[:place]) for place, name in enumerate(self.names)}
        size = dict(zip(self.names, widths, strict=True))

        def place(column: NamedColumn) -> int:
            width = size[column.argument]
            if (column.column is None and width != 1) or (column.column or 0) >= width:
                raise InputError(
                    f"the derivative by {column} was asked for, but a sample of {column.argument!r} has "
                    f"{plural(width, 'column')}, counted from 0. Name one that there is, as ({column.argument!r}, 0)"
                )
            return starts[column.argument] + (column.column or 0)

        terms = tuple((tuple(sorted(map(place, columns))),) for columns in self.of)
        func = JoinedArguments(self.func, positions, tuple(events))
        options = self.options.replace(argnums=0, in_dims=in_dims if in_dims == AUTO else (0, *others))
        return self._make(func, options, terms)
