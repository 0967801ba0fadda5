"""The stored plans of one function: their keys, and the store, opened when it is first needed."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import types
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from autojac.core.garbage import gc_disabled
from autojac.core.module_function import ModuleFunction
from autojac.core.options import Options, parse_bytes
from autojac.core.pattern import Indices
from autojac.core.plan import Plan, Trial
from autojac.core.product_functions import ComposedFunction
from autojac.core.signature import Signature
from autojac.guards.captures import fingerprint
from autojac.methods.base import Method, build_if_known
from autojac.planning.pinned_plans import pinned_store
from autojac.planning.search import calibrate
from autojac.planning.search.corrections import corrections_from
from autojac.problem.machine import DEFAULT, SIZES, Machine
from autojac.store.keys import Key, environment_key, operation_key
from autojac.store.uninterruptible import run_uninterrupted

if TYPE_CHECKING:
    from autojac.store import PlanStore

Keys = tuple[Key, Key]
"""The keys of a plan in the store: of the operation, and of the environment that it was tuned in."""

_shared: dict[Any, PlanStore] = {}
_machines: WeakKeyDictionary[PlanStore, dict[tuple[Key, str], Machine | None]] = WeakKeyDictionary()
"""For each store and environment the machine by the number of threads, and under "" the corrections by its trials."""


class PlanRepository:
    """The stored plans of one function.

    Args:
        func: the function; its fingerprint is part of every key.
        options: `store` says where plans live; what changes a plan's choice is part of every key.
    """

    def __init__(self, func: Callable[..., Any], options: Options) -> None:
        self.func = func
        self.options = options
        self.function_name = function_name(func)

    def __autojac_reach__(self) -> dict[str, Any]:
        """Return nothing: where results are kept changes none of them."""
        return {}

    @property
    def store(self) -> PlanStore:
        """The store: the pinned one, else one per location and process; in memory, one per wrapper."""
        return pinned_store() or self._own_store

    @cached_property
    def _own_store(self) -> PlanStore:
        # an import that Ctrl-C interrupts would leave SQLAlchemy half loaded for the rest of the process
        with gc_disabled():
            run_uninterrupted(functools.partial(importlib.import_module, "autojac.store.store"))
        from autojac.store import PlanStore

        place = self.options.store
        if isinstance(place, PlanStore):
            return place
        from autojac.store.location import default_location

        key = str(place) if place is not None else default_location()
        if key == ":memory:":
            return PlanStore(place)
        if key not in _shared:
            _shared[key] = PlanStore(place)
        return _shared[key]

    @property
    def description(self) -> str:
        return self.store.description

    def find(self, keys: Keys) -> Plan | None:
        return self.store.find(*keys)

    def hints(self, keys: Keys) -> list[Method]:
        """Return methods that won on other devices, to be tried first."""
        methods = (build_if_known(plan.method) for plan in self.store.hints(keys[0]))
        return [method for method in methods if method is not None]

    def trials(self, keys: Keys) -> tuple[Trial, ...]:
        """Return what became of every candidate in the search that made the stored plan."""
        return self.store.trials(*keys)

    def save(self, keys: Keys, plan: Plan) -> None:
        """Keep a plan, unless plans are pinned."""
        if pinned_store() is None:
            self.store.save(*keys, plan, self.function_name)

    def coloring(self, key: str) -> dict[str, Indices] | None:
        return self.store.coloring(key)

    def save_coloring(self, key: str, arrays: Mapping[str, Indices]) -> None:
        self.store.save_coloring(key, arrays)

    def refute(self, keys: Keys, reason: str) -> None:
        """Never find a plan again, unless plans are pinned: then each process refutes it by itself."""
        if pinned_store() is None:
            self.store.refute(*keys, reason)

    def keys(self, signature: Signature, digest: str = "") -> Keys:
        """Return the keys of a plan: by the function (its digest, by default as it is now), the call and the device."""
        options = self.options
        declared = options.declared
        settings = {
            "memory_limit": parse_bytes(options.memory_limit),
            "randomness": options.randomness,
            "coupling": None if declared is None else declared.to_json(),
        }
        digest = digest or fingerprint(self.func, options.version)
        # Without the module: what a script defines as `__main__`, others import by the name of its file.
        operation = operation_key(_name(self.func).__qualname__, digest, signature, settings)
        return operation, environment_key(signature.leaves[0].device)

    def machine(self, env: Key, device: str, largest: float | None = None) -> Machine:
        """Return the constants of the cost model, corrected by the store's trials; each process asks the store once.

        Args:
            env: the environment's key.
            device: a torch device.
            largest: measure the machine for operators that move so many bytes at most, where that was not done yet, in
                a tenth of a second, and store the result; None measures nothing.
        """
        threads = str(torch.get_num_threads())
        machines = _machines.setdefault(self.store, {})
        if (env, threads) not in machines:
            stored = (self.store.environment(env) or {}).get(threads)
            machines[env, threads] = Machine.from_json(stored) if isinstance(stored, dict) else None
        if (env, "") not in machines:
            machines[env, ""] = dataclasses.replace(DEFAULT, corrections=corrections_from(self.store.predictions(env)))
        machine, corrected = machines[env, threads], machines[env, ""]
        assert corrected is not None
        if largest is not None and (machine is None or not machine.has_measured(largest)):
            machine = machines[env, threads] = calibrate.measured_machine(device, threads, largest > SIZES[1])
            others = self.store.environment(env) or {}
            self.store.save_environment(env, {**others, threads: machine.to_json()})
        return dataclasses.replace(machine or DEFAULT, corrections=corrected.corrections)


def function_name(func: Callable[..., Any]) -> str:
    """Return a human-readable name of a function, by where it is defined or what it is composed of."""
    if isinstance(func, ModuleFunction):
        return f"{function_name(func.module)} in its parameters"
    if isinstance(func, ComposedFunction):
        return f"{function_name(func.func)} {func.kind}"
    if hasattr(type(func), "__autojac_reach__") and hasattr(func, "func"):
        return f"{type(func).__name__} of {function_name(func.func)}"
    if isinstance(func, functools.partial):
        return f"partial({function_name(func.func)})"
    if isinstance(func, torch.nn.Sequential):
        kinds = [type(layer).__name__ for layer in func]
        return f"Sequential({', '.join(kinds if len(kinds) < 5 else [*kinds[:2], '...', kinds[-1]])})"
    if isinstance(func, types.MethodType) and isinstance(func.__self__, type):  # as a Function's apply
        return f"{function_name(func.__self__)}.{func.__name__}"
    named = _name(func)
    home = getattr(named, "__module__", None) or "?"
    if named.__qualname__.endswith("<lambda>"):
        return f"lambda at {Path(func.__code__.co_filename).name}:{func.__code__.co_firstlineno}"
    name = named.__qualname__.removeprefix("_VariableFunctionsClass.")  # where torch keeps its own
    return str(name) if home in ("__main__", "builtins") else f"{home}.{name}"


def _name(func: Callable[..., Any]) -> Any:
    return func if hasattr(func, "__qualname__") else type(func)
