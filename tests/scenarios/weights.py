"""Arguments that all samples share, differentiated: per-sample gradients in weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from scenarios.base import Draw, Scenario, traits
from scenarios.maths import eye_like

ROWS = 5


def affine_jacobian(_: Any, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    eye = torch.eye(len(b), dtype=x.dtype).expand(len(x), len(b), len(b))
    return w.T.expand(len(x), *w.T.shape), torch.einsum("bk,jl->bjkl", x, eye[0]), eye


def per_sample_gradients(draw: Draw) -> Any:
    net = draw.mlp(3, 4, 2)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}

    def losses(weights: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return (functional_call(net, weights, (x,)) - target).square().sum(-1)

    return losses, (weights, draw.normal(ROWS, 3), draw.normal(ROWS, 2))


def layers(weights: list[Any], x: Tensor) -> Tensor:
    for weight, bias in weights:
        x = (x @ weight + bias).tanh()
    return x


def nested_weights(draw: Draw) -> Any:
    return layers, ([(draw.normal(3, 4), draw.normal(4)), (draw.normal(4, 2), draw.normal(2))], draw.normal(ROWS, 3))


def hypernetwork(draw: Draw) -> Any:
    maker = draw.module(lambda: nn.Linear(2, 12))

    def func(x: Tensor, task: Tensor) -> Tensor:
        weight = maker(task).view(3, 4)
        return (x @ weight).tanh().sum(-1)

    return func, (draw.normal(ROWS, 3), draw.normal(2))


def parameters_with_a_scale(draw: Draw) -> Any:
    """Weights beside a learned scalar, as for a temperature or a noise level."""
    weights = {"w": draw.normal(3, 2), "scale": draw.normal(1)[0]}
    return lambda p, x: p["scale"].exp() * (x @ p["w"]), (weights, draw.normal(ROWS, 3))


def parameters_with_a_scale_jacobian(_: Any, p: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    y = p["scale"].exp() * (x @ p["w"])
    return {"w": torch.einsum("bk,jl->bjkl", p["scale"].exp() * x, torch.eye(2, dtype=x.dtype)), "scale": y}


def camera(points: Tensor, rotation: Tensor, shift: Tensor, focal: Tensor) -> Tensor:
    """Reprojection of one point a sample by one camera, its rotation given as a vector."""
    zero = torch.zeros_like(rotation[0])
    a, b, c = rotation
    cross = torch.stack([zero, -c, b, c, zero, -a, -b, a, zero]).view(3, 3)
    seen = points @ torch.matrix_exp(cross).T + shift
    return focal * seen[:, :2] / seen[:, 2:]


SCENARIOS = [
    Scenario(
        "weight and bias",
        lambda d: (lambda x, w, b: x @ w + b, (d.normal(ROWS, 3), d.normal(3, 2), d.normal(2))),
        jacobian=affine_jacobian,
        argnums=(0, 1, 2),
        shared=(1, 2),
    ),
    Scenario(
        "shared argument first, argnums out of order",
        lambda d: (lambda w, x: w * x.sin(), (d.normal(3), d.normal(ROWS, 3))),
        jacobian=lambda _, w, x: ((w * x.cos()).diag_embed(), x.sin().diag_embed()),
        argnums=(1, 0),
        shared=(0,),
    ),
    Scenario(
        "shared argument alone",
        lambda d: (lambda w, x: (w * x).sum(-1).sin(), (d.normal(3), d.normal(ROWS, 3))),
        jacobian=lambda _, w, x: (w * x).sum(-1).cos()[:, None] * x,
        shared=(0,),
    ),
    Scenario(
        "shared argument that is not used",
        lambda d: (lambda x, w: x.sin(), (d.normal(ROWS, 3), d.normal(2, 2))),
        jacobian=lambda _, x, w: (x.cos().diag_embed(), torch.zeros(ROWS, 3, 2, 2, dtype=x.dtype)),
        argnums=(0, 1),
        shared=(1,),
    ),
    Scenario(
        "shared argument of one row",
        lambda d: (lambda x, w: x * w, (d.normal(ROWS, 3), d.normal(1, 3))),
        jacobian=lambda _, x, w: (w.expand_as(x).diag_embed(), x.diag_embed()[:, :, None]),
        argnums=(0, 1),
        shared=(1,),
    ),
    Scenario(
        "shared scalar",
        lambda d: (lambda x, t: (x / t).softmax(-1), (d.normal(ROWS, 3), 1 + d.uniform(1)[0])),
        argnums=(0, 1),
        shared=(1,),
        traits=traits("conserved"),
    ),
    Scenario(
        "shared weights with a scalar among them",
        parameters_with_a_scale,
        jacobian=parameters_with_a_scale_jacobian,
        shared=(0,),
    ),
    Scenario("per-sample gradients by functional_call", per_sample_gradients, shared=(0,)),
    Scenario("nest of weights", nested_weights, argnums=(0, 1), shared=(0,)),
    Scenario("hypernetwork", hypernetwork, argnums=(0, 1), shared=(1,)),
    Scenario(
        "camera",
        lambda d: (camera, (d.normal(ROWS, 3) * 0.3 + d.normal(3), d.normal(3), 9 + d.normal(3), d.uniform(2))),
        argnums=(0, 1, 2, 3),
        shared=(1, 2, 3),
    ),
    Scenario(
        "shared weight behind batch statistics",
        lambda d: (lambda x, w: (x - x.mean(0)) * w, (d.normal(ROWS, 3), d.normal(3))),
        "dense",
        jacobian=lambda _, x, w: (eye_like(x, 1 - 1 / len(x)) * w[:, None], (x - x.mean(0)).diag_embed()),
        argnums=(0, 1),
        shared=(1,),
        traits=traits("conserved"),
    ),
    Scenario(
        "prototypes",
        lambda d: (
            lambda x, p: F.pairwise_distance(x[:, None], p[None]).neg().softmax(-1),
            (d.normal(ROWS, 3), d.normal(2, 3)),
        ),
        argnums=(0, 1),
        shared=(1,),
        traits=traits("conserved"),
    ),
]
