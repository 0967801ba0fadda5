"""Gauss-Newton and Levenberg-Marquardt steps, against dense least squares with the oracle's Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian, InputError, SingularJacobianError
from autojac.api.least_squares import least_squares
from harness import compare
from oracle import jacobian_blocks, jacobian_full

MIX = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def estimated(func: Any, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


def tall(x: Tensor) -> Tensor:
    return (x @ MIX).sin() + x.square().sum(1, keepdim=True)


def wide(x: Tensor) -> Tensor:
    return torch.stack([x[:, 0] * x[:, 1], x[:, 2].exp() - x[:, 0]], 1)


def chain(x: Tensor) -> Tensor:
    return tall(x + 0.3 * torch.roll(x, 1, 0))


def centred(x: Tensor) -> Tensor:
    return tall(x + x.mean(0))


def reference(J: Tensor, r: Tensor, damping: Tensor | float) -> Tensor:
    """The step by a pseudoinverse of the stacked problem, one sample after the other."""
    shifts = torch.as_tensor(damping, dtype=J.dtype).expand(len(J))
    identity = torch.eye(J.shape[2], dtype=J.dtype)
    steps = []
    for block, own, shift in zip(J, r, shifts, strict=True):
        stacked = torch.cat([block, shift.sqrt() * identity])
        steps.append(-torch.linalg.pinv(stacked) @ torch.cat([own, own.new_zeros(len(identity))]))
    return torch.stack(steps)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64)


DAMPING = [0.0, 0.3, torch.tensor([0.0, 1e-3, 0.1, 2.0, 50.0], dtype=torch.float64)]


@pytest.mark.by_day(3)
@pytest.mark.parametrize("damping", DAMPING, ids=["none", "one", "each"])
@pytest.mark.parametrize("func", [tall, wide, chain, centred])
def test_steps_of_each_sample(func: Callable[[Tensor], Tensor], damping: Any, x: Tensor) -> None:
    J, r = jacobian_blocks(func, (x,)), func(x)
    compare(estimated(func).solve(x, r, damping=damping), reference(J, r, damping))


@pytest.mark.by_day(2)
@pytest.mark.parametrize("limit", [None, 2500], ids=["formed", "conjugate gradients"])
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("func", [chain, centred])
def test_steps_of_the_whole_batch(
    func: Callable[[Tensor], Tensor], damping: float, limit: int | None, x: Tensor
) -> None:
    J, r = jacobian_full(func, (x,)).reshape(1, 40, 15), func(x)
    assert limit is None or J.nbytes > limit
    right = reference(J, r.reshape(1, -1), damping).reshape(5, 3)
    compare(estimated(func, layout="full", memory_limit=limit).solve(x, r, damping=damping), right, rtol=1e-9)
    if limit is None:
        compare(estimated(func, layout="sparse").solve(x, r, damping=damping), right, rtol=1e-9)


BIG = torch.randn(20, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_blocks_that_do_not_fit_are_multiplied_only(shape: str, damping: float) -> None:
    weight = BIG if shape == "tall" else BIG.T
    x = torch.randn(4, len(weight), dtype=torch.float64, requires_grad=True)

    def func(x: Tensor) -> Tensor:
        return (0.1 * x @ weight).sin() if shape == "tall" else (0.1 * x).sin() @ weight

    J, r = estimated(func)(x), func(x).detach().requires_grad_()
    assert J.nbytes > 40_000
    shift = torch.tensor([damping, 0.2, damping, 1.0], dtype=x.dtype, requires_grad=True)
    ours = estimated(func, memory_limit=40_000).solve(x, r, damping=shift)
    right = least_squares(J, r, shift)
    compare(ours, right, rtol=1e-9)
    weights = torch.randn_like(ours)
    both = [torch.autograd.grad((d * weights).sum(), [x, r, shift]) for d in (ours, right)]
    compare(*both, rtol=1e-7)


@pytest.mark.by_day(2)
@pytest.mark.parametrize("damping", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(7, 3), (3, 3), (2, 4)], ids=str)
def test_first_and_second_derivatives(shape: tuple[int, int], damping: float) -> None:
    J = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    r = torch.randn(2, shape[0], dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([damping, 0.7], dtype=torch.float64)
    torch.autograd.gradcheck(least_squares, (J, r, shift))
    torch.autograd.gradgradcheck(least_squares, (J, r, shift))
    shift = torch.tensor([0.5, 0.7], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(least_squares, (J, r, shift))


def test_sparse_steps_train(x: Tensor) -> None:
    x.requires_grad_()
    r = chain(x).detach().requires_grad_()
    shift = torch.tensor(0.1, dtype=x.dtype, requires_grad=True)
    ours, right = (estimated(chain, layout=layout).solve(x, r, damping=shift) for layout in ("sparse", "full"))
    weights = torch.randn_like(x)
    both = [torch.autograd.grad((d * weights).sum(), [x, r, shift], create_graph=True) for d in (ours, right)]
    compare([g.detach() for g in both[0]], [g.detach() for g in both[1]], rtol=1e-9)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(both[0][0].sum(), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ill_conditioned_samples_are_solved_as_well_as_the_others(dtype: torch.dtype) -> None:
    conditions = torch.tensor([1e0, 1e2, 1e4, 1e7], dtype=torch.float64)
    if dtype == torch.float32:
        conditions = conditions.sqrt()
    u, _ = torch.linalg.qr(torch.randn(4, 9, 4, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(4, 4, 4, dtype=torch.float64))
    J = (
        u
        @ torch.stack([torch.logspace(0, float(-c.log10()), 4, dtype=torch.float64) for c in conditions]).diag_embed()
        @ v
    )
    J = J.to(dtype)
    d = torch.randn(4, 4, dtype=dtype)
    found = least_squares(J, -(J @ d[..., None])[..., 0], torch.tensor(0.0, dtype=dtype))
    errors = (found - d).norm(dim=1) / d.norm(dim=1)
    assert bool((errors <= 50 * torch.finfo(dtype).eps * conditions).all())


@pytest.mark.parametrize("tall", [True, False])
def test_single_precision_loses_no_digits_to_the_condition(tall: bool) -> None:
    torch.manual_seed(0)
    J, r = torch.randn(5, 12, 3), torch.randn(5, 12)
    # a condition of some thousands, whose square is past what float32 can tell from zero
    J[..., 2] = J[..., 1] + 5e-4 * J[..., 2]
    if not tall:
        J, r = J.mT.contiguous(), r[:, :3]
    J.requires_grad_()
    step = least_squares(J, r, torch.zeros(()))
    exact = J.detach().double().requires_grad_()
    expected = -(torch.linalg.pinv(exact) @ r.double()[..., None])[..., 0]
    assert step.dtype == torch.float32
    error = ((step - expected).norm(dim=1) / expected.norm(dim=1)).detach()
    assert float(error.max()) < 1e-6
    slopes = [torch.autograd.grad(each.sum(), of)[0] for each, of in ((step, J), (expected, exact))]
    assert float((slopes[0] - slopes[1]).norm() / slopes[1].norm()) < 1e-5


def test_the_samples_without_a_step_are_named(x: Tensor) -> None:
    x[2], x[4, 1] = 0, torch.nan
    with pytest.raises(
        SingularJacobianError, match=r"1 of 5 .*rank-deficient \(sample 2\).*not finite \(sample 4\)"
    ) as told:
        estimated(lambda x: x * x.roll(1, 1)).solve(x, x)
    assert told.value.singular == (2,) and told.value.not_finite == (4,)
    x[4, 1] = 1
    jac = estimated(lambda x: x * x.roll(1, 1) + 1e-300 * x.roll(1, 0), layout="sparse")
    with pytest.raises(SingularJacobianError, match="sample 2"):
        jac.solve(x, x)
    compare(jac.solve(x, x, damping=1.0)[2], -0 * x[2])


def test_nests_aux_parameters_and_no_batch(x: Tensor) -> None:
    def func(nest: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor], int]:
        return (tall(nest["a"]), nest["b"].T * nest["a"]), 7

    nest = {"a": x, "b": x.T.exp()}
    jac = estimated(func, in_dims=({"a": 0, "b": 1},), has_aux=True)
    r = func(nest)[0]
    J = jacobian_blocks(lambda a, b: torch.cat([tall(a), b * a], 1), (x, x.exp()), (0, 1))
    right = reference(torch.cat(J, 2), torch.cat(r, 1), 0.1)
    step, aux = jac.solve(nest, r, damping=0.1)
    assert aux == 7
    compare(torch.cat([step["a"], step["b"]], 1), right)

    single = estimated(lambda x: tall(x[None])[0], in_dims=None)
    compare(single.solve(x[0], tall(x)[0]), reference(jacobian_blocks(tall, (x,)), tall(x), 0.0)[0])

    net = nn.Linear(3, 2).double()
    fit = AutoJacobian.of_parameters(net, layout="full", on_miss="estimate", store=":memory:")
    step = fit.solve(x, net(x).detach())
    left = net(x) + x @ step["weight"].T + step["bias"]
    compare(net(x) + left, net(x))


def test_bad_input_is_said(x: Tensor) -> None:
    jac, r = estimated(tall), tall(x)
    for damping, got in ((-1.0, "got -1"), (torch.ones(4), "shape .4,."), ("high", "a str"), (True, "a bool")):
        with pytest.raises(InputError, match=got):
            jac.solve(x, r, damping=damping)
    with pytest.raises(InputError, match=r"r was expected in the shape .5, 8."):
        jac.solve(x, torch.stack([r, r]))
