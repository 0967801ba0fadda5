"""Private names of torch: all in one file, each there in the installed torch, and what happens without one."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from autojac import torch_internals
from autojac.autodiff import zero_tangents
from autojac.autodiff.primitives import push_dual_plainly
from autojac.torch_internals import ATTRIBUTES, PRIVATE
from sources import PACKAGE, nodes

# bench times torch's own ways, as their users write them
MODULES = [
    path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "bench" and path.name != "torch_internals.py"
]


def dotted_names(path: Path) -> Iterator[str]:
    """Everything that a file imports or reaches by a chain of attributes."""
    for node in nodes(path):
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


def defined_names(path: Path) -> Iterator[str]:
    """Names of functions, classes, variables and attributes that a file defines."""
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def foreign_attributes(path: Path) -> Iterator[str]:
    """Private attributes that a file reads and autojac does not define, but those of Python and operators of aten."""
    for node in nodes(path):
        if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr) and node.attr not in defined():
            owner = ast.unparse(node.value)
            # a namedtuple's `_asdict` is public
            if owner not in sys.stdlib_module_names and owner != "aten" and node.attr != "_asdict":
                yield node.attr


@functools.cache
def defined() -> set[str]:
    return {name for path in MODULES for name in defined_names(path)}


PRIVATE_NAME = re.compile(r"torch(\.[A-Za-z]\w*)*\._(?!_)\w")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_of_torch_stay_in_one_file(path: Path) -> None:
    strings = {
        node.value
        for node in nodes(path)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value
    }
    private = {name for name in (*dotted_names(path), *strings) if PRIVATE_NAME.match(name)}
    assert not private, f"take these from autojac.torch_internals: {sorted(private)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_attributes_of_torch_are_listed(path: Path) -> None:
    unknown = set(foreign_attributes(path)) - {name.rpartition(".")[2] for name in ATTRIBUTES}
    assert not unknown, f"list these in torch_internals.ATTRIBUTES: {sorted(unknown)}"


@torch.library.custom_op("autojac_tests::same", mutates_args=())
def same(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


class Scripted(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def scripted() -> torch.nn.Module:
    with warnings.catch_warnings(action="ignore"):  # which versions call deprecated
        module: torch.nn.Module = torch.jit.script(Scripted())
    return module


OBJECTS: dict[str, Callable[[], Any]] = {
    "torch.Tensor": lambda: torch.zeros(1),
    "torch.UntypedStorage": lambda: torch.zeros(1).untyped_storage(),
    "torch._ops.OpOverload": lambda: torch.ops.aten.add.Tensor,
    "torch.autograd.profiler": lambda: torch.autograd.profiler,
    "torch.nn.Module": torch.nn.Module,
    "torch.jit.ScriptModule": scripted,
    "torch._dynamo.eval_frame.OptimizedModule": lambda: torch.compile(torch.nn.Identity(), backend="eager"),
    "torch.compile()": lambda: torch.compile(lambda x: x, backend="eager"),
    "torch.compiler.disable()": lambda: torch.compiler.disable(lambda x: x),
    "NativeBatchNormBackward0": lambda: torch.nn.BatchNorm1d(2)(torch.randn(3, 2)).grad_fn,
    "torch._library.custom_ops.CustomOpDef": lambda: same,
}


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_the_installed_torch_has_every_private_attribute(path: str) -> None:
    owner, _, name = path.rpartition(".")
    assert hasattr(OBJECTS[owner](), name), ATTRIBUTES[path]


def test_what_is_recognized_by_its_home_is_at_home_there() -> None:
    assert type(torch.compile(torch.nn.Identity(), backend="eager")).__module__ == torch_internals.COMPILED_HOME
    assert torch.Tensor.__iter__.__globals__["__name__"] == torch_internals.TENSOR_HOME
    assert torch_internals.pytree.__name__ == torch_internals.PYTREE_HOME
    assert torch.vmap.__globals__["vmap_impl"].__module__.startswith(torch_internals.TRANSFORMS_HOME)
    with FakeTensorMode():
        assert type(torch.ones(1)).__module__.startswith(torch_internals.FAKES_HOME)
    operators = torch.ops.aten.add, torch.ops.aten.add.Tensor, torch.ops.aten
    assert {type(one).__module__ for one in operators} == {torch_internals.OPERATORS_HOME}
    assert f"{type(same).__module__}.{type(same).__qualname__}" == torch_internals.CUSTOM_OPERATOR


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
        torch_internals._require("torch._C._gone", "do something")


def test_a_name_may_be_missing_where_there_is_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    # what happens then is tested where each is used
    assert {path for path, name in PRIVATE.items() if name.without} == {
        "torch._C._dynamo.eval_frame._FrameAction",
        "torch._C._dynamo.eval_frame._FrameExecStrategy",
        "torch._C._dynamo.eval_frame.set_code_exec_strategy",
        "torch._C._dynamo.guards.GlobalStateGuard",
        "torch._C._dynamo.guards.TensorGuards",
        "torch._C._dynamo.guards.dict_version",
        "torch._disable_dynamo",
        "torch._refs",
    }
    monkeypatch.setattr(torch_internals, "PRIVATE", {})
    assert torch_internals._optional("torch._C._gone", "be fast", "it is slow") is None


@pytest.mark.parametrize("name", ["_set_code_strategy", "_FrameStrategy", "_FrameAction"])
def test_a_torch_that_compiles_otherwise_compiles_what_it_can(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_internals, name, None)
    torch_internals.skip_when_compiling(test_a_torch_that_compiles_otherwise_compiles_what_it_can.__code__)


@pytest.mark.parametrize(
    "shapes", [((3, 1), (2,)), ((0, 2), (1, 2)), ((), (4,)), ((4,), ()), ((2, 1, 3), (5, 1)), ((3,), None)]
)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float32, torch.int64)], ids=str)
@pytest.mark.parametrize("name", zero_tangents.MEET)
def test_zero_tangents_get_the_shape_and_dtype_that_torch_gives_them(
    name: str, dtypes: tuple[torch.dtype, torch.dtype], shapes: tuple[tuple[int, ...], ...]
) -> None:
    _, answer = zero_tangents.answers()[name]
    pairs = zip(shapes, dtypes, strict=True)
    args = [2.0 if shape is None else torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in pairs]
    found, expected = answer(*args), getattr(torch, name)(*args)
    assert (found.shape, found.dtype, found.is_meta) == (expected.shape, expected.dtype, True)


@pytest.mark.parametrize("missing", ["compiler_shield", "reference_operators"])
def test_forward_mode_works_where_torch_loads_its_compiler_otherwise(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_tangents, missing, None)
    monkeypatch.setattr(zero_tangents, "is_compiler_loaded", lambda: False)
    monkeypatch.setattr(zero_tangents, "answers", zero_tangents.answers.__wrapped__)
    _, (pushed,) = push_dual_plainly(lambda x: (2 * x + 1,), (torch.ones(3),), (torch.ones(3),))
    assert pushed.tolist() == [2, 2, 2]
