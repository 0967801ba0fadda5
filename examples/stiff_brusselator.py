"""Implicit time stepping of a stiff reaction and diffusion, by sparse Jacobians and a sparse solver.

The Brusselator on a periodic square of N × N cells (Hairer & Wanner, "Solving Ordinary Differential Equations II",
IV.10): two species react and diffuse, 2N² unknowns. Explicit steps are bound by the diffusion across one cell, however
slowly the pattern changes. An implicit step needs J = ∂f/∂y and solves with I − γ·τ·J. Dense, J is 2N² × 2N², and the
solve is cubic in 2N²; but each rate depends on six values only.

What it shows: `AutoJacobian(rate, in_dims=None, layout="sparse")` finds the pattern by itself, colors its columns, and
gives a sparse matrix that goes to SciPy's solver by `autojac.to_scipy`. The same steps with `torch.func.jacrev` and a
dense solve end in the same state, later. A picture of the pattern and its coloring is written, if plotly is installed.

The steps are ROS2 (Verwer, Spee, Blom & Hundsdorfer, "A second-order Rosenbrock method applied to photochemical
dispersion problems", SIAM J. Sci. Comput. 20, 1999): one Jacobian and two solves each, second order, L-stable.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from autojac import AutoJacobian, Pattern, UnsupportedError, to_scipy
from autojac.report import spy
from autojac.sparse.colorings import orthogonal

CACHE = Path(__file__).resolve().parents[1] / "cache" / "autojac.db"
A, B, DIFFUSION = 3.4, 1.0, 0.1
GAMMA = 1 - 0.5**0.5

Solve = Callable[[Tensor], Tensor]


class Brusselator(torch.nn.Module):
    """The rates of change (2N²,) of concentrations u and v (2N²,) on a grid of N × N cells."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.strength = size, DIFFUSION * size * size

    def forward(self, state: Tensor) -> Tensor:
        u, v = state.view(2, self.size, self.size)
        reaction = u * u * v
        du = B + reaction - (A + 1) * u + self.strength * laplacian(u)
        dv = A * u - reaction + self.strength * laplacian(v)
        return torch.stack((du, dv)).view(-1)


def laplacian(z: Tensor) -> Tensor:
    """Five-point differences of (N, N) cells without their width."""
    return z.roll(1, 0) + z.roll(-1, 0) + z.roll(1, 1) + z.roll(-1, 1) - 4 * z


def start(size: int) -> Tensor:
    """The initial concentrations of Hairer & Wanner, (2N²,), float64."""
    at = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    u = 22 * at * (1 - at).pow(1.5)
    v = 27 * at * (1 - at).pow(1.5)
    return torch.cat((u[:, None].expand(size, size).reshape(-1), v.repeat(size)))


def factor_sparse(jacobian: Tensor, step: float) -> Solve:
    """Solves with I − γ·τ·J for a sparse J."""
    matrix = to_scipy(jacobian)
    system = scipy.sparse.eye_array(matrix.shape[0], format="csc") - GAMMA * step * matrix.tocsc()
    factors = scipy.sparse.linalg.splu(system)
    return lambda right: torch.from_numpy(factors.solve(right.numpy()))


def factor_dense(jacobian: Tensor, step: float) -> Solve:
    """The same for a dense J."""
    factors = torch.linalg.lu_factor(torch.eye(len(jacobian), dtype=jacobian.dtype) - GAMMA * step * jacobian)
    return lambda right: torch.linalg.lu_solve(*factors, right[:, None])[:, 0]


def integrate(
    rate: Brusselator,
    jacobian: Callable[[Tensor], Tensor],
    factor: Callable[[Tensor, float], Solve],
    until: float,
    steps: int,
) -> tuple[Tensor, float, float]:
    """ROS2 from the start on: the last state, and the seconds that Jacobians and solves took."""
    state, step = start(rate.size), until / steps
    differentiating = solving = 0.0
    for _ in range(steps):
        begun = time.perf_counter()
        matrix = jacobian(state)
        made = time.perf_counter()
        solve = factor(matrix, step)
        first = solve(rate(state))
        second = solve(rate(state + step * first) - 2 * first)
        solving += time.perf_counter() - made
        differentiating += made - begun
        state = state + step * (1.5 * first + 0.5 * second)
    return state, differentiating, solving


def draw(pattern: Pattern, path: str) -> str:
    """Write the picture; what to say of it."""
    try:
        return f"picture of the pattern and its coloring: {spy(pattern, path, orthogonal(pattern, 'columns'))}"
    except UnsupportedError as error:
        return f"no picture: {error}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="A stiff Brusselator by implicit steps with sparse Jacobians.")
    parser.add_argument("--size", type=int, default=32, help="cells along a side; 2·size² unknowns")
    parser.add_argument("--until", type=float, default=1.0, help="time to integrate to")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dense-steps", type=int, default=2, help="steps to repeat with dense Jacobians")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds that the search may take")
    parser.add_argument("--picture", default=str(CACHE.parent / "brusselator.html"), help="where to write it")
    parser.add_argument("--store", default=os.environ.get("AUTOJAC_STORE", str(CACHE)))
    options = parser.parse_args(argv)

    rate = Brusselator(options.size)
    jac = AutoJacobian(
        rate, in_dims=None, layout="sparse", on_miss="tune", budget_s=options.budget, store=options.store
    )
    with torch.no_grad():
        begun = time.perf_counter()
        plan = jac.plan(start(options.size))
        tuning_s = time.perf_counter() - begun
        explanation = jac.explain(start(options.size))
        sparsity = plan.structure.sparsity
        assert sparsity is not None and sparsity.features is not None
        pattern = sparsity.features
        state, sparse_s, sparse_solve_s = integrate(rate, jac, factor_sparse, options.until, options.steps)

        until = options.until * options.dense_steps / options.steps
        near, _, _ = integrate(rate, jac, factor_sparse, until, options.dense_steps)
        jacrev = torch.func.jacrev(rate)
        far, dense_s, dense_solve_s = integrate(rate, jacrev, factor_dense, until, options.dense_steps)
    difference = float((near - far).abs().max() / far.abs().max())
    # explicit Euler is stable while no mode grows: the fastest decays at eight times the strength of diffusion
    explicit = int(np.ceil(options.until * 8 * rate.strength / 2))

    unknowns = 2 * options.size**2
    print(explanation)
    print(f"{unknowns} unknowns, {pattern.count} entries of {unknowns**2}")
    print(f"plan {plan}, from {plan.source}, ready after {tuning_s:.1f} s")
    print(f"{options.steps} implicit steps; explicit Euler needs at least {explicit} to stay stable")
    each, dense = 1e3 / options.steps, 1e3 / options.dense_steps
    print(f"a sparse step: {sparse_s * each:.1f} ms for J, {sparse_solve_s * each:.1f} ms to solve")
    print(f"a dense step:  {dense_s * dense:.0f} ms for J, {dense_solve_s * dense:.0f} ms to solve")
    print(f"relative difference after {options.dense_steps} steps of both: {difference:.1e}")
    drawn = draw(pattern, options.picture)
    print(drawn)
    return {
        "plan": plan,
        "pattern": pattern,
        "explanation": explanation,
        "state": state,
        "difference": difference,
        "sparse_s": sparse_s,
        "dense_s": dense_s,
        "explicit": explicit,
        "drawn": drawn,
    }


if __name__ == "__main__":
    main()
