"""Where a search checks and times candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from autojac.core.sandbox import Sandbox


class SearchPoint(NamedTuple):
    """Where candidates are checked and timed.

    Attributes:
        leaves, kwargs: the arguments.
        captured: tensors besides the inputs that a loss on a differentiable Jacobian trains.
        sandbox: how to evaluate without side effects.
    """

    leaves: Sequence[Tensor]
    kwargs: Mapping[str, Any]
    captured: Sequence[Tensor]
    sandbox: Sandbox
