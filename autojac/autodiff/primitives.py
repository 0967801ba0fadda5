"""torch.func and forward mode, as methods call them.

Everything here takes a *bound* function: positional tensors to differentiate in, a tuple of tensors out.
Callers have left inference mode, in which autograd records nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from autojac.autodiff.open_modes import forward_lock, in_one_thread
from autojac.autodiff.zero_tangents import without_loading_compiler
from autojac.guards.escapes import without_data
from autojac.guards.process_state import ignore_warnings
from autojac.torch_internals import (
    forward_grad_enabled,
    load_forward_decompositions,
    make_dual,
    run_backward,
    set_vmap_fallback_warning,
)

Bound = Callable[..., tuple[Tensor, ...]]
Mode = Literal["reverse", "forward"]


def functional_vjp(fn: Bound, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
    """Call torch.func.vjp of a bound function; return its outputs and the pullback to vmap over."""
    memory: list[Sequence[Tensor]] = []

    def run_and_remember(*wrapped: Tensor) -> tuple[Tensor, ...]:
        outputs = fn(*wrapped)
        memory.extend((wrapped, outputs))
        return outputs

    outputs = torch.func.vjp(without_data(run_and_remember), *inputs)[0]
    wrapped, values = memory

    def pullback(cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # torch's own loads its compiler (1 s), to make sure that it does not compile this
        pairs = [(y, cotangent) for y, cotangent in zip(values, cotangents, strict=True) if y.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(x) for x in wrapped)
        outs, seeds = zip(*pairs, strict=True)
        gradients = run_backward(outs, seeds, True, torch.is_grad_enabled(), wrapped, True, False)
        return tuple(
            torch.zeros_like(x) if gradient is None else gradient
            for x, gradient in zip(wrapped, gradients, strict=True)
        )

    return outputs, pullback


def vmap(
    fn: Callable[..., Any], in_dims: Any = 0, out_dims: Any = 0, chunk: int | None = None, draws: bool = False
) -> Callable[..., Any]:
    """Return torch.vmap of a function, in chunks; what is drawn inside is the same for all, or refused."""
    randomness = "same" if draws else "error"
    return quietly(torch.vmap(fn, in_dims=in_dims, out_dims=out_dims, chunk_size=chunk, randomness=randomness))


def quietly(mapped: Callable[..., Any]) -> Callable[..., Any]:
    """Return a mapped function without torch's warning that operators run sample by sample: timings include that."""

    def run(*args: Any) -> Any:
        set_vmap_fallback_warning(False)
        try:
            return mapped(*args)
        finally:
            set_vmap_fallback_warning(True)

    return run


@functools.cache
def load_forward_rules() -> None:
    """Load torch's forward-mode decompositions, which warn that they are scripted, before a user's call does."""
    with ignore_warnings():
        load_forward_decompositions()


def push_dual(fn: Bound, inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Compute one JVP with plain dual numbers, which need a forward formula of each operator and no functorch rule."""
    try:
        return push_dual_plainly(fn, inputs, tangents)
    except NotImplementedError:
        # few operators need torch's decompositions, which take 0.2 s to load: only now is it known that one does
        load_forward_rules()
        return push_dual_plainly(fn, inputs, tangents)


def push_dual_plainly(
    fn: Bound, inputs: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute one JVP as `push_dual` does, but raise where an operator needs torch's decompositions."""
    forward = torch.autograd.forward_ad
    # inside the forward of a custom Function, and so in reentrant checkpointing, tangents would be dropped
    with without_loading_compiler(), forward_lock, forward_grad_enabled(True), forward.dual_level() as level:
        # forward_ad.make_dual without its loading of decompositions
        duals = [make_dual(x, t, level=level) for x, t in zip(inputs, tangents, strict=True)]
        pairs = [forward.unpack_dual(y) for y in fn(*duals)]
        values = [primal for primal, _ in pairs]
        jvps = [torch.zeros_like(primal) if tangent is None else tangent for primal, tangent in pairs]
    return values, jvps


def functional_jvp(fn: Bound, inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Any, Any]:
    """Call torch.func.jvp of a bound function, to be used under vmap over tangents."""
    with without_loading_compiler():
        outputs, jvps = in_one_thread(torch.func.jvp)(without_data(fn), tuple(inputs), tuple(tangents))[:2]
    return outputs, jvps


def sample_jacobian(
    single: Callable[..., Any], argnums: tuple[int, ...], mode: Mode, draws: bool = False
) -> Callable[..., Any]:
    """Return jacrev or jacfwd of a one-sample function that returns (outputs, aux)."""
    single = without_data(single)
    if mode == "reverse":
        # torch.func.jacrev loads torch's compiler (1 s), as its vjp does
        return _jacrev_without_compiler(single, argnums)
    return in_one_thread(
        torch.func.jacfwd(single, argnums=argnums, has_aux=True, randomness="same" if draws else "error")
    )


def _jacrev_without_compiler(single: Callable[..., Any], argnums: tuple[int, ...]) -> Callable[..., Any]:
    """Return what torch.func.jacrev returns for a function of (outputs, outputs), by the same operators."""

    def jacobian(*args: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        def bound(*inputs: Tensor) -> tuple[Tensor, ...]:
            arguments = list(args)
            for number, tensor in zip(argnums, inputs, strict=True):
                arguments[number] = tensor
            outputs: tuple[Tensor, ...] = single(*arguments)[0]
            return outputs

        inputs = [args[number] for number in argnums]
        outputs, pullback = functional_vjp(bound, inputs)
        sizes = [y.numel() for y in outputs]
        basis = []
        for y, size, start in zip(outputs, sizes, itertools.accumulate(sizes, initial=0), strict=False):
            seeds = y.new_zeros(sum(sizes), size)
            seeds.diagonal(-start).fill_(1)
            basis.append(seeds.view(sum(sizes), *y.shape))
        stacked = torch.vmap(lambda *seeds: pullback(seeds))(*basis)
        parts = [torch.split(rows, sizes) for rows in stacked]
        return tuple(
            tuple(rows[number].view(y.shape + x.shape) for rows, x in zip(parts, inputs, strict=True))
            for number, y in enumerate(outputs)
        ), outputs

    return jacobian
