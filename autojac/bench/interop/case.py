"""A case: a function or model of another library, small and with random weights, and the list of all of them."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autojac.bench.interop import models

Func = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Built:
    """A case made ready.

    Attributes:
        func: maps (B, *in) to (B, *out).
        x: where to differentiate.
        module: holds the parameters that func reads; None where it has none.
        options: for `AutoJacobian`.
    """

    func: Func
    x: Tensor
    module: nn.Module | None = None
    options: dict[str, Any] = field(default_factory=dict)


Build = Callable[[], Built]


@dataclass(frozen=True)
class Case:
    """A function or model of a library.

    Attributes:
        name: `library/thing`.
        modules: what must be importable.
        builder: makes it, with the same weights and input each time after the same seed.
        trains: it has parameters, and a training step on its Jacobian makes sense.
    """

    name: str
    modules: tuple[str, ...]
    builder: Build
    trains: bool = False

    @property
    def library(self) -> str:
        return self.name.split("/")[0]

    @property
    def missing(self) -> str | None:
        """The first module that isn't installed; None if all are."""
        return next((name for name in self.modules if importlib.util.find_spec(name) is None), None)

    def build(self, seed: int = 0) -> Built:
        """Make it, always alike for a seed; the caller's random state stays as it is."""
        with torch.random.fork_rng(), warnings.catch_warnings():
            # what a library warns of while it loads is its own matter
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            return self.builder()


_CASES: dict[str, Case] = {}


def case(name: str, *modules: str, trains: bool = False) -> Callable[[Build], Build]:
    """Add what a builder makes to the cases.

    Args:
        name: `library/thing`.
        modules: what must be importable; the library itself by default.
        trains: whether it has parameters.
    """

    def add(builder: Build) -> Build:
        needed = modules or (name.split("/", maxsplit=1)[0],)
        assert name not in _CASES
        _CASES[name] = Case(name, needed, builder, trains)
        return builder

    return add


def cases(libraries: Sequence[str] = ()) -> list[Case]:
    """Return the cases of these libraries, or single ones by name; all by default."""
    for module in pkgutil.iter_modules(models.__path__):
        importlib.import_module(f"{models.__name__}.{module.name}")
    return [c for c in _CASES.values() if not libraries or c.library in libraries or c.name in libraries]


def elsewhere(x: Tensor) -> Tensor:
    """Return another point of the same shape, near enough to be as regular."""
    return (0.9 * x + 0.03).detach()
