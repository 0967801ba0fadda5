"""Layer 4 of the probe: which coordinates of a sample's outputs can depend on which of its inputs.

The pattern follows from the operators of a recorded call wherever there is a recording: then it holds for all inputs
that run the same operators. Otherwise NaN in one coordinate at a time shows what it reaches. In both cases gradients at
several points must lie within the pattern; what does not is added, and the evidence says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autojac.core import pytree
from autojac.core.pattern import Pattern, Sparsity
from autojac.core.time_limit import within
from autojac.errors import OptionError
from autojac.graph.recorder import FunctionRecording, record
from autojac.probe.coordinates import Coordinates, few
from autojac.probe.sample_pairs import SCALES, ProbePoint

if TYPE_CHECKING:
    import scipy.sparse

DENSEST = 0.5
"""Share of entries above which a pattern saves nothing."""
MOST_SAMPLES = 64
"""Samples whose gradients are looked at, where func takes some of them alone."""


@dataclass(frozen=True)
class Features:
    """The pattern inside a sample.

    Attributes:
        pattern: a sample's outputs by its inputs (m, n), counted through all outputs and all differentiated inputs,
            flattened in their order; None where it is dense, too expensive to find, or can't be found.
        evidence: the line for `explain`; empty where there is nothing to look for.
        agreed: nothing was seen outside of the pattern before it was completed.
        depends_on_arguments: another pattern may hold for other values of the tensors that are not differentiated.
    """

    pattern: Pattern | None
    evidence: str
    agreed: bool = True
    depends_on_arguments: bool = False


class Dense(Exception):
    """A pattern would save nothing; the message says how many entries there are."""


def _with_values(some: ProbePoint, point: ProbePoint) -> tuple[ProbePoint, Sequence[Tensor]]:
    """Return `some` with its values, or `point` with its where func does not take so few samples."""
    try:
        return some, some.values({})
    except Exception:
        return point, point.values({})


def find_feature_pattern(
    point: ProbePoint,
    differentiated: Sequence[int],
    generator: torch.Generator,
    *,
    sliceable: bool,
    draws: bool = False,
    budget_s: float = 1.0,
) -> Features:
    """Find the pattern inside a sample, over all samples and, where they are coupled, over all pairs of them.

    Args:
        point: the function, and where it is probed.
        differentiated: indices of the leaves to differentiate.
        generator: of other points and cotangents.
        sliceable: whether func of some samples gives those samples' outputs.
        draws: whether func draws random numbers, which may be indices.
        budget_s: seconds that NaN in each coordinate may take, where there is no recording.
    """
    # 0.2 s to import
    from autojac.probe.feature_pattern_blackbox import by_nan, complete_pattern

    small, values = _with_values(few(point, 2) if sliceable else point, point)
    point = few(point, MOST_SAMPLES) if sliceable and small is not point else point
    where = Coordinates(small, differentiated, values)
    if point.batch < 1 or min(where.m, where.n) < 2 or not all(value.is_floating_point() for value in values):
        return Features(None, "")
    try:
        matrix, reads, how = _by_operators(small, where, draws, generator)
    except Dense as dense:
        return Features(None, f"features: dense, {dense}")
    is_recorded = matrix is not None
    if matrix is None and not how.startswith("too much"):
        reason = how
        matrix, how = by_nan(small, where, values, sliceable, budget_s)
        how = f"{how} ({reason})"
    if matrix is None:
        return Features(None, f"features: not found, {how}")
    places = where.m * where.n
    if matrix.nnz > DENSEST * places:
        return Features(None, f"features: dense, {matrix.nnz} of {places} entries may be nonzero {how}")
    matrix, added, looks = complete_pattern(point, where, matrix, generator, moving=not is_recorded)
    pattern = Pattern.of(matrix)
    line = f"features: {pattern.count} of {places} entries may be nonzero {how}, "
    line += f"of these {added} were added by {looks}" if added else f"no other by {looks}"
    return Features(
        pattern if pattern.density <= DENSEST else None, line, not added, reads or not is_recorded or bool(added)
    )


def check_declared(sparsity: Sparsity, batch: int, m: int, n: int) -> None:
    """Check declared patterns against a call.

    Args:
        sparsity: the declaration.
        batch: number of samples B.
        m, n: elements of one sample's outputs and differentiated inputs.

    Raises:
        OptionError: if a pattern has another shape.
    """
    wanted = {"samples": (batch, batch), "features": (m, n)}
    meaning = {
        "samples": "one row and one column per sample",
        "features": "a row per output and a column per differentiated input of one sample, flattened in order",
    }
    for name, pattern in sparsity.parts().items():
        if pattern.shape != wanted[name]:
            raise OptionError(
                f"the sparsity declared has a pattern of {name} of shape {pattern.shape}, but this call needs "
                f"{wanted[name]}. Give it {meaning[name]}"
            )


def _by_operators(
    point: ProbePoint, where: Coordinates, draws: bool, generator: torch.Generator
) -> tuple[scipy.sparse.csr_array | None, bool, str]:
    """Return the pattern that follows from the operators, whether Python sees data, and how it was found or why not."""
    found, reads, how = _pattern_at(point, where, draws)
    if found is None or not reads:
        return found, False, how
    # another branch may run at another point
    points = 1
    for turn, scale in enumerate(SCALES):
        more, _, _ = _pattern_at(point.at_other_point(turn, scale, generator), where, draws)
        if more is not None:
            found, points = found + more, points + 1
    return found, True, f"{how}, at {points} points since func looks at its data"


def _pattern_at(point: ProbePoint, where: Coordinates, draws: bool) -> tuple[scipy.sparse.csr_array | None, bool, str]:
    """Return the same for one point."""
    import scipy.sparse

    from autojac.graph.dependence.propagation import propagate

    def call() -> FunctionRecording:
        return record(point.fn, point.leaves, point.kwargs, where.differentiated)

    try:
        with point.sandbox():
            recording = within(point.limit_s, call)
    except Exception as error:  # whatever func raises when it is watched, or at values that its user never passes
        return None, False, f"func can't be recorded, it raises {type(error).__name__}"
    graph = recording.graph
    if graph is None:
        return None, False, recording.reason
    passed = {id(value) for value in pytree.tree_leaves(point.kwargs) if isinstance(value, Tensor)}
    varying = [number for number, tensor in graph.constants.items() if draws or id(tensor) in passed]
    flow = propagate(graph, point.leaves, where.numbers(point.leaves), where.n, varying_constants=varying)
    if flow.refusal:
        return None, False, f"too much to go through: {flow.refusal}"
    events = [(1, *graph.shapes[number][1:]) for number in graph.outputs]
    if tuple(math.prod(event) for event in events) != where.rows:
        return None, False, "func's outputs have another shape at another point"
    parts = [part.over([0]) for part in flow.outputs()]
    how = f"by what each of {len(graph.operations)} operators reads"
    count = sum(int(part.counts(event).sum()) for part, event in zip(parts, events, strict=True))
    if count > DENSEST * where.m * where.n:
        raise Dense(f"{count} of {where.m * where.n} entries may be nonzero {how}")
    pattern = scipy.sparse.vstack([part.rows(event) for part, event in zip(parts, events, strict=True)], format="csr")
    return scipy.sparse.csr_array(pattern), graph.reads_data, how
