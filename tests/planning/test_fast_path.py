"""The short way through a call is taken where everything is as before, and only there."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import autojac
from autojac.core.call import CallLayout
from autojac.core.plan import Plan
from autojac.guards.dict_versions import change_counter
from autojac.planning.fast_path import no_fast_path
from harness import compare, forced
from oracle import jacobian_blocks

PULL = {"method": "Replay", "inner": {"method": "Pull", "seeds": "shared", "engine": "loop", "chunk": None}}


class Seen(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Sometimes(nn.Module):
    """Couples its samples when told to."""

    coupled = False

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() + (x.mean() if self.coupled else 0)


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls took the long way, as a list that grows."""
    made: list[int] = []
    run = autojac.AutoJacobian._run
    monkeypatch.setattr(autojac.AutoJacobian, "_run", lambda self, *call: (made.append(1), run(self, *call))[1])
    return made


def func(x: Tensor) -> Tensor:
    return torch.stack([x.sin().prod(1), x.square().sum(1)], 1)


def wrapped(x: Tensor, **options: Any) -> autojac.AutoJacobian:
    jac = forced(func, (x,), PULL, verify="never", **options)
    for _ in range(2):
        compare(jac(x), jacobian_blocks(func, (x,), 0))
    return jac


def points(grad: bool = False) -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize("grad", [False, True])
def test_calls_alike_take_the_short_way(long_ways: list[int], grad: bool) -> None:
    x = points(grad)
    jac = wrapped(x)
    long_ways.clear()
    for _ in range(3):
        z = points(grad)
        J = jac(z)
        compare(J, jacobian_blocks(func, (z,), 0))
        y, again_J = jac.value_and_jacobian(z)
        compare((y, again_J), (func(z), J))
        assert J.requires_grad == y.requires_grad == grad
    assert not long_ways


@pytest.mark.parametrize("layers", [1, 4])
def test_calls_alike_run_six_functions_of_python_besides_the_program_whatever_func_holds(layers: int) -> None:
    parts = [part for _ in range(layers) for part in (nn.Linear(3, 3), nn.Tanh())]
    model, x = nn.Sequential(*parts).double().requires_grad_(False), points()
    jac = forced(model, (x,), PULL, verify="never")
    right = jacobian_blocks(model, (x,), 0)
    for _ in range(2):
        compare(jac(x), right)
    ran: list[str] = []
    sys.setprofile(lambda frame, event, _: ran.append(frame.f_code.co_name) if event == "call" else None)
    try:
        J = jac(x)
    finally:
        sys.setprofile(None)
    compare(J, right)
    # Python 3.13.0 hides stores to attributes of instances, whose dicts are then compared one by one
    compared = ["_same", "read"] * (change_counter(True) is None)
    ran = [name for name in ran if name not in compared]
    assert ran == ["__call__", "serve", "may_transform", "try_replay", "unchanged", "inputs", "program"]


@contextlib.contextmanager
def default_dtype() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def saved_elsewhere() -> Any:
    with torch.autograd.graph.save_on_cpu():
        yield


AROUND: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "default dtype": default_dtype,
    "dual level": forward_ad.dual_level,
    "function mode": Seen,
    "dispatch mode": Dispatched,
    "hooks on saved tensors": saved_elsewhere,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", AROUND)
def test_another_mode_takes_the_long_way(name: str, long_ways: list[int]) -> None:
    x = points(True)
    jac = wrapped(x)
    long_ways.clear()
    with AROUND[name]():
        found = jac(x)
    compare(found, jacobian_blocks(func, (x,), 0))
    assert long_ways
    long_ways.clear()
    # and nothing of it lasts
    for _ in range(2):
        compare(jac(2 * x), jacobian_blocks(func, (2 * x,), 0))


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "another batch": lambda x: torch.cat([x, x]),
    "another width": lambda x: x[:, :2].contiguous(),
    "another dtype": lambda x: x.float(),
    "other strides": lambda x: x.t().contiguous().t(),
    "a part of memory": lambda x: torch.cat([x, x], 1)[:, :3],
    "it requires grad": lambda x: x.clone().requires_grad_(),
    "a parameter": lambda x: nn.Parameter(x.clone()),
    "made in inference mode": lambda x: torch.inference_mode()(x.clone)(),
    "a negative view": lambda x: torch.complex(x, -x).conj().imag,
    "a tensor of zeros": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_of_tensor_takes_the_long_way(name: str, long_ways: list[int]) -> None:
    x = points()
    jac = wrapped(x)
    z = OTHERS[name](x)
    long_ways.clear()
    for _ in range(2):
        right = jacobian_blocks(func, (z.detach().clone().double(),), 0)
        compare(jac(z).double(), right, 1e-5 if z.dtype == torch.float32 else 1e-10)
        compare(jac(x), jacobian_blocks(func, (x,), 0))
    assert long_ways


