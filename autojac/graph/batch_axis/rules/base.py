"""The registry of rules: what operators do to the batch axis. One without a rule proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autojac.graph.batch_axis.states import BatchAxis, Meets, RuleContext, State
from autojac.graph.operator_facts import OPERATORS
from autojac.graph.operator_kinds import Axes

Rule = Callable[[RuleContext], "State | Sequence[State]"]
RULES: dict[Axes | str, Rule] = {}
"""By what the table of operator facts says of axes, or by name for operators with `Axes.OWN`."""
MEET = "samples meet in it"


def register(key: Axes | str) -> Callable[[Rule], Rule]:
    """Make a function the rule of some operators.

    Args:
        key: what their rows say of axes; or, for rows with `Axes.OWN`, the names of operators, separated by spaces.
    """

    def keep(rule: Rule) -> Rule:
        for one in key.split() if isinstance(key, str) else [key]:
            assert one not in RULES, f"two rules for {one}"
            assert isinstance(one, Axes) or OPERATORS[one].axes is Axes.OWN, f"{one} needs a row with Axes.OWN"
            RULES[one] = rule
        return rule

    return keep


def only_state(found: set[BatchAxis]) -> BatchAxis:
    """Return how all tensors that carry the batch do so; samples meet where they do so in several ways."""
    if len(found) != 1:
        raise Meets(MEET)
    return found.pop()
