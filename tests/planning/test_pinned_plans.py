"""Pinned plans: nothing is searched, the same plans give the same bits, and a hash tells them apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autojac
from autojac import AutoJacobian, PlanMissError, PlanStore, StoreError
from autojac.planning import exploration
from autojac.planning.search import optimize
from harness import compare, in_use


@pytest.fixture(autouse=True)
def unpinned() -> Iterator[None]:
    yield
    autojac.pin(None)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(8, 3, dtype=torch.float64)


@pytest.fixture
def path(tmp_path: Path, x: torch.Tensor) -> Path:
    """A store with one plan, of the lowest effort."""
    AutoJacobian(torch.sin, store=tmp_path / "pinned.db", effort="estimate").plan(x)
    return tmp_path / "pinned.db"


@pytest.mark.parametrize("by", ["path", "store", "environment"])
def test_pinned_plans_are_used_and_nothing_is_searched(
    by: str, path: Path, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is searched while plans are pinned")

    if by == "environment":
        monkeypatch.setenv("AUTOJAC_PIN", str(path))
    else:
        assert len(autojac.pin(PlanStore(path) if by == "store" else path)) == 64
    monkeypatch.setattr(optimize, "search", never)
    monkeypatch.setattr(optimize, "start_race", never)
    first, second = AutoJacobian(torch.sin, effort="measure"), AutoJacobian(torch.sin, on_miss="tune")
    for jac in (first, second):
        for _ in range(30):
            J = jac(x)
        compare(J, torch.diag_embed(x.cos()))
        assert jac.plan(x).source == "store"
        assert in_use(jac).exploration is None
    assert torch.equal(first(x), second(x))


def test_a_call_without_a_pinned_plan_is_refused_and_nothing_is_stored(path: Path, x: torch.Tensor) -> None:
    before = path.read_bytes()
    autojac.pin(path)
    for action in (lambda: AutoJacobian(torch.cos)(x), lambda: AutoJacobian(torch.cos).tune(x)):
        with pytest.raises(PlanMissError, match="are pinned"):
            action()
    assert path.read_bytes() == before
    assert autojac.pin(None) == ""
    compare(AutoJacobian(torch.cos)(x), torch.diag_embed(-x.sin()))


def test_the_hash_is_the_plans(path: Path, x: torch.Tensor) -> None:
    first = autojac.pin(path)
    assert autojac.pin(path) == first
    autojac.pin(None)
    AutoJacobian(torch.cos, store=path, effort="estimate").plan(x)
    second = autojac.pin(path)
    assert second != first
    store = PlanStore(path)
    store.remove(store.listing()[0].id)
    assert autojac.pin(path) == first


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no plan store"):
        autojac.pin(tmp_path / "absent.db")
    assert not (tmp_path / "absent.db").exists()


def test_wrappers_that_were_called_before_keep_their_plans(
    path: Path, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exploration, "SHARE", 1e6)
    jac = AutoJacobian(torch.sin, store=":memory:")
    jac(x)
    autojac.pin(path)
    before = jac.plan(x).method
    for _ in range(30):
        jac(x)
    assert jac.plan(x).method == before
    search = in_use(jac).exploration
    assert search is not None
    assert search.race is None
