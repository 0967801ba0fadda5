"""Which module's code runs, found by looking at the callers: hooks would be seen by the user and by other threads."""

from __future__ import annotations

import sys
from types import CodeType, FrameType

import torch


def running_module(root: CodeType) -> int:
    """Return the id of the innermost module among the callers whose method runs; 0 if there is none.

    Args:
        root: code of the caller to stop at.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not root:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if isinstance(owner, torch.nn.Module):
                return id(owner)
        frame = frame.f_back
    return 0
