"""Preparing a method to serve calls: with func's aux, and with the side effects of a plain call."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.core.call import CallLayout
from autojac.core.freed_memory import keep_freed_memory
from autojac.core.keywords import Keywords
from autojac.core.sandbox import Sandbox, without_graph
from autojac.core.structure import DRAWS_ALIKE, KEEPS, UPDATES_BUFFERS
from autojac.guards.assignments import Snapshot, leaving
from autojac.methods.base import Method
from autojac.problem.empty_events import with_empty_parts
from autojac.problem.problem import Compute, Problem, Result
from autojac.problem.randomness import restore_draws
from autojac.replay.replayer import Replayer
from autojac.torch_internals import pytree


def prepare_compute(layout: CallLayout, problem: Problem, method: Method) -> Compute:
    """Prepare a method for a whole problem, parts without elements and aux included."""
    keep_freed_memory()
    compute = _with_aux(layout, problem, with_empty_parts(problem, method.prepare_call), method.runs_func_plainly)
    effects = problem.structure.effects
    if UPDATES_BUFFERS in effects:
        return compute  # func runs as it is, and once
    if DRAWS_ALIKE in effects or KEEPS in effects:
        compute = restore_draws(compute, problem.generators)
        return leaving(compute, problem.places, functools.partial(_call_plainly, layout, KEEPS in effects))
    return compute


def leave_no_graph(compute: Compute, problem: Problem, sandbox: Sandbox) -> Compute:
    """Detach what func writes or sets in each call, as a call of func without a graph leaves it."""
    writes = sandbox.written or UPDATES_BUFFERS in problem.structure.effects
    if not writes or problem.differentiable or isinstance(compute, Replayer):
        return compute

    def compute_and_detach(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        plain = [tensor for tensor in sandbox.written if not tensor.requires_grad]
        snapshot = Snapshot(sandbox.kept)
        try:
            return compute(leaves, kwargs)
        finally:
            without_graph(plain)
            snapshot.without_graph()

    return compute_and_detach


def _call_plainly(layout: CallLayout, keeps: bool, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> None:
    """Call func for its side effects."""
    with torch.set_grad_enabled(keeps and torch.is_grad_enabled()):
        layout.fn(leaves, kwargs)


def _with_aux(layout: CallLayout, problem: Problem, compute: Compute, plain: bool) -> Compute:
    """Add to each result what func returned as aux.

    Args:
        layout: tells how func returns it.
        problem, compute: what is computed.
        plain: whether func runs once and as it is. If not, it sees a transform's tensors, and runs once more.
    """
    if not layout.returns_more:
        return compute

    def compute_with_aux(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        collector: list[Any] = []
        with_collector = Keywords.of(kwargs, aux=collector)
        result = compute(leaves, with_collector if plain else kwargs)
        if not plain:
            with torch.set_grad_enabled(problem.differentiable):
                layout.fn(leaves, with_collector)
        aux, rest = collector[-1]
        aux = aux if problem.differentiable else pytree.tree_map_only(Tensor, Tensor.detach, aux)
        return result._replace(aux=aux, rest=tuple(rest))

    return compute_with_aux
