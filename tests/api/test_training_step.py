"""Training steps: value and gradients as a backward leaves them, by one program where that is possible."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac import (
    AutoHessian,
    AutoJacobian,
    Derivatives,
    InputError,
    OutputError,
    PlanMissError,
    PlanStore,
    RandomnessError,
    TrainingStep,
    UnsupportedError,
)
from autojac.api import step_progress
from autojac.planning import exploration
from autojac.planning.prepared_plan import PreparedPlan
from autojac.planning.search import measure
from autojac.replay.replayer import Replayer
from harness import CallCounting, Ticking, compare, in_use

OPTIONS: dict[str, Any] = {"on_miss": "estimate", "store": ":memory:"}
PULL = {"method": "Pull", "seeds": "identity", "engine": "loop", "chunk": None}
METHODS: dict[str, dict[str, Any]] = {
    "eager": PULL,
    "one program": {"method": "Replay", "inner": PULL, "without": None},
}


def network(outputs: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def points(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss(y: Tensor, J: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean() + (J**3).sum()


def by_hand(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    y = model(x)
    rows = [torch.autograd.grad(y[:, k].sum(), x, create_graph=True)[0] for k in range(y.shape[1])]
    value = loss(y, torch.stack(rows, 1), target)
    value.backward()
    return value.detach()


def gradients(module: nn.Module) -> list[Tensor]:
    return [torch.zeros(0) if p.grad is None else p.grad for p in module.parameters()]


def by(
    method: dict[str, Any],
    make: Callable[..., TrainingStep],
    *args: Any,
    on_miss: str = "estimate",
    store: PlanStore | None = None,
) -> TrainingStep:
    """A step by one method, which is found in the store."""
    store = store or PlanStore(":memory:")
    maker = make(on_miss="estimate" if on_miss == "estimate" else "tune", store=store)
    plan = dataclasses.replace(maker.plan(*args), finished=True)
    assert maker._whole is not None
    whole = maker._whole.wrapper
    keys = in_use(whole).keys
    assert keys is not None
    whole._plans.planner.repository.save(keys, dataclasses.replace(plan, method=method))
    return make(on_miss=on_miss, store=store)


def program(step: TrainingStep) -> Any:
    assert step._whole is not None
    return in_use(step._whole.wrapper).compute


def serving(step: TrainingStep, *args: Any) -> PreparedPlan:
    """The plan that serves a step: of the whole, or of the derivatives inside."""
    if step._whole is None or not step._progress.of(args).is_whole:
        return in_use(step._inner)
    return in_use(step._whole.wrapper)


@pytest.mark.parametrize("method", METHODS)
def test_value_and_gradients_are_those_of_a_backward_and_add_up(method: str) -> None:
    model, x, target = network(), points(4, 3), points(4, 2)
    reference = copy.deepcopy(model)
    step = by(METHODS[method], lambda **options: TrainingStep(model, loss, **options), x, target)
    for _ in range(6):
        value = step(x, target)
        compare(value, by_hand(reference, x, target))
        assert not value.requires_grad
        compare(gradients(model), gradients(reference))
    if method == "one program":
        assert isinstance(program(step), Replayer)
        assert program(step).bound is not None


def test_an_optimizer_takes_the_same_way() -> None:
    model, x, target = network(), points(4, 3), points(4, 2)
    reference = copy.deepcopy(model)
    step = by(METHODS["one program"], lambda **options: TrainingStep(model, loss, **options), x, target)
    ways = [(model, step), (reference, lambda *args: by_hand(reference, *args))]
    optimizers = [torch.optim.Adam(module.parameters(), lr=0.05) for module, _ in ways]
    for _ in range(8):
        for optimizer, (_, take) in zip(optimizers, ways, strict=True):
            optimizer.zero_grad()
            take(x, target)
            optimizer.step()
    compare(list(model.parameters()), list(reference.parameters()), rtol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_hooks_frozen_unused_and_exchanged_parameters(method: str) -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.unused = network(), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model, x, target = Spare(), points(4, 3), points(4, 2)
    step = by(METHODS[method], lambda **options: TrainingStep(model, loss, **options), x, target)
    seen: list[str] = []

    def both(change: Callable[[Any], None]) -> None:
        change(model)
        reference = copy.deepcopy(model)
        reference.zero_grad()
        by_hand(reference, x, target)
        for _ in range(3):
            model.zero_grad()
            step(x, target)
            compare(gradients(model), gradients(reference))

    both(lambda model: None)
    assert model.unused.grad is None
    both(lambda model: model.inner[0].weight.requires_grad_(False))
    assert model.inner[0].weight.grad is None
    both(lambda model: model.inner[0].weight.requires_grad_())
    both(lambda model: setattr(model.inner[0], "bias", nn.Parameter(torch.rand(5).double())))
    both(lambda model: model.inner[2].weight.data.mul_(2))
    model.inner[2].bias.register_hook(lambda gradient: 3 * gradient)
    model.inner[2].bias.register_post_accumulate_grad_hook(lambda leaf: seen.append("accumulated"))
    before = model.inner[2].bias.grad.clone()
    model.zero_grad()
    step(x, target)
    compare(model.inner[2].bias.grad, 3 * before)
    assert seen == ["accumulated"]


def residual(u: Tensor, u_t: Tensor, u_x: Tensor, u_xx: Tensor) -> Tensor:
    return (u_t + u * u_x - 0.1 * u_xx).square().mean()


def hand_written_pinn(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope[:, 1].sum(), x, create_graph=True)
    value = residual(u, slope[:, :1], slope[:, 1:2], second[:, 1:2])
    value.backward()
    return value.detach()


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_in_place_of_a_jacobian(method: str) -> None:
    model, x = network(1), points(4, 3)
    reference = copy.deepcopy(model)

    def make(**options: Any) -> TrainingStep:
        return TrainingStep(Derivatives(model, ((), (0,), (1,), (1, 1)), **options), residual)

    step = by(METHODS[method], make, x)
    for _ in range(3):
        compare(step(x), hand_written_pinn(reference, x))
        compare(gradients(model), gradients(reference))


def test_hessians_and_wrappers_with_their_own_options() -> None:
    model, x = network(1), points(4, 3)
    hessian = AutoHessian(lambda x: model(x).squeeze(1), **OPTIONS)
    value = TrainingStep(hessian, lambda H: H.square().sum())(x)
    compare(value, hessian(x).detach().square().sum())
    found = gradients(model)
    model.zero_grad()
    hessian(x).square().sum().backward()
    compare(found, gradients(model))
    full = AutoJacobian(model, layout="full", **OPTIONS)
    compare(TrainingStep(full, lambda y, J: J.square().sum())(x), full(x).detach().square().sum())


def test_parameters_of_the_loss_train_and_buffers_move_once() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0).double())

        def forward(self, y: Tensor, J: Tensor) -> Tensor:
            return self.weight * y.square().mean() + J.square().mean()

    model, weighted, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double(), Weighted(), points(4, 3)
    step = TrainingStep(model, weighted, **OPTIONS)
    value = step(x)
    assert model[1].num_batches_tracked.item() == 1
    assert weighted.weight.grad is not None
    assert bool(weighted.weight.grad < value)


def test_what_is_no_step_of_parameters_alone_is_a_backward() -> None:
    model, x, target = network(), points(4, 3), points(4, 2)
    step = TrainingStep(model, loss, **OPTIONS)
    trained = x.clone().requires_grad_()
    step(trained, target)
    assert trained.grad is not None
    assert "an argument requires grad" in step.explain(trained, target)
    scale = torch.tensor(2.0).double().requires_grad_()
    loose = TrainingStep(model, lambda y, J: (scale * J).sum(), **OPTIONS)
    loose(x)
    assert scale.grad is not None
    assert "outside of all modules" in loose.explain(x)
    reference = copy.deepcopy(model)
    reference.zero_grad()
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        compare(step(x, target), by_hand(reference, x, target))
    compare(gradients(model), gradients(reference))


def test_nested_targets_and_numbers_pass_through() -> None:
    model, x = network(), points(4, 3)

    def scaled(y: Tensor, J: Tensor, targets: dict[str, Tensor], factor: float) -> Tensor:
        return factor * ((y - targets["y"]).square().sum() + (J - targets["J"]).square().sum())

    targets = {"y": points(4, 2), "J": points(4, 2, 3)}
    jac = AutoJacobian(model, **OPTIONS)
    for factor in (0.5, 2.0):
        expected = scaled(*jac.value_and_jacobian(x), targets, factor).detach()
        compare(TrainingStep(jac, scaled)(x, targets, factor), expected)


def test_a_search_of_a_whole_step_finds_one_program() -> None:
    model, x, target = network(), points(4, 3), points(4, 2)
    step = TrainingStep(model, loss, store=":memory:", on_miss="tune", effort="quick", budget_s=0.5)
    plan = step.tune(x, target)
    assert plan.trials
    assert "Replay" in step.explain(x, target)
    compare(step(x, target), by_hand(copy.deepcopy(model), x, target))


def test_a_search_before_the_first_step_is_one_of_its_derivatives_too() -> None:
    model, store = network(), PlanStore(":memory:")
    step = TrainingStep(model, loss, store=store, on_miss="tune", effort="quick", budget_s=0.5)
    for batch in (4, 6):
        x, target = points(batch, 3), points(batch, 2)
        compare(step(x, target), by_hand(copy.deepcopy(model), x, target))
    # besides, the search evaluates losses without a graph
    assert [stored.plan.effort for stored in store.listing()].count("quick") == 4


def refused(make: Callable[[], Any]) -> Sequence[Any]:
    with pytest.raises((OutputError, RandomnessError)) as caught:
        make()
    return caught.value.args


def test_losses_and_models_that_are_none() -> None:
    model, x = network(), points(4, 3)
    step = TrainingStep(model, lambda y, J: J.sum(0), **OPTIONS)
    assert "one number" in refused(lambda: step(x))[0]
    assert all(p.grad is None for p in model.parameters())
    drawing = TrainingStep(nn.Sequential(model, nn.Dropout()), lambda y, J: J.sum(), **OPTIONS)
    assert "random" in refused(lambda: drawing(x))[0]


def test_copies_and_names() -> None:
    model, x, target = network(), points(4, 3), points(4, 2)
    step = TrainingStep(model, loss, **OPTIONS)
    other = pickle.loads(pickle.dumps(step))
    compare(other(x, target), step(x, target))
    assert repr(step).startswith("TrainingStep(AutoJacobian(Sequential")


def test_a_step_is_improved_while_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "clock", CallCounting(tick=0.05))
    monkeypatch.setattr(exploration, "SHARE", 5.0)
    model, x, target = network(), points(4, 3), points(4, 2)
    reference = copy.deepcopy(model)
    step = TrainingStep(model, loss, store=":memory:")
    by_hand(reference, x, target)
    phases = []
    for _ in range(200):
        model.zero_grad()
        step(x, target)
        compare(gradients(model), gradients(reference))
        phase = "apart" if step._whole is None else type(program(step)).__name__
        phases += [phase] * (phases[-1:] != [phase])
        if step._progress.of((x, target)).is_whole:
            break
    # the search for the derivatives comes first
    assert any(plan.plan.source == "search" for _, plan in step._inner._plans.items())
    assert phases[0] == "apart"
    assert phases[-1] == "Replayer"
    assert step._progress.of((x, target)).is_whole
    assert "Jacobian of B = 1" in step.explain(x, target)


def test_the_search_for_the_derivatives_is_paid_for_by_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = CallCounting(tick=1e-6)
    monkeypatch.setattr(measure, "clock", clock)

    def slow(y: Tensor, J: Tensor, target: Tensor) -> Tensor:
        clock.time += 1.0
        return loss(y, J, target)

    step = TrainingStep(network(), slow, store=":memory:")
    for _ in range(5):
        step(points(4, 3), points(4, 2))
    searched = in_use(step._inner).exploration
    assert searched is not None
    assert 4.9 < searched.earned < 5.5
    # most of what was found is adopted, and nothing is compiled, before the step is planned as a whole
    for _ in range(100):
        step(points(4, 3), points(4, 2))
    assert step._whole is not None
    assert searched.is_left_to_compile or searched.is_over
    assert searched.spent < exploration.SHARE * searched.earned


SOURCES: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], Callable[[], Any]]] = {
    "Jacobian": (AutoJacobian, lambda y, J: J.square().mean(), lambda: points(4, 3)),
    "two batch axes": (
        lambda model, **options: AutoJacobian(model, batch_dims=2, **options),
        lambda y, J: J.square().mean(),
        lambda: points(2, 3, 3),
    ),
    "derivatives": (
        lambda model, **options: Derivatives(model, ((), (0, 0)), **options),
        lambda u, u_xx: (u * u_xx).mean(),
        lambda: points(4, 3),
    ),
    "derivatives along two batch axes": (
        lambda model, **options: Derivatives(model, ((), (0, 0)), batch_dims=2, **options),
        lambda u, u_xx: (u * u_xx).mean(),
        lambda: points(2, 3, 3),
    ),
    "derivatives in two tensors": (
        lambda model, **options: Derivatives(
            lambda t, x: model(torch.cat([t, x], 1)), of=((), ("t",), (("x", 1), ("x", 1))), **options
        ),
        lambda u, u_t, u_yy: (u_t - u * u_yy).square().mean(),
        lambda: (points(4, 1), points(4, 2)),
    ),
    "Hessian": (
        lambda model, **options: AutoHessian(lambda x: model(x).sum(1), **options),
        lambda H: H.square().mean(),
        lambda: points(4, 3),
    ),
}


@pytest.mark.by_day(3)
@pytest.mark.parametrize("source", SOURCES)
def test_steps_are_right_in_all_phases_of_their_search(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "clock", CallCounting(tick=1e-3))
    monkeypatch.setattr(exploration, "SHARE", 50.0)
    make, loss, inputs = SOURCES[source]
    model, x = network(), inputs()
    reference = copy.deepcopy(model)
    value = TrainingStep(make(reference, **OPTIONS), loss)(x)
    step = TrainingStep(make(model, store=":memory:"), loss)
    assert "the search for the derivatives comes first" in step.explain(x)
    for _ in range(200):
        model.zero_grad()
        compare(step(x), value)
        compare(gradients(model), gradients(reference))
        if step._progress.of((x,)).steps > 1:
            break
    assert step._whole is not None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_steps_where_the_caller_records_no_graph(method: str, mode: Callable[[], Any]) -> None:
    model, x, target = network(), points(4, 3), points(4, 2)
    reference = copy.deepcopy(model)
    step = by(METHODS[method], lambda **options: TrainingStep(model, loss, **options), x, target)
    for _ in range(3):
        with mode():
            value = step(x, target)
        compare(value, by_hand(reference, x, target))
        compare(gradients(model), gradients(reference))


class TwoSpeeds(Ticking):
    """A clock by which steps of each way take what is said, whatever they take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, whole: float, separate: float) -> None:
        super().__init__(lambda true: 1e-3)
        self.whole, self.separate, self.was_separate = whole, separate, False
        true = TrainingStep._step_separately

        def step_separately(*args: Any) -> Any:
            self.was_separate = True
            return true(*args)

        monkeypatch.setattr(TrainingStep, "_step_separately", step_separately)
        monkeypatch.setattr(measure, "clock", self)

    def start(self, device: torch.device) -> Any:
        self.was_separate = False
        return super().start(device)

    def since(self, start: Any) -> float:
        return self.separate if self.was_separate else self.whole


