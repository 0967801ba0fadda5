"""Time without waiting for a core that others have: a busy machine must not change the outcome of a search."""

from __future__ import annotations

import threading
import time

WAITED = "/proc/self/task/{}/schedstat"
"""File in which Linux counts how long a thread has run, and waited to run, in nanoseconds."""

READS, STOPPED_S = 3, 1e-4
"""How often two clocks are read until no more than so many seconds were lost between them."""


def read_waiting_s(thread: int) -> float:
    """Return the seconds that a thread, by its native id, has waited for a core; 0 where that isn't known."""
    try:
        with open(WAITED.format(thread), "rb", buffering=0) as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


class WorkClock:
    """The time by which limits decide. Tests put another one in its place."""

    def now(self) -> float:
        """Return the seconds since some moment in the past."""
        return time.monotonic()

    def waiting_s(self) -> float:
        """Return the seconds that this thread has waited for a core which others had; 0 where that isn't known."""
        return read_waiting_s(threading.get_native_id())

    def working_s(self) -> float:
        """Return the seconds since some moment in the past, without those that this thread has waited for a core."""
        for _ in range(READS):
            waited, now = self.waiting_s(), self.now()
            if self.waiting_s() - waited < STOPPED_S:
                break  # else the thread was stopped in between
        return now - waited


clock = WorkClock()
