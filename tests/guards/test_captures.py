"""What a callable reaches, and the digest of it."""

from __future__ import annotations

import functools
import logging
import operator
import os
import re
import subprocess
import sys
import threading
import types
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autojac import AutoJacobian
from autojac.guards.captures import captures, fingerprint

WEIGHT = torch.ones(3)
LINEAR = nn.Linear(3, 3)
SCALE = 2.0


class Holder:
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def method(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.method(x)


@dataclass(frozen=True)
class Point:
    x: float
    names: list[str] = field(default_factory=list)

    @functools.cached_property
    def norm(self) -> float:
        return abs(self.x)


class Named(list[int]):
    def __init__(self, items: list[int], weight: torch.Tensor) -> None:
        super().__init__(items)
        self.weight = weight


class Slotted:
    __slots__ = ("weight",)

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Net(nn.Module):
    def __init__(self, p: float = 0.5, index: tuple[int, ...] = (0, 1)) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Dropout(p), nn.BatchNorm1d(4))
        self.register_buffer("index", torch.tensor(index))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)[:, self.index]


def helper(x: torch.Tensor) -> torch.Tensor:
    return LINEAR(x) * SCALE


def uses_helper(x: torch.Tensor) -> torch.Tensor:
    return [helper(row) for row in x]


def closure(value: Any) -> Callable[..., Any]:
    def inner(x: torch.Tensor) -> Any:
        return x, value

    return inner


def default(value: Any) -> Callable[..., Any]:
    def inner(x: torch.Tensor, value: Any = value, *, other: Any = None) -> Any:
        return x, value

    return inner


REACHES_WEIGHT = {
    "closure": closure(WEIGHT),
    "default": default(WEIGHT),
    "global": lambda x: x * WEIGHT,
    "nested function": lambda x: [row * (lambda: WEIGHT) for row in x],
    "partial argument": functools.partial(torch.mul, WEIGHT),
    "partial keyword": functools.partial(torch.mul, other=WEIGHT),
    "bound method": Holder(weight=WEIGHT).method,
    "callable object": Holder(weight=WEIGHT),
    "slots": Slotted(WEIGHT),
    "method of a tensor": WEIGHT.mul,
    "list": closure([[WEIGHT]]),
    "dict": closure({"a": {"b": WEIGHT}}),
    "array of objects": closure(np.array([Holder(weight=WEIGHT)], dtype=object)),
    "default factory": closure(defaultdict(closure(WEIGHT))),
    "subclass of list": closure(Named([1], WEIGHT)),
    "object in an object": closure(Holder(inner=Holder(weight=WEIGHT))),
    "namespace": closure(types.SimpleNamespace(weight=WEIGHT)),
    "no_grad": torch.no_grad()(closure(WEIGHT)),
    "vmap": torch.vmap(closure(WEIGHT)),
    "cached": functools.lru_cache(closure(WEIGHT)),
    "compiled": torch.compile(closure(WEIGHT), backend="eager"),
    "attribute of a function": functools.wraps(closure(WEIGHT))(lambda x: x),
}


@pytest.mark.parametrize("func", REACHES_WEIGHT.values(), ids=REACHES_WEIGHT)
def test_a_tensor_is_reached(func: Callable[..., Any]) -> None:
    found = captures(func)
    assert [tensor is WEIGHT for tensor in found.tensors] == [True]
    assert not found.opaque


def test_a_helper_function_is_followed() -> None:
    found = captures(uses_helper)
    assert found.modules == (LINEAR,)
    assert [id(tensor) for tensor in found.tensors] == [id(LINEAR.weight), id(LINEAR.bias)]


def test_a_module_of_helpers_is_followed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_helpers")
    exec("import torch\nscale = torch.ones(2)\nunused = torch.ones(3)\ndef f(x): return x * scale", vars(module))
    monkeypatch.setitem(sys.modules, "my_helpers", module)
    scope: dict[str, Any] = {"my_helpers": module}
    exec("def g(x): return my_helpers.f(x)", scope)
    assert [tuple(tensor.shape) for tensor in captures(scope["g"]).tensors] == [(2,)]


