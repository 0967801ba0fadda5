"""The steps of a race and how long they will take: known in advance, so that calls can pay for a step before it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from autojac.autodiff.primitives import load_forward_rules
from autojac.methods.base import Method, Wrapper
from autojac.methods.batch_chunk import BatchChunk
from autojac.planning.search.finals import CLEAR_ROUNDS, ENOUGH_ROUNDS
from autojac.planning.search.looks import MUCH_FASTER
from autojac.planning.search.space import of_one_chunk, waits_for_compiler
from autojac.planning.search.trial import BLOCKS, SHORTEST_S, SearchSession
from autojac.problem.machine import DEFAULT, Machine
from autojac.replay.replayer import Replayer
from autojac.replay.tape import MOST_OPERATORS
from autojac.torch_internals import load_compiler

COUNTING = Machine(1.0, 1.0, 1.0, 1.0, 1.0, rates=(math.inf,) * 3, flops_per_s=math.inf)
"""A machine that takes a second for each operator, however large: what a method takes on it counts its operators."""
LOOK_S, RECORD_S, RECORD_OPERATOR_S, RECORD_RUNS = 0.02, 0.1, 5e-4, 5
"""Seconds of a look besides its runs; of a recording, for each of its operators, and how many runs it is worth."""
FORWARD_S = 0.3
"""Seconds that the first transform of forward mode adds, for which torch loads its rules."""
FORWARD = " forward"
"""Ends the kinds of steps that need these rules."""
LOAD_S = 1.5
"""Seconds in which torch loads its compiler, once per process."""
COMPILE_S, COMPILE_OPERATOR_S = 4.0, 0.05
"""Seconds of compiling a program, and for each of its operators, where Python is as fast as `DEFAULT` has it."""
RUN_S = 0.01
"""Seconds of each other step besides the runs that it times."""
LOOK_RUNS, MEMORY_RUNS, FIRST_CALL_RUNS = 8, 4, 6
"""Runs of a look, with its reference and its check; of a measured peak; and of the first call by another plan."""
DUEL_ROUNDS = 2
"""Rounds of a duel besides those that are compared: to determine the block size, and to check both."""
FIRST_ROUND = 3
"""How many times as long as another round the first one takes."""
PRIOR_WEIGHT = 0.5
"""How much of a higher cost of earlier steps still counts after each step."""


class Step(NamedTuple):
    """One step of a race.

    Attributes:
        kind: `slice` looks at a candidate on a slice of the batch, `look` on the batch; `longer` times it again,
            `memory` measures its peak, `round` compares the last few once, `duel` compares one with the plan in use,
            and `adopt` puts one in its place.
        method: the candidate; None for a round.
    """

    kind: Literal["slice", "look", "longer", "memory", "round", "duel", "adopt"]
    method: Method | None = None

    @property
    def compiles(self) -> bool:
        """Whether it waits for a compiler, to be loaded or to compile."""
        return self.kind == "look" and self.method is not None and waits_for_compiler(self.method)

    def load(self) -> None:
        """Load what a process loads once: it is no part of a candidate's time."""
        if self.costs_like == "load":
            load_compiler()
        elif self.costs_like.endswith(FORWARD):
            load_forward_rules()

    @property
    def costs_like(self) -> str:
        """The kind of steps that cost about as many times what the model says."""
        if self.method is None or self.kind not in ("look", "slice"):
            return self.kind
        if self.compiles:
            return "compile" if self.method.compiles else "load"
        return ("record" if _records(self.method) else "look") + FORWARD * _loads_rules(self.method)


class StepCosts:
    """The time of steps as a multiple of the model's: 1, then that of the most expensive recent step of the kind."""

    def __init__(self) -> None:
        self._times: dict[str, float] = {}

    def expected_s(self, step: Step, model_s: float) -> float:
        """Return the seconds that a step will hardly exceed, by what the model says and the steps so far."""
        return self._times.get(step.costs_like, 1.0) * model_s

    def note(self, step: Step, model_s: float, seconds: float) -> None:
        """Learn what a step took."""
        times = max(seconds, 0.0) / model_s
        before = self._times.get(step.costs_like, 1.0)
        self._times[step.costs_like] = max(times, times + PRIOR_WEIGHT * (before - times))


def step_seconds(step: Step, session: SearchSession, runs: Sequence[float], first: bool = False) -> float:
    """Return what the model says that a step takes.

    Args:
        step: the step.
        session: where it is made.
        runs: seconds per call of each method that it runs.
        first: whether it is the first one of several rounds.
    """
    total, method = sum(runs), step.method
    shortest = 2 * SHORTEST_S[session.effort]  # blocks double until they last that long
    blocks = sum(max(seconds, shortest) for seconds in runs)
    if step.kind == "round":
        return RUN_S + blocks * (FIRST_ROUND if first else 1)
    assert method is not None
    if step.kind == "memory":
        return RUN_S + MEMORY_RUNS * total
    if step.kind == "longer":
        return RUN_S + (BLOCKS + 2) * blocks
    if step.kind == "duel":
        rounds = CLEAR_ROUNDS if min(runs) < MUCH_FASTER * max(runs) else ENOUGH_ROUNDS
        return RUN_S + (rounds + DUEL_ROUNDS) * blocks
    count = operators(session, method)
    if step.costs_like == "compile":
        slower = session.problem.machine.batched_s / DEFAULT.batched_s  # compilers and transforms are work of Python
        return slower * (COMPILE_S + COMPILE_OPERATOR_S * count)
    preparation = RECORD_S + RECORD_OPERATOR_S * count if _records(method) else LOOK_S
    if step.kind == "adopt":
        return preparation + FIRST_CALL_RUNS * total
    if _records(method):
        chunks = math.ceil(session.problem.batch / method.size) if isinstance(method, BatchChunk) else 1
        preparation += RECORD_RUNS * total / chunks
    return preparation + LOOK_RUNS * total + FORWARD_S * _loads_rules(method) + LOAD_S * step.compiles


def operators(session: SearchSession, method: Method) -> float:
    """Return how many operators a method runs for one chunk of the batch, by its recorded program where there is one.

    No more than are ever recorded.
    """
    method = of_one_chunk(method)
    program = session.runs.get(method.inner) if isinstance(method, Wrapper) else None
    if isinstance(program, Replayer) and program.bound is not None and (count := program.bound.trace.operators):
        return count
    return min(method.cost(dataclasses.replace(session.problem, machine=COUNTING)), MOST_OPERATORS)


def _records(method: Method) -> bool:
    return of_one_chunk(method).makes_flat_programs


def _loads_rules(method: Method) -> bool:
    return method.pushes and method.uses_transforms
