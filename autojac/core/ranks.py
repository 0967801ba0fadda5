"""Several ranks of one process group: what communicates must run equally often on all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from autojac.core import work_clock


def several() -> bool:
    """Check whether this process is one of several ranks, which must not decide anything by a clock."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def deadline(seconds: float) -> float:
    """Return the end of a time limit, by `work_clock.clock.working_s`; never, among several ranks."""
    return math.inf if several() else work_clock.clock.working_s() + seconds


@contextmanager
def silent(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Keep data-parallel modules from broadcasting buffers and preparing a reduction in their forward.

    Probing, tuning and checking call func as often as this rank's data need, whatever the other ranks do.
    """
    replicas = [m for m in modules if isinstance(m, torch.nn.parallel.DistributedDataParallel)] if several() else []
    before = [(module.require_forward_param_sync, module.require_backward_grad_sync) for module in replicas]
    try:
        for module in replicas:
            module.require_forward_param_sync = module.require_backward_grad_sync = False
        yield
    finally:
        for module, (forward, backward) in zip(replicas, before, strict=True):
            module.require_forward_param_sync, module.require_backward_grad_sync = forward, backward