def test_modules_come_with_their_submodules_once() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()))
    found = captures(lambda x: model(x) + 1)
    assert {id(module) for module in found.modules} == {id(module) for module in model.modules()}
    assert len(found.modules) == 4
    assert len(found.tensors) == 2


def test_hooks_and_plain_attributes_of_modules_are_followed() -> None:
    model = nn.Linear(2, 2)
    model.extra = [torch.ones(5)]
    model.register_forward_hook(closure(torch.ones(7)))
    assert {5, 7} <= {tensor.shape[0] for tensor in captures(model).tensors}


def test_cycles_end() -> None:
    first = Holder()
    first.other = Holder(other=first, items=[])
    first.other.items.append(first.other.items)
    captures(first)

    def recursive(x: int) -> int:
        return recursive(x - 1) if x else 0

    assert not captures(recursive).opaque
    assert fingerprint(recursive) == fingerprint(recursive)


def test_depth_is_bounded() -> None:
    nest: list[Any] = []
    for _ in range(10_000):
        nest = [nest]
    assert captures(closure(nest)).opaque


class Hostile:
    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        raise RuntimeError("keep out")


OPAQUE = {
    "hostile": closure(Hostile()),
    "generator": closure(i for i in range(3)),
    "iterator": closure(iter([1])),
    "torch generator": closure(torch.Generator()),
    "set of functions": closure({helper}),
    "numpy generator": closure(np.random.default_rng(0)),
}


@pytest.mark.parametrize("func", OPAQUE.values(), ids=OPAQUE)
def test_what_can_not_be_followed_is_said(func: Callable[..., Any]) -> None:
    assert captures(func).opaque


CLEAR = {
    "torch builtin": torch.sin,
    "torch function": torch.nn.functional.relu,
    "torch operator": torch.ops.aten.sin.default,
    "tensor method": torch.Tensor.sin,
    "numpy function": closure(np.sin),
    "numpy number": closure(np.float64(3)),
    "itemgetter": operator.itemgetter(3),
    "loggers, locks and typing": closure([logging.getLogger("x"), threading.Lock(), Callable[[int], Any], Any]),
    "standard library": closure(
        [Path("a"), re.compile("a+"), Fraction(1, 3), date(2020, 1, 1), OrderedDict(a=1), defaultdict(list), deque([1])]
    ),
    "dataclass": closure(Point(1.0)),
    "constants": closure([torch.float32, torch.device("cpu"), slice(1, 2), range(3), 1j, None, ..., b"x"]),
    "model": Net(),
    "transformer": nn.TransformerEncoderLayer(4, 2, 8),
    "lstm": nn.LSTM(2, 2),
}


@pytest.mark.parametrize("func", CLEAR.values(), ids=CLEAR)
def test_ordinary_callables_are_not_opaque(func: Callable[..., Any]) -> None:
    assert not captures(func).opaque


def test_each_layer_costs_the_walk_the_same() -> None:
    def visits(layers: int) -> int:
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
        seen = 0

        def count(frame: types.FrameType, event: str, argument: Any) -> None:
            nonlocal seen
            seen += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            captures(lambda x: model(x) + 1)
        finally:
            sys.setprofile(None)
        return seen

    visits(2)  # what is found out once per process
    few, some, many = visits(10), visits(20), visits(40)
    assert many - some <= 2 * (some - few) + 20  # twice as many layers more, twice the work more
    assert (some - few) / 10 < 200  # 127 calls of Python and C per layer


