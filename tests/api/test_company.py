"""At home among torch's users: copies, pickles, threads, modules, data loaders, training steps, torch.func outside."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

from autojac import AutoJacobian, PlanStore, UnsupportedError
from harness import compare, in_threads
from oracle import jacobian_blocks


def estimated(func: Any, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


def of_parameters(module: nn.Module) -> AutoJacobian:
    return AutoJacobian.of_parameters(module, on_miss="estimate", store=":memory:")


def detached(values: Any) -> Any:
    return pytree.tree_map(torch.detach, values)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, dtype=torch.float64)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda jac: pickle.loads(pickle.dumps(jac))])
@pytest.mark.parametrize(
    "make", [estimated, lambda net: AutoJacobian.of_parameters(net, store=":memory:", on_miss="estimate")]
)
def test_copies_and_pickles_compute_the_same(duplicate: Any, make: Any, x: Tensor) -> None:
    jac = make(network())
    expected = jac(x)
    again = duplicate(jac)
    assert type(again) is type(jac) and again.options == jac.options
    compare(detached(again(x)), detached(expected))


def test_a_deep_copy_has_weights_of_its_own(x: Tensor) -> None:
    net = network()
    jac = estimated(net)
    jac(x)
    averaged = copy.deepcopy(jac)
    with torch.no_grad():
        net[0].weight.mul_(2)
    compare(jac(x).detach(), jacobian_blocks(net, (x,)))
    compare(averaged(x).detach(), jacobian_blocks(averaged.func, (x,)))
    assert not torch.allclose(jac(x), averaged(x))


def test_a_pickled_wrapper_finds_its_plans_again(x: Tensor, tmp_path: Any) -> None:
    jac = AutoJacobian(network(), store=PlanStore(tmp_path / "plans.db", timeout_s=7.0), effort="estimate")
    plan = jac.plan(x)
    again = pickle.loads(pickle.dumps(jac))
    assert again.plan(x).source == "store" and again.plan(x).method == plan.method
    assert again.options.store._timeout_s == 7.0
    store = PlanStore(":memory:")
    assert copy.deepcopy(store) is store


class Penalised(nn.Module):
    """A module that computes Jacobians of its own part as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.jac = estimated(self.body)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, J = self.jac.value_and_jacobian(x)
        return y, J.square().sum((1, 2))


def test_inside_a_module_and_its_deep_copy(x: Tensor) -> None:
    model = Penalised()
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        y, penalty = one(x)
        (y.sum() + penalty.sum()).backward()
        loss = one.body(x).sum() + jacobian_blocks_with_graph(one.body, x).square().sum()
        compare([p.grad for p in one.body.parameters()], torch.autograd.grad(loss, list(one.body.parameters())))


def jacobian_blocks_with_graph(func: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = func(x)
    rows = [torch.autograd.grad(y[:, k].sum(), x, create_graph=True)[0] for k in range(y.shape[1])]
    return torch.stack(rows, 1)


def test_a_training_loop_over_a_data_loader(x: Tensor) -> None:
    net = network()
    jac, optimizer = estimated(net), torch.optim.Adam(net.parameters())
    data = TensorDataset(torch.randn(22, 3, dtype=torch.float64))
    for _ in range(2):
        for (part,) in DataLoader(data, batch_size=6):  # the last batch has 4
            optimizer.zero_grad()
            J = jac(part)
            compare(J.detach(), jacobian_blocks(net, (part,)))
            J.square().mean().backward()
            optimizer.step()


def test_two_threads_share_one_wrapper(x: Tensor) -> None:
    net = network()
    jac = estimated(net)
    expected = {rows: jacobian_blocks(net, (x[:rows],)) for rows in (2, 3, 6)}

    def work() -> None:
        for _ in range(10):
            for rows, right in expected.items():
                compare(jac(x[:rows]).detach(), right)

    in_threads(4, work)


def test_under_an_outer_vmap_and_grad(x: Tensor) -> None:
    net = network()
    jac = estimated(net)
    with pytest.raises(UnsupportedError, match="once outside of it"):
        torch.func.vmap(jac)(x[None])
    jac(x)
    stacked = torch.stack([x, 2 * x])
    compare(torch.func.vmap(jac)(stacked).detach(), torch.stack([jac(one).detach() for one in stacked]))
    gradient = torch.func.grad(lambda z: jac(z).square().sum())(x)
    z = x.clone().requires_grad_()
    compare(gradient.detach(), torch.autograd.grad(jacobian_blocks_with_graph(net, z).square().sum(), z)[0])


def test_in_inference_mode_and_without_grad(x: Tensor) -> None:
    net = network()
    jac, expected = estimated(net), jacobian_blocks(net, (x,))
    with torch.inference_mode():
        compare(jac(x.clone()).clone(), expected)
    with torch.no_grad():
        assert not jac(x).requires_grad
    assert jac(x).requires_grad


def test_tensors_made_in_inference_mode_are_taken_outside_of_it(x: Tensor) -> None:
    with torch.inference_mode():
        made, scale = x.clone(), torch.tensor(2.0).double()
    jac = estimated(lambda x, *, scale: (x * scale).sin())
    compare(jac(made, scale=scale), torch.diag_embed(2 * (2 * x).cos()))


def test_another_threads_draws_are_not_blamed_on_the_function(x: Tensor) -> None:
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.randn(3)
            stop.wait(2e-3)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for rows in range(1, 7):
            compare(estimated(torch.sin)(x[:rows]), torch.diag_embed(x[:rows].cos()))
    finally:
        stop.set()
        thread.join()
