"""`of=` names a method whose plan is meant: what is tuned is what the method then computes by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoHessian, AutoJacobian, Derivatives, InputError, OptionError, PlanMissError, PlanStore
from autojac.api.method_plans import PlannedMethod
from harness import Counted

WEIGHT = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
VECTORS = ("jvp", "vjp", "solve", "ggn_product", "gradient_norms")


def plain(x: Tensor) -> Tensor:
    return (x @ WEIGHT).sin()


def next_ones(x: Tensor) -> Tensor:
    return plain(x) * x.roll(1, 0)


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def consumed(found: Any) -> Any:
    return list(found) if isinstance(found, Iterator) else found


def used(jac: Any, method: str, args: tuple[Any, ...], **own: Any) -> Any:
    with torch.no_grad():
        return consumed(jac(*args) if method == "jacobian" else getattr(jac, method)(*args, **own))


def args_of(method: str, x: Tensor) -> tuple[Tensor, ...]:
    return (x, doubles(*x.shape)) if method in VECTORS else (x,)


def tuned_serves(method: str, func: Callable[[Tensor], Tensor], x: Tensor, own: Any, **options: Any) -> None:
    """Where no plan may be made, a method fails before, and works after it has been tuned."""
    args, store = args_of(method, x), PlanStore(":memory:")
    if method == "inverse":
        func = lambda x: plain(x) + 3 * x  # noqa: E731

    def strict() -> AutoJacobian:
        return AutoJacobian(func, store=store, on_miss="error", **options)

    with pytest.raises(PlanMissError):
        used(strict(), method, args, **own)
    jac = strict()
    with torch.no_grad():
        plan = jac.tune(*args, of=method, effort="estimate", **own)  # type: ignore[arg-type]
        assert jac.plan(*args, of=method, **own).method == plan.method  # type: ignore[arg-type]
        assert str(plan) in jac.explain(*args, of=method, **own)  # type: ignore[arg-type]
    for other in (jac, strict()):
        used(other, method, args, **own)


OWN: dict[str, dict[str, Any]] = {"solve": {"damping": 0.5}, "gram": {"outer": True}, "chunks": {"bytes": 300}}


@pytest.mark.parametrize("method", get_args(PlannedMethod))
@pytest.mark.parametrize("func", [plain, pytest.param(next_ones, marks=pytest.mark.by_day(3))])
def test_what_is_tuned_serves_the_method(method: str, func: Callable[[Tensor], Tensor]) -> None:
    if (method, func) != ("factors", next_ones):  # there are none
        tuned_serves(method, func, doubles(4, 3), OWN.get(method, {}))


@pytest.mark.parametrize("method", ["gram", "norm", "solve", "ggn_product", "gradient_norms", "jvp"])
def test_so_it_does_where_the_jacobian_does_not_fit(method: str) -> None:
    # 16 (8, 8) blocks take 8 KiB; gradients 1 KiB
    wide = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    limit = "1500B" if method == "gradient_norms" else "9KiB"
    own = (
        {"loss": lambda y: y.exp().sum()} if method == "ggn_product" else {"damping": 1.0} if method == "solve" else {}
    )
    tuned_serves(method, lambda x: (x @ wide).sin(), doubles(16, 8), own, memory_limit=limit)


@pytest.mark.by_day(3)
@pytest.mark.parametrize("layout", ["full", "sparse", "diagonal"])
@pytest.mark.parametrize("method", ["jvp", "vjp", "norm", "solve", "inverse", "chunks"])
def test_so_it_does_in_every_layout(method: str, layout: Any) -> None:
    if (method, layout) != ("chunks", "sparse"):
        own = {"bytes": 500} if method == "chunks" else {}
        tuned_serves(method, plain, doubles(4, 3), own, layout=layout)


@pytest.mark.by_day(3)
@pytest.mark.parametrize("method", get_args(PlannedMethod))
def test_so_it_does_over_several_batch_axes(method: str) -> None:
    own: dict[str, Any] = {"ggn_product": {"loss": lambda y: y.exp().sum() * (y.dim() == 3)}}.get(method, {})
    tuned_serves(method, plain, doubles(2, 2, 3), own or OWN.get(method, {}), batch_dims=2)


def test_parameters_and_several_vectors() -> None:
    net = nn.Linear(2, 2).double()
    jac = AutoJacobian.of_parameters(net, store=":memory:", on_miss="estimate")
    x, u = doubles(3, 2), doubles(3, 2)
    v = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    assert jac.plan(x, u, of="vjp").method
    assert jac.plan(x, v, of="jvp").method
    assert "(3, 5, 2)" in jac.explain(x, torch.stack([u] * 5), of="vjp")


def test_hessians_name_what_they_make_and_products_with_them() -> None:
    def cubic(x: Tensor) -> Tensor:
        return x[..., 0] ** 3 * x[..., 1]

    for dims, x in [(1, doubles(4, 2)), (2, doubles(2, 2, 2))]:
        store = PlanStore(":memory:")
        strict = AutoHessian(cubic, store=store, on_miss="error", batch_dims=dims)
        with pytest.raises(PlanMissError):
            strict.hvp(x, x)
        plan = strict.tune(x, x, of="hvp", effort="estimate")
        assert strict.plan(x, x, of="hvp").method == plan.method
        assert "hint" not in strict.explain(x, x, of="hvp")
        strict.hvp(x, x)
        with pytest.raises(PlanMissError):
            strict(x)


def test_a_search_is_of_the_product_alone() -> None:
    func = Counted(plain)
    jac = AutoJacobian(func, store=":memory:", on_miss="error")
    x, v = doubles(4, 3), doubles(4, 3)
    with torch.no_grad():
        assert jac.tune(x, v, of="jvp", effort="quick", budget_s=0.2).trials
        with pytest.raises(PlanMissError):
            jac(x)


def test_two_plans_are_explained_where_there_are_two() -> None:
    jac = AutoJacobian(plain, store=":memory:", on_miss="estimate")
    x, v = doubles(4, 3), doubles(4, 3)
    assert jac.explain(x, v, of="ggn_product").count("plan: ") == 2
    assert jac.explain(x, v, of="jvp").count("plan: ") == 1


def test_derivatives_keep_the_one_plan_that_they_have() -> None:
    derivatives = Derivatives(lambda x: x.prod(1), ((0,), (1, 1)), store=":memory:", on_miss="estimate")
    assert "derivatives by columns" in derivatives.explain(doubles(4, 2))


def test_bad_names_and_vectors_are_told() -> None:
    jac, x = AutoJacobian(plain, store=":memory:", on_miss="estimate"), doubles(4, 3)
    with pytest.raises(OptionError, match=r"of must be one of .*'jvp'.*got 'jpv'"):
        jac.plan(x, of="jpv")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="a vector, got 1 argument"):
        jac.tune(x, of="jvp")
    with pytest.raises(InputError, match=r"u was expected in the shape \(4, 3\)"):
        jac.explain(x, doubles(2, 4, 3), of="gradient_norms")
    with pytest.raises(InputError, match=r"u was expected in the shape \(4, 3\)"):
        jac.gradient_norms(x, doubles(2, 4, 3))
