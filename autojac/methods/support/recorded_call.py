"""Record a call and compute by a cut of its graph, or by its graph of autograd where it can't be cut as planned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from autojac.autodiff.pullback import Pullback
from autojac.autodiff.seeds import SeedKind
from autojac.graph.analysis import RecordAndCut
from autojac.graph.batch_axis.propagation import BatchFlow
from autojac.graph.ir import Graph
from autojac.methods.support.reverse_mode import ReverseMode
from autojac.problem.problem import Compute, Problem, Result

Cut = TypeVar("Cut")


def why_unrecorded(problem: Problem) -> str | None:
    """Return why there is no graph of func to cut, as a sentence; None if there is one."""
    return "there is no function that could be recorded" if problem.analysis is None else problem.analysis.reason


def by_cut(
    problem: Problem,
    find: Callable[[BatchFlow, Sequence[int]], Cut | None],
    jacobians: Callable[[Graph, Cut, Sequence[Tensor]], tuple[tuple[Tensor, ...], ...]],
    otherwise: SeedKind,
) -> Compute:
    """Return the function that records func, cuts its graph and computes by the cut.

    Args:
        problem: what is computed.
        find: cuts the graph of a call; None where its way does not apply.
        jacobians: of a graph, its cut and the leaves.
        otherwise: the seeds that are pulled where there is no cut.
    """
    batched = [leaf.batched for leaf in problem.leaves]
    cutter = RecordAndCut(problem.fn, problem.inputs, batched, problem.batch, find, problem.differentiable)
    fallback = ReverseMode(otherwise)

    def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        recording, cut = cutter(leaves, kwargs)
        if cut is None or recording.graph is None:
            # another branch than the one that was planned for: what was recorded is still a graph of autograd's
            pullback = Pullback.of_graph(recording.values, recording.inputs, problem.differentiable)
            return fallback.of_graph(problem, pullback)
        values = recording.values if problem.differentiable else tuple(y.detach() for y in recording.values)
        graph = recording.graph
        # its graph of autograd is not needed any more
        del recording
        return Result(values, jacobians(graph, cut, leaves))

    return compute
