"""Replays: right at other points, with other parameters, and after Python has changed anything that they read."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import pickle
import random
import re
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import autojac
from autojac.core.sandbox import Sandbox
from autojac.guards.captures import captures
from autojac.guards.walker import Walk
from autojac.methods.base import build, registry
from autojac.planning.search import measure
from autojac.replay.passes import passes
from autojac.replay.replayer import MOST_TRACES
from harness import Ticking, compare, forced, in_threads, in_use, planned
from oracle import jacobian_blocks
from scenarios import SCENARIOS, Scenario

LOOP = {"method": "Pull", "seeds": "shared", "engine": "loop"}
PULL = {"method": "Pull", "seeds": "shared", "engine": "vmap"}
PUSH = {"method": "Push", "seeds": "shared", "engine": "vmap"}
SAMPLE = {"method": "PerSample", "mode": "reverse"}
INNER = [LOOP, PULL, PUSH, SAMPLE]
NAMES = [f"{spec['method']}-{spec.get('engine', '')}" for spec in INNER]


def replay(inner: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"method": "Replay", "inner": inner, **fields}


def traces(jac: autojac.AutoJacobian) -> int:
    """How often something was traced."""
    lines = jac._plans.planner.function_state.traces
    assert not any("not possible" in line for line in lines), lines
    return len(lines)


def served(jac: autojac.AutoJacobian) -> list[str]:
    return list(jac._plans.planner.function_state.traces)


def connected(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Blocks (B, m, n) that carry a graph: a row at a time."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    y = func(x)
    rows = [torch.autograd.grad(column.sum(), x, create_graph=True)[0] for column in y.unbind(1)]
    return torch.stack(rows, 1)


def compiled(inner: dict[str, Any]) -> dict[str, Any]:
    return {"method": "Compiled", "inner": replay(inner)}


def net(*sizes: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype).requires_grad_(False)


HIDDEN = re.compile("reads values|among the arguments|has compiled|from the same random state|more than 2000 operators")
"""Why a function may not be replayed."""
SAFE = [scenario for scenario in SCENARIOS if "mutates_input" not in scenario.traits]


@pytest.mark.by_day(12)
@pytest.mark.parametrize("most", [4, pytest.param(1000, marks=pytest.mark.nightly)], ids=["some", "all"])
@pytest.mark.parametrize("scenario", SAFE, ids=str)
def test_what_was_recorded_at_one_point_is_right_at_another(scenario: Scenario, most: int) -> None:
    """Every scenario, through the replay of methods that serve it, then with all it holds moved."""
    func, args, kwargs = scenario.make(2, torch.float64)
    _, others, _ = scenario.make(3, torch.float64)
    with torch.no_grad():
        request, seen, problem = planned(func, args, kwargs, argnums=scenario.argnums)
        problem = dataclasses.replace(problem, trial=True)
        sandbox = Sandbox(captures(func).tensors, seen.sandbox.state)
        tried, refused = 0, list[str]()
        for inner in _some(problem, scenario.name, most):
            method = build(replay(inner.spec()))
            if method.unsupported(problem) is not None:
                continue
            with sandbox():
                try:
                    eager = inner.prepare_call(problem)
                    eager(request.leaves, request.keywords)
                except Exception:  # an infeasible candidate; others are tested for their reasons
                    continue
                tried += 1
                try:
                    run = method.prepare_call(problem)
                    run(request.leaves, request.keywords)
                except autojac.UnsupportedError as refusal:
                    refused.append(str(refusal))
                    continue
            leaves = request.layout.leaves(others)
            if [x.shape for x in leaves] != [x.shape for x in request.leaves]:
                leaves = request.leaves
            with sandbox():
                for tensor in captures(func).tensors:
                    if tensor.is_floating_point() and not tensor.is_inference():
                        tensor.mul_(1.125)
                moved = Sandbox((), seen.sandbox.state)
                with moved():
                    expected = eager(leaves, request.keywords)
                with moved():
                    compare(run(leaves, request.keywords).jacobians, expected.jacobians)
    # whatever runs is replayed, or autojac says why not; in scenarios that nothing hides from a guard it is replayed
    assert all(refused)
    assert len(refused) < tried or not tried or scenario.traits or any(map(HIDDEN.search, refused)), refused


def _some(problem: Any, name: str, most: int) -> list[Any]:
    """At most so many of the methods for a problem: others for other scenarios."""
    kinds = [kind for kind in registry().values() if not kind.is_wrapper]
    found = [m for kind in kinds for m in kind.candidates(problem, 1) if m.unsupported(problem) is None]
    return random.Random(name).sample(found, min(most, len(found)))


SCALE = 2.0


def reads_a_global(x: Tensor) -> Tensor:
    return torch.sin(x) * SCALE


def reads_a_default(x: Tensor, scale: float = 2.0) -> Tensor:
    return torch.sin(x) * scale


def other_body(x: Tensor, scale: float = 2.0) -> Tensor:
    return torch.cos(x) * scale


@dataclasses.dataclass
class Settings:
    scale: float = 2.0
    powers: tuple[int, ...] = (1, 2)


class Model(nn.Module):
    """Reads attributes of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net(3, 4, 2)
        self.scale = 2.0
        self.settings = Settings()
        self.factors = [1.0, 0.5]
        self.chosen = {"act": torch.tanh}
        self.register_buffer("shift", torch.ones(2, dtype=torch.float64))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x) * self.scale + self.shift
        y = self.chosen["act"](y) * self.factors[0] + sum(y**p for p in self.settings.powers) * self.settings.scale
        return self.extra(y) if self.training else y

    def extra(self, y: Tensor) -> Tensor:
        return 3 * y


