"""Masks, index tensors and adjacency matrices decide what couples: whatever they hold, the next Jacobian is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac import AutoJacobian, Structure
from autojac.guards.function_state import MOST_CHANGES
from autojac.guards.tensor_contents import SMALL, TensorContents
from harness import Counted, compare, forced
from oracle import jacobian_blocks, jacobian_full

B = 5
PULL = {"method": "Pull", "seeds": "shared", "engine": "vmap", "chunk": None}
PUSH = {"method": "Push", "seeds": "shared", "engine": "loop", "chunk": None}
EYE = torch.eye(B, dtype=torch.float64)
FULL = torch.ones(B, B, dtype=torch.float64)
PAIRS = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).double()


class Opaque(torch.autograd.Function):
    """sin, of which no proof knows anything."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * x.cos()


def segments(x: Tensor, ids: Tensor) -> Tensor:
    return x - x.new_zeros(B, x.shape[1]).index_add(0, ids, x)[ids]


def lagged(x: Tensor, lag: Tensor) -> Tensor:
    return x.sin() * torch.stack([x[(j + lag) % B] for j in torch.arange(B)])


def neighbours(x: Tensor, adjacency: Tensor) -> Tensor:
    return (adjacency @ x).sin()


def spread(x: Tensor, adjacency: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add(0, adjacency.indices()[0], x[adjacency.indices()[1]]) * x


def attention(x: Tensor, mask: Tensor) -> Tensor:
    return (x @ x.T).masked_fill(~mask, -torch.inf).softmax(1) @ x


def partner(x: Tensor, other: Tensor) -> Tensor:
    return x * x[other]


def switched(x: Tensor, on: Tensor) -> Tensor:
    return x.sin() + (x.roll(1, 0) if bool(on) else 0)


def nested(x: Tensor, graph: dict[str, Tensor]) -> Tensor:
    return Opaque.apply(x) * x[graph["ids"]]  # type: ignore[no-any-return]


def timed(x: Tensor, t: float) -> Tensor:
    return Opaque.apply(x) + (x.roll(1, 0) if t > 0.5 else 0)  # type: ignore[no-any-return]


Case = tuple[Callable[..., Any], list[Any]]
# the first of the arguments keeps the samples apart
CASES: dict[str, Case] = {
    "segment ids": (segments, [torch.arange(B), torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 2, 2])]),
    "lag": (lagged, [torch.tensor(0), torch.tensor(1), torch.tensor(3)]),
    "adjacency": (neighbours, [EYE, FULL, PAIRS]),
    "sparse adjacency": (spread, [EYE.to_sparse().coalesce(), PAIRS.to_sparse().coalesce()]),
    "attention mask": (attention, [EYE.bool(), PAIRS.bool(), FULL.bool()]),
    "partner": (partner, [torch.arange(B), torch.tensor([1, 0, 3, 2, 4]), torch.zeros(B, dtype=torch.int64)]),
    "flag": (switched, [torch.tensor(False), torch.tensor(True)]),
    "nested": (nested, [{"ids": torch.arange(B)}, {"ids": torch.arange(B).roll(1)}]),
}


