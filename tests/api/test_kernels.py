"""Kernels, Gauss-Newton products and gradient norms, and which parameters they are in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian, InputError, OptionError, UnsupportedError
from autojac.guards.captures import fingerprint
from harness import compare

FEW = 8_000
"""Bytes: fewer than the Jacobians and gradients here take, and more than a sample's do."""


def network(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), *between, nn.Linear(8, 2)).double()


def estimated(module: nn.Module, **options: Any) -> AutoJacobian:
    return AutoJacobian.of_parameters(module, **{"on_miss": "estimate", "store": ":memory:", **options})


def matrix(J: dict[str, Tensor]) -> Tensor:
    return torch.cat([block.flatten(2) for block in J.values()], 2)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(20, 3, dtype=torch.float64)


NORMED = nn.BatchNorm1d(8, track_running_stats=False)


@pytest.mark.parametrize("limit", [None, FEW], ids=["formed", "parts"])
def test_kernels_pair_all_samples(limit: int | None, x: Tensor) -> None:
    net = network()
    J = matrix(estimated(net)(x))
    assert limit is None or J.nbytes > limit
    jac = estimated(net, memory_limit=limit)
    right = torch.einsum("bmp,clp->bcml", J, J)
    compare(jac.ntk(x), right)
    compare(jac.ntk(x, x[:3]), right[:, :3])
    if limit is None:
        both = [torch.autograd.grad(k.square().sum(), net[0].weight) for k in (jac.ntk(x), right)]
        compare(*both)


def test_kernels_of_several_arguments_and_inputs(x: Tensor) -> None:
    func = AutoJacobian(lambda x, s: (x.sin() * s).cumsum(1), on_miss="estimate", store=":memory:")
    J = func(x, x.exp())
    compare(func.ntk((x, x.exp()), (x[:4], x[:4].exp())), torch.einsum("bmp,clp->bcml", J, J[:4]))


@pytest.mark.parametrize("between", [(), (NORMED,)], ids=["independent", "batch norm"])
def test_gauss_newton_products_are_of_the_whole_batch(between: tuple[nn.Module, ...], x: Tensor) -> None:
    net = network(*between)
    labels = torch.arange(20) % 2
    J = estimated(net, layout="full")(x)
    M, v = matrix(J).flatten(0, 1), {name: torch.randn_like(p) for name, p in net.named_parameters()}
    flat = torch.cat([t.flatten() for t in v.values()])

    def loss(y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(y, labels, reduction="sum")

    H = torch.autograd.functional.hessian(loss, net(x).detach()).reshape(40, 40)
    for given, middle in ((None, torch.eye(40, dtype=x.dtype)), (loss, H), (torch.sum, torch.zeros_like(H))):
        ours = estimated(net).ggn_product(x, v, loss=given)
        assert ours.keys() == v.keys()
        compare(torch.cat([t.flatten() for t in ours.values()]), M.T @ (middle @ (M @ flat)))


@pytest.mark.by_day(2)
@pytest.mark.parametrize("limit", [None, 100_000], ids=["formed", "parts"])
@pytest.mark.parametrize("between", [(), (NORMED,)], ids=["independent", "batch norm"])
def test_gradient_norms_are_those_of_each_sample(between: tuple[nn.Module, ...], limit: int | None, x: Tensor) -> None:
    net = nn.Sequential(network(*between), nn.Linear(2, 100), nn.Tanh(), nn.Linear(100, 2)).double()
    u = torch.randn(20, 2, dtype=x.dtype)
    gradients = torch.einsum("bm,bmp->bp", u, matrix(estimated(net)(x)))
    assert limit is None or gradients.nbytes > limit / 2
    compare(estimated(net, memory_limit=limit).gradient_norms(x, u), gradients.norm(dim=1))


def test_names_choose_parameters(x: Tensor) -> None:
    net = network()
    net[2].bias.requires_grad_(False)
    J = estimated(net)(x)
    for names, keys in (
        ("0.weight", ["0.weight"]),
        ("*.weight", ["0.weight", "2.weight"]),
        (["2.*", "0.bias"], ["0.bias", "2.weight"]),
    ):
        chosen = estimated(net, names=names)(x)
        assert list(chosen) == keys
        compare(chosen, {key: J[key] for key in keys})
    v = {"0.bias": torch.randn(8, dtype=x.dtype)}
    compare(estimated(net, names="0.bias").jvp(x, v), torch.einsum("bmp,p->bm", J["0.bias"], v["0.bias"]))

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.up.weight = self.down.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x).tanh())

    tied = Tied().double()
    compare(estimated(tied, names="up.*")(x), estimated(tied)(x))


def test_plans_of_other_names_are_others(x: Tensor) -> None:
    net = network()
    keys = [estimated(net, names=names)._plans.planner.repository for names in ("0.*", "2.*", None)]
    digests = {fingerprint(repository.func, "") for repository in keys}
    assert len(digests) == 3


def test_what_cannot_be_is_said(x: Tensor) -> None:
    net = network()
    net[2].bias.requires_grad_(False)
    for names, told in (
        ("0.wieght", r"did you mean '0.weight'"),
        ("2.bias", "2.bias, which is frozen"),
        ("q*", "nothing"),
    ):
        with pytest.raises(InputError, match=told):
            estimated(net, names=names)
    for names in ((), (3,)):
        with pytest.raises(OptionError, match="names must be"):
            estimated(net, names=names)
    with pytest.raises(InputError, match=r"parameter weight is torch.complex64"):
        estimated(nn.Linear(3, 2, dtype=torch.complex64))(x)
    with pytest.raises(UnsupportedError, match="got 'full'"):
        estimated(net, layout="full").ntk(x)
    v = {name: torch.zeros_like(p) for name, p in net.named_parameters() if p.requires_grad}
    with pytest.raises(InputError, match="loss was expected to return a scalar"):
        estimated(net).ggn_product(x, v, loss=lambda y: y)
    single = AutoJacobian(torch.sin, in_dims=None, on_miss="estimate", store=":memory:")
    for call in (lambda: single.ntk(x), lambda: single.gradient_norms(x, x)):
        with pytest.raises(InputError, match="function with a batch"):
            call()
