"""What this machine could do at best: the time that a Jacobian's arithmetic and its memory traffic take at least.

S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for multicore architectures",
Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from autojac.planning.search import measure

SIDE = 768
"""Of the square matrices whose product gives the arithmetic throughput."""
MOVED_BYTES = 2**26
"""Of the buffer that is filled: no cache holds it."""
ROUNDS = 5


@lru_cache
def machine(device: str, threads: int) -> tuple[float, float]:
    """Return float32 operations per second in a matrix product, and bytes per second written to memory.

    Args:
        device: where to measure.
        threads: torch's; measured again for each number of them.
    """
    place = torch.device(device)
    a, out = torch.rand(SIDE, SIDE, device=place), torch.empty(SIDE, SIDE, device=place)
    buffer = torch.zeros(MOVED_BYTES // 4, device=place)
    product = min(measure.once(lambda: torch.mm(a, a, out=out), place) for _ in range(ROUNDS))
    filled = min(measure.once(lambda: buffer.fill_(1.0), place) for _ in range(ROUNDS))
    return 2 * SIDE**3 / product, MOVED_BYTES / filled


def least_seconds(runs: Iterable[Callable[[], Any]], x: Tensor, J: Tensor) -> float | None:
    """Return the time below which this Jacobian can't be had: the fewest operations of several ways, and x and J moved.

    Only matrix products and convolutions count as arithmetic. None where no way's can be counted.

    Args:
        runs: ways that compute it.
        x: where it is taken.
        J: the Jacobian.
    """
    operations, bandwidth = machine(str(x.device), torch.get_num_threads())
    counted = []
    for run in runs:
        try:
            with FlopCounterMode(display=False) as counter:
                run()
        except RuntimeError:  # its hooks on modules don't suit every use of autograd
            continue
        counted.append(counter.get_total_flops())
    if not counted:
        return None
    moved = sum(t.numel() * t.element_size() for t in (x, J))
    return float(max(min(counted) / operations, moved / bandwidth))
