"""The chain rule over a graph: through which cuts a Jacobian is accumulated, and which sides are pushed or pulled.

Between the ends of a minimum cut's side no narrower cut exists: as many disjoint paths as the cut is wide run through
either side (Menger), so a chain of layers is best cut once, at its narrowest place, and each operator then takes as few
seeds as it can. A second cut pays where sides have several ends: one output may have a narrow place of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from autojac.graph.batch_axis.propagation import BatchFlow
from autojac.graph.batch_axis.states import SPREAD, BatchAxis
from autojac.graph.cuts.minimum_cut import MOST_NODES, differentiable_paths, edges, minimum_cut, passes_derivatives
from autojac.graph.ir import Graph, Operation, Value
from autojac.graph.operator_facts import facts_of
from autojac.graph.operator_kinds import Kind

Ends = tuple[int, ...]
LEVELS = 3
"""How often a side may be cut again."""
MOST_TO_CUT_AGAIN = 300
"""Tensors above which sides are not cut again: finding out takes longer than it is worth."""
MOST_PARTS = 8
GAIN = 0.9
"""Share of the cost below which cutting again counts as a gain: the model is no better than that."""
PRODUCTS_A_MOVE = 16
"""Multiplications of a matrix product that take as long as moving one number."""


@dataclass(frozen=True)
class JacobianSweep:
    """J_{targets←sources} by one seed for each element of one end.

    Attributes:
        sources, targets: numbers of tensors.
        mode: push the coordinates of the sources, or pull those of the targets.
        passes: seeds.
        cost: predicted moves of numbers, for one sample.
    """

    sources: Ends
    targets: Ends
    mode: Literal["push", "pull"]
    passes: int
    cost: float


@dataclass(frozen=True)
class ChainProduct:
    """J_{targets←cut} · J_{cut←sources}."""

    sources: Ends
    targets: Ends
    cut: Ends
    late: AccumulationTree
    early: AccumulationTree
    multiplication: float

    @property
    def cost(self) -> float:
        return self.late.cost + self.early.cost + self.multiplication

    @property
    def passes(self) -> int:
        return self.late.passes + self.early.passes


@dataclass(frozen=True)
class Stacked:
    """Rows or columns of J_{targets←sources}, each in a way of its own."""

    sources: Ends
    targets: Ends
    parts: tuple[AccumulationTree, ...]

    @property
    def cost(self) -> float:
        return sum(part.cost for part in self.parts)

    @property
    def passes(self) -> int:
        return sum(part.passes for part in self.parts)


AccumulationTree = JacobianSweep | ChainProduct | Stacked


@dataclass(frozen=True)
class Accumulation:
    """How to accumulate the Jacobian of a whole graph.

    Attributes:
        tree: the tree of cuts.
        states: how the tensors at the ends of its sweeps carry the batch.
        seeds: whole passes through the graph that its sweeps are worth.
        width: elements of one sample in its widest cut.
    """

    tree: AccumulationTree
    states: Mapping[int, BatchAxis]
    seeds: float
    width: int


def accumulate(
    flow: BatchFlow, inputs: Sequence[int], *, recursive: bool = False, forward: bool = True
) -> Accumulation | None:
    """Cut a graph where it is narrowest, by elements of one sample.

    Args:
        flow: how the batch runs through the graph.
        inputs: numbers of the differentiated inputs.
        recursive: whether the sides may be cut again where the model predicts a gain.
        forward: whether sides may be pushed.

    Returns:
        None if nothing is narrower than the inputs and the outputs.
    """
    if flow.lost_output:
        flow = flow.together
    planner = _Planner(flow, inputs, forward)
    targets = tuple(y for y in dict.fromkeys(flow.graph.outputs) if y in planner.alive)
    if len(planner.alive) > MOST_NODES or not targets:
        return None
    levels = LEVELS if len(planner.alive) <= MOST_TO_CUT_AGAIN else 1
    direct = planner.sweep(tuple(inputs), targets)
    tree: AccumulationTree = planner.product(tuple(inputs), targets, 0) or direct
    if recursive:
        best = planner.find(tuple(inputs), targets, levels)
        tree = best if best.cost < GAIN * tree.cost else tree
    if not list(products(tree)):
        return None
    ends = {number for sweep in sweeps(tree) for number in (*sweep.sources, *sweep.targets)}
    known = {number: state for number in ends if isinstance(state := flow.states.get(number), BatchAxis)}
    # an output that the flow has lost is known to be independent in another way, with the batch in front
    states = {number: known.get(number, BatchAxis(0)) for number in ends}
    seed = max(direct.cost, 1) / max(direct.passes, 1)
    width = max(flow.width(product.cut) for product in products(tree))
    return Accumulation(tree, states, sum(sweep.cost for sweep in sweeps(tree)) / seed, width)


def sweeps(tree: AccumulationTree) -> Iterator[JacobianSweep]:
    """Return the leaves of a tree of cuts."""
    if isinstance(tree, JacobianSweep):
        yield tree
    else:
        for part in (tree.late, tree.early) if isinstance(tree, ChainProduct) else tree.parts:
            yield from sweeps(part)


def products(tree: AccumulationTree) -> Iterator[ChainProduct]:
    """Return its cuts, the outer ones first."""
    if isinstance(tree, ChainProduct):
        yield tree
    if not isinstance(tree, JacobianSweep):
        for part in (tree.late, tree.early) if isinstance(tree, ChainProduct) else tree.parts:
            yield from products(part)


class _Planner:
    """Finds the cheapest way between two sets of tensors."""

    def __init__(self, flow: BatchFlow, inputs: Sequence[int], forward: bool) -> None:
        self.flow = flow
        self.forward = forward
        self.alive = differentiable_paths(flow.graph, inputs)
        self.operations = [op for op in flow.graph.operations if passes_derivatives(op)]
        self._trees: dict[tuple[Ends, Ends, int], AccumulationTree] = {}
        self._paths: dict[tuple[Ends, Ends, Ends], frozenset[int]] = {}

    def find(self, sources: Ends, targets: Ends, levels: int) -> AccumulationTree:
        key = sources, targets, levels
        if key not in self._trees:
            self._trees[key] = self._search(sources, targets, levels)
        return self._trees[key]

    def _search(self, sources: Ends, targets: Ends, levels: int) -> AccumulationTree:
        best: AccumulationTree = self.sweep(sources, targets)
        if not levels:
            return best
        options: list[AccumulationTree | None] = [self.product(sources, targets, levels - 1)]
        if 1 < len(targets) <= MOST_PARTS:
            options.append(Stacked(sources, targets, tuple(self.find(sources, (t,), levels) for t in targets)))
        if 1 < len(sources) <= MOST_PARTS:
            options.append(Stacked(sources, targets, tuple(self.find((s,), targets, levels) for s in sources)))
        for option in options:
            if option is not None and option.cost < GAIN * best.cost:
                best = option
        return best

    def sweep(self, sources: Ends, targets: Ends) -> JacobianSweep:
        """Return one sweep in the cheaper direction."""
        pull = JacobianSweep(
            sources,
            targets,
            "pull",
            self.flow.width(set(targets) - set(sources)),
            sum(self.flow.width((t,)) * self._moves(sources, (t,)) for t in targets),
        )
        push = JacobianSweep(
            sources,
            targets,
            "push",
            self.flow.width(sources),
            sum(self.flow.width((s,)) * self._moves((s,), targets, sources) for s in sources),
        )
        return push if self.forward and push.cost < pull.cost else pull

    def product(self, sources: Ends, targets: Ends, levels: int) -> ChainProduct | None:
        """Return the way through the narrowest cut; None if it is no narrower than both ends."""
        narrowest = min(self.flow.width(sources), self.flow.width(targets))
        if narrowest < 2:
            return None
        between = self._between(sources, targets)
        capacities = {number: self._capacity(number) for number in between}
        if not any(capacity < narrowest for capacity in capacities.values()):
            return None  # no cut is narrower than its narrowest tensor
        # a derivative does not run into a source, which is given
        links = [(one, other) for one, other in edges(self.flow.graph, between) if other not in sources]
        starts, goals = ([n for n in ends if n in between] for ends in (sources, targets))
        cut = tuple(minimum_cut(links, capacities, starts, goals) or ())
        if not cut or self.flow.width(cut) >= narrowest:
            return None
        multiplication = (
            self.flow.width(sources) * self.flow.width(targets) * (1 + self.flow.width(cut) / PRODUCTS_A_MOVE)
        )
        return ChainProduct(
            sources, targets, cut, self.find(cut, targets, levels), self.find(sources, cut, levels), multiplication
        )

    def _capacity(self, number: int) -> float:
        graph = self.flow.graph
        # seeds are laid along one axis
        is_flat = number in self.flow.pure and self.flow.states[number] != SPREAD
        eligible = is_flat and graph.dtypes[number].is_floating_point
        return math.prod(graph.shapes[number]) / self.flow.batch if eligible else math.inf

    def _between(self, sources: Ends, targets: Ends, given: Ends = ()) -> frozenset[int]:
        """Return the tensors on paths from sources to targets that run into no source and nothing given."""
        key = sources, targets, given
        if key not in self._paths:
            closed = {*sources, *given}
            reached, wanted = set(sources), set(targets)
            for op in self.operations:
                if not reached.isdisjoint(op.sources):
                    reached.update(n for n in op.results if n in self.alive and n not in closed)
            for op in reversed(self.operations):
                if any(n in wanted and n not in closed for n in op.results):
                    wanted.update(op.sources)
            self._paths[key] = frozenset(reached & wanted)
        return self._paths[key]

    def _moves(self, sources: Ends, targets: Ends, given: Ends = ()) -> float:
        """Return what one seed from sources to targets moves, for one sample."""
        on_path = self._between(sources, targets, given)
        return (
            sum(
                work(self.flow.graph, op)
                for op in self.operations
                if any(n in on_path and n not in sources for n in op.results) and not on_path.isdisjoint(op.sources)
            )
            / self.flow.batch
        )


def work(graph: Graph, operation: Operation) -> float:
    """Return numbers that a seed moves through one operator, products of matrices counted in moves."""
    made = sum(math.prod(graph.shapes[number]) for number in operation.outputs[:1] if number is not None)
    read = sum(math.prod(graph.shapes[number]) for number in operation.sources[:1])
    facts, length = facts_of(operation.target), 0
    if facts.kind is Kind.PRODUCT:
        left = operation.args[1 if facts.addend else 0]
        length = graph.shapes[left.number][-1] if isinstance(left, Value) else 0
    elif facts.kind is Kind.CONVOLUTION:
        length = math.prod(graph.shapes[operation.args[1].number][1:])
    return made + read + made * length / PRODUCTS_A_MOVE
