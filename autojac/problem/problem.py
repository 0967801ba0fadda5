"""A Jacobian to compute: what methods get, and what they give back."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.autodiff.derivative_terms import Term, Terms, resolve_terms
from autojac.autodiff.primitives import Bound
from autojac.autodiff.pullback import Pullback
from autojac.core.pattern import Pattern
from autojac.core.signature import Layout, Leaf
from autojac.core.structure import Structure
from autojac.graph.analysis import GraphAnalysis
from autojac.graph.operators import FORWARD_ONCE, forward_once
from autojac.graph.work import Work
from autojac.guards.function_state import FunctionState
from autojac.problem.layouts import jacobian_shape
from autojac.problem.machine import DEFAULT, Machine
from autojac.sparse.colorings import Colorings
from autojac.sparse.csr import Entries, entries, feature_pattern, sample_graph

INDEX_BYTES = 8
"""What a sparse matrix takes for each entry besides its value."""
UNKNOWN_OPERATORS = 30
"""What func is taken to consist of where nothing is known of it."""
Flat = Callable[[Sequence[Tensor], Mapping[str, Any]], tuple[Tensor, ...]]


class Result(NamedTuple):
    """Values of all outputs and, for output o and input i, `jacobians[o][i]`.

    Besides what func returned as aux, and the rest of its outputs, which have no derivative.
    """

    values: tuple[Tensor, ...]
    jacobians: tuple[tuple[Tensor, ...], ...]
    aux: Any = None
    rest: tuple[Any, ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        """The values, then the Jacobians by output and input."""
        return [*self.values, *itertools.chain.from_iterable(self.jacobians)]


Compute = Callable[[Sequence[Tensor], Mapping[str, Any]], Result]


@dataclass(frozen=True)
class Problem:
    """A Jacobian to compute: a flat function and all that is known of it.

    Attributes:
        fn: maps (leaves, keyword arguments) to a tuple of tensors, each with the batch on axis 0.
        leaves: shape and role of each tensor that fn takes.
        outputs: event shape of each output.
        batch: number of samples B.
        layout: `blocks` (B, *out, *in), `full` (B, *out, B, *in), `diagonal` (B, n), or `sparse`: then a Jacobian is
            the values (entries,) that its compressed rows hold.
        structure: what couples with what.
        differentiable: whether the Jacobian carries a graph.
        memory_limit: bytes that a method may allocate.
        pass_bytes: what one plain evaluation and one VJP allocate at their peak, where it is known.
        has_aux: whether func returns more than is differentiated, which must come from a plain call.
        analysis: what the graph of a call shows, to be asked by methods that cut it.
        colorings: makes and keeps the colorings of its patterns.
        known_entries: those of sparse Jacobians that were computed elsewhere, by output and leaf.
        function_state: what func reads besides its arguments, to be watched by methods that are traced.
        originals: returns the tensors that stand behind the differentiated leaves now, a module's parameters: func may
            read these past its arguments, by a list or a closure or in a backward pass of its own.
        trial: whether this is a search, in which a method that can only fall back on another one is of no use.
        generators: the random generators that fn draws from.
        places: the attributes, containers and variables that fn sets.
        of: the derivatives by columns of the one input that are asked for in the place of a Jacobian: then what stands
            for a Jacobian has the shape (B, *out, k).
        symmetric: each sample's Jacobian is symmetric: of one output in one input, as many.
        machine: the constants of the cost model.
    """

    fn: Flat
    leaves: tuple[Leaf, ...]
    outputs: tuple[tuple[int, ...], ...]
    batch: int
    layout: Layout
    structure: Structure
    differentiable: bool
    memory_limit: int
    pass_bytes: int = 0
    has_aux: bool = False
    analysis: GraphAnalysis | None = dataclasses.field(default=None, compare=False, repr=False)
    colorings: Colorings = dataclasses.field(default_factory=Colorings, compare=False, repr=False)
    known_entries: Mapping[tuple[int, int], Entries] | None = dataclasses.field(default=None, compare=False, repr=False)
    function_state: FunctionState | None = dataclasses.field(default=None, compare=False, repr=False)
    originals: Callable[[], Sequence[Tensor]] | None = dataclasses.field(default=None, compare=False, repr=False)
    trial: bool = False
    generators: tuple[str, ...] = ()
    places: tuple[Any, ...] = dataclasses.field(default=(), compare=False, repr=False)
    of: Terms = ()
    symmetric: bool = False
    machine: Machine = dataclasses.field(default=DEFAULT, compare=False, repr=False)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The derivatives by columns that are asked for; none where it is a Jacobian."""
        return resolve_terms(self.of, self.in_size)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Indices of the leaves to differentiate."""
        return tuple(index for index, leaf in enumerate(self.leaves) if leaf.differentiated)

    @property
    def out_size(self) -> int:
        """Elements of one sample's outputs, m."""
        return sum(seeds.size(shape) for shape in self.outputs)

    @property
    def in_size(self) -> int:
        """Elements of one sample's differentiated inputs, n."""
        return sum(seeds.size(self.leaves[index].event_shape) for index in self.inputs)

    @property
    def shared_input(self) -> bool:
        """Whether some differentiated input belongs to all samples."""
        return any(not self.leaves[index].batched for index in self.inputs)

    @property
    def device(self) -> torch.device:
        """Where the differentiated inputs are."""
        return torch.device(self.leaves[self.inputs[0]].device)

    @property
    def item_bytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.leaves[self.inputs[0]].dtype)
        return dtype.itemsize

    @property
    def result_bytes(self) -> int:
        """Size of the Jacobian itself."""
        pairs = itertools.product(range(len(self.outputs)), self.inputs)
        if self.layout == "sparse":
            counts = (samples.count * features.count for samples, features in itertools.starmap(self.patterns, pairs))
            return (self.item_bytes + INDEX_BYTES) * sum(counts)
        return self.item_bytes * sum(seeds.size(self.jacobian_shape(*pair)) for pair in pairs)

    def jacobian_shape(self, output: int, position: int) -> tuple[int, ...]:
        """Return the shape of the Jacobian of an output with respect to a leaf."""
        if self.of:
            return (self.batch, *self.outputs[output], len(self.terms))
        if self.layout == "sparse":
            return (self.entries(output, position).pattern.count,)
        return jacobian_shape(self.layout, self.batch, self.outputs[output], self.leaves[position])

    def rows(self, output: int) -> tuple[int, int]:
        """Return where an output's features lie among all of a sample's, as (start, stop)."""
        start = sum(map(seeds.size, self.outputs[:output]))
        return start, start + seeds.size(self.outputs[output])

    def columns(self, position: int) -> tuple[int, int]:
        """Return where a differentiated leaf's features lie among all of a sample's, as (start, stop)."""
        before = (seeds.size(self.leaves[other].event_shape) for other in self.inputs if other < position)
        start = sum(before)
        return start, start + seeds.size(self.leaves[position].event_shape)

    def patterns(self, output: int, position: int) -> tuple[Pattern, Pattern]:
        """Return the sample graph, and the pattern inside a sample, of one Jacobian."""
        samples = sample_graph(self.structure, self.batch, shared=not self.leaves[position].batched)
        return samples, feature_pattern(self.structure.sparsity, self.rows(output), self.columns(position))

    def entries(self, output: int, position: int) -> Entries:
        """Return the entries of one Jacobian in layout `sparse`."""
        key = (output, position)
        if key not in self._entries:
            known = self.known_entries and self.known_entries.get(key)
            self._entries[key] = known or entries(*self.patterns(output, position))
        return self._entries[key]

    @functools.cached_property
    def _entries(self) -> dict[tuple[int, int], Entries]:
        # kept here, where a trace of a method that reads their indices finds them
        return {}

    def forward_once(self, recorded: bool = False) -> tuple[str, ...]:
        """Return the operators through which a tangent is pushed that has no right derivative itself.

        Args:
            recorded: the method differentiates what is recorded of func, not func.
        """
        if not recorded:
            return tuple(name for name in self.structure.kernels if name in FORWARD_ONCE)
        flow = None if self.analysis is None else self.analysis.flow
        return () if flow is None else forward_once(flow.graph)

    @property
    def seed_bytes(self) -> int:
        """What one seed through the whole batch drags along: its share of every intermediate value."""
        return max(self.pass_bytes, self.item_bytes * self.batch * (self.out_size + self.in_size))

    @functools.cached_property
    def work(self) -> Work:
        """What one evaluation does; where func has no graph, some operators on what one seed drags along."""
        if self.analysis is None or (work := self.analysis.work) is None:
            each = self.seed_bytes / UNKNOWN_OPERATORS
            return Work(UNKNOWN_OPERATORS, {round(math.log2(max(each, 1))): self.seed_bytes}, 0.0)
        share = self.batch / max(self.analysis.batch, 1)
        if share == 1:
            return work
        shift = math.log2(max(share, 1e-9))
        moved = {math.floor(size + shift + 0.5): total * share for size, total in work.moved.items()}
        return Work(work.operators, moved, work.flops * share)

    def resize(self, batch: int) -> Problem:
        """Return the same problem for another number of samples."""
        leaves = tuple(
            dataclasses.replace(leaf, shape=(batch, *leaf.shape[1:])) if leaf.batched else leaf for leaf in self.leaves
        )
        share = self.pass_bytes * batch // max(self.batch, 1)
        return dataclasses.replace(self, leaves=leaves, batch=batch, pass_bytes=share)


