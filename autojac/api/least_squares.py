"""Damped least squares for batches of matrices, sparse matrices, and matrices given by their products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autojac.api.inversion import MARGIN
from autojac.api.linalg import HALVES, NAMED, refusal
from autojac.autodiff.implicit import attach_implicit_derivative
from autojac.errors import SearchError, SingularJacobianError, plural
from autojac.sparse.csr import Entries

Times = Callable[[Tensor], Tensor]
System = tuple[Tensor, Tensor, Tensor]
"""Matrices (B, m, n), residuals (B, m) and λ (B, 1)."""
MOST_STEPS = 10
"""Steps of conjugate gradients at most, as a multiple of the unknowns: without rounding, one would suffice."""
CONVERGED = 256
"""Multiple of eps that the gradient of a solution may be, relative to that of zero: what rounding leaves of it."""
INVERSE_STEPS = 3
"""Steps of inverse iteration after which the null space stands out."""


def least_squares(matrices: Tensor, residuals: Tensor, damping: Tensor) -> Tensor:
    """Return argmin ‖J d + r‖² + λ‖d‖² for each matrix J, the shortest one where several are least.

    By Cholesky factors of JᵀJ + λI, or of JJᵀ + λI for fewer rows than columns, scaled to a unit diagonal, and one step
    of iterative refinement with residuals of J itself (corrected seminormal equations: Björck, "Stability analysis of
    the method of seminormal equations for linear least squares problems", Linear Algebra Appl. 88 (1987)). On a CPU
    float32 is converted to float64 for it, which leaves nothing to refine. Samples whose factors are too
    ill-conditioned are solved by QR of [J; √λ I] in their own dtype, which also detects singular ones.

    Args:
        matrices: (B, m, n).
        residuals: (B, m).
        damping: λ, () or (B,), zero or more.

    Returns:
        (B, n), differentiable any number of times.

    Raises:
        SingularJacobianError: naming the samples that have no unique solution, to rounding, or are not finite.
    """
    stored = matrices.dtype
    if stored in HALVES:
        matrices, residuals, damping = matrices.float(), residuals.float(), damping.float()
    own = matrices.detach(), residuals.detach(), damping.detach().expand(len(matrices))[:, None]
    if matrices.device.type == "cpu":
        matrices, residuals, damping = matrices.double(), residuals.double(), damping.double()
    shift = damping.expand(len(matrices))[:, None]
    tall = matrices.shape[1] >= matrices.shape[2]
    with torch.no_grad():
        solution = _solve(own, (matrices.detach(), residuals.detach(), shift.detach()), tall)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (matrices, residuals, damping)):
        # a step of Newton's method from the solution, which has its derivatives of first and second order
        A, error = _normal_matrix(matrices, shift, tall), _error(matrices, residuals, shift, solution, tall)
        solution = solution - torch.cholesky_solve(error[..., None], torch.linalg.cholesky_ex(A).L)[..., 0]
    if not tall:
        solution = -_times(matrices.mT, solution)
    return solution.to(stored)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors[..., None])[..., 0]


def _normal_matrix(J: Tensor, shift: Tensor, tall: bool) -> Tensor:
    """Return JᵀJ + λI, or JJᵀ + λI for fewer rows than columns."""
    A: Tensor = J.mT @ J if tall else J @ J.mT
    return A + shift[..., None] * torch.eye(A.shape[-1], dtype=J.dtype, device=J.device)


def _error(J: Tensor, r: Tensor, shift: Tensor, solution: Tensor, tall: bool) -> Tensor:
    """Return the residual of a solution in the normal equations."""
    if tall:
        return _times(J.mT, _times(J, solution) + r) + shift * solution
    return _times(J, _times(J.mT, solution)) + shift * solution - r


def _solve(own: System, system: System, tall: bool) -> Tensor:
    """Return d with (JᵀJ + λI) d = -Jᵀr, or z with (JJᵀ + λI) z = r, of which d = -Jᵀz.

    Args:
        own: J, r and λ in their own dtype.
        system: the same in the dtype of the computation.
        tall: there are as many rows as columns, or more.
    """
    J, r, shift = system
    A, error = _normal_matrix(J, shift, tall), _times(J.mT, r) if tall else -r
    if not A.numel():
        return torch.zeros_like(error)
    scale = A.diagonal(dim1=1, dim2=2).rsqrt()
    factor, info = torch.linalg.cholesky_ex(A * scale[:, :, None] * scale[:, None, :])

    def solve(right: Tensor) -> Tensor:
        return scale * torch.cholesky_solve((scale * right)[..., None], factor)[..., 0]

    solution = -solve(error)
    if J.dtype == own[0].dtype:
        solution = solution - solve(_error(J, r, shift, solution, tall))
    pivots = factor.diagonal(dim1=1, dim2=2).amin(-1).square()
    good = info.eq(0) & (pivots > torch.finfo(J.dtype).eps ** 0.5) & solution.isfinite().all(-1)
    if not bool(good.all()):
        poor = torch.nonzero(~good)[:, 0]
        solution[poor] = _by_qr(own, scale, tall, poor).to(solution.dtype)
    return solution


def _by_qr(own: System, scale: Tensor, tall: bool, numbers: Tensor) -> Tensor:
    """Return the solutions for some of the samples, or name those that are singular.

    Args:
        own: of all samples.
        scale: of the unknowns of all samples.
        tall: as of `_solve`.
        numbers: of the samples.
    """
    batch, J, r, shift = len(own[0]), *(t[numbers] for t in own)
    scale = scale[numbers].to(J.dtype)
    finite = _are_finite(J) & _are_finite(r) & _are_finite(shift)
    if not bool(finite.all()):
        J, r = (torch.where(finite.view(-1, *[1] * (t.dim() - 1)), t, 1) for t in (J, r))
    columns = J.mT if tall else J
    count, size, rows = columns.shape
    is_damped = bool(shift.any())
    # with the right-hand side as another column, R holds its product with Q, which is never formed
    whole = J.new_zeros(count, size + tall, rows + is_damped * size)
    whole[:, :size, :rows] = columns
    if is_damped:
        whole[:, :size, rows:] = shift.sqrt()[..., None] * torch.eye(size, dtype=J.dtype, device=J.device)
    if tall:
        whole[:, size, :rows] = r
    R = torch.linalg.qr(whole.mT, mode="r").R
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1)
    right, R = R[:, :size, -1], R[:, :size, :size] * scale[:, None]
    inverse = torch.linalg.solve_triangular(R, torch.eye(size, dtype=J.dtype, device=J.device).expand_as(R), upper=True)
    condition = R.abs().sum(1).amax(-1) * inverse.abs().sum(1).amax(-1)
    singular = ~(condition * (MARGIN * torch.finfo(J.dtype).eps) <= 1) & finite
    if bool((singular | ~finite).any()):
        blank = torch.zeros(batch, dtype=torch.bool, device=J.device)
        flaws = [blank.index_put((numbers,), flags) for flags in (singular, ~finite)]
        raise refusal(flaws[0], flaws[1], square=False)
    if tall:
        return -scale * _times(inverse, right)
    return scale * _times(inverse, _times(inverse.mT, scale * r))


def _are_finite(tensors: Tensor) -> Tensor:
    """Check for each tensor (B, ...) whether all of it is finite, a tenth of the time of reducing booleans."""
    return (0 * tensors).flatten(1).sum(1) == 0


def sparse_least_squares(entries: Entries, values: Tensor, residual: Tensor, damping: Tensor, samples: int) -> Tensor:
    """Return argmin ‖J d + r‖² + λ‖d‖² for one sparse matrix J, by factors of JᵀJ + λI that are sparse as well.

    SciPy's SuperLU in symmetric mode, pivots on the diagonal, ordered by minimum degree; one step of refinement.

    Args:
        entries, values: of J, of at least as many rows as columns, or damped.
        residual: (rows,).
        damping: λ, ().
        samples: among which the unknowns are divided.

    Returns:
        (columns,), differentiable once.

    Raises:
        SingularJacobianError: naming a sample of the null space, or those that are not finite.
    """
    from scipy.sparse import csr_array, diags_array, eye_array
    from scipy.sparse.linalg import splu

    rows, columns = entries.pattern.shape
    detached, right, shift = values.detach(), residual.detach(), float(damping.detach())
    for tensor, at in ((detached, entries.pattern.rows), (right, np.arange(rows))):
        wrong = ~tensor.isfinite().cpu().numpy()
        if wrong.any():
            flags = torch.zeros(samples, dtype=torch.bool)
            flags[torch.from_numpy(np.unique(at[wrong] // (rows // samples)).astype(np.int64))] = True
            raise refusal(torch.zeros_like(flags), flags, square=False)
    exact = detached.double().cpu().numpy()
    J = csr_array((exact, entries.pattern.columns, entries.pattern.starts), shape=(rows, columns))
    A = (J.T @ J + shift * eye_array(columns)).tocsc()
    diagonal = A.diagonal()
    scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1))
    per_sample = max(1, columns // samples)
    if not (diagonal > 0).all():
        raise _singular(np.unique(np.nonzero(~(diagonal > 0))[0] // per_sample), samples)
    scaled = (diags_array(scale) @ A @ diags_array(scale)).tocsc()
    options: dict[str, Any] = {"SymmetricMode": True}
    try:
        factor = splu(scaled, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
    except RuntimeError:  # exactly singular; moved a little, its null space stands out
        factor = None
    if factor is None or np.abs(factor.U.diagonal()).min() < columns * MARGIN * np.finfo(np.float64).eps:
        shifted = splu((scaled + 1e-10 * eye_array(columns)).tocsc())
        vector = np.random.default_rng(0).standard_normal(columns)
        for _ in range(INVERSE_STEPS):
            vector = shifted.solve(vector / np.linalg.norm(vector))
        raise _singular(np.array([np.abs(vector).argmax() // per_sample]), samples)

    def solve(y: Tensor) -> Tensor:
        solution = scale * factor.solve(scale * y.detach().double().cpu().numpy())
        return torch.from_numpy(solution).to(y)

    def error(values: Tensor, residual: Tensor, damping: Tensor, d: Tensor) -> Tensor:
        return entries.pull(values, entries.push(values, d) + residual) + damping * d

    with torch.no_grad():
        start = right.new_zeros(columns)
        for _ in range(2):
            start = start - solve(error(detached, right, damping.detach(), start))
    return attach_implicit_derivative(start, error(values, residual, damping, start), solve)


def _singular(numbers: np.ndarray[Any, Any], samples: int) -> SingularJacobianError:
    flags = torch.zeros(samples, dtype=torch.bool)
    flags[torch.from_numpy(numbers.astype(np.int64))] = True
    return refusal(flags, torch.zeros_like(flags), square=False)


def matrix_free_least_squares(times: Times, back: Times, residual: Tensor, damping: Tensor, size: int) -> Tensor:
    """Return argmin ‖J d + r‖² + λ‖d‖² for each sample, by conjugate gradients on products with J alone.

    CGLS from zero, which finds the shortest solution: Björck, Elfving and Strakoš, "Stability of conjugate gradient and
    Lanczos methods for linear least squares problems", SIAM J. Matrix Anal. Appl. 19 (1998).

    Args:
        times: (B, n) ↦ J v, (B, m).
        back: (B, m) ↦ Jᵀu, (B, n).
        residual: (B, m).
        damping: λ, () or (B, 1).
        size: n.

    Returns:
        (B, n), differentiable once.

    Raises:
        SearchError: if it does not converge.
    """
    wide = residual.shape[1] < size
    forth, again, count = (back, times, residual.shape[1]) if wide else (times, back, size)

    def solve(y: Tensor) -> Tensor:
        with torch.no_grad():
            return _conjugate_gradients(forth, again, None, y, damping.detach(), count)

    def error(solution: Tensor, r: Tensor, shift: Tensor) -> Tensor:
        """Return what a solution misses the normal equations by: of d, or for fewer rows than columns of d = -Jᵀz."""
        if wide:
            return times(back(solution)) + shift * solution - r
        return back(times(solution) + r) + shift * solution

    with torch.no_grad():
        r, shift = residual.detach(), damping.detach()
        if wide:
            solution = solve(r)
            solution = solution - solve(error(solution, r, shift))
        else:
            solution = _conjugate_gradients(times, back, -r, None, shift, size)
    if torch.is_grad_enabled():
        solution = attach_implicit_derivative(solution, error(solution, residual, damping), solve)
    return -back(solution) if wide else solution


def _conjugate_gradients(
    times: Times, back: Times, right: Tensor | None, normal_right: Tensor | None, damping: Tensor, size: int
) -> Tensor:
    """Return x with (JᵀJ + λI) x = Jᵀ right, or a `given` right-hand side."""
    like = right if right is not None else normal_right
    assert like is not None
    x = like.new_zeros(len(like), size)
    gradient = back(right) if right is not None else like
    tolerance = CONVERGED * torch.finfo(x.dtype).eps * gradient.norm(dim=1, keepdim=True)
    direction, power, rest = gradient, gradient.square().sum(1, keepdim=True), right
    for _ in range(MOST_STEPS * size + 1):
        if bool((gradient.norm(dim=1, keepdim=True) <= tolerance).all()):
            return x
        image = times(direction)
        curvature = image.square().sum(1, keepdim=True) + damping * direction.square().sum(1, keepdim=True)
        step = torch.where(curvature > 0, power / curvature, 0)
        x = x + step * direction
        if rest is not None:
            rest = rest - step * image
            gradient = back(rest) - damping * x
        else:
            gradient = gradient - step * (back(image) + damping * direction)
        before, power = power, gradient.square().sum(1, keepdim=True)
        direction = gradient + torch.where(before > 0, power / before, 0) * direction
    poor = torch.nonzero((gradient.norm(dim=1, keepdim=True) > tolerance)[:, 0])[:, 0].tolist()
    names = f"{', '.join(map(str, poor[:NAMED]))}{', ...' * (len(poor) > NAMED)}"
    raise SearchError(
        f"conjugate gradients were expected to converge in {MOST_STEPS * size} steps, but did not in "
        f"{plural(len(poor), 'system')} ({names}). Pass damping, or raise memory_limit to have the Jacobian formed"
    )
