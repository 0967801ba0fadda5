"""Layer 3 of the probe: which samples depend on which, where these are few.

First the graph of the call is followed, operator by operator (`autojac.graph.dependence`): whatever the
values, no sample reads another than those found. Where that loses the trace, index-coded cotangents find the samples
that reach each other at several points. Either way other values in some samples must then move no output but those that
the graph allows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from autojac.core import pytree, work_clock
from autojac.core.pattern import Pattern
from autojac.core.ranks import deadline
from autojac.graph.analysis import GraphAnalysis
from autojac.graph.ir import Graph
from autojac.graph.recorder import record
from autojac.probe.coded_cotangents import CodedCotangents
from autojac.probe.sample_pairs import SCALES, ProbePoint, where_changed

MOST_MASKS = 4
"""Random sets of samples to change at each scale, when a graph is checked."""
MOST_TURNS = 5
"""Pairs of points, after the first two, that are tried until two in a row show no new neighbours."""
WORTH = 0.75
"""A coloring with more classes than this share of the samples saves nothing."""


@dataclass(frozen=True)
class SampleGraph:
    """Which samples depend on which.

    Attributes:
        pattern: (batch, batch), true at (b, c) if output b may depend on sample c, and on the diagonal; None if that
            is not known, or is so much that nothing is gained.
        kind: `grouped` if samples depend on each other in groups, else `sparse`.
        evidence: a human-readable line.
        depends_on_arguments: the pattern was read from arguments that are not differentiated, or from captured float
            tensors: other contents may make another pattern.
        suspect: NaN spreads further than the pattern allows.
        followed: the pattern comes from what each operator does, whatever the values.
    """

    pattern: Pattern | None
    kind: Literal["grouped", "sparse"] | None
    evidence: str
    depends_on_arguments: bool = False
    suspect: bool = False
    followed: bool = False

    @property
    def edgeless(self) -> bool:
        """Whether no sample depends on another."""
        return self.pattern is not None and bool((np.diff(self.pattern.starts) == 1).all())


@dataclass(frozen=True)
class _Matrix:
    """The result of one way to a sample graph.

    Attributes:
        samples: boolean (batch, batch) matrix; None where there is none.
        line: how it was found, or why not.
        depends_on_arguments: as of `SampleGraph`.
        final: no other way is worth trying.
    """

    samples: Any
    line: str
    depends_on_arguments: bool = False
    final: bool = True


def find_sample_graph(
    analysis: GraphAnalysis,
    point: ProbePoint,
    generator: torch.Generator,
    budget_s: float,
    classes: float | None = None,
) -> SampleGraph:
    """Return the sample graph of a function whose samples are coupled.

    Args:
        analysis: the graph of the call, if there is one.
        point: the function, and where it is probed.
        generator: of random numbers.
        budget_s: seconds that probes of an opaque function may take, and checks by other values.
        classes: a coloring of the graph must have fewer, and nothing is probed for it; by default fewer than there
            are samples.
    """
    matrix = _follow(analysis, point, generator)
    if classes is not None and matrix.samples is not None and most_classes(matrix.samples) >= classes:
        matrix = _Matrix(None, "more passes than another way")
    is_probed = classes is None and matrix.samples is None and not matrix.final
    if is_probed:
        matrix = _probe(point, generator, budget_s, matrix.line)
    if matrix.samples is None:
        return SampleGraph(None, None, f"samples: no graph, {matrix.line}")
    pattern = Pattern.of(matrix.samples)
    wrong = contradiction(point, pattern, generator, budget_s)
    if wrong is not None:
        return SampleGraph(None, None, f"samples: no graph, {wrong}")
    degrees = np.diff(pattern.starts) - 1
    line = f"samples: a graph of {degrees.mean():.1f} neighbours, at most {degrees.max()}, {matrix.line}"
    suspect = is_probed and _nan_escapes(point, pattern, generator)
    if suspect:
        line += "; but NaN spreads further"
    return SampleGraph(pattern, _kind(pattern), line, matrix.depends_on_arguments, suspect, not is_probed)


def _follow(analysis: GraphAnalysis, point: ProbePoint, generator: torch.Generator) -> _Matrix:
    """Return the graph by what is known of each operator."""
    if analysis.flow is None:
        return _Matrix(None, str(analysis.reason), final=False)
    matrix, data = _follow_at(analysis.flow.graph.key, point)
    if matrix.samples is not None and data:
        # Python may have chosen the neighbours, or the operators, by the values
        matrix = dataclasses.replace(matrix, depends_on_arguments=True)
        for scale in SCALES:
            try:
                other, _ = _follow_at(None, point.with_inputs_moved(scale, generator))
            except Exception:  # whatever func raises at values that its user never passes
                continue
            if other.samples is None or (other.samples != matrix.samples).nnz:
                return _Matrix(None, "who depends on whom changes with the values")
    return matrix


def _follow_at(key: int | None, point: ProbePoint) -> tuple[_Matrix, bool]:
    """Return the graph at one point, and whether Python reads values of the data."""
    # scipy takes 0.2 s to import
    from autojac.graph.dependence.propagation import propagate

    with point.sandbox():
        graph = record(point.fn, point.leaves, point.kwargs, point.inputs).graph
    if graph is None or (key is not None and graph.key != key):
        return _Matrix(None, "func runs other operators from call to call", final=False), False
    numbers = torch.arange(point.batch)
    columns = [
        numbers.reshape(-1, *[1] * (leaf.dim() - 1)) if position in point.inputs else None
        for position, leaf in enumerate(point.leaves)
    ]
    flow = propagate(graph, point.leaves, columns, point.batch, follow_values=True)
    count = len(graph.operations)
    lost = [f"{name} (operator {place} of {count})" for place, name in flow.losses.items()]
    if flow.value_dependent:
        return _Matrix(None, f"the values decide who depends on whom, at {lost[-1]}"), graph.reads_data
    drawn, follows = _origins(graph, flow.selectors, point)
    if drawn:
        return _Matrix(None, "who depends on whom is drawn at random"), graph.reads_data
    samples = flow.samples()
    if samples is None or not _worth(samples):
        line = f"all may depend on all after {lost[0]}" if lost else "most depend on most"
        return _Matrix(None, line, final=False), graph.reads_data
    names = [graph.operations[place].name for place in flow.followed]
    where = f"{', '.join(dict.fromkeys(names)) or 'views'} in {count} operators"
    return _Matrix(samples, f"followed through {where}", follows), graph.reads_data


def _origins(graph: Graph, selectors: Collection[int], point: ProbePoint) -> tuple[bool, bool]:
    """Return whether what selects the neighbours was drawn at random, and whether it may differ in another call."""
    from autojac.graph.dependence.propagation import roots

    origins = roots(graph, selectors)
    passed = {id(value) for value in pytree.tree_leaves(point.kwargs) if isinstance(value, Tensor)}
    follows = False
    for number in origins:
        constant = graph.constants.get(number)
        # captured integers are part of a plan's key
        follows |= constant is None or id(constant) in passed or constant.is_floating_point()
    return bool(origins & graph.drawn), follows


def _probe(point: ProbePoint, generator: torch.Generator, budget_s: float, line: str) -> _Matrix:
    """Return the graph by index-coded cotangents at several points, until two in a row show nothing new."""
    coded = CodedCotangents(point, generator, deadline(budget_s))
    quiet_turns = 0
    for turn in range(2 + 2 * MOST_TURNS):
        scale = (None, *SCALES)[turn] if turn <= len(SCALES) else SCALES[1 + turn % 2]
        try:
            there = point if scale is None else point.with_inputs_moved(scale, generator)
            more = coded.complete_at(there)
        except Exception as error:  # whatever func raises when it is differentiated or moved
            if scale is None:
                return _Matrix(None, f"{line}, and probing it raises {type(error).__name__}")
            continue
        if more is None:
            if scale is not None and coded.refusal == "derivatives are not finite":
                coded.refusal = ""
                continue
            return _Matrix(None, f"{line}, and {coded.refusal}")
        if not _worth(coded.known):
            return _Matrix(None, f"{line}, and most depend on most")
        quiet_turns = quiet_turns + 1 if turn and not more else 0
        if turn >= len(SCALES) and quiet_turns >= 2:
            return _Matrix(coded.known, f"by {coded.passes} index-coded probes at {turn + 1} points ({line})", True)
    return _Matrix(None, f"{line}, and who depends on whom changes from point to point")


def contradiction(point: ProbePoint, pattern: Pattern, generator: torch.Generator, budget_s: float) -> str | None:
    """Change some samples and look which outputs move; None if all of them may, by the pattern."""
    end = deadline(budget_s)
    matrix = pattern.scipy()
    # the largest change first: it wakes what is dead here
    points = [(scale, point.with_inputs_moved(scale, generator)) for scale in reversed(SCALES)]
    bases: dict[float, tuple[Tensor, ...]] = {}
    for _ in range(MOST_MASKS):
        for scale, there in points:
            mask, allowed = _mask(pattern, matrix, generator)
            try:
                if scale not in bases:
                    bases[scale] = there.values({})
                changed = there.with_inputs_moved(scale, generator, mask).values({})
            except (Exception, TimeoutError):  # func may refuse values that its user never passes
                continue
            has_moved = _rows(changed, bases[scale])
            if has_moved is None or bool((has_moved & ~allowed).any()):
                return f"outputs move beyond it when some samples change by {scale:g}"
            if work_clock.clock.working_s() > end:
                return None
    return None


def _nan_escapes(point: ProbePoint, pattern: Pattern, generator: torch.Generator) -> bool:
    mask, allowed = _mask(pattern, pattern.scipy(), generator)
    try:
        base = point.values({})
        changed = point.values_with_nan(mask)
    except (Exception, TimeoutError):  # func may refuse NaN
        return False
    spoilt = [(a.isnan() & ~b.isnan()).reshape(len(b), -1).any(1) for a, b in zip(changed, base, strict=True)]
    return bool((torch.stack(spoilt).any(0).cpu() & ~allowed).any())


def _mask(pattern: Pattern, matrix: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return some samples, few enough that many outputs must stay; and the outputs that may move."""
    batch = pattern.shape[0]
    share = min(0.5, batch / max(pattern.count, 1))
    mask = torch.rand(batch, generator=generator) < share
    mask[int(torch.randint(batch, (), generator=generator))] = True
    return mask, torch.from_numpy(matrix @ mask.numpy().astype(np.int32) > 0)


