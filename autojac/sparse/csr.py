"""The entries that a sparse Jacobian stores, in the order of its compressed rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from autojac.core.pattern import Pattern, Sparsity
from autojac.core.structure import Structure
from autojac.errors import InputError
from autojac.guards.process_state import ignore_warnings

if TYPE_CHECKING:
    import scipy.sparse


@dataclass(frozen=True, eq=False)
class Entries:
    """The stored entries of one Jacobian (B·m, B·n), or (B·m, n) of an input that all samples share.

    Attributes:
        pattern: of the whole matrix.
    """

    pattern: Pattern

    @functools.cached_property
    def _copies(self) -> dict[torch.device, tuple[Tensor, ...]]:
        return {}

    def indices(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return where the rows start, and the row and column of each entry, all int64; made once for each device."""
        if device not in self._copies:
            parts = (self.pattern.starts, self.pattern.rows, self.pattern.columns)
            self._copies[device] = tuple(torch.from_numpy(part.astype(np.int64)).to(device) for part in parts)
        return self._copies[device]

    def matrix(self, values: Tensor) -> Tensor:
        """Return the sparse CSR tensor that holds these values, differentiable in them."""
        starts, _, columns = self.indices(values.device)
        return torch.sparse_csr_tensor(starts, columns, values, self.pattern.shape, check_invariants=False)

    def of_rows(self, rows: Tensor, start: int) -> Tensor:
        """Return the entries of some dense rows (c, columns), of which the first is number `start`."""
        first, last = (int(self.pattern.starts[number]) for number in (start, start + len(rows)))
        _, numbers, columns = self.indices(rows.device)
        return rows[numbers[first:last] - start, columns[first:last]]

    def row(self, values: Tensor, row: int) -> Tensor:
        """Return one row of the matrix, dense."""
        entries, columns = self._of_row(row, values.device)
        return values.new_zeros(self.pattern.shape[1]).index_put((columns,), values[entries])

    def stored_columns(self, row: int, device: torch.device) -> Tensor:
        """Return which columns of a row are stored: (columns,) bool."""
        stored = torch.zeros(self.pattern.shape[1], dtype=torch.bool, device=device)
        stored[self._of_row(row, device)[1]] = True
        return stored

    def _of_row(self, row: int, device: torch.device) -> tuple[slice, Tensor]:
        """Return where the entries of a row are among all, and their columns."""
        entries = slice(*(int(end) for end in self.pattern.starts[row : row + 2]))
        return entries, self.indices(device)[2][entries]

    def pull(self, values: Tensor, cotangent: Tensor) -> Tensor:
        """Return a cotangent (rows,) times the matrix."""
        _, rows, columns = self.indices(values.device)
        return values.new_zeros(self.pattern.shape[1]).index_add(0, columns, cotangent[rows] * values)

    def push(self, values: Tensor, tangent: Tensor) -> Tensor:
        """Return the matrix times a tangent (columns,)."""
        _, rows, columns = self.indices(values.device)
        return values.new_zeros(self.pattern.shape[0]).index_add(0, rows, values * tangent[columns])


def sample_graph(structure: Structure, batch: int, shared: bool) -> Pattern:
    """Return the samples that each sample's output depends on; of an input that all share there is but one copy."""
    if shared:
        return Pattern.full(batch, 1)
    if structure.independent:
        return Pattern.diagonal(batch)
    samples = structure.samples
    return Pattern.full(batch, batch) if samples is None else samples


def feature_pattern(sparsity: Sparsity | None, rows: tuple[int, int], columns: tuple[int, int]) -> Pattern:
    """Return the pattern inside a sample between the features of one output and one input, both as (start, stop)."""
    features = None if sparsity is None else sparsity.features
    if features is None:
        return Pattern.full(rows[1] - rows[0], columns[1] - columns[0])
    if (rows, columns) == ((0, features.shape[0]), (0, features.shape[1])):
        return features
    return Pattern.of(features.scipy()[rows[0] : rows[1], columns[0] : columns[1]])


@functools.lru_cache(maxsize=16)
def entries(samples: Pattern, features: Pattern) -> Entries:
    """Return all entries of a Jacobian: those of the sample graph, each with the whole pattern inside a sample."""
    _load_sparse()
    if samples.shape == (1, 1):
        return Entries(features)
    # 0.2 s to import
    import scipy.sparse

    whole = scipy.sparse.kron(samples.scipy(), features.scipy(), format="csr")
    whole.sort_indices()
    return Entries(Pattern.from_csr(whole))


@functools.cache
def _load_sparse() -> None:
    """Make torch's first sparse matrix, which warns that they are in beta, before a user's call does."""
    nothing = torch.zeros(2, dtype=torch.int64)
    with ignore_warnings():
        torch.sparse_csr_tensor(nothing, nothing[:0], torch.zeros(0), (1, 1), check_invariants=False)


def to_scipy(jacobian: Tensor) -> scipy.sparse.csr_array:
    """Return a sparse Jacobian as SciPy takes it, for its solvers; on a CPU it shares the tensor's memory.

    Args:
        jacobian: 2-D sparse CSR, as `layout="sparse"` gives; it is detached.

    Raises:
        InputError: if it is stored in another way.
    """
    import scipy.sparse

    if jacobian.layout != torch.sparse_csr:
        raise InputError(
            f"a sparse CSR tensor was expected, got one stored as {jacobian.layout}. Compute it with layout='sparse'"
        )
    matrix = jacobian.detach()
    parts = (matrix.values(), matrix.col_indices(), matrix.crow_indices())
    return scipy.sparse.csr_array(tuple(part.cpu().numpy() for part in parts), shape=tuple(matrix.shape))
