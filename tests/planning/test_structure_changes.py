"""The runtime guard: a structure that stops holding is caught, the answer of that call is right, and it is told."""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac import AutoJacobian, PlanStore, RandomnessError, StructureChangedWarning
from harness import Counted, compare, in_use
from oracle import jacobian_blocks


class Switch:
    """Independent until switched on, where nobody can see it: then each sample reads its neighbour."""

    def __init__(self) -> None:
        self._on = bytearray(1)

    def turn_on(self) -> None:
        self._on[0] = 1

    def __call__(self, x: Tensor) -> Tensor:
        return x.softmax(-1) + (x.roll(1, 0) * x if self._on[0] else 0)


def estimated(func: Any, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 3, dtype=torch.float64)


def test_coupling_that_appears_later_is_caught_at_the_next_check(x: Tensor) -> None:
    func, store = Switch(), PlanStore(":memory:")
    jac = estimated(func, store=store)
    for _ in range(3):
        jac(x)
    func.turn_on()
    with pytest.warns(StructureChangedWarning, match="since call 2 went unchecked"):
        J = jac(x)
    compare(J, jacobian_blocks(func, (x,)))
    compare(jac(x + 1), jacobian_blocks(func, (x + 1,)))
    assert not jac.plan(x).structure.independent


@pytest.mark.parametrize("coupling", ["independent", "dense"])
def test_a_suspect_structure_is_checked_at_every_call_unless_it_assumes_nothing(x: Tensor, coupling: Any) -> None:
    jac = estimated(lambda x: x.sin(), coupling=autojac.Structure(coupling, suspect=True))
    for _ in range(3):
        compare(jac(x), torch.diag_embed(x.cos()))
    schedule = in_use(jac).schedule
    assert schedule.next_check == (4 if coupling == "independent" else math.inf)


def test_always_checks_every_call(x: Tensor) -> None:
    func = Switch()
    jac = estimated(func, verify="always")
    for _ in range(5):
        jac(x)
    func.turn_on()
    with pytest.warns(StructureChangedWarning, match="call 5"):
        compare(jac(x), jacobian_blocks(func, (x,)))


def test_a_refuted_plan_is_not_found_again(x: Tensor) -> None:
    func, store = Switch(), PlanStore(":memory:")
    jac = estimated(func, store=store, verify="always")
    jac(x)
    func.turn_on()
    with pytest.warns(StructureChangedWarning):
        jac(x)
    rows = store.listing()
    assert any(row.plan.structure.coupling == "sparse" for row in rows)
    assert not any(row.plan.structure.independent and row.refuted_reason is None for row in rows)


def test_a_wrong_declaration_is_caught_at_the_first_use(x: Tensor) -> None:
    def func(x: Tensor) -> Tensor:
        return x.roll(1, 0) * x

    jac = estimated(func, coupling="independent")
    with pytest.raises(autojac.SearchError, match="off by"), warnings.catch_warnings():
        warnings.simplefilter("error")
        # no method that relies on the declaration passes verification, and the plain rows contradict it
        jac(x)


def test_checks_come_at_powers_of_two(x: Tensor) -> None:
    func = Counted(nn.Softmax(-1))
    jac = estimated(func)
    jac(x)
    base = jac.plan(x)
    checked = []
    for _ in range(2, 40):
        before = func.calls
        jac(x)
        checked.append(func.calls - before > 1)
        assert jac.plan(x) is base
    assert [call for call, yes in zip(range(2, 40), checked, strict=True) if yes] == [2, 4, 8, 16, 32]


def test_never_checks_nothing(x: Tensor) -> None:
    func = Counted(torch.sin)
    jac = estimated(func, verify="never")
    jac(x)
    before = func.calls
    for _ in range(9):
        jac(x)
    assert func.calls == before + 9


def test_the_check_leaves_buffers_and_random_state_alone(x: Tensor) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    jac = estimated(model, verify="always", randomness="different")
    torch.manual_seed(1)
    for _ in range(3):
        jac(x)
    state = torch.get_rng_state()
    assert model[0].num_batches_tracked == 3
    torch.manual_seed(1)
    other = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    for _ in range(3):
        other(x)
    assert torch.equal(state, torch.get_rng_state())
    compare(dict(model[0].named_buffers())["running_mean"], dict(other[0].named_buffers())["running_mean"])


