"""`autojac audit`: what it says of a plan follows from fresh races, here by a clock that knows each method's time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from autojac import PlanStore
from autojac.cli import main
from autojac.core.plan import Trial, expression
from autojac.methods.base import Method
from autojac.planning.audit import RACES, rank_accuracy
from autojac.planning.search import measure
from autojac.planning.search.trial import SearchSession
from harness import Ticking

CALL = ["torch:sin", "--shape", "12x3", "--no-grad"]


def clock_of(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Method], float]) -> None:
    """Let each method take what `seconds` says."""
    running: list[Method] = []
    true = SearchSession.ready

    def ready(self: SearchSession, method: Method) -> measure.Run | None:
        run = true(self, method)

        def tagged() -> Any:
            running.append(method)
            return None if run is None else run()

        return None if run is None else tagged

    class Known(measure.Clock):
        def per_call(self, run: measure.Run, device: torch.device, calls: int) -> float:
            run()
            return seconds(running[-1])

    monkeypatch.setattr(SearchSession, "ready", ready)
    monkeypatch.setattr(measure, "clock", Known())


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stored plan whose search has timed several candidates."""
    monkeypatch.setenv("AUTOJAC_STORE", str(tmp_path / "plans.db"))
    monkeypatch.setattr(measure, "clock", Ticking(lambda true: 1e-3))
    assert CliRunner().invoke(main, ["tune", *CALL, "--budget", "50ms"]).exit_code == 0
    (stored,) = PlanStore().listing()
    assert len([t for t in stored.plan.trials if t.seconds]) > 2
    return expression(stored.plan.method)


def audited(*options: str) -> Any:
    result = CliRunner().invoke(main, ["audit", *CALL, "--json", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_plan_that_still_wins_has_no_regret(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [stored.updated_at for stored in PlanStore().listing()]
    clock_of(monkeypatch, lambda method: 1e-3 if expression(method.spec()) == plan else 3e-3)
    found = audited()
    (row,) = found["plans"]
    assert row["plan"] == row["own"]["fastest"] == plan
    assert (row["own"]["regret"], row["own"]["flips"], row["own"]["races"]) == (1.0, 0.0, RACES["quick"])
    assert "PerSample(mode=reverse)" in row["own"]["seconds"]
    assert len(row["own"]["seconds"]) > 2
    assert (row["shared"]["batch"], row["shared"]["regret"]) == (9, 1.0)
    assert found["model"]["searches"] == 1
    assert -1 <= found["model"]["rank_correlation"] <= 1
    assert [stored.updated_at for stored in PlanStore().listing()] == before


def test_a_plan_that_lost_its_lead_is_told_with_what_it_costs(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_of(monkeypatch, lambda method: 2e-3 if expression(method.spec()) == plan else 1e-3)
    (row,) = audited()["plans"]
    assert row["own"]["regret"] == pytest.approx(2.0)
    assert row["own"]["flips"] == 1.0
    assert row["own"]["fastest"] != plan
    text = CliRunner().invoke(main, ["audit", *CALL]).stdout
    assert "regret 2.00 over" in text
    assert "another method won 100% of 5 races" in text
    assert "shared with a batch of 9" in text
    assert "cost model: rank correlation" in text


def test_a_budget_ends_the_races_after_one(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_of(monkeypatch, lambda method: 1e-3)
    (row,) = audited("--budget", "0.000001s")["plans"]
    assert row["own"]["races"] == row["shared"]["races"] == 1


def test_a_batch_that_is_the_smallest_of_its_plan_is_raced_once(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_of(monkeypatch, lambda method: 1e-3)
    found = CliRunner().invoke(main, ["audit", "torch:sin", "--shape", "9x3", "--no-grad", "--json"])
    assert json.loads(found.stdout)["plans"][0]["shared"] is None


def test_rank_accuracy_is_the_median_over_searches_that_can_tell() -> None:
    def search(*pairs: tuple[float, float]) -> list[Trial]:
        return [Trial({"method": "Pull"}, "complete", seconds, predicted=guess) for guess, seconds in pairs]

    right, wrong = search((1, 1), (2, 5), (3, 9)), search((1, 9), (2, 5), (3, 1))
    assert rank_accuracy([right, right, wrong, search((1, 1))]) == (pytest.approx(1.0), 3)
    assert rank_accuracy([]) == (None, 0)