def _closure() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    scale = 2.0

    def func(x: Tensor) -> Tensor:
        return torch.sin(x) * scale

    def change() -> None:
        nonlocal scale
        scale = 3.0

    return func, change


def _global() -> tuple[Any, Callable[[], None]]:
    return reads_a_global, functools.partial(globals().__setitem__, "SCALE", 3.0)


def _copied(func: types.FunctionType) -> Any:
    made = types.FunctionType(func.__code__, globals(), func.__name__, func.__defaults__)
    made.__module__ = __name__
    return made


def _default() -> tuple[Any, Callable[[], None]]:
    func = _copied(reads_a_default)  # type: ignore[arg-type]
    return func, lambda: setattr(func, "__defaults__", (3.0,))


def _code() -> tuple[Any, Callable[[], None]]:
    func = _copied(reads_a_default)  # type: ignore[arg-type]
    return func, lambda: setattr(func, "__code__", other_body.__code__)


def _of_model(change: Callable[[Model], Any]) -> Callable[[], tuple[Any, Callable[[], None]]]:
    def make() -> tuple[Any, Callable[[], None]]:
        model = Model().eval()
        return model, lambda: change(model)

    return make


def _with(module: nn.Module, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(module, name, value)


UNDO: list[Callable[[], Any]] = []


def _hooked_everywhere() -> tuple[Any, Callable[[], None]]:
    def change() -> None:
        handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: y * 2)
        UNDO.append(handle.remove)

    return net(3, 2, 2), change


def _default_dtype() -> tuple[Any, Callable[[], None]]:
    def func(x: Tensor) -> Tensor:
        return (x.sin().to(torch.float32) * torch.full((3,), 1 / 3)).to(torch.float64)

    def change() -> None:
        UNDO.append(functools.partial(torch.set_default_dtype, torch.get_default_dtype()))
        torch.set_default_dtype(torch.float64)

    return func, change


CHANGES: dict[str, Callable[[], tuple[Any, Callable[[], None]]]] = {
    "closure": _closure,
    "global": _global,
    "default": _default,
    "code": _code,
    "attribute": _of_model(lambda model: _with(model, scale=3.0)),
    "object": _of_model(lambda model: setattr(model.settings, "scale", 5.0)),
    "item of a list": _of_model(lambda model: model.factors.__setitem__(0, 7.0)),
    "item of a dict": _of_model(lambda model: model.chosen.__setitem__("act", torch.sin)),
    "method": _of_model(lambda model: setattr(model, "forward", lambda x: model.inner(x) * 5)),
    "module replaced": _of_model(lambda model: setattr(model, "inner", net(3, 5, 2))),
    "layer replaced": _of_model(lambda model: model.inner.__setitem__(1, nn.Sigmoid())),
    "layer appended": _of_model(lambda model: model.inner.append(nn.Tanh())),
    "parameter replaced": _of_model(
        lambda model: setattr(model.inner[0], "weight", nn.Parameter(torch.ones(4, 3, dtype=torch.float64), False))
    ),
    "parameter of another shape": _of_model(
        lambda model: (setattr(model, "inner", net(3, 2)), setattr(model.inner[0], "bias", None))
    ),
    "buffer replaced": _of_model(lambda model: setattr(model, "shift", torch.zeros(2, dtype=torch.float64))),
    "buffer of another shape": _of_model(lambda model: setattr(model, "shift", torch.zeros(1, dtype=torch.float64))),
    "memory replaced": _of_model(lambda model: setattr(model.inner[0].weight, "data", model.inner[0].weight * 2)),
    "parameters loaded": _of_model(lambda model: model.load_state_dict(Model().state_dict())),
    "train mode": _of_model(lambda model: model.train()),
    "train mode of a part": _of_model(lambda model: model.drop.train()),
    "forward hook": _of_model(lambda model: model.inner.register_forward_hook(lambda m, a, y: y * 3)),
    "forward pre-hook": _of_model(lambda model: model.inner[2].register_forward_pre_hook(lambda m, a: (a[0] * 3,))),
    "full backward hook": _of_model(
        lambda model: model.inner[2].register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))
    ),
    "hook of all modules": _hooked_everywhere,
    "default dtype of a new tensor": _default_dtype,
}


