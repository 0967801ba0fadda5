"""Libraries on JAX, where the extra `bench` has installed them."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch


def loaded(*names: str) -> list[Any] | str:
    """Return the libraries, JAX with one thread where torch has one; why not, where they can't be had."""
    if torch.get_num_threads() == 1:
        # read when JAX first loads
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        return f"not installed ({error}); pip install 'autojac[bench]'"
