"""Search: Optuna proposes candidates, each is checked and then timed, and the finalists are compared in pairs."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import optuna
import torch
from torch import Tensor

from autojac.autodiff import Pullback, gradient
from autojac.errors import SearchError
from autojac.methods.base import Compute, Method, Problem, Result, bind, build
from autojac.plan import Effort, Trial, TrialState, effort_rank
from autojac.quiet import Quiet
from autojac.search import measure
from autojac.search.space import candidates, choose, default_methods, hopeless, path_of
from autojac.verify import Reference

BRUTE_FORCE_LIMIT = 128
BUDGETS_S: dict[str, float] = {"estimate": 0.0, "quick": 3.0, "measure": 60.0, "exhaustive": 600.0}
SHORTEST_S = {"quick": 2e-3, "measure": 5e-3, "exhaustive": 2e-2}
ROUNDS = {"quick": 9, "measure": 15, "exhaustive": 31}
FINALISTS = 4
SHOOT_OUT_SHARE = 0.25
"""Part of the budget kept for the last word."""
PRUNE_RATIO = 2.0
NOISE = 0.02
"""Paired differences below this share are noise: the incumbent stays."""

LAST_RESORT = build({"method": "Pull", "seeds": "identity", "engine": "loop"})
"""One plain VJP a row: right for whatever runs under autograd."""

Progress = Callable[[Trial], None]


@dataclass
class Subject:
    """One search: the problem at one point, and all that is known of its candidates so far."""

    problem: Problem
    leaves: Sequence[Tensor]
    kwargs: Mapping[str, Any]
    captured: Sequence[Tensor]
    quiet: Quiet
    effort: Effort
    deadline: float
    end: float
    reference: Reference
    progress: Progress | None = None
    trials: dict[Method, Trial] = field(default_factory=dict)
    runs: dict[Method, measure.Run] = field(default_factory=dict)
    best: float = math.inf

    @property
    def device(self) -> torch.device:
        return self.leaves[self.problem.inputs[0]].device

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def record(self, method: Method, state: TrialState, **facts: Any) -> Trial:
        trial = Trial(method.spec(), state, **facts)
        self.trials[method] = trial
        if self.progress is not None:
            self.progress(trial)
        return trial


@dataclass(frozen=True)
class Found:
    """What a search found: the method, its time and torch's in the same shoot-out, and every trial."""

    method: Method
    seconds: float | None
    default_seconds: float | None
    memory_bytes: int | None
    trials: tuple[Trial, ...]


def search(
    problem: Problem,
    leaves: Sequence[Tensor],
    kwargs: Mapping[str, Any],
    captured: Sequence[Tensor],
    quiet: Quiet,
    effort: Effort,
    budget_s: float | None = None,
    hints: Sequence[Method] = (),
    progress: Progress | None = None,
) -> Found:
    """Find the fastest right method for a problem at one point.

    Args:
        problem: what to compute.
        leaves, kwargs: the point at which candidates are checked and timed.
        captured: tensors besides the inputs that a loss on a differentiable Jacobian trains.
        quiet: how to evaluate without a trace.
        effort: `estimate` takes the first right method of the cost model and times nothing.
        budget_s: seconds for the search; the effort's own by default. Overshot by one candidate's run at most; what
            torch loads once a process is not counted.
        hints: methods to try first, such as another device's winner.
        progress: called after each trial.

    Raises:
        SearchError: if no candidate gives the right Jacobian within the limits.
    """
    problem = dataclasses.replace(problem, pass_bytes=_pass_bytes(problem, leaves, kwargs, quiet))
    depth = max(effort_rank(effort) - effort_rank("quick"), 0)
    if effort != "estimate":
        # torch loads its compiler (1 s) at the first vmapped VJP of a process: no candidate's fault
        importlib.import_module("torch._dynamo")
    start, allowed = time.monotonic(), BUDGETS_S[effort] if budget_s is None else budget_s
    subject = Subject(
        problem,
        leaves,
        kwargs,
        captured,
        quiet,
        effort,
        start + (1 - SHOOT_OUT_SHARE) * allowed,
        start + allowed,
        Reference(problem, leaves, kwargs, quiet),
        progress,
    )
    defaults = default_methods(problem)
    space = list(dict.fromkeys([*candidates(problem, depth), *defaults]))
    if effort == "estimate":
        return _estimate(subject, space)
    dropped = hopeless(problem, space) - set(defaults) if depth < 2 else set()
    for method in dropped:
        subject.record(method, "skipped", reason="predicted to be far slower than the best")
    space = [method for method in space if method not in dropped]
    wanted = [method for method in hints if method in space]
    _propose(subject, space, [*wanted, *space[:3], *defaults[:1]])
    _ensure_one(subject, [*space, LAST_RESORT])
    for method in space:
        if method not in subject.trials:
            subject.record(method, "skipped", reason="no budget was left for it")
    return _shoot_out(subject, defaults)


