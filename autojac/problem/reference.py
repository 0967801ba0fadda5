"""Check a Jacobian against plain VJPs of the function itself: before it is timed, and while it runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.autodiff.primitives import Pullback, gradient
from autojac.autodiff.tolerance import balance, disagreement, own_rounding, rounding_floor, tolerance
from autojac.core.autocast import outside_autocast
from autojac.core.pattern import Pattern
from autojac.core.sandbox import Sandbox
from autojac.core.structure import UPDATES_BUFFERS
from autojac.errors import UnsupportedError
from autojac.graph.special_kernels import plain_formulas
from autojac.problem.finite_evidence import Evidence, only
from autojac.problem.locations import Places, Projection
from autojac.problem.problem import Problem, Result, recorded

ROWS = 6
SAMPLES = 3
CLASSES = 8
"""Classes of a coloring of samples, or of coordinates, that one check looks at."""


class Reference:
    """What the right answer must satisfy at one point: selected rows and random projections, by plain VJPs.

    func is evaluated once. Blocks of a coupled function are not the whole Jacobian, so there each projection lives on
    one sample and only that sample's rows are compared.

    Args:
        problem: the function and its structure.
        leaves, kwargs: the point.
        sandbox: how to evaluate without a trace.
        rows: how many single rows of the Jacobian are compared besides the projections.
        seed: of the random projections.
        pullback: of a graph that exists already, in the place of an evaluation.
        thorough: look at every class of a coloring, since one edge of a graph may have moved.
        every: look at every sample of a coupled function, not at a few, and at every coordinate of a diagonal: one VJP
            for each, made anew in each check and kept only where func writes into buffers.
        trained: tensors besides the inputs that a loss on the Jacobian trains.

    Attributes:
        once: func was found to have no second derivative by plain autograd, so nothing trains through its Jacobian.
        says: something at this point is finite, so that a Jacobian that passes was compared with something.
    """

    def __init__(
        self,
        problem: Problem,
        leaves: Sequence[Tensor],
        kwargs: Mapping[str, Any],
        sandbox: Sandbox,
        rows: int = ROWS,
        seed: int = 0,
        pullback: Pullback | None = None,
        thorough: bool = False,
        every: bool = False,
        trained: Sequence[Tensor] = (),
    ) -> None:
        self.problem = problem
        self.places = Places(problem)
        self.every = every
        self.trained = trained
        self.training: _Training | None = None
        self.classes = None if thorough else CLASSES
        self.slack = [1.0] * len(problem.outputs)
        # the graph of a func that writes into buffers can be pulled until they are put back
        self.calibrated = UPDATES_BUFFERS in problem.structure.effects
        self.once = False
        self.generator = torch.Generator().manual_seed(seed)
        self.connected = tuple(leaf for leaf in leaves if leaf.requires_grad) if problem.differentiable else ()
        # a fused kernel may lack the second derivative by which a differentiable result is checked
        kernels = problem.structure.kernels if problem.differentiable else ()
        with outside_autocast(), sandbox(), plain_formulas(kernels):
            self.pullback = pullback or recorded(problem, leaves, kwargs, problem.differentiable)
            self.values = self.pullback.outputs
            pairs = zip(problem.inputs, self.pullback.inputs, strict=True) if problem.originals is not None else ()
            self.originals = {id(leaves[position]): tensor for position, tensor in pairs}
            if self.originals:
                _require_visible(self.pullback)
            self.evidence = Evidence.at(problem, self.pullback.inputs, self.values)
            # every coordinate of an output counts alike, by its weight
            self.weights = [balance([value])[0] for value in self.values]
            self.floors = [
                [rounding_floor(value * weight, tensor) for tensor in self.pullback.inputs]
                for value, weight in zip(self.values, self.weights, strict=True)
            ]
            self.rows = [
                (output, row, self._single(output, row))
                for output in range(len(self.values))
                for row in self._chosen(output, rows)
            ]
            with self.pullback.without_graph():
                kept = self.calibrated or not self.every
                self.kept = [list(self._projections(output)) for output in range(len(self.values))] if kept else []
                self.scaled = list(self._scaled())
            if self.calibrated:
                self._calibrate()
                if problem.differentiable:
                    self.training = self._differentiate()
            self.says = self.every or self._says()

    def check(self, result: Result) -> str | None:
        """Why a result is wrong, as a sentence; None if it agrees with everything checked."""
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
        for output, value in enumerate(self.pullback.recorded):
            rounding = own_rounding(self.pullback.pull, [value], self.generator)
            for position, (noise, relative) in enumerate(rounding):
                self.floors[output][position] = max(self.floors[output][position], noise)
                self.slack[output] = max(self.slack[output], relative)

    def check_gradient(self, result: Result) -> str | None:
        """Why the graph behind a differentiable result is wrong; None if its gradient agrees with the rows'.

        Args:
            result: a result computed with grad mode on.
        """
        with outside_autocast():
            known = self.training = self.training or self._differentiate()
            if known is None:
                return None
            rows = [
                self.places.row(result.jacobians[output][position], output, row, position)
                for output, row, position in known.where
            ]
            found = known.pull(rows, known.weights)
            wrong = self._compare_gradients(found, known.right, [1.0] * len(found))
            if wrong is not None:
                # as for J itself; a derivative of it may be less precise than it is
                slacks = known.slacks or self._slacks_of_gradients(known)
                wrong = self._compare_gradients(found, known.right, slacks)
        return wrong

    def _differentiate(self) -> _Training | None:
        """The gradient through the rows compared; None where there is none that can be asked for."""
        sources = self._sources(self.trained)
        where, rows, weights = [], [], []
        for output, row, pulled in self.rows:
            for position, one in enumerate(pulled):
                kept = self.places.kept(one, output, row, position)
                if bool(torch.isfinite(kept).all()):
                    where.append((output, row, position))
                    rows.append(kept.reshape(1, -1))
                    scale = self.weights[output].flatten()[row].to(kept)
                    weights.append(seeds.noise(kept.reshape(1, -1), self.generator) * scale)
        if not sources or not rows or self.once:
            return None
        known = _Training(sources, where, rows, weights)
        try:
            known.right = known.pull(rows, weights)
        except RuntimeError:
            self.once = True
            return None
        if UPDATES_BUFFERS in self.problem.structure.effects:
            known.slacks = self._slacks_of_gradients(known)
        return known

    def _slacks_of_gradients(self, known: _Training) -> list[float]:
        return [relative for _, relative in own_rounding(known.pull, known.rows, self.generator)]

    def _compare_gradients(
        self, found: Sequence[Tensor], right: Sequence[Tensor], slacks: Sequence[float]
    ) -> str | None:
        for mine, theirs, own in zip(found, right, slacks, strict=True):
            counted = torch.isfinite(theirs)
            if not self.evidence.whole:
                # zero times what is NaN elsewhere
                counted &= torch.isfinite(mine)
            one, other = only(None if bool(counted.all()) else counted, mine, theirs)
            slack = max(own, *(self._slack(output, other) for output in range(len(self.values))))
            error = disagreement(one.reshape(1, -1), other.reshape(1, -1), floor=_magnitude_floor(right), slack=slack)
            if error is not None:
                return f"the gradient through J is off by {error:.1g} relative"
        return None

    def _sources(self, captured: Sequence[Tensor]) -> list[list[Tensor]]:
        """What a loss on J trains; a leaf and the original that it stands for are trained together."""
        pairs = [[leaf, self.originals.get(id(leaf), leaf)] for leaf in self.connected]
        known = {id(tensor) for pair in pairs for tensor in pair}
        together = [list({id(tensor): tensor for tensor in pair}.values()) for pair in pairs]
        return [*together, *([tensor] for tensor in captured if id(tensor) not in known)]

    def check_shapes(self, result: Result) -> str | None:
        """Why a result can't be right whatever its numbers: shapes, dtypes and the values."""
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
            mine, theirs = only(self.evidence.elements[output], value, expected)
            error = disagreement(mine, theirs, slack=self.slack[output])
            if error is not None:
                return f"the value is off by {error:.1g} relative"
        return None

    def _check_rows(self, result: Result) -> str | None:
        for output, row, pulled in self.rows:
            for position, (whole, one) in enumerate(zip(result.jacobians[output], pulled, strict=True)):
                own = self.places.row(whole, output, row, position)
                expected = self.places.kept(one, output, row, position)
                own, expected = self.evidence.row(own, expected, position)
                # an entry of the diagonal is as exact as the row that it is part of
                scale = _largest(one)[None] if self.problem.layout == "diagonal" else None
                floor = self.floors[output][position] / float(self.weights[output].flatten()[row])
                slack = self._slack(output, expected)
                error = disagreement(own[None], expected[None], scale, floor, slack)
                if error is not None:
                    return f"row {row} of output {output} is off by {error:.1g} relative to plain reverse mode"
        return None

    def _check_projections(self, result: Result) -> str | None:
        for output in range(len(self.values)):
            for projection in self.projections(output):
                samples = projection.samples
                for position, (whole, one) in enumerate(zip(result.jacobians[output], projection.pulled, strict=True)):
                    seen = self.evidence.cleared(whole, output, position)
                    found, scale = self.places.project(seen, output, position, projection)
                    expected = self._expected(projection, position)
                    if projection.coordinates is not None:
                        # an entry of the diagonal is as exact as the row that it is part of
                        reached = self.places.reached(one, position, projection)
                        scale = reached.detach().nan_to_num(0, 0, 0).abs().amax(1, keepdim=True)
                    found, expected = self.evidence.projection(found, expected, position, projection)
                    floor = self.floors[output][position] * max(seeds.size(self.problem.outputs[output]), 1)
                    slack = self._slack(output, expected)
                    error = disagreement(found, expected, scale, floor, slack)
                    if error is not None:
                        where = "of the whole batch" if samples is None else f"of {named(samples)}"
                        return f"a random projection {where} is off by {error:.1g} relative to a plain VJP"
        return None

    def _scaled(self) -> Iterator[tuple[int, Projection, Projection, Tensor]]:
        """Yield, for samples that are taken for apart, two projections: in the other each sample has a factor.

        A diagonal can't show that one sample reaches another at a coordinate that no projection looked at.
        """
        structure, layout = self.problem.structure, self.problem.layout
        graph = structure.samples
        if layout != "diagonal" or self.problem.batch < 2 or not (structure.independent or graph is not None):
            return
        classes = [None] if structure.independent or graph is None else self._classes(graph)
        for output, samples in itertools.product(range(len(self.values)), classes):
            one = self.evidence.seeded(output, _alone(self._noise(output), samples))
            factors = (0.5 + torch.rand(len(one), generator=self.generator)).to(one)
            other = one * factors.view(-1, *[1] * (one.dim() - 1))
            first, second = (Projection(samples, None, u, self.pullback(output, u)) for u in (one, other))
            yield output, first, second, factors if samples is None else factors[samples]

    def _leak(self) -> str | None:
        """Say whether what a cotangent on one sample gives there hangs on the cotangents on others."""
        for output, one, other, factors in self.scaled:
            for position, pulled in enumerate(zip(one.pulled, other.pulled, strict=True)):
                if not self.places.per_row(position):
                    continue
                before, after = (self.places.reached(part, position, one) for part in pulled)
                after, before = self.evidence.projection(after, before * factors.to(before)[:, None], position, one)
                floor = self.floors[output][position] * max(seeds.size(self.problem.outputs[output]), 1)
                if disagreement(after, before, floor=floor, slack=self._slack(output, before)) is not None:
                    return "a cotangent on some samples has a gradient at others"
        return None

    def _says(self) -> bool:
        """Whether any derivative that a plain VJP gave here is finite."""
        rows = (
            self.evidence.says(self.places.kept(one, output, row, position), position)
            for output, row, pulled in self.rows
            for position, one in enumerate(pulled)
        )
        projections = (
            self.evidence.says(self.places.reached(one, position, projection), position, projection)
            for projection in itertools.chain.from_iterable(self.kept)
            for position, one in enumerate(projection.pulled)
            if bool(projection.cotangent.any())
        )
        return any(rows) or any(projections)

    @property
    def decides(self) -> bool:
        """Whether a missing entry as large as the derivatives compared would be seen, and not be taken for rounding."""
        for output, projections in enumerate(self.kept):
            size = max(seeds.size(self.problem.outputs[output]), 1)
            for position, floor in enumerate(self.floors[output]):
                compared = [self._expected(projection, position) for projection in projections]
                largest = max((float(_largest(one)) for one in compared if one.numel()), default=0.0)
                if 0 < largest < floor * size:
                    return False
        return True

    def _expected(self, projection: Projection, position: int) -> Tensor:
        """The part of a projection's VJP that is compared, one row a sample."""
        reached = self.places.reached(projection.pulled[position], position, projection)
        return reached if projection.coordinates is None else reached[:, list(projection.coordinates)]

    def _slack(self, output: int, pulled: Tensor) -> float:
        """The factor on the tolerance of what was pulled, which is no more precise than the output was."""
        return self.slack[output] * max(tolerance(self.values[output].dtype) / tolerance(pulled.dtype), 1.0)

    def projections(self, output: int) -> Iterable[Projection]:
        """Random projections of one output's Jacobian."""
        return self.kept[output] if self.kept else self._projections(output)

    def _projections(self, output: int) -> Iterator[Projection]:
        value, layout = self.values[output], self.problem.layout
        if not value.numel():
            return
        whole = layout in ("full", "sparse")
        some: Sequence[Sequence[int] | None] = (None,)
        if not whole and (self.problem.shared_input or not self.problem.structure.independent):
            some = self._apart(len(value))
        places: Sequence[Sequence[int] | None] = self._coordinates(value) if layout == "diagonal" else (None,)
        for samples, coordinates in itertools.product(some, places):
            cotangent = _alone(self._noise(output), samples)
            if coordinates is not None:
                kept = torch.zeros_like(value[0]).flatten()
                kept[list(coordinates)] = 1
                cotangent = cotangent * kept.view_as(value[0])
            cotangent = self.evidence.seeded(output, cotangent)
            yield Projection(samples, coordinates, cotangent, self.pullback(output, cotangent))

    def _coordinates(self, value: Tensor) -> list[list[int]]:
        """Sets of coordinates that don't reach each other, as far as is known, so that each shows its own diagonal."""
        count, sparsity = value[0].numel(), self.problem.structure.sparsity
        if self.every:
            return [[coordinate] for coordinate in range(count)]
        alone = len(self.problem.outputs) == len(self.problem.inputs) == 1
        if sparsity is None or sparsity.features is None or not alone:
            return [[int(torch.randint(count, (), generator=self.generator))]]
        return self._classes(sparsity.features)

    def _apart(self, batch: int) -> list[list[int]]:
        """Sets of samples that don't reach each other, as far as is known, so that each shows its own block alone."""
        drawn = torch.randperm(batch, generator=self.generator)
        few = batch if self.every else SAMPLES
        if self.evidence.samples is not None:
            drawn = drawn[self.evidence.samples.cpu()[drawn]]
        graph = self.problem.structure.samples
        if graph is None:
            return [[sample] for sample in drawn[:few].tolist()]
        return self._classes(graph)

    def _classes(self, graph: Pattern) -> list[list[int]]:
        """Some classes of a coloring that keeps apart what reaches each other."""
        colors = torch.from_numpy(self.problem.colorings.apart(graph))
        # an edge that is missing joins samples of one color, or does no harm
        shown = torch.randperm(int(colors.max()) + 1, generator=self.generator)[: self.classes].tolist()
        return [torch.nonzero(colors == color)[:, 0].tolist() for color in shown]

    def _chosen(self, output: int, rows: int) -> list[int]:
        """Row numbers to compare: the first, the last, and others at random."""
        numbers = self.evidence.numbers(output)
        count = self.values[output].numel() if numbers is None else len(numbers)
        if not rows or not count:
            return []
        drawn = torch.randint(count, (max(rows - 2, 0),), generator=self.generator).tolist()
        places = sorted({0, count - 1, *drawn})
        return places if numbers is None else numbers[places].tolist()

    def _noise(self, output: int) -> Tensor:
        """A random cotangent of one output."""
        return seeds.noise(self.values[output], self.generator) * self.weights[output]

    def _single(self, output: int, row: int) -> list[Tensor]:
        value = self.values[output]
        return self.pullback(output, seeds.identity(tuple(value.shape), row, row + 1, value)[0])


