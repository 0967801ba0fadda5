"""torch's compiler: keeping it out of autojac, and running compiled parts of func eagerly."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

from autojac.guards.walker import HOOKS
from autojac.torch_internals import COMPILED_HOME, skip_when_compiling

F = TypeVar("F", bound=Callable[..., Any])
K = TypeVar("K", bound=type)
P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.Lock()
_users: list[int] = []
_stance: list[Any] = []


def opaque(function: F) -> F:
    """Keep the compiler out of a function and of all that it calls: compiled code calls it as it is.

    `torch.compiler.disable` would import the compiler (1 s) and cost each call 2 µs; this sets the same marks. A torch
    that has other marks compiles what it can, which is slow and right.
    """
    untyped: Any = function
    untyped._torchdynamo_disable = True
    untyped._torchdynamo_disable_msg = "autojac plans, measures and checks while it runs"
    skip_when_compiling(untyped.__code__)
    return function


def opaque_methods(kind: K) -> K:
    """Make the public methods of a class, inherited ones included, opaque to the compiler."""
    for base in kind.__mro__:
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType) and (name == "__call__" or not name.startswith("_")):
                opaque(value)
    return kind


def is_compiled(func: Any) -> bool:
    """Check whether a function or module runs through torch.compile when it is called."""
    if isinstance(func, torch.nn.Module):
        # a module that is compiled in place holds its compiled call in an attribute
        return type(func).__module__ == COMPILED_HOME or vars(func).get("_compiled_call_impl") is not None
    return isinstance(func, types.FunctionType) and "_torchdynamo_orig_callable" in vars(func)


def original(func: Any) -> Any:
    """Return what torch.compile was given; a function or module that is not compiled is returned as it is."""
    while is_compiled(func):
        if isinstance(func, types.FunctionType):
            func = vars(func)["_torchdynamo_orig_callable"]
        elif type(func).__module__ == COMPILED_HOME and not any(getattr(func, hooks) for hooks in HOOKS):
            func = func._orig_mod
        else:
            break
    return func


def eagerly(func: Callable[P, T]) -> Callable[P, T]:
    """Return a function that runs what its compiled parts were compiled from.

    A compiled backward runs once, has no derivative and supports no transform; and what autojac tries would count
    towards the recompilations of its owner. torch has one stance for all threads.
    """

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with _eager():
            return func(*args, **kwargs)

    return run


def runs_eagerly() -> bool:
    """Check whether compiled functions run what they were compiled from, in all threads."""
    return bool(_users)


@contextmanager
def _eager() -> Iterator[None]:
    thread = threading.get_ident()
    with _lock:
        if not _users:
            _stance[:] = [torch.compiler.set_stance("force_eager")]
        _users.append(thread)
    try:
        yield
    finally:
        with _lock:
            _users.remove(thread)
            if not _users:
                _stance.pop().__exit__(None, None, None)
