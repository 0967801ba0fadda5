"""What all threads of a process share and planning must restore: warnings filters and the environment."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

IGNORED = r"(?#autojac).*"
"""The message pattern of the filter that `ignore_warnings` sets: it matches everything, and no other filter has it."""
COMPILER_CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""A variable that torch's compiler sets to its own default when it is imported."""
LIBRARIES = ("sympy", "the matrix subclass")
"""What identifies the filters that SymPy and SciPy add when they are imported: a category's module, or a message."""
OPTUNA = "optuna"
"""A library, and its logger, whose level is set when it is imported."""

_lock = threading.Lock()
_users: list[int] = []


@contextmanager
def ignore_warnings() -> Iterator[None]:
    """Ignore all warnings.

    `warnings.catch_warnings` restores a list of filters: of two threads that overlap, the one that leaves last restores
    what the other one had set, for good. This adds one filter and removes it.
    """
    thread = threading.get_ident()
    with _lock:
        _users.append(thread)
        warnings.filterwarnings("ignore", IGNORED)
    try:
        yield
    finally:
        with _lock:
            _users.remove(thread)
            if not _users:
                _drop(lambda entry: _message(entry) == IGNORED)


@contextmanager
def restore_process_state() -> Iterator[None]:
    """Undo what libraries that are imported in the block change for the whole process."""
    before, cache = list(warnings.filters), os.environ.get(COMPILER_CACHE)
    level = 0 if OPTUNA in sys.modules else getattr(logging.root.manager.loggerDict.get(OPTUNA), "level", 0)
    try:
        yield
    finally:
        if level:
            logging.getLogger(OPTUNA).setLevel(level)
        _drop(lambda entry: entry not in before and _of_library(entry))
        if cache is None:
            os.environ.pop(COMPILER_CACHE, None)


def _drop(is_dropped: Callable[[Any], bool]) -> None:
    # a filter that ignores leaves nothing in the registries of warnings, so these need no reset
    for entry in [entry for entry in warnings.filters if is_dropped(entry)]:
        with suppress(ValueError):  # another thread has put other filters in place
            warnings.filters.remove(entry)  # type: ignore[attr-defined]


def _message(entry: Any) -> str:
    return getattr(entry[1], "pattern", entry[1]) or ""


def _of_library(entry: Any) -> bool:
    return entry[2].__module__.startswith(LIBRARIES) or _message(entry).startswith(LIBRARIES)
