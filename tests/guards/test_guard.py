"""A guard notices whatever Python changes in what a callable reads, names it, and is not disturbed by the rest."""

from __future__ import annotations

import abc
import collections
import copy
import dataclasses
import enum
import fractions
import functools
import logging
import math
import operator
import pathlib
import random
import re
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from autojac.guards import dict_versions, memory_words
from autojac.guards.guard import Change, Guard, alike

SCALE = 2.0
META = [1]
T = TypeVar("T")
big = np.ones(10_000)
TABLE: dict[str, Any] = {"a": [1, 2, {"b": 3}], "c": (4, [5])}
WEIGHT = torch.ones(3)
NOTHING = Change("", {})


@pytest.fixture(params=["words", pytest.param("versions", marks=pytest.mark.by_day(6)), "plain"], autouse=True)
def counted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs too where no words are found in memory, and where nothing counts the changes of a dict."""
    if request.param != "words":
        monkeypatch.setattr(memory_words, "_is_in_reach", lambda owner: False)
    if request.param == "plain":
        monkeypatch.setattr(dict_versions, "change_counter", lambda of_instances: None)


def scaled(x: Tensor, power: int = 1, *, offset: float = 0.5) -> Tensor:
    return (x * SCALE) ** power + offset + abs(TABLE["a"][0])


class Net(nn.Module):
    factor = 3

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.rows = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
        self.register_buffer("shift", torch.zeros(3))
        self.scale = 1.0
        self.order = [2, 1, 0]
        self.index = torch.tensor([1, 0, 2])
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for row in self.rows:
            x = row(x)
        return self.norm(self.linear(x * self.scale))[:, self.order][:, self.index] * self.factor + self.shift

    def helper(self) -> None: ...


class Slotted:
    __slots__ = ("__hidden", "later", "value")

    def __init__(self) -> None:
        self.value = 2.0
        self.__hidden = 1

    def hide(self, value: int) -> None:
        self.__hidden = value

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.value + self.__hidden


@dataclasses.dataclass
class Data:
    gain: float = 2.0
    steps: list[int] = dataclasses.field(default_factory=lambda: [1, 2])

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.gain + self.steps[0]

    def bound(self, x: Tensor) -> Tensor:
        return self(x)


class Subdata(Data): ...


def held(func: Any) -> Guard:
    guard = Guard(func)
    assert guard.reason == ""
    assert guard.is_unchanged()
    assert guard.diff() == NOTHING
    return guard


def noticed(guard: Guard, change: Callable[[], Any], name: str = "") -> None:
    """The change is noticed, named, and noticed again after it was taken for the present state and undone."""
    change()
    assert not guard.is_unchanged()
    found = guard.diff()
    assert found.what
    assert name in found.what
    assert not guard.is_unchanged()
    guard.rebase()
    assert guard.is_unchanged()
    assert guard.diff() == NOTHING


NET_CHANGES: dict[str, tuple[Callable[[Net], Any], str]] = {
    "number": (lambda net: setattr(net, "scale", 2.0), "scale of Net"),
    "type of number": (lambda net: setattr(net, "scale", 1), "scale of Net"),
    "list item": (lambda net: net.order.__setitem__(0, 1), "order of Net"),
    "list order": (lambda net: net.order.reverse(), "order of Net"),
    "list replaced": (lambda net: setattr(net, "order", [2, 1, 0]), "order of Net"),
    "list longer": (lambda net: net.order.append(0), "order of Net"),
    "attribute added": (lambda net: setattr(net, "more", 1), "more of Net"),
    "attribute gone": (lambda net: delattr(net, "scale"), "of Net"),
    "class attribute": (lambda net: setattr(Net, "factor", 4), "factor of class Net"),
    "method": (lambda net: setattr(Net, "helper", lambda self: None), "helper of class Net"),
    "method of an instance": (lambda net: setattr(net.linear, "forward", lambda x: x), "forward of Linear"),
    "forward of a library's class": (lambda net: setattr(nn.Linear, "forward", lambda self, x: x), "class Linear"),
    "method added to a library's class": (lambda net: setattr(nn.BatchNorm1d, "forward", lambda self, x: x), "class"),
    "call of all modules": (lambda net: setattr(nn.Module, "__call__", lambda self, x: x), "class Module"),
    "class": (lambda net: setattr(net.linear, "__class__", nn.Bilinear), "class of Linear"),
    "training": (lambda net: net.drop.train(), "training of Dropout"),
    "training of all": (lambda net: net.train(), "training of"),
    "p": (lambda net: setattr(net.drop, "p", 0.1), "p of Dropout"),
    "eps": (lambda net: setattr(net.norm, "eps", 1e-3), "eps of BatchNorm1d"),
    "hook": (lambda net: net.linear.register_forward_hook(lambda *args: None), "hook"),
    "hook before": (lambda net: net.register_forward_pre_hook(lambda *args: None), "hook"),
    "backward hook": (lambda net: net.linear.register_full_backward_hook(lambda *args: None), "of Linear"),
    "hook past its method": (lambda net: net.linear._forward_hooks.__setitem__(7, lambda *args: None), "hook"),
    "hook of all modules": (lambda net: nn.modules.module.register_module_forward_hook(lambda *args: None), "hook"),
    "hook of a parameter": (lambda net: net.linear.weight.register_hook(lambda grad: grad), "hook"),
    "attribute of a parameter": (lambda net: setattr(net.linear.weight, "mark", 1), "mark of a tensor"),
    "module replaced": (lambda net: setattr(net, "linear", nn.Linear(3, 3)), "module linear of Net"),
    "module appended": (lambda net: net.rows.append(nn.Linear(3, 3)), "module 2 of ModuleList"),
    "parameter gone": (lambda net: setattr(net.linear, "bias", None), "parameter bias of Linear"),
    "parameter added": (lambda net: net.register_parameter("extra", nn.Parameter(torch.ones(1))), "parameter extra"),
    "buffer of another shape": (lambda net: setattr(net, "shift", torch.zeros(1)), "buffer shift of Net"),
    "double": (lambda net: net.double(), "of Net"),
    "requires_grad": (lambda net: net.linear.bias.requires_grad_(False), "requires_grad of parameter bias"),
    "data of another shape": (lambda net: setattr(net.shift, "data", torch.zeros(1, 3)), "buffer shift"),
    "attribute tensor of another dtype": (lambda net: setattr(net, "index", torch.tensor([True])), "index of Net"),
}


@pytest.mark.parametrize("name", NET_CHANGES)
def test_changes_of_a_module(name: str) -> None:
    kept = [(kind, dict(vars(kind))) for kind in (Net, nn.Linear, nn.Module, nn.BatchNorm1d)]
    hooks = nn.modules.module._global_forward_hooks
    net = Net()
    guard = held(net)
    change, expected = NET_CHANGES[name]
    try:
        noticed(guard, lambda: change(net), expected)
    finally:
        hooks.clear()
        for kind, before in kept:
            for key in set(vars(kind)) - set(before):
                delattr(kind, key)
            for key, value in before.items():
                if vars(kind)[key] is not value:
                    setattr(kind, key, value)


FUNCTION_CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "global": (lambda patch: patch.setitem(globals(), "SCALE", 3.0), "global SCALE"),
    "global of another type": (lambda patch: patch.setitem(globals(), "SCALE", 2), "global SCALE"),
    "global gone": (lambda patch: patch.delitem(globals(), "SCALE"), "global SCALE"),
    "builtin shadowed": (lambda patch: patch.setitem(globals(), "abs", lambda x: x), "global abs"),
    "builtin replaced": (lambda patch: patch.setattr("builtins.abs", lambda x: x), "builtin abs"),
    "nested list": (lambda patch: TABLE["a"].__setitem__(0, 9), "a"),
    "nested dict": (lambda patch: patch.setitem(TABLE["a"][2], "b", 9), ""),
    "list in a tuple": (lambda patch: TABLE["c"][1].__setitem__(0, 9), ""),
    "key added": (lambda patch: patch.setitem(TABLE, "d", 9), "TABLE"),
    "defaults": (lambda patch: patch.setattr(scaled, "__defaults__", (2,)), "defaults of scaled"),
    "keyword defaults": (lambda patch: patch.setitem(scaled.__kwdefaults__, "offset", 2), "defaults of scaled"),
    "keyword defaults replaced": (lambda patch: patch.setattr(scaled, "__kwdefaults__", {"offset": 0.5}), "of scaled"),
    "code": (lambda patch: patch.setattr(scaled, "__code__", (lambda x, power, *, offset: x).__code__), "code of"),
    "attribute": (lambda patch: patch.setattr(scaled, "mark", 1, raising=False), "mark of scaled"),
}


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: lambda x: f(x) * 2, functools.partial, torch.vmap])
@pytest.mark.parametrize("name", FUNCTION_CHANGES)
def test_changes_of_a_function(name: str, wrap: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    guard = held(wrap(scaled))
    assert scaled.__code__ in guard.codes
    change, expected = FUNCTION_CHANGES[name]
    noticed(guard, lambda: change(monkeypatch), expected)
    monkeypatch.undo()
    TABLE["a"][0], TABLE["c"][1][0] = 1, 5
    assert not guard.is_unchanged()
    assert guard.diff().what


def test_variables_of_closures() -> None:
    number: Any = 1000
    later = None
    del later

    def inner(x: Tensor) -> Tensor:
        return x * number

    def outer(x: Tensor) -> Tensor:
        return inner(x) if number else later  # noqa: F821

    guard = held(outer)
    assert inner.__code__ in guard.codes
    number = int("1000")
    assert guard.diff() == NOTHING
    guard.rebase()
    assert guard.is_unchanged()
    number = 1001
    assert not guard.is_unchanged()
    assert guard.diff().what == "variable number"
    guard.rebase()
    assert guard.is_unchanged()
    later = 1
    assert not guard.is_unchanged()
    assert guard.diff().what == "variable later"
    guard.rebase()
    del later
    assert not guard.is_unchanged()


@pytest.mark.parametrize(
    "values", [(1, True), (1, 1.0), (0.0, -0.0), (0, False), ("1", b"1"), (1.0, 1 + 0j), (1, None)]
)
def test_equal_numbers_of_different_kinds_differ(values: tuple[Any, Any]) -> None:
    for one, other in (values, values[::-1]):
        data = Data()
        data.gain = one
        guard = held(data)
        noticed(guard, lambda data=data, other=other: setattr(data, "gain", other), "gain of Data")
    assert alike(math.nan, float(str(math.nan)))
    assert alike((1, 2.0), (1, 2.0))
    assert not alike((1, 2.0), (1, 2))


@pytest.mark.parametrize("through", [lambda data: data, lambda data: data.bound, lambda data: lambda x: data(x) * 2])
def test_objects(through: Callable[[Any], Any]) -> None:
    data = Data()
    guard = held(through(data))
    assert Data.__call__.__code__ in guard.codes
    noticed(guard, lambda: data.steps.append(3), "steps of Data")
    noticed(guard, lambda: setattr(data, "gain", 5.0), "gain of Data")
    noticed(guard, lambda: setattr(data, "__class__", Subdata), "class")
    noticed(guard, lambda: setattr(data, "__dict__", dict(vars(data))), "__dict__")
    noticed(guard, lambda: setattr(data, "gain", 6.0), "gain")


def test_slots() -> None:
    slotted = Slotted()
    guard = held(slotted)
    noticed(guard, lambda: setattr(slotted, "value", 3.0), "value of Slotted")
    noticed(guard, lambda: slotted.hide(3), "hidden of Slotted")
    noticed(guard, lambda: setattr(slotted, "later", 3.0), "later of Slotted")
    noticed(guard, lambda: delattr(slotted, "later"), "later of Slotted")


def test_partials() -> None:
    inner = functools.partial(scaled, offset=[1.0])
    guard = held(inner)
    noticed(guard, lambda: inner.keywords.__setitem__("power", 2), "keywords")
    noticed(guard, lambda: inner.keywords["offset"].append(2), "")
    noticed(guard, lambda: inner.__setstate__((torch.sin, (), {}, {})), "func")


@pytest.mark.parametrize("hot", [1, 200])
@pytest.mark.parametrize("make", [Data, Net, Slotted, lambda: types.SimpleNamespace(value=1.0)])
def test_stores_of_specialised_bytecode_are_noticed(make: Callable[[], Any], hot: int) -> None:
    """The interpreter rewrites stores that run often; some of these write past the dict as long as there is none."""

    def store(target: Any, value: Any) -> None:
        for _ in range(hot):
            target.value = value

    warm = make()
    store(warm, 1.0)
    target = make()
    store(target, 1.0)
    guard = held(lambda x: x * target.value)
    for number in range(2, 60):
        store(target, float(number))
        assert not guard.is_unchanged()
        assert "value" in guard.diff().what
        guard.rebase()
        assert guard.is_unchanged()
        store(warm, float(number))
        assert guard.is_unchanged()


def test_augmented_stores_are_noticed() -> None:
    class Counter:
        def __init__(self) -> None:
            self.count = 0

        def __call__(self, x: Tensor) -> Tensor:
            self.count += 1
            return x * self.count

    counter = Counter()
    guard = held(counter)
    for _ in range(200):
        counter(WEIGHT)
        assert not guard.is_unchanged()
        assert guard.diff().what == "attribute count of Counter"
        guard.rebase()


def test_what_is_no_change() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    guard = held(net)
    for loop in range(3):
        globals()["LOOP"] = loop
        optimizer.zero_grad()
        net(torch.ones(2, 3, requires_grad=True)).sum().backward()
        optimizer.step()
        net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})
        nn.Linear(2, 2).tag = loop
        assert guard.is_unchanged()
    with torch.no_grad():
        assert guard.is_unchanged()
    with torch.inference_mode():
        assert guard.is_unchanged()
    with torch.autocast("cpu"):
        assert guard.is_unchanged()
        assert guard.is_unchanged()
    seen = []
    torch.vmap(lambda x: seen.append(guard.is_unchanged()) or x)(torch.ones(2))
    assert seen == [True]


def test_what_is_as_before_is_no_change() -> None:
    net = Net()
    guard = held(net)
    for _ in range(2):
        net.train()
        assert guard.diff().what
        net.eval()
        assert guard.diff() == NOTHING
        guard.rebase()
        assert guard.is_unchanged()
    other = {name: value.clone() for name, value in net.state_dict().items()}
    torch.func.functional_call(net, other, (torch.ones(2, 3),))
    assert guard.diff() == NOTHING
    net.scale = float("1.0")
    assert guard.diff() == NOTHING


def test_tensors_swapped_one_for_one() -> None:
    net = Net()
    net.rows[1].weight = net.rows[0].weight
    fixed = torch.ones(3)
    guard = held(functools.partial(lambda x, y, net: net(x) + y + WEIGHT, y=fixed, net=net))
    assert {id(tensor) for tensor in guard.tensors} == {
        *map(id, (*net.parameters(), *net.buffers(), net.index, fixed, WEIGHT))
    }
    old = net.rows[0].weight
    net.rows[0].weight = nn.Parameter(torch.randn(3, 3))
    assert not guard.is_unchanged()
    assert "weight" in guard.diff().what  # the other name still has the old one
    net.rows[1].weight = net.rows[0].weight
    found = guard.diff()
    assert found.what == ""
    assert found.tensors.keys() == {id(old)}
    assert found.tensors[id(old)] is net.rows[0].weight
    guard.rebase()
    assert guard.is_unchanged()
    assert any(tensor is net.rows[0].weight for tensor in guard.tensors)
    assert all(tensor is not old for tensor in guard.tensors)
    net.linear.bias, net.rows[0].bias = net.rows[0].bias, net.linear.bias
    found = guard.diff()
    assert found.what == ""
    assert len(found.tensors) == 2
    guard.rebase()
    net.linear.bias = net.rows[0].bias
    assert guard.diff().what


def test_other_metadata_is_a_change_and_not_a_swap() -> None:
    net = Net()
    guard = held(net)
    for other in (torch.ones(3).double(), torch.ones(4), torch.ones(3, requires_grad=True), torch.ones(6)[::2]):
        net.shift = other
        assert guard.diff().what == "buffer shift of Net"
        guard.rebase()
        net.shift = torch.ones(3)
        guard.rebase()


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.ones(10_000),
        lambda: np.random.default_rng(0),
        lambda: np.random.RandomState(0),
        lambda: bytearray(3),
        lambda: memoryview(bytearray(3)),
        lambda: iter([1]),
        lambda: (number for number in range(3)),
        lambda: open(__file__),  # noqa: SIM115
        lambda: random.Random(0),
        torch.Generator,
        lambda: weakref.WeakSet([scaled]),
        lambda: list(range(20_000)),
        lambda: sys,
        lambda: torch.ones(3).as_subclass(type("Own", (Tensor,), {})),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_compared_is_refused(make: Callable[[], Any]) -> None:
    thing = make()
    guard = Guard(lambda x: (x, thing))
    assert guard.reason
    guard.is_unchanged()


def test_weak_references() -> None:
    lstm = nn.LSTM(2, 2)
    held(lstm)
    data = Data()
    weak = weakref.ref(data)
    assert "weak" in Guard(lambda x: weak()(x) * 2).reason
    held(lambda x: weak()(x) + data(x))


def test_small_arrays_of_numpy_are_compared() -> None:
    array = np.arange(4.0)
    guard = held(lambda x: x * array[0] * np.float64(2.0))
    noticed(guard, lambda: array.__setitem__(0, 7.0), "array")
    assert "array" in Guard(lambda x: x * np.ones(3) + big).reason


def test_containers() -> None:
    queue = collections.deque([1, 2])
    kinds = {1, 2}
    ordered = collections.OrderedDict(a=1, b=2)
    default = collections.defaultdict(list, a=1)
    guard = held(lambda x: (queue, kinds, ordered, default))
    noticed(guard, queue.rotate, "queue")
    noticed(guard, lambda: kinds.remove(1), "kinds")
    noticed(guard, lambda: kinds.add(True), "kinds")
    noticed(guard, lambda: ordered.move_to_end("a"), "ordered")
    noticed(guard, lambda: ordered.__setitem__("a", 3), "ordered")
    noticed(guard, lambda: default["new"], "default")


def test_modules_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = types.ModuleType("settings_of_mine")
    settings.gain = 2.0
    settings.unused = 1
    settings.inner = types.ModuleType("settings_of_mine.inner")
    settings.inner.table = [1]
    monkeypatch.setitem(sys.modules, "settings_of_mine", settings)
    monkeypatch.setitem(globals(), "settings_of_mine", settings)

    def by_global(x: Tensor) -> Tensor:
        return x * settings_of_mine.gain * settings_of_mine.inner.table[0]  # noqa: F821

    def by_import(x: Tensor) -> Tensor:
        import settings_of_mine as mine  # noqa: PLC0415

        return x * mine.gain * mine.inner.table[0]

    def by_name(x: Tensor) -> Tensor:
        from settings_of_mine import gain, inner  # noqa: PLC0415

        return x * gain * inner.table[0]

    def by_string(x: Tensor) -> Tensor:
        return x * getattr(settings_of_mine, "ga" + "in") * settings_of_mine.inner.table[0]  # noqa: F821

    for func in (by_global, by_import, by_name, by_string):
        guard = held(func)
        noticed(guard, lambda: setattr(settings, "gain", settings.gain + 1), "gain")
        noticed(guard, lambda: settings.inner.table.append(1), "table")
        if func is not by_string:
            settings.unused += 1
            assert guard.is_unchanged()


def test_libraries_that_were_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = held(lambda x: torch.nn.functional.relu(torch.tanh(x)))
    # a library's own code may call it
    noticed(guard, lambda: monkeypatch.setattr(torch, "sin", torch.cos), "torch.sin")
    noticed(guard, lambda: monkeypatch.setattr(torch.Tensor, "sin", torch.cos), "sin of class Tensor")
    noticed(guard, lambda: monkeypatch.setattr(torch, "tanh", torch.cos), "torch.tanh")
    noticed(guard, lambda: monkeypatch.setattr(nn.functional, "relu", torch.cos), "relu")


def test_attributes_that_autograd_writes_are_refused() -> None:
    assert "grad" in Guard(lambda x: x if WEIGHT.grad is None else x * 2).reason
    assert Guard(lambda x: torch.autograd.grad(x.sum(), x)).reason == ""


def test_state_that_classes_hold() -> None:
    class Meta(type):
        def __getitem__(cls, item: int) -> int:
            return item + META[0]

    class Base(metaclass=Meta):
        seen: ClassVar[Any] = [1]

        @property
        def area(self) -> int:
            return len(self.seen)

        @classmethod
        def make(cls, x: Tensor) -> Tensor:
            return x * cls.seen[0]

    class Child(Base): ...

    class Other: ...

    guard = held(lambda x: Child.make(x) * Child[0])
    noticed(guard, lambda: Base.seen.append(2), "seen")
    noticed(guard, lambda: setattr(Child, "seen", 2), "seen of class Child")
    noticed(guard, lambda: setattr(Base, "area", 2), "area of class Base")
    noticed(guard, lambda: setattr(Child, "__bases__", (Child.__bases__[0], Other)), "class Child")
    noticed(guard, lambda: META.__setitem__(0, META[0] + 1), "META")


class Interface(abc.ABC):
    @abc.abstractmethod
    def gain(self) -> int: ...


class Implemented(Interface, Generic[T]):
    def gain(self) -> int:
        return META[0]

    @functools.cached_property
    def area(self) -> int:
        return META[0]

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.gain()


def test_classes_of_other_metaclasses() -> None:
    guard = held(Implemented())
    noticed(guard, lambda: META.__setitem__(0, META[0] + 1), "META")
    noticed(guard, lambda: setattr(Interface, "more", object()), "more of class Interface")


def test_cached_properties_are_attributes_that_a_run_sets() -> None:
    implemented: Any = Implemented()
    guard = held(lambda x: x * implemented.area)
    noticed(guard, lambda: implemented.area, "area of Implemented")


def test_immutable_objects_of_the_standard_library() -> None:
    pattern, half, path = re.compile("a"), fractions.Fraction(1, 2), pathlib.Path("a")
    point, lock, log = Point([1], 2), threading.Lock(), logging.getLogger("guards")
    guard = held(lambda x: (pattern, half, path, point, lock, log, Color.RED, operator.itemgetter(1)))
    noticed(guard, lambda: point.x.append(2), "")
    noticed(guard, lambda: Color.RED.value.append(2), "")


Point = collections.namedtuple("Point", "x y")


class Color(enum.Enum):
    RED = [1]  # noqa: RUF012


def test_the_default_dtype() -> None:
    guard = held(torch.sin)
    try:
        noticed(guard, lambda: torch.set_default_dtype(torch.float64), "default dtype")
    finally:
        torch.set_default_dtype(torch.float32)


def test_functions_with_another_dict() -> None:
    def func(x: Tensor) -> Tensor:
        return x * func.gain  # type: ignore[attr-defined]

    func.gain = 2.0  # type: ignore[attr-defined]
    noticed(held(func), lambda: setattr(func, "__dict__", {"gain": 3.0}), "attributes of func")


def test_looking_runs_nothing_of_the_users() -> None:
    calls = []

    class Loud:
        def __init__(self) -> None:
            self.kept = {"a": 1}

        def __getattribute__(self, name: str) -> Any:
            calls.append(name)
            return object.__getattribute__(self, name)

        def __eq__(self, other: object) -> bool:
            calls.append("eq")
            return True

        def __hash__(self) -> int:
            calls.append("hash")
            return 1

        def __bool__(self) -> bool:
            calls.append("bool")
            return True

        def __len__(self) -> int:
            calls.append("len")
            return 1

        def __call__(self, x: Tensor) -> Tensor:
            return x

    class Items(dict):
        def __len__(self) -> int:
            calls.append("len")
            return 1

        def __iter__(self) -> Any:
            calls.append("iter")
            return dict.__iter__(self)

    class Numbers(list):
        def __iter__(self) -> Any:
            calls.append("iter")
            return list.__iter__(self)

    loud, items, numbers = Loud(), Items(), Numbers([1])
    keyed = {loud: loud}
    guard = Guard(lambda x: (loud, items, numbers, keyed))
    assert guard.reason == ""
    before = len(calls)  # building a guard looks around; the list is read by what it holds
    assert guard.is_unchanged()
    assert guard.diff() == NOTHING
    assert len(calls) == before
    other = Loud()
    guard.rebase()
    dict.__setitem__(items, "a", other)
    list.append(numbers, 2)
    before = len(calls)
    assert not guard.is_unchanged()
    assert guard.diff().what
    assert len(calls) == before


def test_threads_hold_at_once() -> None:
    net = Net()
    guard = held(net)
    found: list[bool] = []

    def work() -> None:
        found.append(all(guard.is_unchanged() for _ in range(500)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


SCALARS = st.one_of(st.integers(-3, 3), st.booleans(), st.floats(-1, 1), st.none(), st.text("ab", max_size=2))


def nested(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(children, min_size=1, max_size=3),
        st.dictionaries(st.sampled_from("abc"), children, min_size=1, max_size=3),
        st.tuples(children, children),
        st.builds(Data, children, st.lists(children, max_size=2)),
        st.builds(types.SimpleNamespace, a=children),
    )


def holders(thing: Any) -> list[Any]:
    """The mutable objects inside a nested one, where an item can be set."""
    if isinstance(thing, (Data, types.SimpleNamespace)):
        return [thing, *(one for part in vars(thing).values() for one in holders(part))]
    if isinstance(thing, (list, tuple, dict)):
        parts = thing.values() if isinstance(thing, dict) else thing
        inner = [one for part in parts for one in holders(part)]
        return inner if isinstance(thing, tuple) else [thing, *inner]
    return []


@settings(max_examples=40)
@given(st.recursive(SCALARS, nested, max_leaves=8), st.data())
def test_any_change_of_something_nested_is_noticed(thing: Any, data: st.DataObject) -> None:
    root = [thing]
    guard = held(lambda x: root)
    twin = copy.deepcopy(root)
    target = data.draw(st.sampled_from(holders(root)))
    value = data.draw(SCALARS)
    if isinstance(target, list):
        if target and data.draw(st.booleans()):
            key = data.draw(st.integers(0, len(target) - 1))
            old, target[key] = target[key], value
        else:
            old = ...
            target.append(value)
    else:
        state = target if isinstance(target, dict) else vars(target)
        key = data.draw(st.sampled_from([*state, "new"]))
        old = state.get(key, ...)
        if isinstance(target, dict):
            target[key] = value
        else:
            setattr(target, key, value)
    same = alike(old, value)
    assert (guard.diff() == NOTHING) == same
    assert not (guard.is_unchanged() and not same)
    guard.rebase()
    assert guard.is_unchanged()
    assert twin is not root


def test_a_count_of_changes_that_misses_some_is_not_used() -> None:
    seen: list[Any] = []

    def misses_deletions(kept: dict[str, Any]) -> int:
        if kept and (not seen or seen[-1] != kept):
            seen.append(dict(kept))
        return len(seen)

    assert not dict_versions.counts_changes(misses_deletions, types.SimpleNamespace())
    assert not dict_versions.counts_changes(lambda kept: 0, types.SimpleNamespace())
    counted: list[int] = [0]

    def misses_late_stores(kept: dict[str, Any]) -> int:  # as one that is told of none by specialized bytecode
        if kept.get("stored", 0) < 100:
            counted.append(torch._C._dynamo.guards.dict_version(kept))
        return counted[-1]

    assert not dict_versions.counts_changes(misses_late_stores, types.ModuleType("probe"))
    assert len(counted) > 100


def test_changes_of_classes_and_modules_are_counted_on_every_python() -> None:
    for probe in (type("Probe", (), {}), types.ModuleType("probe")):
        assert dict_versions.counts_changes(torch._C._dynamo.guards.dict_version, probe)
    if sys.version_info < (3, 13):  # 3.13.0 hides those of instances
        assert dict_versions.counts_changes(torch._C._dynamo.guards.dict_version, types.SimpleNamespace())
        assert dict_versions.counts_changes(torch._C._dynamo.guards.dict_version, type("Probe", (), {})())


class Setting:
    on = False
    nest: dict[str, int] = {"depth": 0}  # noqa: RUF012


def test_what_is_set_and_put_back_in_each_call_is_compared_entry_by_entry() -> None:
    guard = Guard(lambda x: x * Setting.on * Setting.nest["depth"])
    for turn in range(6):
        Setting.on = True
        Setting.nest["depth"] += 1
        Setting.nest["depth"] -= 1
        Setting.on = False
        assert guard.is_unchanged() or turn < 2
        assert guard.diff().what == ""
        guard.rebase()
    Setting.on = True
    assert not guard.is_unchanged()
    assert guard.diff().what == "on of class Setting"
    Setting.on = False
    assert guard.is_unchanged()
    Setting.nest["depth"] = 1
    assert not guard.is_unchanged()
    assert guard.diff().what == "nest of class Setting"
    Setting.nest["depth"] = 0


def test_a_tensor_that_is_exchanged_in_one_place_only_is_a_change() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    two.weight = one.weight
    guard = Guard(lambda x: one(x) + two(x))
    two.weight = nn.Parameter(one.weight.detach().clone())
    assert not guard.is_unchanged()
    assert guard.diff().what
    one.weight = two.weight
    assert guard.diff().what == ""
    assert guard.diff().tensors
