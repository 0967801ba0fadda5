"""NaN and infinity are no evidence: they refute no plan, and prove none."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from autojac import AutoJacobian, PlanStore, StructureChangedWarning
from autojac.problem.reference import Reference
from harness import compare, forced, in_use, planned
from oracle import jacobian_blocks

X = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)
NAN, INF = torch.full_like(X, torch.nan), torch.full_like(X, torch.inf)
ONE = X.index_fill(0, torch.tensor([2]), torch.nan)
PUSH = {"method": "Push", "seeds": "shared", "engine": "loop", "chunk": None}


def centred(x: Tensor) -> Tensor:
    return x.sin() - x.mean(0)


def masked(x: Tensor) -> Tensor:
    """Scores, some of which a mask takes out of every sample."""
    return torch.cat([x.sin(), x[:, :1].expand(-1, 2).masked_fill(torch.tensor([True, True]), -torch.inf)], 1)


# a point at which no sample is finite, in input, value or derivative
FUNCTIONS: dict[str, tuple[Any, Tensor]] = {
    "NaN in": (lambda x: x.sin(), NAN),
    "infinity in": (lambda x: x.tanh(), INF),
    "values overflow": (lambda x: (x * 1e4).exp(), X.abs() + 1),
    "derivatives alone": (lambda x: x.abs().sqrt(), torch.zeros_like(X)),
    "coupled": (centred, NAN),
    "one sample, coupled": (centred, ONE),
}


def stored_plan(store: PlanStore, func: Any, **options: Any) -> AutoJacobian:
    """A wrapper that is to use a stored plan for the first time."""
    AutoJacobian(func, store=store, **options)(X)
    return AutoJacobian(func, store=store, **options)


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "blocks") for name in FUNCTIONS)]
    + [(name, layout) for name in ("derivatives alone", "coupled") for layout in ("full", "diagonal", "sparse")],
)
def test_what_is_not_finite_refutes_no_plan(name: str, layout: str) -> None:
    func, point = FUNCTIONS[name]
    store = PlanStore(":memory:")
    options = {"layout": layout, "on_miss": "estimate"}
    jac = stored_plan(store, func, **options)
    plan = jac.plan(X)
    entry = in_use(jac)
    for _ in range(3):
        assert jac(point).shape
    assert entry is in_use(jac)
    assert entry.schedule.last_check == 0  # no verdict yet
    jac(X)
    assert entry.schedule.last_check == 4
    assert AutoJacobian(func, store=store, **options).plan(X).source == "store"
    assert plan.source == "store"


@pytest.mark.parametrize("method", [PUSH, {"method": "PerSample", "mode": "forward", "chunk": None}], ids=str)
def test_forced_plans_are_kept_too(method: dict[str, Any]) -> None:
    for inner in (method, {"method": "Replay", "inner": method}):
        jac = forced(lambda x: (x.abs().sqrt() * 3).sin(), (X,), inner)
        for point in (NAN, torch.zeros_like(X), ONE, X):
            jac(point)
        assert jac.plan(X).method["method"] == inner["method"]


@pytest.mark.parametrize("func", [torch.sin, masked], ids=["beside samples", "beside values"])
def test_what_is_finite_is_evidence_beside_what_is_not(func: Any) -> None:
    state = {"coupled": False}

    def changing(x: Tensor) -> Tensor:
        return func(x) + (func(x).roll(1, 0) if state["coupled"] else 0)

    point = X.index_fill(0, torch.tensor([4]), torch.nan)
    jac = forced(changing, (X,), PUSH)
    jac(point)
    assert jac.plan(X).method == PUSH
    state["coupled"] = True
    with pytest.warns(StructureChangedWarning):
        found = [jac(point) for _ in range(4)][-1]
    right = jacobian_blocks(changing, (X,), 0)
    compare(found[1:4, :3], right[1:4, :3])


@pytest.mark.parametrize("layout", ["blocks", "full"])
@pytest.mark.parametrize("func", [lambda x: x.sin(), centred], ids=["independent", "coupled"])
def test_nothing_is_remembered_of_a_first_call_that_is_not_finite(func: Any, layout: str) -> None:
    store = PlanStore(":memory:")
    jac = AutoJacobian(func, layout=layout, on_miss="estimate", store=store)
    jac(NAN)
    jac(NAN)
    assert not store.listing()
    found = jac(X)
    assert len(store.listing()) == 1
    expected = AutoJacobian(func, layout=layout, on_miss="estimate", store=":memory:")
    compare(found, expected(X))
    assert jac.plan(X).method == expected.plan(X).method


def test_a_plan_made_beside_a_sample_that_is_not_finite_is_the_usual_one() -> None:
    jac, usual = (AutoJacobian(lambda x: x.sin(), on_miss="estimate", store=":memory:") for _ in range(2))
    usual(X)
    compare(jac(ONE)[:2], usual(X)[:2])
    assert jac.plan(X).method == usual.plan(X).method


def test_gradients_beside_samples_that_are_not_finite(recwarn: Any) -> None:
    net = torch.nn.Linear(3, 3).double()
    jac = forced(lambda x: net(x).tanh(), (X.requires_grad_(),), PUSH)
    for point in (X, ONE, NAN, X):
        jac(point.detach().requires_grad_())
    assert jac.plan(X).method == PUSH
    X.requires_grad_(False)


def test_a_loop_that_diverges_is_not_warned_about() -> None:
    jac = AutoJacobian(lambda x: x**3 - 2 * x + 2, on_miss="estimate", store=":memory:")
    x = torch.full((4, 1), 1e3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            jacobian = jac(x)
            x = x * 1e6 - (x**3 - 2 * x + 2) / jacobian.squeeze(2)
    assert not x.isfinite().any()


def test_a_reference_tells_whether_it_says_anything() -> None:
    for point, says in ((X, True), (ONE, True), (NAN, False)):
        request, seen, problem = planned(lambda x: x.sin(), (point,))
        assert Reference(problem, request.leaves, {}, seen.sandbox).says is says
