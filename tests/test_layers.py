"""The layers hold: who may import whom, and who alone may touch autograd, Optuna and SQL."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "autojac"

# a module imports from its own rank and those before it
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "signature", "sparsity", "structure", "plan"),
    (
        "captures",
        "fingerprint",
        "walk",
        "leaves",
        "origin",
        "autodiff",
        "seeds",
        "tolerance",
        "inversion",
        "linalg",
        "process",
        "dynamo",
        "keeps",
        "quiet",
        "layouts",
        "watch",
        "reads",
        "names",
        "held",
        "looked_up",
        "reached",
        "metadata",
        "unchanged",
        "guards",
        "outside",
        "escapes",
        "closed",
        "entries",
        "compression",
        "decompression",
        "sweeps",
        "problem",
        "hollow",
        "axes",
        "limits",
        "ranks",
        "autocast",
        "kernels",
        "options",
        "frame",
        "draws",
        "greedy",
        "bicoloring",
        "coloring",
        "graph",
        "recorder",
        "running",
        "decompose",
        "connect",
        "operators",
        "flow",
        "dependence",
        "outline",
        "rules",
        "cuts",
        "chain",
        "copies",
        "pools",
        "sharing",
        "compilation",
        "linearize",
        "reach",
        "movements",
        "spread",
        "tape",
        "simplify",
        "program",
        "hoist",
        "trace",
        "surroundings",
        "takedown",
        "replaying",
        "cuda_graphs",
    ),
    ("methods",),
    ("probe", "places", "evidence", "verify"),
    ("search", "store"),
    ("stored", "explain", "progress"),
    ("entry", "factors"),
    ("look", "planner", "again"),
    ("derived", "autojacobian", "parameters", "checks", "from_graph"),
    ("",),  # autojac/__init__.py
    ("bench", "report", "cli", "__main__"),
)
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}

# stages meet in autojacobian.py and nowhere else
STRANGERS = {
    "probe": {"methods", "search", "store"},
    "search": {"probe", "store"},
    "store": {"methods", "probe", "verify", "search", "autodiff", "seeds", "coloring", "greedy", "bicoloring", "graph"},
}

# what only some rooms may use; bench times torch's own ways, as their users write them
RESERVED = {
    "torch.func": {"autodiff", "bench"},
    "torch.vmap": {"autodiff", "bench"},
    "torch.autograd": {"autodiff", "bench"},
    "functorch": {"autodiff", "bench"},
    "torch.fx": {"tape", "simplify", "program", "hoist", "trace", "takedown", "compilation"},
    "torch.utils._python_dispatch": {"escapes"},
    "optuna": {"search"},
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


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, at any depth of nesting, `from a import b` as `a.b`."""
    package = ["autojac", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


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
    for node in ast.walk(ast.parse(path.read_text())):
        parts: list[str] = []
        chain: ast.AST = node
        while isinstance(chain, ast.Attribute):
            parts.append(chain.attr)
            chain = chain.value
        if isinstance(chain, ast.Name) and parts:
            yield ".".join([chain.id, *reversed(parts)])


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_module_has_a_layer(path: Path) -> None:
    assert room(module_name(path)) in RANK


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_come_from_layers_above(path: Path) -> None:
    here = room(module_name(path))
    for name in own_imports(path):
        assert RANK[room(name)] <= RANK[here], f"{here} imports {name}, which lies below it"
        assert room(name) not in STRANGERS.get(here, ()), f"{here} and {name} meet in autojacobian.py"


@pytest.mark.parametrize("path", METHODS, ids=module_name)
def test_methods_know_only_their_base(path: Path) -> None:
    siblings = {name for name in own_imports(path) if room(name) == "methods"}
    assert siblings <= {"methods.base"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_reserved_libraries_stay_in_their_rooms(path: Path) -> None:
    here = room(module_name(path))
    for name in {*imported(path), *used_attributes(path)}:
        if name.startswith(UNRESERVED):
            continue
        for library, rooms in RESERVED.items():
            if name == library or name.startswith(f"{library}."):
                assert here in rooms, f"{here} uses {name}; only {sorted(rooms)} may"
