"""Trace one run of a method: what it computes, and what a loss may pull back through that."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx

from autojac.autodiff.open_modes import levels_restored
from autojac.autodiff.pullback import pull_back
from autojac.autodiff.seeds import LASTING
from autojac.core import pytree
from autojac.core.garbage import gc_disabled
from autojac.core.keywords import Keywords
from autojac.core.sandbox import Sandbox, random_state, restore_random_state, without_hooks
from autojac.core.structure import KEEPS
from autojac.core.tensor_kinds import own_class
from autojac.errors import UnsupportedError, kind_of
from autojac.guards.captures import captures
from autojac.guards.function_state import FunctionState
from autojac.guards.process_state import ignore_warnings
from autojac.guards.run_monitor import RunMonitor
from autojac.problem.problem import Compute, Flat, Problem
from autojac.replay.passes import simplify
from autojac.replay.tape import Tape
from autojac.replay.trace import Lower, RecordedGraph, RecordedVjp, Trace, differs
from autojac.replay.write_only import leave_write_only

Prepare = Callable[[Problem], Compute]
TORCHS = ("cpu", "cuda")
"""The generators that a recording sees func draw from."""
FIXED = (bool, int, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
"""Kinds of arguments that belong to a call's signature by their value."""


def trace_method(
    problem: Problem,
    prepare: Prepare,
    function_state: FunctionState,
    leaves: Sequence[Tensor],
    kwargs: Mapping[str, Any],
    without: Iterable[str] = (),
    lower: Lower | None = None,
) -> Trace:
    """Run a method once, leaving no trace of that, and make programs of what it did.

    Args:
        problem: what it computes.
        prepare: prepares the method.
        function_state: of the problem's function.
        leaves, kwargs: the call.
        without: passes of `autojac.replay.passes` to leave out.
        lower: what to make of each program, such as compiling it.

    Raises:
        UnsupportedError: if what runs can't be told from its operators alone, with the reason.
    """
    start = time.perf_counter()
    state = function_state.present
    reason = state.guard.reason or find_unfixed_argument(kwargs) or _name_subclass(leaves, kwargs)
    if reason:
        raise UnsupportedError(reason)
    if KEEPS in problem.structure.effects:
        alone = Keywords.of(kwargs, random_state=None, aux=None)
        with _open_sandbox(state.tensors, problem), torch.no_grad():
            leave_write_only(lambda: problem.fn(leaves, alone), problem.places, function_state)
        state = function_state.present
    run = _RecordedRun(problem, state.tensors, leaves, kwargs)
    random = random_state(TORCHS)
    try:
        with _open_sandbox(run.captured, problem):
            compute = run.record(prepare)
            if function_state.cover(run.ran):
                # it may hold more tensors than were known
                return trace_method(problem, prepare, function_state, leaves, kwargs, without, lower)
            reason = run.reason or function_state.why_uncovered(run.ran)
            if reason:
                raise UnsupportedError(reason)
            before = function_state.version
            changed = function_state.refresh()
            if function_state.version != before:
                raise UnsupportedError(f"func changes what it reads as it runs: {changed or 'it exchanges a tensor'}")
            recorded, captured, count = run.finish(compute)
            simplify(recorded.graph, set(without) - {"hoist"})
    finally:
        if run.tape.draws and not problem.generators:
            # func draws now, and did not when the plan was made
            problem = dataclasses.replace(problem, generators=TORCHS)
            restore_random_state(random)
    with _open_sandbox(run.captured, problem):
        run.compare(compute)
    in_sandbox = functools.partial(_open_sandbox, run.captured, problem)
    trace = recorded.trace(captured, in_sandbox, "hoist" not in without, lower)
    trace = dataclasses.replace(trace, read=run.read)
    left = sum(node.op == "call_function" for node in recorded.graph.nodes)
    spent = 1e3 * (time.perf_counter() - start)
    function_state.traces.append(f"replay: {left} operators left of {count}, traced in {spent:.3g} ms")
    return trace


