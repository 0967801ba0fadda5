"""`in_dims` says where each argument carries the batch, in the words of `torch.vmap`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import autojac
from autojac import AutoJacobian
from harness import compare
from oracle import jacobian_blocks, jacobian_full


def estimated(func: Callable[..., Any], **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def moved(func: Callable[..., Any], args: Any, axes: list[int | None], argnums: tuple[int, ...], full: bool) -> Any:
    """The oracle's Jacobians, flat, on tensors with their batch on axis 0; `axes` has one entry a tensor."""
    flat, spec = pytree.tree_flatten(args)
    ends = [len(pytree.tree_leaves(args[:number])) for number in range(len(args) + 1)]
    chosen = tuple(at for number in argnums for at in range(ends[number], ends[number + 1]))

    def of_flat(*leaves: Tensor) -> Any:
        back = [x if axis is None else x.movedim(0, axis) for x, axis in zip(leaves, axes, strict=True)]
        return func(*pytree.tree_unflatten(back, spec))

    front = tuple(x if axis is None else x.movedim(axis, 0) for x, axis in zip(flat, axes, strict=True))
    if full:
        return jacobian_full(of_flat, front, chosen)
    return jacobian_blocks(of_flat, front, chosen, shared=[at for at in chosen if axes[at] is None])


