"""Whatever interrupts a save, its transaction ends: others can write at once, and so can the next save."""

from __future__ import annotations

import gc
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from autojac import PlanStore
from autojac.core.time_limit import within
from autojac.store import queries
from autojac.store.uninterruptible import run_uninterrupted
from stores import ENV, OP, PLAN, as_found, filled

FOUND = as_found(PLAN)


class Expired(BaseException):
    """As a limit on time raises."""


@pytest.fixture
def no_garbage() -> Iterator[None]:
    """No callbacks of garbage collection in between, whose exceptions are only printed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def interrupted(work: Callable[[], Any], error: type[BaseException], after: int) -> BaseException | None:
    """Run `work`, raising before one of its bytecodes in this thread; None where it has fewer."""
    left = after

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                raise error
        return trace

    before = sys.gettrace()
    # before the trace is set: Python 3.12 looks then whether any frame wants opcodes
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    try:
        work()
    except error as raised:
        return raised  # its traceback keeps every frame alive, as a notebook does
    finally:
        sys.settrace(before)
    return None


def count_opcodes(work: Callable[[], Any]) -> int:
    """How many bytecodes `work` runs in this thread."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def can_be_written(path: Path) -> None:
    """Another connection takes the write lock, with no more patience than what is running now needs to end."""
    with closing(sqlite3.connect(path, timeout=5.0, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")


@pytest.mark.by_day(2)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Expired])
@pytest.mark.parametrize("journal", ["WAL", "DELETE"])
def test_an_interrupt_at_any_bytecode_ends_the_transaction(
    journal: str, error: type[BaseException], no_garbage: None, tmp_path: Path
) -> None:
    path = filled(tmp_path / "plans.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode={journal}")
    store = PlanStore(path)
    changes: list[Callable[[], Any]] = [
        lambda: store.save(OP, ENV, PLAN, "f"),
        lambda: store.refute(OP, ENV, "why"),
        lambda: store.find(OP, ENV),
    ]
    for change in changes:
        change()
        total = count_opcodes(change)
        # every bytecode of a transaction would be thousands; those here are spread over the whole
        points = sorted({*range(1, total + 1, max(1, total // 60)), total})
        raised = []
        for after in points:
            raised.append(interrupted(change, error, after))
            can_be_written(path)
        assert sum(one is not None for one in raised) > len(points) // 2
    store.save(OP, ENV, PLAN, "f")
    assert PlanStore(path).find(OP, ENV) == FOUND
    assert "read-only" not in store.description


def test_an_interrupt_ends_the_making_of_the_schema(no_garbage: None, tmp_path: Path) -> None:
    kept = []
    for number, after in enumerate(range(5, 400, 30)):
        path = tmp_path / f"{number}.db"
        store = PlanStore(path)
        kept.append(interrupted(lambda store=store: store.save(OP, ENV, PLAN, "f"), KeyboardInterrupt, after))
        store.save(OP, ENV, PLAN, "f")
        assert store.find(OP, ENV) == FOUND
        assert PlanStore(path).find(OP, ENV) == FOUND
    assert any(one is not None for one in kept)


def test_a_limit_on_time_in_the_midst_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "plans.db")
    store = PlanStore(path)
    begun, go_on = threading.Event(), threading.Event()
    plain = queries.save

    def save(connection: Any, *args: Any) -> Any:
        plain(connection, *args)
        begun.set()
        for _ in range(20_000):
            if go_on.is_set():
                break
            time.sleep(1e-3)  # bytecodes, between which an exception may come
        return None

    monkeypatch.setattr(queries, "save", save)

    def run() -> None:
        threading.Timer(0.3, go_on.set).start()
        store.save(OP, ENV, PLAN, "f")

    with pytest.raises(TimeoutError):
        within(0.1, run)
    assert begun.is_set()
    can_be_written(path)
    monkeypatch.undo()
    store.save(OP, ENV, PLAN, "f")
    assert "read-only" not in store.description


def test_work_in_a_thread_of_its_own_returns_and_raises_as_it_would_here() -> None:
    assert run_uninterrupted(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        run_uninterrupted(lambda: 1 // 0)
    with pytest.raises(SystemExit):
        run_uninterrupted(sys.exit)


def test_a_save_leaves_no_thread_behind(tmp_path: Path) -> None:
    before = threading.enumerate()
    filled(tmp_path / "plans.db")
    for _ in range(1000):  # a thread that has done its work takes a moment to go
        if threading.enumerate() == before:
            break
        time.sleep(0.01)
    assert threading.enumerate() == before


def test_work_is_done_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(run: Callable[[], None], args: tuple[()]) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("autojac.store.uninterruptible.start_new_thread", start)
    assert run_uninterrupted(lambda: 3) == 3