@pytest.fixture(autouse=True)
def undo() -> Any:
    yield
    globals()["SCALE"] = 2.0
    while UNDO:
        UNDO.pop()()


@pytest.mark.by_day(2)
@pytest.mark.parametrize(
    ("name", "inner"),
    # torch has no rule for module backward hooks under its transforms
    [(name, inner) for name in CHANGES for inner in (LOOP, PULL) if inner is LOOP or "backward" not in name],
    ids=lambda value: value if isinstance(value, str) else value["engine"],
)
def test_no_change_goes_unseen(name: str, inner: dict[str, Any]) -> None:
    func, change = CHANGES[name]()
    x = torch.randn(5, 3, dtype=torch.float64)
    jac = forced(func, (x,), replay(inner), verify="never")
    compare(jac(x), jacobian_blocks(func, (x,), 0))
    assert traces(jac) == 1
    compare(jac(2 * x), jacobian_blocks(func, (2 * x,), 0))
    assert traces(jac) == 1
    assert "not possible" not in served(jac)[0]
    change()
    for factor in (1, 3):
        compare(jac(factor * x), jacobian_blocks(func, (factor * x,), 0))


def test_a_state_that_comes_back_is_known() -> None:
    model = Model().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    jac = forced(model, (x,), replay(PULL), verify="never")
    for scale in (2.0, 3.0, 2.0, 2.0, 3.0):
        model.scale = scale
        compare(jac(x), jacobian_blocks(model, (x,), 0))
    assert traces(jac) == 2


