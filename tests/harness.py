"""What tests of several rooms share: scenarios through the planner, comparison with the oracle, counted calls."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autojac import AutoJacobian, PlanStore
from autojac.core import work_clock
from autojac.core.options import Options
from autojac.core.sandbox import Sandbox
from autojac.guards.captures import captures
from autojac.methods.base import Method
from autojac.methods.support import engines
from autojac.planning import exploration
from autojac.planning.call import Call
from autojac.planning.first_call import FirstCallReport
from autojac.planning.prepared_plan import PreparedPlan
from autojac.planning.problem_builder import ProblemBuilder
from autojac.planning.search import measure, steps, trial
from autojac.problem.problem import Problem
from scenarios import Scenario


def wrapped(scenario: Scenario, func: Any, **options: Any) -> AutoJacobian:
    """A scenario's wrapper that times nothing, unless told otherwise."""
    defaults = {"on_miss": "estimate", "randomness": "different", "argnums": scenario.argnums, "store": ":memory:"}
    return AutoJacobian(func, **{**defaults, **options})


def forced(func: Any, args: Any, method: dict[str, Any], kwargs: Any = None, **options: Any) -> AutoJacobian:
    """A wrapper that finds a plan with this method in its store for such a call."""
    options = {"on_miss": "estimate", "randomness": "different", "store": PlanStore(":memory:"), **options}
    maker = AutoJacobian(func, **options)
    plan = maker.plan(*args, **(kwargs or {}))
    keys = in_use(maker).keys
    assert keys is not None
    maker._plans.planner.repository.save(keys, dataclasses.replace(plan, method=method))
    return AutoJacobian(func, **options)


def in_use(jac: AutoJacobian) -> PreparedPlan:
    """The only plan that a wrapper uses."""
    ((_, plan),) = jac._plans.items()
    return plan


def planned(func: Any, args: Any, kwargs: Any = None, **options: Any) -> tuple[Call, FirstCallReport, Problem]:
    """A call as its methods see it: probed, not searched."""
    builder = ProblemBuilder(func, Options.from_keywords({"randomness": "different", "store": ":memory:", **options}))
    call = builder.describe(captures(func), args, kwargs or {})
    report = builder.inspect(call)
    found = builder.probe(call, report)
    return call, report, builder.problem(call, report, found.structure, found.batched, found.analysis)


def supported(kind: type[Method], func: Any, args: Any, **options: Any) -> list[tuple[Method, Any]]:
    """Each candidate of a method that applies, with what it computes."""
    request, seen, problem = planned(func, args, **options)
    sandbox = Sandbox(seen.sandbox.captured, seen.sandbox.state)
    results = []
    for method in kind.candidates(problem, 1):
        if method.compiles:
            continue
        assert method.unsupported(problem) is None
        with sandbox():
            result = method.prepare(problem)(request.leaves, {})
        results.append((method, request.layout.jacobian(result.jacobians)))
    return results


def compare(actual: Any, expected: Any, rtol: float = 1e-10, least: float = 1e-12) -> None:
    """Equal shapes, dtypes and numbers, up to `rtol` of the largest, which counts as `least` at the least.

    Entries that are not finite in either are left.
    """
    ours, right = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(ours) == len(right)
    for one, other in zip(ours, right, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        both = torch.isfinite(one) & torch.isfinite(other)
        scale = float(torch.where(both, other, 0).detach().abs().amax()) if other.numel() else 0.0
        torch.testing.assert_close(
            torch.where(both, one, 0), torch.where(both, other, 0), rtol=rtol, atol=rtol * max(scale, least)
        )


def in_threads(count: int, work: Callable[[], object]) -> None:
    """Do some work in several threads at a time; raise what any of them raises."""
    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work) for _ in range(count)]:
            done.result()


