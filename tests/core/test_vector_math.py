"""MKL's kernels are chosen when autojac is imported, by one thread."""

from __future__ import annotations

import subprocess
import sys

import torch

from autojac.core.vector_math import FUNCTIONS

PROGRAM = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            print(func.overloadpacket.__name__, args[0].dtype, args[0].numel())
        return func(*args, **(kwargs or {}))

with Seen():
    import autojac
"""


def test_the_import_calls_each_function_once_on_one_number() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    expected = []
    if torch.backends.mkl.is_available():
        dtypes = (torch.float32, torch.float64)
        expected = [
            f"{function.__name__.removeprefix('special_')} {dtype} 1" for dtype in dtypes for function in FUNCTIONS
        ]
    assert ran.stdout.splitlines() == expected
