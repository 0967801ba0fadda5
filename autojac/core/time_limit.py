"""A limit on how long a computation may run: probes and candidates must not hang."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import Any, Final, TypeVar

from autojac.core import work_clock
from autojac.core.ranks import several

T = TypeVar("T")

LEAVING_S = 1.0
"""Seconds that a watching thread is given to end."""
AGAIN_S = 1.0
"""Code that swallows every exception is interrupted again after this long."""
SOON_S = 1e-3
"""Seconds after which to try again where nothing may be interrupted.

What code that garbage collection runs raises is only printed, and a half-run import leaves a module broken for the
rest of the process. In CPython 3.11 a thread that is being started still counts as the one that starts it: it would get
the exception in its place, and end before it says that it runs, for which the other one waits.
"""
IMPORTS: Final = "<frozen importlib._bootstrap>"
"""The file of the functions that import."""
STARTS: Final = threading.Thread.start.__code__


def within(seconds: float, run: Callable[[], T]) -> T:
    """Return what `run()` returns, and interrupt it after `seconds`.

    A watching thread raises an exception in this one, which is noticed between two bytecodes: loops end, while a single
    call into torch runs to its end first. What must be put back in any case belongs outside of `run`. This is no
    context manager, because the exception may come while a block is being left, where nothing would catch it.

    Time that this thread waits for a core does not count, where the system tells it.

    One of several ranks is never interrupted: the others would wait for it.

    Raises:
        TimeoutError: `run` was interrupted.
    """
    if seconds == math.inf or several():
        return run()

    # of its own class, so that limits within limits tell their exceptions apart; no Exception, which func may catch
    class Expired(BaseException):
        pass

    limit = _Limit(Expired)
    try:
        try:
            # in here, since the limit that this one is within may end meanwhile
            _watch.add(limit, seconds)
            return run()
        finally:
            _watch.drop(limit)
    except Expired:
        _watch.drop(limit)
        raise TimeoutError(f"did not finish within {seconds:.2g} s") from None


def end_watch() -> None:
    """End the thread that watches, unless some limit is still watched; the next limit starts another."""
    _watch.end()


class _Limit:
    """One computation in one thread, and the exception that interrupts it."""

    def __init__(self, expired: type[BaseException]) -> None:
        self.expired = expired
        self.thread = threading.get_ident()
        self.native = threading.get_native_id()
        self.waited = work_clock.read_waiting_s(self.native)
        self.lock = threading.Lock()
        self.done = self.raised = False
        # called with "start" before and "stop" after each garbage collection, and written in C: in a function of
        # Python's the exception would arrive as it is entered, be printed, and be lost. The first of all that are
        # called and the last, since others may be Python's.
        self._phases = [OrderedDict[str, None](start=None, stop=None) for _ in range(2)]
        self.calls_first: Any = self._phases[0].move_to_end
        self.calls_last: Any = self._phases[1].move_to_end

    @property
    def collecting(self) -> bool:
        """Whether garbage is being collected, in whatever thread."""
        return any(next(reversed(phases)) == "start" for phases in self._phases)

    @property
    def importing_or_starting(self) -> bool:
        """Whether the thread runs an import, or starts another thread."""
        frame = sys._current_frames().get(self.thread)
        while frame is not None:
            if frame.f_code is STARTS or frame.f_code.co_filename == IMPORTS:
                return True
            frame = frame.f_back
        return False

    def extension(self) -> float:
        """Return the seconds for which the thread has waited for a core since this was last asked."""
        before, self.waited = self.waited, work_clock.read_waiting_s(self.native)
        return self.waited - before

    def interrupt(self) -> float | None:
        """Raise the exception in the thread; return the seconds until the next try, None if the computation ended."""
        with self.lock:
            if self.done:
                return None
            if self.collecting or self.importing_or_starting:
                return SOON_S
            self.raised = True
            self.throw(self.expired)
            return AGAIN_S

    def throw(self, error: type[BaseException]) -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), ctypes.py_object(error))

    def stop(self) -> None:
        with self.lock:
            self.done = True
        if not self.raised:
            return

        class Cleared(BaseException):
            pass

        # What has not arrived by now never will: another takes its place and is caught here. Were it only taken back,
        # CPython 3.11 would look for it at every call from then on, and for ever under a profiler or a debugger.
        try:
            self.throw(Cleared)
            while True:
                pass
        except Cleared:
            pass


class _Watch:
    """The thread that watches all limits: starting one for each would cost more than most of what is watched.

    Adding and dropping limits consists of single calls into C, since an exception may arrive between any two.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Start afresh: a forked process has none of its parent's threads."""
        self.limits: dict[_Limit, float] = {}
        self._starting = threading.Lock()
        self._bell = threading.Lock()
        self._bell.acquire()
        self._until = math.inf
        self._ending = False
        self._thread: threading.Thread | None = None

    def add(self, limit: _Limit, seconds: float) -> None:
        until = monotonic() + seconds
        self.limits[limit] = until
        gc.callbacks.insert(0, limit.calls_first)
        gc.callbacks.append(limit.calls_last)
        if self._thread is None or not self._thread.is_alive():
            with self._starting:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._run, name="autojac time limits", daemon=True)
                    self._thread.start()
        elif until < self._until:
            with contextlib.suppress(RuntimeError):  # it rings already
                self._bell.release()

    def drop(self, limit: _Limit) -> None:
        self.limits.pop(limit, None)
        for call in (limit.calls_first, limit.calls_last):
            with contextlib.suppress(ValueError):  # dropped already
                gc.callbacks.remove(call)
        limit.stop()

    def end(self) -> None:
        thread = self._thread
        if thread is None or self.limits:
            return
        self._ending = True
        with contextlib.suppress(RuntimeError):  # it rings already
            self._bell.release()
        with contextlib.suppress(RuntimeError):  # it was never started: Ctrl-C came before
            thread.join(LEAVING_S)

    def _ended(self) -> bool:
        """Check whether to end: asked to, and nothing is watched. `add` adds a limit before it looks for the thread."""
        if not self._ending or self.limits:
            return False
        with self._starting:
            here, self._thread = self._thread, None
            if self.limits:
                self._thread = here
                return False
            self._ending = False
            return True

    def _run(self) -> None:
        while not self._ended():
            # a limit that is added from here on rings the bell; one added before is in the list
            self._until = math.inf
            now = monotonic()
            for limit, until in list(self.limits.items()):
                if until > now:
                    continue
                again: float | None = limit.extension()
                if again is None or again < SOON_S:
                    again = limit.interrupt()
                if again is None:
                    self.limits.pop(limit, None)
                else:
                    self.limits[limit] = now + again
            until = min(list(self.limits.values()), default=math.inf)
            self._until = until
            remaining = until - monotonic()
            if remaining > 0:
                self._bell.acquire(timeout=-1 if remaining == math.inf else min(remaining, threading.TIMEOUT_MAX))


_watch = _Watch()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_watch.begin)
