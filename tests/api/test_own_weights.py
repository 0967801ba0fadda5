"""`AutoJacobian.of_parameters` where weights are reached past the module's registered parameters, or shared."""

from __future__ import annotations

import copy
import dataclasses
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_parameters import by_rows, estimated
from torch import Tensor, nn

from autojac import AutoJacobian, InputError, OutputError, PlanStore, StructureChangedWarning, UnsupportedError
from autojac.core.module_function import parameters_replaced
from harness import compare, in_threads, in_use


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Held(nn.Module):
    """Reaches its weight by `reach`, which is made once."""

    def __init__(self, reach: Callable[[nn.Parameter], Callable[[], Tensor]]) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2).double()
        self.reach = reach(self.a.weight)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.reach().T).sin() + self.a.bias


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2).double()
        self.weights = [self.a.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights[0].T + self.a.bias


class Asked(torch.autograd.Function):
    """Asks the module again in its backward, as torchdiffeq's `odeint_adjoint` does."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.module, ctx.parameters = module, parameters
        ctx.save_for_backward(x)
        return module(x).detach()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            pulled = torch.autograd.grad(ctx.module(x), [x, *ctx.parameters], cotangent, allow_unused=True)
        return (None, *pulled)


class Adjoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Asked.apply(self.a, x, *self.a.parameters())
        return out


class Inlined(nn.Module):
    """Uses its registered weight until `past` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2).double()
        self.weights, self.past = [self.a.weight], False

    def forward(self, x: Tensor) -> Tensor:
        return (x @ (self.weights[0] if self.past else self.a.weight).T).sin()


def viewed(weight: nn.Parameter) -> Callable[[], Tensor]:
    view = weight.view(2, 3)
    return lambda: view


PAST = {
    "list": Listed,
    "closure": lambda: Held(lambda weight: lambda: weight),
    "view made once": lambda: Held(viewed),
    "adjoint function": Adjoint,
}
WAYS = {"estimate": {}, "quick": {"on_miss": "tune", "effort": "quick", "budget_s": 0.3}}


@pytest.mark.by_day(4)
@pytest.mark.filterwarnings("ignore:.*the backward of Asked can't be differentiated:autojac.NoGraphWarning")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PAST)
def test_weights_reached_past_the_registered_parameters(name: str, way: str, grad: bool) -> None:
    module = PAST[name]()
    before = [id(p) for p in module.parameters()]
    jac = estimated(module, **WAYS[way])
    for shift in range(3):
        x = torch.randn(4, 3, dtype=torch.float64) + shift
        with torch.set_grad_enabled(grad):
            J = jac(x)
        compare({key: part.detach() for key, part in J.items()}, by_rows(module, x))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
        J = jac(x)
    compare({key: part.detach() for key, part in J.items()}, by_rows(module, x))
    assert [id(p) for p in module.parameters()] == before


def test_a_loss_trains_weights_that_are_reached_past_the_parameters() -> None:
    module, x = PAST["closure"](), torch.randn(4, 3, dtype=torch.float64)
    jac = estimated(module)
    jac(x)["a.weight"].square().sum().backward()
    found, module.a.weight.grad = module.a.weight.grad, None
    y = module(x)
    rows = [torch.autograd.grad(row, module.a.weight, create_graph=True)[0] for row in y.reshape(-1)]
    torch.stack(rows).square().sum().backward()
    compare(found, module.a.weight.grad)
    module.a.weight.grad = None
    y, _ = jac.value_and_jacobian(x)
    y.sum().backward()
    found, module.a.weight.grad = module.a.weight.grad, None
    module(x).sum().backward()
    compare(found, module.a.weight.grad)


def test_the_guard_sees_weights_that_are_reached_otherwise_later() -> None:
    module, x = Inlined(), torch.randn(4, 3, dtype=torch.float64)
    jac = estimated(module, verify="always")
    jac(x), jac(x)
    module.past = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compare(jac(x)["a.weight"].detach(), by_rows(module, x)["a.weight"])
    assert {one.category for one in caught} <= {StructureChangedWarning}
    compare(jac(x)["a.weight"].detach(), by_rows(module, x)["a.weight"])


def shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer).double()


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_registered_twice_keeps_its_parameters(way: str) -> None:
    module, x = shared(), torch.randn(4, 3, dtype=torch.float64)
    before = dict(module.named_parameters())
    jac = estimated(module, **WAYS[way])
    for _ in range(2):
        compare({key: part.detach() for key, part in jac(x).items()}, by_rows(module, x))
    assert all(parameter is before[key] for key, parameter in module.named_parameters())
    copy.deepcopy(module).requires_grad_(False)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_parameters_come_back_when_the_module_raises(error: type[BaseException]) -> None:
    module, x = shared(), torch.randn(4, 3, dtype=torch.float64)
    before = [id(p) for p in module.parameters()]

    def fail(*args: Any) -> None:
        raise error("stop")

    handle = module[1].register_forward_hook(fail)
    with pytest.raises(error, match="stop"):
        estimated(module)(x)
    handle.remove()
    assert [id(p) for p in module.parameters()] == before


def test_two_wrappers_in_two_threads_restore_what_they_swapped() -> None:
    module, x = shared(), torch.randn(4, 3, dtype=torch.float64)
    expected, before = by_rows(module, x), [id(p) for p in module.parameters()]

    def work() -> None:
        jac = estimated(module)
        for _ in range(20):
            compare({key: part.detach() for key, part in jac(x).items()}, expected)

    in_threads(3, work)
    assert [id(p) for p in module.parameters()] == before


def test_a_reentrant_checkpoint_is_refused_by_name() -> None:
    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            return torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=True).sin()

    with pytest.raises((OutputError, UnsupportedError), match="use_reentrant=False"):
        estimated(Reentrant())(torch.randn(4, 3, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_module_is_refused_by_name() -> None:
    scripted = torch.jit.script(nn.Linear(3, 2))
    for module in (scripted, nn.Sequential(nn.Tanh(), scripted)):
        with pytest.raises(InputError, match="scripted or traced"):
            estimated(module)


def with_plan(module: nn.Module, x: Tensor, method: dict[str, Any], **options: Any) -> AutoJacobian:
    """A wrapper that finds a plan with this method in its store."""
    store = PlanStore(":memory:")
    maker = AutoJacobian.of_parameters(module, on_miss="estimate", store=store)
    plan = maker.plan(x)
    entry = in_use(maker)
    assert entry.keys is not None
    store.save(*entry.keys, dataclasses.replace(plan, method=method), "module")
    return AutoJacobian.of_parameters(module, on_miss="estimate", store=store, **options)


@pytest.mark.filterwarnings("ignore::autojac.ModesDisagreeWarning")
@pytest.mark.parametrize(
    "method",
    [
        {"method": "Pull", "seeds": "identity", "engine": "vmap"},
        {"method": "PerSample", "mode": "reverse"},
        {"method": "Replay", "inner": {"method": "Pull", "seeds": "identity", "engine": "vmap"}},
    ],
)
def test_a_stored_plan_that_misses_them_is_replaced(method: dict[str, Any]) -> None:
    module, x = Listed(), doubles(5, 3)
    expected = by_rows(module, x)
    with torch.no_grad():
        jac = with_plan(module, x, method)
        with pytest.warns(StructureChangedWarning, match="does not hold"):
            compare(jac(x), expected)
        compare(jac(x), expected)


def test_a_parameter_that_the_module_registers_itself_stays() -> None:
    module = nn.Linear(3, 2).double()
    other, replaced = nn.Parameter(doubles(2, 3)), nn.Parameter(doubles(2, 3))
    own = module.weight
    with parameters_replaced(module, {"weight": replaced}):
        assert module.weight is replaced
        module.weight = other
    assert module.weight is other
    module.weight = own
    with parameters_replaced(module, {"weight": replaced}):
        with parameters_replaced(module, {"weight": other}):
            assert module.weight is other
        assert module.weight is replaced
    assert module.weight is own


def test_wrappers_of_modules_that_share_a_layer_run_in_several_threads() -> None:
    layer = nn.Linear(3, 3).double()
    modules = [nn.Sequential(layer, nn.Tanh()), nn.Sequential(nn.Tanh(), layer), layer, layer]
    x = doubles(4, 3)
    expected = [by_rows(module, x) for module in modules]
    own = (layer.weight, layer.bias)
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            jac = AutoJacobian.of_parameters(modules[number], on_miss="estimate", store=":memory:")
            for _ in range(40):
                J = jac(x)
                if any(not torch.allclose(J[name], expected[number][name]) for name in J):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert layer.weight is own[0] and layer.bias is own[1]