def test_train_and_eval_mode_in_turns() -> None:
    model = nn.Sequential(net(3, 4, 2), nn.Dropout(0.0)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    modes = [forced(model.train(mode), (x,), replay(PULL), verify="never") for mode in (True, False)]
    for _ in range(6):
        for jac, mode in zip(modes, (True, False), strict=True):
            model.train(mode)
            compare(jac(x), jacobian_blocks(model, (x,), 0))
    assert [traces(jac) for jac in modes] == [1, 1]


def test_an_operator_that_raises_an_error_still_does() -> None:
    def inverse(x: Tensor) -> Tensor:
        return torch.linalg.inv(x)

    x = torch.randn(4, 2, 2, dtype=torch.float64) + 3 * torch.eye(2, dtype=torch.float64)
    jac = forced(inverse, (x,), replay(LOOP), verify="never")
    compare(jac(x), jacobian_blocks(inverse, (x,), 0))
    with pytest.raises(torch.linalg.LinAlgError):
        jac(torch.zeros_like(x))
    compare(jac(2 * x), jacobian_blocks(inverse, (2 * x,), 0))
    assert traces(jac) == 1


@pytest.mark.parametrize("first", [1.0, -1.0])
def test_a_way_taken_after_an_error_is_taken_by_replays_too(first: float) -> None:
    def func(x: Tensor) -> Tensor:
        try:
            return torch.linalg.cholesky(torch.diag_embed(x))
        except torch.linalg.LinAlgError:
            return torch.diag_embed(x.sin())

    x = torch.rand(4, 2, dtype=torch.float64) + 1
    jac = forced(func, (first * x,), replay(LOOP), verify="never")
    for sign in (first, -first, first):
        compare(jac(sign * x), jacobian_blocks(func, (sign * x,), 0))


def test_what_changes_in_each_call_is_not_traced_for_ever() -> None:
    model = Model().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    jac = forced(model, (x,), replay(LOOP), verify="never")
    jac(x)
    for call in range(MOST_TRACES + 10):
        model.scale = 1.0 + call
        compare(jac(x), jacobian_blocks(model, (x,), 0))
    assert jac._plans.planner.function_state.present.number > MOST_TRACES
    entry = in_use(jac)
    assert entry.compute.traces == MOST_TRACES  # type: ignore[attr-defined]


def test_parameters_are_read_as_they_are() -> None:
    model = net(3, 4, 2).requires_grad_()
    x = torch.randn(6, 3, dtype=torch.float64)
    with torch.no_grad():
        jac = forced(model, (x,), replay(PULL), verify="never")
        jac(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    average = copy.deepcopy(model)

    def right() -> None:
        with torch.no_grad():
            compare(jac(x), jacobian_blocks(model, (x,), 0))

    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        right()
    with torch.no_grad():
        for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
            ours.data.lerp_(theirs.data, 0.3)
        theirs.data.mul_(1.5)
    right()
    model.load_state_dict(average.state_dict())
    right()
    torch.nn.utils.vector_to_parameters(torch.linspace(-1, 1, 26, dtype=torch.float64), model.parameters())
    right()
    # a tensor exchanged for another one like it costs no new trace
    for name, layer in (("weight", model[0]), ("bias", model[2])):
        old = getattr(layer, name)
        setattr(layer, name, nn.Parameter(torch.randn_like(old)))
        right()
    for swapped in (average.state_dict(), {n: torch.randn_like(p) for n, p in model.named_parameters()}):
        kept = {n: p for n, p in model.named_parameters()}
        for n, value in swapped.items():
            layer, _, field = n.partition(".")
            setattr(model[int(layer)], field, nn.Parameter(value))
        right()
        for n, p in kept.items():
            layer, _, field = n.partition(".")
            setattr(model[int(layer)], field, p)
        right()
    assert traces(jac) == 1


def test_moved_to_another_dtype() -> None:
    model = Model().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    jac = forced(model, (x,), replay(PULL), verify="never")
    jac(x)
    model.float()
    compare(jac(x.float()), jacobian_blocks(model, (x.float(),), 0), 1e-4)
    model.double()
    compare(jac(x), jacobian_blocks(model, (x,), 0))


@pytest.mark.parametrize("inner", INNER, ids=NAMES)
def test_shapes_and_strides_may_change_and_change_back(inner: dict[str, Any]) -> None:
    model = net(3, 4, 2)
    x = torch.randn(12, 3, dtype=torch.float64)
    jac = forced(model, (x,), replay(inner), verify="never")
    wide = torch.randn(12, 6, dtype=torch.float64)
    for point in (x, x[:7], x[:1], x, wide[:, ::2], x[:1].expand(12, 3), wide[:, :3].T.contiguous().T, x[:7], x[:0]):
        compare(jac(point), jacobian_blocks(model, (point,), 0))


def test_one_tensor_given_twice_and_captured_too() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)

    def func(a: Tensor, b: Tensor) -> Tensor:
        return a.sin() * b.cos() + a * x

    jac = forced(func, (x, x), replay(PULL), argnums=(0, 1), verify="never")
    y = torch.randn(5, 3, dtype=torch.float64)
    for args in ((x, x), (y, y), (x, y), (y, x)):
        compare(jac(*args), jacobian_blocks(func, args, (0, 1)))


def test_a_result_that_is_written_into_spoils_nothing() -> None:
    weight = torch.randn(2, 3, dtype=torch.float64)

    def func(x: Tensor) -> Tensor:
        return x @ weight.T

    x = torch.randn(5, 3, dtype=torch.float64)
    for inner in (LOOP, PULL, PUSH, SAMPLE):
        jac = forced(func, (x,), replay(inner), verify="never")
        kept = weight.clone()
        for _ in range(3):
            J = jac(x)
            compare(J, jacobian_blocks(func, (x,), 0))
            J.mul_(7)
            J[0] += 1
        assert torch.equal(weight, kept)
    jac = forced(func, (x,), compiled(LOOP), verify="never")
    for _ in range(3):
        J = jac(x)
        compare(J, jacobian_blocks(func, (x,), 0))
        J.mul_(7)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("inner", INNER, ids=NAMES)
def test_derivatives_of_the_jacobian(inner: dict[str, Any]) -> None:
    model = net(3, 4, 2).requires_grad_()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    jac = forced(model, (x,), replay(inner), verify="never")
    sources = [x, *model.parameters()]

    def losses(y: Tensor, J: Tensor) -> list[Tensor]:
        return [J.square().sum(), y.sin().sum() + J.prod(), y.square().sum(), J[0, 0, 0] * y[1, 1]]

    def oracle() -> tuple[Tensor, Tensor]:
        return model(x), connected(model, x)

    for number in range(4):
        ours, theirs = losses(*jac.value_and_jacobian(x))[number], losses(*oracle())[number]
        compare(ours, theirs)
        found = torch.autograd.grad(ours, sources, allow_unused=True, create_graph=True)
        right = torch.autograd.grad(theirs, sources, allow_unused=True, create_graph=True)
        pairs = [(a, b) for a, b in zip(found, right, strict=True) if a is not None or b is not None]
        assert all(a is not None and b is not None for a, b in pairs)
        compare([a for a, _ in pairs], [b for _, b in pairs])
        # derivatives of the backward through J
        again = [
            torch.autograd.grad(sum(g.square().sum() for g in grads), sources, allow_unused=True)  # type: ignore[arg-type]
            for grads in ([a for a, _ in pairs], [b for _, b in pairs])
        ]
        for a, b in zip(*again, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                compare(a, b)
    assert traces(jac) == 1


def test_a_training_step_is_the_same() -> None:
    x = torch.randn(6, 3, dtype=torch.float64)
    ours = net(3, 4, 2).requires_grad_()
    theirs = copy.deepcopy(ours)
    jac = forced(ours, (x,), replay(LOOP), verify="never")
    for model, jacobian in ((ours, jac), (theirs, functools.partial(connected, theirs))):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            (model(x).square().sum() + jacobian(x).square().sum()).backward()
            optimizer.step()
    compare(list(ours.parameters()), list(theirs.parameters()))
    assert traces(jac) == 1


def test_dropout_draws_as_one_plain_call() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2)).double().requires_grad_(False)
    x = torch.randn(6, 3, dtype=torch.float64)
    for inner in (LOOP, PULL):
        jac = forced(model, (x,), replay(inner), verify="never")
        for seed in range(3):
            torch.manual_seed(seed)
            expected = jacobian_blocks(model, (x,), 0)
            torch.manual_seed(seed)
            model(x)
            after = torch.get_rng_state()
            torch.manual_seed(seed)
            J = jac(x)
            compare(J, expected)
            assert torch.equal(torch.get_rng_state(), after)
        assert traces(jac) == 1


