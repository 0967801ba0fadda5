"""Nothing hangs: probes and candidates are interrupted, and what they had borrowed is put back."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from autojac import AutoJacobian, probe
from autojac.core import time_limit, work_clock
from autojac.core.time_limit import within
from autojac.methods.push import Push
from autojac.planning.search import looks, measure, trial
from harness import Ticking, compare


def endless() -> None:
    while True:
        time.sleep(1e-3)


def test_a_computation_is_interrupted_and_nothing_comes_after() -> None:
    for _ in range(20):
        with pytest.raises(TimeoutError, match="did not finish within"):
            within(0.01, endless)
    for _ in range(300):  # some end just as their time does
        with contextlib.suppress(TimeoutError):
            assert within(1e-3, lambda: time.sleep(1e-3) or 3) == 3
    time.sleep(0.05)


def test_what_a_thread_waits_for_a_core_uses_no_limit_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_clock, "read_waiting_s", lambda thread: time.monotonic())
    assert within(0.01, lambda: time.sleep(0.2) or 3) == 3


def test_code_that_swallows_exceptions_is_interrupted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autojac.core.time_limit.AGAIN_S", 0.02)
    swallowed = 0

    def stubborn() -> None:
        nonlocal swallowed
        while swallowed < 3:
            try:
                endless()
            except BaseException:
                swallowed += 1

    within(0.02, stubborn)
    assert swallowed == 3


PROFILED = """
import cProfile, contextlib
from autojac.core.time_limit import within

def called():
    return 3

def endless():
    while True:
        called()

assert within(60, called) == 3
with contextlib.suppress(TimeoutError):
    within(0.05, endless)
with cProfile.Profile():
    assert called() == 3
"""


def test_limits_within_limits_and_other_threads() -> None:
    def work() -> None:
        with pytest.raises(TimeoutError, match=r"0\.02"):
            within(0.02, lambda: within(10, endless))
        finished.append(True)

    finished: list[bool] = []
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    within(30, lambda: [thread.join() for thread in threads])
    assert len(finished) == 3


def test_a_limit_that_ends_while_another_begins_leaves_no_watch_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    add = time_limit._Watch.add
    begun = []

    def slow(watch: Any, limit: Any, seconds: float) -> None:
        add(watch, limit, seconds)
        begun.append(limit)
        while len(begun) == 2:  # the inner one
            time.sleep(1e-3)

    monkeypatch.setattr(time_limit._Watch, "add", slow)
    with pytest.raises(TimeoutError):
        within(0.05, lambda: within(0.2, endless))
    assert len(begun) == 2
    assert not set(begun) & set(time_limit._watch.limits)


def test_one_thread_watches_all() -> None:
    within(30, lambda: within(20, lambda: None))
    before = threading.active_count()
    for seconds in (10, 5, 20, 1e9):
        assert within(seconds, threading.active_count) == before


class Slow:
    """A cycle whose end takes longer than the limit that it comes under."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        ended.append(False)
        for _ in range(200):
            time.sleep(1e-3)
        ended[-1] = True


ended: list[bool] = []


def test_garbage_collection_is_not_interrupted() -> None:
    def collecting() -> None:
        Slow()
        gc.collect()
        endless()

    before = len(gc.callbacks)
    with pytest.raises(TimeoutError):
        within(0.05, collecting)
    assert ended == [True]
    assert len(gc.callbacks) == before


FORKED = """
import os, time
from autojac.core.time_limit import within

def endless():
    while True:
        time.sleep(1e-3)

within(60, lambda: None)
child = os.fork()
try:
    within(0.05, endless)
except TimeoutError:
    if child == 0:
        os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def test_a_profiler_runs_afterwards_and_a_forked_process_has_a_watch_of_its_own() -> None:
    script = PROFILED + (FORKED if hasattr(os, "fork") else "")
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


def test_an_error_inside_is_the_one_that_comes_out() -> None:
    with pytest.raises(KeyError):
        within(10, {}.popitem)
    assert within(float("inf"), threading.get_ident) == threading.get_ident()


@pytest.mark.parametrize("watched", [False, True], ids=["alone", "with a callback of Python's"])
def test_a_limit_that_passes_while_garbage_is_collected_is_not_lost(
    watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[object] = []

    def others(phase: str, info: object) -> None:
        """Do what hypothesis and torch's compiler do at each collection, in Python."""
        sum(range(20))

    monkeypatch.setattr(sys, "unraisablehook", lost.append)

    def collects() -> None:
        while True:
            gc.collect(0)

    if watched:
        gc.callbacks.insert(0, others)
    try:
        for _ in range(10):
            with pytest.raises(TimeoutError):
                within(0.01, collects)
    finally:
        if watched:
            gc.callbacks.remove(others)
    assert not lost


