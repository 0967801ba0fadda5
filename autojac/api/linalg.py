"""Inverse and determinant of batches of Jacobians: nothing singular passes, and the zeros are made use of.

Zeros may be there by value only, as in a layer initialised at zero, so the forward alone uses the structure that they
show: derivatives are those of a general matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from autojac.api.inversion import largest_of_each, solve, triangles
from autojac.autodiff.matrix_function import MatrixRule, by_rule
from autojac.core.autocast import outside_autocast
from autojac.errors import InputError, SingularJacobianError

HALVES = (torch.float16, torch.bfloat16)
NAMED = 8
"""Samples that an error names."""


class Slogdet(NamedTuple):
    """What `slogdet` returns, as torch.linalg.slogdet does: both (*lead,)."""

    sign: Tensor
    logabsdet: Tensor


def inverse(matrices: Tensor) -> Tensor:
    """Return the inverse of each matrix, or the Moore-Penrose inverse where they are rectangular.

    The zeros that all matrices share choose the way: reciprocals for diagonal ones, substitution for triangular ones,
    else LU, or QR for rectangular ones. Half precision is computed in float32 and rounded back.

    A matrix is singular if it has a zero pivot, if its inverse overflows, or if its reciprocal condition number
    1 / (|A|₁ |A⁻¹|₁) is below 4 eps of the dtype computed in, after a scaling of rows and columns: units don't count,
    and diag(1, 1e-30) has an inverse. What is judged is the inversion, not the rounding in the entries themselves.
    Rectangular matrices need full rank, since the derivative of the Moore-Penrose inverse exists nowhere else.

    Args:
        matrices: (*lead, m, n), real and floating.

    Returns:
        (*lead, n, m), differentiable any number of times.

    Raises:
        InputError: not a batch of real floating matrices.
        SingularJacobianError: some are singular or not finite; it names them by their index in the flattened `lead`.
    """
    _check(matrices, "inverse")
    widened = matrices.float() if matrices.dtype in HALVES else matrices
    return by_rule(widened, INVERSES[matrices.dtype]).to(matrices.dtype)


def slogdet(matrices: Tensor) -> Slogdet:
    """Return sign and logarithm of the absolute value of each determinant.

    Diagonal and triangular matrices (by the zeros that all of them share) need no LU. Half precision is computed in
    float32 and rounded back. Singular matrices are no error: a zero pivot gives sign 0 and logarithm -inf as in torch,
    and what flows back to what `inverse` would refuse is NaN, or 0 where nothing flows in, so that a caller may mask
    it. A matrix that isn't finite gives NaN.

    Args:
        matrices: (*lead, n, n), real and floating.

    Returns:
        (sign, logabsdet), each (*lead,); logabsdet is differentiable any number of times, sign carries no graph.

    Raises:
        InputError: not a batch of square, real floating matrices.
    """
    _check(matrices, "slogdet")
    m, n = matrices.shape[-2:]
    if m != n:
        raise InputError(
            f"a determinant needs square Jacobians, these are {m} x {n}: let the function return as many numbers per "
            "sample as it takes, and with layout='full' as many per batch as it takes"
        )
    widened = matrices.float() if matrices.dtype in HALVES else matrices
    both = by_rule(widened, SLOGDET).to(matrices.dtype)
    return Slogdet(both[..., 0].detach(), both[..., 1])


def as_matrices(
    jacobian: Tensor, outputs: Sequence[int], inputs: Sequence[int], shared: bool = False
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return one matrix per Jacobian, and the way back for the inverses.

    Args:
        jacobian: blocks (B, *outputs, *inputs), full (B, *outputs, B, *inputs) or unbatched (*outputs, *inputs);
            the number of axes tells which.
        outputs: shape of one sample's output.
        inputs: shape of one sample's input.
        shared: the Jacobian is full and in an input that all samples share: (B, *outputs, *inputs) is one matrix, and
            not a batch of blocks.

    Returns:
        The matrices, (B, m, n), (B·m, B·n) or (m, n), with m = prod(outputs) and n = prod(inputs); and the function
        that takes their inverses to (B, *inputs, *outputs), (B, *inputs, B, *outputs) or (*inputs, *outputs). In a
        `shared` input the matrix (B·m, n), whose inverse is (*inputs, B, *outputs).

    Raises:
        InputError: the Jacobian has none of these shapes.
    """
    rows, columns, shape = tuple(outputs), tuple(inputs), tuple(jacobian.shape)
    m, n = prod(rows), prod(columns)
    batch = shape[:1]
    sizes: tuple[int, ...]
    inverted: tuple[int, ...]
    if shared and shape == (*batch, *rows, *columns):
        sizes, inverted = (prod(batch) * m, n), (*columns, *batch, *rows)
    elif shape == (*batch, *rows, *columns):
        sizes, inverted = (*batch, m, n), (*batch, *columns, *rows)
    elif shape == (*batch, *rows, *batch, *columns):
        sizes, inverted = (*(b * m for b in batch), *(b * n for b in batch)), (*batch, *columns, *batch, *rows)
    elif shape == (*rows, *columns):
        sizes, inverted = (m, n), (*columns, *rows)
    else:
        raise InputError(
            f'a Jacobian of layout "blocks" or "full", or one without a batch, is needed for outputs {rows} and '
            f"inputs {columns} of a sample; this has shape {shape}"
        )
    return jacobian.reshape(sizes), lambda inverses: inverses.reshape(inverted)


