"""Compare all that a callable reads besides its arguments with what it read before."""

from __future__ import annotations

import struct
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from autojac.guards.assignments import AttributeMapping
from autojac.guards.compiled_check import Reading, checker
from autojac.guards.dict_versions import versions_of
from autojac.guards.object_places import ObjectPlaces
from autojac.guards.places import Cells, Fields, Items, PartialPlace, Place, Spot, class_dict
from autojac.guards.tensor_metadata import Metadata, describe_metadata
from autojac.guards.tokens import SCALARS

MOST_WRITES: Final = 2
"""Writes without effect to a dict, such as a flag that is set and put back, after which its entries are compared."""
_NOWHERE: Final[Mapping[Spot, Any]] = MappingProxyType({})


class Change(NamedTuple):
    """What differs from before.

    Attributes:
        what: a human-readable name of the first difference; empty if there is none but exchanged tensors.
        tensors: where nothing else differs, the tensor that now stands wherever another stood, by the id of that one.
        spots: where it differs, with the objects that these ids belong to.
        exchanged: where tensors were exchanged, likewise.
    """

    what: str
    tensors: dict[int, Tensor]
    spots: Mapping[Spot, Any] = _NOWHERE
    exchanged: Mapping[Spot, Any] = _NOWHERE


class Guard:
    """Everything that a callable reads besides its arguments, and whether it is unchanged.

    Not compared: the values of tensors, which a replay reads in each call; `__dict__` and hooks of torch's own modules
    that are set past the attributes that hold them; what is computed from outside the process.

    Args:
        func: the callable.
        ran: the code of installed packages that runs in a call, and is followed.
        ignored: the spots that calls set and none reads.
        seen: all code that ran. Where something in a package of the user's can't be listed, only this code is followed.

    Attributes:
        reason: why not everything that `func` reads can be listed, as a sentence; empty if it can. What can be listed
            is compared in any case.
        tensors: the distinct tensors that it reaches: parameters, buffers, those in closures, globals and attributes.
        settable: variables, attributes and containers of installed packages that what ran may set.
        codes: the code of every function that it reaches and that is followed, nested functions included.
        backwards: the code of derivatives of Functions that it reaches; no run shows whether they have run.
        is_unchanged: tells whether everything is the object that it was; quick, and runs none of the user's code.
            `rebase` replaces it.
    """

    reason: str
    tensors: tuple[Tensor, ...]
    codes: tuple[types.CodeType, ...]
    settable: tuple[Any, ...]
    backwards: tuple[types.CodeType, ...]
    is_unchanged: Callable[[], bool]

    def __init__(
        self,
        func: Callable[..., Any],
        ran: Collection[types.CodeType] = (),
        ignored: Collection[Spot] = (),
        seen: Collection[types.CodeType] = (),
    ) -> None:
        self._func = func
        self._seen = seen
        self._ran = ran
        self._ignored = ignored
        self._walk()

    def spots_of(self, place: Any, key: Any) -> dict[Spot, str]:
        """Return what identifies a variable or attribute that func may set, with its human-readable names.

        Args:
            place: a dict, or one of the mappings of `assignments`.
            key: a key of it.
        """
        owner = getattr(place, "place", getattr(place, "owner", place))
        owners = {id(owner), id(class_dict(owner)) if isinstance(owner, type) else 0}
        spots = {one.spot(key): one.label(key) for one in self._places if id(one.owner) in owners and "{}" in one.name}
        for one in self._places if isinstance(owner, types.CellType) else ():
            names = one.names if isinstance(one, Cells) else ()
            spots |= {
                one.spot(name): one.label(name) for cell, name in zip(one.owner, names, strict=False) if cell is owner
            }
        return spots

    def class_of(self, place: Any) -> type | None:
        """Return the class of the object whose attributes a place holds, or the class itself; None if unknown."""
        if isinstance(place, AttributeMapping):
            return place.owner if isinstance(place.owner, type) else type(place.owner)
        objects = (one.owner for one in self._places if isinstance(one, Fields))
        return next((type(one) for one in objects if getattr(one, "__dict__", None) is place), None)

    def is_unchanged_besides(self, spots: Collection[Spot]) -> Callable[[], bool]:
        """Return a check whether everything but these spots still is what it is now."""
        if not spots:
            return self.is_unchanged
        places = [rest for place in self._places if (rest := place.without(spots)) is not None]
        tensors = tuple(tensor for tensor in self.tensors if _spot(tensor) not in spots)

        def read() -> Sequence[Reading]:
            return [(place, *place.read()) for place in places]

        return checker(read, places, Metadata(tensors), self._restless)

    def diff(self) -> Change:
        """Distinguish real changes from writes without effect, such as an attribute set to its old value; slow."""
        try:
            now = versions_of(self._places, self._restless)
            unmoved = {number for number, version in now.items() if version == self._versions.get(number)}
            # the order of an OrderedDict may change where its entries do not
            readings = [
                one for one in self._readings if not isinstance(one[0], Items) or id(one[0].owner) not in unmoved
            ]
            change = _Comparison(self._names, self._metadata).of(readings)
            # an exchanged tensor must be exchanged everywhere
            return _Comparison(self._names, self._metadata).of(self._readings) if change.tensors else change
        except RuntimeError:  # another thread is writing there
            return Change("something that another thread is changing", {})

    def rebase(self) -> None:
        """Compare from now on with the present state; where it differs, everything is listed again."""
        if self.diff() == Change("", {}):
            self._note_writes()
            self._compile()
        else:
            self._walk()

    def _walk(self) -> None:
        reached = ObjectPlaces(self._ran)
        reached.follow(self._func)
        if reached.reason and self._seen:
            narrowed = ObjectPlaces((*self._ran, *self._seen), narrow=True)
            narrowed.follow(self._func)
            reached = reached if narrowed.reason else narrowed
        self.reason = reached.reason
        self.codes = reached.codes
        self.settable = tuple(reached.settable)
        self.backwards = tuple(reached.backwards)
        places = [(place, place.without(self._ignored)) for place in reached.places]
        self._places = tuple(rest for _, rest in places if rest is not None)
        # else the guard would keep the result of the last call alive, with its graph
        unwatched = {id(value) for place, rest in places if rest is not place for value in place.read()[1]}
        unwatched -= {id(value) for _, rest in places if isinstance(rest, PartialPlace) for value in rest.read()[1]}
        self.tensors = tuple({id(tensor): tensor for tensor in reached.tensors if id(tensor) not in unwatched}.values())
        self._names = reached.labels
        self._writes: dict[int, int] = {}
        self._restless: set[int] = set()
        self._compile()

    def _note_writes(self) -> None:
        """Find the dicts that are written to repeatedly without effect, as by a setting that is restored."""
        for number, version in versions_of(self._places, self._restless).items():
            if version != self._versions.get(number, version):
                self._writes[number] = self._writes.get(number, 0) + 1
        self._restless |= {number for number, count in self._writes.items() if count >= MOST_WRITES}

    def _compile(self) -> None:
        self._metadata = Metadata(self.tensors)
        self._versions = versions_of(self._places, self._restless)
        self.is_unchanged = checker(self._read, self._places, self._metadata, self._restless)

    def _read(self) -> Sequence[Reading]:
        self._readings = [(place, *place.read()) for place in self._places]
        return self._readings


