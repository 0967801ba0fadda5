"""Serve calls of a traced method: replay it while nothing that it read has changed, and trace it again otherwise."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff.program_function import Programs, by_programs
from autojac.core.autocast import outside_autocast
from autojac.errors import UnsupportedError
from autojac.guards.function_state import MOST_STATES, FunctionState
from autojac.problem.problem import Compute, Problem, Result
from autojac.replay.bound_trace import BoundTrace
from autojac.replay.codegen import work_of
from autojac.replay.hoisting import hoisted_inputs
from autojac.replay.outcomes import OtherOutcomeError, Score, same_values
from autojac.replay.trace import Lower, Trace
from autojac.replay.tracer import Prepare, arrange, find_unfixed_argument, trace_method
from autojac.torch_internals import dispatch_modes, function_modes

MOST_TRACES = 8
CALLS_A_TRACE = 200
"""Past `MOST_TRACES` one more for so many calls: what changes all the time is not worth tracing."""


@dataclass
class Replayer:
    """What `Replay` prepares: serves calls by a trace, or by the method itself where there can be none.

    Attributes:
        problem: what is computed.
        prepare_recorded: prepares the method as it is recorded.
        prepare_eager: prepares it as it serves calls itself.
        function_state: of the problem's function.
        without: passes to leave out.
        lower: what to make of the programs.
        threads: how many of torch's threads a program may use; all by default.
    """

    problem: Problem
    prepare_recorded: Prepare
    prepare_eager: Prepare
    function_state: FunctionState
    without: tuple[str, ...] = ()
    lower: Lower | None = None
    threads: int | None = None
    bound: BoundTrace | None = None
    traces: int = 0
    _known: dict[int, BoundTrace] = field(default_factory=dict, repr=False)
    _refused: set[int] = field(default_factory=set, repr=False)
    calls: int = 0
    _score: Score = field(default_factory=Score, repr=False)
    _eager: Compute | None = field(default=None, repr=False)

    def __call__(self, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        result = self.replay(leaves, kwargs)
        return self.eager(leaves, kwargs) if result is None else result

    def replay(self, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result | None:
        """Run the program; return None, and func was not run yet, where only the method itself can serve the call."""
        if function_modes() or dispatch_modes():
            # a mode of the caller's sees each function or operator: another default device, a counter of flops
            return None
        bound = self._unchanged_trace or self._refresh(leaves, kwargs)
        if bound is None:
            return None
        if kwargs or len(leaves) > 1 or not leaves[0].is_contiguous():
            given: Sequence[Tensor] = arrange(leaves, kwargs)
            if kwargs and (len(given) != bound.argument_count or find_unfixed_argument(kwargs)):
                return None
        else:
            given = leaves
        outputs = self._run_program(bound, given, leaves, kwargs)
        if outputs is not None:
            return self.result(outputs)
        if self._score.missed:
            self._miss(bound)
        return None

    def try_replay(self, leaves: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Return the outputs for contiguous tensors, values first; None where the whole call has to be made.

        The caller has seen that no dispatch mode is on: it shows in how tensors dispatch.
        """
        bound = self.bound
        if bound is None or bound.version != self.function_state.version or function_modes():
            return None
        if not bound.is_unchanged():
            return None
        if bound.trace.pulls or bound.read or self.threads is not None:
            return self._run_program(bound, leaves, leaves, {}) if bound.reads_the_same else None
        # the same without calls in between, which small programs would feel
        self.calls += 1
        try:
            return bound.trace.forward(*leaves, *(bound.captured if bound.hoisted is None else bound.hoisted()))
        except Exception as error:
            self._note_break(error)
            return None

    @property
    def program(self) -> Hashable | None:
        """What tells its programs from those of other methods by the work they do; None where nothing does."""
        if self.bound is None:
            return None
        trace = self.bound.trace
        runs = [trace.forward, *(pull.run for pull in trace.pulls)]
        if trace.hoist is not None:
            runs += filter(None, (trace.hoist.views, trace.hoist.results))
        works = tuple(map(work_of, runs))
        return None if None in works else (self.threads, *works)

    def needs_retrace(self) -> bool:
        """Check whether the next call will be traced: func reads something that it has not been traced with before."""
        if self._unchanged_trace is not None:
            return False
        if function_modes() or dispatch_modes():
            # nothing is traced, nor looked at more closely, while a caller's mode would see that
            return self.bound is not None
        if self._is_past_limit:
            return False
        number = self.function_state.settle().number
        known = self._known.get(number)
        return (known is None or not known.reads_the_same) and number not in self._refused

    def has_strayed(self) -> bool:
        """Check, once, whether the last call took another way than the recorded one, which is to be looked into."""
        strayed, self._score.strayed = self._score.strayed, False
        return strayed

    @property
    def _unchanged_trace(self) -> BoundTrace | None:
        """The bound trace, while what func reads is as it was traced; None otherwise."""
        bound = self.bound
        if bound is None or bound.version != self.function_state.version or not bound.is_unchanged():
            return None
        return bound if bound.reads_the_same else None

    @property
    def _is_past_limit(self) -> bool:
        """Whether func has been traced so often that this call must do without a new trace."""
        if self.calls < self._score.rests_until:
            return True
        return self.traces >= MOST_TRACES and self.calls < CALLS_A_TRACE * (self.traces - MOST_TRACES + 1)

    def result(self, outputs: Sequence[Tensor]) -> Result:
        """Return flat outputs as values and Jacobians."""
        if len(outputs) == 2:
            return Result((outputs[0],), ((outputs[1],),))
        step = len(self.problem.inputs)
        values = len(outputs) // (step + 1)
        rows = tuple(tuple(outputs[at : at + step]) for at in range(values, len(outputs), step))
        return Result(tuple(outputs[:values]), rows)

    def _run_program(
        self, bound: BoundTrace, given: Sequence[Tensor], leaves: Sequence[Tensor], kwargs: Mapping[str, Any]
    ) -> Sequence[Tensor] | None:
        """Run the program; return None where an operator raises, or where Python would take another way."""
        self.calls += 1
        before = None
        try:
            if self.threads is not None:
                before = torch.get_num_threads()
                torch.set_num_threads(self.threads)
            if bound.trace.pulls:
                return self._connect(bound, given, leaves, kwargs)
            return bound.trace.forward(*given, *(bound.captured if bound.hoisted is None else bound.hoisted()))
        except Exception as error:
            self._note_break(error)
            return None
        finally:
            if before is not None:
                torch.set_num_threads(before)

    def _note_break(self, error: Exception) -> None:
        """Note that a run of the program broke off, or raise its error where func can't be run in its place."""
        if isinstance(error, OtherOutcomeError):
            self._score.missed = True
            self.calls -= 1  # it counts where its whole call is made
        elif self.problem.structure.effects:
            raise error
        # else func may catch what an operator raises, and take another way

    def _miss(self, bound: BoundTrace) -> None:
        """Count a call for which the trace did not hold; after several of them it is given up for a while."""
        with self.function_state.lock:
            self.calls += 1
            if self._score.miss(self.calls, CALLS_A_TRACE) and self.bound is bound:
                self.bound = None
                self._known.pop(bound.state, None)
                self.function_state.traces.append(
                    "replay: given up for a while, since values that Python reads of tensors decide, and differ too "
                    "often from those of the recorded call"
                )

    def _connect(
        self, bound: BoundTrace, given: Sequence[Tensor], leaves: Sequence[Tensor], kwargs: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        """Run the program so that autograd can differentiate its outputs."""
        trace, function_state = bound.trace, self.function_state
        inputs = (*given, *bound.captured)

        def recompute() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            state = function_state.settle()
            captured = [state.tensors[place] for place in trace.captured]
            if bound.state != state.number or not all(map(operator.is_, captured, bound.captured)):
                raise UnsupportedError(
                    "func has changed since its Jacobian was taken, so no derivative of the backward through that can "
                    "be had. Differentiate twice before changing what func reads"
                )
            with torch.enable_grad(), outside_autocast():
                result = self.eager(leaves, kwargs)
            return result.tensors, inputs

        programs = Programs(trace.forward, trace.outputs, trace.constant, trace.pulls, recompute)
        return by_programs(programs, inputs)

    @property
    def eager(self) -> Compute:
        """The method itself, without replay."""
        if self._eager is None:
            self._eager = self.prepare_eager(self.problem)
        return self._eager

    def _refresh(self, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> BoundTrace | None:
        """Bind a trace, a new one if need be, to func's current state; None where there can't be one, or not yet."""
        function_state = self.function_state
        with function_state.lock:
            state = function_state.settle()
            known = self._known.get(state.number)
            if known is not None and all(same_values(state.tensors[at], values) for at, values in known.trace.read):
                trace: Trace | None = known.trace
            else:
                trace = self._try_trace(state.number, leaves, kwargs)
                state = function_state.settle()
            if trace is None:
                self.bound = None
                return None
            read = tuple((state.tensors[place], values) for place, values in trace.read)
            captured = tuple(state.tensors[place] for place in trace.captured)
            count = len(arrange(leaves, kwargs))
            hoisted = None if trace.hoist is None else hoisted_inputs(trace.hoist, captured)
            self.bound = BoundTrace(
                trace, captured, count, function_state.version, state.number, state.guard.is_unchanged, read, hoisted
            )
            self._known[state.number] = self.bound
            for number in sorted(self._known)[:-MOST_STATES]:
                del self._known[number]
            return self.bound

    def _try_trace(self, state: int, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Trace | None:
        if self._is_past_limit or state in self._refused:
            self.calls += 1
            return None
        self.traces += 1
        try:
            return trace_method(
                self.problem, self.prepare_recorded, self.function_state, leaves, kwargs, self.without, self.lower
            )
        except Exception as error:
            self._refused.add(state)
            if self.problem.trial:
                raise
            self.function_state.traces.append(f"replay: not possible, {error}")
            return None
