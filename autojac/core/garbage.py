"""Suspending garbage collection."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable garbage collection.

    While func is watched: a collection runs code and frees memory that is not the function's. While modules are
    imported: they make thousands of objects that stay, for which Python would go through all of torch's as well, in a
    tenth of a second, and find nothing to free.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
