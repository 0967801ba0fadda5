"""Work that Ctrl-C, or a limit on time, can come before or after but not in the midst of."""

from __future__ import annotations

import threading
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def run_uninterrupted(work: Callable[[], T]) -> T:
    """Return `work()`, run in a thread of its own, which exceptions for the caller's thread do not reach.

    Signals are served by the main thread, and a limit on time raises in the thread that it was set for, either between
    any two bytecodes: no `try` is safe from that, so a transaction in such a thread may stay open for good. The caller
    may stop waiting at any time; work that has begun goes on to its end, and only the end of the process ends it early.

    Starting a `threading.Thread` takes locks in Python, which such an exception could leave taken, so this is left to a
    thread that is started by a single call into C. Without the other, whoever asks for the current thread inside, as
    logging does, would leave an entry for it behind.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done = allocate_lock()
    done.acquire()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.release()

    def begin() -> None:
        try:
            threading.Thread(target=run, name="autojac store", daemon=True).start()
        except RuntimeError as error:
            errors.append(error)
            done.release()

    try:
        start_new_thread(begin, ())
    except RuntimeError:  # no more threads: the interpreter shuts down, or the platform has none
        return work()
    done.acquire()
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # else the error, by its traceback, and this frame would keep each other
    return results[0]
