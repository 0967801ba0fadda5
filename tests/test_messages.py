"""Every message says what was expected, what came, and what to do; every place that makes one is in the table."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import pkgutil
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest

import autojac
from autojac.errors import AutojacError, AutojacWarning
from messages import INTERNAL, MESSAGES, Message

PACKAGE = Path(autojac.__file__).parent
Site = tuple[str, int]


@functools.cache
def seen(message: Message) -> tuple[tuple[str, ...], frozenset[Site]]:
    """Provoke a message: the texts of its class that reached the caller, and the lines of autojac that were running."""
    lines: set[Site] = set()

    def note(frame: FrameType | None) -> None:
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                lines.add((str(path.relative_to(PACKAGE)), frame.f_lineno))
            frame = frame.f_back

    def making(error: AutojacError, *args: Any, **kwargs: Any) -> None:
        note(sys._getframe(1))
        Exception.__init__(error, *args)

    def warning(text: str, category: type[Warning], stacklevel: int = 1) -> None:
        note(sys._getframe(1))
        told.append((text, category))

    told: list[tuple[str, type]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mock.patch.object(AutojacError, "__init__", making), mock.patch("autojac.errors.warnings.warn", warning):
            try:
                message.provoke()
            except (AutojacError, AutojacWarning) as error:
                told.append((str(error), type(error)))
    texts = tuple(text for text, kind in told if kind is message.kind)
    return texts, frozenset(lines)


@pytest.mark.parametrize("message", MESSAGES, ids=str)
def test_a_message_says_what_was_expected_what_came_and_what_to_do(message: Message) -> None:
    texts, _ = seen(message)
    assert texts
    for text in texts:
        for part in (message.expected, message.got, message.advice):
            assert re.search(part, text), text


def makers(tree: ast.Module, names: set[str]) -> Iterator[tuple[str, ast.Call]]:
    """Calls that make an error of autojac's or warn, each with the function that it stands in."""
    owner = {}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.ClassDef):
            owner.update(dict.fromkeys(ast.walk(function), function.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
            if name in names:
                yield owner.get(node, ""), node


def test_every_message_is_in_the_table() -> None:
    for module in pkgutil.walk_packages(autojac.__path__, "autojac."):
        if "migrations" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    kinds = {AutojacError}
    while more := {below for kind in kinds for below in kind.__subclasses__()} - kinds:
        kinds |= more
    lines = {line for message in MESSAGES for line in seen(message)[1]}
    missing, internal = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        for function, call in makers(
            ast.parse(path.read_text()), {kind.__name__ for kind in kinds} | {"warn", "_warn"}
        ):
            listed = {name.split("/", maxsplit=1)[0], f"{name}:{function}"} & INTERNAL.keys()
            internal |= listed
            reached = any((name, line) in lines for line in range(call.lineno, (call.end_lineno or 0) + 1))
            if not reached and not listed and name != "errors.py":
                missing.append(f"{name}:{call.lineno}")
    assert not missing
    assert internal == INTERNAL.keys(), "what is in the table leaves the list"


if __name__ == "__main__":
    for message in MESSAGES:
        for text in seen(message)[0]:
            print(f"{message.kind.__name__}: {text}\n")
