"""What a recorded graph does without: passes that leave its results as they are, one a file.

A pass takes an `fx.Graph` as `autojac.tape` makes it, with its output node, and changes it in place. It may rely on the
`meta` that the tape describes and must give new nodes such a `meta` too. What is `ordered`, as `autojac.simplify.order`
says, may not be merged, moved or left out.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from functools import cache

from torch import fx

Pass = Callable[[fx.Graph], None]


@cache
def passes() -> tuple[tuple[str, Pass], ...]:
    """Every pass by name: the files of this package with a function of their own name, in the order of their ranks.

    A pass with several of them runs several times.
    """
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    found = [(m.__name__.rpartition(".")[2], m) for m in modules if hasattr(m, "RANK")]
    ranked = sorted((rank, name, getattr(module, name)) for name, module in found for rank in _ranks(module.RANK))
    return tuple((name, run) for _, name, run in ranked)


def _ranks(rank: int | tuple[int, ...]) -> tuple[int, ...]:
    return (rank,) if isinstance(rank, int) else rank


def simplify(graph: fx.Graph, without: Iterable[str] = ()) -> None:
    """Run every pass but those named.

    Args:
        graph: changed in place.
        without: names of passes to leave out.

    Raises:
        KeyError: for a name that no pass has.
    """
    left_out = set(without)
    unknown = left_out - {name for name, _ in passes()}
    if unknown:
        raise KeyError(f"there is no pass named {', '.join(sorted(unknown))}")
    for name, run in passes():
        if name not in left_out:
            run(graph)
