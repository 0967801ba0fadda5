"""What of one point says anything about a plan: NaN and infinity agree with every Jacobian, and with none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from autojac.problem.locations import Places, Projection
from autojac.problem.problem import Problem


@dataclass(frozen=True)
class Evidence:
    """The samples and the output elements that count at one point; None for all of them.

    Attributes:
        places: finds the parts of a Jacobian.
        samples: (B,) bool, those whose inputs are finite, and of whose values some.
        elements: for each output (B, *out) bool, the finite elements of samples whose inputs are finite.
    """

    places: Places
    samples: Tensor | None
    elements: tuple[Tensor | None, ...]

    @classmethod
    def at(cls, problem: Problem, inputs: Sequence[Tensor], values: Sequence[Tensor]) -> Self:
        """Find what counts at a point, from the differentiated inputs and the outputs there."""
        places = Places(problem)
        given = [torch.isfinite(x.detach()) for x in inputs]
        found = [torch.isfinite(value.detach()) for value in values]
        if all(bool(finite.all()) for finite in (*given, *found)):
            return cls(places, None, (None,) * len(values))
        sound = torch.ones(problem.batch, dtype=torch.bool, device=found[0].device)
        for position, finite in zip(problem.inputs, given, strict=True):
            batched = problem.leaves[position].batched
            sound &= (finite.reshape(problem.batch, -1).all(1) if batched else finite.all()).to(sound.device)
        elements = tuple(finite & sound.view(-1, *[1] * (finite.dim() - 1)) for finite in found)
        some = torch.stack([finite.reshape(problem.batch, -1).any(1) for finite in elements]).any(0)
        return cls(places, some, elements)

    @property
    def whole(self) -> bool:
        """Whether everything at this point is finite, but perhaps derivatives."""
        return self.samples is None

    def numbers(self, output: int) -> Tensor | None:
        """Return the numbers of the rows of one output's Jacobian that count."""
        elements = self.elements[output]
        return None if elements is None else elements.flatten().nonzero()[:, 0].cpu()

    def mask_cotangent(self, output: int, cotangent: Tensor) -> Tensor:
        """Return a cotangent without the elements that don't count."""
        elements = self.elements[output]
        return cotangent if elements is None else torch.where(elements, cotangent, 0)

    def clear_rows(self, jacobian: Tensor, output: int, position: int) -> Tensor:
        """Return a Jacobian with zeros in the rows that don't count."""
        elements = self.elements[output]
        if elements is None:
            return jacobian
        problem = self.places.problem
        if problem.layout == "sparse":
            _, rows, _ = problem.entries(output, problem.inputs[position]).indices(jacobian.device)
            return torch.where(elements.flatten()[rows], jacobian, 0)
        own = elements.flatten(1) if problem.layout == "diagonal" else elements
        return torch.where(own.view(*own.shape, *[1] * (jacobian.dim() - own.dim())), jacobian, 0)

    def row(self, found: Tensor, expected: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Return a row of a Jacobian and what a plain VJP gave, with zeros in both where that says nothing."""
        lead = self._samples_of(position)
        pair = self._agree(found.reshape(lead, -1), expected.reshape(lead, -1), self._of_samples(position, None))
        return pair[0].view_as(expected), pair[1].view_as(expected)

    def projection(
        self, found: Tensor, expected: Tensor, position: int, projection: Projection
    ) -> tuple[Tensor, Tensor]:
        """Return a projection, (rows, k), and what a plain VJP gave, with zeros in both where that says nothing."""
        return self._agree(found, expected, self._of_samples(position, projection))

    def says(self, expected: Tensor, position: int, projection: Projection | None = None) -> bool:
        """Tell whether anything that a plain VJP gave is finite and counts."""
        rows = expected.reshape(self._samples_of(position), -1) if projection is None else expected
        finite, samples = torch.isfinite(rows.detach()), self._of_samples(position, projection)
        return bool((finite if samples is None else finite & samples[:, None]).any())

    def _samples_of(self, position: int) -> int:
        """Return how many samples a row of a Jacobian runs through."""
        through = self.places.per_row(position) and not self.places.blockwise(position)
        return self.places.problem.batch if through else 1

    def _of_samples(self, position: int, projection: Projection | None) -> Tensor | None:
        """Tell which of the rows of some derivative belong to samples that count."""
        blockwise = self.places.blockwise(position)
        if self.samples is None or not self.places.per_row(position) or (projection is None and blockwise):
            return None
        alone = blockwise and projection is not None and projection.samples is not None
        return self.samples[list(projection.samples or ())] if alone and projection else self.samples

    @staticmethod
    def _agree(found: Tensor, expected: Tensor, samples: Tensor | None) -> tuple[Tensor, Tensor]:
        """Zero what is no evidence in (rows, k).

        A row that is finite in part may be less so by another way, in which zeros meet other infinities.
        """
        finite = torch.isfinite(expected.detach())
        whole = finite.all(1, keepdim=True)
        if samples is None and bool(whole.all()):
            return found, expected
        counted = finite & (whole | torch.isfinite(found.detach()))
        return zero_uncounted(counted if samples is None else counted & samples[:, None], found, expected)


def zero_uncounted(counted: Tensor | None, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Put zeros where two tensors don't count, so that they agree there."""
    return (one, other) if counted is None else (torch.where(counted, one, 0), torch.where(counted, other, 0))
