"""The whole batch's Jacobian as an operator, in each of its forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import lsqr
from torch import Tensor, nn

from autojac import AutoJacobian, InputError, UnsupportedError
from harness import compare
from oracle import jacobian_full

MIX = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def estimated(func: Any, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


def plain(x: Tensor) -> Tensor:
    return (x @ MIX).sin()[..., None]


def centred(x: Tensor) -> Tensor:
    return plain(x - x.mean(0))


def attended(x: Tensor) -> Tensor:
    return ((x @ x.T).softmax(1) @ plain(x)[..., 0])[..., None]


def chain(x: Tensor) -> Tensor:
    return plain(x * torch.roll(x, 1, 0))


CASES = [
    (plain, "blocks", "low-rank"),
    (centred, "blocks", "low-rank"),
    (attended, "blocks", "matrix-free"),
    (chain, "sparse", "sparse"),
]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64)


@pytest.mark.parametrize(("func", "layout", "form"), CASES)
def test_it_multiplies_as_the_matrix_does(func: Callable[[Tensor], Tensor], layout: str, form: str, x: Tensor) -> None:
    operator = estimated(func, layout=layout).linear_operator(x.requires_grad_())
    J = jacobian_full(func, (x,))
    M = J.reshape(20, 15).numpy()
    assert operator.form == form and operator.shape == (20, 15) and operator.dtype == np.float64
    v, u = torch.randn_like(x), torch.randn(5, 4, 1, dtype=x.dtype)
    compare(operator @ v, torch.tensordot(J, v, 2))
    compare(operator.rmatvec(u), torch.tensordot(u, J, 3))
    compare(operator.matvec(v.flatten()), torch.tensordot(J, v, 2))
    for ours, right in (
        (operator @ v.numpy().ravel(), M @ v.numpy().ravel()),
        (operator.T @ u.numpy().ravel(), M.T @ u.numpy().ravel()),
        (operator @ np.eye(15), M),
        (operator.rmatmat(np.eye(20)), M.T),
    ):
        np.testing.assert_allclose(ours, right, rtol=1e-10, atol=1e-12)
    found = lsqr(operator, np.ones(20), atol=1e-14, btol=1e-14)[0]
    np.testing.assert_allclose(M.T @ (M @ found), M.T @ np.ones(20), rtol=1e-6, atol=1e-8)


def test_without_room_it_is_matrix_free(x: Tensor) -> None:
    jac = estimated(plain, memory_limit=400)
    operator = jac.linear_operator(x)
    assert operator.form == "matrix-free"


def test_shared_inputs_axes_and_no_batch(x: Tensor) -> None:
    w = torch.randn(3, 4, dtype=x.dtype)
    shared = estimated(lambda x, w: (x @ w).sin(), argnums=1, in_dims=(0, None)).linear_operator(x, w)
    J = jacobian_full(lambda w: (x @ w).sin(), (w,))
    assert shared.shape == (20, 12)
    compare(shared @ w, torch.tensordot(J, w, 2))
    turned = estimated(lambda x: attended(x.T), in_dims=1).linear_operator(x.T)
    J = jacobian_full(attended, (x,))
    compare(turned @ x, torch.tensordot(J, x, 2))
    single = estimated(lambda x: plain(x[None])[0], in_dims=None).linear_operator(x[0])
    compare(single @ x[0], jacobian_full(lambda x: plain(x[None])[0], (x[0],)) @ x[0])


def test_what_cannot_be_is_said(x: Tensor) -> None:
    with pytest.raises(InputError, match="func has 2 and 1"):
        estimated(lambda x: (x, x)).linear_operator(x)
    with pytest.raises(InputError, match=r"of shape .5, 3. was expected"):
        estimated(plain).linear_operator(x) @ x[:2]
    with pytest.raises(UnsupportedError, match="draws random numbers"):
        estimated(nn.Dropout(), randomness="different", memory_limit=200).linear_operator(x)
