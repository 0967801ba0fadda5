"""MKL's vector functions, which torch computes with on CPUs: chosen once, before several threads choose at a time."""

from __future__ import annotations

import torch

FUNCTIONS = (
    torch.acos, torch.asin, torch.atan, torch.cos, torch.erf, torch.erfc, torch.erfinv, torch.exp, torch.log,
    torch.log10, torch.log2, torch.sin, torch.sqrt, torch.tan, torch.tanh, torch.trunc,
)  # fmt: skip
"""Functions that torch computes by MKL."""


def choose_kernels() -> None:
    """Call each function once on one number, in both precisions; it takes three milliseconds.

    MKL chooses the kernel of a function at its first call, and a thread that comes while another one chooses may
    compute its share in low accuracy: `torch.sin(x)` of 3072 numbers was off by 1.5e-4 in half of them, in one fresh
    process of seven (https://github.com/pytorch/pytorch/issues/188792). One number is computed by one thread.
    """
    if not torch.backends.mkl.is_available():
        return
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            number = torch.full((1,), 0.5, dtype=dtype, device="cpu")
            for function in FUNCTIONS:
                function(number)
