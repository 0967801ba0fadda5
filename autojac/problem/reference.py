"""Check a Jacobian against plain VJPs of the function itself: before it is timed, and while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.autodiff.pullback import Pullback
from autojac.autodiff.tolerance import disagreement, largest, own_rounding, rounding_floor, tolerance
from autojac.core.autocast import outside_autocast
from autojac.core.sandbox import Sandbox
from autojac.core.structure import UPDATES_BUFFERS
from autojac.errors import UnsupportedError
from autojac.graph.special_kernels import plain_formulas
from autojac.problem.compared_parts import ComparedParts, Extent
from autojac.problem.finite_evidence import zero_uncounted
from autojac.problem.problem import Problem, Result, record_pullback
from autojac.problem.trained_gradient import GradientReference
from autojac.problem.value_rounding import ValueRounding

EXTENT = Extent()
LARGE_BATCH = 4096
"""Samples from which on rows of a proved function are pulled through their own samples alone."""


class Reference:
    """What the right answer must satisfy at one point: selected rows and random projections, by plain VJPs.

    func is evaluated once.

    Args:
        problem: the function and its structure.
        leaves, kwargs: the point.
        sandbox: how to evaluate without a trace.
        extent: how much is compared.
        pullback: of a graph that exists already, in the place of an evaluation.
        trained: tensors besides the inputs that a loss on the Jacobian trains.

    Attributes:
        says: something at this point is finite, so that a Jacobian that passes was compared with something.
    """

    def __init__(
        self,
        problem: Problem,
        leaves: Sequence[Tensor],
        kwargs: Mapping[str, Any],
        sandbox: Sandbox,
        *,
        extent: Extent = EXTENT,
        pullback: Pullback | None = None,
        trained: Sequence[Tensor] = (),
    ) -> None:
        self.problem = problem
        self.trained = trained
        self.slack = [1.0] * len(problem.outputs)
        # the graph of a func that writes into buffers can be pulled until they are put back
        self.calibrated = UPDATES_BUFFERS in problem.structure.effects
        self.generator = torch.Generator().manual_seed(extent.seed)
        self.connected = tuple(leaf for leaf in leaves if leaf.requires_grad) if problem.differentiable else ()
        # a fused kernel may lack the second derivative by which a differentiable result is checked
        kernels = problem.structure.kernels if problem.differentiable else ()
        with outside_autocast(), sandbox(), plain_formulas(kernels):
            self.pullback = pullback or record_pullback(problem, leaves, kwargs, problem.differentiable)
            self.values = self.pullback.outputs
            self.rounding = ValueRounding(problem, leaves, kwargs, sandbox, self.values)
            if problem.originals is not None:
                _require_visible(self.pullback)
            self.parts = parts = ComparedParts(
                problem,
                self.pullback,
                self.generator,
                extent,
                keep=self.calibrated or not extent.every,
                alone=partial(self._alone, leaves, kwargs) if self._shows_rows_alone() else None,
            )
            self.places, self.evidence = parts.places, parts.evidence
            self.floors = [
                [rounding_floor(value * weight, tensor) for tensor in self.pullback.inputs]
                for value, weight in zip(self.values, parts.weights, strict=True)
            ]
            self.gradient = GradientReference(parts, self._sources(leaves), self._slack)
            if self.calibrated:
                self._calibrate()
                if problem.differentiable:
                    self.gradient.prepare()
            self.says = extent.every or parts.says()

    def _shows_rows_alone(self) -> bool:
        """Check whether rows of single samples are those of these samples evaluated alone, and this is far cheaper.

        A projection of the whole batch is pulled all the same.
        """
        problem, structure = self.problem, self.problem.structure
        blockwise = problem.layout in ("blocks", "diagonal") and not problem.shared_input and problem.originals is None
        proved = structure.assurance == "proved" and structure.independent and structure.sliceable
        return blockwise and proved and not structure.effects and problem.batch >= LARGE_BATCH

    def _alone(self, leaves: Sequence[Tensor], kwargs: Mapping[str, Any], samples: Sequence[int]) -> Pullback | None:
        """Evaluate func on some of the samples; None where so few give other values, or none."""
        with torch.enable_grad():
            few = [
                leaf[torch.tensor(samples, device=leaf.device)] if kind.batched else leaf
                for leaf, kind in zip(leaves, self.problem.leaves, strict=True)
            ]
        try:
            found = record_pullback(self.problem.resize(len(samples)), few, kwargs, self.problem.differentiable)
        except Exception:  # whatever func raises on so few says that it takes another way there
            return None
        rows = [whole[list(samples)] for whole in self.values]
        same = all(
            one.shape == row.shape and disagreement(one, row) is None
            for one, row in zip(found.outputs, rows, strict=True)
        )
        return found if same else None

    def check(self, result: Result) -> str | None:
        """Return why a result is wrong, as a sentence; None if it agrees with everything checked."""
        with outside_autocast():
            wrong = self._compare(result)
            if wrong is not None and not self.calibrated:
                # func may compute in a lower precision than its output's: only now is it worth finding out
                self._calibrate()
                wrong = self._compare(result)
        return wrong

    def _compare(self, result: Result) -> str | None:
        return self.check_shapes(result) or self._check_rows(result) or self._check_projections(result) or self._leak()

    def _calibrate(self) -> None:
        """Grant what func's own VJPs miss of being linear in the cotangent.

        Relative to the derivative, and as an absolute floor: a derivative that vanishes by cancellation, as behind the
        sum of a softmax, is nothing but rounding.
        """
        self.calibrated = True
        self._grant_rounding()
        if self.problem.differentiable:
            # projections are pulled without a graph, by kernels that may round where those of a graph are exact
            with self.pullback.without_graph():
                self._grant_rounding()

    def _grant_rounding(self) -> None:
        for output, value in enumerate(self.pullback.recorded):
            rounding = own_rounding(self.pullback.pull, [value], self.generator)
            for position, (noise, relative) in enumerate(rounding):
                self.floors[output][position] = max(self.floors[output][position], noise)
                self.slack[output] = max(self.slack[output], relative)

    def check_gradient(self, result: Result) -> str | None:
        """Return why the graph behind a differentiable result is wrong; None if its gradient agrees with the rows'.

        Args:
            result: a result computed with grad mode on.
        """
        with outside_autocast():
            return self.gradient.check(result)

    @property
    def trains_nothing(self) -> bool:
        """Whether func was found to have no second derivative, so that nothing trains through its Jacobian."""
        return self.gradient.trains_nothing

    def _sources(self, leaves: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return what a loss on J trains; a leaf and the original that it stands for are trained together."""
        pairs = (
            zip(self.problem.inputs, self.pullback.inputs, strict=True) if self.problem.originals is not None else ()
        )
        originals = {id(leaves[position]): tensor for position, tensor in pairs}
        groups = [[leaf, originals.get(id(leaf), leaf)] for leaf in self.connected]
        known = {id(tensor) for group in groups for tensor in group}
        together = [list({id(tensor): tensor for tensor in group}.values()) for group in groups]
        return [*together, *([tensor] for tensor in self.trained if id(tensor) not in known)]

    def check_shapes(self, result: Result) -> str | None:
        """Return why a result can't be right whatever its numbers: shapes, dtypes and the values."""
        planned = [(self.problem.batch, *event) for event in self.problem.outputs]
        for expected, shape in zip(self.values, planned, strict=False):
            if tuple(expected.shape) != shape:
                return f"func returns shape {tuple(expected.shape)} where it was planned for {shape}"
        pairs = zip(result.values, result.jacobians, self.values, strict=True)
        for output, (value, row, expected) in enumerate(pairs):
            if value.shape != expected.shape:
                return f"the value has shape {tuple(value.shape)} instead of {tuple(expected.shape)}"
            for position, jacobian, tensor in zip(self.problem.inputs, row, self.pullback.inputs, strict=True):
                wanted = self.problem.jacobian_shape(output, position)
                if tuple(jacobian.shape) != wanted:
                    return f"J has shape {tuple(jacobian.shape)} instead of {wanted}"
                if jacobian.dtype != tensor.dtype:
                    return f"J is {jacobian.dtype} where reverse mode gives {tensor.dtype}"
        for output, (value, expected) in enumerate(zip(result.values, self.values, strict=True)):
            mine, theirs = zero_uncounted(self.evidence.elements[output], value, expected)
            floor = self.rounding.floors[output] if self.calibrated else 0.0
            error = disagreement(mine, theirs, floor=floor, slack=self.slack[output])
            if error is not None:
                return f"the value is off by {error:.1g} relative"
        return None

    def _check_rows(self, result: Result) -> str | None:
        for output, row, pulled in self.parts.rows:
            for position, (whole, one) in enumerate(zip(result.jacobians[output], pulled, strict=True)):
                computed = self.places.row(whole, output, row, position)
                expected = self.places.keep(one, output, row, position)
                computed, expected = self.evidence.row(computed, expected, position)
                # an entry of the diagonal is as exact as the row that it is part of
                scale = one.new_tensor([largest(one)]) if self.problem.layout == "diagonal" else None
                floor = self.floors[output][position] / float(self.parts.weights[output].flatten()[row])
                slack = self._slack(output, expected)
                error = disagreement(computed[None], expected[None], scale, floor, slack)
                if error is not None:
                    return f"row {row} of output {output} is off by {error:.1g} relative to plain reverse mode"
        return None

    def _check_projections(self, result: Result) -> str | None:
        for output in range(len(self.values)):
            for projection in self.parts.projections(output):
                samples = projection.samples
                for position, (whole, one) in enumerate(zip(result.jacobians[output], projection.pulled, strict=True)):
                    seen = self.evidence.clear_rows(whole, output, position)
                    found, scale = self.places.project(seen, output, position, projection)
                    expected = self.parts.expect(projection, position)
                    if projection.coordinates is not None:
                        # an entry of the diagonal is as exact as the row that it is part of
                        reached = self.places.pick(one, position, projection)
                        scale = reached.detach().nan_to_num(0, 0, 0).abs().amax(1, keepdim=True)
                    found, expected = self.evidence.projection(found, expected, position, projection)
                    floor = self.floors[output][position] * max(seeds.size(self.problem.outputs[output]), 1)
                    slack = self._slack(output, expected)
                    error = disagreement(found, expected, scale, floor, slack)
                    if error is not None:
                        where = "of the whole batch" if samples is None else f"of {name_samples(samples)}"
                        return f"a random projection {where} is off by {error:.1g} relative to a plain VJP"
        return None

    def _leak(self) -> str | None:
        """Return an error if the gradient at a sample depends on the cotangents of others; None if it does not."""
        for output, one, other, factors in self.parts.scaled:
            for position, pulled in enumerate(zip(one.pulled, other.pulled, strict=True)):
                if not self.places.per_row(position):
                    continue
                before, after = (self.places.pick(part, position, one) for part in pulled)
                after, before = self.evidence.projection(after, before * factors.to(before)[:, None], position, one)
                floor = self.floors[output][position] * max(seeds.size(self.problem.outputs[output]), 1)
                if disagreement(after, before, floor=floor, slack=self._slack(output, before)) is not None:
                    return "a cotangent on some samples has a gradient at others"
        return None

    @property
    def decides(self) -> bool:
        """Whether a missing entry as large as the derivatives compared would be seen, and not be taken for rounding."""
        for output, projections in enumerate(self.parts.known):
            size = max(seeds.size(self.problem.outputs[output]), 1)
            for position, floor in enumerate(self.floors[output]):
                compared = [self.parts.expect(projection, position) for projection in projections]
                top = max(map(largest, compared), default=0.0)
                if 0 < top < floor * size:
                    return False
        return True

    def _slack(self, output: int, pulled: Tensor) -> float:
        """Return the factor on the tolerance of what was pulled, which is no more precise than the output was."""
        return self.slack[output] * max(tolerance(self.values[output].dtype) / tolerance(pulled.dtype), 1.0)


def name_samples(samples: Sequence[int]) -> str:
    """Return some samples, human-readable."""
    return f"sample {samples[0]}" if len(samples) == 1 else f"{len(samples)} samples from {samples[0]} on"


def _require_visible(pullback: Pullback) -> None:
    """Refuse parameters whose derivatives autograd can't be asked for."""
    shapes = ", ".join(str(tuple(pullback.inputs[number].shape)) for number in pullback.hidden_inputs())
    if shapes:
        raise UnsupportedError(
            f"parameters of shape {shapes} get gradients by backward() alone; a Jacobian needs torch.autograd.grad. "
            "torch.utils.checkpoint hides them with use_reentrant=True: pass use_reentrant=False"
        )
