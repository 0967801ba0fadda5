"""Inverses of plain tensors of matrices, by the cheapest way that their zeros allow, and which of them are singular."""

from __future__ import annotations

from math import frexp, prod

import torch
from torch import Tensor

MARGIN = 4
"""Multiple of eps below which a reciprocal condition number is zero.

Of a million random matrices a rank-deficient one, entries rounded, none came out above 2.1 eps: 3 x 2 is the worst
shape, since the 1-norms grow with the size faster than the rounding does.
"""


def triangles(matrices: Tensor) -> tuple[bool, bool]:
    """Check whether every matrix is upper triangular, and whether every one is lower triangular."""
    # reshape infers no -1 if another axis has length 0
    pattern = matrices.ne(0).reshape(prod(matrices.shape[:-2]), *matrices.shape[-2:]).any(0)
    below, above = torch.stack([pattern.tril(-1).any(), pattern.triu(1).any()]).tolist()
    return not below, not above


def largest_of_each(matrices: Tensor) -> Tensor:
    """Return the largest magnitude in each matrix, NaN where there is one."""
    return matrices.abs().amax((-2, -1)) if matrices.numel() else matrices.new_zeros(matrices.shape[:-2])


def _scale(matrices: Tensor, axis: int) -> Tensor:
    """Return powers of two that bring the largest entry along `axis` near 1, with that axis kept."""
    exponents = torch.frexp(matrices.abs().amax(axis, keepdim=True)).exponent
    most = 1 - frexp(torch.finfo(matrices.dtype).tiny)[1]
    return torch.exp2(exponents.neg().clamp(-most, most).to(matrices.dtype))


def _norm(matrices: Tensor) -> Tensor:
    return matrices.abs().sum(-2).amax(-1)


def solve(matrices: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the inverse or Moore-Penrose inverse of each matrix, and which matrices have none.

    A matrix has none if it has a zero pivot, if its inverse overflows `stored`, or if 1 / (|A|₁ |A⁻¹|₁) is below 4 eps
    (`MARGIN`) after a scaling of its rows and columns. So units don't count, and diagonal matrices fail by a zero only.
    The rows of a tall matrix and the columns of a wide one aren't scaled: least squares weighs them against each other.

    Args:
        matrices: (*lead, m, n) in float32 or float64; what isn't finite has no inverse.
        stored: dtype that the inverses are going to be rounded to.

    Returns:
        The inverses (*lead, n, m), arbitrary where there is none; and where that is, (*lead,).
    """
    m, n = matrices.shape[-2:]
    if not matrices.numel():
        return matrices.new_zeros(matrices.mT.shape), matrices.new_zeros(matrices.shape[:-2], dtype=torch.bool)
    if m < n:
        inverses, singular = solve(matrices.mT, stored)
        return inverses.mT, singular
    upper, lower = triangles(matrices) if m == n else (False, False)
    if upper and lower:
        diagonal = matrices.diagonal(dim1=-2, dim2=-1)
        reciprocals = diagonal.reciprocal()
        storable = reciprocals.abs() <= torch.finfo(stored).max
        return reciprocals.diag_embed(), ~(diagonal.isfinite() & storable).all(-1)
    has_failed = matrices.new_zeros(matrices.shape[:-2], dtype=torch.bool)
    rows = _scale(matrices, -1) if m == n else matrices.new_ones(1, 1)
    scaled = matrices * rows
    columns = _scale(scaled, -2)
    scaled = scaled * columns
    if upper or lower:
        identity = torch.eye(n, dtype=matrices.dtype, device=matrices.device).expand_as(scaled)
        inverse_of_scaled = torch.linalg.solve_triangular(scaled, identity, upper=upper)
        has_failed = scaled.diagonal(dim1=-2, dim2=-1).eq(0).any(-1)
    elif m == n:
        inverse_of_scaled, info = torch.linalg.inv_ex(scaled)
        has_failed = info.ne(0)
    else:
        q, r = torch.linalg.qr(scaled)
        inverse_of_scaled = torch.linalg.solve_triangular(r, q.mT, upper=True)
    inverses = columns.mT * inverse_of_scaled * rows.mT
    is_resolved = _norm(scaled) * _norm(inverse_of_scaled) * (MARGIN * torch.finfo(matrices.dtype).eps) <= 1
    return inverses, has_failed | ~is_resolved | ~(largest_of_each(inverses) <= torch.finfo(stored).max)