class Ticking(measure.Clock):
    """A clock by which a call takes what `seconds` makes of its true time; each look at it takes `tick`.

    A busy machine tries as many candidates by it as an idle one.
    """

    def __init__(self, seconds: Callable[[float], float] = lambda true: true, tick: float = 1e-4) -> None:
        self.seconds = seconds
        self.tick = tick
        self.time = 0.0

    def now(self) -> float:
        self.time += self.tick
        return self.time

    def waiting_s(self) -> float:
        return 0.0

    def working_s(self) -> float:
        return self.now()

    def start(self, device: torch.device) -> Any:
        return self.now()

    def since(self, start: Any) -> float:
        return self.now() - float(start)

    def per_call(self, run: measure.Run, device: torch.device, calls: int) -> float:
        true = super()
        start = true.start(device)
        run()
        seconds = self.seconds(true.since(start))
        self.time += calls * seconds
        return seconds


def keep_waiting_for_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any thread wait for ten seconds, longer than limits are, between two looks at a clock."""
    waited = 0.0

    def leaping(true: Callable[[], float]) -> Callable[[], float]:
        def now() -> float:
            nonlocal waited
            waited += 10.0
            return true() + waited

        return now

    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, leaping(getattr(time, name)))
    monkeypatch.setattr(work_clock, "read_waiting_s", lambda thread: waited)


class CallCounting(Ticking):
    """A clock by which a run takes a microsecond for each function that it calls: the same on every machine."""

    def per_call(self, run: measure.Run, device: torch.device, calls: int) -> float:
        count = 0

        def noted(frame: FrameType, event: str, arg: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(noted)
        try:
            run()
        finally:
            sys.setprofile(before)
        seconds = 1e-6 * count
        self.time += calls * seconds
        return seconds


class Scripted(Ticking):
    """A clock by which each method takes what a seed says, or what `cost` is made to say, in every call and trial."""

    def __init__(self, patch: pytest.MonkeyPatch, seed: int = 0, tick: float = 1e-5) -> None:
        super().__init__(tick=tick)
        self.seed = seed
        self.running: Method | None = None
        attempt = trial.attempt
        methods: dict[int, Method] = {}

        def remembered(session: Any, method: Method, *rest: Any) -> Any:
            right = attempt(session, method, *rest)
            if right is not None:
                methods[id(right.compute)] = method
            return right

        def used(session: Any, compute: Any) -> Callable[[], Any]:
            def run() -> None:
                self.running = methods[id(compute)]

            return run

        patch.setattr(trial, "attempt", remembered)
        patch.setattr(trial, "as_used", used)
        patch.setattr(PreparedPlan, "run", self.timed(PreparedPlan.run))
        patch.setattr(measure, "clock", self)
        for name in ("LOOK_S", "RECORD_S", "RECORD_OPERATOR_S", "FORWARD_S", "RUN_S"):
            patch.setattr(steps, name, 0.0)  # nothing but runs takes time
        patch.setattr(exploration, "FIRST_STEP_S", 0.0)

    def cost(self, spec: dict[str, Any]) -> float:
        """Return the seconds of a method: up to a hundredfold apart, the same each time."""
        draw = hashlib.sha256(f"{self.seed} {spec}".encode()).digest()
        return 1e-4 * 100 ** (int.from_bytes(draw[:4], "big") / 2**32)

    def timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def ran(plan: PreparedPlan, *args: Any) -> Any:
            self.time += self.cost(plan.plan.method)
            return run(plan, *args)

        return ran

    def per_call(self, run: measure.Run, device: torch.device, calls: int) -> float:
        run()
        assert self.running is not None
        seconds = self.cost(self.running.spec())
        self.time += calls * seconds
        return seconds


class Counted:
    """A function that counts its evaluations and the samples of each."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func
        self.batches: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.batches.append(len(args[0]))
        return self.func(*args, **kwargs)

    def __autojac_reach__(self) -> dict[str, Any]:
        """What autojac sees: not the count, which it would put back, as it does with all that a function keeps."""
        return {"func": self.func}

    @property
    def calls(self) -> int:
        return len(self.batches)


def seeds_counted(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[int]:
    """Return a list that gets the number of seeds of every pull, and of every push by a pusher that `module` makes."""
    counts: list[int] = []

    def counting(run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            counts.append(len(next(arg for arg in args if isinstance(arg, Tensor))))
            return run(*args, **options)

        return counted

    monkeypatch.setattr(engines.Pulls, "one", counting(engines.Pulls.one))
    monkeypatch.setattr(module, "pusher", lambda *args: counting(engines.pusher(*args)))
    return counts
