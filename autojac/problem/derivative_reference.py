"""Check derivatives by columns against plain reverse mode on reverse mode, on a few samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.autodiff.pullback import Pullback, gradient
from autojac.autodiff.reverse_over_reverse import NestedPulls
from autojac.autodiff.tolerance import disagreement, largest
from autojac.core.autocast import outside_autocast
from autojac.core.sandbox import Sandbox
from autojac.graph.special_kernels import plain_formulas
from autojac.problem.compared_parts import Extent
from autojac.problem.finite_evidence import zero_uncounted
from autojac.problem.problem import Problem, Result, bind, record_pullback
from autojac.problem.reference import EXTENT, Reference
from autojac.problem.value_rounding import ValueRounding

SAMPLES = 4
"""How many samples one check looks at."""
ROUNDING = 64
"""Roundings of the largest derivative of a lower order that one of a higher order is granted: it is made of those."""


class DerivativeReference:
    """What the right derivatives are at a few samples, by one plain VJP for each gradient of each order.

    func is evaluated once for its values, and once more on the samples where these can be sliced from the batch.

    Args:
        problem, leaves, kwargs, sandbox, extent, trained: as of `Reference`.

    Attributes:
        decides: always; no zeros are assumed.
        trains_nothing: func was found to have no derivative through the derivatives asked for.
    """

    decides: bool = True

    def __init__(
        self,
        problem: Problem,
        leaves: Sequence[Tensor],
        kwargs: Mapping[str, Any],
        sandbox: Sandbox,
        *,
        extent: Extent = EXTENT,
        trained: Sequence[Tensor] = (),
    ) -> None:
        self.problem, self.trained, self.trains_nothing = problem, trained, False
        self.generator = torch.Generator().manual_seed(extent.seed)
        self.connected = tuple(leaf for leaf in leaves if leaf.requires_grad) if problem.differentiable else ()
        count = problem.batch if extent.every else min(problem.batch, SAMPLES)
        self.samples = sorted(torch.randperm(problem.batch, generator=self.generator)[:count].tolist())
        kernels = problem.structure.kernels
        with outside_autocast(), sandbox(), plain_formulas(kernels), torch.enable_grad():
            self.pullback = record_pullback(problem, leaves, kwargs, problem.differentiable)
            self.values = self.pullback.outputs
            self.rounding = ValueRounding(problem, leaves, kwargs, sandbox, self.values)
            given = (*(leaves[position] for position in problem.inputs), *self.values)
            self.is_whole = all(bool(torch.isfinite(x).all()) for x in given)
            self.expected = self._derivatives(leaves, kwargs)
            self.gradients = self._gradients() if problem.differentiable else None
        self.says = any(bool(torch.isfinite(one).any()) for output in self.expected for one in output)

    def check(self, result: Result) -> str | None:
        """Return why a result is wrong, as a sentence; None if it agrees with everything checked."""
        for output, (value, (made,), right) in enumerate(
            zip(result.values, result.jacobians, self.values, strict=True)
        ):
            if value.shape != right.shape:
                return f"func returns shape {tuple(right.shape)} where it was planned for {tuple(value.shape)}"
            wanted = self.problem.jacobian_shape(output, self.problem.inputs[0])
            if tuple(made.shape) != wanted:
                return f"the derivatives have shape {tuple(made.shape)} instead of {wanted}"
            error = disagreement(value, right)
            if error is not None:
                error = disagreement(value, right, floor=self.rounding.floors[output])
            if error is not None:
                return f"the value is off by {error:.1g} relative"
            error = self._error(made.detach()[self.samples].unbind(-1), self.expected[output])
            if error is not None:
                return f"derivatives of output {output} are off by {error:.1g} relative to plain reverse mode"
        return None

    def check_gradient(self, result: Result) -> str | None:
        """Return why the graph behind a differentiable result is wrong; None if its gradient agrees."""
        if self.gradients is None:
            return None
        made = [one for (stack,) in result.jacobians for one in stack[self.samples].unbind(-1)]
        found = self._pull(made)
        top = max(map(largest, self.gradients))
        for mine, theirs in zip(found, self.gradients, strict=True):
            floor = top * torch.finfo(theirs.dtype).eps * ROUNDING
            # elsewhere it is zero times what is NaN in other samples
            counted = None if self.is_whole else torch.isfinite(mine)
            one, other = zero_uncounted(counted, mine, theirs)
            error = disagreement(one.reshape(1, -1), other.reshape(1, -1), floor=floor)
            if error is not None:
                return f"the gradient through the derivatives is off by {error:.1g} relative"
        return None

    def _error(self, made: Sequence[Tensor], right: Sequence[Tensor]) -> float | None:
        lower = max(map(largest, right))
        for one, other in zip(made, right, strict=True):
            floor = ROUNDING * torch.finfo(other.dtype).eps * lower
            # all samples share a scale, each coordinate its own: a derivative may vanish at one by cancellation
            error = disagreement(one.reshape(len(one), -1).T, other.reshape(len(other), -1).T, floor=floor)
            if error is not None:
                return error
        return None

    def _derivatives(self, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> list[list[Tensor]]:
        """Return for each output its derivatives at the samples, (s, *out) each."""
        problem, structure = self.problem, self.problem.structure
        pullback, samples, rows = self.pullback, None, self.samples
        if structure.independent and structure.sliceable and not structure.effects:
            few = [x[rows] if leaf.batched else x for x, leaf in zip(leaves, problem.leaves, strict=True)]
            pullback = Pullback(*bind(problem, few, kwargs), problem.differentiable)
            rows = list(range(len(rows)))
        elif not structure.independent:
            samples, rows = rows, list(range(len(rows)))
        order = max(len(columns) for term in problem.terms for columns in term)
        found = []
        for output in pullback.recorded:
            pulls = NestedPulls(output, pullback.inputs[0], samples, problem.differentiable, order)
            found.append([pulls.term(term)[rows].to(pullback.inputs[0].dtype) for term in problem.terms])
        return found

    def _gradients(self) -> list[Tensor] | None:
        """Return the gradient of a random sum of the derivatives; None where there is none that can be asked for."""
        flat = [one for output in self.expected for one in output]
        self.sources = [*self.connected, *(t for t in self.trained if all(t is not leaf for leaf in self.connected))]
        if not self.sources or not all(bool(torch.isfinite(one).all()) for one in flat):
            return None
        self.weights = [seeds.noise(one.detach(), self.generator) for one in flat]
        try:
            return self._pull(flat)
        except RuntimeError:
            self.trains_nothing = True
            return None

    def _pull(self, derivatives: Sequence[Tensor]) -> list[Tensor]:
        with outside_autocast(), torch.enable_grad():
            pairs = zip(derivatives, self.weights, strict=True)
            return gradient(torch.stack([(one * weight).sum() for one, weight in pairs]).sum(), self.sources)


class AnyReference(Protocol):
    """What the right answer to a problem must satisfy at one point.

    Attributes:
        says: something at this point is finite, so that what passes was compared with something.
        pullback: of the evaluation by which the right answer is known.
        connected, trained: the leaves and other tensors that a loss on the result trains.
    """

    says: bool
    pullback: Pullback
    connected: tuple[Tensor, ...]
    trained: Sequence[Tensor]

    @property
    def decides(self) -> bool:
        """Whether a missing entry as large as the derivatives compared would be seen."""

    @property
    def trains_nothing(self) -> bool:
        """Whether func was found to have no derivative through the result."""

    def check(self, result: Result) -> str | None:
        """Return why a result is wrong, as a sentence; None if it agrees with everything checked."""

    def check_gradient(self, result: Result) -> str | None:
        """Return why the graph behind a differentiable result is wrong; None if its gradient agrees."""


def reference_for(
    problem: Problem,
    leaves: Sequence[Tensor],
    kwargs: Mapping[str, Any],
    sandbox: Sandbox,
    *,
    extent: Extent = EXTENT,
    trained: Sequence[Tensor] = (),
) -> AnyReference:
    """Return what the right answer to a problem must satisfy at one point; arguments as of `Reference`."""
    kind = DerivativeReference if problem.of else Reference
    return kind(problem, leaves, kwargs, sandbox, extent=extent, trained=trained)
