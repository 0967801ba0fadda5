"""`AutoJacobian(func, in_dims=None)` is a drop-in for `torch.func.jacrev`: same numbers, same shapes, same nest."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev
from torch.utils import _pytree as pytree

from autojac import AutoJacobian
from harness import compare
from oracle import jacobian_full

Pair = namedtuple("Pair", "left right")


@dataclass(frozen=True)
class Case:
    """A function without a batch, the shapes of its arguments in their nest, and what to differentiate."""

    func: Callable[..., Any]
    shapes: tuple[Any, ...]
    argnums: int | tuple[int, ...] = 0

    def args(self, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        def is_shape(node: Any) -> bool:
            return isinstance(node, tuple) and all(isinstance(size, int) for size in node)

        return pytree.tree_map(lambda shape: torch.randn(shape, dtype=dtype), self.shapes, is_leaf=is_shape)


def scalars(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return y.sum(), x * y


def linear(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x + 3 * y, 4 * x * y.sum()


def nested(a: dict[str, Any], b: Tensor) -> dict[str, Any]:
    return {"sum": a["x"].sum() * b, "inner": [a["pair"][0].sin(), (b.cos() @ a["pair"][1],)]}


def products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (x * x) @ y, x @ (x.sum(1) * y), y.sum()


CASES = {
    "sin": Case(torch.sin, ((3,),)),
    "matrix": Case(torch.sin, ((2, 3),)),
    "other number of elements": Case(lambda x: x[0, 1:].unsqueeze(-1) ** 2, ((2, 4),)),
    "tensor of three axes": Case(lambda x: 3 * x**2, ((2, 3, 2),)),
    "scalar output": Case(lambda x: x.prod(), ((3,),)),
    "scalar input": Case(lambda x: torch.stack([x, x**2, x.exp()]), ((),)),
    "scalar to scalar": Case(torch.sin, ((),)),
    "one element": Case(torch.sin, ((1,),)),
    "scalars beside vectors": Case(scalars, ((), (1,)), (0, 1)),
    "scalars among outputs": Case(lambda x, y: (x.sum(), y.sum(), x * y), ((3,), (3,)), (0, 1)),
    "second argument": Case(torch.mul, ((3,), (3,)), 1),
    "last argument": Case(torch.mul, ((3,), (3,)), -1),
    "tuple of one": Case(torch.mul, ((3,), (3,)), (0,)),
    "tuple of a negative one": Case(torch.mul, ((3,), (3,)), (-1,)),
    "both arguments": Case(torch.mul, ((3,), (3,)), (0, 1)),
    "arguments in reverse": Case(torch.sub, ((3,), (3,)), (1, 0)),
    "arguments from the end": Case(torch.sub, ((3,), (3,)), (-1, -2)),
    "first and last of three": Case(lambda x, y, z: x * y.sum() + z, ((3,), (2,), (3,)), (0, 2)),
    "outputs": Case(linear, ((3,), (3,))),
    "outputs and a tuple of one": Case(linear, ((3,), (3,)), (0,)),
    "outputs and arguments": Case(linear, ((3,), (3,)), (0, 1)),
    "matrix products": Case(products, ((5, 3), (3, 5)), (0, 1)),
    "nested arguments": Case(lambda a, b: a[0] + a[1]["k"] * 2 + b * 3, (((), {"k": ()}), ()), (0, 1)),
    "nest of an argument": Case(lambda a, b: a[0] + a[1] * b, ([(3,), (3,)], (3,))),
    "nests everywhere": Case(nested, ({"x": (2,), "pair": ((3,), (4,))}, (3, 4)), (1, 0)),
    "list": Case(lambda x: [x.sin(), x.sum()], ((3,),)),
    "tuple of one output": Case(lambda x: (x.sin(),), ((3,),)),
    "dict in its own order": Case(lambda x: {"z": x.sin(), "a": x.sum()}, ((3,),)),
    "ordered dict": Case(lambda x: OrderedDict(z=x.sin(), a=x.sum()), ((3,),)),
    "list of a tuple of a dict": Case(lambda x: [(x.sum(), {"a": x, "out": [x, x.prod()]})], ((3,),)),
    "unrelated input": Case(lambda x, y: x.sin(), ((2, 3), (4,)), (0, 1)),
    "unrelated input alone": Case(lambda x, y: x.sin(), ((2, 3), (4,)), 1),
    "unrelated output": Case(lambda x: torch.ones(2, dtype=x.dtype), ((3,),)),
    "unrelated scalar output": Case(lambda x: (x.new_ones(()), x.sin()), ((3,),)),
    "outputs of either argument": Case(lambda x, y: (x, y, x.sin(), y**2), ((2,), (3,)), (0, 1)),
    "detached output": Case(lambda x: (x.detach() * 2, x.sin()), ((3,),)),
    "the input itself": Case(lambda x: x, ((3,),)),
    "the same output twice": Case(lambda x: (y := x.sin(), y), ((3,),)),
    "views of the input": Case(lambda x: (x[:2], x.view(1, 3), x.expand(2, 3)), ((3,),)),
    "write into a copy": Case(lambda x: x.clone().mul_(x), ((3,),)),
    "write into zeros": Case(lambda x: torch.zeros_like(x).copy_(x.sin()), ((3,),)),
    "default argument": Case(lambda x, y=3.0: x * y, ((3,),)),
    "any number of arguments": Case(lambda *xs: xs[0] * xs[1] + xs[2], ((3,), (3,), (3,)), (0, 2)),
    "no elements in": Case(lambda x: x * 2, ((0,),)),
    "no elements in, a scalar out": Case(lambda x: x.sum(), ((0, 3),)),
    "no elements out": Case(lambda x: x[:0], ((3,),)),
    "an axis of length zero": Case(lambda x: x.sin(), ((3, 0, 2),)),
    "one output without elements": Case(lambda x: (x[:0], x.sin(), x[1:, None][:, 1:]), ((3,),)),
    "one input without elements": Case(lambda x, y: x.cos().sum() * y + y**2, ((0,), (3,)), (0, 1)),
    "some of both without elements": Case(
        lambda x, y, z: {"a": y.sin(), "b": x, "c": y * z}, ((2, 0), (3,), (3,)), (0, 2, 1)
    ),
}  # fmt: skip
TOLD = pytest.mark.filterwarnings("ignore:.*output 0 of func moves with the inputs:autojac.NoGraphWarning")
cases = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=[TOLD] if name == "detached output" else []) for name, case in CASES.items()],
)


def unbatched(func: Callable[..., Any], **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"in_dims": None, "on_miss": "estimate", "store": ":memory:", **options})


@pytest.mark.by_day(4)
@cases
def test_same_as_jacrev(case: Case) -> None:
    args = case.args()
    J = unbatched(case.func, argnums=case.argnums)(*args)
    theirs = jacrev(case.func, case.argnums)(*args)
    assert pytree.tree_structure(J) == pytree.tree_structure(theirs)
    compare(J, theirs)
    compare(J, jacobian_full(case.func, args, case.argnums))


@pytest.mark.by_day(3)
@cases
def test_value_beside_the_jacobian(case: Case) -> None:
    args = case.args()
    jac = unbatched(case.func, argnums=case.argnums)
    value, J = jac.value_and_jacobian(*args)
    expected = case.func(*args)
    assert pytree.tree_structure(value) == pytree.tree_structure(expected)
    compare(value, expected)
    compare(J, jac(*args), rtol=0)


@pytest.mark.parametrize("name", ["outputs and arguments", "nests everywhere", "scalars beside vectors"])
def test_layout_changes_nothing_without_a_batch(name: str) -> None:
    case = CASES[name]
    args = case.args()
    compare(unbatched(case.func, argnums=case.argnums, layout="full")(*args), jacrev(case.func, case.argnums)(*args))


@pytest.mark.by_day(3)
@pytest.mark.parametrize("name", ["sin", "nests everywhere", "matrix products", "scalars beside vectors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    args = case.args(dtype)
    rtol = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    compare(unbatched(case.func, argnums=case.argnums)(*args), jacrev(case.func, case.argnums)(*args), rtol)


@pytest.mark.parametrize("in_dims", [None, 0])
def test_dtype_of_each_block_is_the_inputs(in_dims: int | None) -> None:
    def func(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x * y).sin(), x.float() ** 2

    args = (torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3))
    J = unbatched(func, argnums=(0, 1), in_dims=in_dims, layout="full")(*args)
    compare(J, jacrev(func, (0, 1))(*args), rtol=1e-5)


def test_namedtuples() -> None:
    def func(p: Pair) -> Pair:
        return Pair(p.left * 2, p.right.sum() * p.left)

    p = Pair(torch.randn(3), torch.randn(2))
    J, theirs = unbatched(func)(p), jacrev(func)(p)
    assert type(J) is type(J.left) is Pair
    compare(J, theirs, rtol=1e-6)


def test_parameters_as_inputs() -> None:
    model = nn.Linear(3, 2).double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def func(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (x,)).tanh()

    weights = dict(model.named_parameters())
    J = unbatched(func)(weights)
    theirs = jacrev(func)(weights)
    assert list(J) == ["weight", "bias"]
    compare(J, theirs)


def test_arguments_that_are_no_tensors() -> None:
    def func(x: Tensor, power: int, how: str, shift: float) -> Tensor:
        return getattr(x**power + shift, how)()

    x = torch.rand(3, dtype=torch.float64)
    compare(unbatched(func)(x, 3, "sin", 0.5), jacrev(lambda x: func(x, 3, "sin", 0.5))(x))
