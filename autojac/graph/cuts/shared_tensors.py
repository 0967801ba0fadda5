"""Tensors through which samples reach each other, and what is left of a function when these are given."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from autojac.graph.batch_axis.propagation import BatchFlow, propagate_batch_axis
from autojac.graph.batch_axis.states import SHARED, BatchAxis
from autojac.graph.cuts.minimum_cut import MOST_NODES, differentiable_paths, edges, minimum_cut
from autojac.graph.cuts.per_sample_copies import PerSampleForm, per_sample_form
from autojac.graph.ir import Graph


@dataclass(frozen=True)
class SharedTensors:
    """Tensors through which samples reach each other.

    Attributes:
        tensors: their numbers; each holds what all samples share.
        without_derivative: shared tensors that are read too, but that no derivative runs through.
        weights: what is read of differentiated inputs without a batch: no sample stands behind these.
        size: elements of all `tensors`.
        copied, weights_only: the operators along the batch that read `tensors` or `weights`, and those that read
            `weights`, by position, each with its form that takes one copy per sample; None if some operator has no
            such form.
    """

    tensors: tuple[int, ...]
    without_derivative: tuple[int, ...]
    weights: tuple[int, ...]
    size: int
    copied: Mapping[int, PerSampleForm] | None
    weights_only: Mapping[int, PerSampleForm] | None

    def as_function_of(
        self, graph: Graph, base: Mapping[int, Tensor], inputs: Sequence[int], copies: bool
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Return the outputs as a function of some inputs, copies of `weights`, and of `tensors` or copies of these.

        Args:
            graph: of the call.
            base: the other inputs, and the values of `without_derivative`.
            inputs: numbers of the inputs that come first.
            copies: whether each sample gets its own copy (B, *shape) of `tensors` too.
        """
        forms = (self.copied if copies else self.weights_only) or {}
        special = {place: functools.partial(form, graph.operations[place]) for place, form in forms.items()}
        numbers = (*inputs, *self.weights, *self.tensors)

        def evaluate(*given: Tensor) -> tuple[Tensor, ...]:
            return graph.run(graph.outputs, {**base, **dict(zip(numbers, given, strict=True))}, special)

        return evaluate


def find_shared_tensors(flow: BatchFlow, inputs: Sequence[int], least: bool) -> SharedTensors | None:
    """Return the shared tensors that all coupling runs through; None if it runs elsewhere, or nothing is coupled.

    Args:
        flow: how the batch runs.
        inputs: numbers of the differentiated inputs.
        least: look upstream of where they are read for fewer elements.
    """
    flow = _share_weights(flow, inputs)
    if flow.lost_output:
        flow = flow.together
    graph = flow.graph
    alive = differentiable_paths(graph, inputs)
    met = _shared_tensors_met(flow, alive)
    chosen = [number for number in flow.frontier if number in met]
    without_derivative = tuple(number for number in flow.frontier if number not in alive)
    if flow.lost_output or not (chosen or without_derivative):
        return None
    weights = tuple(number for number in flow.frontier if number in alive and number not in met)
    if least and chosen and len(met) <= MOST_NODES:
        # of equal cuts the one nearest to where samples meet: a mean and a variance rather than what is made of them
        sizes = {n: math.prod(graph.shapes[n]) for n in met}
        entries = [n for n in met if not met.issuperset(s for s in _makers(graph, n) if s in alive)]
        chosen = minimum_cut(edges(graph, met), sizes, entries, chosen, nearest="sources") or chosen
    if any(graph.dtypes[number].is_complex for number in (*chosen, *weights)):
        return None  # their elements are not what is counted
    at_frontier = set(chosen) <= set(flow.frontier)
    return SharedTensors(
        tuple(chosen),
        without_derivative,
        weights,
        sum(math.prod(graph.shapes[number]) for number in chosen),
        _forms(flow, (*chosen, *weights)) if at_frontier else None,
        _forms(flow, weights),
    )


def _share_weights(flow: BatchFlow, inputs: Sequence[int]) -> BatchFlow:
    """Return the flow in which differentiated inputs without a batch are tensors that samples share."""
    weights = [number for number in inputs if flow.states[number] is None]
    if not weights:
        return flow
    batched = [isinstance(flow.states[number], BatchAxis) for number in flow.graph.inputs]
    return propagate_batch_axis(flow.graph, flow.batch, batched, weights)


def _shared_tensors_met(flow: BatchFlow, alive: Collection[int]) -> set[int]:
    """Return the shared tensors that a derivative reaches by way of tensors along the batch."""
    found: set[int] = set()
    for operation in flow.graph.operations:
        for source in operation.sources:
            if source in found or (source in alive and isinstance(flow.states.get(source), BatchAxis)):
                found.update(n for n in operation.results if n in alive and flow.states.get(n) == SHARED)
    return found


def _makers(graph: Graph, number: int) -> Sequence[int]:
    return graph.operations[graph.producers[number]].sources


def _forms(flow: BatchFlow, tensors: Collection[int]) -> dict[int, PerSampleForm] | None:
    """Return for each operator along the batch that reads some of the tensors its form that takes copies."""
    found = {}
    for place, operation in enumerate(flow.graph.operations):
        along = any(isinstance(flow.states.get(y), BatchAxis) for y in operation.results)
        if along and not set(tensors).isdisjoint(operation.sources):
            form = per_sample_form(flow, operation, tensors)
            if form is None:
                return None
            found[place] = form
    return found