def test_calls_of_other_kinds_are_refused_as_ever() -> None:
    x = points()
    jac = wrapped(x)
    for args, kwargs in (((), {}), ((x, x), {}), ((3.0,), {}), ((x.tolist(),), {}), ((x,), {"power": 2})):
        with pytest.raises((autojac.AutojacError, TypeError)):
            jac(*args, **kwargs)
    compare(jac(x), jacobian_blocks(func, (x,), 0))


def test_inside_transforms_and_compiled_functions() -> None:
    x = points()
    jac = wrapped(x)
    stacked = torch.stack([x, 2 * x])
    compare(torch.func.vmap(jac)(stacked), torch.stack([jac(x), jac(2 * x)]))
    gradient = torch.func.grad(lambda z: jac(z).sum())(x)
    z = x.clone().requires_grad_()
    jac(z).sum().backward()
    compare(gradient, z.grad)
    tangent = points()
    with forward_ad.dual_level():
        pushed = forward_ad.unpack_dual(jac(forward_ad.make_dual(x, tangent))).tangent
    step = 1e-6
    compare(pushed, (jac(x + step * tangent) - jac(x - step * tangent)) / (2 * step), 1e-6)
    compiled = torch.compile(lambda z: 2 * jac(z), backend="eager")
    compare(compiled(x), 2 * jac(x))


def test_several_arguments_and_outputs(long_ways: list[int]) -> None:
    def pair(x: Tensor, t: Tensor) -> dict[str, Tensor]:
        return {"a": x.sin() * t, "b": (x * t).sum(1)}

    x, t = points(), torch.rand(5, 1, dtype=torch.float64)
    jac = forced(pair, (x, t), PULL, argnums=(0, 1), verify="never")
    for _ in range(2):
        jac(x, t)
    long_ways.clear()
    x, t = points(), torch.rand(5, 1, dtype=torch.float64)
    compare(jac(x, t), jacobian_blocks(pair, (x, t), (0, 1)))
    assert not long_ways
    # one tensor given twice is nothing like two
    square = points()
    twice = forced(torch.mul, (square, points()), PULL, argnums=0, verify="never")
    for _ in range(2):
        twice(square, points())
    compare(twice(square, square), torch.diag_embed(square))


def test_checks_go_on(long_ways: list[int]) -> None:
    sometimes = Sometimes()
    x = points()
    jac = forced(sometimes, (x,), PULL)
    for _ in range(9):
        compare(jac(x), jacobian_blocks(sometimes, (x,), 0))
    # those at calls 1, 2, 4 and 8, and the ones after them that make the short way
    assert len(long_ways) < 9
    sometimes.coupled = True
    with pytest.warns(autojac.StructureChangedWarning, match="noticed immediately"):
        compare(jac(x), jacobian_blocks(sometimes, (x,), 0))
    for _ in range(5):
        compare(jac(x), jacobian_blocks(sometimes, (x,), 0))


