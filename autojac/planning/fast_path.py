"""The short way through a call like one before: its tensors alike, everything else the same, a replay to serve it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from autojac.autodiff.primitives import hooked, transforming
from autojac.core.autocast import outside_autocast
from autojac.guards.tensor_metadata import metadata_check
from autojac.planning.prepared_plan import Entry
from autojac.replay.replayer import Replaying
from autojac.torch_internals import global_state_guard

Again = Callable[[tuple[Any, ...]], tuple[Any, Any] | None]
"""From a call's positional arguments to the value and the Jacobian; None where the call has to go the long way."""

AtOnce = Callable[[Sequence[Tensor]], Sequence[Tensor] | None]


def never(args: tuple[Any, ...]) -> None:
    """No call before was like this one."""
    return


def again(entry: Entry, args: Sequence[Any]) -> Again:
    """What serves calls like one that an entry has just served, in a few microseconds.

    All that a key is made of is compared in C at once: of the arguments shapes, strides, types, `requires_grad` and
    the modes that their dispatch depends on; of the process its global flags. What func reads is the replay's to watch.

    Args:
        entry: what served the call.
        args: its positional arguments; it had no others.
    """
    replaying, frame = entry.compute, entry.frame
    tensors = [arg for arg in args if isinstance(arg, Tensor) and not arg.is_inference() and arg.is_contiguous()]
    plain = frame.plain and not frame.moved and not frame.has_aux and len(tensors) == len(args) > 0
    # patterns and verdicts may hang on the values of these
    watched = entry.constants or (entry.contents_decide and entry.watched)
    if not plain or watched or entry.problem.layout == "sparse" or not isinstance(replaying, Replaying):
        return never
    same, steady = metadata_check(tuple(tensors)), _global_state()
    if same is None or steady is None or replaying.problem.structure.effects:
        return never
    count, single = len(args), frame.single and frame.out_spec is None
    at_once = _outside(replaying.at_once) if frame.autocast else replaying.at_once
    differentiable = entry.problem.differentiable

    def served(args: tuple[Any, ...]) -> tuple[Any, Any] | None:
        # first of all: torch.compile must not trace what follows
        if transforming() or len(args) != count or not same(*args) or not steady() or (differentiable and hooked()):
            return None
        calls = entry.calls + 1
        if calls >= entry.next_check or entry.again is not served:
            return None
        outputs = at_once(args)
        if outputs is None:
            return None
        entry.calls = calls
        if single:
            return outputs  # type: ignore[return-value]
        result = replaying.result(outputs)
        return frame.value(result.values), frame.jacobian(result.jacobians)

    return served


def _outside(at_once: AtOnce) -> AtOnce:
    """The same, outside autocast: a compiled program would be cast by it."""

    def served(leaves: Sequence[Tensor]) -> Sequence[Tensor] | None:
        with outside_autocast():
            return at_once(leaves)

    return served


def _global_state() -> Callable[[], bool] | None:
    """What tells that grad mode, autocast, default dtype, threads and precision are as now; None where torch can't."""
    if global_state_guard is None:
        return None
    check: Callable[[], bool] = global_state_guard().check
    return check if check() else None