def test_running_statistics_move_once() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double().requires_grad_(False)
    x = torch.randn(8, 3, dtype=torch.float64)
    method = {"method": "Statistics", "local": "copies"}
    jac = forced(model, (x,), replay(method), verify="never")
    mirror = copy.deepcopy(model)
    for step in range(4):
        compare(jac(x + step), jacobian_blocks(copy.deepcopy(model).train(), (x + step,), 0))
        mirror(x + step)
        compare(list(model.buffers()), list(mirror.buffers()))
    assert traces(jac) == 1


def test_in_place_operators_and_slices() -> None:
    log = torch.zeros(2, dtype=torch.float64)

    def func(x: Tensor) -> Tensor:
        y = torch.zeros(len(x), 4, dtype=x.dtype)
        y[:, :3] = x.sin()
        y[:, 1:].mul_(x)
        y = y.clone()
        y.add_(x.sum(-1, keepdim=True))
        log.add_(1)
        return y

    x = torch.randn(5, 3, dtype=torch.float64)
    jac = forced(func, (x,), replay(LOOP), verify="never")
    before = log.clone()
    for step in range(3):
        compare(jac(x + step), jacobian_blocks(lambda x: _without(log, func, x), (x + step,), 0))
    assert traces(jac) == 1
    assert torch.equal(log, before + 3)


