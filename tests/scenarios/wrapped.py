"""Functions inside other machinery: scripts, compilers, checkpoints, parametrizations, hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint_sequential

from scenarios.base import Draw, Scenario, traits

ROWS = 4


def quietly(make: Callable[[], Any]) -> Any:
    """Something that torch deprecates while people still use it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


class Doubled(nn.Module):
    """A module that torch.jit.script takes, with a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor, twice: bool = True) -> Tensor:
        y = self.inner(x).tanh()
        return 2 * y if twice else y


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.T


def symmetric_layer() -> nn.Module:
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def traced(draw: Draw) -> Any:
    net, x = draw.mlp(3, 4, 2), draw.normal(ROWS, 3)
    return quietly(lambda: torch.jit.trace(net, (x,))), (x,)


def compiled(draw: Draw) -> Any:
    net = torch.compile(draw.mlp(3, 4, 2), backend="eager")
    # dynamo looks at the .grad of its inputs, against which torch warns
    return lambda x: quietly(lambda: net(x)), (draw.normal(ROWS, 3),)


def checkpointed_in_segments(draw: Draw) -> Any:
    net = draw.mlp(3, 4, 4, 2)
    return lambda x: checkpoint_sequential(net, 2, x, use_reentrant=False), (draw.normal(ROWS, 3),)


def ensemble(draw: Draw) -> Any:
    """Three networks at once, by vmap over their weights."""
    nets = [draw.mlp(3, 4, 2) for _ in range(3)]
    weights, _ = stack_module_state(nets)

    def func(x: Tensor) -> Tensor:
        return torch.vmap(lambda w: functional_call(nets[0], w, (x,)), out_dims=1)(weights)

    return func, (draw.normal(ROWS, 3),)


def swapped(draw: Draw) -> Any:
    net, weights = draw.mlp(3, 4, 2), {"0.weight": draw.normal(4, 3)}
    return lambda x: functional_call(net, weights, (x,)), (draw.normal(ROWS, 3),)


def tied(draw: Draw) -> Any:
    """An autoencoder whose decoder is its encoder transposed."""
    encoder = draw.module(lambda: nn.Linear(4, 2))
    return lambda x: encoder(x).tanh() @ encoder.weight, (draw.normal(ROWS, 4),)


def tied_jacobian(func: Any, x: Tensor) -> Tensor:
    encoder = func.__closure__[0].cell_contents
    weight = encoder.weight.detach()
    slope = 1 - encoder(x).detach().tanh() ** 2
    return torch.einsum("km,bk,kn->bmn", weight, slope, weight)


def scaled_by_a_hook(draw: Draw) -> Any:
    net = draw.module(lambda: nn.Linear(3, 2))
    net.register_forward_hook(lambda module, args, y: 3 * y)
    return net, (draw.normal(ROWS, 3),)


def sparse_side_input(draw: Draw) -> Any:
    matrix = (draw.normal(2, 3) * draw.mask(2, 3)).to_sparse()
    return lambda x, a: (a @ x.T).T.sin(), (draw.normal(ROWS, 3), matrix)


class Bound:
    """A method of an object as the function."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        return self.scale * x.sin()

    def method(self, x: Tensor) -> Tensor:
        return self(x) + 1


def layer(build: Callable[[], nn.Module]) -> Callable[[Draw], Any]:
    return lambda draw: (draw.module(build), (draw.normal(ROWS, 3),))


def linear_jacobian(net: Any, x: Tensor) -> Tensor:
    return net.weight.detach().expand(len(x), *net.weight.shape)


SCENARIOS = [
    Scenario("scripted module", layer(lambda: quietly(lambda: torch.jit.script(Doubled())))),
    Scenario("traced module", traced),
    Scenario("compiled model, backend eager", compiled),
    Scenario("checkpointed in segments", checkpointed_in_segments, traits=traits("no_functorch_vjp")),
    Scenario("ensemble by vmap over weights", ensemble),
    Scenario("weights swapped by functional_call", swapped),
    Scenario("tied weights", tied, jacobian=tied_jacobian),
    Scenario(
        "weight_norm", layer(lambda: parametrizations.weight_norm(nn.Linear(3, 2), dim=0)), jacobian=linear_jacobian
    ),
    Scenario(
        "spectral_norm in eval mode",
        layer(lambda: parametrizations.spectral_norm(nn.Linear(3, 2)).eval()),
        jacobian=linear_jacobian,
    ),
    Scenario(
        "orthogonal weight", layer(lambda: parametrizations.orthogonal(nn.Linear(3, 3))), jacobian=linear_jacobian
    ),
    Scenario("symmetric weight", layer(symmetric_layer), jacobian=linear_jacobian),
    Scenario(
        "forward hook that scales",
        scaled_by_a_hook,
        jacobian=lambda net, x: 3 * linear_jacobian(net, x),
    ),
    Scenario(
        "sparse side input",
        sparse_side_input,
        shared=(1,),
        traits=traits("no_vmap", "no_forward_ad", "no_batched_grad"),
    ),
    Scenario(
        "callable object",
        lambda d: (Bound(d.normal(3)), (d.normal(ROWS, 3),)),
        jacobian=lambda func, x: (func.scale * x.cos()).diag_embed(),
    ),
    Scenario(
        "bound method",
        lambda d: (Bound(d.normal(3)).method, (d.normal(ROWS, 3),)),
        jacobian=lambda func, x: (func.__self__.scale * x.cos()).diag_embed(),
    ),
]
