"""What func sets in nests and objects among its arguments is left there as by one plain call."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from autojac import (
    AutoHessian,
    AutoJacobian,
    Derivatives,
    MutationError,
    TrainingStep,
    UnsupportedError,
    probe,
    verify,
)
from harness import compare, forced, in_use
from oracle import jacobian_blocks

X = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
T = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
RIGHT = jacobian_blocks(lambda x: (x * T).sin(), (X,))


def estimated(func: Any, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


@dataclasses.dataclass
class State:
    w: Any = None
    count: Any = 0
    more: Any = None


@dataclasses.dataclass(frozen=True)
class Closed:
    w: Any = None
    count: Any = 0


@dataclasses.dataclass(frozen=True, slots=True)
class ClosedSlots:
    w: Any = None
    count: Any = 0


@dataclasses.dataclass(slots=True)
class Slots:
    w: Any = None
    count: Any = 0


class Pair(NamedTuple):
    w: Any
    info: Any


class Plain:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def count(state: Any) -> None:
    object.__setattr__(state, "count", state.count + 1)


def drop_and_add(d: Any) -> None:
    d.pop("old", None)
    d["new"] = d.get("new", 0) + 1


def fresh(state: Any) -> None:
    state.note = "set"


KINDS: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    "an attribute of a dataclass": (count, lambda: State(T)),
    "an attribute of a dataclass without tensors": (count, State),
    "an attribute of an object": (count, lambda: Plain(count=0, w=T)),
    "an attribute of a namespace": (count, lambda: SimpleNamespace(count=0)),
    "a frozen dataclass": (count, lambda: Closed(T)),
    "a frozen dataclass with slots": (count, lambda: ClosedSlots(T)),
    "slots": (count, lambda: Slots(T)),
    "slots without tensors": (count, Slots),
    "a new attribute": (fresh, lambda: State(T)),
    "keys of a dict": (drop_and_add, lambda: {"w": T, "old": 1}),
    "keys of a dict without tensors": (drop_and_add, lambda: {"old": 1}),
    "keys of an ordered dict": (drop_and_add, lambda: OrderedDict(w=T, old=1)),
    "keys of a defaultdict": (lambda d: d["seen"].append(1), lambda: defaultdict(list, w=T)),
    "a list": (lambda each: each.append(len(each)), lambda: [T]),
    "an empty list": (lambda each: each.append(len(each)), list),
    "a list that is cleared": (lambda each: each.clear(), lambda: [T, 1, 2]),
    "a deque": (lambda each: each.append(1), lambda: deque([T], maxlen=3)),
    "a set": (lambda each: each.add(len(each)), lambda: {7}),
    "a dataclass in a dataclass": (lambda s: count(s.more), lambda: State(T, more=State(T))),
    "a list in a dict in a dataclass": (lambda s: s.more["a"].append(1), lambda: State(T, more={"a": []})),
    "an object in a dict": (lambda d: count(d["o"]), lambda: {"w": T, "o": Plain(count=0)}),
    "an object in an object": (lambda o: count(o.inner), lambda: Plain(inner=Plain(count=0))),
    "a dict in a named tuple": (lambda pair: drop_and_add(pair.info), lambda: Pair(T, {})),
    "a dict in a tuple of tuples": (lambda t: drop_and_add(t[0][1]), lambda: ((T, {"w": T}),)),
    "a bound method's object": (lambda add: add(1), lambda: Recorder().add),
    "a tensor that is passed": (lambda d: d.update(last=d["w"]), lambda: {"w": T}),
    "a module's attribute": (count, lambda: counting(nn.Identity())),
}  # fmt: skip


class Recorder:
    def __init__(self) -> None:
        self.values: list[int] = []

    def add(self, value: int) -> None:
        self.values.append(value)


def counting(module: nn.Module) -> nn.Module:
    module.count = 0  # type: ignore[assignment]
    return module


def shown(value: Any, above: tuple[int, ...] = ()) -> Any:
    """What a nest holds, to be compared."""
    if id(value) in above:
        return "above"
    above = (*above, id(value))
    if isinstance(value, Tensor):
        return "tensor", value.tolist(), value.requires_grad
    if isinstance(value, dict):
        return type(value), [(key, shown(part, above)) for key, part in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return type(value), [shown(part, above) for part in value]
    if hasattr(value, "__self__"):
        return shown(value.__self__, above)
    if dataclasses.is_dataclass(value) and not hasattr(value, "__dict__"):
        return type(value), [shown(getattr(value, field.name), above) for field in dataclasses.fields(value)]
    if hasattr(value, "__dict__"):
        return type(value), shown({k: v for k, v in vars(value).items() if k != "training"}, above)
    return value


@pytest.mark.parametrize("by", ["position", "keyword"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_argument_holds_what_plain_calls_leave(kind: str, by: str) -> None:
    sets, make = KINDS[kind]

    def func(x: Tensor, state: Any) -> Tensor:
        sets(state)
        return (x * T).sin()

    wanted, state, jac = make(), make(), estimated(func)
    for _ in range(3):
        func(X, wanted)
        compare(jac(X, state) if by == "position" else jac(X, state=state), RIGHT)
        assert shown(state) == shown(wanted)


@pytest.mark.parametrize("state", [{"w": T}, State(T)], ids=["dict", "dataclass"])
def test_planning_explaining_and_checking_leave_nothing(state: Any) -> None:
    def func(x: Tensor, state: Any) -> Tensor:
        if isinstance(state, dict):
            state["y"] = x
        else:
            state.more = x
        return (x * T).sin()

    before = shown(state)
    jac = estimated(func)
    jac.plan(X, state)
    assert "func sets something in its arguments" in jac.explain(X, state)
    jac.tune(X, state, effort="quick", budget_s=0.2)
    probe(func, X, state)
    verify(RIGHT, func, X, state)
    assert shown(state) == before


def test_what_is_differentiated_is_set_as_well() -> None:
    def func(batch: dict[str, Any]) -> Tensor:
        batch["y"] = (batch["x"] * T).sin()
        batch["same"] = batch["x"]
        return batch["y"]  # type: ignore[no-any-return]

    jac = estimated(func)
    for x in (X, X + 1, X.clone().requires_grad_()):
        batch: dict[str, Any] = {"x": x, "name": "water"}
        y, J = jac.value_and_jacobian(batch)
        compare(J["x"].detach(), jacobian_blocks(lambda x: (x * T).sin(), (x.detach(),)))
        assert list(batch) == ["x", "name", "y", "same"]
        assert batch["same"] is batch["x"] is x
        compare([batch["y"].detach(), y.detach()], [(x * T).sin().detach()] * 2)
        assert batch["y"].requires_grad == x.requires_grad
        if x.requires_grad:
            compare(torch.autograd.grad(batch["y"].sum(), x)[0], (x * T).cos().detach() * T)
        # the result of a nest that func returns is what func returned
        returned = estimated(lambda batch: (func(batch), batch)[1], select="y").value_and_jacobian({"x": x})
        assert set(returned[2]) == {"x", "y", "same"}


METHODS: dict[str, dict[str, Any]] = {
    "pull": {"method": "Pull", "seeds": "shared", "engine": "loop"},
    "vmapped pull": {"method": "Pull", "seeds": "shared", "engine": "vmap"},
    "push": {"method": "Push", "seeds": "shared", "engine": "loop"},
    "per sample": {"method": "PerSample", "mode": "reverse"},
    "replay": {"method": "Replay", "inner": {"method": "Pull", "seeds": "shared", "engine": "vmap"}},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_it_once(method: str) -> None:
    def func(x: Tensor, log: dict[str, Any]) -> Tensor:
        log["last"] = x.sum()
        log["calls"].append(len(x))
        return (x * T).sin()

    log: dict[str, Any] = {"calls": [], "last": torch.zeros(()).double()}
    jac = forced(func, (X, log), METHODS[method], effort="estimate")
    for number in range(1, 6):
        log["calls"].clear()
        compare(jac(X * number, log), jacobian_blocks(lambda x: (x * T).sin(), (X * number,)))
        compare(log["last"], (X * number).sum())
        assert log["calls"] == [4]
    assert in_use(jac).plan.method == METHODS[method]


def test_what_only_some_values_make_func_set_is_left_too() -> None:
    def func(x: Tensor, log: dict[str, Any]) -> Tensor:
        if bool(x.sum() > 0):
            log["positive"] = log.get("positive", 0) + 1
        return (x * T).sin()

    jac = estimated(func, verify="never")
    for sign, log in ((-1, {"w": T}), (1, {"w": T, "positive": 1}), (-1, {"w": T}), (1, {"w": T, "positive": 1})):
        given: dict[str, Any] = {"w": T}
        jac(sign * X, given)
        assert given == log


def test_it_goes_with_all_else_that_a_call_leaves() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3).double()
            self.calls = 0

        def forward(self, x: Tensor, log: dict[str, Any]) -> Tensor:
            self.calls += 1
            log["calls"] = self.calls
            log["kept"] = torch.rand(())
            log["mean"] = self.norm.running_mean.clone()  # type: ignore[union-attr]
            return self.norm(x * log["w"]) * log["kept"].ceil()  # type: ignore[no-any-return]

    plain = Counting()
    wrapped = copy.deepcopy(plain)
    jac = estimated(wrapped, randomness="different")
    for number in range(4):
        wanted: dict[str, Any] = {"w": T}
        log: dict[str, Any] = {"w": T}
        torch.manual_seed(number)
        plain(X + number, wanted)
        drawn = torch.rand(3)
        torch.manual_seed(number)
        jac(X + number, log)
        assert torch.equal(torch.rand(3), drawn)
        assert wrapped.calls == plain.calls == log["calls"] == wanted["calls"]
        compare([log["mean"], log["kept"]], [wanted["mean"], wanted["kept"]])
        compare(wrapped.norm.running_mean, plain.norm.running_mean)


def cubed(x: Tensor, log: Any) -> Tensor:
    log["calls"].append(x.shape)
    return (x**3 * log["w"]).sum(-1)


def test_every_wrapper_leaves_what_one_plain_call_leaves() -> None:
    net = nn.Linear(3, 2).double()

    def layer(x: Tensor, log: Any) -> Tensor:
        log["calls"].append(x.shape)
        return net(x)  # type: ignore[no-any-return]

    class Logging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, x: Tensor, log: Any) -> Tensor:
            return layer(x, log)

    jac, hessian = estimated(cubed), AutoHessian(cubed, store=":memory:", on_miss="estimate")
    vector, matrix, of_samples = estimated(layer), estimated(layer, layout="full"), torch.ones(4).double()
    derivatives = Derivatives(cubed, of=((), (0,), (1, 1)), store=":memory:", on_miss="estimate")
    parameters = AutoJacobian.of_parameters(Logging(), store=":memory:", on_miss="estimate")
    columns = estimated(estimated(cubed))
    calls: dict[str, Callable[[Any], Any]] = {
        "jacobian": lambda log: jac(X, log),
        "jvp": lambda log: jac.jvp(X, log, X),
        "vjp": lambda log: jac.vjp(X, log, of_samples),
        "several": lambda log: jac.vjp(X, log, torch.stack([of_samples] * 2)),
        "whole": lambda log: matrix.jvp(X, log, X),
        "gram": lambda log: vector.gram(X, log),
        "norm": lambda log: vector.norm(X, log),
        "solve": lambda log: vector.solve(X, log, torch.ones(4, 2).double(), damping=1.0),
        "hessian": lambda log: hessian(X, log),
        "diagonal": lambda log: hessian.diagonal(X, log),
        "laplacian": lambda log: hessian.laplacian(X, log),
        "hvp": lambda log: hessian.hvp(X, log, X),
        "derivatives": lambda log: derivatives(X, log),
        "parameters": lambda log: parameters(X, log),
        "gradient norms": lambda log: parameters.gradient_norms(X, log, torch.ones(4, 2).double()),
        "nested": lambda log: columns(X, log),
    }
    for name, call in calls.items():
        log: dict[str, Any] = {"w": T, "calls": []}
        for _ in range(3):
            call(log)
            assert (name, log["calls"]) == (name, [X.shape])
            log["calls"].clear()
        assert list(log) == ["w", "calls"]


def test_products_along_a_nest_leave_it_too() -> None:
    def func(batch: Any) -> Tensor:
        batch["calls"].append(1)
        batch["y"] = (batch["x"] * T).sin()
        return batch["y"]  # type: ignore[no-any-return]

    batch: dict[str, Any] = {"x": X, "calls": []}
    v = {"x": torch.ones_like(X), "calls": []}
    compare(estimated(func).jvp(batch, v), RIGHT.sum(-1))
    assert batch["calls"] == [1]
    compare(batch.pop("y"), (X * T).sin())


@pytest.mark.parametrize("replayed", [False, True])
def test_a_training_step_leaves_what_one_plain_step_leaves(replayed: bool) -> None:
    net = nn.Linear(3, 2).double()

    def loss(y: Tensor, J: Tensor, log: Any) -> Tensor:
        log.more["steps"].append(len(y))
        return y.square().mean() + J.square().mean()

    step, log = TrainingStep(net, loss, store=":memory:", on_miss="estimate"), State(T, more={"steps": []})
    if replayed:
        step.tune(X, log, effort="quick", budget_s=0.3)
    for _ in range(3):
        step(X, log)
        assert log.more["steps"] == [4]
        log.more["steps"].clear()


def test_inside_a_transform_it_is_left_too() -> None:
    jac, log = estimated(cubed), {"w": T, "calls": []}
    jac(X, log)
    log["calls"] = []
    torch.func.jacrev(lambda x: jac(x, log))(X)
    assert len(log["calls"]) == 1
    with torch.inference_mode():
        jac(X, log)
    assert len(log["calls"]) == 2


def test_factors_leave_it() -> None:
    def centred(x: Tensor, log: Any) -> Tensor:
        log["calls"].append(1)
        return x * T - x.mean(0).sin()

    log: dict[str, Any] = {"w": T, "calls": []}
    jac = estimated(centred)
    jac.factors(X, log)
    assert log["calls"] == [1]


def test_what_cannot_be_left_is_refused_by_name() -> None:
    log: dict[str, Any] = {"w": T, "calls": []}
    with pytest.raises(UnsupportedError, match="sets something in its arguments"):
        list(estimated(cubed).chunks(X, log, bytes=50))
    several = estimated(cubed, batch_dims=2)
    with pytest.raises(MutationError, match="batch_dims=2 makes copies of"):
        several(X.reshape(2, 2, 3), log)
    assert len(several._calls.wrappers[0]._plans) == 0
    several(X.reshape(2, 2, 3), log=log)
    assert log["calls"] == [(2, 2, 3)]
    log["calls"].clear()
    twice = estimated(lambda x, a, b: (a.append(1), b.append(2), x * T)[2])
    with pytest.raises(MutationError, match="a list that is passed to it twice"):
        twice(X, log["calls"], log["calls"])
    assert log["calls"] == []
    assert len(twice._plans) == 0


@pytest.mark.parametrize(
    "holder", [lambda t: t, lambda t: {"t": t}, lambda t: Plain(t=t)], ids=["itself", "dict", "object"]
)
def test_tensors_passed_by_keyword_or_in_objects_are_not_written_into(holder: Any) -> None:
    total = torch.zeros(3).double()

    def func(x: Tensor, held: Any) -> Tensor:
        tensor = held if isinstance(held, Tensor) else held["t"] if isinstance(held, dict) else held.t
        tensor.add_(1)
        return (x * T).sin()

    jac = estimated(func)
    for _ in range(2):
        with pytest.raises(MutationError, match="func writes into"):
            jac(X, held=holder(total))
        with pytest.raises(MutationError, match="func writes into"):
            jac(X, holder(total))
    assert torch.equal(total, torch.zeros(3).double())
    assert len(jac._plans) == 0


def test_a_nest_may_come_to_hold_itself() -> None:
    def func(x: Tensor, d: Any) -> Tensor:
        d["own"] = [d, d["w"]]
        return (x * T).sin()

    for passed in ("args", "kwargs"):
        d: dict[str, Any] = {"w": T}
        jac = estimated(func)
        jac(X, d) if passed == "args" else jac(X, d=d)
        assert d["own"][0] is d
        assert d["own"][1] is T


def test_an_error_of_func_leaves_arguments_as_they_were() -> None:
    def func(x: Tensor, log: Any) -> Tensor:
        log["calls"].append(1)
        raise KeyError("later")

    log: dict[str, Any] = {"w": T, "calls": []}
    with pytest.raises(KeyError, match="later"):
        estimated(func)(X, log)
    assert log["calls"] == []


HELD: dict[str, Any] = {}


@pytest.mark.parametrize("is_set_as_passed", [True, False])
@pytest.mark.parametrize(
    ("passed", "found"),
    [
        (lambda d: ((d, d), {}), lambda other: other[0]),
        (lambda d: (({"a": [d]}, d), {}), lambda other: other[0]),
        (lambda d: ((d, Plain(t=d)), {}), lambda other: other[0].t),
        (lambda d: ((d,), {"other": d}), lambda other: other[0]),
        (lambda d: ((d,), {}), lambda other: HELD["d"]),
    ],
    ids=["twice", "in a nest", "in an object", "by keyword", "held by func"],
)
def test_what_is_found_in_two_ways_is_set_in_neither(passed: Any, found: Any, is_set_as_passed: bool) -> None:
    def func(x: Tensor, d: Any, *more: Any, other: Any = None) -> Tensor:
        d = d["a"][0] if "a" in d else d
        same = found((*more, other) if more else (other,))
        (d if is_set_as_passed else same)["n"] += 1
        return x.sin() * (same if is_set_as_passed else d)["n"]

    counts = HELD["d"] = {"n": 0}
    args, kwargs = passed(counts)
    jac = estimated(func)
    for _ in range(2):
        with pytest.raises(MutationError, match="passed to it twice, or passed and held"):
            jac(X, *args, **kwargs)
        assert counts == {"n": 0}
    assert len(jac._plans) == 0


def test_what_is_found_in_two_ways_and_only_read_is_served() -> None:
    log: dict[str, Any] = {"calls": []}
    held = HELD["d"] = {"w": T}
    jac = estimated(lambda x, a, b, c: (c["calls"].append(1), (x * a["w"]).sin() * b["w"] * HELD["d"]["w"])[1])
    jac(X, held, held, log)
    assert log["calls"] == [1]
