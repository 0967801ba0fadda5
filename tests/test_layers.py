"""The rooms hold: which may import which, no cycles between files, and who alone may use torch.func, Optuna and SQL."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import rustworkx

from sources import PACKAGE, nodes

TOP = Path(__file__).parent.parent

# a room imports from rooms in the rows above it, and from no other room of its own row
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "torch_internals"),
    ("guards",),
    ("autodiff",),
    ("core",),
    ("sparse", "store"),
    ("graph",),
    ("problem", "probe"),
    ("replay",),
    ("methods",),
    ("planning",),
    ("api",),
    ("report",),
    ("",),  # autojac/__init__.py
    ("bench",),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}

# stricter than the rows
FORBIDDEN = {"probe": {"store"}, "store": {"autodiff", "guards"}}

# what only some rooms may use; bench times torch's own ways, as their users write them
RESERVED = {
    "torch.func": {"autodiff", "bench", "torch_internals"},
    "torch.vmap": {"autodiff", "bench", "torch_internals"},
    "torch.autograd": {"autodiff", "bench", "torch_internals"},
    "functorch": {"autodiff", "bench", "torch_internals"},
    "torch.fx": {"replay"},
    "autojac.torch_internals.TorchDispatchMode": {"guards"},
    "optuna": {"planning.search"},
    "sqlalchemy": {"store"},
    "alembic": {"store"},
}

# lives under torch.autograd and differentiates nothing
UNRESERVED = ("torch.autograd.profiler",)

MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
# base.py holds the registry, which lists the package's files
METHODS = [path for path in MODULES if path.parent.name == "methods" and path.name != "base.py"]


def module_name(path: Path) -> str:
    """Dotted name below the package: `methods.pull`, `methods` for its __init__, `` for the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def room(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


@functools.cache
def imported(path: Path) -> tuple[str, ...]:
    """Dotted names of everything a file imports, at any depth of nesting, `from a import b` as `a.b`."""
    package = ["autojac", *path.relative_to(PACKAGE).parts[:-1]]
    names: list[str] = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names += (f"{source}.{alias.name}" for alias in node.names)
    return tuple(names)


def own_imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports; a name imported from a module counts as the module."""
    for name in imported(path):
        if name.split(".")[0] == "autojac":
            below = name.split(".")[1:]
            while ".".join(below) not in NAMES and below:
                below.pop()
            yield ".".join(below)


def used_attributes(path: Path) -> Iterator[str]:
    """Dotted chains such as `torch.func.vjp` that a file writes out."""
    for node in nodes(path):
        parts: list[str] = []
        chain: ast.AST = node
        while isinstance(chain, ast.Attribute):
            parts.append(chain.attr)
            chain = chain.value
        if isinstance(chain, ast.Name) and parts:
            yield ".".join([chain.id, *reversed(parts)])


def lies_in(name: str, rooms: Iterable[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in rooms)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_come_from_rooms_above(path: Path) -> None:
    here = room(module_name(path))
    for name in own_imports(path):
        there = room(name)
        assert there == here or RANK[there] < RANK[here], f"{here} imports {name}, which does not lie above it"
        assert there not in FORBIDDEN.get(here, ()), f"{here} must not know {name}"


def test_no_files_import_each_other_in_a_circle() -> None:
    graph: rustworkx.PyDiGraph[str, None] = rustworkx.PyDiGraph()
    number = {name: graph.add_node(name) for name in sorted(NAMES)}
    for path in MODULES:
        for name in own_imports(path):
            graph.add_edge(number[module_name(path)], number[name], None)
    circles = [sorted(graph[node] for node in group) for group in rustworkx.strongly_connected_components(graph)]
    assert not [group for group in circles if len(group) > 1]


@pytest.mark.parametrize("path", METHODS, ids=module_name)
def test_methods_know_only_their_base_and_what_they_share(path: Path) -> None:
    siblings = {name for name in own_imports(path) if room(name) == "methods"}
    assert not [name for name in siblings if name != "methods.base" and not lies_in(name, ["methods.support"])]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_reserved_libraries_stay_in_their_rooms(path: Path) -> None:
    here = module_name(path)
    for name in {*imported(path), *used_attributes(path)}:
        if name.startswith(UNRESERVED):
            continue
        for library, rooms in RESERVED.items():
            if lies_in(name, [library]):
                assert lies_in(here, rooms), f"{here} uses {name}; only {sorted(rooms)} may"


def test_contributing_shows_the_rooms_as_they_describe_themselves() -> None:
    rows = re.findall(r"^\| `(\w+)/` \| (.+) \|$", (TOP / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    rooms = [name for layer in LAYERS for name in layer if (PACKAGE / name / "__init__.py").exists() and name]
    assert [name for name, _ in rows] == rooms
    for name, text in rows:
        purpose = importlib.import_module(f"autojac.{name}").__doc__
        assert purpose is not None
        assert text == purpose.split("\n\n")[0].replace("\n", " ").rstrip("."), f"{name} says: {purpose}"
