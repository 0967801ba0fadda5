"""Which random generators func draws from, where other threads of the process may draw as well."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from autojac.core.sandbox import generators_drawn_from, random_state
from autojac.graph.operators import certain, traits
from autojac.guards.escapes import MonitoredMode

LOOKS = 4
"""Evaluations in each of which a generator that no hook shows must move."""

Evaluate = Callable[[], Any]


def generators_of_func(evaluate: Evaluate, generators: Sequence[str]) -> tuple[str, ...]:
    """Return those of the generators that func draws from itself.

    Args:
        evaluate: evaluates func.
        generators: those that moved while it was evaluated.
    """
    if not generators or threading.active_count() == 1:
        return tuple(generators)
    draws: dict[str, bool] = {}
    if "cpu" in generators or "cuda" in generators:
        draws["cpu"] = draws["cuda"] = _torch_draws(evaluate)
    if "python" in generators:
        draws["python"] = _python_draws(evaluate)
    if "numpy" in generators:
        draws["numpy"] = _numpy_draws(evaluate)
    return tuple(name for name in generators if draws[name])


class _Operators(MonitoredMode):
    """A mode that notices operators of this thread that draw from a generator of the process."""

    def __init__(self) -> None:
        super().__init__(watched=False)
        self.draw = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draws = traits(func)[2] or func.namespace not in ("aten", "prims")
        self.draw |= draws and kwargs.get("generator") is None and not certain(func, args, kwargs)
        return func(*args, **kwargs)


def _torch_draws(evaluate: Evaluate) -> bool:
    operators = _Operators()
    try:
        with operators:
            evaluate()
    except Exception:  # func can't run under a mode: then only the generator tells
        return True
    return operators.draw


def _python_draws(evaluate: Evaluate) -> bool:
    calls = []

    def note_draw(frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and getattr(function, "__self__", None) is random._inst:
            calls.append(function)

    profiler = sys.getprofile()
    sys.setprofile(note_draw)
    try:
        evaluate()
    finally:
        sys.setprofile(profiler)
    return bool(calls)


def _numpy_draws(evaluate: Evaluate) -> bool:
    """Check whether NumPy's generator moves in each evaluation and rests between them: its methods call no hook."""
    for _ in range(LOOKS):
        before, start = random_state(("numpy",)), time.perf_counter()
        evaluate()
        after, seconds = random_state(("numpy",)), time.perf_counter() - start
        if not generators_drawn_from(before, after):
            return False
        # a thread that draws all the time draws while func rests
        time.sleep(max(seconds, 1e-3))
        if generators_drawn_from(after, random_state(("numpy",))):
            return False
    return True