@pytest.mark.parametrize("part", ["parameter", "layer"])
def test_what_is_put_in_place_of_something_frozen_is_trained(part: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().requires_grad_(False)
    x = points()
    jac = forced(model, (x,), PULL)
    for _ in range(3):
        assert not jac(x).requires_grad
    if part == "parameter":
        model[0].weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    else:
        model[0] = nn.Linear(3, 4).double()
    for _ in range(2):
        J = jac(x)
        compare(J.detach(), jacobian_blocks(model, (x,), 0))
        (found,) = torch.autograd.grad(J.square().sum(), model[0].weight)
        step, weight = 1e-6, model[0].weight
        moved = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[0, 0] += sign * step
                moved.append(jacobian_blocks(model, (x,), 0).square().sum())
                weight[0, 0] -= sign * step
        compare(found[0, 0], (moved[0] - moved[1]) / (2 * step), 1e-6)


def test_what_was_frozen_when_a_shape_was_new_is_trained_later() -> None:
    model = nn.Linear(3, 2).double()
    jac = autojac.AutoJacobian(lambda x: model(x).sin(), on_miss="estimate", store=":memory:")
    x = points()
    assert jac(x).requires_grad
    model.weight = nn.Parameter(model.weight.detach(), requires_grad=False)
    model.bias.requires_grad_(False)
    assert not jac(x[:4]).requires_grad
    model.requires_grad_(True)
    J = jac(x[:4])
    (found,) = torch.autograd.grad(J.sum(), model.weight)
    (right,) = torch.autograd.grad((model(x[:4]).cos()[:, :, None] * model.weight).sum(), model.weight)
    compare(found, right)


@pytest.mark.parametrize("mode", [Seen, Dispatched])
def test_a_change_under_a_mode_is_checked_too(mode: Callable[[], Any]) -> None:
    sometimes = Sometimes()
    x = points()
    jac = forced(sometimes, (x,), PULL)
    for _ in range(4):
        compare(jac(x), jacobian_blocks(sometimes, (x,), 0))
    sometimes.coupled = True
    with mode(), pytest.warns(autojac.StructureChangedWarning, match="noticed immediately"):
        J = jac(x)
    compare(J, jacobian_blocks(sometimes, (x,), 0))


class Mixed(nn.Module):
    """Diagonal, until it is given a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.matrix: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin() * self.weight
        return y if self.matrix is None else y + x @ self.matrix


def test_constants_that_come_later_are_watched() -> None:
    model, x = Mixed(), points()
    jac = forced(model, (x,), {"method": "Replay", "inner": {"method": "ColoredPull", "engine": "loop"}})
    for _ in range(5):
        compare(jac(x).detach(), jacobian_blocks(model, (x,), 0))
    model.matrix = torch.eye(3, dtype=torch.float64)
    for _ in range(3):
        compare(jac(x).detach(), jacobian_blocks(model, (x,), 0))
    # an entry where the pattern has none
    model.matrix[0, 1] = 5
    for _ in range(3):
        compare(jac(x).detach(), jacobian_blocks(model, (x,), 0))


def test_another_plan_is_taken_at_once(long_ways: list[int]) -> None:
    x = points()
    jac = wrapped(x)
    after: Plan = jac.tune(x, effort="quick", budget_s=0.3)
    long_ways.clear()
    compare(jac(x), jacobian_blocks(func, (x,), 0))
    assert long_ways
    assert jac.plan(x) == after


def test_what_can_not_be_traced_is_tried_and_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations: list[int] = []
    true = CallLayout.fn
    x = points()
    jac = forced(func, (x,), PULL)
    # a side effect, which no program has
    monkeypatch.setattr(CallLayout, "fn", lambda frame, *call: (evaluations.append(1), true(frame, *call))[1])
    for _ in range(4):
        compare(jac(x), jacobian_blocks(func, (x,), 0))
    assert any("not possible" in line for line in jac._plans.planner.function_state.traces)
    evaluations.clear()
    for _ in range(3):
        jac(x)
    # calls 5 to 7, between two checks
    assert len(evaluations) == 3


def test_an_operator_that_refuses_is_left_to_func() -> None:
    def factor(x: Tensor) -> Tensor:
        matrix = x.unsqueeze(-1) * x.unsqueeze(-2) + torch.eye(3, dtype=x.dtype)
        try:
            return torch.linalg.cholesky(matrix).sum(-1)
        except torch.linalg.LinAlgError:
            return x

    x = points()
    jac = forced(factor, (x,), PULL, verify="never")
    for _ in range(3):
        compare(jac(x), jacobian_blocks(factor, (x,), 0))
    bad = torch.full_like(x, torch.nan)
    assert jac(bad).isnan().any() or torch.equal(jac(bad), jacobian_blocks(factor, (bad,), 0))
    compare(jac(x), jacobian_blocks(factor, (x,), 0))


def test_threads_with_modes_of_their_own() -> None:
    x = points(True)
    jac = wrapped(x)
    kinds: set[tuple[bool, bool]] = set()

    def work(grad: bool) -> None:
        with torch.set_grad_enabled(grad):
            for _ in range(50):
                kinds.add((grad, jac(x).requires_grad))

    threads = [threading.Thread(target=work, args=(grad,)) for grad in (True, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kinds == {(True, True), (False, False)}


@pytest.mark.parametrize(
    "missing", ["autojac.planning.fast_path.global_state_guard", "autojac.guards.tensor_metadata.tensor_guards"]
)
def test_without_torchs_guards_every_call_is_made_in_full(missing: str, monkeypatch: Any, long_ways: list[int]) -> None:
    monkeypatch.setattr(missing, None)
    x = points()
    jac = wrapped(x)
    compare(jac(x), jacobian_blocks(func, (x,), 0))
    assert len(long_ways) == 3
    assert jac._plans.fast_path is no_fast_path
