"""Zero tangents without loading torch's compiler (1 s): forward mode asks Python functions of torch for their shape.

What a function captures has no tangent, which stands for zeros without memory. Where these meet a tangent, their common
shape and dtype come from functions of `torch._refs` that load the compiler at their first call, to be left alone by it,
and sympy (0.4 s). As long as the compiler is not loaded, stand-ins answer in their place.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Final

import torch

from autojac.torch_internals import COMPILER, compiler_shield, reference_operators

DISABLED: Final = "__dynamo_disable"
"""Attribute of such a function: what is called in its place, once the compiler was told to leave it alone."""
MEET: Final = ("add", "mul", "true_divide")
"""The functions that tangents meet zeros in."""
KINDS: Final = (torch.Tensor, int, float)


def is_compiler_loaded() -> bool:
    """Check whether torch's compiler is loaded already."""
    return COMPILER in sys.modules


@contextmanager
def without_loading_compiler() -> Iterator[None]:
    """Keep forward mode from loading torch's compiler."""
    if is_compiler_loaded():
        yield
        return
    replaced = [(hidden, answer) for hidden, answer in answers().values() if not hasattr(hidden, DISABLED)]
    for hidden, answer in replaced:
        setattr(hidden, DISABLED, answer)
    try:
        yield
    finally:
        for hidden, answer in replaced:
            # another thread may have loaded the compiler meanwhile
            if getattr(hidden, DISABLED, None) is answer:
                delattr(hidden, DISABLED)


@functools.cache
def answers() -> dict[str, tuple[Any, Callable[..., Any]]]:
    """Return by name the functions that zero tangents run through, each with what answers in its place."""
    hidden = {name: _behind_shield(getattr(reference_operators, name, None)) for name in MEET}
    return {name: (function, _outline(function)) for name, function in hidden.items() if function is not None}


def _behind_shield(function: Any) -> Any:
    """Return the function inside the decorator that loads the compiler; None if there is no such decorator."""
    while compiler_shield is not None and isinstance(function, FunctionType):
        cell = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)).get("fn")
        if cell is not None and function.__code__.co_filename == compiler_shield.__code__.co_filename:
            return cell.cell_contents
        function = None if cell is None else cell.cell_contents
    return None


def _outline(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a stand-in for an elementwise function of two tensors without memory: their common shape and dtype."""

    def outline(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        floats = [x for x in tensors if x.is_floating_point()]
        # a scalar decides the dtype only where it is of a higher kind
        decides = [x for x in floats if x.dim()] or floats
        plain = all(isinstance(x, KINDS) for x in args) and all(x.is_meta and not x.is_complex() for x in tensors)
        if len(args) != 2 or not plain or not floats or decides[0].dim() < max(min(x.dim(), 1) for x in tensors):
            return function(*args, **kwargs)
        # torch.broadcast_shapes loads sympy, and torch.result_type is an operator, which a recording would see
        sizes = [*itertools.zip_longest(*(reversed(x.shape) for x in tensors), fillvalue=1)]
        shape = [next((size for size in some if size != 1), 1) for some in reversed(sizes)]
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in decides))
        return torch.empty(shape, dtype=dtype, device="meta")

    return outline
