"""Check a Jacobian against plain VJPs of the function itself: before it is timed, and while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac import seeds
from autojac.autodiff import Pullback, gradient
from autojac.problem import Problem, Result, bind
from autojac.quiet import Quiet
from autojac.tolerance import disagreement, rounding_floor, tolerance

ROWS = 6
SAMPLES = 3
NOISE_MARGIN = 16.0
"""Tolerance in multiples of the rounding that func itself shows."""
MOST_NOISE = 0.1
"""The largest relative tolerance that rounding excuses."""


class Reference:
    """What the right answer must satisfy at one point: selected rows and random projections, by plain VJPs.

    func is evaluated once. Blocks of a coupled function are not the whole Jacobian, so there each projection lives on
    one sample and only that sample's rows are compared.

    Args:
        problem: the function and its structure.
        leaves, kwargs: the point.
        quiet: how to evaluate without a trace.
        rows: how many single rows of the Jacobian are compared besides the projections.
        seed: of the random projections.
        samples: those that projections of a coupled function live on; a few at random by default.
    """

    def __init__(
        self,
        problem: Problem,
        leaves: Sequence[Tensor],
        kwargs: Mapping[str, Any],
        quiet: Quiet,
        rows: int = ROWS,
        seed: int = 0,
        samples: Sequence[int] = (),
    ) -> None:
        self.problem = problem
        self.samples = samples
        self.slack = [1.0] * len(problem.outputs)
        self.calibrated = False
        self.generator = torch.Generator().manual_seed(seed)
        self.connected = tuple(leaf for leaf in leaves if leaf.requires_grad) if problem.differentiable else ()
        bound, inputs = bind(problem, leaves, kwargs)
        with quiet():
            self.pullback = Pullback(bound, inputs, problem.differentiable)
            self.values = self.pullback.outputs
            self.floors = [[rounding_floor(value, tensor) for tensor in self.pullback.inputs] for value in self.values]
            self.rows = [
                (output, row, self._single(output, row))
                for output in range(len(self.values))
                for row in self._chosen(self.values[output], rows)
            ]
            self.projections = [self._projection(output) for output in range(len(self.values))]

    def check(self, result: Result) -> str | None:
        """Why a result is wrong, as a sentence; None if it agrees with everything checked."""
        wrong = self._compare(result)
        if wrong is not None and not self.calibrated:
            # func may compute in a lower precision than its output's: only now is it worth finding out
            self.calibrated = True
            self._calibrate()
            wrong = self._compare(result)
        return wrong

    def _compare(self, result: Result) -> str | None:
        return self.check_shapes(result) or self._check_rows(result) or self._check_projections(result)

    def _calibrate(self) -> None:
        """Grant what func's own VJPs miss of being linear in the cotangent.

        Relative to the derivative, and as an absolute floor: a derivative that vanishes by cancellation, as behind the
        sum of a softmax, is nothing but rounding.
        """
        for output, value in enumerate(self.values):
            one, other = (_noise(value.shape, value, self.generator) for _ in range(2))
            pulled = (self.pullback(output, cotangent) for cotangent in (one, other, one + other))
            for position, (a, b, both) in enumerate(zip(*pulled, strict=True)):
                noise, size = (float(_largest(t)) for t in (a + b - both, both))
                self.floors[output][position] = max(self.floors[output][position], NOISE_MARGIN * noise)
                if size > 0:
                    relative = min(NOISE_MARGIN * noise / size, MOST_NOISE)
                    self.slack[output] = max(self.slack[output], relative / tolerance(both.dtype))

    def check_gradient(self, result: Result, captured: Sequence[Tensor]) -> str | None:
        """Why the graph behind a differentiable result is wrong; None if its gradient agrees with the rows'.

        Args:
            result: a result computed with grad mode on.
            captured: tensors besides the inputs that a loss on the Jacobian trains.
        """
        sources = [*self.connected, *captured]
        if not sources:
            return None
        actual, expected = [], []
        for output, row, pulled in self.rows:
            for position, (whole, one) in enumerate(zip(result.jacobians[output], pulled, strict=True)):
                own = self._rows_of(whole, output, position)[row]
                weight = _noise(own.shape, own, self.generator)
                actual.append((own * weight).sum())
                expected.append((self._own(one, output, row, position) * weight).sum())
        try:
            right = gradient(torch.stack(expected).sum(), sources)
        except RuntimeError:
            return None  # func has no second derivative by plain autograd either
        found = gradient(torch.stack(actual).sum(), sources)
        for one, other in zip(found, right, strict=True):
            error = disagreement(
                one.reshape(1, -1), other.reshape(1, -1), floor=_magnitude_floor(right), slack=max(self.slack)
            )
            if error is not None:
                return f"the gradient through J is off by {error:.1g} relative"
        return None

    def worst_samples(self, result: Result, count: int) -> list[int]:
        """The samples whose projections differ most: a coupled function's do, and a wrong block's."""
        errors = torch.zeros(self.problem.batch, dtype=torch.float64)
        for output, projections in enumerate(self.projections):
            for sample, cotangent, pulled in projections:
                for position, (whole, one) in enumerate(zip(result.jacobians[output], pulled, strict=True)):
                    found, scale = self._project(whole, output, position, sample, cotangent)
                    if len(found) == len(errors):
                        gap = (found - one.reshape(found.shape)).abs() / (scale + torch.finfo(scale.dtype).tiny)
                        errors += gap.nan_to_num(1, 1, 1).amax(1).cpu()
        return errors.topk(min(count, len(errors))).indices.tolist()

    def check_shapes(self, result: Result) -> str | None:
        """Why a result can't be right whatever its numbers: shapes, dtypes and the values."""
        for event, value, row, expected in zip(
            self.problem.outputs, result.values, result.jacobians, self.values, strict=True
        ):
            if value.shape != expected.shape:
                return f"the value has shape {tuple(value.shape)} instead of {tuple(expected.shape)}"
            for position, jacobian, tensor in zip(self.problem.inputs, row, self.pullback.inputs, strict=True):
                leaf = self.problem.leaves[position]
                across = leaf.shape if self.problem.layout == "full" else leaf.event_shape
                wanted = (self.problem.batch, *event, *across)
                if tuple(jacobian.shape) != wanted:
                    return f"J has shape {tuple(jacobian.shape)} instead of {wanted}"
                if jacobian.dtype != tensor.dtype:
                    return f"J is {jacobian.dtype} where reverse mode gives {tensor.dtype}"
        for value, expected, slack in zip(result.values, self.values, self.slack, strict=True):
            error = disagreement(value, expected, slack=slack)
            if error is not None:
                return f"the value is off by {error:.1g} relative"
        return None

    def _check_rows(self, result: Result) -> str | None:
        for output, row, pulled in self.rows:
            for position, (whole, one) in enumerate(zip(result.jacobians[output], pulled, strict=True)):
                own = self._rows_of(whole, output, position)[row]
                expected = self._own(one, output, row, position)
                error = disagreement(
                    own[None], expected[None], floor=self.floors[output][position], slack=self.slack[output]
                )
                if error is not None:
                    return f"row {row} of output {output} is off by {error:.1g} relative to plain reverse mode"
        return None

    def _check_projections(self, result: Result) -> str | None:
        for output, projections in enumerate(self.projections):
            for sample, cotangent, pulled in projections:
                for position, (whole, one) in enumerate(zip(result.jacobians[output], pulled, strict=True)):
                    found, scale = self._project(whole, output, position, sample, cotangent)
                    expected = one if sample is None or not self._blockwise(position) else one[sample][None]
                    floor = self.floors[output][position] * max(seeds.size(self.problem.outputs[output]), 1)
                    error = disagreement(found, expected.reshape(found.shape), scale, floor, self.slack[output])
                    if error is not None:
                        where = "of the whole batch" if sample is None else f"of sample {sample}"
                        return f"a random projection {where} is off by {error:.1g} relative to a plain VJP"
        return None

    def _blockwise(self, position: int) -> bool:
        """Whether the Jacobian of an input holds only each sample's own block."""
        return self.problem.layout == "blocks" and self.problem.leaves[self.problem.inputs[position]].batched

    def _per_row(self, position: int) -> bool:
        """Whether a pulled cotangent has one row for each sample."""
        return self.problem.leaves[self.problem.inputs[position]].batched

    def _projection(self, output: int) -> list[tuple[int | None, Tensor, list[Tensor]]]:
        """(sample or None for all, cotangent, its VJP for each input)."""
        value = self.values[output]
        everywhere = self.problem.layout == "full" or self.problem.structure.independent
        if everywhere and not (self.problem.shared_input and self.problem.layout == "blocks"):
            cotangent = _noise(value.shape, value, self.generator)
            return [(None, cotangent, self.pullback(output, cotangent))]
        found: list[tuple[int | None, Tensor, list[Tensor]]] = []
        drawn = torch.randperm(len(value), generator=self.generator)[:SAMPLES].tolist()
        for sample in self.samples or drawn:
            cotangent = torch.zeros_like(value, requires_grad=False)
            cotangent[sample] = _noise(value.shape[1:], value, self.generator)
            found.append((sample, cotangent, self.pullback(output, cotangent)))
        return found

    def _project(
        self, whole: Tensor, output: int, position: int, sample: int | None, cotangent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cotangent times Jacobian, one row a sample, and the size of the terms in it."""
        jacobian = whole.detach()
        event_dims = len(self.problem.outputs[output])
        if not self._blockwise(position):
            if sample is not None:
                jacobian, cotangent = jacobian[sample : sample + 1], cotangent[sample : sample + 1]
            lead = self.problem.batch if self._per_row(position) else 1
            pairs = ((cotangent, jacobian), (cotangent.abs(), jacobian.abs()))
            found, scale = (torch.tensordot(u, j, 1 + event_dims).reshape(lead, -1) for u, j in pairs)
            return found, scale
        if sample is not None:
            jacobian, cotangent = jacobian[sample : sample + 1], cotangent[sample : sample + 1]
        lead = jacobian.shape[0]
        rows = jacobian.reshape(lead, cotangent[0].numel(), -1)
        left = cotangent.reshape(lead, 1, -1)
        return torch.bmm(left, rows)[:, 0], torch.bmm(left.abs(), rows.abs())[:, 0]

    def _chosen(self, value: Tensor, rows: int) -> list[int]:
        """Row numbers to compare: the first, the last, and others at random."""
        count = value.numel()
        if not rows or not count:
            return []
        drawn = torch.randint(count, (max(rows - 2, 0),), generator=self.generator).tolist()
        return sorted({0, count - 1, *drawn})

    def _single(self, output: int, row: int) -> list[Tensor]:
        value = self.values[output]
        return self.pullback(output, seeds.identity(tuple(value.shape), row, row + 1, value)[0])

    def _rows_of(self, whole: Tensor, output: int, position: int) -> Tensor:
        """The Jacobian with one row for each element of the output."""
        count = self.values[output].numel()
        return whole.reshape(count, *whole.shape[1 + len(self.problem.outputs[output]) :])

    def _own(self, pulled: Tensor, output: int, row: int, position: int) -> Tensor:
        """The part of a pulled row that the layout keeps."""
        if not self._blockwise(position):
            return pulled
        return pulled[row // max(self.values[output].numel() // self.problem.batch, 1)]


def _noise(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(like)


def _largest(tensor: Tensor) -> Tensor:
    return tensor.detach().nan_to_num(0, 0, 0).abs().amax() if tensor.numel() else tensor.new_zeros(())


def _magnitude_floor(gradients: Sequence[Tensor]) -> float:
    """Rounding that the largest of several gradients lends to the others: they sum over the same terms."""
    largest = max(float(g.detach().nan_to_num(0, 0, 0).abs().amax()) if g.numel() else 0.0 for g in gradients)
    return largest * torch.finfo(gradients[0].dtype).eps * 64
