"""How ways are checked and timed: the numbers first, then all in turns in one run."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import autojac
from autojac.autodiff.tolerance import disagreement
from autojac.bench.results import Outcome, State
from autojac.core.plan import Effort
from autojac.planning.search import measure

FAR = 10.0
"""Ways this many times slower than the best are not in the race: their first calls say enough."""
CLOSE = 1.5
"""Of other ways than autojac those are raced whose first call took no longer, as a multiple of the fastest."""

Run = Callable[[], Any]
Announce = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        effort: of the search.
        rounds: of each race.
        budget_s: seconds a search may take; the effort's own if None.
        device: where to run.
        store: where plans are kept; by default in memory, so that every run tunes afresh.
        shortest_s: seconds that a timed block of calls lasts at least.
        race_s: seconds after which a race takes no further round.
        quick: whether a suite leaves out what takes long.
        peers: folder of the environments that hold JAX, asdex and TensorFlow.
        training: race training steps where there is a choice.
    """

    effort: Effort = "measure"
    rounds: int = 15
    budget_s: float | None = 12.0
    device: str = "cpu"
    store: str | None = None
    shortest_s: float = 5e-3
    race_s: float = 5.0
    quick: bool = False
    peers: str | None = None
    training: bool = False

    def describe(self) -> dict[str, Any]:
        """Return what of it the numbers depend on; nothing that names the machine."""
        names = ("effort", "rounds", "budget_s", "shortest_s", "race_s", "quick", "training")
        return {"fresh_store": self.store is None, **{name: getattr(self, name) for name in names}}

    def planning(self) -> dict[str, Any]:
        """Return the options of a wrapper that a benchmark tunes, its store of its own unless one is named."""
        store = self.store or autojac.PlanStore(":memory:")
        return {"on_miss": "tune", "effort": self.effort, "budget_s": self.budget_s, "store": store}


@dataclass(frozen=True)
class Entrant:
    """Something that is raced, checked and run twice."""

    outcome: Outcome
    run: Run | None = None


def admit(name: str, run: Run, truth: Tensor, check: Callable[[], Tensor] | None = None) -> Entrant:
    """Check a way's numbers first, and time its second call.

    Args:
        name: of the way.
        run: what is timed.
        truth: what it must give.
        check: runs it and returns what is compared; `run` by default.
    """
    try:
        J = (check or run)()
        if J.shape != truth.shape:
            return Entrant(Outcome(name, "wrong", reason=f"shape {tuple(J.shape)} instead of {tuple(truth.shape)}"))
        error = disagreement(J, truth)
        if error is not None:
            return Entrant(Outcome(name, "wrong", reason=f"off by {error:.2g} relative to the reference"))
        del J
        seconds = measure.once(run, truth.device)
    except Exception as problem:  # whatever a transform or an allocator raises is that way's result
        return Entrant(Outcome(name, "error", reason=first_line(problem)))
    return Entrant(Outcome(name, "right", seconds), run)


def first_line(problem: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    line = next(iter(str(problem).strip().splitlines()), "")
    return f"{type(problem).__name__}: {line}"[:300]


def race_entrants(
    entrants: Sequence[Entrant],
    device: torch.device,
    settings: Settings,
    far: float = FAR,
    always: Sequence[str] = (),
    left_out: State = "right",
) -> list[Entrant]:
    """Return the entrants with their times from one interleaved run, but for those far behind the best."""
    runs = {e.outcome.name: e.run for e in entrants if e.run is not None}
    first = {e.outcome.name: e.outcome.seconds or math.inf for e in entrants if e.run is not None}
    best = min(first.values(), default=0.0)
    for name, seconds in first.items():
        # one call may have been unlucky, though not by that much
        if far * best < seconds < 3 * far * best:
            first[name] = min(seconds, measure.once(runs[name], device))
    names = [name for name in first if name in always or first[name] <= far * best]
    until = measure.clock.now() + settings.race_s
    table = measure.time_interleaved([runs[n] for n in names], device, settings.shortest_s, settings.rounds, until)
    samples = dict(zip(names, table, strict=True))
    timed = []
    for entrant in entrants:
        outcome = entrant.outcome
        if outcome.name in samples:
            outcome = outcome.with_samples(samples[outcome.name])
        elif entrant.run is not None:
            outcome = Outcome(outcome.name, left_out, first[outcome.name])
        timed.append(Entrant(outcome, entrant.run))
    return timed


def race_with_best(
    own: Sequence[Entrant], ways: Sequence[Entrant], device: torch.device, settings: Settings, default: str
) -> tuple[Outcome, ...]:
    """Race what is autojac's with the ways that may be the fastest, and the default; of others the first call counts.

    So rounds are short and many.
    """
    first = {way.outcome.name: way.outcome.seconds or math.inf for way in ways if way.run is not None}
    best = min(first.values(), default=0.0)
    names = [entrant.outcome.name for entrant in own]
    names += [name for name, seconds in first.items() if seconds <= CLOSE * best or name == default]
    return tuple(e.outcome for e in race_entrants([*own, *ways], device, settings, far=0.0, always=names))


@contextmanager
def at_rest(training: bool = False) -> Iterator[None]:
    """Take no graph unless steps are trained; torch warns of slow paths, which the times show."""
    with torch.set_grad_enabled(training), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_fresh_process(function: str, *arguments: Any, preload: str = "", grad: bool = False) -> Any:
    """Call a function of this package in a process of its own, with as many threads as this one.

    Its modules are compiled to bytecode once, as those of an installed package are.

    Args:
        function: `module:name`, the module without `autojac.bench.`.
        arguments: for the function, as JSON.
        preload: statements to run before anything else.
        grad: whether grad mode is on.

    Raises:
        RuntimeError: if it fails, with the last line of its error.
    """
    module, _, name = function.partition(":")
    script = (
        f"import json, sys\n{preload}\nimport torch\ntorch.set_num_threads({torch.get_num_threads()})\n"
        f"torch.set_grad_enabled({grad})\nfrom autojac.bench.{module} import {name} as function\n"
        "print(json.dumps(function(*json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, json.dumps(arguments)]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        raise RuntimeError(f"{function} failed in its process: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(device: str) -> dict[str, Any]:
    """Return what of this machine the times depend on; nothing that names it."""
    facts: dict[str, Any] = {
        "autojac": importlib.metadata.version("autojac"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "load": round(os.getloadavg()[0], 1),
    }
    if policy := os.environ.get("OMP_WAIT_POLICY"):
        facts["omp_wait_policy"] = policy
    if device.startswith("cuda"):
        facts |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name(device)}
    return facts