SOURCE = """
import functools, torch
from torch import nn
SCALE = 2.0
INDEX = torch.tensor([0, 2, 1])
WEIGHT = torch.randn(3)
def helper(x, power=2):
    return x ** power * SCALE
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4, eps=1e-5), nn.Conv1d(1, 1, 3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.options = {"a", "b", "c"}
        self.act = torch.tanh
    def forward(self, x):
        return self.act(self.body(x)) + 1.0
class Flip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, g):
        return -g
net = Net()
net.register_forward_hook(lambda module, args, output: output * 1)
part = functools.partial(helper, power=3)
def make(k):
    table = {"k": k, "ks": [k, k + 1], "f": part}
    def f(x, offset=0.25, *, mode="sum"):
        # a comment
        if x.shape[0] in {1, 2, "three"}:
            return Flip.apply(net(x))
        return helper(x)[..., INDEX] * WEIGHT + table["k"] + offset + sum(map(lambda v: v * 3, [1]))
    return f
f = make(7)
"""

EDITS = {
    "global": ("SCALE = 2.0", "SCALE = 2.5"),
    "index": ("[0, 2, 1]", "[0, 1, 2]"),
    "shape": ("randn(3)", "randn(4)"),
    "dtype": ("randn(3)", "randn(3).double()"),
    "helper": ("x ** power", "x * power"),
    "helper's default": ("power=2", "power=4"),
    "dropout": ("Dropout(0.5)", "Dropout(0.6)"),
    "eps": ("eps=1e-5", "eps=1e-4"),
    "kernel size": ("Conv1d(1, 1, 3)", "Conv1d(1, 1, 5)"),
    "width": ("nn.Linear(3, 4)", "nn.Linear(3, 4, bias=False)"),
    "layer": ("nn.Dropout", "nn.AlphaDropout"),
    "buffer": ("[True, False]", "[True, True]"),
    "buffer's name": ('"mask"', '"mark"'),
    "set": ('"a", "b", "c"', '"a", "b", "d"'),
    "activation": ("torch.tanh", "torch.sin"),
    "forward": ("+ 1.0", "+ 1"),
    "autograd function": ("return -g", "return g"),
    "hook": ("output * 1)", "output * 2)"),
    "partial": ("power=3", "power=5"),
    "closure": ("make(7)", "make(8)"),
    "default": ("offset=0.25", "offset=0.5"),
    "keyword default": ('mode="sum"', 'mode="mean"'),
    "constant": ("v * 3", "v * 4"),
    "constant set": ("{1, 2, ", "{1, 3, "),
    "operator": ("* WEIGHT", "- WEIGHT"),
    "method": ("return helper(x)", "return part(x)"),
}


