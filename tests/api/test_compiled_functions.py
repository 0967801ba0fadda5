"""What torch.compile has compiled is differentiated as what it was compiled from, and stays as it was."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch._dynamo.utils import counters

import autojac
from autojac import AutoJacobian
from autojac.guards.compiled_functions import _eager, original
from harness import compare, forced
from oracle import jacobian_blocks

pytestmark = [
    # Dynamo looks at the .grad of its inputs, against which torch warns
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
LOOP = {"method": "Pull", "seeds": "identity", "engine": "loop"}
FORWARD = {"method": "Push", "seeds": "shared", "engine": "loop"}


def compiled(func: Any) -> Any:
    return torch.compile(func, backend="aot_eager")


def in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="aot_eager")
    return net


class Around(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).exp()


def closed(inner: Any) -> Any:
    return lambda x: inner(x).exp()


# from a network: what is differentiated, what its owner goes on calling
KINDS: dict[str, Callable[[nn.Module], tuple[Any, Any]]] = {
    "a module": lambda net: (compiled(net),) * 2,
    "a function": lambda net: (compiled(lambda x: net(x) + 0),) * 2,
    "compiled twice": lambda net: (compiled(compiled(net)),) * 2,
    "in place": lambda net: (in_place(net),) * 2,
    "in a closure": lambda net: (closed(compiled(net)), net),
    "in a module": lambda net: (Around(compiled(net)),) * 2,
    "in place in a closure": lambda net: (closed(in_place(net)), net),
}


def trained(func: Any) -> None:
    """A step of its owner's."""
    func(torch.ones(5, 3, dtype=torch.float64)).pow(2).mean().backward()


@pytest.mark.by_day(2)
@pytest.mark.parametrize("kind", KINDS)
def test_the_original_is_differentiated_and_its_owner_goes_on(kind: str) -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    plain = copy.deepcopy(net)
    func, owned = KINDS[kind](net)
    expected = plain if func is owned and not isinstance(func, Around) else Around(plain)
    trained(owned)
    before = counters["frames"]["total"]
    x = torch.randn(5, 3, dtype=torch.float64)
    right = jacobian_blocks(expected, (x,), 0)
    jac = AutoJacobian(func, on_miss="estimate", store=":memory:")
    for _ in range(3):
        compare(jac(x), right)
        trained(owned)
    z = x.clone().requires_grad_()
    jac(z).pow(2).sum().backward()  # type: ignore[union-attr]
    w = x.clone().requires_grad_()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: expected(row[None])[0]))(w)
    jacobian.pow(2).sum().backward()
    compare(z.grad, w.grad)
    for method in (LOOP, FORWARD, {"method": "PerSample", "mode": "reverse"}, {"method": "Replay", "inner": LOOP}):
        twin = forced(func, (x,), method)
        compare(twin(x), right)
        compare(twin(x), right)
    value, _ = jac.value_and_jacobian(x)
    compare(value, expected(x))
    trained(owned)
    assert counters["frames"]["total"] == before, "something was compiled again"
    torch._dynamo.reset()


def test_a_search_over_a_compiled_module() -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    func = compiled(net)
    trained(func)
    x = torch.randn(5, 3, dtype=torch.float64)
    compare(AutoJacobian(func, on_miss="tune", budget_s=0.5, store=":memory:")(x), jacobian_blocks(net, (x,), 0))
    trained(func)
    jacobians = AutoJacobian.of_parameters(func, on_miss="estimate", store=":memory:")(x)
    assert set(jacobians) == {name for name, _ in func.named_parameters()}
    compare(jacobians["_orig_mod.2.bias"], torch.eye(2, dtype=torch.float64).expand(5, 2, 2))
    autojac.verify(jacobian_blocks(net, (x,), 0), func, x)
    assert autojac.probe(func, x).coupling == "independent"
    trained(func)
    torch._dynamo.reset()


def test_hooks_on_the_compiled_module_count() -> None:
    func = compiled(nn.Linear(3, 2).double())
    func.register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(5, 3, dtype=torch.float64)
    compare(AutoJacobian(func, on_miss="estimate", store=":memory:")(x), 2 * func._orig_mod.weight.expand(5, 2, 3))
    torch._dynamo.reset()


def test_originals() -> None:
    net = nn.Linear(3, 2)
    assert original(compiled(net)) is net
    assert original(net) is net
    assert original(torch.sin) is torch.sin
    func = trained
    assert original(compiled(func)) is func
    assert pickle.loads(pickle.dumps(AutoJacobian(compiled(trained)))).func is trained


def test_threads_that_run_eagerly_leave_the_compiler_as_it_was() -> None:
    entered, leaves = threading.Event(), threading.Event()

    def other() -> None:
        with _eager():
            entered.set()
            leaves.wait(5)

    thread = threading.Thread(target=other)
    before = eval_frame._stance
    with _eager():
        thread.start()
        entered.wait(5)
    assert eval_frame._stance.stance == "force_eager"
    leaves.set()
    thread.join()
    assert eval_frame._stance is before
