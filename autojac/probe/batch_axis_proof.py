"""Layer 1 of the probe: what the graph of one call proves of all inputs, or shows of where samples meet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autojac.autodiff.pullback import Pullback
from autojac.graph.analysis import GraphAnalysis
from autojac.graph.backward_recorder import record_backward
from autojac.graph.batch_axis.propagation import propagate_batch_axis
from autojac.graph.recorder import record
from autojac.probe.sample_pairs import ProbePoint, cotangent_verdict


class Proof(NamedTuple):
    """What the graph of a call proves.

    Attributes:
        sound: samples are independent, whatever func is called with.
        line: for `explain`.
        meets: some operator reads several samples, so func of some samples need not be those samples of func.
        any_values: samples are independent for all values of all tensors, as long as the same operators run.
    """

    sound: bool
    line: str
    any_values: bool = False
    meets: bool = False


def prove(analysis: GraphAnalysis) -> Proof:
    """Check whether the graph proves that samples are independent."""
    flow = analysis.flow
    if flow is None:
        return Proof(False, f"proof: none, {analysis.reason}")
    if analysis.escaped:
        return Proof(False, f"proof: none, func hands its data to other code by {analysis.escaped}", meets=flow.meets)
    if flow.graph.reads_data:
        line = "proof: none, func looks at its data, so another input may take another branch"
        return Proof(False, line, meets=flow.meets)
    if analysis.batch == 1:
        line = "proof: there is one sample, and func looks at none of its data"
        return Proof(not analysis.state, line, any_values=True)
    if not flow.independent:
        return Proof(False, f"proof: none, {analysis.obstacle}", meets=flow.meets)
    line = f"proof: each of {len(flow.graph.operations)} operators keeps the samples apart, whatever their values"
    if analysis.state:
        line += f"; but {analysis.state} may change what runs, so it is checked on like an observation"
    return Proof(not analysis.state, line, any_values=True)


def backward_keeps_apart(pullback: Pullback, carriers: Sequence[bool], batch: int) -> bool:
    """Check whether the operators of one backward pass prove that a cotangent on one sample stays in it.

    What the graph has saved is constant to a pass, so this holds for all graphs on which the same operators run.

    Args:
        pullback: of a graph that exists already.
        carriers: for each input, whether axis 0 runs over samples.
        batch: how many samples there are.
    """

    def pull(cotangents: Sequence[Tensor]) -> list[Tensor]:
        gradients = pullback.pull(pullback.recorded, cotangents)
        return [gradient for gradient, carries in zip(gradients, carriers, strict=True) if carries]

    cotangents = [torch.ones_like(value, requires_grad=False) for value in pullback.recorded]
    with pullback.without_graph():
        graph = record_backward(pull, cotangents)
    if graph is None or graph.reads_data:
        return False
    return propagate_batch_axis(graph, batch, [True] * len(cotangents)).independent


def confirm(proof: Proof, analysis: GraphAnalysis, *points: ProbePoint) -> Proof:
    """Withdraw a proof unless func captures the same tensors in another call at one of these points, smaller first."""
    if not proof.any_values:
        return proof
    for point in points:
        with point.sandbox():
            again = record(point.fn, point.leaves, point.kwargs, analysis.differentiated).captured
        if all(one is other for one, other in itertools.zip_longest(analysis.captured, again)):
            return proof
    return Proof(False, "proof: none, func creates a new tensor in each call where no operator is seen")


def meet_in_shared_tensors(
    analysis: GraphAnalysis, point: ProbePoint, masks: Sequence[Tensor], name: str, generator: Any
) -> tuple[bool, str]:
    """Check by the graph and by cotangents whether samples meet in shared tensors alone; add the line for `explain`."""
    flow, pool = analysis.flow, analysis.read_pool
    if flow is None:
        return False, f"statistics: none found, {analysis.reason}"
    if pool is None:
        return False, f"statistics: not alone, {analysis.obstacle}"
    least = analysis.least_pool or pool
    rows = sum(math.prod(flow.graph.shapes[y]) for y in flow.graph.outputs)
    names = analysis.meeting_place
    if min(pool.size, least.size) >= rows:
        return False, f"statistics: no gain, as many shared numbers as rows of the Jacobian ({names})"
    with point.sandbox():
        recording = record(point.fn, point.leaves, point.kwargs, analysis.differentiated)
        graph = recording.graph
        if graph is None or graph.key != flow.graph.key:
            return False, "statistics: not alone, func runs other operators from call to call"
        base = dict(zip(graph.inputs, point.leaves, strict=True))
        shared = (*pool.tensors, *pool.without_derivative)
        values = graph.run(shared, base)
        tensors = base | {number: value.detach() for number, value in zip(shared, values, strict=True)}
        # differentiated or not: copies of weights must be apart whatever comes with the samples
        carriers = [p for p in (*point.inputs, *point.sides) if point.leaves[p].is_floating_point()]
        local = pool.as_function_of(graph, tensors, [graph.inputs[p] for p in carriers], copies=pool.copied is not None)
        values_read = [value.detach() for value in graph.run((*pool.weights, *pool.tensors), tensors)]
        copy_count = (
            len(values_read) if pool.copied is not None else len(pool.weights) if pool.weights_only is not None else 0
        )
        copies = [value.expand(point.batch, *value.shape) for value in values_read[:copy_count]]
        xs = [*(point.leaves[p] for p in carriers), *copies]
        pullback = Pullback(lambda *own: local(*own, *values_read[copy_count:]), xs, differentiable=False)
        verdict = cotangent_verdict(pullback, [True] * len(xs), masks, name, generator)
    if verdict.coupled:
        return False, "statistics: not alone, samples also reach each other outside the shared tensors"
    line = f"statistics: samples meet in {pool.size} shared numbers alone: {names}; given these, none reaches another"
    return True, f"{line} ({name})"