def _pass_bytes(problem: Problem, leaves: Sequence[Tensor], kwargs: Mapping[str, Any], quiet: Quiet) -> int:
    """Peak memory of one plain evaluation and one VJP of the first output: what a seed costs at the least."""

    def one_pass() -> object:
        bound, inputs = bind(problem, leaves, kwargs)
        pullback = Pullback(bound, inputs, differentiable=False)
        return pullback(0, torch.ones_like(pullback.outputs[0]), last=True)

    with quiet():
        return measure.peak_bytes(one_pass, leaves[problem.inputs[0]].device)


def _estimate(subject: Subject, space: Sequence[Method]) -> Found:
    """The cost model's first choice that is right."""
    for method in [*space, LAST_RESORT]:
        if _attempt(subject, method) is not None:
            return Found(method, None, None, None, tuple(subject.trials.values()))
    raise _nothing_found(subject)


def _propose(subject: Subject, space: Sequence[Method], first: Sequence[Method]) -> None:
    """Let Optuna walk the space until it is exhausted or time is up."""
    brute = len(space) <= BRUTE_FORCE_LIMIT
    with _quiet_optuna():
        sampler: optuna.samplers.BaseSampler = (
            optuna.samplers.BruteForceSampler(seed=0)
            if brute
            else optuna.samplers.TPESampler(multivariate=True, group=True, seed=0)
        )
        study = optuna.create_study(sampler=sampler, pruner=optuna.pruners.NopPruner())
        for method in dict.fromkeys(first):
            study.enqueue_trial(path_of(space, method), skip_if_exists=True)

        def objective(trial: optuna.Trial) -> float:
            method = choose(space, trial.suggest_categorical)
            known = subject.trials.get(method)
            outcome = known if known is not None else _trial(subject, method)
            if outcome.state == "complete" and outcome.seconds is not None:
                return outcome.seconds
            raise optuna.TrialPruned

        def stop(current: optuna.Study, _: Any) -> None:
            if subject.out_of_time or len(subject.trials) >= len(space) + len(first):
                current.stop()

        if not subject.out_of_time:
            study.optimize(objective, n_trials=None if brute else 3 * BRUTE_FORCE_LIMIT, callbacks=[stop])


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Optuna without its log lines, which belong to its own users."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _attempt(subject: Subject, method: Method) -> Compute | None:
    """Prepare a candidate, run it once and check the result; None, with the reason kept, if it fails."""
    problem = subject.problem
    needed = problem.result_bytes + method.workspace(problem)
    if needed > problem.memory_limit:
        reason = f"needs at least {needed / 2**30:.2g} GiB of the {problem.memory_limit / 2**30:.2g} GiB allowed"
        subject.record(method, "infeasible", reason=reason)
        return None
    try:
        with subject.quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compute = method.prepare(problem)
            result = compute(subject.leaves, subject.kwargs)
            wrong = subject.reference.check(result)
            if wrong is None and problem.differentiable:
                wrong = subject.reference.check_gradient(result, subject.captured)
    except Exception as error:  # whatever a transform, a compiler or an allocator raises makes it infeasible
        subject.record(method, "infeasible", reason=_first_line(error))
        return None
    if wrong is not None:
        subject.record(method, "rejected", reason=wrong)
        return None
    return compute


def _trial(subject: Subject, method: Method) -> Trial:
    """Check a candidate, then time it unless its first run is already hopeless."""
    compute = _attempt(subject, method)
    if compute is None:
        return subject.trials[method]
    run = _as_used(subject, compute)
    try:
        with subject.quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first = measure.once(run, subject.device)
            if first > PRUNE_RATIO * subject.best:
                first = min(first, measure.once(run, subject.device))
            if first > PRUNE_RATIO * subject.best:
                return subject.record(
                    method, "pruned", seconds=first, reason="already twice the best after its warm-up"
                )
            timing = measure.repeat(run, subject.device, SHORTEST_S[subject.effort], 1 if subject.out_of_time else 3)
            memory = measure.peak_bytes(run, subject.device)
    except Exception as error:
        return subject.record(method, "infeasible", reason=_first_line(error))
    if memory > subject.problem.memory_limit:
        reason = f"took {memory / 2**30:.2g} GiB of the {subject.problem.memory_limit / 2**30:.2g} GiB allowed"
        return subject.record(method, "infeasible", memory_bytes=memory, reason=reason)
    subject.best = min(subject.best, timing.seconds)
    subject.runs[method] = run
    return subject.record(method, "complete", seconds=timing.seconds, dispersion=timing.dispersion, memory_bytes=memory)


