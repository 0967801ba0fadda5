"""Taylor mode: derivatives by columns of the input, carried through a recorded graph operator by operator.

Each value is accompanied by the derivatives that the ones asked for are built on, as rows of one tensor. An operator F
takes rows to rows by the formula of Faà di Bruno: the derivative by some columns is the sum, over all ways to split
them into blocks, of F's derivative of that many directions in the rows of the blocks. Linear operators have the first
term alone. Of a sum of second derivatives, such as the Laplacian, one row is carried, since only the first term acts
on it: collapsed Taylor mode (Dangel et al. 2025), which for the Laplacian is the forward Laplacian (Li et al. 2023).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autojac.autodiff.derivative_terms import Term
from autojac.autodiff.primitives import functional_jvp, vmap
from autojac.graph.ir import Graph, Operation, Value
from autojac.graph.operator_facts import facts_of
from autojac.graph.operator_kinds import MOVING, Kind
from autojac.methods.support.pointwise import derivatives_of
from autojac.methods.support.taylor_rows import CarriedPart, CarriedRows, Series, Split

LINEAR = MOVING | {Kind.COPY, Kind.GATHER, Kind.SCATTER}
"""Kinds of operators that are linear in all tensors whose entries they read, but for their selectors."""
LINEAR_NAMES = frozenset({"neg", "add", "sub", "rsub", "sum", "mean", "cumsum", "where", "masked_fill"})
"""Others that are."""


class TaylorMode:
    """Carries derivatives through one graph.

    Args:
        graph: recorded.
        wanted: the rows.
        terms: what is asked of the outputs.
        base: values of the graph's tensors that are known, its inputs among them.
    """

    def __init__(self, graph: Graph, wanted: CarriedRows, terms: Sequence[Term], base: Mapping[int, Tensor]) -> None:
        self.graph = graph
        self.wanted = wanted
        self.env: dict[int, Tensor] = {**graph.constants, **base}
        self.series: dict[int, Series] = {}
        self.places = graph.find_needed(graph.outputs, frozenset(self.env))
        asked = {row for term in terms for row in wanted.of(term) if row is not None}
        self.needed: dict[int, set[int]] = {number: set(asked) for number in graph.outputs}
        for place in reversed(self.places):
            operation = graph.operations[place]
            rows = wanted.into(set().union(*(self.needed.get(n, set()) for n in operation.results)))
            for number in operation.sources:
                self.needed.setdefault(number, set()).update(rows)

    def run(self, source: int) -> None:
        """Carry the derivatives from one input, whose own are unit vectors, to the outputs."""
        value = self.env[source]
        singles = tuple(row for row in range(len(self.wanted.keys)) if self.wanted.order(row) == 1)
        flat = value.numel() // max(len(value), 1)
        columns = [self.wanted.keys[row][0][0] for row in singles]
        unit = torch.eye(flat, dtype=value.dtype, device=value.device)[columns]
        self.series[source] = Series(value, {1: CarriedPart(singles, unit.view(len(singles), 1, *value.shape[1:]))})
        for place in self.places:
            self._step(self.graph.operations[place])

    def term(self, output: int, term: Term) -> Tensor:
        """Return a sum of derivatives of an output."""
        return functools.reduce(torch.add, (self._row(output, row) for row in self.wanted.of(term)))

    def _row(self, output: int, row: int | None) -> Tensor:
        value, series = self.env[output], self.series.get(output)
        if row is None:
            return value
        if series is None or not series.has([row]):
            return torch.zeros_like(value)
        return series.take(self.wanted.order(row), [row])[0].expand(value.shape)

    def _step(self, operation: Operation) -> None:
        active = [] if operation.detached else [n for n in dict.fromkeys(operation.sources) if n in self.series]
        values = operation(self.env)
        made: list[tuple[int, int]] = []
        for place, (number, value) in enumerate(zip(operation.outputs, values, strict=False)):
            if number is not None:
                self.env[number] = value
                if value.is_floating_point():
                    made.append((place, number))
        if not active or not facts_of(operation.target).has_derivative or not made:
            return
        given = [self.series[number] for number in active]
        needed = set().union(*(self.needed.get(number, set()) for _, number in made))
        is_linear = is_linear_in(operation, active)
        splits = [] if is_linear else [split for split in self.wanted.splits if split.row in needed]
        step = _Step(operation, active, [place for place, _ in made], self.env, given)
        if (matrix := step.matrix()) is not None:
            found = {order: [part @ matrix] for order, part in step.linear_rows(needed)}
            added: list[tuple[int, list[Tensor]]] = []
        elif is_unary(operation) and not is_linear:
            found, added = step.pointwise(needed, splits, values[made[0][0]])
        else:
            found, added = step.general(needed, splits)
        for which, (_, number) in enumerate(made):
            linear = {order: CarriedPart(step.rows[order], forms[which]) for order, forms in found.items()}
            extra = [(row, forms[which]) for row, forms in added]
            self.series[number] = Series(self.env[number], self._join(linear, extra))

    def _join(self, linear: dict[int, CarriedPart], extra: Sequence[tuple[int, Tensor]]) -> dict[int, CarriedPart]:
        """Return parts from the linear ones and what is added to single rows."""
        joined = dict(linear)
        for order in sorted({self.wanted.order(row) for row, _ in extra}):
            known = linear.get(order)
            pieces = {} if known is None else {row: known.values[place] for place, row in enumerate(known.rows)}
            sums: dict[int, Tensor] = {}
            for row, part in extra:
                if self.wanted.order(row) == order:
                    sums[row] = sums[row] + part if row in sums else part
            pieces |= {row: pieces[row] + part if row in pieces else part for row, part in sums.items()}
            rows = tuple(sorted(pieces))
            parts = [pieces[row] for row in rows]
            values = parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(torch.broadcast_tensors(*parts))
            joined[order] = CarriedPart(rows, values)
        return joined


@dataclass
class _Step:
    """One operator at work on the series of its arguments.

    Attributes:
        operation: the operator.
        active: the tensors among its arguments that carry rows.
        places: which of its results do.
        env: values of all tensors.
        given: the series of the active ones.
        rows: for each order the rows that the operator's linear part gives, once that was asked for.
    """

    operation: Operation
    active: Sequence[int]
    places: Sequence[int]
    env: Mapping[int, Tensor]
    given: Sequence[Series]
    rows: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def apply(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Return the results with other tensors in the place of the active ones."""
        made = self.operation({**self.env, **dict(zip(self.active, given, strict=True))})
        return tuple(made[place] for place in self.places)

    def matrix(self) -> Tensor | None:
        """Return the matrix that the one active tensor is multiplied with from the right, if that is what happens."""
        name, sources = self.operation.name, self.operation.sources
        left = {"mm": 0, "addmm": 1}.get(name)
        if left is None or len(self.active) > 1 or sources.count(self.active[0]) > 1 or self.operation.kwargs:
            return None
        if self.operation.args[left] != Value(self.active[0]):
            return None
        return self.env[self.operation.args[left + 1].number]

    def linear_rows(self, needed: set[int]) -> Iterator[tuple[int, Tensor]]:
        """Return for each order the rows of the one active tensor that are needed."""
        (series,) = self.given
        for order, part in series.parts.items():
            rows = tuple(row for row in part.rows if row in needed)
            if rows:
                self.rows[order] = rows
                yield order, series.take(order, rows)

    def pointwise(
        self, needed: set[int], splits: Sequence[Split], value: Tensor
    ) -> tuple[dict[int, list[Tensor]], list[tuple[int, list[Tensor]]]]:
        """Return what a function of one number makes of rows, from its derivatives."""
        (series,) = self.given
        factors = derivatives_of(self.operation.name, self.apply)
        factor = functools.cache(functools.partial(factors, series.value, value))
        found = {order: [part * factor(1)] for order, part in self.linear_rows(needed)}
        added = []
        for split in splits:
            if series.has(split.rows):
                product = _block(series, split.blocks[0])
                for block in split.blocks[1:]:
                    product = product * _block(series, block)
                added.append((split.row, [_total(product) * factor(len(split.blocks))]))
        return found, added

    def general(
        self, needed: set[int], splits: Sequence[Split]
    ) -> tuple[dict[int, list[Tensor]], list[tuple[int, list[Tensor]]]]:
        """Return what any operator makes of rows, from JVPs of it, and JVPs of JVPs."""
        at = [series.value for series in self.given]
        found = {}
        for order in sorted({order for series in self.given for order in series.parts}):
            rows = sorted({row for s in self.given if order in s.parts for row in s.parts[order].rows if row in needed})
            if rows:
                self.rows[order] = tuple(rows)
                found[order] = list(_forms(self.apply, at, [[self._fill(s, rows) for s in self.given]]))
        added = []
        for split in splits:
            if any(series.has(block) for series in self.given for block in split.blocks):
                directions = [[self._fill(series, block) for series in self.given] for block in split.blocks]
                added.append((split.row, [_total(form) for form in _forms(self.apply, at, directions)]))
        return found, added

    @staticmethod
    def _fill(series: Series, rows: Sequence[int]) -> Tensor:
        """Return rows of one order in full, zeros where they are not carried."""
        shape = (len(rows), *series.value.shape)
        for order, part in series.parts.items():
            if set(rows) <= set(part.rows):
                return series.take(order, rows).expand(shape)
            if set(rows) & set(part.rows):
                return torch.stack(
                    [
                        part.values[part.rows.index(row)].expand(series.value.shape)
                        if row in part.rows
                        else torch.zeros_like(series.value)
                        for row in rows
                    ]
                )
        return series.value.new_zeros(()).expand(shape)