@pytest.mark.parametrize("layout", ["blocks", "full"])
def test_verify_accepts_right_jacobians_and_names_wrong_ones(x: Tensor, layout: str) -> None:
    for func in (torch.tanh, lambda z: z - z.mean(0), lambda z: (z @ z.T).softmax(1) @ z):
        J = estimated(func, layout=layout)(x)
        autojac.verify(J, func, x, layout=layout)
        wrong = J.clone()
        wrong[5, 1] += 0.01
        with pytest.raises(autojac.VerificationError, match="off by"):
            autojac.verify(wrong, func, x, layout=layout, probes=len(x))


def diagonal(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return jacobian_blocks(func, (x,)).diagonal(dim1=1, dim2=2).clone()


@pytest.mark.parametrize(
    "func",
    [
        torch.tanh,
        lambda z: z.sin() @ torch.ones(3, 3, dtype=torch.float64).triu(),
        lambda z: z - z.mean(0),
        lambda z: z * z.roll(1, 0),
        lambda z: (z @ z.T).softmax(1) @ z,
    ],
    ids=["elementwise", "mixed", "centered", "neighbour", "attention"],
)
def test_verify_sees_every_coordinate_of_a_diagonal(x: Tensor, func: Callable[[Tensor], Tensor]) -> None:
    right = diagonal(func, x)
    autojac.verify(right, func, x, layout="diagonal")
    for sample, coordinate in ((0, 0), (5, 1), (7, 2)):
        wrong = right.clone()
        wrong[sample, coordinate] *= 1.05
        with pytest.raises(autojac.VerificationError, match="off by"):
            autojac.verify(wrong, func, x, layout="diagonal", probes=len(x))


def test_verify_counts_what_it_was_given(x: Tensor) -> None:
    with pytest.raises(autojac.VerificationError, match="per output and input was expected, 2 in all"):
        autojac.verify(torch.ones(8, 3, 3), lambda z: (z, z), x)
    with pytest.raises(autojac.VerificationError, match="shape"):
        autojac.verify(torch.ones(8, 3, 2), torch.sin, x)


@pytest.mark.parametrize("coupled", [False, True])
def test_the_jacobian_composes_with_the_callers_transforms(x: Tensor, coupled: bool) -> None:
    def func(x: Tensor) -> Tensor:
        return x.sin() * (x.sum(0) if coupled else x[:, :1])

    jac = estimated(func, verify="always")
    with torch.no_grad():
        jac(x)
    v = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    weights = torch.randn(8, 3, 3, dtype=torch.float64)
    (right,) = torch.autograd.grad((estimated(func)(leaf) * weights).sum(), leaf)
    compare(torch.func.grad(lambda z: (jac(z) * weights).sum())(x), right)
    compare(torch.func.vjp(jac, x)[1](weights)[0], right)
    forward = torch.func.jvp(jac, (x,), (v,))[1]
    compare((forward * weights).sum(), (right * v).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        compare(torch.autograd.forward_ad.unpack_dual(jac(dual)).tangent, forward)
    compare(torch.vmap(jac)(torch.stack((x, x + 1))), torch.stack((jac(x), jac(x + 1))))


def test_a_first_call_inside_a_transform_says_what_to_do(x: Tensor) -> None:
    with pytest.raises(autojac.UnsupportedError, match="outside"):
        torch.func.jvp(estimated(torch.sin), (x,), (x,))


def test_wrappers_nest(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    inner = estimated(model)
    inner(x)
    outer = AutoJacobian(lambda z: inner(z)[:, 0], store=":memory:", on_miss="tune", budget_s=0.5)
    hessian = torch.func.vmap(torch.func.hessian(lambda z: model(z)[0]))(x)
    compare(outer(x).detach(), hessian.detach(), rtol=1e-9)
    compare(
        outer(x + 1).detach(), torch.func.vmap(torch.func.hessian(lambda z: model(z)[0]))(x + 1).detach(), rtol=1e-9
    )


def test_importing_a_generator_is_not_drawing_from_it(x: Tensor) -> None:
    def func(x: Tensor) -> Tensor:
        importlib.import_module("numpy.random")
        return x.sin()

    kept = sys.modules.pop("numpy.random")
    try:
        compare(AutoJacobian(func, on_miss="estimate", store=":memory:")(x), torch.diag_embed(x.cos()))
    finally:
        sys.modules["numpy.random"] = kept


def test_a_function_that_computes_in_lower_precision_is_not_taken_for_wrong() -> None:
    weight = torch.randn(3, 40, dtype=torch.float64)

    def func(x: Tensor) -> Tensor:
        return (x.float() @ weight.float()).sin().double() @ weight.T

    x = torch.randn(8, 3, dtype=torch.float64)
    jac = estimated(func, verify="always")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            compare(jac(x), jacobian_blocks(func, (x,)), rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = nn.Linear(3, 2)
        compare(estimated(layer)(x.float()).detach(), layer.weight.detach().expand(8, 2, 3), rtol=1e-2)


def test_a_plan_that_fails_when_it_runs_is_replaced(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    jac = estimated(torch.sin)
    jac.plan(x)
    entry = in_use(jac)

    def fails(*_: Any) -> Any:
        raise ValueError("of the plan")

    monkeypatch.setattr(entry, "compute", fails)
    with pytest.warns(StructureChangedWarning, match="ValueError: of the plan"):
        compare(jac(x), torch.diag_embed(x.cos()))
    compare(jac(x), torch.diag_embed(x.cos()))


class Switched(nn.Module):
    """Coupled in train mode, or when asked; else independent."""

    def forward(self, x: Tensor, *, coupled: bool = False) -> Tensor:
        return x - x.mean(0) if self.training or coupled else x.sin()


def test_a_structure_is_not_carried_into_a_transform_under_other_flags_or_keywords(x: Tensor) -> None:
    model = Switched().eval()
    jac = estimated(model)
    jac(x)
    with pytest.raises(autojac.UnsupportedError, match="outside"):
        torch.func.vjp(lambda z: jac(z, coupled=True), x)
    model.train()
    with pytest.raises(autojac.UnsupportedError, match="outside"):
        torch.func.vjp(jac, x)
    jac(x)
    compare(torch.func.vjp(jac, x)[0], jacobian_blocks(model, (x,)))


@pytest.mark.parametrize("keyword", [False, True])
def test_a_float_that_switches_coupling_on_is_checked_when_it_first_comes(keyword: bool, x: Tensor) -> None:
    def func(x: Tensor, gate: float) -> Tensor:
        return x.sin() + (x.roll(1, 0) * x if gate > 0.5 else 0)

    def call(gate: float) -> Tensor:
        J: Tensor = jac(x, gate=gate) if keyword else jac(x, gate)
        return J

    jac = estimated(func)
    for _ in range(5):  # past the second check, before the fourth
        compare(call(0.0), torch.diag_embed(x.cos()))
    with pytest.warns(StructureChangedWarning):
        compare(call(1.0), jacobian_blocks(func, (x, 1.0)))
    compare(call(0.75), jacobian_blocks(func, (x, 0.75)))


def test_a_time_that_changes_with_every_call_is_not_checked_for_ever(x: Tensor) -> None:
    func = Counted(lambda x, t: (x * t).sin())
    jac = estimated(func)
    for step in range(100):
        jac(x, 0.1 * step)
    before = func.calls
    jac(x, 77.0)
    assert func.calls == before + 1


@pytest.mark.by_day(2)
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("kind", ["boolean", "additive", "index"])
def test_coupling_through_another_mask_than_the_first_is_foreseen(keyword: bool, kind: str, x: Tensor) -> None:
    n = len(x)

    def mix(x: Tensor, by: Tensor) -> Tensor:
        if kind == "index":
            return x.sin() + x[by]
        scores = (x @ x.T).masked_fill(~by, float("-inf")) if kind == "boolean" else x @ x.T + by
        return scores.softmax(1) @ x

    eye = torch.eye(n, dtype=torch.bool)
    masks = {
        "boolean": (eye, torch.ones_like(eye)),
        "additive": (torch.zeros(n, n).double().masked_fill(~eye, float("-inf")), torch.zeros(n, n).double()),
        "index": (torch.arange(n), torch.arange(n).roll(1)),
    }
    jac = estimated(mix)
    for by in masks[kind]:
        for _ in range(2):
            J = jac(x, by=by) if keyword else jac(x, by)
        compare(J, jacobian_blocks(mix, (x, by)))


class Flags:
    """What a script keeps its settings in."""

    coupled = False
    mixed = False


def by_flag(x: Tensor) -> Tensor:
    own = x.sin() * (x.sum(-1, keepdim=True) if Flags.mixed else 1)
    return own + (x.roll(1, 0) * x if Flags.coupled else 0)


class Neighbours(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(1, 0) * x


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("change", ["flag", "layer", "hook"])
def test_a_proof_does_not_outlive_what_python_changes(
    change: str, mixed: bool, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flags, "mixed", mixed)
    net = nn.Sequential(nn.Tanh(), nn.Softmax(-1) if mixed else nn.Sigmoid())
    func: Any = by_flag if change == "flag" else net
    jac = estimated(func)
    for _ in range(3):
        jac(x)
    if change == "flag":
        monkeypatch.setattr(Flags, "coupled", True)
    elif change == "layer":
        net.append(Neighbours())
    else:
        net.register_forward_hook(lambda module, args, y: y + y.roll(1, 0) * y)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        compare(jac(x), jacobian_blocks(func, (x,)))
    # with another layer the modes of all layers are others, and a plan is made for those
    assert all("noticed immediately" in str(one.message) for one in told)
    assert told or change == "layer"
    compare(jac(2 * x), jacobian_blocks(func, (2 * x,)))


@pytest.mark.parametrize("layout", ["blocks", "full"])
@pytest.mark.parametrize("how", ["a buffer", "an argument"])
def test_outputs_of_another_shape_are_planned_again(x: Tensor, layout: str, how: str) -> None:
    size = torch.tensor(3)

    def func(x: Tensor, k: Tensor | None = None) -> Tensor:
        return x.sin()[:, : int(size if k is None else k)]

    jac = autojac.AutoJacobian(
        func, in_dims=(0, None)[: 1 + (how != "a buffer")], layout=layout, on_miss="estimate", store=":memory:"
    )
    for count in (3, 3, 2, 2, 1, 3, 1, 2):
        size.fill_(count)
        args = (x,) if how == "a buffer" else (x, size.clone())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", autojac.StructureChangedWarning)
            y, J = jac.value_and_jacobian(*args)
        expected = jacobian_blocks(func, (x, size.clone()))
        compare(y, func(*args))
        compare(J if layout == "blocks" else torch.stack([J[b, :, b] for b in range(len(x))]), expected)


def test_a_flag_that_a_call_takes_back_is_told_wherever_the_user_sets_it() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.doubled = False

        def forward(self, x: Tensor) -> Tensor:
            factor, self.doubled = 2.0 if self.doubled else 1.0, False
            return x.sin() * factor

    model, x = Once(), torch.rand(4, 3, dtype=torch.float64)
    jac = AutoJacobian(model, store=":memory:", on_miss="estimate")
    for turn in range(6):
        if turn in (2, 4):
            model.doubled = True
            with pytest.raises(RandomnessError):
                jac(x)
            assert model.doubled
            model.doubled = False
        compare(jac(x), jacobian_blocks(model, (x,)))


def test_what_a_function_counts_once_it_has_changed_is_left_as_by_plain_calls() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.counts, self.calls = False, 0

        def forward(self, x: Tensor) -> Tensor:
            if self.counts:
                self.calls += 1
            return x.sin()

    model, x = Counts(), torch.rand(4, 3, dtype=torch.float64)
    jac = AutoJacobian(model, store=":memory:", on_miss="estimate")
    for _ in range(3):
        jac(x)
    model.counts = True
    with pytest.warns(StructureChangedWarning):
        jac(x)
    for calls in range(1, 6):
        assert model.calls == calls
        compare(jac(x), jacobian_blocks(torch.sin, (x,)))
