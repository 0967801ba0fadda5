"""Notice that tensors that a pattern was read from have other contents: index tensors, masks, constant matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Watch:
    """The contents of some tensors, to be compared with those at the next call."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, tuple[int, int], Tensor]] | None = None

    def changed(self, tensors: Sequence[Tensor]) -> bool:
        """Whether some content is other than at the last look; a tensor unwritten since then costs no comparison."""
        known, self._seen = self._seen, []
        differs = known is None or len(known) != len(tensors)
        for index, tensor in enumerate(tensors):
            state = _state(tensor)
            kept = None
            if not differs and known is not None:
                before, at, copy = known[index]
                if (before is tensor and at == state and state[0] >= 0) or _same(copy, tensor):
                    kept = copy
                else:
                    differs = True
            self._seen.append((tensor, state, tensor.detach().clone() if kept is None else kept))
        return differs and known is not None


def _state(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is written into, or `.data` gives it other memory; negative if that can't be told."""
    if tensor.is_inference() or tensor.layout != torch.strided:
        return -1, 0
    return tensor._version, tensor.data_ptr()


def selects(tensor: Tensor) -> bool:
    """Whether a tensor's content says what is read: numbers of rows, masks, or the places in a sparse matrix."""
    return tensor.layout != torch.strided or not (tensor.is_floating_point() or tensor.is_complex())


def _same(one: Tensor, other: Tensor) -> bool:
    if one.layout != other.layout or one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.layout == torch.strided:
        return torch.equal(one, other)
    first, second = one.to_sparse_coo().coalesce(), other.to_sparse_coo().coalesce()
    return torch.equal(first.indices(), second.indices())
