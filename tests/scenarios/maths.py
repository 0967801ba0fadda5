"""Independent functions with Jacobians by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scenarios.base import Draw, Scenario, traits

ROWS = 5
VISCOSITY, STEP = 0.1, 0.5


def eye_like(x: Tensor, scale: float = 1.0) -> Tensor:
    """The Jacobian of the identity on each sample."""
    return scale * torch.eye(x[0].numel(), dtype=x.dtype).reshape(*x.shape[1:], *x.shape[1:]).expand(
        *x.shape, *x.shape[1:]
    )


def one_hot_rows(index: Tensor, n: int, like: Tensor) -> Tensor:
    """The Jacobian of picking entries: (B, m) indices give (B, m, n)."""
    return F.one_hot(index, n).to(like.dtype)


def burgers(u: Tensor) -> Tensor:
    """Right-hand side of viscous Burgers on a periodic grid, central differences."""
    ahead, behind = u.roll(-1, -1), u.roll(1, -1)
    return -u * (ahead - behind) / (2 * STEP) + VISCOSITY * (ahead - 2 * u + behind) / STEP**2


def burgers_jacobian(_: Any, u: Tensor) -> Tensor:
    ahead, behind = u.roll(-1, -1), u.roll(1, -1)
    eye = torch.eye(u.shape[-1], dtype=u.dtype)
    diagonal = -(ahead - behind) / (2 * STEP) - 2 * VISCOSITY / STEP**2
    upper = -u / (2 * STEP) + VISCOSITY / STEP**2
    lower = u / (2 * STEP) + VISCOSITY / STEP**2
    return diagonal[..., None] * eye + upper[..., None] * eye.roll(1, 1) + lower[..., None] * eye.roll(-1, 1)


def polar(x: Tensor) -> Tensor:
    r, angle = x.unbind(-1)
    return torch.stack([r * angle.cos(), r * angle.sin()], -1)


def polar_jacobian(_: Any, x: Tensor) -> Tensor:
    r, angle = x.unbind(-1)
    c, s = angle.cos(), angle.sin()
    return torch.stack([torch.stack([c, -r * s], -1), torch.stack([s, r * c], -1)], -2)


ARM = (1.0, 0.7, 0.4)


def robot_arm(joints: Tensor) -> Tensor:
    """Tip of a planar arm with three links; joint angles add up along it."""
    angles = joints.cumsum(-1)
    lengths = joints.new_tensor(ARM)
    return torch.stack([(lengths * angles.cos()).sum(-1), (lengths * angles.sin()).sum(-1)], -1)


def robot_arm_jacobian(_: Any, joints: Tensor) -> Tensor:
    angles = joints.cumsum(-1)
    lengths = joints.new_tensor(ARM)
    # joint k moves every link from k on
    columns = [
        torch.stack([-(lengths * angles.sin())[:, k:].sum(-1), (lengths * angles.cos())[:, k:].sum(-1)], -1)
        for k in range(len(ARM))
    ]
    return torch.stack(columns, -1)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(-1)


def rosenbrock_gradient(_: Any, x: Tensor) -> Tensor:
    head, tail = x[:, :-1], x[:, 1:]
    residual = tail - head**2
    return F.pad(-400 * head * residual - 2 * (1 - head), (0, 1)) + F.pad(200 * residual, (1, 0))


def quadratic_form(draw: Draw) -> Any:
    matrix = draw.normal(4, 4)

    def func(x: Tensor) -> Tensor:
        return torch.einsum("bi,ij,bj->b", x, matrix, x)

    func.matrix = matrix  # type: ignore[attr-defined]
    return func, (draw.normal(ROWS, 4),)


def inverse_jacobian(_: Any, a: Tensor) -> Tensor:
    inverse = a.inverse()
    return -torch.einsum("bik,blj->bijkl", inverse, inverse)


def well_conditioned(draw: Draw, n: int) -> Tensor:
    return draw.normal(ROWS, n, n) + 3 * torch.eye(n, dtype=draw.dtype)


def square_jacobian(_: Any, a: Tensor) -> Tensor:
    eye = torch.eye(a.shape[-1], dtype=a.dtype)
    return torch.einsum("ik,blj->bijkl", eye, a) + torch.einsum("bik,lj->bijkl", a, eye)


def outer_jacobian(_: Any, x: Tensor) -> Tensor:
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    return torch.einsum("ik,bj->bijk", eye, x) + torch.einsum("bi,jk->bijk", x, eye)


def bilinear_jacobian(_: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    slope = 1 - (x @ w).tanh() ** 2
    by_x = slope[..., None] * w.T
    by_w = torch.einsum("bj,jl,bk->bjkl", slope, torch.eye(w.shape[1], dtype=w.dtype), x)
    return by_x, by_w


def softmax_jacobian(_: Any, x: Tensor) -> Tensor:
    p = x.softmax(-1)
    return p.diag_embed() - p[..., None] * p[..., None, :]


SCALES = (1e-6, 1.0, 1e6)

SCENARIOS = [
    Scenario("sin", lambda d: (torch.sin, (d.normal(ROWS, 3),)), jacobian=lambda _, x: x.cos().diag_embed()),
    Scenario(
        "tanh", lambda d: (torch.tanh, (d.normal(ROWS, 3),)), jacobian=lambda _, x: (1 - x.tanh() ** 2).diag_embed()
    ),
    Scenario("softplus", lambda d: (F.softplus, (d.normal(ROWS, 3),)), jacobian=lambda _, x: x.sigmoid().diag_embed()),
    Scenario(
        "relu, all dead",
        lambda d: (torch.relu, (-d.uniform(ROWS, 3, low=0.5, high=1.0),)),
        jacobian=lambda _, x: torch.zeros(*x.shape, 3, dtype=x.dtype),
    ),
    Scenario("abs", lambda d: (torch.abs, (d.normal(ROWS, 3),)), jacobian=lambda _, x: x.sign().diag_embed()),
    Scenario(
        "identity, returned itself", lambda d: (lambda x: x, (d.normal(ROWS, 3),)), jacobian=lambda _, x: eye_like(x)
    ),
    Scenario(
        "constant",
        lambda d: (lambda x: torch.ones(len(x), 2, dtype=x.dtype), (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: torch.zeros(len(x), 2, 3, dtype=x.dtype),
    ),
    Scenario("scalar to scalar", lambda d: (lambda x: x**3, (d.normal(ROWS),)), jacobian=lambda _, x: 3 * x**2),
    Scenario(
        "vector to scalar", lambda d: (lambda x: (x**2).sum(-1), (d.normal(ROWS, 4),)), jacobian=lambda _, x: 2 * x
    ),
    Scenario(
        "scalar to vector",
        lambda d: (lambda x: torch.stack([x, x**2, x.sin()], -1), (d.normal(ROWS),)),
        jacobian=lambda _, x: torch.stack([torch.ones_like(x), 2 * x, x.cos()], -1),
    ),
    Scenario(
        "outputs of very different scale",
        lambda d: (lambda x: x.sin() * x.new_tensor(SCALES), (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (x.cos() * x.new_tensor(SCALES)).diag_embed(),
    ),
    Scenario(
        "softmax last",
        lambda d: (lambda x: x.softmax(-1), (d.normal(ROWS, 4),)),
        jacobian=softmax_jacobian,
        traits=traits("conserved"),
    ),
    Scenario("Burgers stencil", lambda d: (burgers, (d.normal(3, 8),)), jacobian=burgers_jacobian),
    Scenario("quadratic form", quadratic_form, jacobian=lambda func, x: x @ (func.matrix + func.matrix.T)),
    Scenario(
        "outer product",
        lambda d: (lambda x: torch.einsum("bi,bj->bij", x, x), (d.normal(ROWS, 3),)),
        jacobian=outer_jacobian,
    ),
    Scenario("polar coordinates", lambda d: (polar, (d.uniform(ROWS, 2, low=0.5, high=2.0),)), jacobian=polar_jacobian),
    Scenario("robot arm", lambda d: (robot_arm, (d.normal(ROWS, 3),)), jacobian=robot_arm_jacobian),
    Scenario("Rosenbrock", lambda d: (rosenbrock, (d.normal(ROWS, 4),)), jacobian=rosenbrock_gradient),
    Scenario(
        "norm",
        lambda d: (lambda x: x.norm(dim=-1, keepdim=True), (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (x / x.norm(dim=-1, keepdim=True))[:, None],
    ),
    Scenario(
        "logsumexp",
        lambda d: (lambda x: x.logsumexp(-1), (d.normal(ROWS, 4),)),
        jacobian=lambda _, x: x.softmax(-1),
    ),
    Scenario(
        "cumsum in a sample",
        lambda d: (lambda x: x.cumsum(-1), (d.normal(ROWS, 4),)),
        jacobian=lambda _, x: torch.ones(4, 4, dtype=x.dtype).tril().expand(len(x), 4, 4),
    ),
    Scenario(
        "sort in a sample",
        lambda d: (lambda x: x.sort(-1).values, (d.normal(ROWS, 4),)),
        jacobian=lambda _, x: one_hot_rows(x.argsort(-1), 4, x),
    ),
    Scenario(
        "topk in a sample",
        lambda d: (lambda x: x.topk(2, -1).values, (d.normal(ROWS, 5),)),
        jacobian=lambda _, x: one_hot_rows(x.topk(2, -1).indices, 5, x),
    ),
    Scenario("power spectrum", lambda d: (lambda x: torch.fft.rfft(x).abs().square(), (d.normal(ROWS, 6),))),
    Scenario(
        "gather by a side input",
        lambda d: (lambda x, index: x.gather(1, index), (d.normal(ROWS, 4), d.integers(4, ROWS, 3))),
        jacobian=lambda _, x, index: one_hot_rows(index, 4, x),
        traits=traits("masked"),
    ),
    Scenario(
        "mask as a side input",
        lambda d: (lambda x, mask: torch.where(mask, x.sin(), 0.0), (d.normal(ROWS, 4), d.mask(ROWS, 4))),
        jacobian=lambda _, x, mask: (x.cos() * mask).diag_embed(),
        traits=traits("masked"),
    ),
    Scenario(
        "keyword arguments",
        lambda d: (
            lambda x, *, scale, power=2: scale * x**power,
            (d.normal(ROWS, 3),),
            {"scale": d.normal(3), "power": 3},
        ),
        jacobian=lambda _, x, *, scale, power: (scale * power * x ** (power - 1)).diag_embed(),
    ),
    Scenario(
        "second argument",
        lambda d: (lambda a, x: a * x.sin(), (d.normal(ROWS, 3), d.normal(ROWS, 3))),
        jacobian=lambda _, a, x: (a * x.cos()).diag_embed(),
        argnums=1,
    ),
    Scenario(
        "argnums of one",
        lambda d: (lambda a, x: a * x.sin(), (d.normal(ROWS, 3), d.normal(ROWS, 3))),
        jacobian=lambda _, a, x: (x.sin().diag_embed(),),
        argnums=(0,),
    ),
    Scenario(
        "one of two inputs unused",
        lambda d: (lambda x, z: x.sin(), (d.normal(ROWS, 3), d.normal(ROWS, 2))),
        jacobian=lambda _, x, z: (x.cos().diag_embed(), torch.zeros(ROWS, 3, 2, dtype=x.dtype)),
        argnums=(0, 1),
    ),
    Scenario(
        "same tensor twice",
        lambda d: (lambda x, z: x * z, (x := d.normal(ROWS, 3), x)),
        jacobian=lambda _, x, z: (z.diag_embed(), x.diag_embed()),
        argnums=(0, 1),
    ),
    Scenario(
        "two inputs, two outputs",
        lambda d: (lambda x, z: (x * z, (x + z.sin()).sum(-1)), (d.normal(ROWS, 3), d.normal(ROWS, 3))),
        jacobian=lambda _, x, z: ((z.diag_embed(), x.diag_embed()), (torch.ones_like(x), z.cos())),
        argnums=(0, 1),
    ),
    Scenario(
        "dictionary in, dictionary out",
        lambda d: (
            lambda x: {"product": x["a"] * x["b"], "sum": x["a"].sum(-1)},
            ({"a": d.normal(ROWS, 2), "b": d.normal(ROWS, 2)},),
        ),
        jacobian=lambda _, x: {
            "product": {"a": x["b"].diag_embed(), "b": x["a"].diag_embed()},
            "sum": {"a": torch.ones_like(x["a"]), "b": torch.zeros_like(x["b"])},
        },
    ),
    Scenario(
        "shared argument",
        lambda d: (lambda x, w: (x @ w).tanh(), (d.normal(ROWS, 3), d.normal(3, 2))),
        jacobian=bilinear_jacobian,
        argnums=(0, 1),
        shared=(1,),
    ),
    Scenario("matrix inverse", lambda d: (torch.inverse, (well_conditioned(d, 3),)), jacobian=inverse_jacobian),
    Scenario("matrix square", lambda d: (lambda a: a @ a, (d.normal(ROWS, 2, 2),)), jacobian=square_jacobian),
    Scenario("batch of one", lambda d: (torch.sin, (d.normal(1, 3),)), jacobian=lambda _, x: x.cos().diag_embed()),
    Scenario(
        "transposed input",
        lambda d: (torch.sin, (d.normal(3, ROWS).T,)),
        jacobian=lambda _, x: x.cos().diag_embed(),
        traits=traits("noncontiguous"),
    ),
    Scenario(
        "expanded input",
        lambda d: (torch.sin, (d.normal(1, 3).expand(ROWS, 3),)),
        jacobian=lambda _, x: x.cos().diag_embed(),
        traits=traits("noncontiguous"),
    ),
]
