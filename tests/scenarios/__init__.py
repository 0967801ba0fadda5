"""Functions as data: inputs, analytic Jacobian, true coupling, and what is awkward about them.

Every method, the probe and the guard are tested against this one list.
"""

from __future__ import annotations

from scenarios import (
    algebra,
    arrays,
    awkward,
    coupled,
    dynamics,
    effects,
    layers,
    maths,
    nests,
    networks,
    rules,
    weights,
    wrapped,
)
from scenarios.base import TRAITS, Draw, Scenario

FILES = (maths, algebra, arrays, dynamics, nests, weights, networks, layers, awkward, rules, wrapped, effects, coupled)
SCENARIOS: tuple[Scenario, ...] = tuple(scenario for file in FILES for scenario in file.SCENARIOS)

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}

__all__ = ["BY_NAME", "SCENARIOS", "TRAITS", "Draw", "Scenario", "select"]


def select(*, having: str | None = None, lacking: tuple[str, ...] = (), coupling: str | None = None) -> list[Scenario]:
    """The scenarios with one trait, without some others, of one coupling; for pytest.mark.parametrize with ids=str."""
    return [
        scenario
        for scenario in SCENARIOS
        if (having is None or having in scenario.traits)
        and not scenario.traits & set(lacking)
        and (coupling is None or scenario.coupling == coupling)
    ]
