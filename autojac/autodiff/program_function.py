"""Computations given as programs of plain operators, with programs for their backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PullProgram:
    """A program that pulls cotangents of some outputs back.

    Attributes:
        run: takes the inputs, what the forward program left, and a cotangent for each of `outputs`.
        outputs: positions of the outputs whose cotangents it takes.
        strides: of those cotangents.
        given: positions of the inputs whose gradients it returns.
    """

    run: Callable[..., tuple[Tensor, ...]]
    outputs: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    given: tuple[int, ...]


@dataclass(frozen=True)
class Programs:
    """A computation given as programs of plain operators.

    Attributes:
        forward: from the inputs to the outputs, followed by what the pulls read besides inputs and cotangents.
        outputs: how many outputs there are.
        constant: positions of those without a derivative.
        pulls: their results add up.
        recompute: the computation under autograd, outputs and inputs that require grad, for derivatives of pulls.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    outputs: int
    constant: tuple[int, ...]
    pulls: tuple[PullProgram, ...]
    recompute: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]


class _ByPrograms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, programs: Programs, *inputs: Tensor) -> tuple[Tensor, ...]:
        results = programs.forward(*inputs)
        outputs = results[: programs.outputs]
        ctx.programs, ctx.many = programs, len(inputs)
        ctx.save_for_backward(*inputs, *results[programs.outputs :])
        ctx.mark_non_differentiable(*(outputs[place] for place in programs.constant))
        ctx.set_materialize_grads(False)
        ctx.kinds = [(y.shape, y.dtype, y.device) for y in outputs]
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        programs: Programs = ctx.programs
        saved = ctx.saved_tensors
        gradients: list[Tensor | None] = [None] * ctx.many
        if torch.is_grad_enabled():
            for place, gradient in _pull_again(programs, saved[: ctx.many], cotangents):
                gradients[place] = gradient
            return None, *gradients
        for pull in programs.pulls:
            chosen = [cotangents[place] for place in pull.outputs]
            if all(cotangent is None for cotangent in chosen):
                continue
            arranged = [
                _arrange_cotangent(cotangent, ctx.kinds[place], strides)
                for cotangent, place, strides in zip(chosen, pull.outputs, pull.strides, strict=True)
            ]
            for place, gradient in zip(pull.given, pull.run(*saved, *arranged), strict=True):
                before = gradients[place]
                gradients[place] = gradient if before is None else before + gradient
        return None, *gradients


def _arrange_cotangent(
    cotangent: Tensor | None, kind: tuple[torch.Size, torch.dtype, torch.device], strides: tuple[int, ...]
) -> Tensor:
    """Return a cotangent in the memory layout that a program expects; zeros for None."""
    if cotangent is not None and cotangent.stride() == strides:
        return cotangent
    shape, dtype, device = kind
    arranged = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    return arranged.zero_() if cotangent is None else arranged.copy_(cotangent)


def _pull_again(
    programs: Programs, inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> Iterator[tuple[int, Tensor | None]]:
    """Compute gradients that carry a graph, by autograd on the recomputed outputs."""
    outputs, sources = programs.recompute()
    pairs = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if c is not None and y.requires_grad]
    places = [place for place, x in enumerate(inputs) if x.requires_grad]
    if not pairs:
        return
    values, seeds = zip(*pairs, strict=True)
    wanted = [sources[place] for place in places]
    gradients = torch.autograd.grad(values, wanted, seeds, create_graph=True, allow_unused=True)
    yield from zip(places, gradients, strict=True)


def by_programs(programs: Programs, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return what `programs` compute, with its graph."""
    outputs: tuple[Tensor, ...] = _ByPrograms.apply(programs, *inputs)  # type: ignore[no-untyped-call]
    return outputs
