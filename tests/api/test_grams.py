"""Gram matrices, norms and singular values, from the Jacobian or in pieces of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian, SearchError, UnsupportedError
from harness import compare
from oracle import jacobian_blocks, jacobian_full

WEIGHT = torch.randn(20, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FEW = 40_000
"""Bytes: fewer than the blocks here take, and more than one pass does."""


def estimated(func: Any, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


def plain(x: Tensor) -> Tensor:
    return (x @ WEIGHT).sin()


def narrow(x: Tensor) -> Tensor:
    return x.sin() @ WEIGHT.T


def centred(x: Tensor) -> Tensor:
    return plain(x - x.mean(0))


def paired(x: Tensor) -> Tensor:
    return plain(x) * (1 + x[[1, 0, 3, 2]].sum(1, keepdim=True))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 20, dtype=torch.float64)


@pytest.mark.by_day(2)
@pytest.mark.parametrize("limit", [None, FEW], ids=["formed", "pieces"])
@pytest.mark.parametrize("func", [plain, centred, paired])
def test_of_every_block(func: Callable[[Tensor], Tensor], limit: int | None, x: Tensor) -> None:
    jac, J = estimated(func, memory_limit=limit), jacobian_blocks(func, (x,))
    assert limit is None or J.nbytes > limit
    compare(jac.gram(x), J.mT @ J)
    compare(jac.norm(x), J.flatten(1).norm(dim=1))
    if limit is None:
        compare(jac.gram(x, outer=True), J @ J.mT)
        compare(jac.singular_values(x), torch.linalg.svdvals(J))


def test_columns_add_up_to_the_outer_products(x: Tensor) -> None:
    wide = (x @ WEIGHT).detach()
    J = jacobian_blocks(narrow, (wide,))
    assert J.nbytes > FEW
    compare(estimated(narrow, memory_limit=FEW).gram(wide, outer=True), J @ J.mT)


@pytest.mark.parametrize("limit", [None, 4 * FEW], ids=["formed", "pieces"])
def test_of_the_whole_batch(limit: int | None, x: Tensor) -> None:
    jac, J = estimated(centred, layout="full", memory_limit=limit), jacobian_full(centred, (x,)).reshape(400, 80)
    assert limit is None or J.nbytes > limit
    compare(jac.gram(x), J.T @ J)
    compare(jac.norm(x), J.norm())
    if limit is None:
        compare(jac.gram(x, outer=True), J @ J.T)
        compare(jac.singular_values(x), torch.linalg.svdvals(J))
        compare(estimated(centred, layout="sparse").norm(x), J.norm())


@pytest.mark.parametrize("layout", ["blocks", "full"])
@pytest.mark.parametrize("limit", [None, 2 * FEW], ids=["formed", "pieces"])
def test_of_several_outputs_and_inputs_together(limit: int | None, layout: str, x: Tensor) -> None:
    def func(nest: dict[str, Tensor], w: Tensor) -> tuple[Tensor, Tensor]:
        y = nest["b"].sin() @ w + nest["a"].T ** 2
        return y @ WEIGHT, y.sum(1, keepdim=True).exp() * nest["b"]

    args = ({"a": x.T, "b": x}, torch.randn(20, 20, dtype=x.dtype))
    options = {"argnums": (1, 0), "in_dims": ({"a": 1, "b": 0}, None), "layout": layout}
    J = estimated(func, **options)(*args)
    rows = [[w, nest["a"], nest["b"]] for w, nest in J]
    lead = [(len(row[0]) * row[0].shape[1],) if layout == "full" else row[0].shape[:2] for row in rows]
    M = torch.cat([torch.cat([p.reshape(*n, -1) for p in row], -1) for n, row in zip(lead, rows, strict=True)], -2)
    jac = estimated(func, memory_limit=limit and limit * (2 if layout == "full" else 1), **options)
    assert limit is None or M.nbytes > 2 * limit
    compare(jac.norm(*args), torch.linalg.matrix_norm(M))
    if limit is None:
        compare(jac.gram(*args), M.mT @ M)
        compare(jac.gram(*args, outer=True), M @ M.mT)


def test_of_parameters_and_without_a_batch(x: Tensor) -> None:
    net = nn.Linear(20, 2).double()
    jac = AutoJacobian.of_parameters(net, on_miss="estimate", store=":memory:")
    compare(jac.gram(x, outer=True), torch.eye(2, dtype=x.dtype) * (1 + x.square().sum(1))[:, None, None])
    single = estimated(lambda x: plain(x[None])[0], in_dims=None)
    J = single(x[0])
    compare(single.gram(x[0]), J.T @ J)
    compare(single.norm(x[0]), J.norm())
    compare(single.singular_values(x[0]), torch.linalg.svdvals(J))


@pytest.mark.parametrize("limit", [None, FEW], ids=["formed", "pieces"])
def test_they_train(limit: int | None, x: Tensor) -> None:
    x.requires_grad_()
    J = estimated(plain)(x)
    jac = estimated(plain, memory_limit=limit)
    for ours, right in ((jac.gram(x), J.mT @ J), (jac.norm(x), J.flatten(1).norm(dim=1))):
        weights = torch.randn_like(ours)
        expected = torch.autograd.grad((right * weights).sum(), x, retain_graph=True)
        compare(torch.autograd.grad((ours * weights).sum(), x), expected)


def test_what_cannot_be_is_said(x: Tensor) -> None:
    for name in ("gram", "singular_values"):
        with pytest.raises(UnsupportedError, match="got 'sparse'"):
            getattr(estimated(plain, layout="sparse"), name)(x)
    with pytest.raises(SearchError, match="Gram matrices alone take"):
        estimated(plain, memory_limit=100).gram(x)
    counting = nn.Sequential(nn.BatchNorm1d(20), nn.Linear(20, 100)).double()
    with pytest.raises(UnsupportedError, match="updates buffers"):
        estimated(counting, memory_limit=FEW).gram(x)
    assert int(counting[0].num_batches_tracked) == 0
