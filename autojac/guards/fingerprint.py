"""A digest of what a callable computes, equal in every process that defines it alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from autojac.guards.walker import Walk


def fingerprint(func: Callable[..., Any], version: str = "") -> str:
    """Digest a callable's code, constants, closures, defaults, modules and captured indices.

    Integer and boolean tensors count by content, float tensors by shape and dtype: trained weights keep
    the fingerprint, an edited mask changes it. `training` flags do not count; a signature carries them.

    Args:
        func: a function, module, partial, bound method or callable object.
        version: changes the digest at will.

    Returns:
        64 hexadecimal digits.
    """
    digest = _Digest()
    digest.emit("version", version)
    digest.visit(func)
    return digest.hexdigest()


class _Digest(Walk):
    def __init__(self) -> None:
        super().__init__()
        self._sha = hashlib.sha256()

    def emit(self, *tokens: object) -> None:
        self._sha.update(repr(tokens).encode("utf-8", "surrogatepass"))

    def content(self, tensor: torch.Tensor) -> None:
        self.emit("content", tuple(tensor.shape))
        if tensor.device.type == "meta" or tensor.numel() == 0:
            return
        try:
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        except RuntimeError:  # wrapped by a transform, fake or quantised: there are no bytes to read
            self.opaque = True
            return
        self._sha.update(memoryview(data))

    def hexdigest(self) -> str:
        return self._sha.hexdigest()
