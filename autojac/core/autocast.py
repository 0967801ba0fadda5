"""The caller's autocast: func runs inside it, and whatever autojac computes for itself runs outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from autojac.torch_internals import is_any_autocast_enabled

DEVICES = ("cpu", "cuda")
Autocast = tuple[tuple[str, torch.dtype], ...]
"""The kinds of devices that autocast is on for, with the dtype that it casts to."""

_nothing = nullcontext()


def current_autocast() -> Autocast:
    """Return what autocast does at the moment; empty if it is off."""
    if not is_any_autocast_enabled():
        return ()
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in DEVICES if torch.is_autocast_enabled(kind))


def outside_autocast() -> AbstractContextManager[None]:
    """Turn autocast off, so that what is computed keeps the precision of its arguments."""
    return _turn(current_autocast(), False) if is_any_autocast_enabled() else _nothing


def inside_autocast(autocast: Autocast) -> AbstractContextManager[None]:
    """Turn autocast on as it was."""
    return _turn(autocast, True)


@contextmanager
def _turn(autocast: Autocast, on: bool) -> Iterator[None]:
    # not torch.autocast, which clears the caller's cache of converted weights at the outermost exit
    before = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind, _ in autocast]
    try:
        for kind, dtype in autocast:
            torch.set_autocast_enabled(kind, on)
            torch.set_autocast_dtype(kind, dtype)
        yield
    finally:
        for kind, was_on, dtype in before:
            torch.set_autocast_enabled(kind, was_on)
            torch.set_autocast_dtype(kind, dtype)
