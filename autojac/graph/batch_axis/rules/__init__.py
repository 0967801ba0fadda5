"""What each aten operator does to the batch axis: a file for each kind of operator, found by walking this package."""

from __future__ import annotations

import importlib
import pkgutil

import torch

from autojac.graph.batch_axis.rules.base import RULES, Rule
from autojac.graph.batch_axis.rules.pointwise import pointwise
from autojac.graph.batch_axis.states import Lost, State, Step
from autojac.graph.ir import Operation

__all__ = ["RULES", "pointwise", "rule_of"]

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")


def rule_of(operation: Operation) -> Rule:
    """The rule of an operator; one that raises `Lost` where there is none."""
    if operation.name in RULES:
        return RULES[operation.name]
    if torch.Tag.pointwise in operation.target.tags:
        return pointwise
    return unknown


def unknown(step: Step) -> State:
    raise Lost("no rule for this operator")
