"""Isolation of planning from the caller's hooks and modes, and from other ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token

from torch import Tensor

from autojac.autodiff.open_modes import isolate_saved_tensors
from autojac.core.autocast import outside_autocast
from autojac.core.ranks import silent
from autojac.core.sandbox import without_hooks
from autojac.core.time_limit import end_watch
from autojac.guards.process_state import restore_process_state
from autojac.planning.call import Call

_planning: ContextVar[bool] = ContextVar("planning", default=False)


@contextmanager
def mark_planning() -> Iterator[bool]:
    """Mark that a plan is being made; yield whether another one was already."""
    token = _planning.set(True)
    inside = bool(token.old_value is not Token.MISSING and token.old_value)
    try:
        yield inside
    finally:
        _planning.reset(token)
        if not inside:
            end_watch()


@contextmanager
def isolate_planning(call: Call, trained: Sequence[Tensor]) -> Iterator[bool]:
    """Isolate planning from the caller's hooks, modes and other ranks; yield whether a plan was being made already."""
    with (
        outside_autocast(),
        without_hooks(trained),
        isolate_saved_tensors(),
        restore_process_state(),
        silent(call.captured.modules),
        mark_planning() as inside,
    ):
        yield inside
