"""The gradient through a Jacobian, compared with that through rows which plain VJPs give."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.autodiff.pullback import gradient
from autojac.autodiff.tolerance import disagreement, largest, own_rounding
from autojac.core.structure import UPDATES_BUFFERS
from autojac.problem.compared_parts import ComparedParts
from autojac.problem.finite_evidence import zero_uncounted
from autojac.problem.problem import Result


class GradientReference:
    """What the gradient through a right Jacobian must satisfy: that of a random sum of the rows compared.

    Args:
        parts: what of the Jacobian is compared.
        sources: what is differentiated in, in groups: a tensor and the original that it stands for are one.
        slack: the factor on the tolerance of what was pulled from an output.

    Attributes:
        trains_nothing: func was found to have no second derivative by plain autograd.
    """

    def __init__(
        self, parts: ComparedParts, sources: Sequence[Sequence[Tensor]], slack: Callable[[int, Tensor], float]
    ) -> None:
        self.parts = parts
        self.sources = sources
        self.slack = slack
        self.trains_nothing = False
        self._known: TrainedRows | None = None

    def prepare(self) -> TrainedRows | None:
        """Differentiate the rows, unless that is done; None where there is nothing that can be asked for."""
        self._known = self._known or self._differentiate()
        return self._known

    def check(self, result: Result) -> str | None:
        """Return why the graph behind a differentiable result is wrong; None if its gradient agrees with the rows'."""
        known = self.prepare()
        if known is None:
            return None
        rows = [
            self.parts.places.row(result.jacobians[output][position], output, row, position)
            for output, row, position in known.where
        ]
        gradients = known.pull(rows, known.weights)
        wrong = self._compare(gradients, known.right, [1.0] * len(gradients))
        if wrong is not None:
            # as for J itself; a derivative of it may be less precise than it is
            wrong = self._compare(gradients, known.right, known.slacks or self._slacks(known))
        return wrong

    def _differentiate(self) -> TrainedRows | None:
        """Return the gradient through the rows compared; None where there is none that can be asked for."""
        where, rows, weights = [], [], []
        for output, row, pulled in self.parts.rows:
            for position, one in enumerate(pulled):
                part = self.parts.places.keep(one, output, row, position)
                if bool(torch.isfinite(part).all()):
                    where.append((output, row, position))
                    rows.append(part.reshape(1, -1))
                    scale = self.parts.weights[output].flatten()[row].to(part)
                    weights.append(seeds.noise(part.reshape(1, -1), self.parts.generator) * scale)
        if not self.sources or not rows or self.trains_nothing:
            return None
        known = TrainedRows(self.sources, where, rows, weights)
        try:
            known.right = known.pull(rows, weights)
        except RuntimeError:
            self.trains_nothing = True
            return None
        if UPDATES_BUFFERS in self.parts.problem.structure.effects:
            known.slacks = self._slacks(known)
        return known

    def _slacks(self, known: TrainedRows) -> list[float]:
        return [relative for _, relative in own_rounding(known.pull, known.rows, self.parts.generator)]

    def _compare(self, gradients: Sequence[Tensor], right: Sequence[Tensor], slacks: Sequence[float]) -> str | None:
        for mine, theirs, relative in zip(gradients, right, slacks, strict=True):
            counted = torch.isfinite(theirs)
            if not self.parts.evidence.whole:
                # zero times what is NaN elsewhere
                counted &= torch.isfinite(mine)
            one, other = zero_uncounted(None if bool(counted.all()) else counted, mine, theirs)
            slack = max(relative, *(self.slack(output, other) for output in range(len(self.parts.values))))
            error = disagreement(one.reshape(1, -1), other.reshape(1, -1), floor=_magnitude_floor(right), slack=slack)
            if error is not None:
                return f"the gradient through J is off by {error:.1g} relative"
        return None


@dataclass
class TrainedRows:
    """A gradient through rows of the Jacobian, as plain VJPs give it.

    Attributes:
        sources: what is differentiated in, in groups.
        where: output, row and position of each of the rows.
        rows: with their graphs.
        weights: (1, n) cotangents of the rows.
        right: the gradient in each group.
        slacks: factors on the tolerance of each; empty as long as nothing asked for them.
    """

    sources: Sequence[Sequence[Tensor]]
    where: Sequence[tuple[int, int, int]]
    rows: Sequence[Tensor]
    weights: Sequence[Tensor]
    right: Sequence[Tensor] = ()
    slacks: Sequence[float] = ()

    def pull(self, rows: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient through some rows in the places of these, added up within each group of sources."""
        pairs = zip(rows, weights, strict=True)
        total = torch.stack([(row.reshape(1, -1) * weight).sum() for row, weight in pairs]).sum()
        parts = iter(gradient(total, list(itertools.chain(*self.sources))))
        return [torch.stack([next(parts) for _ in group]).sum(0) for group in self.sources]


def _magnitude_floor(gradients: Sequence[Tensor]) -> float:
    """Return the rounding that the largest of several gradients lends to the others: they sum over the same terms."""
    top = max(map(largest, gradients))
    return top * torch.finfo(gradients[0].dtype).eps * 64
