"""Progress of a search on a terminal; silence everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from autojac.core.plan import Effort, Trial, expression


@contextmanager
def reporter(effort: Effort) -> Iterator[Callable[[Trial], None] | None]:
    """Yield a callback that shows each trial on standard error, or None where that is no terminal."""
    if effort == "estimate" or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    console = Console(stderr=True)
    count = 0
    best: float | None = None
    with console.status("autojac: probing and tuning") as status:

        def show(trial: Trial) -> None:
            nonlocal count, best
            count += 1
            if trial.state == "complete" and trial.seconds is not None:
                best = trial.seconds if best is None else min(best, trial.seconds)
            fastest = "" if best is None else f", best {best * 1e3:.3g} ms"
            status.update(f"autojac: {count} candidates{fastest}; {trial.state}: {expression(trial.method)}")

        yield show
