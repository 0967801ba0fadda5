"""Matrix decompositions and other linear algebra within each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scenarios.base import Draw, Scenario
from scenarios.maths import well_conditioned

ROWS = 4


def spread(draw: Draw, n: int) -> Tensor:
    """Positive definite matrices whose eigenvalues keep apart."""
    a = draw.normal(ROWS, n, n)
    return 0.1 * (a + a.mT) + torch.arange(1, n + 1).to(draw.dtype).diag()


def symmetric(a: Tensor) -> Tensor:
    return (a + a.mT) / 2


def logarithm(a: Tensor) -> Tensor:
    """By eigenvectors, whose signs cancel."""
    values, vectors = torch.linalg.eigh(symmetric(a))
    return vectors @ (values.log()[..., None] * vectors.mT)


def polar_factor(a: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(a, full_matrices=False)
    return u @ vh


def triangular(draw: Draw) -> Any:
    right = draw.normal(3, 2)

    def func(a: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(a.tril(), right.expand(len(a), 3, 2), upper=False)

    return func, (well_conditioned(draw, 3)[:ROWS],)


def least_squares(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.lstsq(a, b[..., None]).solution.squeeze(-1)


def determinant_of_a_cholesky(a: Tensor) -> Tensor:
    return 2 * torch.linalg.cholesky(symmetric(a)).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def gaussian_process(draw: Draw) -> Any:
    """Posterior mean at fixed points from each sample's own observations."""
    at, where = torch.linspace(-1, 1, 4).to(draw.dtype), torch.linspace(-0.8, 0.8, 3).to(draw.dtype)

    def kernel(a: Tensor, b: Tensor, width: Tensor) -> Tensor:
        return (-0.5 * (a[:, None] - b) ** 2 / width[:, None, None] ** 2).exp()

    def func(y: Tensor, width: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(kernel(at, at, width) + 0.1 * torch.eye(4, dtype=y.dtype))
        return (kernel(where, at, width) @ torch.cholesky_solve(y[..., None], factor)).squeeze(-1)

    return func, (draw.normal(ROWS, 4), 0.5 + draw.uniform(ROWS))


def rotate(x: Tensor) -> Tensor:
    """A rotation matrix from a quaternion of any length."""
    w, a, b, c = F.normalize(x, dim=-1).unbind(-1)
    zero = torch.zeros_like(w)
    cross = torch.stack([zero, -c, b, c, zero, -a, -b, a, zero], -1).unflatten(-1, (3, 3))
    return torch.eye(3, dtype=x.dtype) + 2 * (w[:, None, None] * cross + cross @ cross)


def sylvester(draw: Draw) -> Any:
    a, b = draw.normal(2, 2) + 3 * torch.eye(2, dtype=draw.dtype), draw.normal(3, 3)
    system = torch.kron(a, torch.eye(3, dtype=draw.dtype)) + torch.kron(
        torch.eye(2, dtype=draw.dtype), b.T.contiguous()
    )
    return lambda c: torch.linalg.solve(system, c.flatten(1).mT).mT.reshape(-1, 2, 3), (draw.normal(ROWS, 2, 3),)


SCENARIOS = [
    Scenario("triangular solve", triangular),
    Scenario("Cholesky factor", lambda d: (lambda a: torch.linalg.cholesky(symmetric(a)), (spread(d, 3),))),
    Scenario(
        "log-determinant by Cholesky",
        lambda d: (determinant_of_a_cholesky, (spread(d, 3),)),
        jacobian=lambda _, a: symmetric(symmetric(a).inverse()),
    ),
    Scenario("QR", lambda d: (torch.linalg.qr, (well_conditioned(d, 3)[:ROWS],))),
    Scenario("singular values", lambda d: (torch.linalg.svdvals, (well_conditioned(d, 3)[:ROWS, :2],))),
    Scenario("polar factor by SVD", lambda d: (polar_factor, (spread(d, 3)[:, :, :2],))),
    Scenario("eigenvalues", lambda d: (lambda a: torch.linalg.eigvalsh(symmetric(a)), (spread(d, 3),))),
    Scenario("matrix logarithm by eigh", lambda d: (logarithm, (spread(d, 3),))),
    Scenario("matrix exponential", lambda d: (torch.matrix_exp, (0.5 * d.normal(ROWS, 2, 2),))),
    Scenario("pseudo-inverse", lambda d: (torch.linalg.pinv, (well_conditioned(d, 3)[:ROWS, :2],))),
    Scenario(
        "least squares",
        lambda d: (least_squares, (well_conditioned(d, 3)[:ROWS, :, :2], d.normal(ROWS, 3))),
        argnums=(0, 1),
    ),
    Scenario(
        "nuclear norm",
        lambda d: (lambda a: torch.linalg.matrix_norm(a, "nuc"), (well_conditioned(d, 3)[:ROWS],)),
        jacobian=lambda _, a: polar_factor(a),
    ),
    Scenario("Gaussian process", gaussian_process, argnums=(0, 1)),
    Scenario("quaternion to rotation", lambda d: (rotate, (d.normal(ROWS, 4),))),
    Scenario("Sylvester equation", sylvester),
    Scenario(
        "cross product",
        lambda d: (torch.linalg.cross, (d.normal(ROWS, 3), d.normal(ROWS, 3))),
        jacobian=lambda _, x, z: torch.linalg.cross(torch.eye(3, dtype=x.dtype)[None], z[:, None]).mT,
    ),
]