class _Comparison:
    """One comparison of all places with what they held."""

    def __init__(self, names: dict[int, str], metadata: Metadata) -> None:
        self._names = names
        self._known = {id(t): known for t, known in zip(metadata.tensors, metadata.known, strict=True)}
        self._metadata = metadata
        self._now: dict[int, Tensor] = {}
        self._was: dict[int, Tensor] = {}
        self._differing: list[str] = []
        self._spots: dict[Spot, Any] = {}
        self._exchanged: dict[Spot, Any] = {}

    def of(self, readings: Sequence[Reading]) -> Change:
        for place, keys, values in readings:
            self._place(place, keys, values)
        self._tensors()
        if self._differing:
            return Change(self._differing[0], {}, self._spots)
        if len({id(tensor) for tensor in self._now.values()}) < len(self._now):
            return Change("a tensor that stands for two", {})
        swapped = {number: now for number, now in self._now.items() if now is not self._was[number]}
        return Change("", swapped, _NOWHERE, self._exchanged)

    def _place(self, place: Place, keys: list[Any], values: list[Any]) -> None:
        now, new_values = place.read()
        changed_keys = [old for old, new in zip(keys, now, strict=False) if not alike(old, new)]
        changed_keys += max(keys, now, key=len)[min(len(keys), len(now)) :]
        if changed_keys:
            self._differs(place.label(changed_keys[0]), place.spot(), place.owner)
            return
        for key, old, new in zip(keys, values, new_values, strict=True):
            if id(old) in self._known and type(new) is type(old):  # isinstance might run the object's code
                if not self._swap(old, new):
                    self._differs(place.label(key), place.spot(key), place.owner)
                elif new is not old:
                    self._exchanged[place.spot(key)] = place.owner
            elif not alike(old, new):
                self._differs(place.label(key), place.spot(key), place.owner)

    def _tensors(self) -> None:
        tensors = self._metadata.tensors
        for tensor, known, hooked in zip(tensors, self._metadata.known, self._metadata.hooked, strict=True):
            name = self._names.get(id(tensor), "a tensor")
            if describe_metadata(tensor) != known:
                self._differs(f"shape, type or requires_grad of {name}", _spot(tensor), tensor)
            elif bool(tensor._backward_hooks) != hooked:
                self._differs(f"hook of {name}", _spot(tensor), tensor)

    def _differs(self, label: str, spot: Spot, owner: Any) -> None:
        self._differing.append(label)
        self._spots[spot] = owner

    def _swap(self, old: Tensor, new: Tensor) -> bool:
        """Check whether a tensor may replace another, as it does everywhere else."""
        if self._now.setdefault(id(old), new) is not new:
            return False
        self._was[id(old)] = old
        known = self._known[id(old)]
        return new is old or (known == describe_metadata(new) and not new._backward_hooks and not new.__dict__)


def _spot(tensor: Tensor) -> Spot:
    return id(tensor), Tensor, None


def alike(one: Any, other: Any) -> bool:
    """Check whether two objects are identical, or equal constants of one type; none of the user's code runs."""
    if one is other:
        return True
    kind = type(one)
    if kind is not type(other):
        return False
    if kind is float:
        return struct.pack("d", one) == struct.pack("d", other)
    if kind is complex:
        return alike(one.real, other.real) and alike(one.imag, other.imag)
    if kind in (tuple, torch.Size):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other) if kind in SCALARS or kind is torch.device else False
