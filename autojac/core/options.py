"""The options of `AutoJacobian`: checked once, with the nearest known name suggested for a misspelled one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal, Self, TypedDict, get_args

from autojac.autodiff.derivative_terms import Terms
from autojac.core import pytree
from autojac.core.batch_axes import AUTO, EXPECTED
from autojac.core.plan import Effort
from autojac.core.signature import Layout
from autojac.core.structure import Coupling, Structure
from autojac.errors import OptionError, kind_of, nearest, require_choice

OnMiss = Literal["online", "tune", "estimate", "error"]
Verify = Literal["auto", "always", "never"]
Randomness = Literal["error", "different", "same"]

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Options:
    """Options of an `AutoJacobian`; its docstring explains them.

    Attributes:
        of: the derivatives by input columns that are asked for instead of a Jacobian; empty for a Jacobian.
        symmetric: the Jacobian of each sample is known to be symmetric, as that of a gradient is.
    """

    argnums: int | tuple[int, ...] = 0
    in_dims: Any = "auto"
    layout: Layout = "blocks"
    has_aux: bool = False
    effort: Effort = "quick"
    on_miss: OnMiss = "online"
    budget_s: float | None = None
    memory_limit: int | str | None = None
    randomness: Randomness = "error"
    coupling: Literal["auto"] | Coupling | Structure = "auto"
    verify: Verify = "auto"
    store: Any = field(default=None, repr=False)  # which may be a URL with a password
    version: str = ""
    of: Terms = ()
    symmetric: bool = False

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of all options, in the order of the signature of `AutoJacobian`."""
        return tuple(option.name for option in dataclasses.fields(cls) if option.name not in ("of", "symmetric"))

    @classmethod
    def from_keywords(cls, given: Mapping[str, Any]) -> Self:
        """Return options made of keyword arguments.

        Raises:
            OptionError: for an unknown name or a value that is not accepted.
        """
        names = cls.names()
        for name in given:
            if name not in names:
                raise OptionError(f"unknown option {name!r}{nearest(name, names)}; known are {', '.join(names)}")
        options = cls(**given)
        for name, accepted in (
            ("layout", get_args(Layout)),
            ("effort", get_args(Effort)),
            ("on_miss", get_args(OnMiss)),
            ("randomness", get_args(Randomness)),
            ("verify", get_args(Verify)),
        ):
            require_choice(name, getattr(options, name), accepted)
        if not isinstance(options.coupling, Structure):
            require_choice("coupling", options.coupling, ("auto", *get_args(Coupling)))
        check_budget(options.budget_s)
        parse_bytes(options.memory_limit)
        if not isinstance(options.has_aux, bool):
            raise OptionError(f"has_aux must be True or False, got {options.has_aux!r}")
        if options.has_aux and options.randomness == "same":
            raise OptionError(
                "has_aux and randomness='same' exclude each other, since each sample would have an aux of its own. "
                "Leave one of them out"
            )
        check_in_dims(options.in_dims)
        check_store(options.store)
        if not isinstance(options.version, str):
            raise OptionError(f"version must be a string, got {options.version!r}")
        numbers = options.argnums if isinstance(options.argnums, tuple) else (options.argnums,)
        if not numbers or not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            raise OptionError(f"argnums must be an int or a tuple of ints, got {options.argnums!r}")
        return options

    def replace(self, **changes: Any) -> Self:
        """Return the same options but for some."""
        return dataclasses.replace(self, **changes)

    @property
    def declared(self) -> Structure | None:
        """The structure that the user declared, if any."""
        if isinstance(self.coupling, Structure):
            return self.coupling
        return None if self.coupling == "auto" else Structure(self.coupling, "declared")


class OptionValues(TypedDict, total=False):
    """The options as keyword arguments of `of_parameters`, which has no `argnums` and a separate `in_dims`."""

    layout: Layout
    has_aux: bool
    effort: Effort
    on_miss: OnMiss
    budget_s: float | None
    memory_limit: int | str | None
    randomness: Randomness
    coupling: Literal["auto"] | Coupling | Structure
    verify: Verify
    store: Any
    version: str


def check_budget(budget_s: Any) -> None:
    """Raise `OptionError` unless `budget_s` is None or a number of seconds."""
    number = isinstance(budget_s, (int, float)) and not isinstance(budget_s, bool)
    if budget_s is not None and not (number and budget_s >= 0):
        raise OptionError(f"budget_s must be a number of seconds, zero or more, got {budget_s!r}")


def check_in_dims(in_dims: Any) -> None:
    """Raise `OptionError` unless `in_dims` holds nothing but ints, None and `"auto"`; each call checks if it fits."""
    for entry in pytree.tree_leaves(in_dims, every=True):
        if entry is not None and entry != AUTO and (not isinstance(entry, int) or isinstance(entry, bool)):
            raise OptionError(f"{EXPECTED}; got {in_dims!r}")


def check_store(store: Any) -> None:
    """Raise `OptionError` unless `store` is a `PlanStore`, or says where one is."""
    if not (store is None or isinstance(store, (str, PathLike)) or hasattr(store, "find")):
        raise OptionError(f"store must be a PlanStore, a path, ':memory:' or a database URL, got {kind_of(store)}")


def format_bytes(count: int | None) -> str:
    """Return a number of bytes with a readable unit."""
    if count is None:
        return "-"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def parse_bytes(limit: int | str | None, name: str = "memory_limit") -> int | None:
    """Return the bytes in `8589934592`, `"8GiB"` or `"500 MB"`."""
    if limit is None:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(limit))
    if isinstance(limit, bool) or match is None or match[2].upper() not in UNITS:
        raise OptionError(f"{name} must be bytes or a size such as '8GiB' or '500MB', got {limit!r}")
    size = int(float(match[1]) * UNITS[match[2].upper()])
    if size <= 0:
        raise OptionError(f"{name} must be positive, got {limit!r}")
    return size
