"""How methods run the function."""

from __future__ import annotations

from enum import Enum, auto


class FuncRuns(Enum):
    """How a method runs func, which decides what effects func may have."""

    ANYHOW = auto()
    """More than once, or on anything but the whole batch as it is."""
    WHOLE_BATCH = auto()
    """More than once, but always on the whole batch as it is and outside of a compiler: then it may draw again."""
    ONCE = auto()
    """Once, on the whole batch as it is."""
    RECORDED = auto()
    """Once, and what was recorded is differentiated in its place."""
