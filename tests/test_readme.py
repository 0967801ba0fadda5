"""The README is true: its Python runs, its tables are the code's own."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from autojac.core.options import Options
from autojac.methods.base import registry

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_its_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    exec(compile("\n".join(blocks), "README.md", "exec"), {"__name__": "readme"})


def test_the_table_of_methods_is_the_registry() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", README.split("<!-- methods")[1].split("<!-- end")[0], re.MULTILINE)
    assert rows == [(name, (kind.__doc__ or "").splitlines()[0]) for name, kind in registry().items()]


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(Options)])
def test_every_option_is_documented(option: str) -> None:
    assert f"| `{option}` |" in README


@pytest.mark.parametrize("goal", ["demo", "test", "check", "bench"])
def test_the_goals_it_names_exist(goal: str) -> None:
    assert f"make {goal}" in README
    assert re.search(rf"^{goal}:", (Path(__file__).parent.parent / "Makefile").read_text(), re.MULTILINE)
