"""Plans are remembered: within a process, by neighbouring shapes, and across processes."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac import AutoJacobian, PlanStore
from autojac.core.call import CallLayout
from autojac.planning.search import optimize
from harness import compare
from oracle import jacobian_blocks


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The efforts of all searches made in a test."""
    made: list[str] = []
    true = optimize.search

    def watched(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs["effort"])
        return true(*args, **kwargs)

    monkeypatch.setattr(optimize, "search", watched)
    return made


def cheap(func: Any, **options: Any) -> AutoJacobian:
    """A wrapper that takes the cost model's first choice and keeps it."""
    return AutoJacobian(func, **{"effort": "estimate", **options})


def test_a_second_wrapper_finds_the_plan_and_probes_nothing(
    searches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(8, 3)
    first = cheap(torch.sin).plan(x)
    assert first.source == "estimate"
    evaluations: list[int] = []
    true = CallLayout.fn
    monkeypatch.setattr(CallLayout, "fn", lambda self, *call: (evaluations.append(1), true(self, *call))[1])

    def counted(action: Callable[[], Any]) -> int:
        evaluations.clear()
        action()
        return len(evaluations)

    jac, unchecked = cheap(torch.sin), cheap(torch.sin, verify="never")
    assert counted(lambda: jac.plan(x)) == 1
    assert jac.plan(x).source == "store"
    assert jac.plan(x).method == first.method
    unchecked.plan(x)
    # a plan that can be recorded is, in its first call, or found not to be
    once, own = counted(lambda: unchecked(x)), counted(lambda: unchecked(x))
    # one call for the check besides what the plan's own method needs, then none
    assert counted(lambda: jac(x)) == once + 1
    jac(x)
    assert counted(lambda: jac(x)) == own
    assert searches == ["estimate"]


def test_the_last_partial_batch_never_searches(searches: list[str]) -> None:
    x = torch.randn(64, 3, dtype=torch.float64)
    jac = cheap(torch.sin)
    for batch in (64, 40, 33, 7, 1, 64):
        compare(jac(x[:batch]), jacobian_blocks(torch.sin, (x[:batch],)))
    assert len(searches) == 1
    assert jac.plan(x[:7]).source == "neighbour"
    jac(torch.randn(65, 3, dtype=torch.float64))
    assert len(searches) == 2


def test_batch_sizes_of_a_bucket_share_a_stored_plan(searches: list[str]) -> None:
    cheap(torch.sin).plan(torch.randn(33, 3))
    assert cheap(torch.sin).plan(torch.randn(64, 3)).source == "store"
    assert cheap(torch.sin).plan(torch.randn(65, 3)).source == "estimate"
    assert len(searches) == 2


def test_higher_effort_serves_lower_and_not_the_other_way(searches: list[str]) -> None:
    x = torch.randn(8, 3)
    cheap(torch.sin, on_miss="estimate").plan(x)
    assert cheap(torch.sin, effort="quick", on_miss="tune").plan(x).source == "search"
    assert cheap(torch.sin, on_miss="estimate").plan(x).effort == "quick"
    assert searches == ["estimate", "quick"]


def test_on_miss_error_says_how_to_tune_ahead(searches: list[str]) -> None:
    x = torch.randn(8, 3)
    with pytest.raises(autojac.PlanMissError, match="autojac tune"):
        cheap(torch.sin, on_miss="error")(x)
    cheap(torch.sin).tune(x)
    compare(cheap(torch.sin, on_miss="error")(x), torch.diag_embed(x.cos()), rtol=1e-6)
    assert searches == ["estimate"]


@pytest.mark.parametrize(
    "change",
    [
        {"layout": "full"},
        {"version": "2"},
        {"memory_limit": "1GiB"},
        {"in_dims": 0},
        {"coupling": "independent"},
    ],
    ids=str,
)
def test_each_option_that_matters_is_part_of_the_key(change: dict[str, Any], searches: list[str]) -> None:
    x = torch.randn(8, 3)
    cheap(torch.sin).plan(x)
    cheap(torch.sin, **change).plan(x)
    assert len(searches) == 2


def test_flags_that_change_numerics_or_speed_are_part_of_both_keys(searches: list[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    x = torch.randn(8, 3)
    jac = cheap(model)
    jac(x)
    with torch.no_grad():
        jac(x)
    model.train()
    jac(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        jac(x)
    model.eval()
    jac(x)
    assert len(searches) == 4


def test_plans_of_a_loop_make_no_trial_and_no_query(monkeypatch: pytest.MonkeyPatch) -> None:
    jac = cheap(torch.sin)
    x = torch.randn(8, 3)
    jac(x)

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a cached plan must not come here")

    for name in ("find", "save", "hints", "refute"):
        monkeypatch.setattr(PlanStore, name, forbidden)
    monkeypatch.setattr(optimize, "search", forbidden)
    for _ in range(20):
        jac(x)


def test_a_store_that_cannot_be_opened_works_in_memory_with_one_warning(tmp_path: Path) -> None:
    x = torch.randn(8, 3)
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    jac = cheap(torch.sin, store=str(blocked / "plans.db"))
    with pytest.warns(autojac.StoreWarning) as caught:
        J = jac(x)
        jac(x[:5])
        jac(torch.randn(100, 3))
    assert len(caught) == 1
    compare(J, torch.diag_embed(x.cos()), rtol=1e-6)


SCRIPT = """
import json, sys, time
import autojac
import sqlalchemy
import torch
from autojac import AutoJacobian
x = torch.linspace(-1, 1, 3072).reshape(1024, 3)
jac = AutoJacobian(torch.sin, effort="estimate")
J = jac(x)
plan = jac.plan(x)
assert torch.allclose(J, torch.diag_embed(x.cos()))
heavy = [name for name in ("optuna", "alembic", "torch._dynamo", "scipy") if name in sys.modules]
print(json.dumps({"source": plan.source, "heavy": heavy, "trials": len(plan.trials)}))
"""


def test_a_second_process_finds_the_plan_and_imports_nothing_heavy() -> None:
    def run() -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120
        )
        assert done.stderr == ""
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    x = torch.linspace(-1, 1, 3072).reshape(1024, 3)
    # the plan must not hang on timings: recording some methods loads torch._dynamo
    AutoJacobian(torch.sin, effort="estimate").tune(x)
    torch.set_num_threads(torch.get_num_threads())
    again = run()
    assert again["source"] == "store"
    assert again["trials"] == 0
    assert again["heavy"] == []


def test_weights_may_change_and_structure_may_not(searches: list[str]) -> None:
    model = nn.Linear(3, 2).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    jac = cheap(model)
    for _ in range(3):
        compare(jac(x).detach(), model.weight.detach().expand(8, 2, 3))
        with torch.no_grad():
            model.weight.mul_(1.5)
    cheap(nn.Linear(3, 2).double())(x)
    assert len(searches) == 1

    def doubled(x: Tensor) -> Tensor:
        return 2 * model(x)

    cheap(doubled)(x)
    assert len(searches) == 2


def test_a_wrapper_that_is_let_go_leaves_neither_its_store_nor_its_colorings() -> None:
    jac = AutoJacobian(torch.sin, store=":memory:", effort="estimate", layout="sparse")
    jac(torch.randn(4, 3))
    kept = [
        weakref.ref(part) for part in (jac, jac._plans.planner.repository.store, jac._plans.planner.builder.colorings)
    ]
    del jac
    gc.collect()
    assert [part() for part in kept] == [None, None, None]