def arrange(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors of a call, flat, in the one memory layout that programs are made for."""
    if kwargs:
        leaves = [*leaves, *(value for value in pytree.tree_leaves(kwargs) if isinstance(value, Tensor))]
    return [x if x.layout != torch.strided or x.is_contiguous() else x.contiguous() for x in leaves]


def find_unfixed_argument(kwargs: Mapping[str, Any]) -> str:
    """Name a non-tensor among the arguments that may change from call to call, so that no program can hold it."""
    for value in pytree.tree_leaves(kwargs):
        if not isinstance(value, (Tensor, *FIXED)):
            return f"{kind_of(value)} among the arguments may be another in each call; pass it as a tensor"
    return ""


def _name_subclass(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> str:
    """Say which tensor among the arguments may run operators its own way, as no program does."""
    kinds = (own_class(value) for value in (*leaves, *pytree.tree_leaves(kwargs)) if isinstance(value, Tensor))
    kind = next(filter(None, kinds), "")
    return f"an argument is a {kind}, whose operators may differ from a plain tensor's" if kind else ""


@contextmanager
def _open_sandbox(captured: Sequence[Tensor], problem: Problem) -> Iterator[None]:
    """Leave random state and buffers as they were, fire no hook, and say nothing."""
    buffers = [tensor for tensor in captured if not tensor.requires_grad]
    trained = [tensor for tensor in captured if tensor.requires_grad and tensor.is_leaf]
    sandbox = Sandbox(buffers, random_state(problem.generators), problem.places, trained)
    # a parameter that autocast has converted before would be met as a stranger
    torch.clear_autocast_cache()
    with sandbox(), without_hooks(captured), levels_restored(), ignore_warnings():
        yield
    torch.clear_autocast_cache()


class _RecordedRun:
    """A run of the method on tensors of its own: an argument may be passed twice, or be captured as well."""

    def __init__(
        self, problem: Problem, captured: Sequence[Tensor], leaves: Sequence[Tensor], kwargs: Mapping[str, Any]
    ) -> None:
        self.problem = problem
        self.captured = tuple(captured)
        self.given = [x.detach().requires_grad_(x.requires_grad) for x in arrange(leaves, kwargs)]
        self.leaves = self.given[: len(leaves)]
        rest = iter(self.given[len(leaves) :])
        # func runs once, so it starts from the random state that the call does
        alone = Keywords.of(kwargs, random_state=None, aux=None)
        self.kwargs = pytree.tree_map_only(Tensor, lambda _: next(rest), alone)
        self.tape = Tape(self.given, self.captured, problem.memory_limit, not problem.structure.effects)
        self.outputs: list[Tensor] = []
        self.values = 0
        self.sources: list[Tensor] = []
        self.pulls: list[RecordedVjp] = []
        self.ran: tuple[CodeType, ...] = ()
        self.reason = ""

    def record(self, prepare: Prepare) -> Compute:
        """Prepare the method and run it, and pull back through the result.

        Then `ran` is func's code that ran, and `reason` says why the run can't be told from its operators.
        """
        evaluations: list[None] = []
        compute = prepare(dataclasses.replace(self.problem, fn=_count_evaluations(self.problem.fn, evaluations)))
        with gc_disabled(), RunMonitor() as monitor, self.tape:
            result = compute(self.leaves, self.kwargs)
            self.outputs = result.tensors
            self.values = len(result.values)
        if self.problem.differentiable:
            self._pull()
        self.tape.finish()
        reason = monitor.reason or self.tape.reason
        if self.problem.structure.draws and len(evaluations) > 1:
            reason = reason or "it evaluates func several times, each time from the same random state"
        if monitor.repeated and self.tape.draws:
            reason = reason or "it draws random numbers again from an earlier state, as checkpointing does"
        self.ran, self.reason = monitor.ran, reason
        return compute

    @property
    def read(self) -> tuple[tuple[int, Tensor], ...]:
        """Captured tensors whose values Python has read: where each stands among them, and its values."""
        return tuple(
            (place, self.tape.read[id(tensor)])
            for place, tensor in enumerate(self.captured)
            if id(tensor) in self.tape.read
        )

    def _pull(self) -> None:
        """Record VJPs of Jacobians and of values separately: most losses look at one of them only."""
        self.sources = [t for t in (*self.given, *self.captured) if t.requires_grad and self.tape.knows(t)]
        if any(tensor.grad_fn is not None for tensor in self.sources):
            raise UnsupportedError("func holds a tensor that was computed from others which require grad")
        for group in (range(self.values, len(self.outputs)), range(self.values)):
            places = tuple(place for place in group if self.outputs[place].requires_grad)
            if places and self.sources:
                cotangents = tuple(torch.ones_like(self.outputs[place]) for place in places)
                self.tape.phase += 1
                for cotangent in cotangents:
                    self.tape.give(cotangent)
                with self.tape:
                    gradients = pull_back([self.outputs[place] for place in places], self.sources, cotangents)
                self.pulls.append(RecordedVjp(places, cotangents, tuple(gradients)))

    def compare(self, compute: Compute) -> None:
        """Require that the recorded run gave what an unrecorded one gives: some code takes another way."""
        for one, other in zip(self.outputs, compute(self.leaves, self.kwargs).tensors, strict=True):
            if differs(one, other):
                raise UnsupportedError("it gives something else when it is recorded than when it is not")

    def finish(self, compute: Compute) -> tuple[RecordedGraph, list[int], int]:
        """Return what was recorded, where its captured tensors stand, and how many operators ran."""
        graph, place_of = self.tape.graph, {id(t): place for place, t in enumerate(self.captured)}
        ends = [*self.outputs, *(g for pull in self.pulls for g in pull.gradients if g is not None)]
        output = graph.output(tuple(self.tape.node(tensor) for tensor in ends))
        output.meta = {"role": "output", "order": len(graph.nodes), "writes": frozenset(), "draws": False}
        captured = [node.meta["value"] for node in graph.nodes if node.meta["role"] == "captured"]
        unknown = [node for node in graph.nodes if node.meta["role"] == "unknown"]
        if unknown:
            self._take_constants(unknown, compute)
        inputs = [(self.tape.node(tensor), tensor) for tensor in (*self.given, *captured)]
        cotangents = [[self.tape.node(c) for c in pull.cotangents] for pull in self.pulls]
        position = {id(tensor): place for place, (_, tensor) in enumerate(inputs)}
        sources = [position[id(tensor)] for tensor in self.sources]
        count = sum(node.op == "call_function" for node in graph.nodes)
        recorded = RecordedGraph(graph, inputs, self.outputs, self.pulls, cotangents, sources)
        return recorded, [place_of[id(tensor)] for tensor in captured], count

    def _take_constants(self, nodes: Sequence[fx.Node], compute: Compute) -> None:
        """Take tensors that no operator has made for constants of the method, or refuse those of unknown origin."""
        assert self.problem.function_state is not None
        # what func reaches is known already, and may be as much as a whole program
        known = {id(tensor) for tensor in captures(compute, without=(self.problem.function_state.func,)).tensors}
        for node in nodes:
            value: Tensor = node.meta["value"]
            if id(value) not in known and not hasattr(value, LASTING):
                raise UnsupportedError(
                    f"it reads a tensor of shape {tuple(value.shape)} that is not reachable from func's closures, "
                    "globals or attributes"
                )
            node.meta["role"] = "constant"


def _count_evaluations(fn: Flat, evaluations: list[None]) -> Flat:
    def count_and_evaluate(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        evaluations.append(None)
        return fn(leaves, kwargs)

    return count_and_evaluate
