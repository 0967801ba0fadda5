"""The same Jacobian by asdex on JAX, where it is installed: sparse automatic differentiation with the same stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autojac.bench.coupled import DIFFUSION, A, B
from autojac.bench.extra import loaded


@dataclass(frozen=True)
class Rival:
    """asdex, ready to race.

    Attributes:
        colors: passes that it needs.
        runs: detection and the compiled Jacobian.
        dense: its Jacobian, to be compared.
    """

    colors: int
    runs: dict[str, Callable[[], object]]
    dense: Callable[[], Tensor]


def prepared(size: int, x: Tensor) -> Rival | str:
    """Return the Brusselator's Jacobian by asdex, compiled; why not, where it can't be had."""
    found = loaded("jax", "asdex")
    if isinstance(found, str):
        return found
    jax, library = found
    jnp = jax.numpy
    func = _brusselator(size, jnp)
    point = jnp.asarray(x.numpy())
    coloring = library.jacobian_coloring(func, point)
    jacobian = jax.jit(library.jacobian_from_coloring(func, coloring))
    jacobian(point)

    def run() -> object:
        return jacobian(point).data.block_until_ready()

    def dense() -> Tensor:
        return torch.from_numpy(jax.device_get(jacobian(point).todense()).copy())

    runs = {"asdex detection": lambda: library.jacobian_sparsity(func, point), "asdex": run}
    return Rival(int(coloring.num_colors), runs, dense)


def _brusselator(size: int, jnp: Any) -> Callable[[Any], Any]:
    """As `autojac.bench.coupled.brusselator`, for JAX."""
    strength = DIFFUSION * size * size

    def laplacian(z: Any) -> Any:
        return jnp.roll(z, 1, 0) + jnp.roll(z, -1, 0) + jnp.roll(z, 1, 1) + jnp.roll(z, -1, 1) - 4 * z

    def func(state: Any) -> Any:
        u, v = state.reshape(2, size, size)
        reaction = u * u * v
        du = B + reaction - (A + 1) * u + strength * laplacian(u)
        dv = A * u - reaction + strength * laplacian(v)
        return jnp.stack((du, dv)).reshape(-1)

    return func
