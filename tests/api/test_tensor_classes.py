"""Tensors of classes of their own, made of others, nested, sparse or conjugate: as arguments, as outputs, inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import autojac
from autojac import AutoJacobian
from harness import compare, forced

METHODS: list[dict[str, Any]] = [
    {"method": "Pull", "seeds": "shared", "engine": "loop"},
    {"method": "Replay", "inner": {"method": "Pull", "seeds": "shared", "engine": "loop"}},
    {"method": "Replay", "inner": {"method": "Push", "seeds": "shared", "engine": "loop"}},
]


class Labelled(Tensor):
    """A tensor with a label that its results inherit, as monai's MetaTensor."""

    gain: float = 1.0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(found, cls):
            found.gain = next((one.gain for one in args if isinstance(one, cls)), 1.0)
        return found


class Doubled(Tensor):
    """A tensor whose sine is twice another's."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found * 2 if func in (torch.sin, Tensor.sin) else found


class Bare(Tensor):
    """A class that changes nothing."""


class Wrapped(Tensor):
    """A tensor made of another, as DTensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad)
        assert isinstance(made, Wrapped)
        return made

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda one: one.inner, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(Tensor, cls, func(*args, **kwargs))


def points() -> Tensor:
    return torch.rand(4, 3, dtype=torch.float64)


def labelled(x: Tensor, gain: float) -> Labelled:
    made = x.as_subclass(Labelled)
    made.gain = gain
    return made


def sine(x: Tensor) -> Tensor:
    return x.sin() * getattr(x, "gain", 1.0)


ARGUMENTS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "plain": (lambda x: x, 1.0),
    "bare": (lambda x: x.as_subclass(Bare), 1.0),
    "doubled": (lambda x: x.as_subclass(Doubled), 2.0),
    "labelled": (lambda x: labelled(x, 2.0), 2.0),
    "labelled otherwise": (lambda x: labelled(x, 3.0), 3.0),
}


@pytest.mark.by_day(3)
@pytest.mark.parametrize("first", ARGUMENTS)
@pytest.mark.parametrize("method", METHODS)
def test_arguments_of_classes_in_turn(first: str, method: dict[str, Any]) -> None:
    x = points()
    jac = forced(sine, (ARGUMENTS[first][0](x),), method)
    for make, factor in (ARGUMENTS[first], *ARGUMENTS.values(), ARGUMENTS["plain"]):
        y, J = jac.value_and_jacobian(make(x))
        # the class of an argument says nothing of its derivatives
        assert (type(y), type(J)) == (Tensor, Tensor)
        compare(y, factor * x.sin())
        compare(J, factor * torch.diag_embed(x.cos()))


def test_classes_are_told_apart_in_keywords_too() -> None:
    x, w = points(), torch.rand(3, dtype=torch.float64)
    jac = AutoJacobian(lambda x, w: x * w.sin(), store=":memory:", effort="estimate")
    for _ in range(2):
        for kind, factor in ((Tensor, 1.0), (Doubled, 2.0), (torch.nn.Parameter, 1.0)):
            weight = torch.nn.Parameter(w) if kind is torch.nn.Parameter else w.as_subclass(kind)
            compare(jac(x, w=weight).detach().as_subclass(Tensor), torch.diag_embed((factor * w.sin()).expand(4, 3)))


def conjugate() -> Tensor:
    return torch.randn(3, dtype=torch.complex128).conj()


HELD: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "doubled": (lambda: torch.rand(3, dtype=torch.float64).as_subclass(Doubled), lambda x, w: x * w),
    "labelled": (lambda: labelled(torch.rand(3, dtype=torch.float64), 2.0), lambda x, w: x * w),
    "wrapped": (lambda: Wrapped(torch.rand(3, dtype=torch.float64)), lambda x, w: x * w.inner),  # type: ignore[attr-defined]
    "nested": (
        lambda: torch.nested.nested_tensor([torch.rand(2, 3), torch.rand(3, 3)], dtype=torch.float64),
        lambda x, w: x * w.to_padded_tensor(0.0).sum((0, 1)),
    ),
    "conjugate": (conjugate, lambda x, w: x * (w * w).real),
    "negative": (lambda: conjugate().imag, lambda x, w: x * w),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("effort", ["estimate", "quick"])
def test_held_tensors_of_classes(name: str, effort: Any) -> None:
    make, func = HELD[name]
    x, held = points(), make()
    jac = AutoJacobian(lambda x: func(x, held), store=":memory:", on_miss="tune", effort=effort, budget_s=0.2)
    right = torch.diag_embed(func(torch.ones_like(x), held).as_subclass(Tensor).resolve_neg())
    for _ in range(3):
        compare(jac(x), right)


def ragged(x: Tensor, layout: torch.layout = torch.jagged) -> Tensor:
    return torch.nested.as_nested_tensor([row[None] for row in x], layout=layout)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_inside() -> None:
    x = points()
    compare(AutoJacobian(lambda x: ragged(x).sin().values(), store=":memory:")(x), torch.diag_embed(x.cos()))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_arguments_and_outputs_are_refused_by_name(layout: torch.layout) -> None:
    x = points()
    for args in ((ragged(x, layout),), (x, ragged(x, layout))):
        with pytest.raises(autojac.InputError, match=r"nested.*to_padded_tensor"):
            AutoJacobian(lambda x, *more: x.sin(), store=":memory:")(*args)
    with pytest.raises(autojac.InputError, match=r"nested.*to_padded_tensor"):
        AutoJacobian(lambda x, more: x.sin(), store=":memory:")(x, more=ragged(x, layout))
    with pytest.raises(autojac.OutputError, match=r"output 0 of func is nested.*to_padded_tensor"):
        AutoJacobian(lambda x: ragged(x, layout).sin(), store=":memory:")(x)


def test_wrappers_and_sparse_tensors_are_refused_by_name() -> None:
    x = points()
    with pytest.raises(autojac.InputError, match=r"is a Wrapped, which is made of other tensors"):
        AutoJacobian(lambda x: x.sin(), store=":memory:")(Wrapped(x))
    with pytest.raises(autojac.OutputError, match=r"output 0 of func is a Wrapped, .*Return the tensor inside"):
        AutoJacobian(lambda x: Wrapped(x.sin()), store=":memory:")(x)
    with pytest.raises(autojac.OutputError, match=r"stored as torch.sparse_coo.*to_dense"):
        AutoJacobian(lambda x: x.sin().to_sparse(), store=":memory:")(x)
