"""What a recorded graph does without: passes that leave its results as they are, one a file.

A pass takes an `fx.Graph` as `autojac.replay.tape` makes it, with its output node, and changes it in place. It may rely
on the `meta` that the tape describes and must give new nodes such a `meta` too. What is `immovable_operators`, as
`autojac.replay.passes.ordering` says, may not be merged, moved or left out.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from functools import cache

from torch import fx

Pass = Callable[[fx.Graph], None]


@cache
def passes() -> dict[str, Pass]:
    """Return every pass by name: functions named like their file in this package, in the order of their `RANK`.

    A pass that runs several times has a tuple of them.
    """
    return dict(_schedule())


@cache
def _schedule() -> tuple[tuple[str, Pass], ...]:
    ranked = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        rank = getattr(module, "RANK", ())
        ranked += [(place, info.name, module) for place in (rank if isinstance(rank, tuple) else (rank,))]
    return tuple((name, getattr(module, name)) for _, name, module in sorted(ranked, key=lambda entry: entry[:2]))


def simplify(graph: fx.Graph, without: Iterable[str] = ()) -> None:
    """Run every pass but those named.

    Args:
        graph: changed in place.
        without: names of passes to leave out.

    Raises:
        KeyError: for a name that no pass has.
    """
    left_out = {name: passes()[name] for name in without}
    for name, run in _schedule():
        if name not in left_out:
            run(graph)
