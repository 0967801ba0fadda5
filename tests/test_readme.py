"""README and docs are true: their Python runs, their tables are the code's own, their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from autojac.core.options import Options
from autojac.methods.base import registry

TOP = Path(__file__).parent.parent
README = (TOP / "README.md").read_text()
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_its_python_runs(page: Path) -> None:
    exec(compile("\n".join(blocks(page)), page.name, "exec"), {"__name__": "page"})


def test_the_first_block_of_the_readme_is_enough_to_start() -> None:
    first = blocks(TOP / "README.md")[0]
    assert README.index(first) < 1200 and "AutoJacobian(model)" in first


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_every_page_is_linked_from_the_readme() -> None:
    assert {page.name for page in PAGES[1:]} == set(re.findall(r"^\* .*\(docs/([\w-]+\.md)\)", README, re.MULTILINE))


def test_the_table_of_methods_is_the_registry() -> None:
    table = (TOP / "docs" / "methods.md").read_text().split("<!-- methods")[1].split("<!-- end")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE)
    assert rows == [(name, (kind.__doc__ or "").splitlines()[0]) for name, kind in registry().items()]


@pytest.mark.parametrize("option", Options.names())
def test_every_option_is_documented(option: str) -> None:
    assert f"| `{option}` |" in README


@pytest.mark.parametrize("goal", ["demo", "test", "check", "bench"])
def test_the_goals_it_names_exist(goal: str) -> None:
    assert f"make {goal}" in README
    assert re.search(rf"^{goal}:", (TOP / "Makefile").read_text(), re.MULTILINE)