def points() -> Tensor:
    return torch.randn(B, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def copied(value: Any) -> Any:
    return {name: one.clone() for name, one in value.items()} if isinstance(value, dict) else value.clone()


def right(found: Tensor, func: Callable[..., Any], x: Tensor, layout: str, *args: Any) -> None:
    if layout == "blocks":
        compare(found.detach(), jacobian_blocks(func, (x, *args)))
    else:
        whole = jacobian_full(func, (x, *args))
        compare(found.to_dense().detach().reshape(whole.shape), whole)


def served(jac: AutoJacobian, name: str, by: Any, keyword: bool, x: Tensor) -> Any:
    if not keyword:
        return jac(x, by)
    parameter = CASES[name][0].__code__.co_varnames[1]
    return jac(x, **{parameter: by})


SERVED = {
    "search": (None, False),
    "keyword": (None, True),
    "pull": (PULL, False),
    "replay": ({"method": "Replay", "inner": PULL}, True),
}


@pytest.mark.by_day(3)
@pytest.mark.parametrize("way", SERVED)
@pytest.mark.parametrize("name", CASES)
def test_arguments_that_keep_samples_apart_at_first_may_couple_them_later(name: str, way: str) -> None:
    func, values = CASES[name]
    method, keyword = SERVED[way]
    x = points()
    options: dict[str, Any] = {"on_miss": "estimate"} if keyword else {"on_miss": "estimate", "in_dims": (0, None)}
    if method is None:
        jac = AutoJacobian(func, store=":memory:", **options)
    else:
        parameter = func.__code__.co_varnames[1]
        args, kwargs = ((x,), {parameter: values[0]}) if keyword else ((x, values[0]), {})
        jac = forced(func, args, method, kwargs, **options)
    expected = [jacobian_blocks(func, (x, by)) for by in values]
    for _ in range(5):  # past the fourth call's check, before the eighth's
        compare(served(jac, name, copied(values[0]), keyword, x), expected[0])
    for turn in (1, -1, 0):
        for _ in range(2):
            compare(served(jac, name, copied(values[turn]), keyword, x), expected[turn])


@pytest.mark.by_day(2)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", ["full", "sparse"])
@pytest.mark.parametrize("name", ["segment ids", "lag", "adjacency", "attention mask"])
def test_other_layouts_are_right_too(name: str, layout: str) -> None:
    func, values = CASES[name]
    x = points()
    jac = AutoJacobian(func, store=":memory:", on_miss="estimate", layout=layout, in_dims=(0, None))
    for by in [*values[:1] * 3, values[1], *values[-1:]]:
        right(jac(x, by), func, x, layout, by)


@pytest.mark.by_day(2)
@pytest.mark.parametrize("coordinate", range(6))
@pytest.mark.parametrize(
    "first", [torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 0, 1, 1, 2])], ids=["alone", "pairs"]
)
def test_a_diagonal_shows_samples_that_meet_at_one_coordinate(first: Tensor, coordinate: int) -> None:
    gate = torch.eye(6, dtype=torch.float64)[coordinate]

    def func(x: Tensor, ids: Tensor) -> Tensor:
        return x.cumsum(1).sin() * (1 + gate * x.new_zeros(B, 6).index_add(0, ids, x)[ids])

    jac = AutoJacobian(func, layout="diagonal", on_miss="estimate", store=":memory:")
    for number, ids in enumerate([first, first, torch.tensor([0, 1, 0, 2, 1]), torch.tensor([1, 0, 0, 0, 2])]):
        torch.manual_seed(number)
        x = torch.randn(B, 6, dtype=torch.float64)
        compare(jac(x, ids), jacobian_blocks(func, (x, ids)).diagonal(dim1=1, dim2=2))


def test_arguments_written_in_place_are_seen() -> None:
    x, ids, lag = points(), torch.arange(B), torch.tensor(0)
    jac, rolled = (AutoJacobian(f, store=":memory:", on_miss="estimate") for f in (segments, lagged))
    for _ in range(5):
        jac(x, ids), rolled(x, lag)
    ids.data.copy_(CASES["segment ids"][1][1])  # moves no version
    lag += 1
    right(jac(x, ids), segments, x, "blocks", ids)
    right(rolled(x, lag), lagged, x, "blocks", lag)


def test_large_arguments_are_read_where_their_version_or_memory_moved() -> None:
    watch, mask = TensorContents(), torch.zeros(2 * SMALL, dtype=torch.bool)
    before = watch.contents([mask])
    assert watch.contents([mask]) == watch.contents([mask.clone()]) == before
    mask[3] = True
    after = watch.contents([mask])
    assert after != before
    mask.data = torch.zeros_like(mask)
    assert watch.contents([mask]) == before


@pytest.mark.parametrize("declared", ["independent", Structure("independent", "declared")])
def test_a_declaration_is_held_against_other_arguments(declared: Any) -> None:
    x = points()
    jac = AutoJacobian(segments, store=":memory:", on_miss="estimate", coupling=declared, in_dims=(0, None))
    for by in [*CASES["segment ids"][1][:1] * 5, *CASES["segment ids"][1][1:]]:
        right(jac(x, by), segments, x, "blocks", by)


def test_a_float_that_comes_late_is_checked_where_nothing_is_proved() -> None:
    x = points()
    jac = AutoJacobian(timed, store=":memory:", on_miss="estimate")
    for step in range(40):
        right(jac(x, 0.01 * step), timed, x, "blocks", 0.01 * step)
    right(jac(x, 0.75), timed, x, "blocks", 0.75)


def test_contents_cost_a_check_once() -> None:
    ids = CASES["segment ids"][1]
    func = Counted(segments)
    x = points()
    jac = AutoJacobian(func, store=":memory:", on_miss="estimate", coupling="independent", in_dims=(0, None))
    apart = [torch.arange(B).roll(shift) for shift in range(B)]  # each sample is alone in its segment
    for by in apart * 4:  # past the checks that come early
        jac(x, by)
    before = func.calls
    for by in apart:
        jac(x, by.clone())
    assert func.calls <= before + len(apart) + 1  # one check may be due
    compare(jac(x, ids[1]), jacobian_blocks(segments, (x, ids[1])))


def test_a_proof_holds_for_all_values_of_arguments() -> None:
    func = Counted(lambda x, mask, labels: x.masked_fill(mask, 0.0) * labels[:, None])
    x = points()
    jac = AutoJacobian(func, store=":memory:", on_miss="estimate")
    generator = torch.Generator().manual_seed(0)

    def drawn() -> tuple[Tensor, Tensor]:
        return torch.rand(B, 3, generator=generator) < 0.5, torch.randint(9, (B,), generator=generator)

    for _ in range(17):  # past the checks that come early
        jac(x, *drawn())
    before = func.calls
    for _ in range(6):
        args = drawn()
        compare(jac(x, *args), jacobian_blocks(func.func, (x, *args)))
    assert func.calls == before + 6


