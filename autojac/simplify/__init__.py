"""What a recorded graph does without: passes that leave its results as they are, one a file.

A pass takes an `fx.Graph` as `autojac.tape` makes it, with its output node, and changes it in place. It may rely on the
`meta` that the tape describes and must give new nodes such a `meta` too. What is `ordered` (`autojac.simplify.order`)
may not be merged, moved or left out.
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
    """Every pass by name: files of this package with a function of their own name, in the order of their `RANK`."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if hasattr(module, "RANK"):
            found[info.name] = (module.RANK, getattr(module, info.name))
    return {name: run for name, (_, run) in sorted(found.items(), key=lambda entry: entry[1][0])}


def simplify(graph: fx.Graph, without: Iterable[str] = ()) -> None:
    """Run every pass but those named, and leave out what nothing needs.

    Args:
        graph: changed in place.
        without: names of passes to leave out.

    Raises:
        KeyError: for a name that no pass has.
    """
    left_out = {name: passes()[name] for name in without}
    for name, run in passes().items():
        if name not in left_out:
            run(graph)