def square_root(x: Tensor) -> Tensor:
    """Newton's method, which never ends below zero or on NaN."""
    y = x.detach().clone()
    while not bool(((y * y - x.detach()).abs() < 1e-9).all()):
        y = (y + x.detach() / y) / 2
    return y + (x - y * y) / (2 * y)


def test_a_function_that_never_ends_at_other_values_is_still_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["autojac.probe"], "HANG_S", 0.1)
    x = torch.rand(6, 3, dtype=torch.float64) + 1
    structure = probe(square_root, x)
    assert structure.independent
    assert "did not finish" in " ".join(structure.evidence)
    J = AutoJacobian(square_root, store=":memory:", on_miss="estimate")(x)
    compare(J, torch.diag_embed(0.5 / x.sqrt()))


def test_a_hung_candidate_costs_its_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PATIENCE_S", 1.0)
    monkeypatch.setattr(trial, "LEAST_S", 0.15)
    # a busy machine gets as far as an idle one
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-5))
    monkeypatch.setattr(looks, "COMPILED_PROGRAMS", 0)
    monkeypatch.setattr(Push, "_columns", lambda *_: endless())
    x = torch.randn(6, 3, dtype=torch.float64)
    jac = AutoJacobian(torch.sin, store=":memory:", on_miss="tune", budget_s=0.15)
    compare(jac(x), torch.diag_embed(x.cos()))
    reasons = [trial.reason for trial in jac.plan(x).trials if "'Push'" in str(trial.method)]
    assert any("TimeoutError: did not finish" in str(reason) for reason in reasons)


def test_a_watch_whose_thread_was_never_started_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C leaves it that comes while the thread is started."""
    monkeypatch.setattr(time_limit._watch, "_thread", threading.Thread())
    time_limit.end_watch()


def test_an_import_is_not_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a module would be all that the process ever has of it."""
    limit = time_limit._Limit(KeyboardInterrupt)
    answers: list[float | None] = []
    hook: Any = ModuleType("passed_limit")
    hook.interrupt = lambda: answers.append(limit.interrupt())
    monkeypatch.setitem(sys.modules, "passed_limit", hook)
    (tmp_path / "imported_at_a_limit.py").write_text("import passed_limit\npassed_limit.interrupt()\nwhole = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.import_module("imported_at_a_limit").whole
    monkeypatch.delitem(sys.modules, "imported_at_a_limit")
    assert answers == [time_limit.SOON_S]
    with pytest.raises(KeyboardInterrupt):
        hook.interrupt()
        endless()
    limit.stop()


def test_the_start_of_a_thread_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new thread would get the exception, die, and leave the one that starts it waiting for good."""
    limit = time_limit._Limit(KeyboardInterrupt)
    answers: list[float | None] = []
    # Python 3.13 has a function of its own
    name = next(name for name in ("_start_joinable_thread", "_start_new_thread") if hasattr(threading, name))
    begin = getattr(threading, name)

    def begin_at_a_limit(*args: Any, **kwargs: Any) -> Any:
        answers.append(limit.interrupt())
        return begin(*args, **kwargs)

    monkeypatch.setattr(threading, name, begin_at_a_limit)
    ran = threading.Event()
    thread = threading.Thread(target=ran.set)
    thread.start()
    thread.join()
    assert ran.is_set() and answers == [time_limit.SOON_S]
    with pytest.raises(KeyboardInterrupt):
        limit.interrupt()
        endless()
    limit.stop()
