"""Fast path: serve a call whose argument metadata and global state match an earlier one directly from the replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from autojac.autodiff.open_modes import hooked, transforming
from autojac.core.autocast import outside_autocast
from autojac.core.module_function import ModuleFunction
from autojac.guards.tensor_metadata import metadata_check
from autojac.planning.prepared_plan import FastPath, PreparedPlan
from autojac.replay.replayer import Replayer
from autojac.torch_internals import global_state_guard, may_transform

TryReplay = Callable[[Sequence[Tensor]], Sequence[Tensor] | None]


def no_fast_path(args: tuple[Any, ...]) -> None:
    """Serve no call: none like it was served before."""
    return


def fast_path(plan: PreparedPlan, args: Sequence[Any]) -> FastPath:
    """Return what serves calls like one that a plan has just served, in a few microseconds.

    All that a key is made of is compared in C in one pass: of the arguments shapes, strides, types, `requires_grad` and
    the modes that their dispatch depends on; of the process its global flags. What func reads is the replay's to watch.

    Of a module's parameters the wrapper is called with the module's own arguments: the parameters are those of the call
    that was served, as long as the guard sees that the module holds them still.

    Args:
        plan: what served the call.
        args: its positional arguments; it had no others.
    """
    replayer, layout, schedule = plan.compute, plan.layout, plan.schedule
    held: tuple[Tensor, ...] = ()
    if isinstance(layout.func, ModuleFunction):
        held, args = tuple(args[0].values()), args[1]
    elif not layout.plain:
        return no_fast_path
    tensors = [arg for arg in (*held, *args) if _is_plain(arg)]
    plain = not layout.moved and not layout.returns_more and len(tensors) == len(held) + len(args) > len(held)
    # the plan may depend on the values of these
    watched = plan.contents is not None and (plan.contents.constants or plan.contents.arguments)
    if not plain or watched or plan.problem.layout == "sparse" or not isinstance(replayer, Replayer):
        return no_fast_path
    same, steady = metadata_check(tuple(tensors)), _global_state_check()
    if same is None or steady is None or replayer.problem.structure.effects:
        return no_fast_path
    count, single = len(args), layout.single and layout.out_spec is None
    try_replay = _outside_autocast(replayer.try_replay) if layout.autocast else replayer.try_replay
    differentiable = plan.problem.differentiable

    def serve(args: tuple[Any, ...]) -> tuple[Any, Any] | None:
        # first of all: torch.compile must not trace what follows
        if (may_transform() and transforming()) or len(args) != count:
            return None
        given = (*held, *args) if held else args
        if not same(*given) or not steady() or (differentiable and hooked()):
            return None
        calls = schedule.calls + 1
        if calls >= schedule.next_check or calls >= schedule.next_step or plan.fast_path is not serve:
            return None
        outputs = try_replay(given)
        if outputs is None:
            return None
        schedule.calls = calls
        if single:
            return outputs  # type: ignore[return-value]
        result = replayer.result(outputs)
        return layout.value(result.values), layout.jacobian(result.jacobians)

    return serve


def _is_plain(arg: Any) -> bool:
    return isinstance(arg, Tensor) and not arg.is_inference() and arg.is_contiguous()


def _outside_autocast(try_replay: TryReplay) -> TryReplay:
    """Return the same outside autocast, which would cast a compiled program."""

    def run(leaves: Sequence[Tensor]) -> Sequence[Tensor] | None:
        with outside_autocast():
            return try_replay(leaves)

    return run


def _global_state_check() -> Callable[[], bool] | None:
    """Return a check that grad mode, autocast, default dtype, threads and precision are as now, if torch has one."""
    if global_state_guard is None:
        return None
    check: Callable[[], bool] = global_state_guard().check
    return check if check() else None
