"""Whether func keeps anything in attributes or containers from call to call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from autojac.autodiff.tolerance import disagreement
from autojac.core.sandbox import Sandbox, restore_random_state
from autojac.core.structure import KEEPS, UPDATES_BUFFERS
from autojac.errors import RandomnessError
from autojac.guards.assignments import Snapshot

UNLIKE = (
    "func gave two different outputs for equal input and equal random state; equal ones were expected. Does it keep a "
    "counter, read a clock, or draw from a generator of its own? Pass such a value as an argument, or keep it constant"
)


def unlike(values: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Check whether two evaluations gave different outputs."""
    pairs = zip(values, others, strict=True)
    return any(one.shape != other.shape or disagreement(other, one) is not None for one, other in pairs)


def observe_kept_state(
    evaluate: Callable[[], Sequence[Tensor]], sandbox: Sandbox
) -> tuple[tuple[str, ...], Sequence[Tensor]]:
    """Return the effects of a function that has set something in `sandbox.kept`, and the tensors that each call writes.

    It has none if it only filled a cache, or initialised itself: then a second call sets nothing.

    Raises:
        RandomnessError: if its outputs depend on a number that it keeps.
    """
    later = Sandbox(sandbox.captured)
    with sandbox():
        first = evaluate()
        snapshot = Snapshot(sandbox.kept)
        restore_random_state(sandbox.state)
        try:
            with later():
                second = evaluate()
        except Exception:  # a later call may fail by what this one keeps
            return (KEEPS,), later.written
        other = unlike(first, second)
        changed, harmless = snapshot.find_changes(), later.written or not other
        if not changed and harmless:
            return (), later.written
        if harmless:
            return (KEEPS,), later.written
        if not changed or not snapshot.exchanged(Tensor):
            raise RandomnessError(UNLIKE)
        # a running mean that is replaced instead of written
        return (KEEPS, UPDATES_BUFFERS), later.written
