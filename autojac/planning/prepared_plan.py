"""A call on its way to a plan: described, seen once, and made ready."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from autojac.autodiff.primitives import hooked
from autojac.core.autocast import outside_autocast
from autojac.core.call import Frame
from autojac.core.keywords import Keywords
from autojac.core.options import Verify
from autojac.core.plan import Plan
from autojac.core.sandbox import Quiet
from autojac.core.signature import Signature
from autojac.core.structure import DRAWS_ALIKE, KEEPS, UPDATES_BUFFERS
from autojac.guards.assignments import leaving
from autojac.guards.captures import Captures
from autojac.guards.tensor_contents import TensorContents
from autojac.methods.base import Method, reverse
from autojac.planning.plan_repository import Keys
from autojac.probe.side_effects import FirstCall
from autojac.problem.empty_events import filled
from autojac.problem.problem import Compute, Flat, Problem, Result
from autojac.problem.randomness import leaving_state
from autojac.replay.replayer import Replaying
from autojac.torch_internals import pytree

EARLY_CHECKS = 10
"""Checks come at calls 1, 2, 4, ... up to 2 to this power, then at every multiple of `CHECK_EVERY`."""
CHECK_EVERY = 1000
MOST_NUMBERS = 32
"""Calls with Python floats that no call before had are checked this many times."""


class Noticed(NamedTuple):
    """What is other than at the checks so far, and a digest of the contents that decide."""

    what: Literal["", "function", "arguments"]
    contents: bytes = b""


UNCHANGED = Noticed("")


@dataclass
class Entry:
    """A plan made ready for one signature in this process."""

    frame: Frame
    problem: Problem
    plan: Plan
    compute: Compute
    signature: Signature
    quiet: Quiet
    keys: Keys | None = None
    calls: int = 0
    last_check: int = 0
    next_check: float = 1
    unchecked: bool = False
    constants: tuple[Tensor, ...] = ()
    numbers: set[tuple[float, ...]] | None = None
    watch: TensorContents = dataclasses.field(default_factory=TensorContents)
    loop: Compute | None = None
    version: int = -1
    states: set[int] = dataclasses.field(default_factory=set)
    factored: Any = None
    again: Any = None
    proved: bool = False
    """The plan holds for all calls of this signature as long as what func reads besides its arguments is unchanged."""
    rests: bool = False
    """No check is due: the plan is proved, and the guard compares everything that func reads."""
    contents_decide: bool = False
    """The structure was read from the values of some tensors, and is checked where these are others."""
    pushes: bool = False
    """The Jacobian is differentiable, and made by forward mode, whose derivative hangs on the operators that run."""
    fresh: bool = False
    """A search in this process has just found the plan."""
    provisional: bool = False
    """The plan was made where no derivative is finite, so that nothing could be verified."""
    doubtful: bool = False
    """What decides the structure has changed, and no check since then could tell whether the structure still holds."""

    @property
    def mutable(self) -> tuple[Tensor, ...]:
        """The tensors that func writes into."""
        return tuple(self.quiet.captured)

    def finished(self, result: Result) -> Sequence[Sequence[Tensor]]:
        """The Jacobians as the user gets them: entries become matrices."""
        problem = self.problem
        if problem.layout != "sparse":
            return result.jacobians
        return [
            [problem.entries(output, p).matrix(values) for p, values in zip(problem.inputs, row, strict=True)]
            for output, row in enumerate(result.jacobians)
        ]

    def fits(self, result: Result) -> bool:
        """Whether func has returned the shapes that were planned for: they may follow from values that it reads."""
        return [value.shape for value in result.values] == self.shapes

    @functools.cached_property
    def shapes(self) -> list[torch.Size]:
        """The shapes of the outputs."""
        return [torch.Size((self.problem.batch, *event)) for event in self.problem.outputs]

    @property
    def usable(self) -> Compute:
        """The plan's computation; under a caller's hooks on saved tensors a loop of plain VJPs.

        torch.func refuses such hooks, and checkpointing's compute func again at every backward, even under vmap.
        """
        return self.plainly if hooked() else self.compute

    def plainly(self, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        """Compute by a loop of plain VJPs."""
        if self.loop is None:
            self.loop = prepared(self.frame, self.problem, reverse(self.problem, "loop"))
        return self.loop(leaves, kwargs)

    def assuming_nothing(self) -> Entry:
        """Return what serves a call whose structure is in doubt: a loop of one plain VJP for each row."""
        structure = self.problem.structure.refuted("in doubt: derivatives here are as small as rounding")
        problem = dataclasses.replace(self.problem, structure=structure)
        return dataclasses.replace(
            self, problem=problem, loop=None, compute=prepared(self.frame, problem, reverse(problem, "loop"))
        )

    def run(self, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        """Compute, outside the caller's autocast but for func."""
        with outside_autocast():
            return self.usable(leaves, kwargs)

    def checked(self, verify: Verify, listed: bool) -> None:
        """Set when to check next: what was observed at some points is never trusted for good.

        A proof covers all inputs, and the guard notices a flag, a layer or a hook that Python changes later.

        Args:
            verify: how often the user wants checks.
            listed: func was seen to read nothing but what the guard compares.
        """
        structure = self.problem.structure
        calls = self.last_check = self.calls
        self.rests = listed and self.may_rest
        if verify == "always" or structure.suspect:
            self.next_check = calls + 1
        elif self.rests or not (structure.assumes or self.pushes):
            self.next_check = math.inf
        elif calls < 2**EARLY_CHECKS:
            self.next_check = 2 * calls
        else:
            self.next_check = (calls // CHECK_EVERY + 1) * CHECK_EVERY

    @property
    def may_rest(self) -> bool:
        """Whether the plan needs no further check while the guard, which compares everything, sees no change."""
        function_state = self.problem.function_state
        return self.proved and function_state is not None and function_state.is_complete

    @property
    def observed(self) -> bool:
        """Whether changes of func are looked for before every call that the fast path does not serve."""
        return not self.unchecked

    def changed(
        self, leaves: Sequence[Tensor], kwargs: Mapping[str, Any], state: int | None, reach: Callable[[], Captures]
    ) -> Noticed:
        """What is other than at the checks so far, of what the plan was made from: then it is checked again.

        Args:
            leaves, kwargs: the call.
            state: the kind of the state of what func reads; None if it was not compared.
            reach: gives what func reaches.
        """
        anew, function_state = False, self.problem.function_state
        if self.last_check:  # the first use is checked in any case
            anew = state is not None and state not in self.states
            if isinstance(self.compute, Replaying):
                anew = self.compute.anew() or anew
            anew = anew or (self.rests and function_state is not None and not function_state.is_complete)
        if not self.contents_decide:
            return Noticed("function" if anew else "")
        if function_state is not None and self.version != function_state.version:
            self.version = function_state.version
            self.hold(reach())
        contents = self.contents(leaves, kwargs)
        if anew:
            return Noticed("function", contents)
        return Noticed("arguments" if self.watch.unseen(contents) else "", contents)

    def absorb(self, state: int | None) -> None:
        """Take the state that a call has left, as far as func has changed it by itself, for one that was checked."""
        if state is not None:
            self.states.add(state)

    def contents(self, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> bytes:
        """A digest of all tensors whose values decide whether the plan holds."""
        tensors = list(self.constants)
        numbers: tuple[float, ...] = ()
        if self.problem.structure.watched:
            tensors += [leaves[position] for position in self.watched]
            if kwargs:
                values = pytree.tree_leaves(kwargs)
                tensors += [value for value in values if isinstance(value, Tensor)]
                numbers = tuple(value for value in values if isinstance(value, float))
        return self.watch.contents(tensors, numbers)

    @functools.cached_property
    def watched(self) -> tuple[int, ...]:
        """The arguments by position whose values may decide what couples with what.

        A float that carries the batch and goes with its sample, as slices show, is like an input: left to the schedule.
        """
        structure, leaves = self.problem.structure, self.problem.leaves
        return tuple(
            position
            for position, leaf in enumerate(leaves)
            if structure.watched
            and not leaf.differentiated
            and not (leaf.batched and structure.sliceable and leaf.dtype.startswith(("float", "bfloat", "complex")))
        )

    def hold(self, captured: Captures) -> None:
        """Watch from now on the values of the constants that func reaches."""
        # there may be constants now whose values are to be watched
        self.again = None
        self.constants = tuple(tensor for tensor in captured.tensors if not tensor.requires_grad)

    def unfamiliar(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call's Python floats, which its signature leaves out, are others than those of any call checked.

        A branch may hang on them. Past `MOST_NUMBERS` they are taken for a quantity that changes all the time.
        """
        if self.numbers is None:
            return False
        numbers = tuple(value for value in pytree.tree_leaves(kwargs) if isinstance(value, float))
        if numbers in self.numbers or len(self.numbers) >= MOST_NUMBERS:
            return False
        self.numbers.add(numbers)
        return True


@dataclass(frozen=True)
class Request:
    """One call that needs a plan."""

    frame: Frame
    leaves: tuple[Tensor, ...]
    kwargs: Mapping[str, Any]
    flags: tuple[Any, ...]
    differentiable: bool
    trained: tuple[Tensor, ...]
    kinds: str
    captured: Captures

    def apart(self) -> Request:
        """The call with tensors of its own, so that probing and tuning fire no hook of the caller's."""
        leaves = tuple(x.detach().requires_grad_() if x.requires_grad else x.detach() for x in self.leaves)
        return dataclasses.replace(self, leaves=leaves)


@dataclass(frozen=True)
class Seen:
    """What the first call of func showed, and the flat function that draws as the user asked."""

    fn: Flat
    first: FirstCall
    quiet: Quiet
    signature: Signature
    guess: tuple[bool, ...]
    keys: Keys

    @property
    def empty(self) -> bool:
        """Whether there is nothing to differentiate."""
        inputs = [leaf.event_shape for leaf in self.signature.leaves if leaf.differentiated]
        return not (
            self.signature.batch and any(map(math.prod, self.signature.outputs)) and any(map(math.prod, inputs))
        )


def prepared(frame: Frame, problem: Problem, method: Method) -> Compute:
    """A method made ready for all of a problem: for what has no elements, and for what func returned as aux."""
    compute = _with_aux(frame, problem, filled(problem, method.ready), method.plain)
    effects = problem.structure.effects
    if UPDATES_BUFFERS in effects:
        return compute  # func runs as it is, and once
    if DRAWS_ALIKE in effects or KEEPS in effects:
        compute = leaving_state(compute, problem.generators)
        return leaving(compute, problem.places, functools.partial(_plain_call, frame, KEEPS in effects))
    return compute


def _plain_call(frame: Frame, keeps: bool, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> None:
    """Call func for what it leaves behind."""
    with torch.set_grad_enabled(keeps and torch.is_grad_enabled()):
        frame.fn(leaves, kwargs)


def _with_aux(frame: Frame, problem: Problem, compute: Compute, plain: bool) -> Compute:
    """A computation beside which comes what func returned as aux.

    Args:
        frame: knows how func returns it.
        problem, compute: what is computed.
        plain: whether func runs once and as it is. If not, it sees tensors that stand for others, and runs once more.
    """
    if not frame.has_aux:
        return compute

    def collecting(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        collected: list[Any] = []
        watched = Keywords.of(kwargs, aux=collected)
        result = compute(leaves, watched if plain else kwargs)
        if not plain:
            with torch.set_grad_enabled(problem.differentiable):
                frame.fn(leaves, watched)
        aux = collected[-1]
        return result._replace(aux=aux if problem.differentiable else pytree.tree_map_only(Tensor, Tensor.detach, aux))

    return collecting
