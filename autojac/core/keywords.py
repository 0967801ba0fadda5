"""The keyword arguments of a call, with what else each evaluation of func needs to know of the call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from autojac.core.settable_arguments import SettableArguments
from autojac.torch_internals import pytree


class Keywords(dict[str, Any]):
    """The keyword arguments of a call, and the context of its evaluations.

    A pytree node: its leaves are those of the keyword arguments and of the constants.

    Attributes:
        constants: the non-tensor positional arguments, by their index among the flat arguments.
        aux: a list that collects what func returns besides its outputs; None where it is not asked for.
        random_state: the random state that every evaluation starts from; None for the current one.
        settable: what evaluations may set among the arguments; None where there is nothing.
    """

    def __init__(
        self,
        keywords: Mapping[str, Any],
        constants: Mapping[int, Any] | None = None,
        aux: list[Any] | None = None,
        random_state: Mapping[str, Any] | None = None,
        settable: SettableArguments | None = None,
    ) -> None:
        super().__init__(keywords)
        self.constants = {} if constants is None else constants
        self.aux = aux
        self.random_state = random_state
        self.settable = settable

    @classmethod
    def of(cls, keywords: Mapping[str, Any], **context: Any) -> Self:
        """Return these keyword arguments with some of their context replaced."""
        if isinstance(keywords, cls):
            context = vars(keywords) | context
        return cls(keywords, **context)

    def __bool__(self) -> bool:
        """Check whether a call has arguments besides the tensors among its positional ones."""
        return len(self) > 0 or bool(self.constants)


def passed_values(keywords: Mapping[str, Any]) -> list[Any]:
    """Return what a call passes by keyword, and the non-tensors that it passes by position."""
    constants = keywords.constants if isinstance(keywords, Keywords) else {}
    return [*keywords.values(), *constants.values()]


def _flatten(keywords: Keywords) -> tuple[list[Any], Any]:
    return [dict(keywords), keywords.constants], (keywords.aux, keywords.random_state, keywords.settable)


def _unflatten(parts: Any, context: Any) -> Keywords:
    return Keywords(*parts, *context)


pytree.register_pytree_node(Keywords, _flatten, _unflatten)
