"""A loss on the derivatives of a model, as a function of everything that it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autojac.api.autojacobian import AutoJacobian
from autojac.api.derivatives import Derivatives
from autojac.api.joined_columns import JoinedColumns
from autojac.api.over_batch_axes import PlansOverBatchAxes
from autojac.api.planned_call import PlannedCall
from autojac.core import pytree
from autojac.core.settable_arguments import write_back_copies
from autojac.errors import OutputError, kind_of


def own_inputs(source: Any, x: Any) -> tuple[Any, ...]:
    """Return the arguments that a wrapper gets for the first one of a step: several for derivatives in several."""
    several_tensors = isinstance(source, Derivatives) and isinstance(source.planned, JoinedColumns)
    return tuple(x) if several_tensors and isinstance(x, (tuple, list)) else (x,)


def planned_call(source: Any, x: Any) -> PlannedCall:
    """Return the call of the underlying `AutoJacobian` with which a wrapper computes its derivatives at `x`."""
    args = own_inputs(source, x)
    if isinstance(source, PlansOverBatchAxes):
        call = source._calls.flat(args)
        source, args = call.wrapper, call.args
    if not isinstance(source, AutoJacobian):
        source = source.planned
    if isinstance(source, JoinedColumns):
        source, args = source._join(args, {})
    behind: PlannedCall = next(source._calls_behind("jacobian", args, {}))
    return behind


class LossOfDerivatives(nn.Module):
    """A loss on the derivatives of a model, as a module that holds all parameters that it trains.

    Its arguments have one more axis in front, of length one, and so has what it returns: to the planner the whole
    batch is one sample, and the parameters are shared.

    Args:
        source: a wrapper that gives derivatives.
        loss: a function of these and of further arguments.
        modules: the modules in func and loss, which hold the parameters.
    """

    def __init__(self, source: Any, loss: Callable[..., Any], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.source, self.loss = source, loss
        self.trained = nn.ModuleList(modules)

    def forward(self, *args: Any) -> Tensor:
        unbatched = pytree.tree_map_only(Tensor, lambda x: x.squeeze(0), args)
        with write_back_copies(args, unbatched):
            return self.value(*unbatched).unsqueeze(0)

    def value(self, x: Any, *rest: Any) -> Tensor:
        """Return the loss, with its graph."""
        with torch.enable_grad():
            if isinstance(self.source, AutoJacobian):
                parts = self.source.value_and_jacobian(x)
            elif isinstance(self.source, Derivatives):
                parts = self.source(*own_inputs(self.source, x))
            else:
                parts = (self.source(x),)
            value = self.loss(*parts, *rest)
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else kind_of(value)
                message = f"a loss returns one number, got {got}. Reduce it, as by .mean(), before it is returned"
                raise OutputError(message)
            return value.reshape(())
