"""Which entries of a Jacobian may be other than zero: a graph of samples, and a pattern inside a sample."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from autojac.errors import OptionError, kind_of

if TYPE_CHECKING:
    import scipy.sparse

Indices = np.ndarray[Any, np.dtype[np.integer[Any]]]
Marks = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, eq=False)
class Pattern:
    """A boolean matrix by its entries, as compressed sparse rows; equal and hashed by content.

    Attributes:
        shape: rows and columns.
        starts: for each row where its entries begin, and at last their number: (rows + 1,), int64.
        columns: the column of each entry, ascending within a row: (entries,), int32.
    """

    shape: tuple[int, int]
    starts: Indices
    columns: Indices

    @classmethod
    def of(cls, matrix: Any) -> Self:
        """Return the entries of a dense or sparse matrix that are stored and not zero.

        Args:
            matrix: 2-D; a SciPy sparse matrix or array, a torch tensor (strided, CSR or COO), or an array.

        Raises:
            OptionError: if it is no matrix.
        """
        import scipy.sparse
        import torch

        if isinstance(matrix, torch.Tensor):
            tensor = matrix.detach().cpu()
            if tensor.layout == torch.strided:
                matrix = tensor.numpy()
            else:
                coo = tensor.to_sparse_coo().coalesce()
                rows, columns = coo.indices().numpy()
                matrix = scipy.sparse.coo_array((coo.values().numpy() != 0, (rows, columns)), shape=tuple(coo.shape))
        if getattr(matrix, "ndim", None) != 2:
            raise OptionError(
                f"a pattern must be a matrix, got {kind_of(matrix)} of {getattr(matrix, 'ndim', 0)} axes. Pass a 2-D "
                "array, tensor or scipy.sparse matrix"
            )
        csr = scipy.sparse.csr_array(matrix).astype(bool)
        csr.sum_duplicates()
        csr.eliminate_zeros()
        return cls.from_csr(csr)

    @classmethod
    def from_csr(cls, csr: Any) -> Self:
        """Return every stored entry of a SciPy CSR matrix whose rows are sorted and free of duplicates."""
        rows, columns = (int(size) for size in csr.shape)
        return cls((rows, columns), csr.indptr.astype(np.int64), csr.indices.astype(np.int32))

    @classmethod
    def full(cls, rows: int, columns: int) -> Self:
        """Return every entry."""
        starts = np.arange(rows + 1, dtype=np.int64) * columns
        return cls((rows, columns), starts, np.tile(np.arange(columns, dtype=np.int32), rows))

    @classmethod
    def diagonal(cls, size: int) -> Self:
        """Return the diagonal of a square matrix."""
        return cls((size, size), np.arange(size + 1, dtype=np.int64), np.arange(size, dtype=np.int32))

    @property
    def count(self) -> int:
        """Number of entries."""
        return len(self.columns)

    @property
    def density(self) -> float:
        """Share of the entries among all; 1 for a matrix without any place for one."""
        places = self.shape[0] * self.shape[1]
        return self.count / places if places else 1.0

    @functools.cached_property
    def rows(self) -> Indices:
        """The row of each entry: (entries,), int32."""
        return np.repeat(np.arange(self.shape[0], dtype=np.int32), np.diff(self.starts))

    @property
    def places(self) -> Indices:
        """The place of each entry in the matrix with its rows one behind the other: (entries,), int64."""
        return self.rows.astype(np.int64) * self.shape[1] + self.columns

    def scipy(self) -> scipy.sparse.csr_array:
        """Return the pattern as a SciPy matrix of ones (int8), which shares its indices."""
        import scipy.sparse

        ones = np.ones(self.count, dtype=np.int8)
        return scipy.sparse.csr_array((ones, self.columns, self.starts), shape=self.shape)

    @functools.cached_property
    def key(self) -> str:
        """A digest of the content, by which the store files it."""
        digest = hashlib.sha256(repr(self.shape).encode())
        digest.update(np.ascontiguousarray(self.starts, dtype="<i8").data)
        digest.update(np.ascontiguousarray(self.columns, dtype="<i4").data)
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self.shape == other.shape and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"Pattern({self.shape[0]}x{self.shape[1]}, {self.count} entries)"

    def to_bytes(self) -> bytes:
        """Return the pattern as a compressed archive of plain arrays, without anything that could run."""
        return pack(shape=np.array(self.shape, dtype=np.int64), starts=self.starts, columns=self.columns)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the pattern in such an archive.

        Raises:
            ValueError: if it does not hold one.
        """
        arrays = unpack(data, "shape", "starts", "columns")
        kinds = {name: (array.dtype, array.ndim) for name, array in arrays.items()}
        if kinds != {"shape": (np.int64, 1), "starts": (np.int64, 1), "columns": (np.int32, 1)}:
            raise ValueError("its arrays are not of the types of a pattern's")
        starts, indices = arrays["starts"], arrays["columns"]
        rows, columns = (int(size) for size in arrays["shape"])
        consistent = len(starts) == rows + 1 > 0 and starts[0] == 0 and starts[-1] == len(indices)
        if (
            not consistent
            or (np.diff(starts) < 0).any()
            or (len(indices) and not 0 <= indices.min() <= indices.max() < columns)
        ):
            raise ValueError("its arrays are not those of a pattern")
        return cls((rows, columns), starts, indices)


@dataclass(frozen=True)
class Sparsity:
    """Where a Jacobian may be other than zero: entry ((b, r), (c, k)) only if samples (b, c) and features (r, k) may.

    Attributes:
        samples: sample b's output may depend on sample c's input, (B, B); None if it depends on b alone.
        features: a sample's output r may depend on its input k, or on another sample's, (m, n), counted through all
            outputs and all differentiated inputs, flattened in their order; None if any may on any.
    """

    samples: Pattern | None = None
    features: Pattern | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the keys of its patterns, which the store holds besides the plan."""
        return {name: pattern.key for name, pattern in self.parts().items()}

    def parts(self) -> dict[str, Pattern]:
        """Return the patterns that it has, by name."""
        named = {"samples": self.samples, "features": self.features}
        return {name: pattern for name, pattern in named.items() if pattern is not None}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Pattern]) -> Self:
        return cls(parts.get("samples"), parts.get("features"))


def pack(**arrays: Any) -> bytes:
    """Return plain arrays as a compressed archive."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpack(data: bytes, *names: str) -> dict[str, Any]:
    """Return the arrays of an archive, by name; all of them if none is named.

    Raises:
        ValueError: if it is none, or lacks one of them.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in names or archive.files}
    except Exception as error:  # whatever a broken archive makes zipfile, zlib or numpy raise
        raise ValueError(f"its arrays can't be read: {error}") from error