def _rows(changed: Sequence[Tensor], base: Sequence[Tensor]) -> Tensor | None:
    """Return the samples whose outputs differ beyond rounding; None if shapes do."""
    has_moved = None
    for after, before in zip(changed, base, strict=True):
        if after.shape != before.shape:
            return None
        rows = where_changed(after, before).reshape(len(before), -1).any(1).cpu()
        has_moved = rows if has_moved is None else has_moved | rows
    return has_moved


def most_classes(samples: Any) -> int:
    """Return a bound on the classes of samples that do not reach each other, colored by largest degree first."""
    degrees = np.sort(np.diff((samples + samples.T).tocsr().indptr))[::-1]
    # Welsh and Powell, 1967; the diagonal counts for the class itself
    return int(np.minimum(degrees, np.arange(1, len(degrees) + 1)).max(initial=0))


def _worth(samples: Any) -> bool:
    """Check whether coloring the graph is sure to save passes."""
    batch = samples.shape[0]
    return bool(samples.nnz <= batch * max(batch // 2, 1) + batch) and most_classes(samples) <= WORTH * batch


def _kind(pattern: Pattern) -> Literal["grouped", "sparse"]:
    """Return `grouped` if samples fall into classes, each of which depends on all of its class and on no other."""
    # a class is named by the first neighbour of its samples
    classes = pattern.columns[pattern.starts[:-1]]
    inside = np.array_equal(classes[pattern.rows], classes[pattern.columns])
    sizes = np.bincount(classes, minlength=len(classes))
    return "grouped" if inside and np.array_equal(np.diff(pattern.starts), sizes[classes]) else "sparse"
