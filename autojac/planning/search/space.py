"""The candidates of a search, and the same set as a conditional space for Optuna."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autojac.autodiff.zero_tangents import is_compiler_loaded
from autojac.methods.base import Method, registry
from autojac.methods.batch_chunk import BatchChunk
from autojac.methods.compiled import Compiled
from autojac.methods.per_sample import PerSample
from autojac.methods.pull import Pull
from autojac.methods.replay import Replay
from autojac.methods.threads import Threads
from autojac.planning.search.corrections import correction_kind
from autojac.problem.problem import Problem

DEPTHS = {"estimate": 0, "quick": 0, "measure": 1, "exhaustive": 2}
HOPELESS = 30.0
"""Candidates predicted this many times slower than the best are not run, except in an exhaustive search."""

Pick = Callable[[str, Sequence[Any]], Any]


def candidates(problem: Problem, depth: int) -> list[Method]:
    """List every supported method with the settings worth timing, the most promising first."""
    methods: dict[Method, None] = {}
    for kind in registry().values():
        for method in kind.candidates(problem, depth):
            if method.unsupported(problem) is None:
                methods.setdefault(method)
    return sorted(methods, key=lambda method: predicted_seconds(problem, method))


def predicted_seconds(problem: Problem, method: Method) -> float:
    """Return the seconds of a method by the cost model, corrected by what methods of its kind took before."""
    return method.cost(problem) * problem.machine.correction(correction_kind(method.spec()))


def default_methods(problem: Problem) -> list[Method]:
    """List what a torch user would write: `vmap(jacrev)`, and the plain loop of VJPs where that is wrong or fails."""
    methods = [PerSample("reverse"), Pull.suiting(problem, "loop")]
    return [method for method in methods if method.unsupported(problem) is None]


def hopeless(problem: Problem, methods: Sequence[Method]) -> set[Method]:
    """Return the methods that are predicted to be too slow to be worth one run; a replay is one if its method is."""
    costs = {method: predicted_seconds(problem, without_replay(method)) for method in methods}
    best = min(costs.values(), default=0.0)
    return {method for method, cost in costs.items() if cost > HOPELESS * best}


def without_replay(method: Method) -> Method:
    """Return the method without its recording."""
    inner = getattr(method, "inner", None)
    if inner is None:
        return method
    if method.makes_flat_programs:
        return without_replay(inner)
    around: Any = method
    replaced: Method = dataclasses.replace(around, inner=without_replay(inner))
    return replaced


def of_one_chunk(method: Method) -> Method:
    """Return what a method does to each chunk of the batch."""
    return method.inner if isinstance(method, BatchChunk) else method


def has_threads(method: Method) -> bool:
    """Check whether a method sets torch's number of threads, for the batch or for each chunk of it."""
    return with_all_threads(method) != method


def with_all_threads(method: Method) -> Method:
    """Return the method without a number of threads of its own."""
    if isinstance(method, Threads):
        return method.inner
    return BatchChunk(method.size, with_all_threads(method.inner)) if isinstance(method, BatchChunk) else method


def waits_for_compiler(method: Method) -> bool:
    """Check whether a look at a method has to wait for torch's compiler, to be loaded or to compile."""
    return method.compiles or (method.may_load_compiler and not is_compiler_loaded())


def form_turn(method: Method, whole: float, chunked: float, sizes: Mapping[Method, int]) -> int:
    """Return in which turn a candidate for a large batch is looked at, before others that are faster on the slice.

    All samples in one pass, and chunks of the size that the cost model favors: both until it is known which is faster,
    then that one first. Chunks of other sizes after these, by powers of two.
    """
    if not isinstance(method, BatchChunk):
        return int(chunked < whole < math.inf)
    distance = abs(method.size.bit_length() - sizes[method.inner].bit_length())
    return 1 + distance if distance else int(whole < chunked < math.inf)


def with_compiler(method: Method) -> Method | None:
    """Return the method with its flat programs compiled; None if it makes none."""
    if isinstance(method, Replay):
        return Compiled(method)
    inner = getattr(method, "inner", None)
    compiled = None if inner is None else with_compiler(inner)
    if compiled is None:
        return None
    around: Any = method
    replaced: Method = dataclasses.replace(around, inner=compiled)
    return replaced


def choose(methods: Sequence[Method], pick: Pick) -> Method:
    """Narrow the candidates to one, a decision at a time, so that every path through the tree is a candidate.

    Args:
        methods: the candidates.
        pick: called with a decision's name, unique along each path, and its options.
    """
    remaining = [(method, _flat(method.spec())) for method in methods]
    path = ""
    while len(remaining) > 1:
        name = next(key for key in remaining[0][1] if len({_option(flat.get(key)) for _, flat in remaining}) > 1)
        options = list(dict.fromkeys(_option(flat.get(name)) for _, flat in remaining))
        chosen = pick(f"{path}{name}", options)
        remaining = [(method, flat) for method, flat in remaining if _option(flat.get(name)) == chosen]
        path += f"{name}={chosen} "
    return remaining[0][0]


def path_of(methods: Sequence[Method], target: Method) -> dict[str, Any]:
    """Return the decisions by which `choose` arrives at `target`."""
    flat = _flat(target.spec())
    decisions: dict[str, Any] = {}

    def pick(name: str, options: Sequence[Any]) -> Any:
        decisions[name] = _option(flat.get(name.rsplit(" ", 1)[-1]))
        return decisions[name]

    choose(methods, pick)
    return decisions


def _flat(spec: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested spec to one level: {"method": ..., "inner.method": ..., ...}."""
    flat: dict[str, Any] = {}
    for name, value in spec.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _option(value: Any) -> Any:
    """Return a field's value as an Optuna category."""
    return "all" if value is None else value
