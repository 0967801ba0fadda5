"""Memory: what a computation takes at its peak, and what a device still has."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.autograd import profiler

from autojac.core.garbage import gc_disabled
from autojac.planning.search.measure import Run, synchronize

FATAL = 3
"""The severity of fatal errors in torch's C++ code."""
CGROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Where Linux tells a container's memory limit and its usage, in versions 2 and 1 of control groups."""
_profiling = threading.RLock()
"""Held while torch's profiler runs: there is one for the process, and two threads that start it crash the process."""


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Return the peak memory of one call, beyond what was allocated before it; None if it can't be measured.

    On a CPU torch's profiler tells, unless another thread uses it. On an accelerator torch's peak statistics are reset.
    """
    # garbage collected during the call would distort its peak; collecting it first takes up to 0.3 s
    with gc_disabled():
        return _cpu_peak(run) if device.type == "cpu" else _accelerator_peak(run, device)


def _accelerator_peak(run: Run, device: torch.device) -> int | None:
    synchronize(device)
    try:
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
    except (RuntimeError, NotImplementedError):  # as on MPS, whose allocator keeps no such statistics
        return None
    run()
    synchronize(device)
    return torch.accelerator.max_memory_allocated(device) - before


def _cpu_peak(run: Run) -> int | None:
    with _profiling:
        if profiler._is_profiler_enabled:
            return None
        with _silent_profiler(), profiler.profile(profile_memory=True) as recorded:
            run()
    results = recorded.kineto_results
    if results is None:
        return 0
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        allocated += size
        peak = max(peak, allocated)
    return peak


@contextmanager
def _silent_profiler() -> Iterator[None]:
    """Silence two messages of the profiler on standard error: that it starts, and that earlier memory is freed.

    Neither goes through Python. The first depends on a variable of the environment at the process's first profile, the
    second on a variable of torch's library.
    """
    variable = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    level, usual = _log_level()
    level.value = FATAL
    try:
        yield
    finally:
        level.value = usual
        if variable is None:
            os.environ.pop("KINETO_LOG_LEVEL", None)


@functools.cache
def _log_level() -> tuple[ctypes.c_int, int]:
    """Return the variable of the least severity that torch's C++ code logs, and its usual value.

    An unrelated variable where torch's library does not export it.
    """
    level = ctypes.c_int()
    with suppress(OSError, ValueError, StopIteration):
        library = next(Path(torch.__file__).with_name("lib").glob("*c10.*"))
        level = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level")
    return level, level.value


def is_out_of_memory(error: BaseException) -> bool:
    """Check whether an allocation failed: on an accelerator, by torch on a CPU, or in Python."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def available_bytes(device: torch.device) -> int:
    """Return the memory that a computation may still take on the device.

    On a CPU the smaller of what the system can give without swapping and of what the container is allowed; on an
    accelerator what is free, and what torch's allocator holds unused.
    """
    if device.type == "cpu":
        return min(_system_bytes(), *_cgroup_bytes())
    free, _ = torch.accelerator.get_memory_info(device)
    unused = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return int(free + unused)


def _system_bytes() -> int:
    import psutil  # 20 ms that only a first call needs

    return int(psutil.virtual_memory().available)


def _cgroup_bytes() -> Iterator[int]:
    """Yield what the container's memory limit leaves, where there is one."""
    for limit, usage in CGROUP_LIMITS:
        with suppress(OSError, ValueError):
            yield max(int(Path(limit).read_text()) - int(Path(usage).read_text()), 0)
