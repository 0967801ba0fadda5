"""What func does on a branch that no evaluation has taken yet is left once, however often a method runs func."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.core.sandbox import Sandbox
from autojac.core.structure import KEEPS
from autojac.problem.problem import Compute, Problem, Result


def leave_once(problem: Problem, compute: Compute) -> Compute:
    """Return a computation that leaves, on a branch that nobody has seen, what one plain call of func leaves there."""
    # what func keeps in each call is left by a plain call already
    leaves_more = KEEPS not in problem.structure.effects

    def compute_and_leave(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        captured = () if problem.function_state is None else problem.function_state.present.tensors
        sandbox = Sandbox([tensor for tensor in captured if not tensor.requires_grad], None, problem.places)
        restore = sandbox.save()
        try:
            result = compute(leaves, kwargs)
        finally:
            restore()
        if leaves_more and (sandbox.written or sandbox.kept):
            with torch.set_grad_enabled(problem.differentiable):
                problem.fn(leaves, kwargs)
        return result

    return compute_and_leave
