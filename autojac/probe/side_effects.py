"""Layer 0 of the probe: what a call of func does besides returning a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff.pullback import node_of
from autojac.core.sandbox import Sandbox, generators_drawn_from, random_state, same_bits
from autojac.core.structure import DRAWS, EXCHANGES, UPDATES_BUFFERS
from autojac.core.tensor_kinds import not_dense, own_class
from autojac.errors import MutationError, OutputError, RandomnessError, kind_of
from autojac.graph.recorder import FunctionRecording
from autojac.graph.special_kernels import ATTENTION, special_kernels
from autojac.guards.earlier_values import EarlierValues
from autojac.guards.escapes import Monitor
from autojac.guards.process_state import ignore_warnings
from autojac.guards.run_monitor import RunMonitor
from autojac.probe.flat_call import FlatCall
from autojac.probe.kept_state import UNLIKE, unlike

Flat = Any
PROPORTIONAL = 0.2
"""How far, relatively, outputs may be from moving in proportion to a small step; rounding takes some of it."""
ROUNDED_ULPS = 4.0
"""Changes of an output up to this many units of its rounding are no evidence."""


@dataclass(frozen=True)
class FirstCall:
    """One plain call of func: its outputs, detached, and what else it did (see `Structure.effects`)."""

    values: tuple[Tensor, ...]
    effects: tuple[str, ...]
    moved: tuple[str, ...] = ()
    """Random generators that were drawn from meanwhile, by func or by another thread."""
    ran: tuple[CodeType, ...] = ()
    """The code that ran, except Python's and torch's."""
    unlisted: str = ""
    """What it read that can't be compared, such as a clock or a generator of its own; empty if nothing was seen."""


@dataclass(frozen=True)
class SideEffects:
    """What two plain calls of func showed: the first call, fused operators, and the line for `explain`."""

    values: tuple[Tensor, ...]
    effects: tuple[str, ...]
    kernels: tuple[str, ...]
    evidence: str
    cut: tuple[int, ...] = ()
    """Outputs that move with the inputs and have no graph to them."""


def evaluate_once(fn: Flat, leaves: Sequence[Tensor], kwargs: Mapping[str, Any], differentiated: Sequence[int]) -> Any:
    """Call func once on copies that autograd sees as the user's inputs; return its values and their graph nodes."""
    # torch warns of what it would not warn of where nothing requires grad, such as float(x)
    with torch.enable_grad(), ignore_warnings():
        copies = [
            leaf.detach().clone().requires_grad_().clone() if position in differentiated else leaf.detach().clone()
            for position, leaf in enumerate(leaves)
        ]
        versions = [copy._version for copy in copies]
        values = fn(copies, kwargs)
        nodes = [copy.grad_fn for copy in copies if copy.grad_fn is not None]
    for position, (copy, version, leaf) in enumerate(zip(copies, versions, leaves, strict=True)):
        if copy._version != version or not same_bits(copy, leaf):
            raise MutationError(
                f"func writes into its tensor argument number {position}: {tuple(leaf.shape)} {leaf.dtype}. A Jacobian "
                "needs the input as it was: let func clone it first"
            )
    return values, nodes


def first_call(
    fn: Flat,
    leaves: Sequence[Tensor],
    kwargs: Mapping[str, Any],
    differentiated: Sequence[int],
    sandbox: Sandbox,
    earlier: EarlierValues | None = None,
) -> FirstCall:
    """Call func once, without side effects that stay, and observe what it returns and does.

    Args:
        fn, leaves, kwargs, differentiated: the call.
        sandbox: restores what func is known to set.
        earlier: records the values of what else it may set, before it does.

    Raises:
        MutationError: if func writes into an argument.
        OutputError: if an output is no real floating-point tensor with the batch on axis 0.
    """
    with sandbox(), Monitor() as monitor, RunMonitor(earlier) as run:
        before = random_state()
        values, _ = evaluate_once(fn, leaves, kwargs, differentiated)
        generators = generators_drawn_from(before, random_state())
    check_outputs(values)
    exchanges = monitor.exchanges or sandbox.exchanged
    effects = (UPDATES_BUFFERS if sandbox.written else "", DRAWS if generators else "", EXCHANGES if exchanges else "")
    return FirstCall(
        tuple(value.detach() for value in values), tuple(filter(None, effects)), generators, run.ran, run.reason
    )


