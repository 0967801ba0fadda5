"""The first evaluation of a call: without side effects that stay, it shows what the call needs."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import Tensor

from autojac.core.keywords import passed_values
from autojac.core.options import Options, Randomness
from autojac.core.sandbox import Sandbox, random_state, restore_random_state
from autojac.core.settable_arguments import find_settable_places
from autojac.core.signature import Layout, Signature, named_flags
from autojac.core.structure import DRAWS, DRAWS_ALIKE, SETS_ARGUMENTS
from autojac.errors import InputError, MutationError, OutputError, RandomnessError
from autojac.guards.earlier_values import EarlierValues
from autojac.planning.call import Call
from autojac.planning.plan_repository import Keys
from autojac.probe import first_call, guess_batched
from autojac.probe.kept_state import UNLIKE, observe_kept_state, unlike
from autojac.probe.random_generators import generators_of_func
from autojac.probe.side_effects import FirstCall, evaluate_once
from autojac.problem.layouts import require_columns, require_layout
from autojac.problem.problem import Flat
from autojac.problem.randomness import repeat_draws, restart_draws


@dataclass(frozen=True)
class FirstCallReport:
    """What the first call of func shows.

    Attributes:
        fn: the flat function, drawing random numbers as the user asked.
        first: its values and side effects.
        sandbox: how to evaluate it without side effects.
        signature, keys: of the call.
        guess: which leaves carry the batch, as declared or by their shapes.
    """

    fn: Flat
    first: FirstCall
    sandbox: Sandbox
    signature: Signature
    guess: tuple[bool, ...]
    keys: Keys

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to differentiate."""
        inputs = [leaf.event_shape for leaf in self.signature.leaves if leaf.differentiated]
        return not (
            self.signature.batch and any(map(math.prod, self.signature.outputs)) and any(map(math.prod, inputs))
        )


def inspect_first_call(
    call: Call,
    options: Options,
    keys: Callable[[Signature], Keys],
    settable: Callable[[Sequence[CodeType]], Sequence[Any]],
) -> FirstCallReport:
    """Call func once, without side effects that stay, and report what that shows.

    Args:
        call: the call.
        options: what of randomness and layouts is asked for.
        keys: returns the keys of plans for a signature.
        settable: returns the places in which code of installed packages may set something.

    Raises:
        InputError, OutputError, MutationError, RandomnessError: where there is no such Jacobian.
    """
    captured, differentiable = call.captured, call.is_differentiable
    trained = [tensor for tensor in captured.tensors if tensor.requires_grad and tensor.is_leaf]
    passed = _passed_tensors(call)
    sandbox = Sandbox([*captured.tensors, *passed], None, captured.places, trained)
    fn: Flat = call.layout.fn
    earlier = EarlierValues()
    first = _undrawn(call, sandbox, earlier)
    if more := settable(first.ran):
        earlier.restore()
        sandbox = Sandbox(sandbox.captured, None, (*sandbox.places, *more), sandbox.trained)
        first = _undrawn(call, sandbox)
    _require_unwritten(passed, sandbox)
    if sandbox.converted:
        # a conversion stays, as after a plain call: the next evaluation shows what else func does
        sandbox = Sandbox(sandbox.captured, None, sandbox.places, sandbox.trained)
        first = _undrawn(call, sandbox)
    if sandbox.kept:
        first, sandbox = _report_kept(call, first, sandbox)
    if sandbox.state:
        fn, first = _drawing(call, first, sandbox, options.randomness)
    if call.settable is not None and call.settable.are_changed:
        first = dataclasses.replace(first, effects=(*first.effects, SETS_ARGUMENTS))
    if captured.opaque and call.key.grad and not differentiable:
        # what could not be followed may hold parameters: then J must carry their graph
        with sandbox():
            values = fn([leaf.detach() for leaf in call.leaves], call.keywords)
        differentiable = any(value.requires_grad for value in values)
    signature, guess = _signature(call, first, options.layout, differentiable)
    require_columns(signature, options.of)
    # func writes into few tensors: later evaluations save these alone
    return FirstCallReport(fn, first, sandbox.closer(sandbox.state), signature, guess, keys(signature))


def _passed_tensors(call: Call) -> list[Tensor]:
    """Return the tensors that a call passes by keyword or in objects, which func gets themselves."""
    if not call.keywords:
        return []
    captured = {id(tensor) for tensor in call.captured.tensors}
    tensors = find_settable_places(passed_values(call.keywords))[1]
    return [tensor for tensor in tensors if id(tensor) not in captured]


def _require_unwritten(passed: Sequence[Tensor], sandbox: Sandbox) -> None:
    for tensor in passed:
        if any(tensor is written for written in sandbox.written):
            raise MutationError(
                f"func writes into a tensor that is passed by keyword or in an object: {tuple(tensor.shape)} "
                f"{tensor.dtype}. Let func clone it first, or hold what it updates, as a module its buffers"
            )