def _as_used(subject: Subject, compute: Compute) -> measure.Run:
    """What a training step does with the Jacobian: with a graph, the backward through it too."""
    leaves, kwargs = subject.leaves, subject.kwargs
    sources = [*subject.reference.connected, *(x for x in subject.captured if x.requires_grad)]
    if not subject.problem.differentiable or not sources:
        return lambda: compute(leaves, kwargs)

    def step() -> Result:
        result = compute(leaves, kwargs)
        total = sum(jacobian.sum() for row in result.jacobians for jacobian in row)
        assert isinstance(total, Tensor)
        gradient(total, sources)
        return result

    return step


def _ensure_one(subject: Subject, methods: Sequence[Method]) -> None:
    """However short the budget, some right method must come out."""
    for method in methods:
        if subject.runs:
            return
        if method not in subject.trials or subject.trials[method].state == "skipped":
            _trial(subject, method)
    if not subject.runs:
        raise _nothing_found(subject)


def _shoot_out(subject: Subject, defaults: Sequence[Method]) -> Found:
    """Interleave the fastest few and torch's default; inside the noise the default stays, then less memory wins."""
    for method in defaults:
        if method not in subject.trials and not subject.out_of_time:
            _trial(subject, method)
        if method in subject.trials and subject.trials[method].state in ("complete", "pruned"):
            break
    incumbent = next((method for method in defaults if method in subject.runs), None)
    ranked = sorted(subject.runs, key=lambda method: (subject.trials[method].seconds, repr(method)))
    finalists = ranked[:FINALISTS]
    if incumbent is not None and incumbent not in finalists:
        finalists.append(incumbent)
    if len(finalists) == 1:
        return _found(subject, finalists[0], subject.trials[finalists[0]].seconds, incumbent, None)
    effort = subject.effort
    with subject.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = measure.interleaved(
            [subject.runs[method] for method in finalists],
            subject.device,
            SHORTEST_S[effort],
            ROUNDS[effort],
            subject.end,
        )
    samples = dict(zip(finalists, table, strict=True))
    medians = {method: statistics.median(times) for method, times in samples.items()}
    winner = min(finalists, key=lambda method: (medians[method], repr(method)))
    close = [method for method in finalists if not _faster(samples[winner], samples[method])]
    if incumbent in close:
        winner = incumbent
    else:
        winner = min(
            close, key=lambda method: (subject.trials[method].memory_bytes or 0, medians[method], repr(method))
        )
    default_seconds = medians.get(incumbent) if incumbent else _default_seconds(subject, defaults)
    return _found(subject, winner, medians[winner], incumbent, default_seconds)


def _default_seconds(subject: Subject, defaults: Sequence[Method]) -> float | None:
    """What the default took in its only run, where it was too slow for the shoot-out."""
    return next(
        (subject.trials[m].seconds for m in defaults if m in subject.trials and subject.trials[m].seconds), None
    )


def _faster(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `one` beats `other` in paired rounds by more than noise."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return statistics.median(ratios) < 1 - NOISE and sum(ratio < 1 for ratio in ratios) > 0.6 * len(ratios)


def _found(
    subject: Subject, winner: Method, seconds: float | None, incumbent: Method | None, default_seconds: float | None
) -> Found:
    memory = subject.trials[winner].memory_bytes
    if default_seconds is None and winner == incumbent:
        default_seconds = seconds
    return Found(winner, seconds, default_seconds, memory, tuple(subject.trials.values()))


def _nothing_found(subject: Subject) -> SearchError:
    reasons = [f"{trial.method['method']}: {trial.reason}" for trial in subject.trials.values()]
    listed = "; ".join(itertools.islice(dict.fromkeys(reasons), 6)) or "there is no candidate"
    return SearchError(f"no method gives the right Jacobian within the limits. {listed}")


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]