def bind(problem: Problem, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Bound, tuple[Tensor, ...]]:
    """Return the function of the differentiated leaves alone, and those leaves."""
    positions, fixed = problem.inputs, list(leaves)

    def bound(*inputs: Tensor) -> tuple[Tensor, ...]:
        merged = list(fixed)
        for position, tensor in zip(positions, inputs, strict=True):
            merged[position] = tensor
        return problem.fn(merged, kwargs)

    return bound, tuple(leaves[position] for position in positions)


def record_pullback(
    problem: Problem, leaves: Sequence[Tensor], kwargs: Mapping[str, Any], differentiable: bool
) -> Pullback:
    """Evaluate once, plainly, for VJPs: in the originals of the leaves where there are any, else in the leaves."""
    bound, inputs = bind(problem, leaves, kwargs)
    repeatable = not problem.structure.effects
    if problem.originals is None:
        return Pullback(bound, inputs, differentiable, repeatable)
    originals, shapes = problem.originals(), [x.shape for x in inputs]
    # without a batch the inputs have one more axis than a module's own parameters
    differ = any(x.shape != shape for x, shape in zip(originals, shapes, strict=True))
    return Pullback(bound, originals, differentiable, repeatable, fresh=False, shapes=shapes if differ else None)


def empty_rows(problem: Problem, leaves: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    """Return the Jacobians of a problem without elements."""
    return tuple(
        tuple(leaves[position].new_zeros(problem.jacobian_shape(output, position)) for position in problem.inputs)
        for output in range(len(problem.outputs))
    )
