"""Notice contents of index tensors, masks, adjacency and constant matrices that no check has seen."""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

MOST_CONTENTS = 4096
"""The most recent contents to remember, 16 bytes each, so that each batch of an epoch is checked once."""
SMALL = 1 << 12
"""Bytes up to which a tensor is read in every call: writes through `.data` or NumPy don't change its version."""

_State = tuple[int, int, torch.Size, tuple[int, ...]]


class TensorContents:
    """The contents of some tensors that a plan was checked with.

    Contents decide, not identity: an equal mask in another object needs no check.
    """

    def __init__(self) -> None:
        self._checked: OrderedDict[bytes, None] = OrderedDict()
        self._digests: list[tuple[weakref.ref[Tensor], _State, bytes]] = []

    def contents(self, tensors: Sequence[Tensor], numbers: Sequence[float] = ()) -> bytes:
        """Return a digest of tensors and Python floats; empty where a tensor can't be read."""
        known, digests, whole = self._digests, [], hashlib.blake2b(repr(numbers).encode(), digest_size=16)
        for index, tensor in enumerate(tensors):
            state = _state(tensor)
            digest = b""
            if state is not None and index < len(known):
                last, at, before = known[index]
                digest = before if at == state and last() is tensor else b""
            digest = digest or _digest(tensor)
            if not digest:
                return b""
            if state is not None:
                digests.append((weakref.ref(tensor), state, digest))
            whole.update(digest)
        self._digests = digests if len(digests) == len(tensors) else []
        return whole.digest()

    def unseen(self, contents: bytes) -> bool:
        """Check whether no check has passed with these contents, though one has with others."""
        if contents in self._checked:
            self._checked.move_to_end(contents)
            return False
        return bool(self._checked)

    def accept(self, contents: bytes) -> None:
        """Remember that the plan holds with these contents."""
        self._checked[contents or b"unreadable"] = None
        while len(self._checked) > MOST_CONTENTS:
            self._checked.popitem(last=False)


def _state(tensor: Tensor) -> _State | None:
    """Return what changes when a large tensor is written or gets other memory; None where its content must be read."""
    if tensor.is_inference() or tensor.layout != torch.strided or tensor.nbytes <= SMALL:
        return None
    return tensor._version, tensor.data_ptr(), tensor.shape, tensor.stride()


def _digest(tensor: Tensor) -> bytes:
    """Return a digest of type, shape and entries; of a sparse matrix the stored entries and where they are."""
    digest = hashlib.blake2b(f"{tensor.dtype} {tensor.layout} {tensor.shape}".encode(), digest_size=16)
    if tensor.is_meta:
        return digest.digest()
    try:
        for part in dense_parts(tensor):
            digest.update(_bytes(part))
    except (RuntimeError, TypeError, NotImplementedError):  # wrapped by a transform, or quantized: there are no bytes
        return b""
    return digest.digest()


def _bytes(tensor: Tensor) -> bytes:
    # of a copy: memory that NumPy has seen can't be resized any more, and func or the user may want to
    copy = tensor.detach().clone()
    try:
        data: bytes = copy.numpy(force=True).tobytes()
    except TypeError:  # a type that numpy lacks
        data = copy.contiguous().reshape(-1).view(torch.uint8).numpy(force=True).tobytes()
    return data


def dense_parts(tensor: Tensor) -> Sequence[Tensor]:
    """Return the dense tensors that a tensor is made of: of a sparse one the indices, then the values."""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return tensor.indices(), tensor.values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)
