"""The examples in docstrings of what users call run, and give what they show."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import autojac

API = Path(autojac.__file__).parent / "api"


@pytest.mark.parametrize("name", [path.stem for path in sorted(API.glob("*.py")) if ">>> " in path.read_text()])
def test_examples_give_what_they_show(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"autojac.api.{name}")).failed == 0
