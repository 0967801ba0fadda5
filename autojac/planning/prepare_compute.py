"""A method made ready to serve calls: with what func returns as aux, and with what a plain call leaves behind."""

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
    """Make a method ready for a whole problem, parts without elements and aux included."""
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
    """Detach what func writes or sets after each call, as a call of func leaves it that records no graph."""
    writes = sandbox.written or UPDATES_BUFFERS in problem.structure.effects
    if not writes or problem.differentiable or isinstance(compute, Replayer):
        return compute

    def compute_and_detach(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        plain = [tensor for tensor in sandbox.written if not tensor.requires_grad]
        held = Snapshot(sandbox.kept)
        try:
            return compute(leaves, kwargs)
        finally:
            without_graph(plain)
            held.without_graph()

    return compute_and_detach


def _call_plainly(layout: CallLayout, keeps: bool, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> None:
    """Call func for what it leaves behind."""
    with torch.set_grad_enabled(keeps and torch.is_grad_enabled()):
        layout.fn(leaves, kwargs)


def _with_aux(layout: CallLayout, problem: Problem, compute: Compute, plain: bool) -> Compute:
    """Add to each result what func returned as aux.

    Args:
        layout: knows how func returns it.
        problem, compute: what is computed.
        plain: whether func runs once and as it is. If not, it sees tensors that stand for others, and runs once more.
    """
    if not layout.returns_more:
        return compute

    def compute_with_aux(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        collected: list[Any] = []
        collecting = Keywords.of(kwargs, aux=collected)
        result = compute(leaves, collecting if plain else kwargs)
        if not plain:
            with torch.set_grad_enabled(problem.differentiable):
                layout.fn(leaves, collecting)
        aux, rest = collected[-1]
        aux = aux if problem.differentiable else pytree.tree_map_only(Tensor, Tensor.detach, aux)
        return result._replace(aux=aux, rest=tuple(rest))

    return compute_with_aux
