"""Functions that can't be differentiated as they are: without a derivative, or with parameters without a shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac import AutoHessian, AutoJacobian, Derivatives, InputError, TrainingStep, UnsupportedError
from harness import compare
from oracle import jacobian_blocks

OPTIONS: Any = {"store": ":memory:", "on_miss": "estimate"}
X = torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5


class Backwardless(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


class Unfinished(Backwardless):
    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        raise NotImplementedError("to be done")


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "zeta": (lambda x: torch.special.zeta(x + 1, x + 1), "'zeta' is not implemented"),
    "igamma": (lambda x: torch.igamma(x, x), "igamma: input' is not implemented"),
    "heaviside": (lambda x: torch.heaviside(x, x), "aten::heaviside is not implemented"),
    "no backward": (Backwardless.apply, "implement either the backward or vjp"),
    "unfinished": (Unfinished.apply, "to be done"),
}
WAYS: dict[str, Callable[[Any], Any]] = {
    "jacobian": lambda func: AutoJacobian(func, **OPTIONS)(X),
    "declared": lambda func: AutoJacobian(func, coupling="independent", **OPTIONS)(X),
    "product": lambda func: AutoJacobian(func, **OPTIONS).vjp(X, X),
    "hessian": lambda func: AutoHessian(lambda x: func(x).sum(1), **OPTIONS)(X),
    "derivatives": lambda func: Derivatives(func, ((0,),), **OPTIONS)(X),
    "probe": lambda func: autojac.probe(func, X),
    "verify": lambda func: autojac.verify(torch.eye(3, dtype=X.dtype).expand(4, 3, 3), func, X),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_has_no_derivative_is_told_with_the_words_of_torch(way: str) -> None:
    for func, words in FUNCTIONS.values():
        with pytest.raises(UnsupportedError, match=f"a derivative of every operator was expected.*{words}"):
            WAYS[way](func)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.Tanh()).double().eval()


@pytest.mark.parametrize("way", [*WAYS, "parameters", "named", "step", "closure"])
def test_lazy_modules_are_to_be_initialized_first(way: str) -> None:
    ways = {
        **WAYS,
        "parameters": lambda func: AutoJacobian.of_parameters(func, **OPTIONS)(X),
        "named": lambda func: AutoJacobian.of_parameters(func, names="0.bias", **OPTIONS)(X),
        "step": lambda func: TrainingStep(func, lambda y, J: J.square().mean(), store=":memory:")(X),
        "closure": lambda func: AutoJacobian(lambda x: func(x).sin(), **OPTIONS)(X),
    }
    with pytest.raises(InputError, match=r"of a lazy module.*Call func once"):
        ways[way](lazy())


def test_a_wrapper_serves_once_the_module_is_initialized() -> None:
    net = lazy()
    jac, of_parameters = AutoJacobian(net, **OPTIONS), AutoJacobian.of_parameters(net, **OPTIONS)
    for wrapper in (jac, of_parameters):
        with pytest.raises(InputError, match="lazy module"):
            wrapper(X)
    net(X)
    with torch.no_grad():
        compare(jac(X), jacobian_blocks(net, (X,)))
    assert [J.shape for J in of_parameters(X).values()][:2] == [(4, 3, 3, 3), (4, 3, 3)]
