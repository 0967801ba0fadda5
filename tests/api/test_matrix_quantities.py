"""What is made of a Jacobian: inverse, determinant, trace."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian, InputError, OutputError, SingularJacobianError
from harness import Counted, compare
from oracle import jacobian_blocks, jacobian_full


def estimated(func: Any, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


def network(*widths: int) -> nn.Module:
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1]).double()


def centred(x: Tensor) -> Tensor:
    return x + 0.3 * (x - x.mean(0)).sin()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, dtype=torch.float64)


KINDS = ["square", "tall", "wide", "exp", "centred"]


@pytest.mark.parametrize("func", [network(3, 8, 3), network(3, 8, 5), network(3, 8, 2), torch.exp, centred], ids=KINDS)
def test_inverse_is_that_of_every_block(func: Any, x: Tensor) -> None:
    compare(estimated(func).inverse(x).detach(), torch.linalg.pinv(jacobian_blocks(func, (x,))), rtol=1e-9)


def test_inverse_keeps_the_shapes_of_events() -> None:
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    weight = torch.randn(6, 6, dtype=torch.float64)

    def func(x: Tensor) -> Tensor:
        return (x.flatten(1) @ weight).sinh().unflatten(1, (3, 2))

    J = jacobian_blocks(func, (x,)).reshape(4, 6, 6)
    compare(estimated(func).inverse(x), torch.linalg.inv(J).reshape(4, 2, 3, 3, 2), rtol=1e-9)
    whole = jacobian_full(func, (x,)).reshape(24, 24)
    compare(estimated(func, layout="full").inverse(x), torch.linalg.inv(whole).reshape(4, 2, 3, 4, 3, 2), rtol=1e-9)
    single = jacobian_full(func, (x[:1],)).reshape(6, 6)
    unbatched = estimated(lambda z: func(z[None])[0], in_dims=None)
    compare(unbatched.inverse(x[0]), torch.linalg.inv(single).reshape(2, 3, 3, 2), rtol=1e-9)


def test_a_full_jacobian_in_a_shared_input_is_one_matrix() -> None:
    x, wide = torch.randn(3, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    mixing = torch.randn(6, 6, dtype=torch.float64)

    def func(w: Tensor, x: Tensor) -> Tensor:
        return (mixing @ w).sin().reshape(3, 2) * (1 + x**2)

    J = jacobian_blocks(func, (wide, x), shared=(0,)).reshape(6, 6)
    jac = estimated(func, in_dims=(None, 0), layout="full")
    compare(jac.inverse(wide, x), torch.linalg.inv(J).reshape(6, 3, 2), rtol=1e-9)
    compare(list(jac.slogdet(wide, x)), list(torch.linalg.slogdet(J)), rtol=1e-9)

    def alike(w: Tensor, x: Tensor) -> Tensor:
        return (w[:2] * x).sin()

    # as many numbers of a sample as of the input: the shapes are those of square blocks
    J = jacobian_blocks(alike, (wide[:2], x), shared=(0,))
    whole = estimated(alike, in_dims=(None, 0), layout="full")
    compare(whole.inverse(wide[:2], x), torch.linalg.pinv(J.reshape(6, 2)).reshape(2, 3, 2), rtol=1e-9)
    with pytest.raises(InputError, match="6 x 2"):
        whole.slogdet(wide[:2], x)
    blocks = estimated(alike, in_dims=(None, 0))
    compare(blocks.inverse(wide[:2], x), torch.linalg.inv(J), rtol=1e-9)


def test_the_samples_without_an_inverse_are_named(x: Tensor) -> None:
    x[1], x[4, 0] = 0.0, float("nan")
    with pytest.raises(
        SingularJacobianError, match=r"1 of 6 .*singular \(sample 1\).*1 is not finite \(sample 4\)"
    ) as told:
        estimated(lambda x: x**2).inverse(x)
    assert told.value.singular == (1,) and told.value.not_finite == (4,)


@pytest.mark.parametrize("func", [network(3, 8, 3), torch.exp, centred], ids=["square", "exp", "centred"])
def test_determinant_and_trace(func: Any, x: Tensor) -> None:
    jac, blocks = estimated(func), jacobian_blocks(func, (x,))
    compare([part.detach() for part in jac.slogdet(x)], torch.linalg.slogdet(blocks), rtol=1e-9)
    compare(jac.trace(x).detach(), blocks.diagonal(dim1=1, dim2=2).sum(1))
    whole = jacobian_full(func, (x,)).reshape(18, 18)
    compare(estimated(func, layout="full").slogdet(x)[1].detach(), torch.linalg.slogdet(whole)[1], rtol=1e-9)


def test_all_of_them_train(x: Tensor) -> None:
    net = network(3, 8, 3)
    jac = estimated(net)

    def loss(J: Tensor) -> Tensor:
        return torch.linalg.inv(J).square().mean() + torch.linalg.slogdet(J)[1].sum() + torch.einsum("bii->", J)

    parameters = list(net.parameters())[:-1]  # the last bias moves no Jacobian
    ours = jac.inverse(x).square().mean() + jac.slogdet(x)[1].sum() + jac.trace(x).sum()
    compare(torch.autograd.grad(ours, parameters), torch.autograd.grad(loss(jac(x)), parameters), rtol=1e-8)


def test_a_trace_never_forms_the_jacobian() -> None:
    func = Counted(network(12, 12))
    jac = estimated(func, layout="full", memory_limit="1MB")
    x = torch.randn(40, 12, dtype=torch.float64)  # the whole would take 1.8 MB, the blocks 46 kB
    with torch.no_grad():
        compare(jac.trace(x), jacobian_blocks(func.func, (x,)).diagonal(dim1=1, dim2=2).sum(1))
        before = func.calls
        jac.trace(x)
    assert func.calls <= before + 3


def test_aux_comes_along(x: Tensor) -> None:
    jac = estimated(lambda x: (x.exp(), {"n": 3}), has_aux=True)
    for made in (jac.inverse(x), jac.slogdet(x), jac.trace(x)):
        assert made[1] == {"n": 3}


def test_what_cannot_be_is_said(x: Tensor) -> None:
    for method in ("inverse", "slogdet", "trace"):
        with pytest.raises(InputError, match="one output and one input were expected, but func has 2 and 1"):
            getattr(estimated(lambda x: (x, x.sin())), method)(x)
    with pytest.raises(InputError, match="2 x 3"):
        estimated(lambda x: x[:, :2]).slogdet(x)
    with pytest.raises(OutputError, match="as many outputs as inputs"):
        estimated(lambda x: x[:, :2]).trace(x)