def _without(log: Tensor, func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    kept = log.clone()
    y = func(x)
    log.copy_(kept)
    return y


KNOB = [2.0]
BUFFER = torch.tensor([3.0], dtype=torch.float64)
WEIGHT = nn.Parameter(BUFFER.clone())


REFUSED: dict[str, tuple[Callable[[], Callable[..., Tensor]], str]] = {
    "print": (lambda: lambda x: (print(end=""), x.sin())[1], "print"),
    "clock": (lambda: lambda x: x.sin() * (1 + 0 * time.time()), "time"),
    "random": (lambda: lambda x: x.sin() * (1 + 0 * random.random()), "random"),
    "item of a parameter": (lambda: lambda x: x.sin() * WEIGHT.item(), "values of a tensor"),
    "float of a parameter": (lambda: lambda x: x.sin() * float(WEIGHT), "values of a tensor"),
    "list of many numbers": (lambda: lambda x: x.sin() * BUFFER.expand(999).tolist()[0], "values of a tensor"),
    "array of a parameter": (lambda: lambda x: x.sin() * BUFFER.numpy()[0], "values of a tensor"),
    "number of the data": (lambda: lambda x: x.sin() if x.sum().item() > 0 else x.cos(), "values of a tensor"),
    "shape from data": (lambda: lambda x: x.sin() * x[x > 0].sum(), "values of a tensor|coupled"),
    "name looked up": (lambda: lambda x: x.sin() * globals()["KNOB"][0], "globals"),
    "code from text": (lambda: lambda x: eval("x.sin() * KNOB[0]", {"x": x, "KNOB": KNOB}), "eval"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_guarded_is_not_replayed(name: str) -> None:
    make, reason = REFUSED[name]
    func = make()
    x = torch.rand(5, 3, dtype=torch.float64)
    _, _, problem = planned(func, (x,))
    method = build(replay(LOOP))
    with torch.no_grad():
        refused = method.unsupported(problem)
        if refused is None:
            with pytest.raises(autojac.UnsupportedError) as caught:
                method.prepare_call(dataclasses.replace(problem, trial=True))((x,), {})
            refused = str(caught.value)
            # outside of a search the method itself serves the call
            served = method.prepare_call(problem)((x,), {})
            compare(served.jacobians[0][0], jacobian_blocks(func, (x,), 0))
    assert re.search(reason, refused), refused


def test_a_function_that_can_be_traced_for_some_shapes_only() -> None:
    def func(x: Tensor) -> Tensor:
        return x.sin() * (float(float(x.sum()) > 0) if len(x) > 4 else 2.0)

    x = torch.rand(8, 3, dtype=torch.float64)
    store = autojac.PlanStore(":memory:")
    jac = forced(func, (x[:4],), replay(LOOP), verify="never", store=store)
    for point in (x[:4], x, x[:3], x[:4], -x):
        J = jac(point)
        right = jacobian_blocks(func, (point,), 0)
        assert J.shape == right.shape
        if len(point) <= 4:
            compare(J, right)


def test_floats_among_the_arguments() -> None:
    def func(x: Tensor, t: float, *, power: int = 2) -> Tensor:
        return x.sin() ** power * t

    x = torch.randn(5, 3, dtype=torch.float64)
    jac = forced(func, (x, 0.5), replay(LOOP), verify="never")
    for t in (0.5, 1.5, -2.0):
        compare(jac(x, t), jacobian_blocks(lambda x, t=t: func(x, t), (x,), 0))
    told = " ".join(served(jac))
    assert "float among the arguments" in told


def test_tensors_among_the_keywords() -> None:
    def func(x: Tensor, *, mask: Tensor, nest: dict[str, Any]) -> Tensor:
        return torch.where(mask, x.sin(), x * nest["scale"]) * (2 if nest["on"] else 1)

    x = torch.randn(5, 3, dtype=torch.float64)
    call = {"mask": x > 0, "nest": {"scale": torch.tensor(2.0, dtype=torch.float64), "on": True}}
    jac = forced(func, (x,), replay(PULL), call, verify="never")
    for scale, on in ((2.0, True), (3.0, True), (3.0, False), (2.0, True)):
        call = {"mask": torch.randn(5, 3) > 0, "nest": {"scale": torch.tensor(scale, dtype=torch.float64), "on": on}}
        compare(jac(x, **call), jacobian_blocks(func, (x,), 0, kwargs=call))


def test_two_threads() -> None:
    model = Model().eval()
    x = torch.randn(6, 3, dtype=torch.float64)
    jac = forced(model, (x,), replay(LOOP), verify="never")
    expected = {size: jacobian_blocks(model, (x[:size],), 0) for size in (2, 4, 6)}

    def work() -> None:
        for _ in range(20):
            for size, right in expected.items():
                compare(jac(x[:size]), right)

    in_threads(3, work)


def test_a_copy_and_a_pickle_trace_anew() -> None:
    model = net(3, 4, 2)
    x = torch.randn(5, 3, dtype=torch.float64)
    jac = forced(model, (x,), replay(PULL), verify="never")
    jac(x)
    for other in (copy.deepcopy(jac), pickle.loads(pickle.dumps(autojac.AutoJacobian(model, on_miss="estimate")))):
        compare(other(x), jacobian_blocks(model, (x,), 0))
        with torch.no_grad():
            other.func[0].weight.mul_(2)
        compare(other(x), jacobian_blocks(other.func, (x,), 0))
    compare(jac(x), jacobian_blocks(model, (x,), 0))


def test_chunks_have_a_graph_each_for_full_and_last() -> None:
    model = net(3, 4, 2)
    x = torch.randn(11, 3, dtype=torch.float64)
    jac = forced(model, (x,), {"method": "BatchChunk", "size": 4, "inner": replay(PULL)}, verify="never")
    for _ in range(3):
        compare(jac(x), jacobian_blocks(model, (x,), 0))
    assert traces(jac) == 2


def test_a_compiled_replay() -> None:
    model = Model().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    jac = forced(model, (x,), compiled(LOOP), verify="never")
    compare(jac(x), jacobian_blocks(model, (x,), 0))
    with torch.no_grad():
        model.inner[0].weight.mul_(2)
    compare(jac(2 * x), jacobian_blocks(model, (2 * x,), 0))
    model.scale = 3.0
    compare(jac(x), jacobian_blocks(model, (x,), 0))
    assert traces(jac) == 2


def test_a_compiled_replay_trains() -> None:
    model = net(3, 4, 2).requires_grad_()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    jac = forced(model, (x,), compiled(PULL), verify="never")
    sources = [x, *model.parameters()]
    for _ in range(2):
        losses = [
            J.square().sum() + y.sin().sum() for y, J in (jac.value_and_jacobian(x), (model(x), connected(model, x)))
        ]
        ours, theirs = (torch.autograd.grad(loss, sources, create_graph=True) for loss in losses)
        compare(ours, theirs)
        again = [torch.autograd.grad(sum(g.square().sum() for g in some), sources) for some in (ours, theirs)]  # type: ignore[arg-type]
        compare(*again)
        with torch.no_grad():
            model[0].weight.mul_(1.5)


def test_a_compiled_replay_moves_running_statistics_once() -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).double().requires_grad_(False)]
    models.append(copy.deepcopy(models[0]))
    x = torch.randn(8, 3, dtype=torch.float64)
    jac = forced(models[0], (x,), compiled(LOOP), verify="never")
    before = copy.deepcopy(models[0].state_dict())
    for factor in (1, 2, 3):
        jac(factor * x)
        models[1](factor * x)
    for name, value in models[0].state_dict().items():
        compare(value, models[1].state_dict()[name])
    assert not torch.equal(before["1.running_mean"], models[0].state_dict()["1.running_mean"])


def test_compiled_replays_draw_as_one_plain_call() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh()).double().requires_grad_(False)
    x = torch.randn(6, 3, dtype=torch.float64)
    jac = forced(model, (x,), compiled(LOOP), verify="never")
    for seed in range(2):
        torch.manual_seed(seed)
        expected = jacobian_blocks(model, (x,), 0)
        torch.manual_seed(seed)
        compare(jac(x), expected)


