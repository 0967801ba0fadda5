"""Private names of torch: all in one file, each there in the installed torch, and what happens without one."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autojac import torch_internals
from autojac.torch_internals import PRIVATE

PACKAGE = Path(torch_internals.__file__).parent
# bench times torch's own ways, as their users write them
MODULES = [
    path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "bench" and path.name != "torch_internals.py"
]


def dotted_names(path: Path) -> Iterator[str]:
    """Everything that a file imports or reaches by a chain of attributes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            parts = [node.attr]
            inner: ast.AST = node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield ".".join([inner.id, *reversed(parts)])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_of_torch_stay_in_one_file(path: Path) -> None:
    private = {name for name in dotted_names(path) if re.match(r"torch(\.[A-Za-z]\w*)*\._(?!_)\w", name)}
    assert not private, f"take these from autojac.torch_internals: {sorted(private)}"


@pytest.mark.parametrize("path", PRIVATE)
def test_the_installed_torch_has_every_private_name(path: str) -> None:
    assert torch_internals.resolve(path) is not None, PRIVATE[path]


@pytest.mark.parametrize("module", ["torch._dynamo", "torch._decomp.decompositions_for_jvp", "torch._inductor"])
def test_what_is_loaded_late_is_there(module: str) -> None:
    assert importlib.import_module(module)


def test_a_torch_without_a_required_name_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_internals, "PRIVATE", {})
    with pytest.raises(
        ImportError, match=rf"torch {re.escape(torch.__version__)} has no torch._C._gone, which autojac"
    ):
        torch_internals._required("torch._C._gone", "do something")


def test_a_name_may_be_missing_where_there_is_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    # what happens then is tested where each is used
    assert {path for path, name in PRIVATE.items() if name.without} == {
        "torch._C._dynamo.eval_frame",
        "torch._C._dynamo.guards.GlobalStateGuard",
        "torch._C._dynamo.guards.TensorGuards",
        "torch._C._dynamo.guards.dict_version",
    }
    monkeypatch.setattr(torch_internals, "PRIVATE", {})
    assert torch_internals._optional("torch._C._gone", "be fast", "it is slow") is None
