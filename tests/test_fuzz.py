"""No wrong number: random programs whose state changes between calls, through replays and without."""

from __future__ import annotations

import pytest

from fuzz import Mode, Tally, WrongError, program, run

SHARE = 0.02
"""Of the calls, so many may be refused by name."""
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
    tally = fuzzed("replays", 150, 0)
    assert tally.replayed > 0.5 * tally.calls, tally


def test_fuzzed_calls_without_replays() -> None:
    fuzzed("methods", 75, 0)
    tally = fuzzed("estimate", 75, 100)
    assert not tally.replayed


@pytest.mark.nightly
@pytest.mark.parametrize("job", range(JOBS))
def test_many_fuzzed_calls_through_replays(job: int) -> None:
    tally = fuzzed("replays", 5000 // JOBS, 1000 * (job + 1))
    assert tally.replayed > 0.5 * tally.calls, tally


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["methods", "estimate"])
@pytest.mark.parametrize("job", range(JOBS // 2))
def test_many_fuzzed_calls_without_replays(job: int, mode: Mode) -> None:
    fuzzed(mode, 5000 // JOBS, 1000 * (job + 1))


def test_a_seed_decides_a_program() -> None:
    assert program(17) == program(17)
    assert program(17).text == program(17).text
    assert program(17) != program(18)