@dataclass(frozen=True)
class Case:
    """A function of B = 4 samples, its `in_dims`, and the same for each tensor."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    in_dims: Any
    axes: list[int | None]
    argnums: tuple[int, ...] = (0,)


def scaled(d: dict[str, Tensor], z: Tensor) -> Tensor:
    return d["a"].T.sin() * d["b"].sum() * z


def deep(nest: list[Any], z: Tensor) -> tuple[Tensor, Tensor]:
    x, (y, inner) = nest
    return x.movedim(-1, 0).sum(1) * y * inner["k"], y @ z + inner["k"]


def of_pair(pair: list[Any], z: Tensor) -> Tensor:
    return pair[0].T * pair[1]["k"].T + z


def coupled(x: Tensor, w: Tensor) -> Tensor:
    return (x.T - x.T.mean(0)) @ w


torch.manual_seed(0)
ROWS, MORE_ROWS, COLUMNS, MORE_COLUMNS = doubles(4, 3), doubles(4, 3), doubles(3, 4), doubles(3, 4)
WEIGHT, SQUARE, OTHER_SQUARE, MIDDLE = doubles(3, 2), doubles(4, 4), doubles(4, 4), doubles(2, 4, 3)
NEST = [doubles(2, 3, 4), (ROWS, {"k": doubles(3)})]
PAIR = [COLUMNS, {"k": MORE_COLUMNS}]
SCALED = {"a": COLUMNS, "b": doubles(2)}

CASES = {
    "last axis": Case(lambda x: x.T.sin(), (COLUMNS,), 1, [1]),
    "axis in the middle": Case(lambda x: x.movedim(1, 0).sum(2).exp(), (MIDDLE,), 1, [1]),
    "negative axis": Case(lambda x: x.movedim(-2, 0).sum(2).exp(), (MIDDLE,), -2, [1]),
    "one axis for all": Case(lambda x, y: (x * y).T, (COLUMNS, MORE_COLUMNS), 1, [1, 1], (0, 1)),
    "an axis each": Case(lambda x, y: (x.T * y).cos(), (COLUMNS, ROWS), (1, 0), [1, 0], (0, 1)),
    "a list": Case(lambda x, y: (x.T * y).cos(), (COLUMNS, ROWS), [1, 0], [1, 0], (0, 1)),
    "side input on another axis": Case(lambda x, m: x * m.T, (ROWS, COLUMNS), (0, 1), [0, 1]),
    "only the side input is moved": Case(lambda m, x: x.exp() * m.T, (COLUMNS, ROWS), (-1, 0), [1, 0], (1,)),
    "shared": Case(lambda x, w: x.tanh() @ w, (ROWS, WEIGHT), (0, None), [0, None], (0, 1)),
    "shared alone": Case(lambda x, w: x.tanh() @ w, (ROWS, WEIGHT), (0, None), [0, None], (1,)),
    "shared scalar": Case(lambda x, s: x.T**2 * s, (COLUMNS, ROWS[0, 0]), (1, None), [1, None], (0, 1)),
    "shared, of the batch's length": Case(lambda x, w: x.T @ w, (SQUARE, OTHER_SQUARE), (1, None), [1, None], (0, 1)),
    "coupled": Case(coupled, (COLUMNS, WEIGHT), (1, None), [1, None], (0, 1)),
    "nest of axes": Case(scaled, (SCALED, ROWS), ({"a": 1, "b": None}, 0), [1, None, 0]),
    "nests of axes for both": Case(scaled, (SCALED, ROWS), ({"a": -1, "b": None}, 0), [1, None, 0], (0, 1)),
    "deep nest": Case(deep, (NEST, SQUARE[:3, :3]), ([2, (0, {"k": None})], None), [2, 0, None, None], (0, 1)),
    "upper levels of a nest": Case(of_pair, (PAIR, ROWS[0]), ([1, 1], None), [1, 1, None]),
    "one axis for a nest": Case(of_pair, (PAIR, ROWS[0]), (1, None), [1, 1, None], (0, 1)),
    # what these say of the batch is not what func does: J is what the definition says all the same
    "square, on the axis of the features": Case(lambda x: x**2 * x[0], (SQUARE,), 1, [1]),
    "declared shared, carries the batch": Case(torch.mul, (ROWS, MORE_ROWS), (0, None), [0, None], (0, 1)),
    "declared to carry the batch, shared": Case(torch.matmul, (SQUARE, OTHER_SQUARE), (0, 0), [0, 0], (0, 1)),
    "side input declared to carry the batch": Case(torch.matmul, (SQUARE, OTHER_SQUARE), (0, 1), [0, 1]),
    "constant of a literal size": Case(lambda x: (torch.ones(4, 2), x.T.sin()), (COLUMNS,), 1, [1]),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.mark.by_day(2)
@cases
@pytest.mark.parametrize("layout", ["blocks", "full"])
def test_against_the_oracle_on_moved_inputs(case: Case, layout: str) -> None:
    jac = estimated(case.func, in_dims=case.in_dims, argnums=case.argnums, layout=layout)
    value, J = jac.value_and_jacobian(*case.args)
    compare(J, moved(case.func, case.args, case.axes, case.argnums, layout == "full"))
    compare(value, case.func(*case.args))


def test_axes_left_to_be_inferred() -> None:
    args = (doubles(3, 4), doubles(3, 2), doubles(4, 2))
    J = estimated(lambda x, w, b: x.T @ w + b, in_dims=(1, None, "auto"), argnums=(0, 1, 2))(*args)
    compare(J, moved(lambda x, w, b: x.T @ w + b, args, [1, None, 0], (0, 1, 2), False))


def test_arguments_that_are_no_tensors_need_an_entry_too() -> None:
    x = doubles(3, 4)
    for entry in (None, 0, 1):
        compare(estimated(lambda x, power: x.T**power, in_dims=(1, entry))(x, 2), torch.diag_embed(2 * x.T))


def test_the_graph_reaches_an_input_that_was_moved() -> None:
    x = doubles(3, 4).requires_grad_()
    J = estimated(lambda x: x.T**3, in_dims=1)(x)
    (gradient,) = torch.autograd.grad(J.sum(), x)
    compare(gradient, 6 * x.detach())


@pytest.mark.parametrize("batch", [2, 3, 5])
def test_auto_where_the_batch_is_as_long_as_an_event(batch: int) -> None:
    args = (doubles(batch, batch), doubles(batch, batch), doubles(batch))

    def func(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return (x.sin() @ w + b).tanh()

    J = estimated(func, argnums=(0, 1, 2))(*args)
    compare(J, jacobian_blocks(func, args, (0, 1, 2), shared=(1, 2)))


def refused(words: str, error: type[Exception], func: Callable[..., Any], *args: Any, **options: Any) -> None:
    with pytest.raises(error, match=re.escape(words)):
        estimated(func, **options)(*args)


@pytest.mark.parametrize("func", [lambda x: x.T @ x, lambda x: x.sum(0).outer(x[0])], ids=["gram", "outer"])
def test_auto_never_takes_a_square_for_a_batch(func: Callable[..., Any]) -> None:
    refused("half of the batch", autojac.OutputError, func, doubles(4, 4))


def test_auto_takes_rows_for_samples_where_no_slice_runs() -> None:
    x = doubles(4, 4)
    compare(estimated(torch.linalg.inv)(x), jacobian_blocks(torch.linalg.inv, (x,)), rtol=1e-9)


@pytest.mark.parametrize(
    ("in_dims", "words"),
    [
        (2, "in_dims is 2 for argument 0, but its shape is (4, 3)"),
        (-3, "in_dims is -3 for argument 0"),
        (0.0, "got 0.0"),
        (True, "got True"),
        ("rows", "got 'rows'"),
        ((0,), "in_dims has entries for 1 argument, but the call has 2"),
        ((0, 0, 0), "in_dims has entries for 3 arguments, but the call has 2"),
        ((0, {"z": 0}), "in_dims is {'z': 0} for argument 1, whose nest differs"),
        ((0, [0, 0]), "in_dims is [0, 0] for argument 1, whose nest differs"),
        ((0, {"k": 1}), "in_dims is 1 for argument 1, but its shape is (4,)"),
        (([0], 0), "in_dims is [0] for argument 0, whose nest differs"),
    ],
)
def test_in_dims_that_do_not_fit_the_arguments(in_dims: Any, words: str) -> None:
    args = (doubles(4, 3), {"k": doubles(4)})
    refused(words, autojac.OptionError, lambda x, d: x * d["k"][:, None], *args, in_dims=in_dims)


def test_sizes_that_disagree() -> None:
    args = (doubles(4, 3), doubles(3, 5))
    refused("[4, 5]", autojac.InputError, lambda x, y: x @ y, *args, in_dims=(0, 1), argnums=(0, 1))
    refused("[3, 4]", autojac.InputError, lambda x, y: x @ y, *args, in_dims=0)


def test_outputs_that_do_not_carry_the_declared_batch() -> None:
    refused("(3, 4)", autojac.OutputError, lambda x: x.sin(), doubles(3, 4), in_dims=1)
    refused("(2,)", autojac.OutputError, lambda x, w: (x @ w).sum(0), doubles(4, 3), doubles(3, 2), in_dims=(0, None))


@st.composite
def nests(draw: st.DrawFn) -> tuple[tuple[Any, ...], tuple[Any, ...], list[int | None]]:
    """Arguments, their `in_dims`, and the axis of each tensor; some tensor carries the batch."""
    batch = draw(st.integers(1, 4))
    axes: list[int | None] = []

    def tensor(first: bool) -> tuple[Tensor, int | None]:
        event = draw(st.lists(st.integers(1, 3), min_size=0, max_size=2))
        axis = draw(st.integers(0, len(event))) if first or draw(st.booleans()) else None
        axes.append(axis)
        shape = event if axis is None else [*event[:axis], batch, *event[axis:]]
        negative = axis is not None and draw(st.booleans())
        return doubles(*shape), axis - len(shape) if axis is not None and negative else axis

    sizes = draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))
    pairs = [[tensor(number == place == 0) for place in range(size)] for number, size in enumerate(sizes)]
    as_dict = [draw(st.booleans()) for _ in pairs]
    args, in_dims = (
        tuple(
            {f"k{place}": pair[side] for place, pair in enumerate(group)} if named else [pair[side] for pair in group]
            for group, named in zip(pairs, as_dict, strict=True)
        )
        for side in (0, 1)
    )
    return args, in_dims, axes


@given(nests())
@settings(max_examples=12)
def test_any_nest_of_axes(drawn: tuple[tuple[Any, ...], tuple[Any, ...], list[int | None]]) -> None:
    args, in_dims, axes = drawn

    def func(*nested: Any) -> tuple[Tensor, Tensor]:
        product: Any = 1.0
        total: Any = 0.0
        for x, axis in zip(pytree.tree_leaves(nested), axes, strict=True):
            part = x.cos().sum() if axis is None else x.movedim(axis, 0).flatten(1 if x.dim() > 1 else 0).exp()
            part = part.sum(1) if part.dim() > 1 else part
            product, total = product * part, total + part**2
        return product, torch.stack((total, product), 1)

    argnums = tuple(range(len(args)))
    J = estimated(func, in_dims=in_dims, argnums=argnums)(*args)
    compare(J, moved(func, args, axes, argnums, False))


def scaled(x: Tensor, s: Tensor) -> Tensor:
    return (x * s).sin()


def scaled_by_keyword(x: Tensor, s: Tensor, *, y: Tensor) -> Tensor:
    return (x * s).sin() * y


@pytest.mark.by_day(3)
@pytest.mark.parametrize("options", [{}, {"coupling": "dense"}, {"coupling": "independent"}], ids=str)
@pytest.mark.parametrize("effort", ["estimate", "quick"])
def test_a_shared_tensor_as_long_as_the_batch_is_not_taken_for_batched(options: dict[str, Any], effort: str) -> None:
    for batch in (4, 5):
        x, s, y = doubles(batch, 4), doubles(4), doubles(batch, 4)
        jac = AutoJacobian(
            scaled_by_keyword, argnums=1, on_miss="tune", effort=effort, budget_s=0.3, store=":memory:", **options
        )
        compare(jac(x, s, y=y), ((x * s).cos() * x * y).diag_embed())
        plain = AutoJacobian(
            lambda x, s: (x * s).sin(),
            argnums=1,
            on_miss="tune",
            effort=effort,
            budget_s=0.3,
            store=":memory:",
            **options,
        )
        compare(plain(x, s), ((x * s).cos() * x).diag_embed())


def test_roles_that_slices_can_not_show_are_those_of_earlier_calls_or_refused() -> None:
    rows = {4: doubles(4, 4), 5: doubles(5, 4)}

    def func(x: Tensor, s: Tensor) -> Tensor:
        return (x * s).sin() * rows[len(x)]

    def expected(x: Tensor, s: Tensor) -> Tensor:
        return ((x * s).cos() * x * rows[len(x)]).diag_embed()

    s, few, more = doubles(4), doubles(4, 4), doubles(5, 4)
    options = {"argnums": 1, "on_miss": "estimate", "store": ":memory:"}
    jac = AutoJacobian(func, **options)
    for coupling in ("auto", "dense"):
        with pytest.raises(autojac.InputError, match=r"argument 1 has shape \(4,\) .* in_dims=\(0, None\)"):
            AutoJacobian(func, coupling=coupling, **options)(few, s)
        compare(AutoJacobian(func, in_dims=(0, None), coupling=coupling, **options)(few, s), expected(few, s))
    compare(jac(more, s), expected(more, s))
    compare(jac(few, s), expected(few, s))
    # what moves its own row of the outputs alone carries the batch
    compare(
        AutoJacobian(func, on_miss="estimate", store=":memory:")(few, s), ((few * s).cos() * s * rows[4]).diag_embed()
    )