def _undrawn(call: Call, sandbox: Sandbox, earlier: EarlierValues | None = None) -> FirstCall:
    """Call func, and reset the generators that it draws from, which become the sandbox's state."""
    fn, had_numpy = call.layout.fn, "numpy.random" in sys.modules
    state = random_state()
    first = _first_call(fn, call, sandbox, earlier)
    if not had_numpy and "numpy.random" in sys.modules:
        # func may have drawn from the generator that it has just imported, whose state was not saved
        restore_random_state({name: state[name] for name in first.moved})
        state = random_state()
        first = _first_call(fn, call, sandbox, earlier)

    def evaluate() -> None:
        with sandbox():
            evaluate_once(fn, call.leaves, call.keywords, call.layout.differentiated)

    generators = generators_of_func(evaluate, first.moved)
    # no other is touched: another thread may be drawing from it
    sandbox.state = {name: state[name] for name in generators}
    restore_random_state(sandbox.state)
    effects = tuple(effect for effect in first.effects if effect != DRAWS or generators)
    return dataclasses.replace(first, effects=effects)


def _report_kept(call: Call, first: FirstCall, sandbox: Sandbox) -> tuple[FirstCall, Sandbox]:
    """Report a call that keeps something, and return the sandbox for later ones.

    A filled cache and an initialised module stay, as after a plain call.
    """
    fn, leaves, kwargs, positions = call.layout.fn, call.leaves, call.keywords, call.layout.differentiated
    effects, written = observe_kept_state(lambda: evaluate_once(fn, leaves, kwargs, positions)[0], sandbox)
    if effects:
        return dataclasses.replace(first, effects=tuple(dict.fromkeys((*first.effects, *effects)))), sandbox
    # undo what each call writes: the call that computes the Jacobian writes it
    with Sandbox(written)():
        fn(leaves, kwargs)
    later = Sandbox(sandbox.captured, None, sandbox.places, sandbox.trained)
    before, first = first, _undrawn(call, later)
    if not before.moved and unlike(before.values, first.values):
        # the state that it has kept, such as a flag, changes its result
        raise RandomnessError(UNLIKE)
    later.kept = list(sandbox.kept)
    if later.state:
        restore_random_state(sandbox.state)
        later.state = sandbox.state
    return first, later


def _drawing(call: Call, first: FirstCall, sandbox: Sandbox, randomness: Randomness) -> tuple[Flat, FirstCall]:
    """Return a function that draws numbers as `randomness` demands, and what its first call then shows."""
    layout, leaves = call.layout, call.leaves
    if randomness == "error":
        raise RandomnessError(
            "func draws random numbers. Pass randomness='different' for the Jacobian of what one plain call from "
            "the current random state would draw, 'same' for samples that all see the same draw, or put the model "
            "into eval mode"
        )
    if randomness == "different":
        return restart_draws(layout.fn), first
    batched = layout.batched_leaves(guess_batched(leaves, len(first.values[0])))
    fn = repeat_draws(layout.fn, batched, tuple(sandbox.state))
    alike = _first_call(fn, call, sandbox)
    effects = [DRAWS_ALIKE if effect == DRAWS else effect for effect in first.effects]
    return fn, dataclasses.replace(alike, effects=tuple(effects))


def _first_call(fn: Flat, call: Call, sandbox: Sandbox, earlier: EarlierValues | None = None) -> FirstCall:
    layout, leaves = call.layout, call.leaves
    declared = layout.batched_leaves([False] * len(leaves))
    lengths = {leaf.shape[0] for leaf, has in zip(leaves, declared, strict=True) if has}
    if len(lengths) > 1:
        raise InputError(
            f"in_dims says that arguments share a batch, but they have {sorted(lengths)} samples. Pass equal numbers, "
            "or None in in_dims for what all samples share"
        )
    undeclared = [p for p in layout.differentiated if not layout.declared[p] and leaves[p].dim()]
    lengths |= {leaves[position].shape[0] for position in undeclared}
    try:
        first = first_call(fn, leaves, call.keywords, layout.differentiated, sandbox, earlier)
    except RuntimeError as error:
        if len(lengths) > 1:
            raise InputError(
                f"the differentiated arguments have {sorted(lengths)} samples on axis 0 and func raised "
                f"{type(error).__name__}: {error}. One batch size was expected: pass equal numbers, or say with "
                "in_dims which arguments all samples share"
            ) from error
        raise
    return first


def _signature(
    call: Call, first: FirstCall, wanted: Layout, differentiable: bool
) -> tuple[Signature, tuple[bool, ...]]:
    """Return the signature of a call, with the roles of its tensors as declared or guessed by shape."""
    layout, leaves = call.layout, call.leaves
    batch = len(first.values[0])
    guess = layout.batched_leaves(guess_batched(leaves, batch))
    carriers = [leaves[position].shape[0] for position, has in enumerate(guess) if has]
    inputs = [tuple(leaves[position].shape) for position in layout.differentiated]
    if not carriers or any(length != batch for length in carriers):
        shapes = ", ".join(str(tuple(value.shape)) for value in first.values)
        raise OutputError(
            f"func's outputs have shape {shapes}, but its inputs {', '.join(map(str, inputs))}: the batch was "
            "expected on axis 0 of both. Return one row per sample; for a function without a batch pass in_dims=None"
        )
    kinds = str(list(call.key.keywords))
    signature = Signature(
        layout.roles(leaves, guess),
        tuple(tuple(value.shape[1:]) for value in first.values),
        batch,
        f"{layout.context} {kinds}",
        "blocks" if layout.unbatched and wanted == "full" else wanted,
        differentiable,
        named_flags(call.key.flags),
    )
    require_layout(signature)
    return signature, guess