def _check(matrices: Tensor, what: str) -> None:
    if matrices.ndim < 2 or matrices.dtype not in INVERSES:
        raise InputError(
            f"{what} expects real floating-point matrices (*lead, m, n), got {matrices.dtype} of shape "
            f"{tuple(matrices.shape)}. Convert the dtype, or add the axes of a matrix"
        )


def _inverse_value(matrices: Tensor, stored: torch.dtype) -> Tensor:
    with outside_autocast():
        inverses, singular = solve(matrices, stored)
        if not bool(singular.any()):
            return inverses
        finite = largest_of_each(matrices).isfinite()
        # one sample's NaN hides the zeros that the others share, and what a library makes of NaN is up to it
        stand_in = torch.eye(*matrices.shape[-2:], dtype=matrices.dtype, device=matrices.device)
        _, singular = solve(torch.where(finite[..., None, None], matrices, stand_in), stored)
    raise refusal(singular, ~finite, square=matrices.shape[-2] == matrices.shape[-1])


def _inverse_or_nan(matrices: Tensor) -> Tensor:
    with outside_autocast():
        inverses, singular = solve(matrices, matrices.dtype)
        return inverses.masked_fill(singular[..., None, None], torch.nan)


def _inverse_push(matrices: Tensor, inverses: Tensor, tangent: Tensor) -> Tensor:
    """Return dX = -X dA X plus, at full rank, the one term by which a rectangular inverse moves its null space.

    Golub and Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
    separate", SIAM J. Numer. Anal. 10 (1973).
    """
    m, n = matrices.shape[-2:]
    with outside_autocast():
        derivative = -inverses @ tangent @ inverses
        if m > n:
            term = inverses @ (inverses.mT @ tangent.mT)
            derivative = derivative + term - term @ matrices @ inverses
        elif m < n:
            term = (tangent.mT @ inverses.mT) @ inverses
            derivative = derivative + term - inverses @ (matrices @ term)
    return derivative


def _inverse_pull(matrices: Tensor, inverses: Tensor, cotangent: Tensor) -> Tensor:
    """Return the adjoint of `_inverse_push`, which is the same formula for the transposed matrices."""
    return _inverse_push(matrices.mT, inverses.mT, cotangent)


def _slogdet_value(matrices: Tensor) -> Tensor:
    """Return sign and logarithm in one tensor, (*lead, 2), since a rule has one value."""
    with outside_autocast():
        if any(triangles(matrices)):
            diagonal = matrices.diagonal(dim1=-2, dim2=-1)
            sign, logabsdet = diagonal.sign().prod(-1), diagonal.abs().log().sum(-1)
        else:
            sign, logabsdet = torch.linalg.slogdet(matrices)
        finite = largest_of_each(matrices).isfinite()
        return torch.stack([sign, logabsdet], -1).masked_fill(~finite[..., None], torch.nan)


def _slogdet_pull(matrices: Tensor, _: Tensor, cotangent: Tensor) -> Tensor:
    weight = cotangent[..., 1, None, None]
    inverses = by_rule(matrices, INVERSE_OR_NAN)
    # a caller who masks singular samples out gets zeros for them
    return weight * inverses.masked_fill(inverses.isnan() & weight.eq(0), 0).mT


def _slogdet_push(matrices: Tensor, _: Tensor, tangent: Tensor) -> Tensor:
    derivative = (by_rule(matrices, INVERSE_OR_NAN).mT * tangent).sum(-1).sum(-1)
    return torch.stack([torch.zeros_like(derivative), derivative], -1)


def refusal(singular: Tensor, not_finite: Tensor, square: bool) -> SingularJacobianError:
    """Return the error that names the samples."""
    samples = [tuple(flags.flatten().nonzero().flatten().tolist()) for flags in (singular, not_finite)]
    flaws = ["singular" if square else "rank-deficient", "not finite"]
    advice = [
        "damp what is singular, as in (JᵀJ + λI)⁻¹Jᵀ, or leave it out",
        "look for a division by zero, or a root or logarithm at zero, where it is not finite",
    ]
    if singular.ndim:
        flawed = [f"{_count(at)} {flaw} ({_name(at)})" for at, flaw in zip(samples, flaws, strict=True) if at]
        count, _, rest = " and ".join(flawed).partition(" ")
        text = f"{count} of {singular.numel()} Jacobians {rest}"
    else:
        text = f"the Jacobian is {flaws[0] if samples[0] else flaws[1]}"
    advice = [line for line, at in zip(advice, samples, strict=True) if at]
    return SingularJacobianError(f"{text}: {'; '.join(advice)}", *samples)


def _count(samples: tuple[int, ...]) -> str:
    return "1 is" if len(samples) == 1 else f"{len(samples)} are"


def _name(samples: tuple[int, ...]) -> str:
    more = f" and {len(samples) - NAMED} more" if len(samples) > NAMED else ""
    return f"sample{'s' if len(samples) > 1 else ''} {', '.join(map(str, samples[:NAMED]))}{more}"


INVERSES = {
    dtype: MatrixRule(partial(_inverse_value, stored=dtype), _inverse_pull, _inverse_push)
    for dtype in (torch.float64, torch.float32, *HALVES)
}
INVERSE_OR_NAN = MatrixRule(_inverse_or_nan, _inverse_pull, _inverse_push)
SLOGDET = MatrixRule(_slogdet_value, _slogdet_pull, _slogdet_push)