def observe(
    first: FirstCall, call: FlatCall, reached: Sequence[str] = (), recording: FunctionRecording | None = None
) -> SideEffects:
    """Call func again from the same state and compare.

    Args:
        first: the first call.
        call: the same, to be made again.
        reached: operators that lack derivatives, which another branch of func may run.
        recording: a second call that was made already, to be taken if it agrees with the first.

    Raises:
        RandomnessError: if equal inputs and equal random state give different outputs.
        OutputError: if the outputs move with the inputs and no graph leads there.
    """
    second, nodes = _call_again(first, call, recording)
    cut = without_graph_to(second, nodes)
    moving = moving_with(*call, dict.fromkeys(cut)) if cut else ()
    if moving and len(cut) == len(second):
        raise OutputError(
            "the outputs of func move with its input, but none has a graph to it, so every derivative would be zero. "
            "Does func go through NumPy, .item(), .detach(), torch.tensor(...), torch.no_grad() or, to parameters, a "
            "checkpoint with use_reentrant=True (pass use_reentrant=False)? Compute in torch operators "
            "with grad enabled, or write a torch.autograd.Function with a backward of its own"
        )
    does = f"func {' and '.join(first.effects)}" if first.effects else "no side effect seen"
    kernels = special_kernels(second, reached)
    names = [f"a fused {kernel}" if kernel == ATTENTION else kernel for kernel in kernels]
    uses = f", it {'may use' if reached else 'uses'} {' and '.join(names)}" if names else ""
    return SideEffects(
        first.values, first.effects, kernels, f"side effects: two calls agree, inputs unchanged, {does}{uses}", moving
    )


def _call_again(
    first: FirstCall, call: FlatCall, recording: FunctionRecording | None
) -> tuple[Sequence[Tensor], Sequence[Any]]:
    """Return the outputs of a second call, which must agree with the first, and the graph's nodes of its inputs."""
    # an argument of a class of its own is not the tensor that its operators show
    plain = recording is not None and not any(map(own_class, call.leaves))
    if recording is not None and plain and not unlike(first.values, recording.values):
        return recording.values, [node_of(tensor) for tensor in recording.inputs]
    with call.sandbox():
        second, nodes = evaluate_once(call.fn, call.leaves, call.kwargs, call.differentiated)
    if unlike(first.values, second):
        raise RandomnessError(f"{UNLIKE} Seen: {first.unlisted}" if first.unlisted else UNLIKE)
    return second, nodes


def without_graph_to(values: Sequence[Tensor], nodes: Sequence[Any]) -> tuple[int, ...]:
    """Return which values have no path in the autograd graph to any of the nodes."""
    wanted = set(nodes)
    # an output may be an input itself
    return tuple(number for number, value in enumerate(values) if not _leads(node_of(value), wanted))


def _leads(start: Any, wanted: set[Any]) -> bool:
    todo, seen = [start], set()
    while todo:
        node = todo.pop()
        if node in wanted:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return False