def tuned(
    model: nn.Module, x: Tensor, target: Tensor, on_miss: str = "tune", store: PlanStore | None = None
) -> TrainingStep:
    """A step whose program of the whole is in the store."""
    make = partial(TrainingStep, model, loss, effort="quick", budget_s=0.3)
    return by(METHODS["one program"], make, x, target, on_miss=on_miss, store=store)


def ways_of(step: TrainingStep, clock: TwoSpeeds, *args: Tensor, steps: int = 16) -> str:
    """Take some steps, right ones, and return by which way each was computed: whole or separately."""
    reference, model = copy.deepcopy(step.source.func), step.source.func
    ways = ""
    for _ in range(steps):
        reference.zero_grad()
        model.zero_grad()
        clock.was_separate = False
        compare(step(*args), by_hand(reference, *args))
        ways += "s" if clock.was_separate else "w"
        compare(gradients(model), gradients(reference))
    return ways


@pytest.mark.parametrize(("separate", "last"), [(1.0, "s"), (1.84, "w"), (3.0, "w")])
def test_the_faster_way_is_kept(separate: float, last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = TwoSpeeds(monkeypatch, whole=2.0, separate=separate)
    model, x, target = network(), points(4, 3), points(4, 2)
    step = tuned(model, x, target)
    assert ways_of(step, clock, x, target) == 6 * "ws" + 4 * last
    reason = "they took 1 s, the program of the whole step 2 s"
    assert (reason in step.explain(x, target)) == (last == "s")
    # another step of the same model is looked at anew, and one without a program not at all
    other = TrainingStep(network(), loss, on_miss="estimate", store=":memory:")
    assert ways_of(other, clock, x, target) == 16 * "s"


@pytest.mark.parametrize("on_miss", ["error", "estimate"])
def test_nothing_is_compared_where_plans_are_fixed_or_nothing_is_timed(
    on_miss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = TwoSpeeds(monkeypatch, whole=2.0, separate=1.0)
    x, target = points(4, 3), points(4, 2)
    step = tuned(network(), x, target, on_miss=on_miss)
    ways = ways_of(step, clock, x, target)
    assert ways.lstrip("s") == (16 - ways.count("s")) * "w"
    assert ways.endswith(10 * "w")


@pytest.mark.parametrize("before", [0, 2, 16])
def test_nothing_is_compared_while_plans_are_pinned(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is a comparison continued, nor does one hold that was decided before."""
    clock = TwoSpeeds(monkeypatch, whole=2.0, separate=1.0)
    x, target = points(4, 3), points(4, 2)
    step = tuned(network(), x, target)
    ways_of(step, clock, x, target, steps=before)
    store = step._inner._plans.planner.repository.store
    autojac.pin(store)
    try:
        assert ways_of(step, clock, x, target) == 16 * "w"
    finally:
        autojac.pin(None)
    assert ways_of(step, clock, x, target).endswith("ssss")


def test_modes_that_alternate_are_not_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = TwoSpeeds(monkeypatch, whole=4.0, separate=5.0)
    model, x, target, store = network(), points(4, 3), points(4, 2), PlanStore(":memory:")
    tuned(model.eval(), x, target, store=store)
    step = tuned(model.train(), x, target, store=store)
    ways = {True: "", False: ""}
    for turn in range(32):
        model.train(turn % 2 == 0)
        clock.whole, clock.separate = (4.0, 5.0) if model.training else (0.5, 1.0)
        ways[model.training] += ways_of(step, clock, x, target, steps=1)
    assert [each[-4:] for each in ways.values()] == ["wwww", "wwww"]


def test_threads_that_step_at_once_compare_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, target = network(), points(4, 3), points(4, 2)
    reference = copy.deepcopy(model)
    by_hand(reference, x, target)
    for separate in (1.0, 3.0):
        clock = TwoSpeeds(monkeypatch, whole=2.0, separate=separate)
        step = tuned(model, x, target)
        assert ways_of(step, clock, x, target, steps=3) == "wsw"
        model.zero_grad()
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(4) as pool:
                values = list(pool.map(lambda _, step=step: step(x, target), range(40)))
        finally:
            sys.setswitchinterval(interval)
        compare(values, 40 * [by_hand(copy.deepcopy(model), x, target)])
        compare(gradients(model), [40 * gradient for gradient in gradients(reference)])


def test_explain_says_what_a_comparison_has_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = TwoSpeeds(monkeypatch, whole=2.0, separate=1.0)
    x, target = points(4, 3), points(4, 2)
    step = tuned(network(), x, target)
    said = []
    for _ in range(13):
        ways_of(step, clock, x, target, steps=1)
        said.append(step.explain(x, target).splitlines()[0])
    assert all("in both ways by turns" in line for line in said[:11])
    assert all("they took 1 s, the program of the whole step 2 s" in line for line in said[11:])


def test_hooks_stay_in_place_while_a_program_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's backward may be calling them."""
    model, x, target = network(), points(4, 3), points(4, 2)
    seen: list[bool] = []
    true = Replayer.try_replay

    def watched(self: Replayer, leaves: Any) -> Any:
        seen.append(model[0].weight._backward_hooks is hooks)
        return true(self, leaves)

    monkeypatch.setattr(Replayer, "try_replay", watched)
    model[0].weight.register_hook(lambda gradient: 2 * gradient)
    hooks = model[0].weight._backward_hooks
    step = by(METHODS["one program"], lambda **options: TrainingStep(model, loss, **options), x, target)
    for _ in range(6):
        step(x, target)
    assert len(seen) > 2
    assert all(seen)


class WithUnused(nn.Module):
    """A network, and a parameter that leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.unused = nn.Parameter(torch.ones(3).double())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


@pytest.mark.parametrize("on_miss", ["estimate", "tune", "online"])
def test_an_optimizer_in_the_backward_steps_once(on_miss: str) -> None:
    model, x, target = WithUnused(), points(4, 3), points(4, 2)
    reference = copy.deepcopy(model)
    for module in (model, reference):
        for parameter in module.parameters():
            optimizer = torch.optim.SGD([parameter], lr=0.01, momentum=0.9)

            def update(_: Tensor, optimizer: Any = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(update)
    step = TrainingStep(model, loss, store=":memory:", on_miss=on_miss, effort="quick", budget_s=0.3)
    for _ in range(4):
        compare(step(x, target), by_hand(reference, x, target))
        compare(list(model.parameters()), list(reference.parameters()))


@pytest.mark.parametrize("on_miss", ["estimate", "tune"])
def test_a_sparse_gradient_stays_one(on_miss: str) -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.layer = nn.Embedding(5, 2, sparse=True), nn.Linear(3, 2)
            self.register_buffer("ids", torch.tensor([0, 1, 1, 3]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer(x)) + self.table(self.ids)

    model, x, target = Embedded().double(), points(4, 3), points(4, 2)
    reference = copy.deepcopy(model)
    step = TrainingStep(model, loss, store=":memory:", on_miss=on_miss, effort="quick", budget_s=0.3)
    for _ in range(3):
        model.zero_grad()
        reference.zero_grad()
        compare(step(x, target), by_hand(reference, x, target))
        found, expected = (module.table.weight.grad for module in (model, reference))
        assert found is not None
        assert expected is not None
        assert found.is_sparse
        compare(found.to_dense(), expected.to_dense())
    assert "sparse=True" in step.explain(x, target)
    with pytest.raises(UnsupportedError, match="sparse=True"):
        AutoJacobian.of_parameters(model, **OPTIONS)(x)


def test_what_steps_take_in_one_mode_decides_nothing_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = TwoSpeeds(monkeypatch, whole=1.0, separate=2.0)
    model, x, target = network(), points(4, 3), points(4, 2)
    step = tuned(model, x, target)
    assert ways_of(step, clock, x, target).endswith("wwww")
    model.eval()
    clock.whole = 3.0
    assert ways_of(step, clock, x, target).endswith("ssss")
    model.train()
    assert ways_of(step, clock, x, target).endswith(11 * "w")


def test_a_step_that_raises_during_a_comparison_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = TwoSpeeds(monkeypatch, whole=1.0, separate=2.0)
    model, x, target = network(), points(4, 3), points(4, 2)
    step = tuned(model, x, target)
    assert ways_of(step, clock, x, target, steps=2) == "ws"
    (duel,) = step._progress.of((x, target)).duels.values()
    before = len(duel.whole), len(duel.separate)
    with pytest.raises(Exception, match="size"):
        step(x, points(4, 5))
    assert (len(duel.whole), len(duel.separate)) == before
    assert ways_of(step, clock, x, target).endswith("wwww")


def test_a_refusal_holds_until_the_model_changes() -> None:
    model, x, target = network(), points(4, 3), points(4, 2)
    step = TrainingStep(model, loss, **OPTIONS)
    for _ in range(2):
        step(x, target)
    progress = step._progress.of((x, target))
    assert "no program of the whole step is known" in step.explain(x, target)
    for _ in range(2):
        step(x, target)
    assert progress.refusals == 1
    model[1] = nn.Sigmoid()
    reference = copy.deepcopy(model)
    for _ in range(2):
        reference.zero_grad()
        model.zero_grad()
        compare(step(x, target), by_hand(reference, x, target))
        compare(gradients(model), gradients(reference))
    assert progress.refusals == 2


def test_a_counter_among_the_arguments_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_progress, "MOST_KINDS", 3)
    model, x, target = network(), points(4, 3), points(4, 2)
    reference = copy.deepcopy(model)
    step = TrainingStep(model, lambda y, J, target, count: loss(y, J, target) + 0 * count, **OPTIONS)
    for count in range(6):
        compare(step(x, target, count), by_hand(reference, x, target))
        compare(gradients(model), gradients(reference))
    assert len(step._progress) == 3
    assert step._whole is None


def test_each_batch_trains_what_its_loss_depends_on() -> None:
    model = network()

    def branching(y: Tensor, J: Tensor, target: Tensor) -> Tensor:
        value = J.square().sum()
        return value + (y.mean() if len(y) == 5 and float(y.detach().mean()) < 1e9 else 0.0)

    store = PlanStore(":memory:")
    batches = [(points(size, 3), points(size, 2)) for size in (4, 5)]
    for batch in batches:
        maker = TrainingStep(model, branching, on_miss="estimate", store=store)
        plan = maker.plan(*batch)
        assert maker._whole is not None
        keys = in_use(maker._whole.wrapper).keys
        assert keys is not None
        maker._whole.wrapper._plans.planner.repository.save(
            keys, dataclasses.replace(plan, method=METHODS["one program"])
        )
    step = TrainingStep(model, branching, on_miss="estimate", store=store)
    reference = copy.deepcopy(model)
    plain = TrainingStep(reference, branching, **OPTIONS)
    for number in (0, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0, 1):
        model.zero_grad()
        reference.zero_grad()
        compare(step(*batches[number]), plain(*batches[number]))
        compare(gradients(model), gradients(reference))
    assert all(step._progress.of(batch).is_whole for batch in batches)


def test_a_loss_that_draws_is_computed_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), points(4, 3)
    step = TrainingStep(model, lambda y, J: (J * torch.rand_like(J)).sum(), **OPTIONS)
    for _ in range(3):
        torch.manual_seed(2)
        value = step(x)
        torch.manual_seed(2)
        J = AutoJacobian(model, **OPTIONS)(x).detach()
        compare(value, (J * torch.rand_like(J)).sum())
    assert "random" in step.explain(x)


def test_a_loss_that_draws_in_another_mode_is_computed_separately_there() -> None:
    model, x, target = network(), points(4, 3), points(4, 2)
    dropout = nn.Dropout(0.5).eval()

    def dropped(y: Tensor, J: Tensor, target: Tensor) -> Tensor:
        return loss(y, dropout(J), target)

    step = by(METHODS["one program"], lambda **options: TrainingStep(model, dropped, **options), x, target)
    for _ in range(3):
        step(x, target)
    assert step._progress.of((x, target)).is_whole
    dropout.train()
    for _ in range(3):
        torch.manual_seed(3)
        value = step(x, target)
        y, J = AutoJacobian(model, **OPTIONS).value_and_jacobian(x)
        torch.manual_seed(3)
        compare(value, dropped(y, J, target).detach())


def test_a_loss_that_fails_is_evaluated_once() -> None:
    model, x = network(), points(4, 3)
    failing, calls = False, 0

    def sometimes(y: Tensor, J: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if failing:
            raise UnsupportedError("not today")
        return J.square().sum()

    step = TrainingStep(model, sometimes, **OPTIONS)
    for _ in range(3):
        step(x)
    failing, calls = True, 0
    with pytest.raises(UnsupportedError, match="not today"):
        step(x)
    assert calls == 1
    failing = False
    step(x)


@pytest.mark.parametrize("change", ["a tensor", "a module"])
def test_what_begins_to_be_trained_later_is_trained(change: str) -> None:
    model, x, target = network(), points(4, 3), points(4, 2)
    parts: dict[str, Any] = {"scale": torch.tensor(2.0).double(), "head": nn.Linear(2, 2).double()}

    def scaled(y: Tensor, J: Tensor, target: Tensor) -> Tensor:
        return parts["scale"] * loss(parts["head"](y), J, target)

    step = by(METHODS["one program"], lambda **options: TrainingStep(model, scaled, **options), x, target)
    for _ in range(4):
        step(x, target)
    assert step._progress.of((x, target)).is_whole
    if change == "a tensor":
        parts["scale"].requires_grad_()
    else:
        parts["head"] = nn.Linear(2, 2).double()
    trained = [*model.parameters(), *parts["head"].parameters(), *([parts["scale"]] if change == "a tensor" else [])]
    for tensor in trained:
        tensor.grad = None
    for count in range(1, 4):
        value = step(x, target)
        y, J = AutoJacobian(model, **OPTIONS).value_and_jacobian(x)
        expected = scaled(y, J, target)
        compare(value, expected.detach())
        reference = torch.autograd.grad(expected, trained)
        compare([tensor.grad for tensor in trained], [count * gradient for gradient in reference])


def test_tuning_without_a_graph_tunes_the_step_with_one() -> None:
    model, x, target = network(), points(4, 3), points(4, 2)
    step = TrainingStep(model, loss, store=":memory:", effort="quick", budget_s=0.3)
    with torch.no_grad():
        step.tune(x, target)
    plans = [plan for _, plan in step._inner._plans.items() if plan.problem.differentiable]
    assert [plan.plan.effort for plan in plans] == ["quick"]
    compare(step(x, target), by_hand(copy.deepcopy(model), x, target))


def test_a_step_under_autocast_trains_what_the_model_holds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    scale = nn.Linear(1, 1)
    x, target = torch.rand(32, 3), torch.rand(32, 3)

    def scaled(y: Tensor, J: Tensor, target: Tensor) -> Tensor:
        return loss(y, J, target) + scale.weight.square().sum()

    step = TrainingStep(model, scaled, store=":memory:", effort="quick", budget_s=1.0)
    trained = [*model.parameters(), scale.weight]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, J = AutoJacobian(model, **OPTIONS).value_and_jacobian(x)
        expected = torch.autograd.grad(scaled(y, J, target), trained)
        step.tune(x, target)
        for _ in range(5):
            for tensor in trained:
                tensor.grad = None
            step(x, target)
            torch.testing.assert_close([tensor.grad for tensor in trained], list(expected), rtol=0.1, atol=0.05)


def test_tuning_is_allowed_where_steps_make_no_plans() -> None:
    step, x, target = TrainingStep(network(), loss, on_miss="error", store=":memory:"), points(4, 3), points(4, 2)
    with pytest.raises(PlanMissError):
        step(x, target)
    step.tune(x, target, effort="quick", budget_s=0.3)
    compare(step(x, target), by_hand(network(), x, target))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_by_name() -> None:
    ragged = torch.nested.nested_tensor([torch.rand(2, 3), torch.rand(3, 3)])
    with pytest.raises(InputError, match="nested"):
        TrainingStep(network(), loss, **OPTIONS)(ragged, points(4, 2))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_looks_at_none_of_its_data_is_checked_once(method: str) -> None:
    model, x, target = network(), points(4, 3), points(4, 2)
    step = by(METHODS[method], lambda **options: TrainingStep(model, loss, **options), x, target)
    for _ in range(9):
        step(x, target)
        schedule = serving(step, x, target).schedule
        # planning the whole step exchanges parameters, after which the derivatives are checked once more
        assert schedule.last_check <= (1 if method == "one program" else 2)
        assert schedule.next_check == math.inf
    # what changes is noticed, and checked
    model[1] = nn.Sigmoid()
    reference = copy.deepcopy(model)
    reference.zero_grad()
    model.zero_grad()
    compare(step(x, target), by_hand(reference, x, target))
    compare(gradients(model), gradients(reference))


def test_a_step_that_looks_at_its_data_is_checked_on() -> None:
    def branching(y: Tensor, J: Tensor, target: Tensor) -> Tensor:
        value = loss(y, J, target)
        return value if float(value.detach()) < 1e9 else 2 * value

    model, x, target = network(), points(4, 3), points(4, 2)
    step = by(METHODS["one program"], lambda **options: TrainingStep(model, branching, **options), x, target)
    for _ in range(5):
        step(x, target)
    assert serving(step, x, target).schedule.last_check == 4


class Mixed(nn.Module):
    """Samples that numbers keep apart, which no operator proves."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.register_buffer("mix", torch.eye(4).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.mix @ self.inner(x)


def test_a_step_is_checked_on_where_its_derivatives_are() -> None:
    model, x, target = Mixed(), points(4, 3), points(4, 2)
    step = by(METHODS["one program"], lambda **options: TrainingStep(model, loss, **options), x, target)
    step(x, target)
    checked = []
    for call in range(1, 10):
        step(x, target)
        schedule = serving(step, x, target).schedule
        checked += [call] * (schedule.last_check == schedule.calls)
    assert checked == [1, 2, 4, 8]


def test_a_wrapper_inside_a_recorded_function_makes_no_checks_there() -> None:
    model, x = network(1), points(4, 3)
    inner = AutoJacobian(model, **OPTIONS)
    outer = AutoJacobian(lambda x: inner(x).squeeze(1), store=":memory:", on_miss="tune", effort="quick", budget_s=0.5)
    reference = torch.func.vmap(torch.func.hessian(lambda x: model(x).squeeze(-1)))(x)
    for _ in range(4):
        compare(outer(x).detach(), reference.detach())
    reasons = [trial.reason or "" for trial in outer.plan(x).trials]
    assert not any("reads values of a tensor" in reason or "autojac guard" in reason for reason in reasons)
