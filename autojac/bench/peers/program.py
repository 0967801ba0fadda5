"""A workload's function as a program that other libraries can run, with its weights as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from autojac.bench.workloads import Func, Residual, burgers, lorenz96, sine

Program = list[list[Any]]
PLAIN: dict[Any, str] = {sine: "sin", burgers: "burgers", lorenz96: "lorenz96"}
ACTIVATIONS: dict[type, str] = {nn.Tanh: "tanh", nn.SiLU: "silu", nn.GELU: "gelu"}


def program_of(func: Func) -> tuple[Program, dict[str, np.ndarray[Any, Any]]]:
    """Write a function of a sample or a batch down as steps, and its weights by their names.

    Weights of linear layers are transposed: (inputs, outputs), as other libraries hold them.

    Raises:
        NotImplementedError: for a step that is not written for other libraries.
    """
    weights: dict[str, np.ndarray[Any, Any]] = {}
    return _steps(func, "", weights), weights


def _steps(func: Any, prefix: str, weights: dict[str, np.ndarray[Any, Any]]) -> Program:
    if func in PLAIN:
        return [[PLAIN[func]]]
    if type(func) in ACTIVATIONS:
        return [[ACTIVATIONS[type(func)]]]
    if isinstance(func, nn.Linear):
        weights[f"{prefix}weight"] = np.ascontiguousarray(func.weight.detach().numpy().T)
        weights[f"{prefix}bias"] = func.bias.detach().numpy()
        return [["linear", f"{prefix}weight", f"{prefix}bias"]]
    if type(func) in (nn.Sequential, Residual):
        inner = [step for name, layer in func.named_children() for step in _steps(layer, f"{prefix}{name}.", weights)]
        return [["residual", inner]] if type(func) is Residual else inner
    name = getattr(func, "__name__", type(func).__name__)
    raise NotImplementedError(f"{name} is not written for other libraries here")
