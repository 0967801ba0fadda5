"""What of a Jacobian is compared with plain VJPs: single rows, and random projections."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.autodiff.pullback import Pullback
from autojac.autodiff.tolerance import balance
from autojac.core.pattern import Pattern
from autojac.problem.finite_evidence import Evidence
from autojac.problem.locations import Places, Projection
from autojac.problem.problem import Problem

SAMPLES = 3
CLASSES = 8
"""Classes of a coloring of samples, or of coordinates, that one check looks at."""


@dataclass(frozen=True)
class Extent:
    """How much of a Jacobian is compared.

    Attributes:
        rows: how many single rows are compared besides the projections.
        seed: of what is drawn at random.
        thorough: look at every class of a coloring, since one edge of a graph may have moved.
        every: look at every sample of a coupled function, not at a few, and at every coordinate of a diagonal: one VJP
            for each, made again in each check and kept only where func writes into buffers.
    """

    rows: int = 6
    seed: int = 0
    thorough: bool = False
    every: bool = False


class ComparedParts:
    """Rows and random projections of a Jacobian at one point, drawn and pulled.

    Blocks of a coupled function are not the whole Jacobian, so there each projection lives on one sample and only that
    sample's rows are compared.

    Args:
        problem: the function and its structure.
        pullback: of one evaluation.
        generator: what rows and projections are drawn from.
        extent: how much is compared.
        keep: pull the projections now, and keep them.
        alone: evaluates func on some of the samples alone, where that may give what single rows need.

    Attributes:
        weights: for each output, such that each of its coordinates counts alike.
        rows: (output, row, what is pulled).
        known: for each output its projections, if they are kept.
        scaled: pairs of projections whose samples differ by factors, of samples that are taken for apart.
    """

    def __init__(
        self,
        problem: Problem,
        pullback: Pullback,
        generator: torch.Generator,
        extent: Extent,
        keep: bool,
        alone: Callable[[Sequence[int]], Pullback | None] | None = None,
    ) -> None:
        self.problem = problem
        self.pullback = pullback
        self.generator = generator
        self.every = extent.every
        self.places = Places(problem)
        self.classes = None if extent.thorough else CLASSES
        self.values = pullback.outputs
        self.evidence = Evidence.at(problem, pullback.inputs, self.values)
        self.weights = [balance([value])[0] for value in self.values]
        self.rows = self._rows(extent.rows, alone)
        with pullback.without_graph():
            self.known = [list(self._projections(output)) for output in range(len(self.values))] if keep else []
            self.scaled = list(self._scale())

    def expect(self, projection: Projection, position: int) -> Tensor:
        """Return the part of a projection's VJP that is compared, one row per sample."""
        reached = self.places.pick(projection.pulled[position], position, projection)
        return reached if projection.coordinates is None else reached[:, list(projection.coordinates)]

    def says(self) -> bool:
        """Check whether any derivative that a plain VJP gave here is finite."""
        rows = (
            self.evidence.says(self.places.keep(one, output, row, position), position)
            for output, row, pulled in self.rows
            for position, one in enumerate(pulled)
        )
        projections = (
            self.evidence.says(self.places.pick(one, position, projection), position, projection)
            for projection in itertools.chain.from_iterable(self.known)
            for position, one in enumerate(projection.pulled)
            if bool(projection.cotangent.any())
        )
        return any(rows) or any(projections)

    def projections(self, output: int) -> Iterable[Projection]:
        """Return random projections of one output's Jacobian."""
        return self.known[output] if self.known else self._projections(output)

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
                mask = torch.zeros_like(value[0]).flatten()
                mask[list(coordinates)] = 1
                cotangent = cotangent * mask.view_as(value[0])
            cotangent = self.evidence.mask_cotangent(output, cotangent)
            yield Projection(samples, coordinates, cotangent, self.pullback(output, cotangent))

    def _coordinates(self, value: Tensor) -> list[list[int]]:
        """Return sets of coordinates that don't reach each other, as far as is known: each shows its own diagonal."""
        count, sparsity = value[0].numel(), self.problem.structure.sparsity
        if self.every:
            return [[coordinate] for coordinate in range(count)]
        alone = len(self.problem.outputs) == len(self.problem.inputs) == 1
        if sparsity is None or sparsity.features is None or not alone:
            return [[int(torch.randint(count, (), generator=self.generator))]]
        return self._classes(sparsity.features)

    def _apart(self, batch: int) -> list[list[int]]:
        """Return sets of samples that don't reach each other, as far as is known: each shows its own block alone."""
        drawn = torch.randperm(batch, generator=self.generator)
        few = batch if self.every else SAMPLES
        if self.evidence.samples is not None:
            drawn = drawn[self.evidence.samples.cpu()[drawn]]
        graph = self.problem.structure.samples
        if graph is None:
            return [[sample] for sample in drawn[:few].tolist()]
        return self._classes(graph)

    def _classes(self, graph: Pattern) -> list[list[int]]:
        """Return some classes of a coloring that keeps apart what reaches each other."""
        colors = torch.from_numpy(self.problem.colorings.apart(graph))
        # an edge that is missing joins samples of one color, or does no harm
        shown = torch.randperm(int(colors.max()) + 1, generator=self.generator)[: self.classes].tolist()
        return [torch.nonzero(colors == color)[:, 0].tolist() for color in shown]

    def _choose(self, output: int, rows: int) -> list[int]:
        """Choose the numbers of rows to compare: the first, the last, and others at random."""
        numbers = self.evidence.numbers(output)
        count = self.values[output].numel() if numbers is None else len(numbers)
        if not rows or not count:
            return []
        drawn = torch.randint(count, (max(rows - 2, 0),), generator=self.generator).tolist()
        places = sorted({0, count - 1, *drawn})
        return places if numbers is None else numbers[places].tolist()

    def _noise(self, output: int) -> Tensor:
        """Return a random cotangent of one output."""
        return seeds.noise(self.values[output], self.generator) * self.weights[output]

    def _rows(
        self, rows: int, alone: Callable[[Sequence[int]], Pullback | None] | None
    ) -> list[tuple[int, int, list[Tensor]]]:
        """Pull some rows of each output."""
        chosen = [(output, row) for output in range(len(self.values)) for row in self._choose(output, rows)]
        sizes = [seeds.size(event) for event in self.problem.outputs]
        samples = sorted({row // sizes[output] for output, row in chosen})
        places = {sample: place for place, sample in enumerate(samples)}
        pullback = None if alone is None or not chosen else alone(samples)
        if pullback is None:
            return [(output, row, self._single(self.pullback, output, row)) for output, row in chosen]
        pulled = []
        for output, row in chosen:
            sample, element = divmod(row, sizes[output])
            parts = self._single(pullback, output, places[sample] * sizes[output] + element)
            at = (torch.tensor(samples, device=parts[0].device),)
            pairs = zip(self.pullback.inputs, parts, strict=True)
            pulled.append((output, row, [x.new_zeros(x.shape).index_put(at, part) for x, part in pairs]))
        return pulled

    @staticmethod
    def _single(pullback: Pullback, output: int, row: int) -> list[Tensor]:
        value = pullback.recorded[output].detach()
        return pullback(output, seeds.identity(tuple(value.shape), row, row + 1, value)[0])

    def _scale(self) -> Iterator[tuple[int, Projection, Projection, Tensor]]:
        """Yield, for samples that are taken for apart, two projections: in the other each sample has a factor.

        A diagonal can't show that one sample reaches another at a coordinate that no projection looked at.
        """
        structure, layout = self.problem.structure, self.problem.layout
        graph = structure.samples
        if layout != "diagonal" or self.problem.batch < 2 or not (structure.independent or graph is not None):
            return
        classes = [None] if structure.independent or graph is None else self._classes(graph)
        for output, samples in itertools.product(range(len(self.values)), classes):
            one = self.evidence.mask_cotangent(output, _alone(self._noise(output), samples))
            factors = (0.5 + torch.rand(len(one), generator=self.generator)).to(one)
            other = one * factors.view(-1, *[1] * (one.dim() - 1))
            first, second = (Projection(samples, None, u, self.pullback(output, u)) for u in (one, other))
            yield output, first, second, factors if samples is None else factors[samples]


def _alone(cotangent: Tensor, samples: Sequence[int] | None) -> Tensor:
    """Return a cotangent on some samples alone."""
    if samples is None:
        return cotangent
    alone = torch.zeros_like(cotangent)
    alone[samples] = cotangent[samples]
    return alone
