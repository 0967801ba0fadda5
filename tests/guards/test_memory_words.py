"""Words in memory follow every store to the field that they belong to, and to nothing else."""

from __future__ import annotations

import builtins
import statistics
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from autojac.guards import compiled_check, memory_words
from autojac.guards.guard import Change, Guard
from autojac.guards.memory_words import CONTENT, FIELDS, LENGTH, NAMES, SIZES, VERSION, MemoryWords

NOTHING = Change("", {})


def unchanged(words: MemoryWords) -> bool:
    """Check words as the function does that is generated for a guard."""
    draft = compiled_check._Draft(words)
    draft.memory_words()
    return draft.function()()


def function() -> None: ...


def other() -> int:
    return 1


class Kind: ...


class OtherKind: ...


def cell(value: Any = None) -> types.CellType:
    return types.CellType(value)


STORES: dict[str, tuple[Callable[[], Any], str, Callable[[Any], Any]]] = {
    "code": (
        lambda: types.FunctionType(function.__code__, {}),
        "code",
        lambda f: setattr(f, "__code__", other.__code__),
    ),
    "defaults": (
        lambda: types.FunctionType(function.__code__, {}),
        "defaults",
        lambda f: setattr(f, "__defaults__", (1,)),
    ),
    "keyword defaults": (
        lambda: types.FunctionType(function.__code__, {}),
        "keyword defaults",
        lambda f: setattr(f, "__kwdefaults__", {"a": 1}),
    ),
    "attributes": (
        lambda: types.FunctionType(function.__code__, {}),
        "attributes",
        lambda f: setattr(f, "__dict__", {}),
    ),
    "content": (cell, CONTENT, lambda c: setattr(c, "cell_contents", 1)),
    "content gone": (cell, CONTENT, lambda c: delattr(c, "cell_contents")),
    "first content": (types.CellType, CONTENT, lambda c: setattr(c, "cell_contents", None)),
    "class": (Kind, "class", lambda one: setattr(one, "__class__", OtherKind)),
    "length": (dict, LENGTH, lambda d: d.update(a=1)),
    "length in order": (OrderedDict, LENGTH, lambda d: d.update(a=1)),
    "size": (list, SIZES[list], lambda one: one.append(1)),
    "used": (set, SIZES[set], lambda one: one.add(1)),
    "version": (lambda: {"a": 1}, VERSION, lambda d: d.update(a=2)),
    "version of other": (lambda: {"a": 1}, VERSION, lambda d: d.pop("a")),
}


@pytest.mark.parametrize("name", STORES)
def test_a_store_is_noticed_and_nothing_else(name: str) -> None:
    make, field, store = STORES[name]
    owner, like_it = make(), make()
    words = MemoryWords()
    words.add(owner, field)
    words.note()
    if field == VERSION and sys.version_info >= (3, 13):
        assert not words  # Python counts no more all changes of a dict
        return
    assert len(words) == 1
    store(like_it)
    assert unchanged(words)
    store(owner)
    assert not unchanged(words)
    words.note()
    assert unchanged(words)


@settings(max_examples=30)
@given(st.lists(st.sampled_from("+-=c"), max_size=12), st.sampled_from([dict, OrderedDict]))
def test_a_container_is_empty_where_its_word_says_so(steps: list[str], kind: type) -> None:
    held, numbers, few = kind(), list[int](), set[int]()
    words = MemoryWords()
    for owner, field in ((held, LENGTH), (numbers, SIZES[list]), (few, SIZES[set])):
        words.add(owner, field)
    words.note()
    for step in steps:
        key = len(held)
        if step == "+":
            held[key] = key
            numbers.append(key)
            few.add(key)
        elif step == "-" and held:
            held.popitem()
            numbers.pop()
            few.remove(key - 1)
        elif step == "c":
            held.clear()
            numbers.clear()
            few.clear()
        assert unchanged(words) == (not held)


def test_every_field_has_a_word_on_cpython() -> None:
    assert all(memory_words.offset_of(field) is not None for field in FIELDS)


def test_a_field_whose_stores_no_word_follows_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere() -> Any:
        kept = types.CellType()
        for value in ("a", "b"):
            kept.cell_contents = value
            yield kept, id(value) + 1

    monkeypatch.setitem(memory_words.FIELDS, "elsewhere", (types.CellType, elsewhere))
    assert memory_words.offset_of.__wrapped__("elsewhere") is None
    words = MemoryWords()
    monkeypatch.setattr(memory_words, "offset_of", lambda field: None)
    words.add(cell(), CONTENT)
    words.note()
    assert not words


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="Python counts no more all changes of a dict")
def test_names_count_and_others_beside_them_do_not() -> None:
    scope: dict[str, Any] = {"read": 1}
    words = MemoryWords()
    words.add(scope, NAMES)
    words.note()
    words.expect(scope, "read", scope["read"])
    for turn in range(3):
        scope["written"] = turn
        assert unchanged(words)
    scope["read"] = 2
    assert not unchanged(words)
    scope["read"] = 1
    assert unchanged(words)
    scope["other"] = scope.pop("read")
    assert not unchanged(words)


def test_names_of_pythons_own_modules_are_noticed_whatever_else_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard(lambda x: x * abs(statistics.mean([1, 2])))
    assert guard.reason == ""
    for owner, name in ((statistics, "mean"), (builtins, "abs")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, "autojac_other", 1, raising=False)
            assert guard.is_unchanged()
            patch.setattr(owner, name, max)
            assert not guard.is_unchanged()
            assert name in guard.diff().what
        assert guard.is_unchanged()
        assert guard.diff() == NOTHING
