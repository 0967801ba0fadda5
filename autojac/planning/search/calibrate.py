"""The constants of the cost model for the machine at hand, measured in a fraction of a second."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff.pullback import Pullback
from autojac.methods.support.engines import Pulls, push
from autojac.planning.search import measure
from autojac.problem.machine import DEFAULT, SIZES, Machine

LAYERS = 8
OPERATORS = 2 * LAYERS
"""Operators of the chain whose host time is measured: a product and a map in each layer, on almost no data."""
SEEDS = 4
ROWS, SIDE = 2048, 256
"""Rows of the tall matrix, and its columns, whose product with a square one is timed, as seeds of a batch make them."""
TURNS = 5
"""Timings, at most, of which the fastest counts."""
CLOSE = 0.05
"""A timing that differs from the fastest so far by no more than this share confirms it: load never makes one faster."""
LONG_S = 4e-3
"""Seconds of timings that are enough if they agree: a burst of load may slow several shorter ones alike."""


@functools.cache
def measured_machine(device: str, threads: str, large: bool) -> Machine:
    """Return what is measured of a machine, once per process.

    Args:
        device: where.
        threads: for how many; it is torch's number.
        large: measure operators that move more than `SIZES[1]` bytes too, which takes as long as all the rest.
    """
    if large:
        return measure_large_operators(measured_machine(device, threads, False), torch.device(device))
    return measure_machine(torch.device(device))


def measure_machine(device: torch.device, clock: measure.Clock | None = None) -> Machine:
    """Measure what operators, bytes within caches, and flops take on a device, by so many threads as torch has now.

    Args:
        device: where.
        clock: what to measure by; true time by default, not what tests put in the place of a search's clock.
    """
    fastest = _make_timer(clock, device)
    with torch.enable_grad():
        constants = {**_host_seconds(device, fastest), "flops_per_s": _flops_per_s(device, fastest)}
        small, middle = (_rate(device, fastest, size) for size in SIZES[:2])
    rates = (small, middle, middle * DEFAULT.rates[2] / DEFAULT.rates[1])
    return dataclasses.replace(DEFAULT, **constants, rates=rates, largest=float(SIZES[1]))


def measure_large_operators(machine: Machine, device: torch.device, clock: measure.Clock | None = None) -> Machine:
    """Measure what was only guessed so far: the rate of operators whose tensors fit into no cache."""
    rate = _rate(device, _make_timer(clock, device), SIZES[2])
    return dataclasses.replace(machine, rates=(*machine.rates[:2], rate), largest=float(SIZES[2]))


def _make_timer(clock: measure.Clock | None, device: torch.device) -> Callable[..., float]:
    """Return what times a computation, until two timings agree on the fastest."""
    clock = measure.Clock() if clock is None else clock

    def fastest(run: measure.Run, calls: int = 1) -> float:
        run()  # what a process does once
        best = spent = clock.per_call(run, device, calls)
        for _ in range(TURNS - 1):
            other = clock.per_call(run, device, calls)
            spent += other
            is_confirmed = abs(other - best) <= CLOSE * best
            best = min(best, other)
            if is_confirmed and spent * calls >= LONG_S:
                break
        return max(best, 1e-9)

    return fastest


def _host_seconds(device: torch.device, fastest: Callable[..., float]) -> dict[str, Any]:
    """Return what an operator takes on the host, by what differentiates it."""
    x = torch.ones(4, 4, device=device)
    weight, bias = torch.eye(4, device=device), torch.zeros(4, device=device)

    def chain(x: Tensor) -> tuple[Tensor, ...]:
        for _ in range(LAYERS):
            x = torch.addmm(bias, x, weight).tanh()
        return (x,)

    def plain() -> Any:
        with torch.no_grad():
            return chain(x)

    pullback = Pullback(chain, (x,), differentiable=False)
    many = torch.ones(SEEDS, 4, 4, device=device)
    pulls = Pulls.by(Pullback(chain, (x,), differentiable=False), "batched")
    recorded = fastest(lambda: Pullback(chain, (x,), differentiable=False), 4)
    return {
        "plain_s": fastest(plain, 8) / OPERATORS,
        "recorded_s": recorded / OPERATORS,
        "pulled_s": fastest(lambda: pullback(0, many[0]), 8) / OPERATORS,
        "batched_s": fastest(lambda: pulls.one(0, many), 2) / OPERATORS,
        "dual_s": fastest(lambda: push(chain, (x,), (many[:1],), "loop")) / OPERATORS,
    }


def _rate(device: torch.device, fastest: Callable[..., float], size: int) -> float:
    """Return the bytes per second of a map that reads two tensors and writes a third, `size` bytes in all."""
    # what a process's first large results cost, for pages that it never had, is no matter of the rate
    one, other, result = torch.ones(3, size // 12, device=device)
    return size / fastest(lambda: torch.mul(one, other, out=result), max(SIZES[1] // size, 1))


def _flops_per_s(device: torch.device, fastest: Callable[..., float]) -> float:
    tall, square = torch.ones(ROWS, SIDE, device=device), torch.ones(SIDE, SIDE, device=device)
    return 2.0 * ROWS * SIDE**2 / fastest(lambda: tall @ square)
