"""Time and memory of one candidate, and fair comparisons between several."""

from __future__ import annotations

import ctypes
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

from autojac.core.sandbox import gc_disabled

Run = Callable[[], Any]

FATAL = 3
"""The severity in torch's C++ code of what ends the process."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, and the interquartile range over the median."""

    seconds: float
    dispersion: float


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(run: Run, device: torch.device) -> float:
    """Time one call, host and device."""
    return _block(run, device, 1)


def _block(run: Run, device: torch.device, calls: int) -> float:
    """Return the seconds per call, over several calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def repeat(run: Run, device: torch.device, shortest_s: float, blocks: int) -> Timing:
    """Take the median over blocks of calls, after doubling the block until it lasts `shortest_s`."""
    calls = 1
    first = _block(run, device, calls)
    while first * calls < shortest_s:
        calls *= 2
        first = _block(run, device, calls)
    return summary([first, *(_block(run, device, calls) for _ in range(blocks - 1))])


def summary(samples: Sequence[float]) -> Timing:
    """Return the median and the relative interquartile range of several timings."""
    median = statistics.median(samples)
    if len(samples) < 2:
        return Timing(median, 0.0)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, (high - low) / median if median else 0.0)


def interleaved(
    runs: Sequence[Run], device: torch.device, shortest_s: float, rounds: int, until: float
) -> list[list[float]]:
    """Time each run in each round, in turn, so that drift affects all alike; return seconds per call.

    Every other round goes backwards. Stops early, after a whole round, once `time.monotonic()` passes `until`.
    """
    calls = []
    for run in runs:
        count = 1
        while _block(run, device, count) * count < shortest_s:
            count *= 2
        calls.append(count)
    table: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        order = list(enumerate(runs))
        for index, run in order if turn % 2 == 0 else reversed(order):
            table[index].append(_block(run, device, calls[index]))
        if time.monotonic() > until:
            break
    return table


def peak_bytes(run: Run, device: torch.device) -> int:
    """Return the peak memory of one call, beyond what was allocated before it."""
    # garbage that goes meanwhile would count against the call; collecting it first takes up to 0.3 s
    with gc_disabled():
        return _cuda_peak(run, device) if device.type == "cuda" else _cpu_peak(run)


def _cuda_peak(run: Run, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(run: Run) -> int:
    with _silent_profiler(), profile(profile_memory=True) as recorded:
        run()
    results = recorded.kineto_results
    if results is None:
        return 0
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return peak


@contextmanager
def _silent_profiler() -> Iterator[None]:
    """Keep torch from saying on standard error that the profiler starts, or sees memory go that was there before it.

    Neither goes through Python. The one reads a variable of the environment at the process's first profile, the other
    a variable of torch's own library.
    """
    known = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    level, usual = _log_level()
    level.value = FATAL
    try:
        yield
    finally:
        level.value = usual
        if known is None:
            os.environ.pop("KINETO_LOG_LEVEL", None)


@functools.cache
def _log_level() -> tuple[ctypes.c_int, int]:
    """Return the variable of the least severity that torch's C++ code logs, and its usual value.

    A variable of our own where torch's library does not export it.
    """
    level = ctypes.c_int()
    with suppress(OSError, ValueError, StopIteration):
        library = next(Path(torch.__file__).with_name("lib").glob("*c10.*"))
        level = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level")
    return level, level.value


def available_bytes(device: torch.device) -> int:
    """Return the memory that a computation may still take on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 4 * 2**30
