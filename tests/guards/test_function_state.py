"""Every plan, replayed or not, proved or not, notices in the very next call that Python has changed what func reads."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import pydoc
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autojac import AutoJacobian, StructureChangedWarning
from autojac.guards.function_state import CALLS_A_CHANGE, MOST_CHANGES, FunctionState
from autojac.guards.run_monitor import RunMonitor
from autojac.guards.walker import Walk
from harness import Counted, compare, forced, in_use
from oracle import jacobian_blocks, jacobian_full

PULL = {"method": "Pull", "seeds": "shared", "engine": "loop"}
GLOBAL = {"coupled": False}


def mixed(x: Tensor) -> Tensor:
    return x.softmax(-1)  # no zeros inside a sample, so that no pattern is read


def coupled(x: Tensor) -> Tensor:
    return x * x.roll(1, 0)


class Own(nn.Module):
    by = 0

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.roll(self.by, 0) if self.by else x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coupled = False
        self.options: dict[str, list[int]] = {"steps": []}
        self.inner = nn.Sequential(Own())
        self.plain = lambda x: x.exp()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
        self.register_buffer("near", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = mixed(x) * self.inner(x) * self.plain(x) * self.scale
        if self.coupled or GLOBAL["coupled"] or self.near.dim():
            y = y + coupled(x)
        for step in self.options["steps"]:
            y = y + x.roll(step, 0).sin()
        return y


CHANGES: dict[str, Callable[[Model, pytest.MonkeyPatch], Any]] = {
    "attribute": lambda model, patch: setattr(model, "coupled", True),
    "item": lambda model, patch: model.options["steps"].append(1),
    "buffer": lambda model, patch: setattr(model, "near", torch.zeros(1)),
    "list replaced": lambda model, patch: model.options.update(steps=[2]),
    "layer replaced": lambda model, patch: model.inner.__setitem__(0, nn.BatchNorm1d(3).double()),
    "function replaced": lambda model, patch: setattr(model, "plain", coupled),
    "class attribute": lambda model, patch: patch.setattr(Own, "by", 2),
    "method": lambda model, patch: patch.setattr(Own, "forward", lambda self, x: coupled(x)),
    "global": lambda model, patch: patch.setitem(GLOBAL, "coupled", True),
    "function of a module": lambda model, patch: patch.setitem(globals(), "mixed", coupled),
    "hook": lambda model, patch: model.inner.register_forward_hook(lambda module, args, y: coupled(y)),
    "pre-hook": lambda model, patch: model.inner.register_forward_pre_hook(lambda module, args: (coupled(args[0]),)),
    "library": lambda model, patch: patch.setattr(Tensor, "sin", coupled),
}


@pytest.mark.by_day(2)
@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning")
@pytest.mark.parametrize("layout", ["blocks", "full"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_in_the_next_call(change: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Model(), torch.randn(6, 3, dtype=torch.float64)
    jac = forced(model, (x,), PULL, layout=layout)
    for _ in range(20):
        jac(x)
    entry = in_use(jac)
    assert entry.schedule.last_check == 1  # proved, so that no check is due but for the change
    CHANGES[change](model, monkeypatch)
    for _ in range(2):
        oracle = jacobian_blocks if layout == "blocks" else jacobian_full
        compare(jac(x).detach(), oracle(model, (x,)))
    if change != "attribute":
        model.coupled = True
        compare(jac(x).detach(), oracle(model, (x,)))


def test_closures_are_looked_at_and_the_user_is_told() -> None:
    gate = False

    def func(x: Tensor) -> Tensor:
        return mixed(x) + (coupled(x) if gate else 0)

    x = torch.randn(6, 3, dtype=torch.float64)
    jac = AutoJacobian(func, store=":memory:", on_miss="estimate")
    for _ in range(5):
        jac(x)
    gate = True
    with pytest.warns(StructureChangedWarning, match="noticed immediately"):
        compare(jac(x), jacobian_blocks(func, (x,)))


def thaw(model: Model) -> None:
    model.scale.requires_grad_()


def exchange(model: Model) -> None:
    model.scale = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("change", [thaw, exchange])
@pytest.mark.parametrize("steps", [0, 1], ids=["independent", "coupled"])
def test_a_parameter_that_comes_later_is_trained(steps: int, change: Callable[[Model], None]) -> None:
    model, x = Model(), torch.randn(6, 3, dtype=torch.float64)
    model.options["steps"] += [1] * steps
    jac = forced(model, (x,), PULL)
    for _ in range(5):
        assert not jac(x).requires_grad
    change(model)
    J = jac(x)
    compare(J.detach(), jacobian_blocks(model, (x,)))
    (ours,) = torch.autograd.grad(J.square().sum(), model.scale)
    assert ours.abs().sum() > 0


LOOKS: dict[str, Callable[[Model], Any]] = {
    "deep copy": copy.deepcopy,
    "pickle": lambda model: pickle.dumps(model.inner),
    "help": pydoc.render_doc,
    "state dict": lambda model: model.load_state_dict(model.state_dict()),
    "training and back": lambda model: model.train().eval(),
    "attribute set to what it was": lambda model: setattr(model, "coupled", False),
    "optimizer": lambda model: torch.optim.SGD(model.parameters(), 0.1).step(),
    "parameters exchanged for a call": lambda model: torch.func.functional_call(
        model, {"scale": torch.ones(3, dtype=torch.float64)}, (torch.ones(6, 3, dtype=torch.float64),)
    ),
    "warning": lambda model: warnings.warn_explicit("once", Warning, __file__, 1, registry={}),
}


@pytest.mark.filterwarnings("ignore:once")
@pytest.mark.parametrize("name", LOOKS)
def test_what_is_no_change_costs_no_check(name: str) -> None:
    model, x = Model().eval(), torch.randn(6, 3, dtype=torch.float64)
    model.plain = mixed
    jac = forced(model, (x,), PULL)
    for _ in range(3):
        jac(x)
    entry = in_use(jac)
    for _ in range(MOST_CHANGES + 2):
        LOOKS[name](model)
        jac(x)
        assert entry.schedule.last_check == 1
    assert in_use(jac) is entry
    assert jac._plans.planner.function_state.is_complete


def test_a_state_that_was_checked_is_not_checked_again() -> None:
    model = Model()
    model.options["steps"].append(0)
    x = torch.randn(6, 3, dtype=torch.float64)
    counted = Counted(model.plain)
    model.plain = lambda x: torch.cat([counted(part) for part in (x,)])
    jac = AutoJacobian(model, store=":memory:", on_miss="estimate", coupling="independent")
    for _ in range(17):
        jac(x)
    before = counted.calls
    for step in (4, 4, 0, 0):  # rolling by nothing
        model.options["steps"][0] = 0 * step
        jac(x)
    assert counted.calls == before + 4


def test_what_changes_itself_in_every_call_is_not_checked_in_every_call() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return mixed(x)

    func = Counted(Counting())
    x = torch.randn(6, 3, dtype=torch.float64)
    jac = forced(func, (x,), PULL)
    checks = []
    for call in range(1, 40):
        before = func.calls
        jac(x)
        # a plain call leaves the count right
        checks += [call] * (func.calls > before + 2)
    assert checks[-5:] == [2, 4, 8, 16, 32]


def test_what_is_changed_before_every_call_is_checked_a_few_times() -> None:
    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = 0

        def forward(self, x: Tensor) -> Tensor:
            return mixed(x) * self.step

    model = Stepped()
    runs: list[int] = []
    model.register_forward_hook(lambda module, args, y: None)
    x = torch.randn(6, 3, dtype=torch.float64)
    jac = forced(model, (x,), PULL)
    entry_checks = 0
    for step in range(60):
        model.step = step
        compare(jac(x), jacobian_blocks(model, (x,)))
        entry = in_use(jac)
        entry_checks += entry.schedule.last_check == entry.schedule.calls
    assert MOST_CHANGES <= entry_checks <= MOST_CHANGES + 10
    assert not runs


def test_a_place_that_keeps_changing_is_ignored_and_others_are_not() -> None:
    held: dict[str, Any] = {"count": 1000, "rows": [1, 2], "other": 0}
    state = FunctionState(lambda: held)
    state.observe()
    assert state.observe() == (1, False)
    held["rows"].append(3)
    assert state.observe() == (2, True)
    for number in range(MOST_CHANGES):
        held["count"] += 1
        assert state.observe() == (3 + number, True)
    assert state.is_complete
    held["count"] += 1
    state.observe()
    assert not state.is_complete
    held["count"] += 1
    kind, changed = state.observe()
    assert not changed
    held["other"] = 1
    held["count"] += 1
    assert state.observe() == (kind + 1, True)
    held["rows"][0] = 7
    assert state.observe() == (kind + 2, True)
    # later once in a while: what changed often at first may have become a setting
    noticed = 0
    for _ in range(3 * CALLS_A_CHANGE):
        held["count"] += 1
        before = kind
        kind, _ = state.observe()
        noticed += kind != before
    assert 2 <= noticed <= 4


def test_states_that_take_turns_are_known_however_often() -> None:
    net = nn.Sequential(nn.Dropout(), Own())
    state = FunctionState(net)
    kinds = []
    for training in [True, False] * (2 * MOST_CHANGES):
        net.train(training)
        kinds.append(state.observe()[0])
    assert kinds == [1, 2] * (2 * MOST_CHANGES)
    assert state.is_complete


@pytest.mark.parametrize("matter", [True, False])
def test_exchanged_tensors_are_noticed_for_good_where_their_values_decide(matter: bool) -> None:
    held = {"mask": torch.ones(3, dtype=torch.bool)}
    state = FunctionState(lambda: held)
    if matter:
        state.watch_tensors()
    state.observe()
    changes = []
    for _ in range(3 * MOST_CHANGES):
        held["mask"] = held["mask"].clone()
        kind, changed = state.observe()
        changes.append(changed)
        assert kind == 1
        assert state.observe() == (1, False)
    assert all(changes) if matter else changes.count(True) == MOST_CHANGES + 1
    assert state.is_complete == matter


class Grown(torch.Generator):
    """State that no guard sees, and an attribute that it does."""

    coupled = False


class Holder:
    """Something that only a weak reference leads to."""

    coupled = False


def refused(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[], Any], str]:
    """A function of which not all can be listed, and a change of what can."""
    if name == "hidden state":
        grown = Grown()
        return lambda x: coupled(x) if grown.coupled else mixed(x), lambda: setattr(grown, "coupled", True), "Grown"
    if name == "weak reference":
        holder = Holder()
        strong[:] = [holder]
        weak = weakref.ref(holder)
        change = functools.partial(setattr, holder, "coupled", True)
        return lambda x: coupled(x) if getattr(weak(), "coupled", None) else mixed(x), change, "weak"
    if name == "long list":
        rows = [0] * 20_000
        return lambda x: coupled(x) if rows[7] else mixed(x), lambda: rows.__setitem__(7, 1), "elements"
    raise AssertionError(name)


strong: list[Any] = []


@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["hidden state", "weak reference", "long list"])
def test_what_can_be_listed_is_compared_where_not_all_can(name: str) -> None:
    func, change, reason = refused(name)
    x = torch.randn(6, 3, dtype=torch.float64)
    eager = functools.partial(torch.compiler.set_stance, "force_eager")
    jac = forced(func, (x,), PULL)
    for _ in range(5):
        jac(x)
    assert reason in jac._plans.planner.function_state.reason
    change()
    found = jac(x)
    with eager():
        compare(found.detach(), jacobian_blocks(func, (x,)))


@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning")
def test_changes_are_noticed_while_a_mode_of_the_callers_is_on() -> None:
    seen: list[str] = []

    class Logged(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    model, x = Model(), torch.randn(6, 3, dtype=torch.float64)
    jac = forced(model, (x,), PULL)
    with torch.device("cpu"):
        for _ in range(5):
            jac(x)
        model.coupled = True
        compare(jac(x).detach(), jacobian_blocks(model, (x,)))
        for _ in range(3):
            jac(x)
    state = jac._plans.planner.function_state
    other = nn.Parameter(model.scale.detach().clone(), requires_grad=False)
    with Logged():
        assert not state.observe()[1]
        model.inner[0] = Own()
        assert state.observe()[1]
        model._parameters["scale"] = other
        assert state.observe()[1]
    assert not seen


def test_func_is_walked_over_twice_at_a_first_call_and_then_only_when_it_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Model(), torch.randn(6, 3, dtype=torch.float64)
    # what torch loads at a first call is state of its modules, and a reason to look again
    AutoJacobian(Model(), store=":memory:", on_miss="estimate")(x)
    walks: list[str] = []
    visit = Walk.visit

    def counted(self: Walk, obj: Any) -> None:
        walks.extend([type(self).__name__] * (obj is model))
        visit(self, obj)

    # a part of autojac's, which is not followed as the user's code would be
    home = {**globals(), "__name__": "autojac.guards.walker"}
    monkeypatch.setattr(Walk, "visit", types.FunctionType(counted.__code__, home, closure=counted.__closure__))
    jac = AutoJacobian(model, store=":memory:", on_miss="estimate")
    jac(x)
    # the guard's looks into libraries as well, whose state is another in each process; the other's digest must not be
    assert len(walks) == len(set(walks)) == 2
    walks.clear()
    for _ in range(5):
        jac(x)
    assert not walks
    model.options["steps"].append(0)
    jac(x)
    assert len(walks) == len(set(walks)) == 2
    walks.clear()
    jac(x)
    assert not walks


def test_nothing_is_collected_while_a_check_watches_func(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finalizers of garbage would be taken for what func does."""
    collects: list[bool] = []

    class Watched(RunMonitor):
        def __enter__(self) -> Self:
            collects.append(gc.isenabled())
            return super().__enter__()

    monkeypatch.setattr("autojac.planning.check.RunMonitor", Watched)
    forced(Model(), (x := torch.randn(6, 3, dtype=torch.float64),), PULL)(x)
    assert collects == [False] and gc.isenabled()


