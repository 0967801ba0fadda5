"""One call of a function, described once for everything that finds, makes, runs or checks its plan."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from autojac.core.call import CallLayout, describe
from autojac.core.keywords import Keywords, passed_values
from autojac.core.settable_arguments import SettableArguments, find_settable_places
from autojac.core.signature import current_flags
from autojac.guards.captures import Captures

_requires_grad = operator.attrgetter("requires_grad")


class CallKey(NamedTuple):
    """The key of a plan in use: all by which one call may need another plan than the next.

    Attributes:
        arguments, keywords: shape, dtype, device, `requires_grad` and subclass of tensors, values of the rest.
        grad: whether autograd records.
        trains: whether it records something that the function holds.
        flags: see `current_flags`.
    """

    arguments: tuple[Any, ...]
    keywords: tuple[Any, ...]
    grad: bool
    trains: bool
    flags: tuple[Any, ...]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any], captured: Captures) -> Self:
        """Return the key of a call of a function that reaches `captured`; part of every call."""
        grad = torch.is_grad_enabled()
        try:
            kinds = [(x.shape, x.dtype, x.device, x.requires_grad) if type(x) is Tensor else describe(x) for x in args]
        except RuntimeError:  # a nested tensor has no shape
            kinds = list(map(describe, args))
        return cls(
            tuple(kinds),
            describe_keywords(kwargs) if kwargs else (),
            grad,
            grad and any(map(_requires_grad, captured.tensors)),
            current_flags(captured.modules),
        )


def describe_keywords(kwargs: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Describe each keyword argument as far as the choice of a plan depends on it."""
    return tuple([(name, describe(value)) for name, value in kwargs.items()])


@dataclass
class Call:
    """One call.

    Attributes:
        args, kwargs: as the function gets them.
        key: of its plan.
        layout: how its arguments become flat tensors, and its flat results a nest again.
        leaves: the tensors among its positional arguments, batch first.
        keywords: its keyword arguments, with the non-tensor positional ones.
        captured: what the function reaches besides its arguments.
    """

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    key: CallKey
    layout: CallLayout
    leaves: tuple[Tensor, ...]
    keywords: Mapping[str, Any]
    captured: Captures

    @property
    def settable(self) -> SettableArguments | None:
        """What func may set among the arguments; None where there is nothing."""
        return self.keywords.settable if isinstance(self.keywords, Keywords) else None

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """The tensors besides the inputs that a loss on a differentiable Jacobian trains."""
        return find_trained_tensors(self.captured, self.keywords)

    @property
    def is_differentiable(self) -> bool:
        """Whether the Jacobian is to carry a graph."""
        return self.key.grad and bool(self.trained or any(map(_requires_grad, self.leaves)))

    def without_grad(self) -> Call:
        """Return the same call for a Jacobian without a graph."""
        return dataclasses.replace(self, key=self.key._replace(grad=False))

    def detach(self) -> Call:
        """Return the call with new leaves, so that probing and tuning fire no hook of the caller's."""
        return dataclasses.replace(self, leaves=detach_leaves(self.leaves))


def detach_leaves(leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return new leaves that share the values, and require grad where these do."""
    return tuple(leaf.detach().requires_grad_(leaf.requires_grad) for leaf in leaves)


def find_trained_tensors(captured: Captures, keywords: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return the tensors besides the inputs that a loss on a differentiable Jacobian trains."""
    arguments = find_settable_places(passed_values(keywords))[1]
    return tuple(tensor for tensor in (*captured.tensors, *arguments) if tensor.requires_grad)


def not_overwritten(trained: Sequence[Tensor], written: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return those that a call does not overwrite: an overwritten tensor gets no gradient any more."""
    overwritten = {id(tensor) for tensor in written if tensor.grad_fn is not None}
    return tuple(tensor for tensor in trained if id(tensor) not in overwritten)
