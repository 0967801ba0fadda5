"""What `jacobian_from` remembers of a graph's shape: it saves the probing, and is never taken for another graph's."""

from __future__ import annotations

import gc
import itertools
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autojac import InputError, StructureChangedWarning, jacobian_from
from autojac.api import graph_plans
from autojac.api.graph_plans import known_graphs
from autojac.autodiff import pullback
from autojac.autodiff.graph_shape import graph_shape
from autojac.autodiff.pullback import Pullback
from autojac.probe.batch_axis_proof import backward_keeps_apart
from harness import compare
from oracle import jacobian_blocks, jacobian_full
from provable import COUPLED, INDEPENDENT

Function = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    known_graphs.clear()
    yield
    known_graphs.clear()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """Count backward passes of a call."""
    count = 0
    original = pullback.run_backward

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args)

    monkeypatch.setattr(pullback, "run_backward", counted)

    def of(call: Callable[[], Any]) -> int:
        before = count
        call()
        return count - before

    return of


def points(*shape: int, seed: int = 0) -> Tensor:
    made = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_()


def network(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, outputs)).double()


class Doubled(torch.autograd.Function):
    """Custom, so that its backward may do anything."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: int) -> Tensor:
        ctx.shift = shift
        return 2 * x + x.roll(shift, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return 2 * gradient + gradient.roll(-ctx.shift, 0), None


def doubled(x: Tensor, shift: int) -> Tensor:
    made: Tensor = Doubled.apply(x, shift)  # type: ignore[no-untyped-call]
    return made


@pytest.mark.parametrize("create", [False, True])
def test_a_proved_graph_takes_its_rows_alone_but_for_rare_checks(create: bool, passes: Any) -> None:
    net = network(1)
    counts = []
    for seed in range(20):
        x = points(6, 4, seed=seed)
        y = net(x)
        counts.append(passes(lambda y=y, x=x: jacobian_from(y, x, create_graph=create)))
    checked = [number for number, count in enumerate(counts, 1) if count > 1]
    assert checked == [1, 2, 4, 8, 16]
    assert set(counts[1:]) == {1, 2}


def test_several_outputs_and_inputs_are_remembered_too(passes: Any) -> None:
    net = network(3)

    def call(seed: int) -> Any:
        x, z = points(6, 4, seed=seed), points(6, 2, seed=seed)
        outputs = {"a": net(x) * z[:, :1], "b": z.sin()}
        found = jacobian_from(outputs, [x, z])
        compare(found["a"][0], jacobian_blocks(lambda x: net(x) * z.detach()[:, :1], (x.detach(),)))
        compare(found["b"][1], torch.diag_embed(z.detach().cos()))
        assert not found["b"][0].any()

    call(0), call(1)
    assert len(known_graphs) == 1
    # one batched pass for each output
    assert passes(lambda: call(2)) - passes(lambda: None) <= 2


def test_what_is_not_proved_is_checked_by_one_pass_in_each_call(passes: Any) -> None:
    counts = []
    for seed in range(6):
        x = points(6, 4, seed=seed)
        y = doubled(x, 0).sum(1)
        counts.append(passes(lambda y=y, x=x: jacobian_from(y, x)))
    assert counts[1:] == [2] * 5


def test_coupled_graphs_are_not_probed_again(passes: Any) -> None:
    counts = []
    for seed in range(8):
        x = points(5, 3, seed=seed)
        y = x.softmax(0)
        counts.append(
            passes(lambda y=y, x=x: compare(jacobian_from(y, x), jacobian_blocks(lambda x: x.softmax(0), (x,))))
        )
    assert counts[4] == counts[5] < counts[0]


def eye(x: Tensor) -> Tensor:
    return torch.eye(len(x), dtype=x.dtype)


def mixing(x: Tensor) -> Tensor:
    return eye(x) + 0.3


ARANGE, TURNED = torch.arange(4), torch.tensor([1, 0, 3, 2])
OFF, SOME = torch.zeros(4, 4, dtype=torch.bool), torch.eye(4, dtype=torch.bool)
TRAINED, EVALUATED = nn.BatchNorm1d(4).double(), nn.BatchNorm1d(4).double().eval()


def windows(step: int) -> Function:
    # as many windows of one sample each
    return lambda x: F.pad(x, (0, 0, 0, 3 * step - 3)).unfold(0, 1, step).squeeze(-1)[:4] * x


def written(rows: Tensor, x: Tensor) -> Tensor:
    y = x.clone()
    y[rows] += x.detach().cos() * x
    return y


def into_view(x: Tensor, start: int) -> Tensor:
    y = x.clone()
    y[:2].add_(x.sin().narrow(0, start, 2))
    return y


class Gate(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x * x.softmax(self.dim)


PAIRS: dict[str, tuple[Function, Function]] = {
    "shift": (lambda x: x * x.roll(0, 0), lambda x: x * x.roll(1, 0)),
    "rolled axis": (lambda x: x * x.roll(1, 1), lambda x: x * x.roll(1, 0)),
    "permutation": (lambda x: x * x[ARANGE], lambda x: x * x[TURNED]),
    "indexed axis": (lambda x: x * x[:, TURNED], lambda x: x * x[TURNED]),
    "index_select": (lambda x: x * x.index_select(0, ARANGE), lambda x: x * x.index_select(0, TURNED)),
    "gathered": (
        lambda x: x * x.gather(0, ARANGE[:, None].expand(4, 4)),
        lambda x: x * x.gather(0, TURNED[:, None].expand(4, 4)),
    ),
    "mask": (lambda x: torch.where(OFF, x.flip(0), x), lambda x: torch.where(SOME, x.flip(0), x)),
    "masked_fill": (lambda x: x * x.flip(0).masked_fill(~OFF, 1.0), lambda x: x * x.flip(0).masked_fill(SOME, 1.0)),
    "mask in floats": (lambda x: x + (OFF * 1.0) * x.flip(0), lambda x: x + (SOME * 1.0) * x.flip(0)),
    "product from the left": (lambda x: eye(x) @ x.sin(), lambda x: mixing(x) @ x.sin()),
    "weak product": (lambda x: eye(x) @ x.sin(), lambda x: (eye(x) + 1e-5) @ x.sin()),
    "BatchNorm": (EVALUATED, TRAINED),
    "dim": (Gate(1), Gate(0)),
    "cumsum": (lambda x: x.cumsum(1), lambda x: x.cumsum(0)),
    "flip": (lambda x: x * x.flip(1), lambda x: x * x.flip(0)),
    "sum": (lambda x: x * x.sum(1), lambda x: x * x.sum(0)),
    "windows": (windows(1), windows(2)),
    "solve": (
        lambda x: torch.linalg.solve(3 * eye(x).expand(4, 4, 4), x),
        lambda x: torch.linalg.solve(3 * eye(x) + 1, x),
    ),
    "custom": (lambda x: doubled(x, 0), lambda x: doubled(x, 1)),
    "written rows": (lambda x: written(ARANGE, x), lambda x: written(TURNED, x)),
    "written into a view": (lambda x: into_view(x, 0), lambda x: into_view(x, 2)),
    "recomputed": (
        lambda x: checkpoint(lambda x: eye(x) @ x.sin(), x, use_reentrant=False),
        lambda x: checkpoint(lambda x: mixing(x) @ x.sin(), x, use_reentrant=False),
    ),
    "attention mask": (
        lambda x: ((x @ x.T) + torch.where(SOME, 0.0, -torch.inf)).softmax(1) @ x.detach(),
        lambda x: ((x @ x.T) + torch.where(OFF, 0.0, -9.0)).softmax(1) @ x.detach(),
    ),
}


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("name", PAIRS)
def test_graphs_of_one_shape_that_couple_otherwise_are_told_apart(name: str, first: int) -> None:
    pair = PAIRS[name]
    # also where the one that couples was met before
    for seed, turn in enumerate([*[0] * (3 * first), 1, 0, 1, 1, 0]):
        func = pair[turn]
        x = points(4, 4, seed=seed)
        compare(jacobian_from(func(x), x), jacobian_blocks(func, (x.detach(),)))


@settings(max_examples=25)
@given(turns=st.lists(st.sampled_from(sorted(PAIRS)), min_size=2, max_size=6), seed=st.integers(0, 3))
def test_any_functions_in_turn(turns: list[str], seed: int) -> None:
    for number, name in enumerate(turns):
        func = PAIRS[name][(number + seed) % 2]
        x = points(4, 4, seed=number)
        compare(jacobian_from(func(x), x), jacobian_blocks(func, (x.detach(),)))


@pytest.mark.by_day(3)
@pytest.mark.parametrize(("table", "name"), [*(("one", n) for n in INDEPENDENT), *(("other", n) for n in COUPLED)])
def test_a_backward_that_is_proved_couples_nothing(table: str, name: str) -> None:
    func, x = (INDEPENDENT if table == "one" else COUPLED)[name]()
    x = x.detach().clone().requires_grad_()
    y = func(x)
    if not backward_keeps_apart(Pullback.of_graph([y], [x], False), [True], len(x)):
        return
    for sample in range(len(x)):
        (gradient,) = torch.autograd.grad(y[sample], x, torch.randn_like(y[sample]), retain_graph=True)
        assert not bool(torch.cat([gradient[:sample], gradient[sample + 1 :]]).any())


def test_most_common_models_are_proved_backward() -> None:
    missed = []
    for name, build in INDEPENDENT.items():
        func, x = build()
        x = x.detach().clone().requires_grad_()
        y = func(x)
        if not backward_keeps_apart(Pullback.of_graph([y], [x], False), [True], len(x)):
            missed.append(name)
    assert len(missed) <= len(INDEPENDENT) // 7, missed


def test_a_hook_that_mixes_samples_later_is_found_at_the_next_check() -> None:
    def call(seed: int, hooked: bool) -> None:
        x = points(4, 3, seed=seed)
        h = x.sin()
        if hooked:
            h.register_hook(lambda gradient: gradient + gradient.flip(0))
        blocks = torch.diag_embed(x.detach().cos())
        compare(jacobian_from(h * 2, x), 2 * blocks)

    for seed in range(3):
        call(seed, False)
    with pytest.warns(StructureChangedWarning, match="went unchecked"):
        call(4, True)
    # nothing is assumed of such graphs any more
    call(5, True)


def test_a_training_step_takes_the_gradients_of_the_hand_written_one() -> None:
    net, other = network(1), network(1)
    for seed in range(4):
        x = points(6, 4, seed=seed)
        jacobian_from(net(x), x, create_graph=True).square().sum().backward()
        (by_hand,) = torch.autograd.grad(other(x).sum(), x, create_graph=True)
        by_hand.square().sum().backward()
    found, expected = ([p.grad for p in one.parameters() if p.grad is not None] for one in (net, other))
    compare(found, expected)


def test_a_single_row_is_seen_through_one_view_where_it_is_trained() -> None:
    net = network(1)
    for _ in range(2):  # probed, and by the plan
        x = points(5, 4)
        J = jacobian_from(net(x), x, create_graph=True)
        assert J.grad_fn is not None
        (row, _), *_ = J.grad_fn.next_functions
        assert "View" in type(J.grad_fn).__name__
        assert not re.search("View|Squeeze|Stack|Select", type(row).__name__, re.IGNORECASE)
        compare(J.detach(), jacobian_blocks(net, (x.detach(),)))


def test_options_and_layouts_have_plans_of_their_own() -> None:
    x = points(4, 4)
    y = x.sin()
    for _, (layout, coupling) in itertools.product(
        range(3), itertools.product(("blocks", "full", "diagonal"), ("auto", "independent", "dense"))
    ):
        blocks = torch.diag_embed(x.detach().cos())
        expected = {"blocks": blocks, "full": jacobian_full(torch.sin, (x.detach(),)), "diagonal": x.detach().cos()}
        compare(jacobian_from(y, x, layout=layout, coupling=coupling), expected[layout])
    assert len(known_graphs) == 9


def test_what_was_declared_stays_verified() -> None:
    for seed in range(3):
        x = points(4, 4, seed=seed)
        jacobian_from(eye(x) @ x.sin(), x, coupling="independent")
    x = points(4, 4)
    with pytest.warns(StructureChangedWarning, match="declared independent"):
        J = jacobian_from(mixing(x) @ x.sin(), x, coupling="independent")
    compare(J, jacobian_blocks(lambda x: mixing(x) @ x.sin(), (x.detach(),)))


def test_nothing_finite_confirms_nothing(passes: Any) -> None:
    net = network(1)

    def call(x: Tensor) -> int:
        y = net(x)
        found: int = passes(lambda: jacobian_from(y, x))
        return found

    call(points(5, 4))
    call(points(5, 4))
    call(points(5, 4))
    broken = torch.full((5, 4), torch.nan, dtype=torch.float64, requires_grad=True)
    assert call(broken) > 1  # the fourth
    assert call(points(5, 4)) > 1
    assert call(points(5, 4)) == 1


def test_memory_is_bounded_and_holds_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_plans, "MOST_NODES", 12)
    for width in range(1, 8):
        x = points(4, width)
        y = x.sin().cos()  # three nodes with the leaf's
        jacobian_from(y, x)
    assert len(known_graphs) == 4
    alive = [weakref.ref(x), weakref.ref(y)]
    del x, y
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    deep = points(4, 2)
    y = deep
    for _ in range(20):
        y = y.sin()
    jacobian_from(y, deep)
    assert len(known_graphs) == 0


def test_a_freed_graph_is_named_as_before() -> None:
    net = network(2)
    for _ in range(3):
        x = points(5, 4)
        y = net(x)
        jacobian_from(y, x, retain_graph=False)
        with pytest.raises(InputError, match="freed"):
            jacobian_from(y, x)


def test_threads_share_what_is_known() -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(12):
                func = PAIRS["permutation"][(number + turn) % 2]
                x = points(4, 4, seed=turn)
                compare(jacobian_from(func(x), x), jacobian_blocks(func, (x.detach(),)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_shapes_of_graphs() -> None:
    def shape(func: Function, *size: int) -> Any:
        x = points(*(size or (4, 4)))
        return graph_shape([func(x)], [x])

    assert shape(torch.sin) == shape(torch.sin)
    assert shape(torch.sin) != shape(torch.cos)
    assert shape(torch.sin) != shape(torch.sin, 5, 4)
    # numbers that change from step to step are left out
    assert shape(lambda x: x + 2 * x**1.5) == shape(lambda x: x + 3 * x**2.5)
    assert shape(lambda x: x[:, TURNED]).key != shape(lambda x: x[TURNED]).key
    assert not shape(lambda x: x.sin().expand(2, 4, 4)).is_opaque
    assert shape(lambda x: doubled(x, 0)).is_opaque
    assert shape(lambda x: into_view(x, 0)).is_opaque
    assert shape(lambda x: checkpoint(torch.sin, x, use_reentrant=False)).is_opaque
    weight = points(4, 4)
    # a parameter is a leaf too, but no input
    assert shape(lambda x: x * weight).nodes == 2
    x, unused = points(3), points(3)
    parts = x.expand(2, 3).unbind(0)
    # an input may be one of several results of a node, and only another be read
    assert graph_shape([parts[0].sin()], [parts[0], parts[1], unused, x]).unused == (1, 2)
    # what leads to no input counts for nothing
    behind = doubled(unused, 0)
    assert not graph_shape([x.sin() * behind], [x]).is_opaque
