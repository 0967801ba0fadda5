"""Jacobians of Jacobians, and torch's transforms around and inside: as torch.func's own nest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import autojac
from autojac import AutoJacobian
from harness import compare


def unbatched(func: Callable[..., Any], *example: Any, **options: Any) -> AutoJacobian:
    """A wrapper, used once if there is an example: inside a transform nothing can be probed."""
    jac = AutoJacobian(func, **{"in_dims": None, "on_miss": "estimate", "store": ":memory:", **options})
    if example:
        jac(*example)
    return jac


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def scalar(x: Tensor) -> Tensor:
    return (x.sin().prod() + x.sum()) * x[0]


def nested(d: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"a": d["x"].sin() * d["y"], "b": d["x"].sum() ** 2}


def hollow(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:0], x.sin() * x.sum()


HESSIANS = {
    "ours of ours": lambda f, x: unbatched(unbatched(f)),
    "ours of ours, tuned": lambda f, x: unbatched(unbatched(f, on_miss="tune"), on_miss="tune"),
    "ours of jacrev": lambda f, x: unbatched(jacrev(f)),
    "ours of jacfwd": lambda f, x: unbatched(jacfwd(f)),
    "jacrev of ours": lambda f, x: jacrev(unbatched(f, x)),
    "jacfwd of ours": lambda f, x: jacfwd(unbatched(f, x)),
}


@pytest.mark.by_day(6)
@pytest.mark.parametrize("make", HESSIANS.values(), ids=HESSIANS)
@pytest.mark.parametrize("func", [scalar, torch.sin, nested, hollow], ids=["scalar", "sin", "nested", "hollow"])
def test_hessians(func: Callable[..., Any], make: Callable[[Any, Any], Callable[[Any], Any]]) -> None:
    x: Any = {"x": doubles(3), "y": doubles()} if func is nested else doubles(3)
    theirs = jacrev(jacrev(func))(x)
    ours = make(func, x)(x)
    assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
    compare(ours, theirs)


def test_third_derivatives() -> None:
    x = doubles(3)
    expected = jacrev(jacrev(jacrev(scalar)))(x)
    compare(unbatched(unbatched(unbatched(scalar)))(x), expected)
    compare(jacrev(unbatched(unbatched(scalar), x))(x), expected)


def test_hessian_of_several_arguments() -> None:
    def func(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return ((x.tanh() * x) @ y.sin() @ z).sum()

    args = (doubles(2, 3), doubles(3, 2), doubles(2, 2))
    ours = unbatched(unbatched(func, argnums=(0, 1, 2)), argnums=(0, 1, 2))(*args)
    theirs = hessian(func, argnums=(0, 1, 2))(*args)
    assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
    compare(ours, theirs)


def test_hessian_where_nothing_depends() -> None:
    compare(unbatched(unbatched(lambda x: x.new_ones(())))(doubles(2)), torch.zeros(2, 2, dtype=torch.float64))


def test_hessians_of_a_batch() -> None:
    X = doubles(5, 3)
    per_sample = AutoJacobian(
        AutoJacobian(vmap(scalar), on_miss="estimate", store=":memory:"),
        on_miss="estimate",
        store=":memory:",
    )
    compare(per_sample(X), vmap(hessian(scalar))(X))


@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap_over_a_jacobian(in_dim: int) -> None:
    X = doubles(5, 3)
    compare(
        vmap(unbatched(torch.sin, X[0]), in_dims=in_dim)(X.movedim(0, in_dim).contiguous()), vmap(jacrev(torch.sin))(X)
    )


def test_vmap_over_some_arguments() -> None:
    X, y = doubles(5, 3), doubles(3)
    ours = vmap(unbatched(torch.mul, X[0], y, argnums=(0, 1)), in_dims=(0, None))(X, y)
    compare(ours, vmap(jacrev(torch.mul, (0, 1)), in_dims=(0, None))(X, y))


def test_vmap_over_a_hessian() -> None:
    X = doubles(5, 3)
    compare(vmap(unbatched(unbatched(scalar), X[0]))(X), vmap(hessian(scalar))(X))


def test_vmap_over_a_batched_jacobian() -> None:
    X = doubles(2, 5, 3)
    jac = unbatched(torch.sin, X[0], in_dims=0)
    compare(vmap(jac)(X), vmap(vmap(jacrev(torch.sin)))(X))


def test_inside_grad_vjp_and_jvp() -> None:
    x, v, u = doubles(3), doubles(3), doubles(3, 3)
    jac, theirs = unbatched(torch.sin, x), jacrev(torch.sin)
    compare(grad(lambda x: (jac(x) ** 2).sum())(x), grad(lambda x: (theirs(x) ** 2).sum())(x))
    compare(jvp(jac, (x,), (v,)), jvp(theirs, (x,), (v,)))
    compare(vjp(jac, x)[1](u), vjp(theirs, x)[1](u))


def test_backward_through_a_jacobian() -> None:
    x = doubles(3).requires_grad_()
    (ours,) = torch.autograd.grad((unbatched(scalar)(x) ** 2).sum(), x)
    compare(ours, grad(lambda x: (jacrev(scalar)(x) ** 2).sum())(x.detach()))


def test_unstacked_rows_carry_the_graph() -> None:
    x = doubles(3).requires_grad_()
    rows = unbatched(lambda x: x**3)(x).unbind()
    for index, row in enumerate(rows):
        expected = torch.zeros(3, dtype=torch.float64)
        expected[index] = 6 * x[index].item()
        compare(torch.autograd.grad(row.sum(), x, retain_graph=True)[0], expected)


def test_torch_transforms_inside_the_function() -> None:
    def func(x: Tensor) -> Tensor:
        return vmap(grad(lambda row: row.sin().sum() ** 2))(x.view(2, 3)) @ x.view(2, 3).T

    x = doubles(6)
    compare(unbatched(func)(x), jacrev(func)(x))


def test_a_first_call_inside_a_transform_says_what_to_do() -> None:
    with pytest.raises(autojac.UnsupportedError, match="once outside"):
        jacrev(unbatched(torch.sin))(doubles(3))


def test_a_first_call_inside_a_compilation_plans_as_outside_of_it() -> None:
    x = doubles(3)
    compare(torch.compile(unbatched(torch.sin), backend="eager")(x), x.cos().diag())
    torch._dynamo.reset()
