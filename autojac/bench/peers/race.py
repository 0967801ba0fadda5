"""Race autojac against compiled JAX, asdex and TensorFlow: the same weights, one process at work at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import autojac
from autojac.autodiff.tolerance import disagreement
from autojac.bench.baselines import reference
from autojac.bench.coupled import brusselator
from autojac.bench.interop.ways import loss_gradient, pull_in_loop, rows
from autojac.bench.jacobians import OWN, PLAN, wrap
from autojac.bench.peers.client import Peer, PeerError
from autojac.bench.peers.program import Program, program_of
from autojac.bench.results import BenchResult, Facts, Figure, Outcome, fastest
from autojac.bench.run import Settings, admit, at_rest
from autojac.bench.training import WHOLE, gradients_after, loss_of, moves_jacobian, take_compared_steps
from autojac.bench.workloads import WORKLOADS, Workload, move_to, of_kind
from autojac.methods.threads import threads
from autojac.planning.search import measure

FOLDER = Path(".venv-peers")
"""Where `make bench-peers` puts an environment for each library."""
JACOBIANS: dict[str, tuple[str, ...]] = {
    "jax": ("jit(vmap(jacrev))", "jit(vmap(jacfwd))"),
    "tensorflow": ("batch_jacobian", "batch_jacobian, xla"),
}
STEPS: dict[str, tuple[str, ...]] = {"jax": ("step by jacrev", "step by jacfwd")}
SPARSE: dict[str, tuple[str, ...]] = {"asdex": ("asdex",)}
RACED = (
    *("sin", "mlp-2-16-2", "mlp-3-64-64-3", "gelu-6-128-128-6", "silu-residual-16", "mlp-64-256-256-64"),
    *("mlp-4-192-384", "mlp-512-256-3", "autoencoder-256-4", "mlp-4-32-4-200k", "burgers", "lorenz-96"),
)
GRID = 32
"""Cells along each side of the Brusselator."""
OVER_JAX, OVER_TENSORFLOW, OVER_ASDEX = "over JAX", "over TensorFlow", "over asdex"
LABELS = {"jax": OVER_JAX, "tensorflow": OVER_TENSORFLOW, "asdex": OVER_ASDEX}
STEP_BOUND = 1.0
Arrays = dict[str, np.ndarray[Any, Any]]
Time = Callable[[int], float]


def race_peers(
    name: str,
    own: tuple[Callable[[], Any], Callable[[], Tensor]],
    given: tuple[Program, Arrays],
    read: Callable[[Arrays], Tensor],
    truth: Tensor,
    ways: Mapping[str, tuple[str, ...]],
    settings: Settings,
) -> BenchResult:
    """Check all that compute the same, and time them in turns, each while the others are at rest.

    Args:
        name: of the result.
        own: what is timed of autojac, and what of it is compared.
        given: the program, and its arrays with `x`.
        read: makes of a peer's arrays what is compared.
        truth: what all must give.
        ways: of each library.
        settings: how to measure; the thread count is torch's.
    """
    outcomes = [admit(OWN, own[0], truth, own[1]).outcome]
    times: dict[str, Time] = {OWN: lambda calls: measure.clock.per_call(own[0], truth.device, calls)}
    facts: Facts = {"threads": torch.get_num_threads()}
    cores: list[float] = []
    with ExitStack() as stack:
        for library, names in ways.items():
            try:
                python = str(Path(settings.peers or FOLDER) / library / "bin" / "python")
                peer = stack.enter_context(Peer(python, library, torch.get_num_threads()))
            except PeerError as error:
                outcomes += [Outcome(way, "skipped", reason=str(error)) for way in names]
                continue
            facts[library] = str(peer.about["version"])
            for way in names:
                outcome = _prepare(peer, way, given, read, truth, facts)
                outcomes.append(outcome)
                if outcome.state == "right":
                    times[way] = partial(_time, peer, way, cores)
        samples = in_turns(times, settings)
    outcomes = [o.with_samples(samples[o.name]) if o.name in samples and o.state == "right" else o for o in outcomes]
    facts["most cores of a peer"] = max(cores, default=0.0)
    by_name = {outcome.name: outcome for outcome in outcomes}
    figures = tuple(
        Figure.over(outcomes[0], best, what=LABELS[library])
        for library, names in ways.items()
        if (best := fastest(by_name[way] for way in names)) is not None
    )
    return BenchResult(name, tuple(outcomes), figures, facts)


def _prepare(
    peer: Peer, way: str, given: tuple[Program, Arrays], read: Callable[[Arrays], Tensor], truth: Tensor, facts: Facts
) -> Outcome:
    try:
        found, seconds = peer.prepare(way, *given)
        J = read(found)
    except (PeerError, KeyError) as problem:
        return Outcome(way, "error", reason=str(problem))
    facts[f"first call of {way}, s"] = seconds
    if J.shape != truth.shape:
        return Outcome(way, "wrong", reason=f"shape {tuple(J.shape)} instead of {tuple(truth.shape)}")
    error = disagreement(J, truth)
    return Outcome(way, "right") if error is None else Outcome(way, "wrong", reason=f"off by {error:.2g}")


def _time(peer: Peer, way: str, cores: list[float], calls: int) -> float:
    seconds, used = peer.time(way, calls)
    cores.append(used)
    return seconds


def in_turns(times: Mapping[str, Time], settings: Settings) -> dict[str, list[float]]:
    """Time each in each round, every other round backwards: seconds per call."""
    calls = {}
    for name, time in times.items():
        calls[name] = 1
        while time(calls[name]) * calls[name] < settings.shortest_s:
            calls[name] *= 2
    samples: dict[str, list[float]] = {name: [] for name in times}
    until = measure.clock.now() + settings.race_s
    for turn in range(settings.rounds):
        for name in reversed(list(times)) if turn % 2 else times:
            samples[name].append(times[name](calls[name]))
        if measure.clock.now() > until:
            break
    return samples


def jacobian_race(settings: Settings, workload: Workload, count: int) -> BenchResult:
    """Race a workload's Jacobian with so many threads on each side."""
    with threads(count), at_rest():
        func, x = workload.make()
        program, arrays = program_of(func)
        jac = wrap(func, settings)
        jac(x)
        truth = reference(workload, func, x)
        given = program, {**arrays, "x": x.numpy()}
        result = race_peers(
            _name(workload.name, count),
            (lambda: jac(x), lambda: jac(x)),
            given,
            _as_blocks,
            truth,
            JACOBIANS,
            settings,
        )
        facts: Facts = {"kind": workload.kind, "B": workload.batch, "n": workload.n, "m": workload.m}
    return BenchResult(result.name, result.outcomes, result.figures, {**facts, PLAN: str(jac.plan(x)), **result.facts})


