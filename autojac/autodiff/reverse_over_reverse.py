"""Derivatives by single columns of an input, of any order, by reverse mode on reverse mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.autodiff.derivative_terms import Columns, Term
from autojac.autodiff.primitives import functional_vjp, vmap


class NestedPulls:
    """Derivatives of one recorded output, each order by plain VJPs of the one below; what terms share is pulled once.

    Args:
        output: (B, *out), with its graph.
        source: (B, *in), which it was computed from.
        samples: those whose derivatives are wanted, where they are coupled: one VJP for each of them and each element
            of the output. None where all samples are independent, and can be pulled together.
        differentiable: whether the highest order carries a graph as well.
        order: the highest order that will be asked for.
    """

    def __init__(
        self, output: Tensor, source: Tensor, samples: Sequence[int] | None, differentiable: bool, order: int
    ) -> None:
        self.source = source
        self.samples = samples
        self.differentiable = differentiable
        self.order = order
        self.known: dict[Columns, Tensor] = {(): output if samples is None else output[list(samples)]}
        self.gradients: dict[Columns, Tensor] = {}

    def term(self, term: Term) -> Tensor:
        """Return a sum of derivatives, of the shape of the output, or of its samples that are wanted."""
        total = self._derivative(term[0])
        for columns in term[1:]:
            total = total + self._derivative(columns)
        return total

    def _derivative(self, columns: Columns) -> Tensor:
        if columns not in self.known:
            *below, last = columns
            self.known[columns] = self._gradient(tuple(below))[..., last]
        return self.known[columns]

    def _gradient(self, columns: Columns) -> Tensor:
        """Return the gradient of each element of a derivative in its own sample, (B, *out, n)."""
        if columns not in self.gradients:
            value = self._derivative(columns)
            last = len(columns) + 1 == self.order and not self.differentiable
            elements = value.reshape(len(value), -1)
            rows = [self._row(elements[:, place], not last) for place in range(elements.shape[1])]
            gradient = rows[0] if len(rows) == 1 else torch.stack(rows, 1)
            self.gradients[columns] = gradient.reshape(*value.shape, gradient.shape[-1])
        return self.gradients[columns]

    def _row(self, element: Tensor, keep: bool) -> Tensor:
        """Return the gradient (B, n) of one element in each sample."""
        if self.samples is None:
            return self._pull(element, torch.ones_like(element), keep).reshape(len(element), -1)
        rows = [
            self._pull(element, torch.eye(len(element), dtype=element.dtype, device=element.device)[row], keep)[sample]
            for row, sample in enumerate(self.samples)
        ]
        return torch.stack(rows).reshape(len(rows), -1)

    def _pull(self, value: Tensor, cotangent: Tensor, keep: bool) -> Tensor:
        if not value.requires_grad:
            return torch.zeros_like(self.source)
        (gradient,) = torch.autograd.grad(
            value, self.source, cotangent, retain_graph=True, create_graph=keep, allow_unused=True
        )
        return torch.zeros_like(self.source) if gradient is None else gradient


def functional_term(fn: Callable[[Tensor], Tensor], source: Tensor, term: Term, independent: bool) -> Tensor:
    """Return a sum of derivatives of `fn` (B, *in) -> (B, *out) by `torch.func` alone, which nests in its transforms.

    Args:
        fn: the function.
        source: where.
        term: the sum.
        independent: whether no sample reaches another, so that one seed serves all.
    """
    total: Tensor | None = None
    for columns in term:
        derivative = fn
        for column in columns:
            derivative = _along(derivative, column, independent)
        value = derivative(source)
        total = value if total is None else total + value
    assert total is not None
    return total


def _along(fn: Callable[[Tensor], Tensor], column: int, independent: bool) -> Callable[[Tensor], Tensor]:
    """Return the derivative of a function by one column of its input, as a function."""

    def derivative(source: Tensor) -> Tensor:
        (value,), pull = functional_vjp(lambda x: (fn(x),), (source,))
        batch, event = len(value), tuple(value.shape[1:])
        if independent:
            rows = vmap(lambda seed: pull((seed,))[0])(seeds.shared_seeds(event, batch, value))
            diagonal = rows.reshape(len(rows), batch, -1)[..., column].movedim(0, 1)
        else:
            count = value.numel()
            rows = vmap(lambda seed: pull((seed,))[0])(seeds.identity((batch, *event), 0, count, value))
            sample = torch.arange(count, device=value.device) // max(seeds.size(event), 1)
            diagonal = rows.reshape(count, batch, -1)[torch.arange(count, device=value.device), sample, column]
        result: Tensor = diagonal.reshape(value.shape)
        return result

    return derivative
