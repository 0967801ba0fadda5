"""Functions of several tensors as functions of one, which has their columns side by side."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.core.product_functions import ComposedFunction
from autojac.errors import OptionError, nearest


class JoinedArguments(ComposedFunction):
    """A function of some of its arguments joined to one tensor (B, n), and of the others in their order.

    Args:
        func: the function.
        argnums: the arguments that are joined.
        events: for each the shape of a sample's part of it.
    """

    kind = "by columns of several tensors"

    def __init__(self, func: Callable[..., Any], argnums: tuple[int, ...], events: tuple[tuple[int, ...], ...]) -> None:
        super().__init__(func, argnums, False)
        self.events = events

    def __call__(self, joined: Tensor, *others: Any, **kwargs: Any) -> Any:
        args = list(others)
        parts = joined.split([math.prod(event) for event in self.events], 1)
        for number, part, event in sorted(zip(self.argnums, parts, self.events, strict=True), key=lambda each: each[0]):
            args.insert(number, part.reshape(len(part), *event))
        out, _ = self._call(args, kwargs)
        return out


def join_columns(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors (B, *event) side by side, (B, n)."""
    flat = [x.reshape(len(x), -1) for x in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)


def position_of(func: Callable[..., Any], name: str) -> int:
    """Return the position of a function's argument.

    Raises:
        OptionError: if there is none of this name, or the names are not known.
    """
    function = func.forward if isinstance(func, torch.nn.Module) else func
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"of names the argument {name!r}, but the names of func's arguments are not known. Wrap it in a function "
            "that has them"
        ) from error
    places = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    if name not in places:
        raise OptionError(
            f"of names the argument {name!r}, but func takes {', '.join(places) or 'none by position'}"
            f"{nearest(name, places)}. Name columns of arguments that there are"
        )
    return places.index(name)
