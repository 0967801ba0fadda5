"""The whole batch's Jacobian at one point as a linear operator, for SciPy's solvers and for tensors."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from autojac.api.low_rank_factors import LowRankJacobian
from autojac.errors import InputError
from autojac.sparse.csr import Entries

Times = Callable[[Tensor], Tensor]


class LinearMap(NamedTuple):
    """How a Jacobian multiplies: vectors (k, *in) from the right and (k, *out) from the left, both of the whole batch.

    Attributes:
        form: "sparse", "low-rank" or "matrix-free".
        times, back: J v and uᵀJ.
        outputs, inputs: shapes of the whole batch's.
        like: a tensor of the dtype and on the device of both.
    """

    form: str
    times: Times
    back: Times
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    like: Tensor


class JacobianOperator(LinearOperator):  # type: ignore[misc]
    """The Jacobian of the whole batch, (B·m, B·n), at one point: it takes NumPy arrays and tensors.

    A `scipy.sparse.linalg.LinearOperator`, so that SciPy's `lsqr`, `gmres`, `svds` and others take it. A tensor (B,
    *in), or flat, times it from the right gives a tensor (B, *out), without a detour by NumPy; `rmatvec` takes (B,
    *out) to (B, *in). Nothing here carries a graph.

    Attributes:
        form: `"sparse"`, `"low-rank"` or `"matrix-free"`: how it multiplies.
    """

    def __init__(self, linear_map: LinearMap) -> None:
        self.form = linear_map.form
        self._map = linear_map
        dtype = np.dtype(str(linear_map.like.dtype).removeprefix("torch."))
        super().__init__(dtype, (prod(linear_map.outputs), prod(linear_map.inputs)))

    def matvec(self, x: Any) -> Any:
        """Return J x, as a tensor (B, *out) for a tensor (B, *in), as an array for an array."""
        return self._tensor(x, True) if isinstance(x, Tensor) else super().matvec(x)

    def rmatvec(self, x: Any) -> Any:
        """Return Jᵀx, as a tensor (B, *in) for a tensor (B, *out), as an array for an array."""
        return self._tensor(x, False) if isinstance(x, Tensor) else super().rmatvec(x)

    def dot(self, x: Any) -> Any:
        return self.matvec(x) if isinstance(x, Tensor) else super().dot(x)

    def __matmul__(self, x: Any) -> Any:
        return self.dot(x) if isinstance(x, Tensor) else super().__matmul__(x)

    def _matvec(self, x: Any) -> Any:
        return self._array(x, True)[:, 0]

    def _rmatvec(self, x: Any) -> Any:
        return self._array(x, False)[:, 0]

    def _matmat(self, x: Any) -> Any:
        return self._array(x, True)

    def _rmatmat(self, x: Any) -> Any:
        return self._array(x, False)

    def _array(self, x: Any, forward: bool) -> Any:
        like = self._map.like
        columns = torch.from_numpy(np.array(x).reshape(len(x), -1).T.copy()).to(like)
        return self._apply(columns, forward).flatten(1).T.cpu().numpy()

    def _tensor(self, x: Tensor, forward: bool) -> Tensor:
        wanted = self._map.inputs if forward else self._map.outputs
        if x.numel() != prod(wanted) or x.is_complex():
            raise InputError(
                f"a real tensor of shape {wanted} was expected, got {x.dtype} of shape {tuple(x.shape)}. Pass one "
                "vector for the whole batch"
            )
        return self._apply(x.detach().reshape(1, -1).to(self._map.like), forward)[0]

    def _apply(self, rows: Tensor, forward: bool) -> Tensor:
        linear_map = self._map
        shape, run = (linear_map.inputs, linear_map.times) if forward else (linear_map.outputs, linear_map.back)
        with torch.no_grad():
            return run(rows.reshape(-1, *shape))


def of_entries(entries: Entries, values: Tensor, outputs: tuple[int, ...], inputs: tuple[int, ...]) -> LinearMap:
    """Return how a sparse Jacobian multiplies."""
    detached = values.detach()

    def times(v: Tensor) -> Tensor:
        return torch.stack([entries.push(detached, one.flatten()).reshape(outputs) for one in v])

    def back(u: Tensor) -> Tensor:
        return torch.stack([entries.pull(detached, one.flatten()).reshape(inputs) for one in u])

    return LinearMap("sparse", times, back, outputs, inputs, detached)


def of_factors(factors: LowRankJacobian) -> LinearMap:
    """Return how a block diagonal plus a product of low rank multiplies."""
    detached = LowRankJacobian(*(part.detach() for part in factors))
    outputs, inputs = tuple(detached.U.shape[:-1]), tuple(detached.V.shape[1:])
    batch = outputs[0]
    blocks = detached.D.reshape(batch, prod(outputs[1:]), prod(inputs[1:]))
    U, V = detached.U.reshape(prod(outputs), len(detached.V)), detached.V.reshape(len(detached.V), prod(inputs))

    def times(v: Tensor) -> Tensor:
        flat = v.reshape(len(v), -1)
        per_sample = torch.einsum("bmn,kbn->kbm", blocks, v.reshape(len(v), batch, -1))
        return (per_sample.reshape(len(v), -1) + flat @ V.T @ U.T).reshape(-1, *outputs)

    def back(u: Tensor) -> Tensor:
        flat = u.reshape(len(u), -1)
        per_sample = torch.einsum("bmn,kbm->kbn", blocks, u.reshape(len(u), batch, -1))
        return (per_sample.reshape(len(u), -1) + flat @ U @ V).reshape(-1, *inputs)

    return LinearMap("low-rank", times, back, outputs, inputs, detached.D)
