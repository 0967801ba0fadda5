"""Functions of matrices whose derivatives are given by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autojac.torch_internals import forward_grad_enabled


@dataclass(frozen=True)
class MatrixRule:
    """A function of each matrix of a batch (*lead, m, n) -> (*lead, *result), with its derivative given by hand.

    `value` meets plain tensors only, under whatever transform the caller is, so it may look at numbers. The other two
    are made of differentiable operations and take (matrices, result) first.

    Args:
        value: the function; nothing in it is recorded.
        pull: (matrices, result, cotangent of the result) -> cotangent of the matrices.
        push: (matrices, result, tangent of the matrices) -> tangent of the result.
    """

    value: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor, Tensor, Tensor], Tensor]
    push: Callable[[Tensor, Tensor, Tensor], Tensor]


class _ByRule(torch.autograd.Function):
    @staticmethod
    def forward(matrices: Tensor, rule: MatrixRule) -> Tensor:
        return rule.value(matrices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, MatrixRule], output: Tensor) -> None:
        matrices, ctx.rule = inputs
        ctx.save_for_backward(matrices, output)
        ctx.save_for_forward(matrices, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return ctx.rule.pull(*ctx.saved_tensors, cotangent), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        # torch calls this with forward mode off, which would cut the tangents that outer levels follow
        with forward_grad_enabled(True):
            saved = (torch.autograd.forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
            pushed: Tensor = ctx.rule.push(*saved, tangent)
        return pushed

    @staticmethod
    def vmap(_: Any, in_dims: tuple[int, None], matrices: Tensor, rule: MatrixRule) -> tuple[Tensor, int]:
        return by_rule(matrices.movedim(in_dims[0], 0), rule), 0


def by_rule(matrices: Tensor, rule: MatrixRule) -> Tensor:
    """Return `rule.value(matrices)`, differentiable any number of times, under torch.func's transforms too."""
    value: Tensor = _ByRule.apply(matrices, rule)  # type: ignore[no-untyped-call]
    return value