def _total(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _forms(
    function: Callable[..., tuple[Tensor, ...]], at: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]
) -> Sequence[Tensor]:
    """Return the derivative of a function in several directions at once, mapped over the rows of each.

    Args:
        function: of some tensors, to a tuple.
        at: where.
        directions: for each direction the rows (k, *shape) for each of the tensors.
    """

    def one(*flat: Tensor) -> tuple[Tensor, ...]:
        derivative = function
        for start in range(0, len(flat), len(at)):
            derivative = _along(derivative, flat[start : start + len(at)])
        return derivative(*at)

    forms: Sequence[Tensor] = vmap(one)(*(rows for direction in directions for rows in direction))
    return forms


def _along(
    function: Callable[..., tuple[Tensor, ...]], direction: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, ...]]:
    def derivative(*at: Tensor) -> tuple[Tensor, ...]:
        pushed: tuple[Tensor, ...] = functional_jvp(function, at, direction)[1]
        return pushed

    return derivative


def is_linear_in(operation: Operation, active: Sequence[int]) -> bool:
    """Check whether an operator is linear in the tensors that derivatives run through, but for a constant."""
    facts, name = facts_of(operation.target), operation.name
    alone = len(active) == 1 and operation.sources.count(active[0]) == 1
    if name == "div":
        return alone and operation.args[0] == Value(active[0]) and not operation.kwargs.get("rounding_mode")
    if facts.factors or facts.kind is Kind.CONVOLUTION:
        return alone
    combines = "reduce" in name or "reduce" in operation.target._overloadname
    return (name in LINEAR_NAMES or facts.kind in LINEAR) and not combines


def is_unary(operation: Operation) -> bool:
    """Check whether an operator applies a function of one number to each entry."""
    return facts_of(operation.target).kind is Kind.POINTWISE and len(operation.sources) == 1


def _block(series: Series, block: Sequence[int]) -> Tensor:
    order = next(order for order, part in series.parts.items() if block[0] in part.rows)
    return series.take(order, block)