class Masked(nn.Module):
    """A mask that a pattern is read from, or that decides which samples meet."""

    m: Tensor

    def __init__(self, across: bool, trained: bool) -> None:
        super().__init__()
        self.across = across
        self.gain = nn.Parameter(torch.tensor(2.0, dtype=torch.float64)) if trained else 2.0
        self.register_buffer("m", torch.arange(B) == B - 1 if across else torch.tensor([True, False, False]))

    def forward(self, x: Tensor) -> Tensor:
        if self.across:  # who is not masked is alone
            return Opaque.apply(x) * self.gain + self.m[:, None] * x[self.m].sum(0)  # type: ignore[no-any-return]
        return x.masked_fill(self.m, 0.0) * self.gain


CHANGES: dict[str, Callable[[Masked], Any]] = {
    "written": lambda model: model.m.logical_not_(),
    "written past its version": lambda model: model.m.data.logical_not_(),
    "replaced": lambda model: setattr(model, "m", ~model.m),
    "loaded": lambda model: model.load_state_dict({**model.state_dict(), "m": ~model.m}),
    "memory exchanged": lambda model: setattr(model.m, "data", ~model.m),
}


@pytest.mark.by_day(3)
@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning")
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_masks_that_func_holds_are_never_out_of_sight(change: str, replayed: bool, across: bool) -> None:
    x = points()
    model = Masked(across, trained=replayed)
    method = {"method": "Replay", "inner": PULL}
    jac = forced(model, (x,), method) if replayed else AutoJacobian(model, store=":memory:", on_miss="estimate")
    for _ in range(5):
        jac(x)
    # an equal mask in another object, more often than other places are looked at
    for _ in range(MOST_CHANGES + 2):
        model.m = model.m.clone()
        jac(x)
    CHANGES[change](model)
    right(jac(x), model, x, "blocks")
    # back and forth within one call
    CHANGES["written"](model)
    CHANGES["replaced"](model)
    right(jac(x), model, x, "blocks")
    for _ in range(2):
        CHANGES[change](model)
        right(jac(x), model, x, "blocks")


def test_an_equal_mask_in_another_object_needs_no_check() -> None:
    model = Masked(across=False, trained=False)
    func = Counted(model)
    x = points()
    jac = AutoJacobian(func, store=":memory:", on_miss="estimate")
    for _ in range(17):  # past the checks that come early
        jac(x)
    before = func.calls
    for _ in range(6):
        model.m = model.m.clone()
        jac(x)
    assert func.calls == before + 6


def test_nothing_is_said_of_arguments_that_couple(recwarn: pytest.WarningsRecorder) -> None:
    x, ids = points(), CASES["segment ids"][1]
    jac = AutoJacobian(segments, store=":memory:", on_miss="estimate")
    for by in (ids[0], ids[0], ids[0], ids[1]):
        jac(x, by)
    assert not [one for one in recwarn if issubclass(one.category, autojac.StructureChangedWarning)]


class Rolled(nn.Module):
    """What it rolls by, and whether samples meet, may change; near zero its derivatives are lost in rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("i", torch.tensor([0, 1, 2]))
        self.meet = False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nan_to_num(x)
        h = h.roll(int(self.i[0]), 1) + h
        return 1 + (h + h.roll(1, 0) if self.meet else h) ** 3


def roll(module: Rolled) -> None:
    module.i = module.i.roll(1)


def meet(module: Rolled) -> None:
    module.meet = True


@pytest.mark.by_day(2)
@pytest.mark.parametrize("change", [roll, meet])
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("layout", ["blocks", "full", "sparse", "diagonal"])
def test_a_check_where_derivatives_are_lost_in_rounding_confirms_no_contents(
    layout: str, replay: bool, change: Callable[[Rolled], None]
) -> None:
    module, x = Rolled(), torch.randn(5, 3)
    method: dict[str, Any] = {"method": "ColoredPull", "engine": "batched", "chunk": None}
    method = {"method": "Replay", "inner": method} if replay else method
    jac = forced(module, (x,), method, layout=layout)
    jac(x), jac(x)
    change(module)
    for scale in (1e-4, 1e-4, 1.0, 1e-4, 1.0):
        x = scale * torch.randn(5, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", autojac.StructureChangedWarning)
            J = jac(x)
        full = jacobian_full(module, (x.double(),)).float()
        if layout in ("full", "sparse"):
            compare(J.to_dense() if layout == "sparse" else J, full.reshape(J.shape), 1e-5)
            continue
        blocks = torch.stack([full[b, :, b] for b in range(5)])
        compare(J, blocks if layout == "blocks" else blocks.diagonal(dim1=1, dim2=2), 1e-5)
