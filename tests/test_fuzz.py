"""No wrong number: random programs whose state changes between calls, through replays and without."""

from __future__ import annotations

import pytest
import torch

from autojac import AutoJacobian
from fuzz import Feature, Mode, Program, Tally, WrongError, _Run, program, run
from oracle import jacobian_blocks

SHARE = 0.02
"""Of the calls, so many may be refused by name."""
REPLAYED = 0.9
"""Of the calls that the design lets be replayed, so many are."""
JOBS = 20
"""The nightly calls are so many tests, for as many processes."""


def fuzzed(mode: Mode, calls: int, first: int) -> Tally:
    """The tally of so many calls of the programs from a seed on."""
    tally, wrong, seed = Tally(), [], first
    while tally.calls < calls and len(wrong) < 3:
        try:
            tally += run(program(seed), mode)
        except WrongError as error:
            wrong.append(str(error))
        seed += 1
    assert not wrong, "\n\n".join(wrong)
    assert tally.refused <= SHARE * tally.calls, tally
    return tally


def test_fuzzed_calls_through_replays() -> None:
    tally = fuzzed("replays", 60, 0)
    assert tally.replayed > REPLAYED * tally.due, tally


def test_fuzzed_calls_without_replays() -> None:
    fuzzed("methods", 30, 0)
    tally = fuzzed("estimate", 30, 100)
    assert not tally.replayed


@pytest.mark.nightly
@pytest.mark.parametrize("job", range(JOBS))
def test_many_fuzzed_calls_through_replays(job: int) -> None:
    tally = fuzzed("replays", 5000 // JOBS, 1000 * (job + 1))
    assert tally.replayed > REPLAYED * tally.due, tally


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["methods", "estimate"])
@pytest.mark.parametrize("job", range(JOBS // 2))
def test_many_fuzzed_calls_without_replays(job: int, mode: Mode) -> None:
    fuzzed(mode, 5000 // JOBS, 1000 * (job + 1))


def test_a_seed_decides_a_program() -> None:
    assert program(17) == program(17)
    assert program(17).text == program(17).text
    assert program(17) != program(18)


def test_an_entry_that_a_plan_misses_is_never_taken_for_rounding() -> None:
    # near zero the derivatives of the first are as small as what is rounded off beside a value of one
    lines = ("h = 1 + (h.roll(1, 1) + h) ** 3",)
    made = Program(0, (Feature("rolled", lines),), "return h", "blocks", False, False, False, ())
    fuzzing = _Run(made, "estimate")
    net, x = fuzzing.space["net"], 1e-4 * torch.randn(4, 3)
    right, narrow = AutoJacobian(net, store=":memory:"), AutoJacobian(torch.sin, store=":memory:")
    J = jacobian_blocks(net, (x,)).float()
    missing = J * torch.eye(3)
    assert fuzzing._rounding(J, J, 0, net, [x], right.plan(x))
    assert not fuzzing._rounding(missing, J, 0, net, [x], narrow.plan(x))
    # nor is what the right plan never gives
    assert not fuzzing._rounding(missing, J, 0, net, [x], right.plan(x))
