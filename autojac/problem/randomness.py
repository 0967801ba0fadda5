"""Functions that draw random numbers: every evaluation of one computation draws the same.

A computation may evaluate func several times: once per tangent, or per sample. Each of these evaluations starts from
the random state in which the computation was started, so that all see one mask; afterwards the state is where one
evaluation leaves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.core.keywords import Keywords
from autojac.core.sandbox import GENERATORS, random_state, restore_random_state
from autojac.problem.problem import Compute, Flat, Result


def from_one_state(compute: Compute, generators: Sequence[str] = GENERATORS) -> Compute:
    """Return a computation, all evaluations of which draw alike from these generators."""

    def compute_alike(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        given = kwargs.random_state if isinstance(kwargs, Keywords) else None
        return compute(leaves, Keywords.of(kwargs, random_state=given or random_state(generators)))

    return compute_alike


def restart_draws(fn: Flat) -> Flat:
    """Return a flat function for `randomness="different"`: it draws for the whole batch, as a plain call does."""

    def evaluate(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        if isinstance(kwargs, Keywords) and kwargs.random_state is not None:
            restore_random_state(kwargs.random_state)
        return fn(leaves, kwargs)

    return evaluate


def repeat_draws(fn: Flat, batched: Sequence[bool], generators: Sequence[str] = GENERATORS) -> Flat:
    """Return a function for `randomness="same"`: each sample is a batch of one, from the same random state.

    Args:
        fn: the flat function.
        batched: which leaves carry the batch.
        generators: those that it draws from.
    """

    def evaluate(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        state = kwargs.random_state if isinstance(kwargs, Keywords) else None
        state = random_state(generators) if state is None else state
        samples = next(len(leaf) for leaf, has in zip(leaves, batched, strict=True) if has)
        parts = []
        for b in range(samples):
            restore_random_state(state)
            sample = [leaf[b : b + 1] if has else leaf for leaf, has in zip(leaves, batched, strict=True)]
            parts.append(fn(sample, kwargs))
        return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))

    return evaluate


def restore_draws(compute: Compute, generators: Sequence[str]) -> Compute:
    """Return a computation that sets generators back, so that a plain call that follows draws the same numbers."""

    def compute_and_restore(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        state = random_state(generators)
        result = compute(leaves, kwargs)
        restore_random_state(state)
        return result

    return compute_and_restore
