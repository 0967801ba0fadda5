"""Derivatives by columns: exact by every method, in every order, differentiable, and what is not asked is not made."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracle
from autojac import AutoJacobian, Derivatives, InputError, PlanStore, StructureChangedWarning, TrainingStep
from autojac.autodiff.derivative_terms import partitions, resolve_terms
from autojac.core.options import Options
from autojac.methods.support.taylor_rows import CarriedRows
from harness import Counted, compare, in_use

Columns = tuple[int, ...]
PINN: tuple[Columns, ...] = ((), (0,), (1,), (1, 1))
HIGH: tuple[Columns, ...] = ((0, 1), (1, 0, 1))
PULL = {"method": "Pull", "seeds": "shared", "engine": "loop", "chunk": None}
METHODS = {
    "pull": PULL,
    "pull by vmap": PULL | {"engine": "vmap"},
    "taylor": {"method": "Taylor"},
    "replayed pull": {"method": "Replay", "inner": PULL, "without": None},
    "replayed taylor": {"method": "Replay", "inner": {"method": "Taylor"}, "without": None},
    "chunked taylor": {"method": "BatchChunk", "size": 2, "inner": {"method": "Taylor"}},
}


def by(method: dict[str, Any], func: Callable[..., Any], of: Any, x: Tensor, **more: Any) -> Derivatives:
    """Derivatives by one method, which is found in the store."""
    options: dict[str, Any] = {"on_miss": "estimate", "store": PlanStore(":memory:"), **more}
    maker = Derivatives(func, of, **options)
    plan, keys = maker.plan(x), in_use(maker.planned).keys
    assert keys is not None
    maker.planned._plans.planner.repository.save(keys, dataclasses.replace(plan, method=method))
    return Derivatives(func, of, **options)


def estimated(func: Callable[..., Any], of: Any, **options: Any) -> Derivatives:
    return Derivatives(func, of, on_miss="estimate", store=":memory:", **options)


def network(width: int = 5, outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
    ).double()


def points(batch: int = 4, columns: int = 2) -> Tensor:
    return torch.rand(batch, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.3


def mixed(x: Tensor) -> Tensor:
    """Products, quotients, broadcasting, reductions, views, indices and products of matrices, with two outputs."""
    t, y = x[:, :1], x[:, 1]
    grown = torch.stack([y * t[:, 0], torch.sin(y) / t[:, 0], torch.cat([t, t.exp()], 1).sum(1)], 1)
    matrix = grown.unsqueeze(2) @ grown.unsqueeze(1)
    soft = torch.softmax(matrix.flatten(1), 1)[:, [1, 5]] * torch.where(y > 0, y**3, y).unsqueeze(1)
    return (
        soft + nn.functional.softplus(grown[:, :2]).cos() + matrix.diagonal(dim1=1, dim2=2).prod(1, keepdim=True).sqrt()
    )


@pytest.mark.by_day(4)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("of", [PINN, HIGH], ids=["pinn", "high orders"])
@pytest.mark.parametrize("func", [network(outputs=2), mixed], ids=["network", "mixed"])
def test_every_method_gives_what_nested_vjps_of_single_numbers_give(method: str, of: Any, func: Any) -> None:
    x = points()
    derivatives = by(METHODS[method], func, of, x)
    found = derivatives(x)
    assert str(derivatives.plan(x).method["method"]) == METHODS[method]["method"]
    compare(list(found), [oracle.derivative(func, x, columns).detach() for columns in of])


@pytest.mark.parametrize("method", METHODS)
def test_analytic_derivatives(method: str) -> None:
    def wave(x: Tensor) -> Tensor:
        return torch.sin(3 * x[:, 0]) * torch.exp(-2 * x[:, 1])

    x = points()
    sine, cosine, decay = torch.sin(3 * x[:, 0]), torch.cos(3 * x[:, 0]), torch.exp(-2 * x[:, 1])
    found = by(METHODS[method], wave, ((), (1,), (0, 0), (0, 1), (0, 0, 0, 1)), x)(x)
    compare(list(found), [sine * decay, -2 * sine * decay, -9 * sine * decay, -6 * cosine * decay, 54 * cosine * decay])


@pytest.mark.parametrize("method", ["pull", "taylor", "replayed pull", "replayed taylor"])
def test_a_loss_trains_parameters_and_inputs(method: str) -> None:
    model, x = network(), points().requires_grad_()

    def loss(parts: Any) -> Tensor:
        u, u_t, u_x, u_xx = parts
        return (u_t + u * u_x - 0.1 * u_xx).square().mean()

    def derivative(columns: Columns) -> Tensor:
        value = model(x)
        for column in columns:
            (found,) = torch.autograd.grad(value.sum(), x, create_graph=True)
            value = found[:, column : column + 1]
        return value

    sources = [x, *model.parameters()]
    right = torch.autograd.grad(loss([derivative(columns) for columns in PINN]), sources)
    derivatives = by(METHODS[method], model, PINN, x)
    for _ in range(2):
        compare(list(torch.autograd.grad(loss(derivatives(x)), sources)), list(right))


def test_second_derivatives_run_through_the_results() -> None:
    derivatives = by(METHODS["replayed pull"], torch.sin, ((0, 0),), points(3, 1))

    def of(x: Tensor) -> Tensor:
        return derivatives(x)[0]

    assert torch.autograd.gradcheck(of, points(3, 1).requires_grad_())
    assert torch.autograd.gradgradcheck(of, points(3, 1).requires_grad_())


@given(batch=st.integers(1, 4), width=st.integers(1, 3), data=st.data())
@settings(max_examples=6)
def test_any_derivatives_of_any_shape(batch: int, width: int, data: Any) -> None:
    column = st.integers(0, width - 1)
    of = data.draw(st.lists(st.lists(column, max_size=2).map(tuple), min_size=1, max_size=3).filter(any))
    events = data.draw(st.sampled_from([(), (2,), (1, 2)]))
    torch.manual_seed(batch + width)
    weight = torch.randn(width, max(1, torch.Size(events).numel()), dtype=torch.float64)

    def func(x: Tensor) -> Tensor:
        return (torch.tanh(x @ weight) * x.sum(1, keepdim=True)).reshape(len(x), *events)

    x = points(batch, width)
    for method in ("pull", "taylor"):
        found = by(METHODS[method], func, of, x)(x)
        compare(list(found), [oracle.derivative(func, x, columns).detach() for columns in of])


def test_coupled_samples_get_derivatives_in_their_own_input() -> None:
    def centered(x: Tensor) -> Tensor:
        return (x - x.mean(0)).prod(1, keepdim=True) ** 3

    x = points()
    found = estimated(centered, ((0,), (0, 1), (1, 1, 0)))(x)
    compare(list(found), [oracle.derivative(centered, x, columns).detach() for columns in ((0,), (0, 1), (1, 1, 0))])


def test_a_function_that_does_not_move_with_a_column_has_zeros_there() -> None:
    found = estimated(lambda x: 2 * x[:, :1], ((1,), (0, 0), (0,)))(points())
    compare(list(found), [torch.zeros(4, 1).double(), torch.zeros(4, 1).double(), torch.full((4, 1), 2.0).double()])


def test_results_nest_as_the_function_does() -> None:
    def func(x: Tensor) -> dict[str, Tensor]:
        return {"u": x.prod(1), "v": x.square()}

    x = points()
    value, slope = estimated(func, ((), (0,)))(x)
    compare(value, func(x))
    compare(slope, {"u": x[:, 1], "v": torch.stack([2 * x[:, 0], torch.zeros(4).double()], 1)})


def test_a_function_without_a_batch_and_one_of_a_scalar_per_sample() -> None:
    (found,) = estimated(lambda x: x[0] ** 2 * x[1], ((0, 1),), in_dims=None)(torch.tensor([3.0, 1.0]).double())
    assert found.item() == 6.0
    (cubed,) = estimated(lambda x: x**3, ((0, 0),))(points(3)[:, 0])
    compare(cubed, 6 * points(3)[:, 0])


def test_another_argument_and_keywords_pass_through() -> None:
    def func(scale: Tensor, x: Tensor, power: float = 1.0) -> Tensor:
        return scale * x.prod(1) ** power

    scale, x = torch.rand(4).double(), points()
    (found,) = estimated(func, ((0, 1),), argnums=1)(scale, x, power=2.0)
    compare(found, 4 * scale * x.prod(1))


def test_taylor_mode_evaluates_once_and_carries_what_is_asked_alone() -> None:
    rows = CarriedRows.for_terms([((),), ((0,),), ((1,),), ((1, 1),)])
    assert rows.keys == (((0,),), ((1,),), ((1, 1),))
    assert CarriedRows.for_terms(resolve_terms("laplacian", 3)).keys == (
        ((0,),),
        ((1,),),
        ((2,),),
        ((0, 0), (1, 1), (2, 2)),
    )
    assert [len(list(partitions(tuple(range(n))))) for n in range(1, 6)] == [1, 2, 5, 15, 52]
    counted = Counted(torch.tanh)
    derivatives = by(METHODS["taylor"], counted, ((0, 0),), points(4, 1), verify="never")
    derivatives(points(4, 1))
    before = counted.calls
    derivatives(points(4, 1))
    assert counted.calls == before + 1


def test_a_wrong_plan_is_noticed_and_the_call_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autojac.methods.support.taylor.TaylorMode.term", lambda self, output, term: self.env[output])
    x = points()
    derivatives = by(METHODS["taylor"], network(), PINN, x)
    with pytest.warns(StructureChangedWarning, match="derivatives of output 0 are off"):
        found = derivatives(x)
    compare(list(found), [oracle.derivative(network(), x, columns) for columns in PINN])


def test_a_stored_plan_needs_no_search_and_other_derivatives_another() -> None:
    store, x, model = PlanStore(":memory:"), points(), network()
    for of in (PINN, HIGH, PINN):
        derivatives = Derivatives(model, of, on_miss="estimate", store=store)
        known = derivatives.plan(x).source
    assert known == "store"
    assert "derivatives by columns of B = 4" in derivatives.explain(x)
    assert len(AutoJacobian(model, on_miss="estimate", store=store)(x).shape) == 3


def test_copies_and_names() -> None:
    derivatives = estimated(network(), PINN)
    compare(list(pickle.loads(pickle.dumps(derivatives))(points())), list(derivatives(points())))
    assert "of=((), (0,), (1,), (1, 1))" in repr(derivatives)
    assert "of" not in Options.names()


def test_a_refused_call_leaves_nothing_behind() -> None:
    derivatives = estimated(network(), ((5,),))
    with pytest.raises(InputError, match="2 columns"):
        derivatives(points())
    assert not len(derivatives.planned._plans)


def test_a_sample_that_is_not_finite_leaves_the_others_right_and_warns_of_nothing() -> None:
    model, x = network(), points()
    x[1] = float("nan")
    for method in ("pull", "taylor"):
        derivatives = by(METHODS[method], model, PINN, x, verify="always")
        for _ in range(4):
            found = derivatives(x)
            others = [0, 2, 3]
            expected = [oracle.derivative(model, x[others], columns).detach() for columns in PINN]
            compare([one[others].detach() for one in found], expected)
            assert all(bool(one[1].isnan()) for one in found)


def waves(t: Tensor, factor: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return two outputs of a time (B,), a number and points (B, 2)."""
    return torch.sin(factor * t) * torch.exp(x[:, 0] * x[:, 1]), x * t[:, None] ** 3


