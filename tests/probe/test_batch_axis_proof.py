"""Proofs of independence: most common models have one, no coupled function has."""

from __future__ import annotations

import functools
import math
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac import AutoJacobian
from autojac.guards.function_state import MOST_CHANGES
from harness import compare, in_use
from oracle import jacobian_blocks
from provable import COUPLED, INDEPENDENT
from scenarios import SCENARIOS, Scenario


def test_there_are_enough_of_both() -> None:
    assert len(INDEPENDENT) >= 50
    assert len(COUPLED) >= 50


def test_most_common_models_are_proved() -> None:
    missed = {}
    for name, build in INDEPENDENT.items():
        structure = autojac.probe(*build())
        assert structure.independent, name
        if structure.assurance != "proved":
            missed[name] = structure.evidence[-1]
    assert len(missed) <= len(INDEPENDENT) // 10, missed


@pytest.mark.by_day(2)
@pytest.mark.filterwarnings("ignore::autojac.errors.ModesDisagreeWarning")
@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.filterwarnings("ignore:.*some entries of output 0 of func move:autojac.NoGraphWarning")
def test_nothing_coupled_is_proved(name: str) -> None:
    structure = autojac.probe(*COUPLED[name](), in_dims=0)
    assert structure.assurance == "observed"
    assert any(line.startswith(("proof: none", "statistics:")) for line in structure.evidence)


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s.coupling == "dense"], ids=str)
def test_no_coupled_scenario_is_proved(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make(0)
    assert autojac.probe(func, *args, argnums=scenario.argnums, **kwargs).assurance == "observed"


def data_read(x: Tensor) -> Tensor:
    return x.sin() if bool(x[0, 0] < 1e9) else x.roll(1, 0)


def clock_read(x: Tensor) -> Tensor:
    return x.softmax(-1) if time.time() > 0 else x.roll(1, 0)


def clock_passed(x: Tensor) -> Tensor:
    return x.softmax(-1) if max(map(float, [time.time_ns()])) > 0 else x.roll(1, 0)


class Switched(nn.Module):
    """State that Python may change, and a proof for each state."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, 0) if self.on else x.softmax(-1)


class Counting(Switched):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("make", "assurance", "checks"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Softmax(-1)), "proved", [1]),
        (Switched, "proved", [1]),
        (lambda: data_read, "observed", [1, 2, 4, 8, 16, 32]),
        (lambda: clock_read, "proved", [1, 2, 4, 8, 16, 32]),
        (lambda: clock_passed, "proved", [1, 2, 4, 8, 16, 32]),
        (lambda: functools.partial(lambda x, big: x.softmax(-1), big=np.ones(9999)), "proved", [1, 2, 4, 8, 16, 32]),
        (Counting, "proved", [1, MOST_CHANGES + 3, 2 * (MOST_CHANGES + 3)]),
    ],
    ids=["model", "attribute", "data", "clock", "clock in an argument", "array", "counter"],
)
def test_a_proof_is_checked_once_where_the_guard_lists_all_that_func_reads(
    make: Callable[[], Any], assurance: str, checks: list[int]
) -> None:
    x = torch.randn(5, 3)
    jac = AutoJacobian(make(), on_miss="estimate", store=":memory:")
    found = []
    for call in range(1, 40):
        jac(x)
        entry = in_use(jac)
        found += [call] * (entry.schedule.last_check == entry.schedule.calls)
    assert entry.problem.structure.assurance == assurance
    assert found == checks


@pytest.mark.parametrize(
    "value", [0.5, np.arange(3), types.SimpleNamespace(on=False)], ids=["float", "array", "object"]
)
def test_a_schedule_stays_where_an_argument_may_change_and_leave_the_signature_as_it_is(value: Any) -> None:
    x = torch.randn(5, 3)
    jac = AutoJacobian(lambda x, value: x.softmax(-1), on_miss="estimate", store=":memory:")
    jac(x, value=value)
    jac(x, value=value)
    entry = in_use(jac)
    assert entry.schedule.next_check == 4
    jac(x, value=3)
    assert [plan.schedule.next_check for _, plan in jac._plans.items()][-1] == math.inf


@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning")
def test_a_proof_that_was_not_checked_for_long_is_checked_when_python_changes_func() -> None:
    model, x = Switched(), torch.randn(5, 3, dtype=torch.float64)
    jac = AutoJacobian(model, on_miss="estimate", store=":memory:")
    for _ in range(20):
        jac(x)
    model.on = True
    compare(jac(x), jacobian_blocks(model, (x,)))


def test_a_schedule_comes_back_where_a_place_keeps_changing() -> None:
    model, x = Switched(), torch.randn(5, 3)
    jac = AutoJacobian(model, on_miss="estimate", store=":memory:", coupling="auto")
    jac(x)
    entry = in_use(jac)
    assert entry.schedule.next_check == math.inf
    for step in range(20):
        model.step = step
        jac(x)
    assert entry.schedule.next_check == 2 * (MOST_CHANGES + 3)


def test_a_float_among_the_arguments_takes_the_proof_back() -> None:
    def func(x: Tensor, scale: float) -> Tensor:
        return x.sin() if scale < 1 else x.roll(1, 0)

    for args, kwargs in (((torch.randn(5, 3), 0.5), {}), ((torch.randn(5, 3),), {"scale": 0.5})):
        structure = autojac.probe(func, *args, **kwargs)
        assert structure.independent
        assert structure.assurance == "observed"


def test_a_process_group_is_left_alone(tmp_path: Any) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    assert not torch.distributed.is_initialized()
    assert autojac.probe(nn.Linear(3, 2), torch.randn(5, 3)).assurance == "proved"
    assert not torch.distributed.is_initialized()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        assert autojac.probe(nn.Linear(3, 2), torch.randn(5, 3)).assurance == "proved"
        assert torch.distributed.group.WORLD is group
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        assert total == 1
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("func", "assurance", "checks"),
    [
        (lambda x: x.softmax(0) * x.sum(), "proved", [1]),
        (lambda x: x.roll(1, 0) if bool(x.sum() > 1e9) else x.sin(), "observed", [1, 2, 4, 8]),
        (lambda x: x.sin() if time.time() > 0 else x.roll(1, 0), "proved", [1, 2, 4, 8]),
    ],
    ids=["proved", "data", "clock"],
)
@pytest.mark.parametrize("unbatched", [False, True])
def test_one_sample_couples_with_nothing_and_is_checked_once(
    func: Callable[[torch.Tensor], torch.Tensor], assurance: str, checks: list[int], unbatched: bool
) -> None:
    x = torch.randn(3) if unbatched else torch.randn(1, 3)
    jac = AutoJacobian(func, in_dims=None if unbatched else 0, on_miss="estimate", store=":memory:")
    found = []
    for call in range(1, 10):
        jac(x)
        plan = in_use(jac)
        found += [call] * (plan.schedule.last_check == plan.schedule.calls)
    assert plan.problem.structure.assurance == assurance
    assert found == checks