def step_race(settings: Settings, workload: Workload, count: int) -> BenchResult:
    """Race a whole training step against a jitted one, with so many threads on each side."""
    with threads(count), at_rest(training=True):
        func, x = workload.make()
        assert isinstance(func, nn.Module)
        names = [name for name, _ in func.named_parameters() if moves_jacobian(func, name, x)]
        program, arrays = program_of(func)
        exact: Any = move_to(func, x.device, torch.float64)
        doubled = [exact.get_parameter(name) for name in names]
        truth = loss_gradient(rows(exact, x.double(), pull_in_loop), doubled)[None].to(x.dtype)
        whole = autojac.TrainingStep(func, loss_of, **settings.planning())
        whole(x)
        take_compared_steps(whole, x)
        own = gradients_after(lambda: whole(x), [func.get_parameter(name) for name in names])

        def read(found: Arrays) -> Tensor:
            # (inputs, outputs) as the program holds them
            return torch.cat([torch.from_numpy(found[name].T).flatten() for name in names])[None]

        given = program, {**arrays, "x": x.numpy()}
        result = race_peers(_name(workload.name, count), (lambda: whole(x), own), given, read, truth, STEPS, settings)
        facts: Facts = {"kind": workload.kind, "B": workload.batch, "n": workload.n, "m": workload.m, "autojac": WHOLE}
    figures = tuple(Figure(f.what, f.value, STEP_BOUND) for f in result.figures)
    return BenchResult(result.name, result.outcomes, figures, {**facts, **result.facts})


def sparse_race(settings: Settings, size: int = GRID, count: int = 1) -> BenchResult:
    """Race the sparse Jacobian of the Brusselator on a grid."""
    with threads(count), at_rest():
        func, x = brusselator(size), torch.rand(2 * size * size, generator=torch.Generator().manual_seed(0)) + 1
        jac = wrap(func, settings, layout="sparse", in_dims=None)
        truth = torch.func.jacrev(func)(x.double()).to(x.dtype)
        given: tuple[Program, Arrays] = ([["brusselator", size]], {"x": x.numpy()})
        name = _name(f"brusselator-{size}", count)
        own = (lambda: jac(x), lambda: jac(x).to_dense())
        return race_peers(name, own, given, _as_blocks, truth, SPARSE, settings)


def _name(name: str, count: int) -> str:
    return f"{name}, {count} thread{'s' if count > 1 else ''}"


def _as_blocks(found: Arrays) -> Tensor:
    return torch.from_numpy(found["J"].copy())


def peer_cases() -> dict[str, Callable[[Settings], BenchResult]]:
    """Return the races, with one thread on each side and with all."""
    found: dict[str, Callable[[Settings], BenchResult]] = {}
    for count in sorted({1, len(os.sched_getaffinity(0))}):
        for name in RACED:
            found[_name(name, count)] = partial(jacobian_race, workload=WORKLOADS[name], count=count)
        for workload in of_kind("training"):
            found[_name(workload.name, count)] = partial(step_race, workload=workload, count=count)
        found[_name(f"brusselator-{GRID}", count)] = partial(sparse_race, count=count)
    return found
