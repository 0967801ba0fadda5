"""Where rows, projections and blocks of a Jacobian are found in each layout, to check them against plain VJPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.problem.problem import Problem


@dataclass(frozen=True)
class Projection:
    """A random cotangent and its VJP for each input.

    Attributes:
        samples: those that it lives on; None for all.
        coordinates: those that it lives on, where only the diagonal is asked for; None for all.
        cotangent: shape of the output.
        pulled: its VJP, for each input.
    """

    samples: Sequence[int] | None
    coordinates: Sequence[int] | None
    cotangent: Tensor
    pulled: list[Tensor]


@dataclass(frozen=True)
class Places:
    """Finds in the results of a problem what a plain VJP gives."""

    problem: Problem

    def blockwise(self, position: int) -> bool:
        """Check whether the Jacobian of an input holds only each sample's own block."""
        return (
            self.problem.layout not in ("full", "sparse") and self.problem.leaves[self.problem.inputs[position]].batched
        )

    def per_row(self, position: int) -> bool:
        """Check whether a pulled cotangent has one row for each sample."""
        return self.problem.leaves[self.problem.inputs[position]].batched

    def row(self, whole: Tensor, output: int, row: int, position: int) -> Tensor:
        """Return the Jacobian's row of one element of the output."""
        if self.problem.layout == "sparse":
            return self.problem.entries(output, self.problem.inputs[position]).row(whole, row)
        event_dims = 1 if self.problem.layout == "diagonal" else len(self.problem.outputs[output])
        count = self.problem.batch * seeds.size(self.problem.outputs[output])
        return whole.reshape(count, *whole.shape[1 + event_dims :])[row]

    def keep(self, pulled: Tensor, output: int, row: int, position: int) -> Tensor:
        """Return the part of a pulled row that the layout keeps."""
        size = seeds.size(self.problem.outputs[output])
        if self.problem.layout == "sparse":
            return pulled.reshape(-1)
        part = pulled[row // size] if self.blockwise(position) else pulled
        return part.reshape(-1)[row % size] if self.problem.layout == "diagonal" else part

    def pick(self, pulled: Tensor, position: int, projection: Projection) -> Tensor:
        """Return what a projection's VJP gave where the projection lives, one row per sample."""
        alone = projection.samples is not None and self.blockwise(position)
        own = pulled[list(projection.samples or ())] if alone else pulled
        return own.reshape(len(own) if self.per_row(position) else 1, -1)

    def project(self, whole: Tensor, output: int, position: int, projection: Projection) -> tuple[Tensor, Tensor]:
        """Return cotangent times Jacobian, one row per sample, and the size of the terms in it."""
        # an output may have another dtype than the input
        dtype = torch.promote_types(whole.dtype, projection.cotangent.dtype)
        jacobian, cotangent = whole.detach().to(dtype), projection.cotangent.to(dtype)
        if self.problem.layout == "sparse":
            entries = self.problem.entries(output, self.problem.inputs[position])
            lead = self.problem.batch if self.per_row(position) else 1
            pairs = ((cotangent, jacobian), (cotangent.abs(), jacobian.abs()))
            found, scale = (entries.pull(j, u.reshape(-1)).reshape(lead, -1) for u, j in pairs)
            return found, scale
        event_dims = len(self.problem.outputs[output])
        if projection.samples is not None:
            only = list(projection.samples)
            jacobian, cotangent = jacobian[only], cotangent[only]
        lead = jacobian.shape[0]
        left = cotangent.reshape(lead, 1, -1)
        if projection.coordinates is not None:
            chosen = list(projection.coordinates)
            own = left[:, 0, chosen] * jacobian[:, chosen]
            return own, own.abs()
        if not self.blockwise(position):
            lead = self.problem.batch if self.per_row(position) else 1
            pairs = ((cotangent, jacobian), (cotangent.abs(), jacobian.abs()))
            found, scale = (torch.tensordot(u, j, 1 + event_dims) for u, j in pairs)
            found, scale = (t.reshape(lead, t.numel() // max(lead, 1)) for t in (found, scale))
            return found, scale
        rows = jacobian.reshape(lead, cotangent[0].numel(), seeds.size(jacobian.shape[1 + event_dims :]))
        return torch.bmm(left, rows)[:, 0], torch.bmm(left.abs(), rows.abs())[:, 0]