@pytest.mark.parametrize("of_names", [True, False], ids=["named", "joined by hand"])
def test_columns_of_several_tensors_are_those_of_one(of_names: bool) -> None:
    t, x = points(4, 1)[:, 0].requires_grad_(), points(4, 2).requires_grad_()
    if of_names:
        derivatives = estimated(waves, ((), ("t",), (("x", 1), "t"), (("x", 0), ("x", 0))))
        found = [derivatives(t, 2.0, x) for _ in range(2)][1]
    else:
        joined = estimated(lambda z: waves(z[:, 0], 2.0, z[:, 1:]), ((), (0,), (0, 2), (1, 1)))
        found = joined(torch.cat([t[:, None], x], 1))
    wave, power, zero = torch.exp(x[:, 0] * x[:, 1]), t[:, None] ** 2, torch.zeros_like(x)
    expected = (
        waves(t, 2.0, x),
        (2 * torch.cos(2 * t) * wave, 3 * power * x),
        (2 * torch.cos(2 * t) * wave * x[:, 0], 3 * power * torch.tensor([0.0, 1.0]).double()),
        (torch.sin(2 * t) * wave * x[:, 1] ** 2, zero),
    )
    for pair, right in zip(found, expected, strict=True):
        compare([one.detach() for one in pair], [one.detach() for one in right])
    slopes = [torch.autograd.grad(one[1][0].sum() + one[2][1].sum(), [t, x]) for one in (found, expected)]
    compare(list(slopes[0]), list(slopes[1]))