@dataclass
class _Training:
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
        """The gradient through some rows in the places of these."""
        pairs = zip(rows, weights, strict=True)
        total = torch.stack([(row.reshape(1, -1) * weight).sum() for row, weight in pairs]).sum()
        return _gradients(total, self.sources)


def named(samples: Sequence[int]) -> str:
    """Some samples, for people."""
    return f"sample {samples[0]}" if len(samples) == 1 else f"{len(samples)} samples from {samples[0]} on"


def _alone(cotangent: Tensor, samples: Sequence[int] | None) -> Tensor:
    """A cotangent on some samples alone."""
    if samples is None:
        return cotangent
    alone = torch.zeros_like(cotangent)
    alone[samples] = cotangent[samples]
    return alone


def _require_visible(pullback: Pullback) -> None:
    """Refuse parameters whose derivatives autograd can't be asked for."""
    shapes = ", ".join(str(tuple(pullback.inputs[number].shape)) for number in pullback.hidden())
    if shapes:
        raise UnsupportedError(
            f"parameters of shape {shapes} get gradients by backward() alone; a Jacobian needs torch.autograd.grad. "
            "torch.utils.checkpoint hides them with use_reentrant=True: pass use_reentrant=False"
        )


def _gradients(scalar: Tensor, sources: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Gradients of a scalar, added up within each group of sources."""
    parts = iter(gradient(scalar, list(itertools.chain(*sources))))
    return [torch.stack([next(parts) for _ in group]).sum(0) for group in sources]


def _largest(tensor: Tensor) -> Tensor:
    return tensor.detach().nan_to_num(0, 0, 0).abs().amax()


def _magnitude_floor(gradients: Sequence[Tensor]) -> float:
    """Rounding that the largest of several gradients lends to the others: they sum over the same terms."""
    largest = max(float(_largest(g)) if g.numel() else 0.0 for g in gradients)
    return largest * torch.finfo(gradients[0].dtype).eps * 64
