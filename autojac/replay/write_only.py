"""What a function sets in each call and never reads: no replay has to set it, and no guard has to compare it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from autojac.errors import UnsupportedError
from autojac.guards.assignments import AttributeMapping, BufferMapping, Snapshot, VariableMapping
from autojac.guards.function_state import FunctionState
from autojac.guards.places import Spot
from autojac.guards.walker import MODULE_FIELDS


def leave_write_only(evaluate: Callable[[], Any], places: Sequence[Any], function_state: FunctionState) -> None:
    """Let a function's guard leave out what each call sets and no code that runs reads.

    The last result of a flow and a counter of calls are such. That none reads them is told by their names alone, so an
    attribute counts as read where one of the same name is.

    Args:
        evaluate: calls the function; whoever calls this puts back what it sets.
        places: where it may set something.
        function_state: of the function; it knows the code that runs.

    Raises:
        UnsupportedError: if some of what a call sets may be read in a later one.
    """
    before = Snapshot(places)
    evaluate()
    guard = function_state.present.guard
    names: list[str] = []
    spots: list[Spot] = []
    for place, key in before.differences():
        named = {} if key is None or isinstance(place, BufferMapping) else guard.spots_of(place, key)
        if not named or not isinstance(key, str):
            raise UnsupportedError(f"func changes {_name_place(place, key)} that it keeps from call to call")
        kind = None if isinstance(place, VariableMapping) else guard.class_of(place)
        if key in MODULE_FIELDS or (kind is None and not isinstance(place, VariableMapping)):
            raise UnsupportedError(f"func changes {_name_place(place, key)} that it keeps from call to call")
        where = function_state.where_read(key, kind)
        if where:
            (label, *_) = named.values()
            raise UnsupportedError(f"func sets {label} and may read it ({where}): a replay would not set it")
        names.append(key)
        spots += named
    function_state.leave_unwatched(names, spots)


def _name_place(place: Any, key: Any) -> str:
    if isinstance(place, AttributeMapping):
        kind = place.owner if isinstance(place.owner, type) else type(place.owner)
        return f"the attribute {key} of {kind.__name__}"
    return f"the buffer {key}" if isinstance(place, BufferMapping) else f"a {type(place).__name__}"
