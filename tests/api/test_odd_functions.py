"""What users write: functions that return odd things, inputs of odd kinds, and results that are written into."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import autojac
from autojac import AutoJacobian
from autojac.planning.search.space import candidates
from harness import compare, planned
from oracle import jacobian_blocks


def estimated(func: Callable[..., Any], **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def mutable_default(x: Tensor, calls: list[int] = []) -> Tensor:  # noqa: B006
    calls.append(len(calls))
    return x**2


def writes_rows(x: Tensor) -> Tensor:
    y = torch.zeros(len(x), 2, dtype=x.dtype)
    y[:, 0] = x[:, 0] ** 2
    y[:, 1] = x[:, 1] * x[:, 2]
    return y


def forces(x: Tensor) -> Tensor:
    """A function that differentiates itself, as force fields and PDE residuals do."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.requires_grad_()
        (force,) = torch.autograd.grad((x**3).sum() + x.prod(1).sum(), x, create_graph=True)
    return force


def norm_held_fixed(x: Tensor) -> Tensor:
    with torch.no_grad():
        norm = x.norm(dim=1, keepdim=True)
    return x / norm


class Two(nn.Module):
    """Two outputs in a dict, and an option."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).double().requires_grad_(False)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        return {"linear": self.linear(x) * scale, "relu": x.relu()}


class Callable2:
    """An object that is called."""

    def __call__(self, x: Tensor) -> Tensor:
        return x**2


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "the input itself": lambda x: x,
    "the input twice": lambda x: (x, x),
    "one result twice": lambda x: [y := x.sin(), y],
    "views of the input": lambda x: (x[:, :2], x.view(4, 3, 1), x.unfold(1, 2, 1)),
    "views of a result": lambda x: (lambda y: (y[:, 0], y.T.T, y.unsqueeze(1)))(x.exp()),  # noqa: PLC3002
    "zeros": torch.zeros_like,
    "a constant beside": lambda x: (torch.ones(len(x), 2, dtype=x.dtype), x.sin()),
    "detached beside": lambda x: (x.detach() * 2, x.sin()),
    "dict in its own order": lambda x: {"z": x.sin(), "a": x.sum(1)},
    "list in a list": lambda x: [x.sin(), [x.sum(1)]],
    "empty nests beside": lambda x: {"x": x.sin(), "nothing": (), "none": {}},
    "an output without elements": lambda x: (x[:, :0], x.sin(), x[:, None, 3:]),
    "mutable default": mutable_default,
    "writes into zeros": writes_rows,
    "differentiates itself": forces,
    "partial": functools.partial(torch.mul, torch.arange(3.0, dtype=torch.float64)),
    "method": Two().forward,
    "module": Two(),
    "object": Callable2(),
    "sort": lambda x: x.sort(1).values,
    "complex inside": lambda x: torch.fft.rfft(x).abs(),
    "another precision inside": lambda x: x.float().sin().double() * x,
}


@pytest.mark.by_day(3)
@pytest.mark.filterwarnings("ignore:.*output 0 of func moves with the inputs:autojac.NoGraphWarning")
@pytest.mark.parametrize("layout", ["blocks", "full"])
@pytest.mark.parametrize("func", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions(func: Callable[[Tensor], Any], layout: str) -> None:
    x = doubles(4, 3)
    rtol = 1e-6 if func is FUNCTIONS["another precision inside"] else 1e-10
    jac = estimated(func, layout=layout)
    value, J = jac.value_and_jacobian(x)
    expected = jacobian_blocks(func, (x,))
    if layout == "full":
        assert all(j.shape[-2:] == (4, 3) for j in pytree.tree_leaves(J))
        J = pytree.tree_map(lambda j: torch.stack([j[b].select(-2, b) for b in range(4)]), J)
    assert pytree.tree_structure(J) == pytree.tree_structure(expected)
    compare(J, expected, rtol)
    compare(value, func(x))


@pytest.mark.parametrize("func", [norm_held_fixed], ids=["inside"])
def test_functions_without_grad_are_told_of(func: Callable[[Tensor], Tensor]) -> None:
    x = doubles(4, 3)
    with pytest.warns(autojac.ModesDisagreeWarning, match="no_grad"):
        J = estimated(func)(x)
    compare(J, jacobian_blocks(func, (x,)))


class Record:
    """A class that is no nest of tensors, as a dataclass would be."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "nothing but detached": (lambda x: x.detach() * 2, "none has a graph"),
    "no_grad around": (torch.no_grad()(lambda x: x * 2), "none has a graph"),
    "nothing": (lambda x: None, "output 0 of func is None; a tensor (B, ...) was expected"),
    "an empty nest": (lambda x: (), "func returned no tensor"),
    "a number": (lambda x: (x, 1.5), "output 1 of func is a float"),
    "text": (lambda x: "x", "output 0 of func is a str"),
    "an array": (lambda x: x.detach().numpy(), "output 0 of func is an ndarray"),
    "a generator": (lambda x: (y for y in (x, x)), "output 0 of func is a generator"),
    "a record": (Record, "output 0 of func is a Record"),
}


@pytest.mark.parametrize("in_dims", ["auto", None])
@pytest.mark.parametrize("name", REFUSED)
def test_outputs_that_are_refused(name: str, in_dims: Any) -> None:
    func, words = REFUSED[name]
    with pytest.raises(autojac.OutputError, match=re.escape(words)):
        estimated(func, in_dims=in_dims)(doubles(4, 3))