@pytest.mark.parametrize("slots", [False, True])
def test_an_object_may_change_its_class(slots: bool) -> None:
    body: dict[str, Any] = {"__slots__": ("k",)} if slots else {}
    first = type("First", (), {**body, "scaled": lambda self, x: self.k * x})
    other = type("Other", (), {**body, "scaled": lambda self, x: -self.k * x.flip(0)})
    held = first()
    held.k = 2.0  # type: ignore[attr-defined]

    def func(x: Tensor) -> Tensor:
        scaled: Tensor = held.scaled(x.sin())  # type: ignore[attr-defined]
        return scaled

    x = torch.randn(4, 3, dtype=torch.float64)
    jac = AutoJacobian(func, effort="estimate", store=":memory:")
    compare(jac(x), jacobian_blocks(func, (x,)))
    held.__class__ = other
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            compare(jac(x), jacobian_blocks(func, (x,)))


def test_a_class_may_change_its_bases() -> None:
    first, other = type("First", (), {"k": 1.0}), type("Other", (), {"k": 2.0})
    kind: Any = type("Kind", (first,), {})
    held = kind()

    def func(x: Tensor) -> Tensor:
        scaled: Tensor = x.sin() * held.k
        return scaled

    x = torch.randn(4, 3, dtype=torch.float64)
    jac = AutoJacobian(func, effort="estimate", store=":memory:")
    compare(jac(x), jacobian_blocks(func, (x,)))
    kind.__bases__ = (other,)
    for _ in range(3):
        compare(jac(x), jacobian_blocks(func, (x,)))


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, net: Any) -> Tensor:
        ctx.net = net
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return cotangent * ctx.net.gain, None


class SetsGain(nn.Module):
    def forward(self, x: Tensor) -> Any:
        self.gain = self.other = 2.0
        return Scaled.apply(x, self)


def test_what_a_backward_reads_counts_where_it_has_not_been_seen_to_run() -> None:
    """On a GPU autograd runs it in a thread of its own."""
    state = FunctionState(SetsGain())
    state.cover([SetsGain.forward.__code__])
    assert "test_function_state.py, line" in state.where_read("gain", SetsGain)
    assert state.where_read("other", SetsGain) == ""