def moving_with(
    fn: Flat,
    leaves: Sequence[Tensor],
    kwargs: Mapping[str, Any],
    differentiated: Sequence[int],
    sandbox: Sandbox,
    elements: Mapping[int, Tensor | None],
) -> tuple[int, ...]:
    """Return which outputs move in proportion to a small step of the inputs; a jump, as of `round`, does not.

    Args:
        fn, leaves, kwargs, differentiated, sandbox: the call.
        elements: for each output of interest which of its elements to look at, a mask of its shape; None for all.
    """
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(leaf.shape, generator=generator).to(leaf) for leaf in leaves]

    def at(size: float) -> dict[int, Tensor]:
        moved = [
            leaf.detach() + size * (1 + leaf.detach().abs()) * step if position in differentiated else leaf.detach()
            for position, (leaf, step) in enumerate(zip(leaves, steps, strict=True))
        ]
        with sandbox(), torch.no_grad():
            values: Sequence[Tensor] = fn(moved, kwargs)
        return {n: values[n].detach()[... if mask is None else mask] for n, mask in elements.items()}

    eps_of_inputs = max(torch.finfo(leaves[position].dtype).eps for position in differentiated)
    proportional: set[int] = set()
    try:
        here = at(0.0)
        # func may round to float32 in between, where a step for float64 is lost
        coarse = {torch.finfo(dtype).eps for dtype in (*(value.dtype for value in here.values()), torch.float32)}
        for size in sorted({max(eps_of_inputs, eps) ** 0.5 for eps in (eps_of_inputs, *coarse)}):
            whole = at(size)
            if all(torch.equal(whole[number], value) for number, value in here.items()):
                continue
            half, back = at(size / 2), at(-size)
            proportional |= {n for n in elements if _proportional(here[n], half[n], whole[n], back[n])}
            if len(proportional) == len(elements):
                break
    except Exception:  # func may refuse what lies near its input, which says nothing
        pass
    return tuple(sorted(proportional))


def _proportional(here: Tensor, half: Tensor, whole: Tensor, back: Tensor) -> bool:
    """Check whether most elements that move do so in proportion to a step: half as far, and as far the other way."""
    if not here.numel() or any(other.shape != here.shape for other in (half, whole, back)):
        return False
    one, two, opposite = ((other.double() - here.double()).nan_to_num(0, 0, 0) for other in (half, whole, back))
    moves = two.abs() > ROUNDED_ULPS * torch.finfo(here.dtype).eps * here.double().abs().nan_to_num(0, 0, 0)
    # a curve is not proportional, and at a kink, as of abs, both ways are not opposite
    apart = torch.maximum((two - 2 * one).abs(), (two + opposite).abs())
    agreeing = moves & (apart < PROPORTIONAL * two.abs())
    return 2 * int(agreeing.sum()) > int(moves.sum())


def check_outputs(values: Sequence[Any]) -> int:
    """Return the number of samples that all outputs agree on.

    Raises:
        OutputError: if an output is no real floating-point tensor with the batch on axis 0.
    """
    if not values:
        raise OutputError(
            "func returned no tensor; a tensor or a nest of tensors of shape (B, ...) was expected. Return what is to "
            "be differentiated"
        )
    for position, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise OutputError(
                f"output {position} of func is {kind_of(value)}; a tensor (B, ...) was expected. Return anything else "
                "as aux with has_aux=True"
            )
        what, instead = not_dense(value)
        if what:
            raise OutputError(
                f"output {position} of func {what}; a dense tensor was expected. Return {instead}, or return it as aux "
                "with has_aux=True"
            )
        if not value.is_floating_point():
            raise OutputError(
                f"output {position} of func is {value.dtype}, which has no real derivative. Return floating-point "
                "tensors, a complex one as torch.view_as_real(y), and anything else as aux with has_aux=True"
            )
        if value.dim() == 0:
            raise OutputError(
                f"output {position} of func is a scalar; autojac expects the batch on axis 0: return one value per "
                "sample, shape (B,), instead of a sum or mean over the batch"
            )
    sizes = {value.shape[0] for value in values}
    if len(sizes) > 1:
        shapes = ", ".join(str(tuple(value.shape)) for value in values)
        raise OutputError(
            f"the outputs of func must share the batch on axis 0, but have shapes {shapes}. Expand what all samples "
            "share, or return it as aux with has_aux=True"
        )
    return int(sizes.pop())
