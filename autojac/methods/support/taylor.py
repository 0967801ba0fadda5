"""Taylor mode: derivatives by columns of the input, carried through a recorded graph operator by operator.

Beside each value run the derivatives that the ones asked for are built on, as rows of one tensor. An operator F takes
rows to rows by the formula of Faà di Bruno: the derivative by some columns is the sum, over all ways to split them into
blocks, of F's derivative of that many directions in the rows of the blocks. Linear operators have the first term alone.
Of a sum of second derivatives, such as the Laplacian, one row is carried, since only the first term acts on it:
collapsed Taylor mode (Dangel et al. 2025), which for the Laplacian is the forward Laplacian (Li et al. 2023).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autojac.autodiff.derivative_terms import Term, partitions, parts
from autojac.autodiff.primitives import functional_jvp, vmap
from autojac.graph.ir import Graph, Operation, Value
from autojac.graph.operator_facts import MOVING, Kind, facts_of
from autojac.methods.support.pointwise import Factors, derivatives_of

LINEAR = MOVING | {Kind.COPY, Kind.GATHER, Kind.SCATTER}
"""Kinds of operators that are linear in all tensors whose entries they read, but for their selectors."""
LINEAR_NAMES = frozenset({"neg", "add", "sub", "rsub", "sum", "mean", "cumsum", "where", "masked_fill"})
"""Others that are."""


@dataclass(frozen=True)
class Split:
    """Terms of one row of Faà di Bruno's formula that have the same number of blocks.

    Attributes:
        row: which row they are added to.
        blocks: for each block the rows that fill it, one for each term.
    """

    row: int
    blocks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class CarriedRows:
    """Which derivatives are carried, and how they depend on each other.

    Attributes:
        keys: what each row holds, ordered by order: a derivative, or a sum of second ones.
        ends: number of rows of at most first, second, ... order.
        splits: what operators that are not linear add to rows.
    """

    keys: tuple[Term, ...]
    ends: tuple[int, ...]
    splits: tuple[Split, ...]

    @classmethod
    def needed(cls, terms: Sequence[Term]) -> CarriedRows:
        """Return the rows that lead to sums of derivatives."""
        found: dict[Term, None] = {}
        for term in terms:
            if _collapses(term):
                found |= {((column,),): None for columns in term for column in columns} | {term: None}
            else:
                found |= {(part,): None for columns in term for part in parts(columns) if part}
        keys = tuple(sorted(found, key=lambda term: (len(term[0]), len(term) > 1, term)))
        place = {key: number for number, key in enumerate(keys)}
        highest = max((len(key[0]) for key in keys), default=0)
        ends = tuple(sum(len(key[0]) <= order for key in keys) for order in range(1, highest + 1))
        splits = []
        for key in keys:
            grouped: dict[int, list[tuple[int, ...]]] = {}
            for columns in key:
                for blocks in partitions(columns):
                    if len(blocks) > 1:
                        filled = tuple(place[(tuple(sorted(block)),)] for block in blocks)
                        grouped.setdefault(len(blocks), []).append(filled)
            splits += [Split(place[key], tuple(zip(*each, strict=True))) for each in grouped.values()]
        return cls(keys, ends, tuple(splits))

    def after(self, order: int) -> list[Split]:
        """Return what operators add to rows whose arguments have rows of at most this order, and none beyond."""
        known = self.ends[order - 1]
        return [split for split in self.splits if all(row < known for block in split.blocks for row in block)]


def _collapses(term: Term) -> bool:
    return len(term) > 1 and all(len(columns) == 2 for columns in term)


@dataclass
class Series:
    """A value and the rows of its derivatives.

    Attributes:
        value: the tensor.
        rows: (r, *shape), the leading ones; rows beyond these are zero.
        order: the highest order that they reach.
    """

    value: Tensor
    rows: Tensor
    order: int


class TaylorMode:
    """Carries derivatives through one graph.

    Args:
        graph: recorded.
        wanted: the rows.
        base: values of the graph's tensors that are known, its inputs among them.
    """

    def __init__(self, graph: Graph, wanted: CarriedRows, base: Mapping[int, Tensor]) -> None:
        self.graph = graph
        self.wanted = wanted
        self.env: dict[int, Tensor] = {**graph.constants, **base}
        self.series: dict[int, Series] = {}

    def run(self, source: int) -> None:
        """Carry the derivatives from one input, whose own are unit vectors, to the outputs."""
        value, singles = self.env[source], self.wanted.ends[0]
        columns = [key[0][0] for key in self.wanted.keys[:singles]]
        flat = value.numel() // max(len(value), 1)
        unit = torch.eye(flat, dtype=value.dtype, device=value.device)[columns]
        rows = unit.view(singles, 1, *value.shape[1:]).expand(singles, *value.shape)
        self.series[source] = Series(value, rows, 1)
        for place in self.graph.needed(self.graph.outputs, frozenset(self.env)):
            self._step(self.graph.operations[place])

    def term(self, output: int, term: Term) -> Tensor:
        """Return a sum of derivatives of an output."""
        value, found = self.env[output], self.series.get(output)
        total: Tensor | None = None
        for key in (term,) if _collapses(term) else tuple((columns,) for columns in term):
            row = self._row(value, found, key)
            total = row if total is None else total + row
        assert total is not None
        return total

    def _row(self, value: Tensor, found: Series | None, key: Term) -> Tensor:
        if key == ((),):
            return value
        place = self.wanted.keys.index(key)
        return torch.zeros_like(value) if found is None or place >= len(found.rows) else found.rows[place]

    def _step(self, operation: Operation) -> None:
        active = [] if operation.held else [n for n in dict.fromkeys(operation.sources) if n in self.series]
        facts = facts_of(operation.target)
        values = operation(self.env)
        made = [
            (place, number)
            for place, number in enumerate(operation.outputs)
            if number is not None and values[place].is_floating_point()
        ]
        for number, value in zip(operation.outputs, values, strict=False):
            if number is not None:
                self.env[number] = value
        if not active or not facts.has_derivative or not made:
            return
        given = [self.series[number] for number in active]
        order = max(series.order for series in given)
        count = self.wanted.ends[order - 1]
        rows = [_padded(series, count) for series in given]
        if _is_unary(operation) and not _is_linear(operation, active):
            (_, number), (series,) = made[0], given
            factors = derivatives_of(operation.name, functools.partial(self._applied, operation, active, [0]))
            self.series[number] = self._pointwise(series, values[0], factors, rows[0])
            return
        function = functools.partial(self._applied, operation, active, [place for place, _ in made])
        at = [series.value for series in given]
        found = _forms(function, at, [rows])
        extras: list[tuple[int, Sequence[Tensor]]] = []
        for split in [] if _is_linear(operation, active) else self.wanted.after(order):
            directions = [[_taken(each, block) for each in rows] for block in split.blocks]
            extras.append((split.row, [_total(form) for form in _forms(function, at, directions)]))
        for which, (_, number) in enumerate(made):
            added = [(row, forms[which]) for row, forms in extras]
            self.series[number] = self._joined(self.env[number], found[which], order, added)

    def _applied(
        self, operation: Operation, active: Sequence[int], places: Sequence[int], *given: Tensor
    ) -> tuple[Tensor, ...]:
        env = {**self.env, **dict(zip(active, given, strict=True))}
        made = operation(env)
        return tuple(made[place] for place in places)

    def _pointwise(self, series: Series, value: Tensor, factors: Factors, rows: Tensor) -> Series:
        """Return what a function of one number makes of a series, from its derivatives."""
        factor = functools.cache(functools.partial(factors, series.value, value))
        added = []
        for split in self.wanted.after(series.order):
            product = _taken(rows, split.blocks[0])
            for block in split.blocks[1:]:
                product = product * _taken(rows, block)
            added.append((split.row, _total(product) * factor(len(split.blocks))))
        return self._joined(value, rows * factor(1), series.order, added)

    def _joined(self, value: Tensor, rows: Tensor, order: int, added: Sequence[tuple[int, Tensor]]) -> Series:
        """Return a series from its linear part and what is added to single rows."""
        if not added:
            return Series(value, rows, order)
        sums: dict[int, Tensor] = {}
        for row, part in added:
            sums[row] = sums[row] + part if row in sums else part
        # what follows from rows of these orders reaches up to the highest of the products
        reached = next(n for n, end in enumerate(self.wanted.ends, 1) if max(sums) < end)
        order = max(order, reached)
        pieces, first = [], min(sums)
        if first:
            pieces.append(rows[:first])
        for row in range(first, self.wanted.ends[order - 1]):
            known = [rows[row]] if row < len(rows) else []
            known += [sums[row]] if row in sums else []
            total = known[0] + known[1] if len(known) == 2 else known[0] if known else torch.zeros_like(value)
            pieces.append(total.unsqueeze(0))
        return Series(value, torch.cat(pieces), order)


def _padded(series: Series, count: int) -> Tensor:
    missing = count - len(series.rows)
    if not missing:
        return series.rows
    return torch.cat([series.rows, series.rows.new_zeros(missing, *series.rows.shape[1:])])


def _taken(rows: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return some rows; a view where they lie side by side."""
    start, count = numbers[0], len(numbers)
    if list(numbers) == list(range(start, start + count)):
        return rows[start : start + count]
    return torch.cat([rows[number : number + 1] for number in numbers])


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

    found: Sequence[Tensor] = vmap(one)(*(rows for direction in directions for rows in direction))
    return found


def _along(
    function: Callable[..., tuple[Tensor, ...]], direction: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, ...]]:
    def derivative(*at: Tensor) -> tuple[Tensor, ...]:
        pushed: tuple[Tensor, ...] = functional_jvp(function, at, direction)[1]
        return pushed

    return derivative


def _is_linear(operation: Operation, active: Sequence[int]) -> bool:
    """Check whether an operator is linear in the tensors that derivatives run through, but for a constant."""
    facts, name = facts_of(operation.target), operation.name
    alone = len(active) == 1 and operation.sources.count(active[0]) == 1
    if name == "div":
        return alone and operation.args[0] == Value(active[0]) and not operation.kwargs.get("rounding_mode")
    if facts.factors or facts.kind is Kind.CONVOLUTION:
        return alone
    combines = "reduce" in name or "reduce" in operation.target._overloadname
    return (name in LINEAR_NAMES or facts.kind in LINEAR) and not combines


def _is_unary(operation: Operation) -> bool:
    """Check whether an operator applies a function of one number to each entry."""
    return facts_of(operation.target).kind is Kind.POINTWISE and len(operation.sources) == 1
