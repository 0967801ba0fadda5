"""Reverse mode on all rows, one VJP per seed: what `Pull` does, and what others fall back on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.autodiff.pullback import Pullback
from autojac.autodiff.reverse_over_reverse import NestedPulls, functional_term
from autojac.autodiff.seeds import SeedKind, SharedSeeds
from autojac.methods.support.engines import Engine, Pulls
from autojac.problem.layouts import from_blocks, own_coordinate, own_coordinates, own_sample
from autojac.problem.problem import Compute, Problem, Result, bind, record_pullback


def seeds_for(problem: Problem) -> SeedKind:
    """Return the kind of seeds of which the fewest are right for the structure."""
    return "shared" if problem.structure.independent and not problem.shared_input else "identity"


@dataclass(frozen=True)
class ReverseMode:
    """One VJP per seed.

    Attributes:
        seeds, engine, chunk: as in `Pull`.
    """

    seeds: SeedKind
    engine: Engine = "loop"
    chunk: int | None = None

    @property
    def step(self) -> int | None:
        return 1 if self.engine == "loop" else self.chunk

    def prepare(self, problem: Problem) -> Compute:
        """Return the function that evaluates func once and pulls all seeds."""
        if problem.of:
            return self._derivatives(problem)
        made = SharedSeeds()

        def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            if self.engine == "vmap":
                pulls = Pulls.through(*bind(problem, leaves, kwargs))
            else:
                pulls = Pulls.by(record_pullback(problem, leaves, kwargs, problem.differentiable), self.engine)
            return self._sweep(problem, pulls, made)

        return compute

    def of_graph(self, problem: Problem, pullback: Pullback, made: SharedSeeds | None = None) -> Result:
        """Return the Jacobian of a graph that exists already; the engine must not be `vmap`, which records its own."""
        if problem.of:
            return self._compute_nested(problem, pullback)
        return self._sweep(problem, Pulls.by(pullback, self.engine), made or SharedSeeds())

    def _derivatives(self, problem: Problem) -> Compute:
        """Return the function that makes derivatives by columns, order on order."""

        def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
            if self.engine != "vmap":
                return self._compute_nested(problem, record_pullback(problem, leaves, kwargs, problem.differentiable))
            bound, (source,) = bind(problem, leaves, kwargs)
            columns = []
            for output in range(len(problem.outputs)):

                def one(x: Tensor, output: int = output) -> Tensor:
                    return bound(x)[output]

                parts = [functional_term(one, source, term, self.seeds == "shared") for term in problem.terms]
                columns.append((torch.stack(parts, -1),))
            return Result(bound(source), tuple(columns))

        return compute

    def _compute_nested(self, problem: Problem, pullback: Pullback) -> Result:
        (source,), columns = pullback.inputs, []
        samples = None if self.seeds == "shared" else range(problem.batch)
        order = max(len(one) for term in problem.terms for one in term)
        with torch.enable_grad():
            for output in pullback.recorded:
                pulls = NestedPulls(output, source, samples, problem.differentiable, order)
                made = torch.stack([pulls.term(term) for term in problem.terms], -1)
                # as reverse mode gives it, whatever func's output is
                made = made.to(source.dtype)
                columns.append((made if problem.differentiable else made.detach(),))
        return Result(pullback.outputs, tuple(columns))

    def _sweep(self, problem: Problem, pulls: Pulls, made: SharedSeeds) -> Result:
        rows = [
            self._shared_rows(problem, output, pulls, made)
            if self.seeds == "shared"
            else self._identity_rows(problem, output, pulls)
            for output in range(len(pulls.values))
        ]
        return Result(pulls.values, tuple(rows))

    def _shared_rows(self, problem: Problem, output: int, pulls: Pulls, made: SharedSeeds) -> tuple[Tensor, ...]:
        event = problem.outputs[output]
        count = seeds.size(event)
        cotangents = made(output, event, problem.batch, pulls.values[output])
        final = output == len(pulls.values) - 1
        diagonal = problem.layout == "diagonal"
        if count == 1 and self.engine == "loop" and not diagonal:
            # neither stacked nor taken apart again: a training step pays for each view twice
            only = [made.apart(row) for row in pulls.row(output, cotangents[0], last=final)]
            each = [row.reshape(problem.batch, *event, *row.shape[1:]) for row in only]
            return tuple([from_blocks(problem.layout, blocks, event, batched=True) for blocks in each])
        pulled = []
        for start, stop in seeds.spans(count, self.step):
            rows = pulls.one(output, cotangents[start:stop], last=final and stop == count)
            pulled.append([own_coordinates(part, start) for part in rows] if diagonal else rows)
        jacobians = []
        for parts in zip(*pulled, strict=True):
            whole = made.apart(parts[0]) if len(parts) == 1 else torch.cat(parts)
            if diagonal:
                jacobians.append(whole.T)
                continue
            rows_last = whole if count == 1 else whole.movedim(0, 1)
            blocks = rows_last.reshape(problem.batch, *event, *whole.shape[2:])
            jacobians.append(from_blocks(problem.layout, blocks, event, batched=True))
        return tuple(jacobians)

    def _identity_rows(self, problem: Problem, output: int, pulls: Pulls) -> tuple[Tensor, ...]:
        shape = (problem.batch, *problem.outputs[output])
        count = seeds.size(shape)
        numbers = torch.arange(count, device=pulls.values[output].device)
        final = output == len(pulls.values) - 1

        def pulled_rows() -> Iterator[tuple[int, int, Sequence[Tensor]]]:
            for start, stop in seeds.spans(count, self.step):
                cotangents = seeds.identity(shape, start, stop, pulls.values[output])
                yield start, stop, pulls.one(output, cotangents, last=final and stop == count)

        if problem.layout == "sparse":
            stored = [problem.entries(output, position) for position in problem.inputs]
            pieces = [
                [entries.of_rows(rows.flatten(1), start) for entries, rows in zip(stored, pulled, strict=True)]
                for start, _, pulled in pulled_rows()
            ]
            return tuple(map(torch.cat, zip(*pieces, strict=True)))

        def parts() -> Iterator[list[Tensor]]:
            for start, stop, pulled in pulled_rows():
                yield [
                    _own_part(problem, position, gradient, numbers[start:stop], count // problem.batch)
                    for position, gradient in zip(problem.inputs, pulled, strict=True)
                ]

        arranged = (problem.batch, count // problem.batch) if problem.layout == "diagonal" else shape
        return tuple(rows.unflatten(0, arranged) for rows in seeds.collect(parts(), count, problem.differentiable))


def _own_part(problem: Problem, position: int, gradient: Tensor, numbers: Tensor, size: int) -> Tensor:
    """Return what the layout keeps of pulled rows (c, *input)."""
    if problem.layout == "full":
        return gradient
    own = own_sample(gradient, numbers, size) if problem.leaves[position].batched else gradient
    return own_coordinate(own, numbers, size) if problem.layout == "diagonal" else own
