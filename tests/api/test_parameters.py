"""`AutoJacobian.of_parameters`: each sample's Jacobian in a module's parameters."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian, InputError, OptionError, PlanStore
from harness import compare, in_threads, in_use


def by_rows(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """One plain VJP per row of one output."""
    y = module(*args, **kwargs)
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = {}
    for name, parameter in named.items():
        rows = [
            torch.autograd.grad(row, parameter, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            for row in y.reshape(-1)
        ]
        found[name] = torch.stack(rows).reshape(*y.shape, *parameter.shape)
    return found


def estimated(module: nn.Module, **options: Any) -> Any:
    return AutoJacobian.of_parameters(module, **{"on_miss": "estimate", "store": ":memory:", **options})


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.down(x).tanh()
        return self.up(h if mask is None else h * mask)


def network(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).double()


MODULES = {
    "mlp": lambda: network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "tied": lambda: Tied().double(),
    "layer norm": lambda: network(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU()),
    "batch norm in training": lambda: network(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
    "batch norm in eval": lambda: network(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).eval(),
    "square, batch as long": lambda: network(nn.Linear(3, 5, bias=False), nn.Linear(5, 5), nn.Tanh()),
}


@pytest.mark.by_day(3)
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("grad", [True, False])
def test_equals_one_vjp_a_row(name: str, grad: bool) -> None:
    module, x = MODULES[name](), torch.randn(5, 3, dtype=torch.float64)
    expected = by_rows(module, x)
    with torch.set_grad_enabled(grad):
        J = estimated(module)(x)
    assert list(J) == [name for name, _ in module.named_parameters()]
    assert any(part.requires_grad for part in J.values()) == grad
    compare({name: part.detach() for name, part in J.items()}, expected)


def test_frozen_parameters_are_left_out() -> None:
    module, x = MODULES["mlp"](), torch.randn(5, 3, dtype=torch.float64)
    jac = estimated(module)
    jac(x)
    module[0].weight.requires_grad_(False)
    J = jac(x)
    assert list(J) == ["0.bias", "2.weight", "2.bias"]
    compare({name: part.detach() for name, part in J.items()}, by_rows(module, x))
    with pytest.raises(InputError, match="parameters that require grad were expected"):
        jac.func.module.requires_grad_(False)
        jac(x)


def test_reverse_forward_and_vmap_compete() -> None:
    module, x = network(nn.Linear(2, 2)), torch.randn(5, 2, dtype=torch.float64)
    with torch.no_grad():
        plan = estimated(module, effort="measure", on_miss="tune", budget_s=3).plan(x)
    # as they are, or as flat programs
    tried = [t.method["inner"] if t.method["method"] == "Replay" else t.method for t in plan.trials]
    kinds = {(method["method"], method.get("mode"), method.get("engine")) for method in tried}
    assert {("Pull", None, "vmap"), ("Push", None, "loop"), ("PerSample", "reverse", None)} <= kinds


def test_statistics_move_once_a_call() -> None:
    module, x = MODULES["batch norm in training"](), torch.randn(5, 3, dtype=torch.float64)
    jac = estimated(module)
    for calls in (1, 2):
        jac(x)
        assert module[1].num_batches_tracked == calls


def test_side_arguments_keywords_and_values() -> None:
    module, x = MODULES["tied"](), torch.randn(4, 3, dtype=torch.float64)
    mask = torch.rand(4, 3, dtype=torch.float64)
    jac = estimated(module)
    compare({k: v.detach() for k, v in jac(x, mask).items()}, by_rows(module, x, mask))
    compare({k: v.detach() for k, v in jac(x, mask=mask[0]).items()}, by_rows(module, x, mask=mask[0]))
    y, _ = jac.value_and_jacobian(x, mask)
    compare(y.detach(), module(x, mask).detach())
    axes = estimated(lambda_module := network(nn.Linear(3, 2)), in_dims=(0,))
    compare({k: v.detach() for k, v in axes(x).items()}, by_rows(lambda_module, x))


def test_a_kernel_trains_the_parameters() -> None:
    module, x = MODULES["mlp"](), torch.randn(4, 3, dtype=torch.float64)
    features = torch.cat([part.reshape(4, 2, -1) for part in estimated(module)(x).values()], -1)
    kernel = torch.einsum("bip,cjp->bicj", features, features)
    kernel.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in module.named_parameters() if n != "2.bias")


def test_two_threads_may_call_one_wrapper() -> None:
    module, x = MODULES["mlp"](), torch.randn(4, 3, dtype=torch.float64)
    expected, jac = by_rows(module, x), estimated(module)

    def work() -> None:
        for _ in range(20):
            compare({name: part.detach() for name, part in jac(x).items()}, expected)

    in_threads(4, work)


def test_no_thread_looks_at_parameters_that_another_has_put_aside() -> None:
    module, x = MODULES["mlp"](), torch.randn(4, 3, dtype=torch.float64)
    jac = estimated(module)
    jac(x)
    for look in (jac.func.parameters, lambda: jac(x), lambda: jac.plan(x), lambda: jac._plans.captured):
        thread = threading.Thread(target=look)
        with jac.func.lock:  # as during a call
            thread.start()
            thread.join(0.05)
            assert thread.is_alive()
        thread.join(10)
        assert not thread.is_alive()


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(InputError, match=r"torch.nn.Module was expected"):
        AutoJacobian.of_parameters(torch.sin)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="differentiates in all parameters"):
        AutoJacobian.of_parameters(nn.Linear(2, 2), argnums=1)
    with pytest.raises(OptionError, match="did you mean 'layout'"):
        AutoJacobian.of_parameters(nn.Linear(2, 2), layuot="full")


def test_a_template_without_values_is_left_out() -> None:
    class Templated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.template = nn.Linear(3, 2).double(), nn.Linear(3, 2, device="meta")

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).sin()

    module, x = Templated(), torch.randn(4, 3, dtype=torch.float64)
    J = estimated(module)(x)
    assert list(J) == ["net.weight", "net.bias"]
    slope = module.net(x).detach().cos()
    compare(J["net.bias"].detach(), slope.diag_embed())


def test_later_calls_take_the_fast_path_and_follow_what_the_module_holds() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    method = {"method": "Replay", "inner": {"method": "Pull", "seeds": "identity", "engine": "loop"}, "without": None}
    store = PlanStore(":memory:")
    with torch.no_grad():
        maker = AutoJacobian.of_parameters(net, on_miss="estimate", store=store)
        plan, keys = maker.plan(x), in_use(maker).keys
        assert keys is not None
        maker._plans.planner.repository.save(keys, dataclasses.replace(plan, method=method))
        jac = AutoJacobian.of_parameters(net, on_miss="estimate", store=store)

        def right() -> Any:
            return AutoJacobian.of_parameters(net, on_miss="estimate", store=":memory:")(x)

        for _ in range(10):
            compare(jac(x), right())
        assert jac._plans.fast_path((x,)) is not None
        net[0].weight.mul_(2)
        compare(jac(x), right())
        assert jac._plans.fast_path((x,)) is not None
        net[0].bias = nn.Parameter(torch.ones(4).double())
        assert jac._plans.fast_path((x,)) is None
        compare(jac(x), right())
        net[2].bias.requires_grad_(False)
        assert "2.bias" not in jac(x)
        compare(jac(x), right())


def test_an_argument_computed_from_the_parameters_is_refused() -> None:
    net, other, z = (
        network(nn.Linear(3, 3), nn.Tanh()),
        nn.Linear(3, 3).double(),
        torch.randn(4, 3, dtype=torch.float64),
    )
    jac = estimated(net)
    with pytest.raises(InputError, match="computed from them"):
        jac(net[0](z))
    compare(jac(other(z)), by_rows(net, other(z).detach()))
    expected = by_rows(net, net[0](z).detach())
    with torch.no_grad():
        compare(jac(net[0](z)), expected)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, dtype=torch.float64))

    def forward(self, x: Tensor, scale: Tensor, *, shift: Any = 0.0) -> Tensor:
        return (x * self.weight * scale + shift).sum(1, keepdim=True)


@pytest.mark.parametrize("graph", ["computed", "itself"])
@pytest.mark.parametrize("keyword", [False, True])
def test_arguments_that_lead_to_the_parameters_are_refused_by_position_and_by_name(graph: str, keyword: bool) -> None:
    module, x = Scaled(), torch.randn(4, 3, dtype=torch.float64)
    bad = module.weight.exp() if graph == "computed" else module.weight
    args, kwargs = ((x, x), {"shift": [bad, None]}) if keyword else ((x, bad), {})
    module.forward = lambda x, scale, shift=None: x * module.weight * scale  # type: ignore[method-assign]
    jac = estimated(module)
    calls = [jac, jac.value_and_jacobian, jac.plan, jac.tune, jac.explain, jac.norm, jac.gram]
    for call in [*calls, lambda *args, **kwargs: jac.vjp(*args, x, **kwargs)]:
        with pytest.raises(InputError, match="computed from them"):
            call(*args, **kwargs)
    detached = {"shift": [bad.detach(), None]} if keyword else {}
    compare(jac(x, x if keyword else bad.detach(), **detached)["weight"].detach(), torch.diag_embed(
        x * x if keyword else x * bad.detach()))  # fmt: skip


@pytest.mark.parametrize("layout", ["blocks", "full", "sparse"])
def test_without_a_batch_parameters_of_any_shape_have_their_derivatives(layout: str) -> None:
    net, x = network(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 2), nn.Linear(2, 1)), torch.randn(3, dtype=torch.float64)
    jac, right = estimated(net, in_dims=None, layout=layout), by_rows(net, x)
    for _ in range(2):
        J = jac(x)
        dense = {name: part.to_dense().reshape(right[name].shape) for name, part in J.items()}
        compare(dense, right)
    if layout == "blocks":
        for p, gradient in zip(net.parameters(), torch.autograd.grad(
            sum(part.square().sum() for part in J.values() if part.requires_grad), list(net.parameters()),
            allow_unused=True), strict=True):  # fmt: skip
            rows = torch.func.jacrev(lambda named: torch.func.functional_call(net, named, x))(
                dict(net.named_parameters())
            )
            (expected,) = torch.autograd.grad(
                sum(row.square().sum() for row in rows.values()), p, allow_unused=True, materialize_grads=True
            )
            compare(torch.zeros_like(p) if gradient is None else gradient, expected)
