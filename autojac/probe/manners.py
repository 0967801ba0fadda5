"""Layer 0 of the probe: what a call of func does besides returning a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autojac.errors import MutationError, OutputError, RandomnessError, kind_of
from autojac.escapes import Monitor
from autojac.kernels import ATTENTION, special_kernels
from autojac.quiet import Quiet, random_state, same_bits, same_random_state
from autojac.structure import DRAWS, EXCHANGES, UPDATES_BUFFERS
from autojac.tolerance import disagreement

Flat = Any


@dataclass(frozen=True)
class FirstCall:
    """One plain call of func: its outputs, detached, and what else it did (see `Structure.effects`)."""

    values: tuple[Tensor, ...]
    effects: tuple[str, ...]


@dataclass(frozen=True)
class Manners:
    """What two plain calls of func showed: the first call, fused operators, and the line for `explain`."""

    values: tuple[Tensor, ...]
    effects: tuple[str, ...]
    kernels: tuple[str, ...]
    evidence: str


def evaluate_once(fn: Flat, leaves: Sequence[Tensor], kwargs: Mapping[str, Any], differentiated: Sequence[int]) -> Any:
    """One plain call on copies that autograd sees as the user's inputs, and the copies."""
    with torch.enable_grad():
        copies = [
            leaf.detach().clone().requires_grad_().clone() if position in differentiated else leaf.detach().clone()
            for position, leaf in enumerate(leaves)
        ]
        versions = [copy._version for copy in copies]
        values = fn(copies, kwargs)
    for position, (copy, version, leaf) in enumerate(zip(copies, versions, leaves, strict=True)):
        if copy._version != version or not same_bits(copy, leaf):
            raise MutationError(
                f"func writes into its tensor argument number {position}: {tuple(leaf.shape)} {leaf.dtype}. A Jacobian "
                "needs the input as it was: let func clone it first"
            )
    return values


def first_call(
    fn: Flat, leaves: Sequence[Tensor], kwargs: Mapping[str, Any], differentiated: Sequence[int], quiet: Quiet
) -> FirstCall:
    """Call func once, without a trace, and see what it returns and does.

    Raises:
        MutationError: if func writes into an argument.
        OutputError: if an output is no real floating-point tensor with the batch on axis 0.
    """
    with quiet(), Monitor() as monitor:
        values = evaluate_once(fn, leaves, kwargs, differentiated)
        draws = not same_random_state(quiet.state, random_state())
    check_outputs(values)
    exchanges = monitor.exchanges or quiet.exchanged
    done = (UPDATES_BUFFERS if quiet.written else "", DRAWS if draws else "", EXCHANGES if exchanges else "")
    return FirstCall(tuple(value.detach() for value in values), tuple(filter(None, done)))


def observe(
    first: FirstCall,
    fn: Flat,
    leaves: Sequence[Tensor],
    kwargs: Mapping[str, Any],
    differentiated: Sequence[int],
    quiet: Quiet,
    reached: Sequence[str] = (),
) -> Manners:
    """Call func again from the same state and compare.

    Args:
        first: the first call.
        fn, leaves, kwargs, differentiated, quiet: the call.
        reached: operators that lack derivatives, which another branch of func may run.

    Raises:
        RandomnessError: if equal inputs and equal random state give different outputs.
    """
    with quiet():
        second = evaluate_once(fn, leaves, kwargs, differentiated)
    for one, other in zip(first.values, second, strict=True):
        if one.shape != other.shape or disagreement(other, one) is not None:
            raise RandomnessError(
                "func gave two different outputs for equal input and equal random state, so it has no one Jacobian. "
                "Does it keep a counter, read a clock, or draw from a generator of its own?"
            )
    does = f"func {' and '.join(first.effects)}" if first.effects else "no side effect seen"
    kernels = special_kernels(second, reached)
    named = [f"a fused {kernel}" if kernel == ATTENTION else kernel for kernel in kernels]
    uses = f", it {'may use' if reached else 'uses'} {' and '.join(named)}" if named else ""
    return Manners(first.values, first.effects, kernels, f"manners: two calls agree, inputs unchanged, {does}{uses}")


def check_outputs(values: Sequence[Any]) -> int:
    """The number of samples that all outputs agree on.

    Raises:
        OutputError: if an output is no real floating-point tensor with the batch on axis 0.
    """
    if not values:
        raise OutputError("func returned no tensor; it must return one tensor or a nest of tensors of shape (B, ...)")
    for position, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise OutputError(f"output {position} of func is {kind_of(value)}; a tensor (B, ...) was expected")
        if not value.is_floating_point():
            raise OutputError(
                f"output {position} of func is {value.dtype}, which has no real derivative. Return floating-point "
                "tensors, a complex one as torch.view_as_real(y), and anything else as aux with has_aux=True"
            )
        if value.dim() == 0:
            raise OutputError(
                f"output {position} of func is a scalar; autojac expects the batch on axis 0: return one value a "
                "sample, shape (B,), instead of a sum or mean over the batch"
            )
    sizes = {value.shape[0] for value in values}
    if len(sizes) > 1:
        shapes = ", ".join(str(tuple(value.shape)) for value in values)
        raise OutputError(f"the outputs of func must share the batch on axis 0, but have shapes {shapes}")
    return int(sizes.pop())
