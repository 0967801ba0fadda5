"""A limit on how long a computation may run: probes and candidates must not hang."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

AGAIN_S = 1.0
"""Code that swallows every exception is interrupted again after this long."""


def within(seconds: float, run: Callable[[], T]) -> T:
    """`run()`, interrupted after `seconds`.

    A watching thread raises an exception in this one, which is noticed between two bytecodes: loops end, while a single
    call into torch runs to its end first. What must be put back in any case belongs outside of `run`. This is no
    context manager, because the exception may come while a block is being left, where nothing would catch it.

    Raises:
        TimeoutError: `run` was interrupted.
    """
    if seconds == math.inf:
        return run()

    # of its own class, so that limits within limits tell their exceptions apart; no Exception, which func may catch
    class Expired(BaseException):
        pass

    thread = ctypes.c_ulong(threading.get_ident())
    done, lock = threading.Event(), threading.Lock()
    raised = False

    class Cleared(BaseException):
        pass

    def watch() -> None:
        nonlocal raised
        patience = seconds
        while not done.wait(patience):
            patience = AGAIN_S
            with lock:
                if not done.is_set():
                    raised = True
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(Expired))

    def stop() -> None:
        with lock:
            done.set()
        if not raised:
            return
        # What has not arrived by now never will: another takes its place and is caught here. Were it only taken back,
        # CPython 3.11 would look for it at every call from then on, and for ever under a profiler or a debugger.
        try:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(Cleared))
            while True:
                pass
        except Cleared:
            pass

    try:
        try:
            # in here, since the limit that this one is within may end while the thread starts
            threading.Thread(target=watch, name="autojac time limit", daemon=True).start()
            return run()
        finally:
            stop()
    except Expired:
        stop()
        raise TimeoutError(f"did not finish within {seconds:.2g} s") from None
