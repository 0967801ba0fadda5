"""What func sets in nests and objects among its arguments: a call leaves them as one plain call does."""

from __future__ import annotations

import functools
import types
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from autojac.errors import MutationError
from autojac.guards.assignments import AttributeMapping, Snapshot, replace_contents
from autojac.guards.captures import captures
from autojac.guards.provenance import slots
from autojac.guards.tokens import SCALARS, leaf_tokens
from autojac.torch_internals import pytree

CALLABLES = (types.FunctionType, types.MethodType, functools.partial)
MUTABLE = (dict, list, set, deque)


class NestCopies:
    """Copies of nests that func gets instead, and what it sets in them.

    Args:
        originals: the nests.
        copies: the same with other tensors.
    """

    def __init__(self, originals: Any, copies: Any) -> None:
        # copies are kept, so that the id of each stays its own
        self._pairs: list[tuple[Any, Any]] = []
        self._original: dict[int, Any] = {}
        self._original_place: dict[int, Any] = {}
        self._pair(originals, copies)
        self._held = Snapshot([copy for copy, _ in self._pairs if id(copy) in self._original_place])
        self._originals = Snapshot(list(self._original_place.values()))
        self._copies_of = Counter(map(id, self._original_place.values()))

    def _pair(self, original: Any, copy: Any) -> None:
        if original is copy or type(copy) in SCALARS or id(copy) in self._original:
            return
        if not isinstance(copy, Tensor) and type(original) is not type(copy):
            return
        self._original[id(copy)] = original
        self._pairs.append((copy, original))
        if isinstance(copy, Tensor):
            return
        if isinstance(copy, tuple):
            self._pair_all(zip(original, copy, strict=False))
            return
        for place, same in zip(places_in(original), places_in(copy), strict=False):
            self._pairs.append((same, place))
            self._original_place[id(same)] = place
            if isinstance(same, MutableMapping):
                self._pair_all((place[name], same[name]) for name in list(place) if name in same)
            elif not isinstance(same, set):
                self._pair_all(zip(place, same, strict=False))

    def _pair_all(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        for original, copy in pairs:
            self._pair(original, copy)

    def changes(self) -> list[tuple[Any, Any]]:
        """Return the places and keys of what func has set in the copies; the key is None where a place has no keys.

        Raises:
            MutationError: if it has set something in one of several copies of an object, which the others don't show.
        """
        changes = [(place, key) for place, key in self._held.differences() if id(place) in self._original_place]
        for place, _ in changes:
            original = self._original_place[id(place)]
            if self._copies_of[id(original)] > 1:
                raise _twice_error(original)
        return changes

    def require_alone(self, others: Callable[[], Iterable[Any]]) -> None:
        """Check that func reaches what it has set something in by the copies alone.

        Args:
            others: returns the places that func reaches otherwise.

        Raises:
            MutationError: if it is.
        """
        changed = [self._original_place[id(place)] for place, _ in self.changes()]
        changed += [place for place in self._originals.find_changes() if id(place) in self._copies_of]
        if changed:
            others_ids = {id(place) for place in others()}
            for original in changed:
                if id(original) in others_ids:
                    raise _twice_error(original)

    def write_back(self) -> None:
        """Set in the originals what func has set in the copies."""
        for place, key in self.changes():
            original = self._original_place[id(place)]
            if key is None:
                replace_contents(original, [self._own(value) for value in place])
            elif key in place:
                original[key] = self._own(place[key])
            else:
                del original[key]

    def _own(self, value: Any) -> Any:
        """Return a value with the originals instead of their copies."""
        originals = self._original
        if id(value) in originals:
            return originals[id(value)]
        leaves, spec = pytree.tree_flatten(value, is_leaf=lambda part: id(part) in originals)
        if not any(id(leaf) in originals for leaf in leaves):
            return value
        return pytree.tree_unflatten([originals.get(id(leaf), leaf) for leaf in leaves], spec)


def _twice_error(place: Any) -> MutationError:
    return MutationError(
        f"func sets something in a {type(place).__name__} that is passed to it twice, or passed and held by func as "
        "well, one of them as a copy. Let func reach it in one way, or return what it sets as aux with has_aux=True"
    )


@contextmanager
def write_back_copies(originals: Any, copies: Any) -> Iterator[None]:
    """Write back into nests what the block sets in copies of them; nothing if it raises."""
    pairs = NestCopies(originals, copies) if is_settable(originals) else None
    yield
    if pairs is not None:
        pairs.write_back()


class SettableArguments:
    """The arguments of one call in which func may set something.

    Each evaluation of func finds them as the call does, and its changes are undone unless `are_kept`.

    Args:
        args, kwargs: of the call.
        objects: those that evaluations get as they are, not as copies.
        func: the function.

    Attributes:
        are_changed: an evaluation has set something.
        are_kept: what evaluations set stays.
    """

    def __init__(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], objects: Iterable[Any], func: Callable[..., Any]
    ) -> None:
        self._args = tuple(args)
        self._func = func
        self._objects = [*objects, *kwargs.values()]
        self.are_changed = False
        self.are_kept = False

    @functools.cached_property
    def _places(self) -> list[Any]:
        return find_settable_places(self._objects)[0]

    def _others(self) -> list[Any]:
        """Return the places that func reaches by no positional nest."""
        return [*self._places, *Snapshot(captures(self._func).places).places]

    @contextmanager
    def evaluation(self, copies: Sequence[Any]) -> Iterator[None]:
        """Evaluate func on copies of the positional arguments, and on the others themselves."""
        pairs, snapshot = NestCopies(self._args, tuple(copies)), Snapshot(self._places)
        try:
            yield
            pairs.require_alone(self._others)
        except BaseException:
            snapshot.restore()
            raise
        if self.are_kept:
            pairs.write_back()
        else:
            self.are_changed = bool(snapshot.restore()) or bool(pairs.changes()) or self.are_changed

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Let what evaluations set inside stay."""
        self.are_kept = True
        try:
            yield
        finally:
            self.are_kept = False


def is_settable(values: Iterable[Any]) -> bool:
    """Check whether some of these are more than tensors and constants, so that func may set something in them."""
    return not all(isinstance(value, Tensor) or type(value) in SCALARS for value in values)


def places_in(value: Any) -> list[Any]:
    """Return where an object holds what can be set: itself, its attributes, its slots."""
    places: list[Any] = [value] if isinstance(value, MUTABLE) else []
    if isinstance(state := getattr(value, "__dict__", None), dict):
        places.append(state)
    if names := slots(type(value)):
        places.append(AttributeMapping(value, lambda: names))
    return places


def find_settable_places(values: Iterable[Any]) -> tuple[list[Any], list[Tensor]]:
    """Return the places that func may set through these objects, and the tensors that it may read or write in them."""
    places: list[Any] = []
    tensors: list[Tensor] = []
    for value, within in _visit(values):
        places += within
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, CALLABLES):
            captured = captures(value)
            places += captured.places
            tensors += captured.tensors
    return places, tensors


def contents_of(values: Iterable[Any]) -> tuple[int, tuple[float, ...]]:
    """Return a hash of the types, names and constants that objects hold, tensors aside, and the floats separately."""
    tokens: list[Any] = []
    numbers: list[float] = []
    for value, within in _visit(values):
        tokens.append(type(value))
        if type(value) is float:
            numbers.append(value)
        elif isinstance(value, (int, str, bytes, complex)):
            tokens.append(value)
        elif not isinstance(value, (Tensor, type, tuple, frozenset, *CALLABLES)):
            tokens.append(leaf_tokens(value))
        for place in within:
            tokens += place if isinstance(place, MutableMapping) else ()
    return hash(tuple(tokens)), tuple(numbers)


def _is_leaf(value: Any) -> bool:
    # an array's contents are no place, and what the library locks, logs or types with reaches nothing of the user's
    return type(value).__module__ == "numpy" or leaf_tokens(value) is not None


def _visit(values: Iterable[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Yield each object that these are or lead to, always in the same order, with the places in it."""
    visited: dict[int, Any] = {}
    todo = list(values)
    while todo:
        value = todo.pop()
        if type(value) not in SCALARS:
            if id(value) in visited:
                continue
            visited[id(value)] = value
        places: list[Any] = []
        if isinstance(value, (tuple, frozenset)):
            todo += value
        elif not isinstance(value, (Tensor, type, *SCALARS, *CALLABLES)) and not _is_leaf(value):
            places = places_in(value)
        for place in places:
            todo += place.values() if isinstance(place, MutableMapping) else place
        yield value, places