BESIDE: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "nothing in a nest": (lambda x: {"x": x.sin(), "none": None}, 0),
    "indices beside": (lambda x: (x.sin(), x.argmax(1)), 0),
    "a mask beside": (lambda x: (x > 0, x.sin()), 1),
}


@pytest.mark.parametrize("in_dims", ["auto", None])
@pytest.mark.parametrize("name", BESIDE)
def test_outputs_that_have_no_derivative_pass_beside_those_that_have_one(name: str, in_dims: Any) -> None:
    func, place = BESIDE[name]
    x = doubles(4, 3)
    value, J = estimated(func, in_dims=in_dims).value_and_jacobian(x)
    assert pytree.tree_structure(value) == pytree.tree_structure(func(x))
    blocks = list(J.values()) if isinstance(J, dict) else list(J)
    assert blocks[1 - place] is None
    expected = torch.diag_embed(x.cos())
    compare(blocks[place], expected if in_dims == "auto" else torch.func.jacrev(torch.sin)(x))


def test_a_loss_beside_the_outputs_is_refused_in_a_batch() -> None:
    def func(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), x.sum()

    with pytest.raises(autojac.OutputError, match="output 1 of func is a scalar"):
        estimated(func)(doubles(4, 3))
    assert estimated(func, in_dims=None)(doubles(4, 3))[1].shape == (4, 3)


def test_what_is_no_output_comes_back_as_aux() -> None:
    x = doubles(4, 3)
    J, aux = estimated(lambda x: (x.sin(), {"at": x.argmax(1), "k": None, "n": 3}), has_aux=True)(x)
    compare(J, torch.diag_embed(x.cos()))
    assert aux["n"] == 3
    assert aux["k"] is None
    assert torch.equal(aux["at"], x.argmax(1))


INPUTS: dict[str, Callable[[], Tensor]] = {
    "parameter": lambda: nn.Parameter(doubles(4, 3)),
    "no leaf": lambda: doubles(4, 3).requires_grad_() * 2,
    "expanded over samples": lambda: doubles(1, 3).expand(4, 3),
    "expanded over all": lambda: doubles(1, 1).expand(4, 3),
    "overlapping windows": lambda: doubles(6).unfold(0, 3, 1),
    "strided": lambda: doubles(8, 6)[::2, 1::2],
    "half": lambda: torch.randn(4, 3).half(),
    "brain float": lambda: torch.randn(4, 3).bfloat16(),
    "zeros": lambda: torch.zeros(4, 3, dtype=torch.float64),
    "not a number in one sample": lambda: doubles(4, 3).index_fill_(0, torch.tensor([1]), float("nan")),
    "infinite in one sample": lambda: doubles(4, 3).index_fill_(0, torch.tensor([2]), float("inf")),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name: str) -> None:
    def func(x: Tensor) -> Tensor:
        return torch.relu(x) + x.tanh() * x[:, :1]

    x = INPUTS[name]()
    before = x.detach().clone()
    J = estimated(func)(x)
    compare(J.detach(), jacobian_blocks(func, (x,)), rtol=1e-10 if x.dtype == torch.float64 else 3e-2)
    assert J.requires_grad == x.requires_grad
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: doubles(4, 3).to_sparse(), "stored as torch.sparse_coo"),
        (lambda: torch.empty(4, 3, device="meta"), "on the meta device"),
    ],
)
def test_inputs_without_dense_values(make: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(autojac.InputError, match=words):
        estimated(torch.sin)(make())


def test_inputs_that_overlap_in_memory_are_two_inputs() -> None:
    base = doubles(5, 3)
    args = (base[:4], base[1:])
    compare(
        estimated(lambda a, b: a * b**2, argnums=(0, 1))(*args),
        jacobian_blocks(lambda a, b: a * b**2, args, (0, 1)),
    )


def test_an_input_that_is_only_a_keyword() -> None:
    with pytest.raises(autojac.OptionError, match="pass by position"):
        estimated(lambda *, x: x.sin())(x=doubles(4, 3))


def test_a_counter_in_a_default_is_noticed() -> None:
    def counting(x: Tensor, state: dict[str, int] = {"n": 0}) -> Tensor:  # noqa: B006
        state["n"] += 1
        return x * state["n"]

    with pytest.raises(autojac.RandomnessError, match="counter"):
        estimated(counting)(doubles(4, 3))


MOVERS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "flip": lambda x: x.flip(1),
    "view": lambda x: x.unsqueeze(1),
    "sum": lambda x: x.sum(1),
    "part": lambda x: x[:, 1:],
    "sin": torch.sin,
}
LAID_OUT = [(name, layout) for name in MOVERS for layout in ("blocks", "full", "diagonal")]
NO_DIAGONAL = [("sum", "diagonal"), ("part", "diagonal")]


@pytest.mark.by_day(4)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("name", "layout"), [pair for pair in LAID_OUT if pair not in NO_DIAGONAL])
def test_writing_into_a_jacobian_changes_no_other(name: str, layout: str, batch: int) -> None:
    func, x = MOVERS[name], doubles(batch, 3)
    _, _, problem = planned(func, (x,), layout=layout)
    for method in candidates(problem, depth=0):
        if method.unsupported(problem) is None:
            compute = method.prepare(problem)
            first, second = (compute((x,), {}).jacobians[0][0] for _ in range(2))
            right = second.clone()
            # an expanded result refuses to be written into as a whole, and not where it is cut
            first[(0,) * first.dim()] = 7
            third = compute((x,), {}).jacobians[0][0]
            compare((second, third), (right, right), rtol=0)
