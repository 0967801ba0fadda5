"""What each aten operator does to the batch axis: a file for each kind of operator, found by walking this package."""

from __future__ import annotations

import importlib
import pkgutil

from autojac.graph.batch_axis.rules.base import RULES, Rule
from autojac.graph.batch_axis.states import BatchAxisLost, RuleContext, State
from autojac.graph.ir import Operation
from autojac.graph.operator_facts import facts_of
from autojac.graph.operator_kinds import Axes

__all__ = ["RULES", "rule_of"]

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")


def rule_of(operation: Operation) -> Rule:
    """Return the rule of an operator; one that raises `BatchAxisLost` where there is none."""
    axes = facts_of(operation.target).axes
    return RULES.get(operation.name if axes is Axes.OWN else axes, unknown)


def unknown(context: RuleContext) -> State:
    raise BatchAxisLost("no rule for this operator")