def test_a_search_offers_replays_and_explains_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(3, 4, 2)
    x = torch.randn(8, 3, dtype=torch.float64)
    monkeypatch.setattr(measure, "clock", Ticking())
    jac = autojac.AutoJacobian(model, on_miss="tune", budget_s=20.0, store=":memory:")
    compare(jac(x), jacobian_blocks(model, (x,), 0))
    # how fast they are is the machine's affair
    kinds = {trial.method["method"] for trial in jac.plan(x).trials if trial.seconds is not None}
    assert "Replay" in kinds
    assert "operators left of" in jac.explain(x)


def test_passes_can_be_left_out() -> None:
    model = net(3, 4, 2)
    x = torch.randn(5, 3, dtype=torch.float64)
    _, _, problem = planned(model, (x,))
    assert problem.function_state is not None
    left = []
    for without in (None, "hoist", *passes(), ",".join(passes())):
        with torch.no_grad():
            found = build(replay(PULL, without=without)).prepare_call(problem)((x,), {})
        compare(found.jacobians[0][0], jacobian_blocks(model, (x,), 0))
        left.append(int(problem.function_state.traces[-1].split()[1]))
    assert left[0] == min(left) < left[-1] == max(left)


def test_autocast_is_part_of_the_trace() -> None:
    model = net(3, 8, 2, dtype=torch.float32)
    x = torch.randn(6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        jac = forced(model, (x,), replay(LOOP), verify="never")
        eager = forced(model, (x,), LOOP, verify="never")
        for _ in range(2):
            compare(jac(x), eager(x), 1e-2)
    assert "not possible" not in served(jac)[0]


def test_aux_comes_with_it() -> None:
    def func(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x.sin(), {"norm": x.norm(dim=-1)}

    x = torch.randn(5, 3, dtype=torch.float64)
    jac = forced(func, (x,), replay(LOOP), has_aux=True, verify="never")
    J, aux = jac(x)
    compare(J, jacobian_blocks(lambda x: x.sin(), (x,), 0))
    compare(aux["norm"], x.norm(dim=-1))


def test_parameters_jacobian() -> None:
    model = net(3, 4, 2).requires_grad_()
    x = torch.randn(5, 3, dtype=torch.float64)
    jac = autojac.AutoJacobian.of_parameters(model, on_miss="tune", effort="quick", budget_s=1.5, store=":memory:")
    reference = autojac.AutoJacobian.of_parameters(model, on_miss="estimate", store=":memory:")
    for _ in range(2):
        with torch.no_grad():
            compare(jac(x), reference(x))
            model[0].weight.mul_(1.5)


def test_numbers_written_out_in_the_code_are_made_anew() -> None:
    def func(x: Tensor) -> Tensor:
        y = torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64)
        y.add_(x.detach().mean() * 0 + 1)
        z = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        z[0] = 5.0
        return x.sin() * y * z

    x = torch.randn(5, 3, dtype=torch.float64)
    jac = forced(func, (x,), replay(LOOP), coupling="independent", verify="never")
    for _ in range(3):
        compare(jac(x), jacobian_blocks(func, (x,), 0))
    assert traces(jac) == 1


def test_arguments_anywhere_in_their_memory() -> None:
    def func(x: Tensor) -> Tensor:
        return torch.as_strided(x, (len(x), 2), (3, 1)).sin() + x[:, 1:]

    x = torch.randn(12, 3, dtype=torch.float64)
    jac = forced(func, (x[:4],), replay(LOOP), verify="never")
    for start in (0, 4, 8, 2):
        point = x[start : start + 4]
        compare(jac(point), jacobian_blocks(func, (point,), 0))


@pytest.mark.parametrize("wrapper", [replay, compiled], ids=["plain", "compiled"])
def test_equal_outputs_are_results_of_their_own(wrapper: Callable[..., dict[str, Any]]) -> None:
    def func(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), x.sin()

    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            jac = forced(func, (x,), wrapper(PULL), verify="never")
            (y, other), (J, K) = jac.value_and_jacobian(x)
            with torch.no_grad():
                J.mul_(5)
                y.mul_(5)
            compare(K.detach(), jacobian_blocks(lambda x: x.sin(), (x,), 0))
            compare(other.detach(), x.detach().sin())


def test_tracing_looks_into_what_computes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method's constants are looked for in what it holds, not in its plan store, nor once more in func."""
    met: list[str] = []
    instance = Walk._instance

    def noted(walk: Walk, obj: Any, kind: type) -> None:
        met.append(kind.__module__)
        instance(walk, obj, kind)

    monkeypatch.setattr(Walk, "_instance", noted)
    model = Model().eval()

    def func(x: Tensor) -> Tensor:
        return model(x).cumsum(1)

    x = torch.randn(5, 3, dtype=torch.float64)
    _, _, problem = planned(func, (x,), layout="sparse")
    method = build(replay({"method": "ColoredPull", "engine": "batched"}))
    # the first one makes the guard of func, the second one is traced alone
    for _ in range(2):
        met.clear()
        J = method.prepare_call(problem)((x,), {}).jacobians[0][0]
        right = torch.block_diag(*jacobian_blocks(func, (x,), 0))
        compare(problem.entries(0, 0).matrix(J).to_dense(), right)
    assert met
    assert not [name for name in met if name.startswith(("sqlalchemy", "autojac.store", Model.__module__))]


@pytest.mark.by_day(2)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "differentiable"])
def test_nothing_of_the_recorded_run_is_kept(grad: bool) -> None:
    model = net(3, 64, 2).requires_grad_(grad)
    x = torch.randn(500, 3, dtype=torch.float64)
    jac = forced(model, (x,), replay(PULL), verify="never")

    def nodes() -> int:
        return sum(type(o) is fx.Node for o in gc.get_objects())

    def held() -> int:
        gc.collect()
        sizes = {}
        for tensor in (o for o in gc.get_objects() if type(o) is Tensor and o.layout == torch.strided):
            # what a compiler has left may have no memory
            with contextlib.suppress(RuntimeError):
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(size for size in sizes.values() if size >= 4000)

    before, others = held(), nodes()
    with torch.set_grad_enabled(grad):
        jac(x)
    assert traces(jac) == 1
    # cotangents that are the same in each run are kept, two numbers for each of 500 samples and rows
    assert held() <= before + (16000 if grad else 0)
    assert nodes() <= others


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_method_that_reads_the_indices_of_its_entries_is_replayed(trained: bool, engine: str) -> None:
    func, x = (
        nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double().requires_grad_(trained),
        torch.randn(4, 3, dtype=torch.float64),
    )
    jac = forced(func, (x,), replay({"method": "Pull", "seeds": "identity", "engine": engine}), layout="sparse")
    jac(x)
    entry = in_use(jac)
    assert entry.problem.function_state is not None
    (line,) = entry.problem.function_state.traces
    assert "operators left" in line
    full = torch.block_diag(*jacobian_blocks(func, (x,)))
    compare(jac(x).to_dense(), full)


def test_functions_of_equal_code_are_replayed() -> None:
    """A cell of a notebook that runs twice makes two code objects that are equal."""
    module, x = (
        nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double().requires_grad_(False),
        torch.randn(4, 3, dtype=torch.float64),
    )
    cell = "module[0].register_forward_hook(lambda layer, args, out: out * 1.5)"
    for _ in range(2):
        exec(compile(cell, "<cell>", "exec"), {"module": module})
    jac = forced(module, (x,), replay(LOOP))
    compare(jac(x), jacobian_blocks(module, (x,)))
    assert traces(jac) == 1


@pytest.mark.parametrize("inner", INNER, ids=NAMES)
def test_outputs_that_are_added_up_are_replayed(inner: dict[str, Any]) -> None:
    layers = net(3, 8, 2)

    def func(x: Tensor) -> Tensor:
        return layers(x).sum(-1, keepdim=True)

    x = torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        jac = forced(func, (x,), replay(inner))
        for _ in range(2):
            compare(jac(x), jacobian_blocks(func, (x,)))
            x = torch.randn(5, 3, dtype=torch.float64)
        assert traces(jac) == 1
