"""Predicted seconds of what methods are made of, from the graph's work and the machine's constants; chunks that fit."""

from __future__ import annotations

from autojac.problem.problem import Problem

SETUP_OPERATORS = 12
"""Operators besides func's own: seeds are made, and rows are put together."""
TRANSFORM_OPERATORS = 4
"""What a transform of torch.func costs by itself, in operators under vmap."""
PASS_OPERATORS = 8
"""Operators of each pass by itself: its seed is made, and its rows are taken."""
DUAL_WORK = 3
"""What an operator on dual numbers computes, in plain operators."""
RECORDED_OPERATORS = 10
"""What watching an operator and looking its graph up takes, in operators."""
RESULT_MOVES = 3
"""How often the entries of a Jacobian are read or written when its rows are put together."""
WORKSPACE_MARGIN = 2
"""How much more than a chunk's own seeds a chunk is allowed for when chunk sizes are proposed."""


def assembly_cost(problem: Problem) -> float:
    """Predict the seconds of making seeds, and of putting the Jacobian together."""
    machine = problem.machine
    return SETUP_OPERATORS * machine.recorded_s + machine.moving(RESULT_MOVES * problem.result_bytes)


def evaluation_cost(problem: Problem) -> float:
    """Predict the seconds of one evaluation that autograd records, and of what `assembly_cost` counts."""
    machine, work = problem.machine, problem.work
    return assembly_cost(problem) + machine.recorded_s * work.operators + machine.seconds(work)


def cutting_cost(problem: Problem) -> float:
    """Predict the seconds of one call whose operators are recorded for its graph to be cut, and of what follows it."""
    work = problem.work
    return evaluation_cost(problem) + RECORDED_OPERATORS * problem.machine.recorded_s * work.operators


def pull_cost(problem: Problem, count: int, step: int, engine: str) -> float:
    """Predict the seconds of `count` VJPs, `step` at a time, through what was recorded."""
    machine, work = problem.machine, problem.work
    passes = -(-count // max(step, 1))
    if engine == "loop":
        return count * (machine.pulled_s * (work.operators + PASS_OPERATORS) + machine.seconds(work))
    host = passes * work.operators + TRANSFORM_OPERATORS * (engine == "vmap")
    return host * machine.batched_s + count / step * machine.seconds(work, step)


def push_cost(problem: Problem, count: int, step: int, engine: str) -> float:
    """Predict the seconds of `count` JVPs, `step` at a time: each pass evaluates func again, on dual numbers."""
    machine, work = problem.machine, problem.work
    passes = -(-count // max(step, 1))
    if engine == "loop":
        return count * (machine.dual_s * work.operators + DUAL_WORK * machine.seconds(work))
    host = passes * (work.operators * (machine.dual_s + TRANSFORM_OPERATORS * machine.batched_s))
    return host + passes * machine.seconds(work) + count / step * machine.seconds(work, step)


def largest_move(problem: Problem) -> float:
    """Predict how many bytes a single operator of any method moves at most: one that takes all seeds in one pass."""
    apart = problem.structure.independent and not problem.shared_input
    count = max(problem.in_size, problem.out_size) * (1 if apart else problem.batch)
    return max(count * 2.0 ** max(problem.work.moved, default=0), RESULT_MOVES * problem.result_bytes)


def chunk_sizes(problem: Problem, count: int, depth: int) -> list[int | None]:
    """Return chunks worth trying for `count` seeds: all in one pass, and powers of four below, as memory allows."""
    room = problem.memory_limit - problem.result_bytes
    sizes = [
        size for size in (4, 16, 64, 256, 1024) if size < count and WORKSPACE_MARGIN * problem.seed_bytes * size < room
    ]
    return [None, *sizes] if depth else [None, *sizes[-2:]]
