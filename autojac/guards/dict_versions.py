"""Count the changes of dicts: an unchanged count says that a dict holds what it held, whatever its size."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Sequence
from typing import Any

from autojac.guards.places import Attributes, Callables, Items, Place, class_dict
from autojac.torch_internals import dict_version

STORES = 200
"""Stores of a trial: bytecode is specialized after a dozen runs, or after 16, 32 or 64 more where that fails."""


@functools.cache
def change_counter(of_instances: bool) -> Callable[[dict[Any, Any]], int] | None:
    """Return what counts the changes of a dict in C; None where torch has no such thing, or it misses changes.

    Args:
        of_instances: whether the dict may be that of an instance, or else is of a class or a module: Python 3.13.0
            hides stores to attributes from watchers of the dict, but of instances only.
    """
    if dict_version is None:
        return None
    return dict_version if all(map(functools.partial(counts_changes, dict_version), _probes(of_instances))) else None


def versions_of(places: Sequence[Place], restless: Collection[int] = ()) -> dict[int, int]:
    """Return the versions of the dicts behind places, by id, as far as something counts them.

    Args:
        places: the places.
        restless: ids of dicts that are written to all the time without effect: these are compared entry by entry.
    """
    versions: dict[int, int] = {}
    for place in places:
        if isinstance(place, Items) and id(place.owner) not in restless:
            version = change_counter(not isinstance(place, (Attributes, Callables)))
            if version is not None:
                versions[id(place.owner)] = version(place.owner)
    return versions


def counts_changes(version: Callable[[Any], int], probe: Any) -> bool:
    """Check whether every store to an attribute is counted for the dict that holds it, also by specialized bytecode."""
    store = types.FunctionType(_store.__code__.replace(), {})  # not specialized for another kind of object
    store(probe, 0)
    held = class_dict(probe) if isinstance(probe, type) else vars(probe)
    for number in range(STORES):
        before = version(held)
        store(probe, number + 1)
        stored = version(held)
        held["stored"] = -1
        written = version(held)
        del probe.stored
        if len({before, stored, written, version(held)}) < 4 or version(held) != version(held):
            return False
        store(probe, 0)
    return True


def _probes(of_instances: bool) -> list[Any]:
    fresh = type("Probe", (), {})
    return [fresh()] if of_instances else [fresh, types.ModuleType("probe")]


def _store(probe: Any, value: int) -> None:
    probe.stored = value