def defined(source: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {"__name__": "somebody"}
    exec(compile(source, "somewhere.py", "exec", dont_inherit=True), scope)
    return scope["f"]


ORIGINAL = fingerprint(defined(SOURCE))


def test_the_same_source_has_the_same_fingerprint() -> None:
    assert fingerprint(defined(SOURCE)) == ORIGINAL
    assert fingerprint(defined("\n\n" + SOURCE.replace("# a comment", "# another"))) == ORIGINAL
    assert len(ORIGINAL) == 64


@pytest.mark.parametrize("old,new", EDITS.values(), ids=EDITS)
def test_an_edit_changes_the_fingerprint(old: str, new: str) -> None:
    assert SOURCE.count(old) >= 1
    assert fingerprint(defined(SOURCE.replace(old, new, 1))) != ORIGINAL


def test_a_version_changes_the_fingerprint() -> None:
    assert fingerprint(torch.sin) == fingerprint(torch.sin, version="")
    assert fingerprint(torch.sin, version="2") != fingerprint(torch.sin)


def test_fingerprints_are_equal_across_processes() -> None:
    script = f"""
import sys
sys.dont_write_bytecode = True
import torch
from autojac.guards.captures import fingerprint
padding = [object() for _ in range(1000)]
class Count(torch.autograd.Function):
    pass
scope = {{"__name__": "somebody"}}
exec(compile({SOURCE!r}, "elsewhere.py", "exec"), scope)
print(fingerprint(scope["f"]))
"""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ORIGINAL


def test_training_does_not_change_the_fingerprint() -> None:
    model = Net()
    before = fingerprint(model)
    assert fingerprint(Net()) == before
    model(torch.randn(5, 3)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.eval()
    assert fingerprint(model) == before
    assert fingerprint(Net(p=0.25)) != before
    assert fingerprint(Net(index=(1, 0))) != before


def test_a_hook_changes_the_fingerprint_and_its_number_does_not() -> None:
    def hooked(hook: Callable[..., Any]) -> str:
        model = nn.Linear(2, 2)
        model.register_full_backward_hook(hook)
        return fingerprint(model)

    assert hooked(uses_helper) == hooked(uses_helper) != fingerprint(nn.Linear(2, 2))
    assert hooked(uses_helper) != hooked(helper)


def test_tied_weights_differ_from_equal_ones() -> None:
    tied, untied = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    tied[1].weight = tied[0].weight
    assert fingerprint(tied) != fingerprint(untied)


def test_sparse_patterns_count_and_their_values_do_not() -> None:
    def pattern(column: int, value: float) -> torch.Tensor:
        return torch.sparse_coo_tensor([[0, 1], [0, column]], [value, 1.0], (2, 3), check_invariants=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its sparse CSR layout a beta
        for convert in (lambda tensor: tensor, torch.Tensor.to_sparse_csr, torch.Tensor.to_sparse_csc):
            prints = [fingerprint(closure(convert(pattern(*entry)))) for entry in ((1, 1.0), (1, 2.0), (2, 1.0))]
            assert prints[0] == prints[1] != prints[2]


def test_numbers_of_different_types_differ() -> None:
    assert len({fingerprint(closure(value)) for value in (1, 1.0, True, "1", 1j, (1,), [1], {1}, {1: 1})}) == 9


def test_numpy_indices_count_by_content_and_floats_by_shape() -> None:
    assert fingerprint(closure(np.array([1, 2]))) != fingerprint(closure(np.array([2, 1])))
    assert fingerprint(closure(np.array([1.0, 2.0]))) == fingerprint(closure(np.array([2.0, 1.0])))
    assert fingerprint(closure(np.float64(1))) != fingerprint(closure(np.float64(2)))


def test_compiled_functions_count_as_what_they_compile() -> None:
    compiled = [torch.compile(closure(value), backend="eager") for value in (1, 1, 2)]
    prints = [fingerprint(func) for func in compiled]
    assert prints[0] == prints[1] != prints[2]
    model = Net()
    wrapped = torch.compile(model, backend="eager")
    assert set(captures(wrapped).tensors) == set(captures(model).tensors)
    before = fingerprint(wrapped)
    wrapped(torch.randn(4, 3))
    assert fingerprint(wrapped) == before == fingerprint(torch.compile(Net(), backend="eager"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_modules_count_by_their_code() -> None:
    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor
            self.inner = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.factor

    for make in (torch.fx.symbolic_trace, torch.jit.script, lambda model: torch.jit.trace(model, torch.ones(2, 3))):
        first, again, other = (make(Times(factor)) for factor in (2.0, 2.0, 3.0))
        assert fingerprint(first) == fingerprint(again) != fingerprint(other)
        assert len(captures(first).tensors) == 2
    scripted = [torch.jit.script(func) for func in (torch_sin, torch_cos)]
    assert fingerprint(scripted[0]) == fingerprint(torch.jit.script(torch_sin)) != fingerprint(scripted[1])


def torch_sin(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def torch_cos(x: torch.Tensor) -> torch.Tensor:
    return x.cos()


def test_what_a_captured_wrapper_learns_is_no_part_of_the_fingerprint() -> None:
    inner = AutoJacobian(torch.sin, on_miss="estimate", store=":memory:")

    def outer(x: torch.Tensor) -> torch.Tensor:
        return inner(x)[:, 0]

    before = fingerprint(outer)
    inner(torch.rand(4, 2))
    assert fingerprint(outer) == before
    inner = AutoJacobian(torch.cos, store=":memory:")
    assert fingerprint(outer) != before
