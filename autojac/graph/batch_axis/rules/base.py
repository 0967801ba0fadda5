"""The registry of rules: what each aten operator does to the batch axis. One that is not registered proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autojac.graph.batch_axis.states import State, Step

Rule = Callable[[Step], "State | Sequence[State]"]
RULES: dict[str, Rule] = {}
MEET = "samples meet in it"


def register(names: str) -> Callable[[Rule], Rule]:
    """Make a function the rule of some operators.

    Args:
        names: of aten operators, without overloads, separated by spaces.
    """

    def keep(rule: Rule) -> Rule:
        for name in names.split():
            assert name not in RULES, f"two rules for {name}"
            RULES[name] = rule
        return rule

    return keep
