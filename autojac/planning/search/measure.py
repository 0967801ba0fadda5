"""Time of a computation, and fair comparisons between several."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from autojac.core.work_clock import WorkClock

Run = Callable[[], Any]

LEAST_ROUNDS = 3
"""How many rounds a comparison takes, however long they last: fewer have no quartile."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the lower quartile, and the interquartile range over the median."""

    seconds: float
    dispersion: float


class Start(NamedTuple):
    """When something was started, by the wall and by this thread's work, and how often the thread had waited."""

    device: torch.device
    waits: int | None
    worked: float
    seconds: float


class Clock(WorkClock):
    """The time by which searches measure and decide. Tests put another one in its place."""

    def start(self, device: torch.device) -> Start:
        """Return the moment from which `since` counts, once the device is idle."""
        synchronize(device)
        waits = _waits() if device.type == "cpu" else None
        return Start(device, waits, time.thread_time(), time.perf_counter())

    def since(self, start: Start) -> float:
        """Return the seconds since `start`, host and device, for a few microseconds of work.

        Seconds that other processes took meanwhile are left out where the system can tell.
        """
        synchronize(start.device)
        seconds, worked = time.perf_counter() - start.seconds, time.thread_time() - start.worked
        # a thread that never waited was stopped by the system whenever it did not work
        return min(seconds, worked) if start.waits is not None and start.waits == _waits() else seconds

    def per_call(self, run: Run, device: torch.device, calls: int) -> float:
        """Return the seconds per call, host and device, over several calls in a row."""
        start = self.start(device)
        for _ in range(calls):
            run()
        return self.since(start) / calls


clock = Clock()


def _waits() -> int | None:
    """Return how often this thread gave its core up by itself, to wait for something; None where that isn't known."""
    if sys.platform != "linux":  # others don't count by thread
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle; a CPU computes in the calling thread."""
    if device.type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.synchronize(device)


def once(run: Run, device: torch.device) -> float:
    """Time one call, host and device."""
    return clock.per_call(run, device, 1)


def block_size(run: Run, device: torch.device, shortest_s: float) -> tuple[int, float]:
    """Return for how many calls in a row a computation lasts `shortest_s`, and the seconds per call seen on the way."""
    calls, fastest = 1, clock.per_call(run, device, 1)
    while fastest * calls < shortest_s:
        calls *= 2
        fastest = min(fastest, clock.per_call(run, device, calls))
    return calls, fastest


def repeat(run: Run, device: torch.device, shortest_s: float, blocks: int) -> Timing:
    """Time blocks of calls that last `shortest_s` each."""
    calls, _ = block_size(run, device, shortest_s)
    return summary([clock.per_call(run, device, calls) for _ in range(blocks)])


def summary(samples: Sequence[float]) -> Timing:
    """Return the lower quartile of several timings, which load by other processes hardly moves, and their spread."""
    if len(samples) < 2:
        return Timing(samples[0], 0.0)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(low, (high - low) / median if median else 0.0)


def time_interleaved(
    runs: Sequence[Run], device: torch.device, shortest_s: float, rounds: int, until: float
) -> list[list[float]]:
    """Time each run in each round, in turn, so that drift affects all alike; return seconds per call.

    Every other round goes backwards. Stops early once the clock passes `until`, after a whole round but not before
    `LEAST_ROUNDS`: a single call may carry what is due now and then, such as the check of a plan.
    """
    calls = [block_size(run, device, shortest_s)[0] for run in runs]
    table: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        for index, seconds in one_round(runs, device, calls, turn):
            table[index].append(seconds)
        if turn + 1 >= LEAST_ROUNDS and clock.now() > until:
            break
    return table


def one_round(runs: Sequence[Run], device: torch.device, calls: Sequence[int], turn: int) -> list[tuple[int, float]]:
    """Time each run once, forwards in even turns and backwards in odd ones; return (index, seconds per call)."""
    order = range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs)))
    return [(index, clock.per_call(runs[index], device, calls[index])) for index in order]
