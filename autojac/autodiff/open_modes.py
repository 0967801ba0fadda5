"""What a caller has open around a call: transforms, dual levels, hooks on saved tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from autojac.torch_internals import (
    ForceDispatchKeys,
    close_transforms_to_depth,
    dispatch_modes,
    dual_level,
    enter_dual_level,
    excluded_keys,
    exit_dual_level,
    function_modes,
    included_keys,
    innermost_transform,
    is_forward_grad_enabled,
    is_profiling,
    may_transform,
    open_transforms,
    saved_tensors_hooks,
    set_dual_level,
    set_forward_grad_enabled,
    set_grad_enabled,
)

forward_lock = threading.RLock()
"""Held while a level of dual numbers is open: torch has one for all threads."""


def transforming() -> bool:
    """Check whether the caller is inside a torch.func transform or a level of dual numbers."""
    # while torch.compile traces, the innermost interpreter is never None: what it traces may not probe either
    if not may_transform():
        return False
    if innermost_transform() is not None:
        return True
    with forward_lock:  # it may be another thread's, which opened it here and is about to close it
        return dual_level() >= 0


def in_one_thread(transform: Callable[..., Any]) -> Callable[..., Any]:
    """Return a transform that opens a level of dual numbers, in one thread at a time."""

    def run_locked(*args: Any) -> Any:
        with forward_lock:
            return transform(*args)

    return run_locked


def hooked() -> bool:
    """Check whether a caller's hooks, such as checkpointing's, see what autograd saves."""
    return saved_tensors_hooks(True) is not None


def is_observed() -> bool:
    """Check whether a caller's hooks, modes, profiler or CUDA graph would see what is evaluated now."""
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return capturing or hooked() or is_profiling() or bool(function_modes() or dispatch_modes())


def isolate_saved_tensors() -> AbstractContextManager[Any]:
    """Keep a caller's hooks on saved tensors, such as checkpointing's, from seeing what an evaluation saves."""
    if not hooked():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


@contextmanager
def levels_restored() -> Iterator[None]:
    """Close what a failure leaves open: a compilation that breaks off forgets its dual level and its grad mode.

    Left open, every later forward mode of the process would fail, or nothing would be recorded any more. torch allows
    one dual level and does not tell whether it is open, so this opens one to find out.
    """
    level, stack = dual_level(), open_transforms()
    grad, forward_grad = torch.is_grad_enabled(), is_forward_grad_enabled()
    keys = included_keys(), excluded_keys()
    try:
        # on leaving, the guard puts back which dispatch keys this thread includes and excludes
        with ForceDispatchKeys(*keys):
            yield
    finally:
        set_grad_enabled(grad)
        set_forward_grad_enabled(forward_grad)
        if len(open_transforms() or ()) > len(stack or ()):
            close_transforms_to_depth(len(stack or ()))
        if level < 0 and not stack:
            try:
                exit_dual_level(level=enter_dual_level())
            except RuntimeError:
                exit_dual_level(level=0)
            set_dual_level(level)
