"""Differentiate in tensors that a function reads by itself, where nothing can be put in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def through_sources(
    run: Callable[[], Sequence[Tensor]],
    sources: Sequence[Tensor],
    stand_ins: Sequence[Tensor],
    others: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Run a function and give its outputs a graph in which `stand_ins` have the derivatives of `sources`.

    Reverse mode only, one cotangent at a time, as plain autograd does it: transforms and forward mode raise. The
    values are those at `sources`, whatever `stand_ins` hold.

    Args:
        run: the function; it reads `sources` and `others` by itself.
        sources: tensors that require grad.
        stand_ins: one for each source.
        others: further tensors that the outputs may depend on, for the graph of the values.
    """
    outputs: tuple[Tensor, ...] = _Through.apply(run, tuple(sources), *stand_ins, *others)  # type: ignore[no-untyped-call]
    return outputs


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[], Sequence[Tensor]], sources: tuple[Tensor, ...], *tensors: Tensor) -> Any:
        with torch.enable_grad():
            ctx.outputs = tuple(run())
        ctx.sources = (*sources, *tensors[len(sources) :])
        return tuple(output.detach() for output in ctx.outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        pairs = [(y, c) for y, c in zip(ctx.outputs, cotangents, strict=True) if y.requires_grad]
        wanted = [source for source in ctx.sources if source.requires_grad]
        if not pairs or not wanted:
            return (None, None, *[None for _ in ctx.sources])
        outputs, seeds = zip(*pairs, strict=True)
        found = iter(
            torch.autograd.grad(
                outputs, wanted, seeds, retain_graph=True, create_graph=torch.is_grad_enabled(), allow_unused=True
            )
        )
        return (None, None, *[next(found) if source.requires_grad else None for source in ctx.sources])
