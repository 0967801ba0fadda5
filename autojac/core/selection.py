"""A part of what a function returns, picked by a path or a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autojac.errors import OptionError, OutputError, kind_of, nearest

Select = str | Callable[[Any], Any]


def require_selection(select: Any, has_aux: bool) -> None:
    """Raise `OptionError` unless `select` picks something."""
    if not (callable(select) or (isinstance(select, str) and select)):
        raise OptionError(
            f"select must be a path, such as 'logits' or 'states.0', or a function of func's output, got {select!r}"
        )
    if has_aux:
        raise OptionError(
            "select and has_aux=True exclude each other, since the whole output comes back as aux. Leave has_aux out, "
            "and select the output from the pair, as in select='0'"
        )


def pick(output: Any, select: Select) -> Any:
    """Return the part of an output that is differentiated.

    Raises:
        OutputError: if a path leads nowhere.
    """
    if not isinstance(select, str):
        return select(output)
    part = output
    for name in select.split("."):
        if isinstance(part, Mapping) and name in part:
            part = part[name]
        elif isinstance(part, Sequence) and name.lstrip("-").isdigit() and -len(part) <= int(name) < len(part):
            part = part[int(name)]
        elif name.isidentifier() and hasattr(part, name) and not callable(getattr(part, name)):
            part = getattr(part, name)
        else:
            names = list(map(str, part)) if isinstance(part, Mapping) else [n for n in dir(part) if n[:1] != "_"]
            raise OutputError(
                f"select={select!r} was expected to pick a part of func's output, but {kind_of(part)} there has no "
                f"{name!r}{nearest(name, names)}. Name keys, attributes and positions, joined by dots"
            )
    return part
