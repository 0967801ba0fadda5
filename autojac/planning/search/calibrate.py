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
"""Timings of which the fastest counts."""


@functools.cache
def measured_machine(device: str, threads: str) -> Machine:
    """Return what `measure_machine` finds, once per process; `threads` says for how many, and is torch's number."""
    return measure_machine(torch.device(device))


def measure_machine(device: torch.device, clock: measure.Clock | None = None) -> Machine:
    """Measure what operators, bytes and flops take on a device, by so many threads as torch has now.

    Args:
        device: where.
        clock: what to measure by; true time by default, not what tests put in the place of a search's clock.
    """
    clock = measure.Clock() if clock is None else clock

    def fastest(run: measure.Run, calls: int = 1) -> float:
        run()  # what a process does once
        return max(min(clock.per_call(run, device, calls) for _ in range(TURNS)), 1e-9)

    with torch.enable_grad():
        host = _host_seconds(device, fastest)
        constants: dict[str, Any] = {**host, "flops_per_s": _flops_per_s(device, fastest)}
        return dataclasses.replace(DEFAULT, **constants, rates=_rates(device, fastest))


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


def _rates(device: torch.device, fastest: Callable[..., float]) -> tuple[float, ...]:
    """Return the bytes per second of a map that reads two tensors and makes a third."""
    rates = []
    for size in SIZES:
        one, other = torch.ones(2, size // 12, device=device)
        calls = max(SIZES[1] // size, 1)
        rates.append(size / fastest(lambda one=one, other=other: one * other, calls))
    return tuple(rates)


def _flops_per_s(device: torch.device, fastest: Callable[..., float]) -> float:
    tall, square = torch.ones(ROWS, SIDE, device=device), torch.ones(SIDE, SIDE, device=device)
    return 2.0 * ROWS * SIDE**2 / fastest(lambda: tall @ square)