def test_names_of_columns_are_shown_copied_and_replayed() -> None:
    derivatives = estimated(waves, ((), ("t", "t"), (["x", 1],)))
    assert repr(derivatives) == "Derivatives(of=((), ('t', 't'), (('x', 1),)), test_derivatives.waves, 0 plans in use)"
    t, x = points(4, 1)[:, 0], points(4, 2)
    found, copied = derivatives(t, 2.0, x), pickle.loads(pickle.dumps(derivatives))(t, 2.0, x)
    for one, other in zip(found, copied, strict=True):
        compare(list(one), list(other))
    assert "by columns of several tensors" in derivatives.explain(t, 2.0, x)
    assert str(derivatives.plan(t, 2.0, x)) in derivatives.explain(t, 2.0, x)
    assert [one.shape for one, _ in derivatives(t[:2], 2.0, x[:2])] == [(2,)] * 3


def test_tensors_with_columns_keep_their_batch_axes_and_are_trained_on() -> None:
    torch.manual_seed(0)
    net = nn.Bilinear(1, 2, 1).double()
    grid = estimated(net, ((), ("input1",), (("input2", 1),)), batch_dims=2)
    t, x = torch.rand(3, 2, 1).double(), torch.rand(3, 2, 2).double()
    found = grid(t, x)
    compare(found[1].detach(), net(torch.ones_like(t), x).detach() - net.bias.detach())
    flat = estimated(net, ((), ("input1",), (("input2", 1),)))
    step = TrainingStep(flat, lambda u, u_t, u_x: (u * u_t + u_x).square().sum())
    value = step((t[0], x[0]))
    own = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
    net.zero_grad()
    u, u_t, u_x = (one[0] for one in grid(t, x))
    expected = (u * u_t + u_x).square().sum()
    compare(value, expected.detach())
    compare(own, list(torch.autograd.grad(expected, list(net.parameters()))))
