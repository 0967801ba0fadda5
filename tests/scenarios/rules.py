"""Custom autograd functions of every style, and torch's own transforms inside a function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scenarios.base import Draw, Scenario, traits

ROWS = 5


class Setup(torch.autograd.Function):
    """sin, with setup_context and nothing else."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class Forward(Setup):
    """With a rule for forward mode."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent * x.cos()


class Generated(Forward):
    """With a rule for forward mode, and one for vmap that torch generates."""

    generate_vmap_rule = True


class Written(Setup):
    """With a rule for vmap by hand."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return Setup.apply(x), in_dims[0]


class Once(torch.autograd.Function):
    """Old style, the product of two inputs and a number, its backward not to be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x, z)
        ctx.factor = factor
        return factor * x * z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, z = ctx.saved_tensors
        return ctx.factor * grad * z, ctx.factor * grad * x if ctx.needs_input_grad[1] else None, None


class Sign(torch.autograd.Function):
    """Straight-through: a step forward, the identity backward, but nothing beyond ±1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


class FixedPoint(torch.autograd.Function):
    """z = tanh(W z + x) by iteration, its derivative by the implicit function theorem."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(60):
            z = (z @ w.T + x).tanh()
        ctx.save_for_backward(z, w)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        z, w = ctx.saved_tensors
        slope = 1 - z**2
        system = torch.eye(len(w), dtype=w.dtype) - slope[:, :, None] * w
        return torch.linalg.solve(system.mT, grad) * slope, None


def fixed_point(draw: Draw) -> Any:
    w = 0.2 * draw.normal(3, 3)

    def func(x: Tensor) -> Tensor:
        return FixedPoint.apply(x, w)

    func.w = w  # type: ignore[attr-defined]
    return func, (draw.normal(ROWS, 3),)


def fixed_point_jacobian(func: Any, x: Tensor) -> Tensor:
    slope = 1 - func(x) ** 2
    return torch.linalg.solve(torch.eye(3, dtype=x.dtype) - slope[:, :, None] * func.w, slope.diag_embed())


def slope_of(x: Tensor, v: Tensor) -> Tensor:
    return torch.func.jvp(lambda z: z.sin() * z[:, :1], (x,), (v,))[1]


def laplacian(x: Tensor) -> Tensor:
    """Traces of Hessians, a sample at a time."""
    return torch.vmap(lambda row: torch.func.hessian(lambda z: (z**4).sum() + z.prod() ** 2)(row).trace())(x)


def jacobian_vector(x: Tensor) -> Tensor:
    jacobian = torch.vmap(torch.func.jacrev(lambda row: row**2 * row.sum()))(x)
    return (jacobian @ x[..., None]).squeeze(-1)


def jacobian_vector_jacobian(_: Any, x: Tensor) -> Tensor:
    # the inner function is homogeneous of degree 3, so its Jacobian times x is three times itself
    return 3 * ((2 * x * x.sum(-1, keepdim=True)).diag_embed() + (x**2)[..., None].expand(*x.shape, x.shape[-1]))


def double_backward(x: Tensor) -> Tensor:
    """Torch's own functional API, which records its graph itself."""
    return torch.autograd.functional.vjp(lambda z: z**3, x, torch.ones_like(x), create_graph=True)[1]


SCENARIOS = [
    Scenario(
        "custom Function with setup_context",
        lambda d: (Setup.apply, (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: x.cos().diag_embed(),
        traits=traits("no_vmap", "no_forward_ad", "custom_function"),
    ),
    Scenario(
        "custom Function with a jvp",
        lambda d: (Forward.apply, (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: x.cos().diag_embed(),
        traits=traits("no_vmap", "custom_function"),
    ),
    Scenario(
        "custom Function with a generated vmap rule and a jvp",
        lambda d: (Generated.apply, (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: x.cos().diag_embed(),
    ),
    Scenario(
        "custom Function with a vmap rule by hand",
        lambda d: (lambda x: Written.apply(x) * x, (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (x.cos() * x + x.sin()).diag_embed(),
        traits=traits("no_forward_ad"),
    ),
    Scenario(
        "custom Function that can be differentiated once",
        lambda d: (lambda x, z: Once.apply(x, z, 3.0), (d.normal(ROWS, 3), d.normal(ROWS, 3))),
        jacobian=lambda _, x, z: (3 * z).diag_embed(),
        traits=traits("no_vmap", "no_forward_ad", "no_functorch_vjp", "custom_function"),
    ),
    Scenario(
        "sign with a straight-through Function",
        lambda d: (lambda x: Sign.apply(x) * x, (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (x.sign() + x * (x.abs() <= 1)).diag_embed(),
        traits=traits("no_forward_ad", "custom_function", "kink"),
    ),
    Scenario(
        "fixed point with an implicit backward",
        fixed_point,
        jacobian=fixed_point_jacobian,
        traits=traits("no_vmap", "no_forward_ad", "no_functorch_vjp", "custom_function"),
    ),
    Scenario(
        "torch.func.grad of a sum over the batch",
        lambda d: (torch.func.grad(lambda x: (x**3).sum() + x.prod(-1).sum()), (d.normal(ROWS, 2),)),
        jacobian=lambda _, x: (6 * x).diag_embed() + torch.eye(2, dtype=x.dtype).flip(0),
    ),
    Scenario(
        "torch.func.vmap inside",
        lambda d: (torch.func.vmap(lambda row: row.sin() * row.sum()), (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (x.cos() * x.sum(-1, keepdim=True)).diag_embed() + x.sin()[..., None],
    ),
    Scenario("torch.func.hessian inside", lambda d: (laplacian, (d.normal(ROWS, 3),))),
    Scenario(
        "torch.func.jacrev inside", lambda d: (jacobian_vector, (d.normal(ROWS, 3),)), jacobian=jacobian_vector_jacobian
    ),
    Scenario("torch.func.jvp inside", lambda d: (slope_of, (d.normal(ROWS, 3), d.normal(ROWS, 3))), argnums=(0, 1)),
    Scenario(
        "torch.autograd.functional inside",
        lambda d: (double_backward, (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (6 * x).diag_embed(),
        traits=traits("no_vmap", "no_forward_ad", "no_functorch_vjp"),
    ),
]
