"""Solutions of linear systems whose derivative is another solution with the same matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor


class _CorrectedSolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, solution: Tensor, residual: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve
        ctx.save_for_backward(residual)
        return solution.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor, None]:
        gradient: Tensor = _FirstDerivativeOnly.apply(-ctx.solve(cotangent.detach()), *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return None, gradient, None


class _FirstDerivativeOnly(torch.autograd.Function):
    """A gradient whose own derivative is refused: it depends on the residual's tensors in a way that no graph shows."""

    @staticmethod
    def forward(ctx: Any, pulled: Tensor, residual: Tensor) -> Tensor:
        return pulled.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> NoReturn:
        raise RuntimeError(
            "solutions of sparse factors and of conjugate gradients are differentiable once. Ask for layout='full' or "
            "'blocks' with a memory_limit that the Jacobian fits into, for second derivatives"
        )


def attach_implicit_derivative(solution: Tensor, residual: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a solution d of A d = b with its derivative, which is that of d - A⁻¹ (A d - b) for d and A⁻¹ held still.

    Args:
        solution: d, without a graph.
        residual: A d - b, which is zero, with the graph of A and b.
        solve: y ↦ A⁻¹ y for the symmetric A, without a graph: a derivative of the derivative is refused.
    """
    result: Tensor = _CorrectedSolution.apply(solution, residual, solve)  # type: ignore[no-untyped-call]
    return result
