"""Dataclasses that nobody has registered with torch, as arguments and as outputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree_of_torch

from autojac import AutoHessian, AutoJacobian, InputError, OutputError, TrainingStep, jacobian_from, verify
from harness import compare
from oracle import jacobian_blocks, jacobian_full


def estimated(func: Any, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


@dataclasses.dataclass
class Open:
    """Fields as a library has them: tensors, ids, names, None."""

    x: Any
    ids: Any = None
    name: Any = "atoms"
    more: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The same, closed; a value of it is checked when it is made."""

    x: Any
    ids: Any = None
    name: Any = "atoms"
    more: Any = None

    def __post_init__(self) -> None:
        if self.x.dim() != 2:
            raise ValueError("positions are (B, 3)")

    @functools.cached_property
    def squares(self) -> Tensor:
        return self.x.square()  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Any
    ids: Any = None
    name: Any = "atoms"
    more: Any = None


@dataclasses.dataclass(init=False)
class OwnInit:
    """A class whose __init__ takes something else and computes with it."""

    x: Any
    ids: Any
    name: Any
    more: Any

    def __init__(self, x: Tensor, ids: Any = None, name: Any = "atoms", more: Any = None) -> None:
        self.x, self.ids, self.name, self.more = x, ids, name, more


KINDS = [Open, Frozen, Slotted, OwnInit]
X, IDS = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def moved(atoms: Any) -> Any:
    assert type(atoms) in KINDS and atoms.name == "water"
    return type(atoms)(atoms.x.sin() * (1 + atoms.ids[:, None]), atoms.ids, "moved")


RIGHT = jacobian_blocks(lambda x: x.sin() * (1 + IDS[:, None]), (X,))


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_jacobian_come_back_as_their_own_types(kind: Any) -> None:
    jac, atoms = estimated(moved), kind(X, IDS, "water")
    for _ in range(3):
        y, J = jac.value_and_jacobian(atoms)
        assert (type(y), type(J), type(J.x)) == (kind, kind, kind)
        assert (y.name, J.name, J.ids, J.x.ids, J.x.name) == ("moved", None, None, None, None)
        assert torch.equal(y.ids, IDS)
        compare([y.x, J.x.x], [X.sin() * (1 + IDS[:, None]), RIGHT])
    other = kind(X, IDS.flip(0), "water")
    compare(jac(other).x.x, jacobian_blocks(lambda x: x.sin() * (1 + IDS.flip(0)[:, None]), (X,)))
    verify(J, moved, atoms)
    assert kind not in pytree_of_torch.SUPPORTED_NODES


@pytest.mark.parametrize("layout", ["full", "sparse", "diagonal"])
def test_every_layout_and_several_batch_axes(layout: Any) -> None:
    J = estimated(moved, layout=layout)(Open(X, IDS, "water")).x.x
    full = jacobian_full(lambda x: x.sin() * (1 + IDS[:, None]), (X,))
    wanted = {"full": full, "sparse": full.reshape(12, 12), "diagonal": RIGHT.diagonal(dim1=1, dim2=2)}[layout]
    compare(J.to_dense() if layout == "sparse" else J, wanted)
    x = X.reshape(2, 2, 3)
    J = estimated(lambda atoms: Open(atoms.x.cos()), batch_dims=2)(Open(x)).x.x
    compare(J, torch.diag_embed(-x.sin()))


def test_products_take_and_return_them() -> None:
    jac, atoms = estimated(moved), Slotted(X, IDS, "water")
    v = torch.ones_like(X)
    compare(jac.jvp(atoms, Slotted(v)).x, torch.einsum("bmn,bn->bm", RIGHT, v))
    compare(jac.vjp(atoms, Slotted(v)).x, torch.einsum("bmn,bm->bn", RIGHT, v))
    compare(jac.gram(atoms), RIGHT.mT @ RIGHT)
    compare(jac.solve(atoms, Slotted(v), damping=1.0).x, -torch.linalg.solve(
        RIGHT.mT @ RIGHT + torch.eye(3), (RIGHT.mT @ v[..., None]))[..., 0])  # fmt: skip
    compare(jac.linear_operator(atoms) @ v, torch.einsum("bmn,bn->bm", RIGHT, v))
    compare(torch.cat([part.x.x for _, part in jac.chunks(atoms, bytes=100)]), RIGHT)
    with pytest.raises(InputError, match="v was expected in the nest"):
        jac.jvp(atoms, Open(v))


def test_what_is_cached_or_checked_by_the_class_changes_nothing() -> None:
    atoms = Frozen(X)
    assert atoms.squares is atoms.squares  # computed from this x, and not from the one that is differentiated
    compare(estimated(lambda atoms: atoms.squares)(atoms).x, torch.diag_embed(2 * X))


def test_arguments_besides_keywords_and_aux_stay_what_they_are() -> None:
    seen: list[Any] = []

    def func(x: Tensor, beside: Any, *, key: Any) -> tuple[Tensor, Any]:
        return x * beside.x * key.x, key

    loose = Open(X)
    loose.note = "an attribute that is no field"  # type: ignore[attr-defined]
    for beside in (Open(X), loose, Open(2.0)):
        J, aux = estimated(func, has_aux=True)(X, beside, key=loose)
        seen.append(J)
        assert aux is loose
    compare(seen, [torch.diag_embed(X * X), torch.diag_embed(X * X), torch.diag_embed(2 * X)])


def test_replays_take_the_tensors_of_the_call() -> None:
    jac = estimated(lambda x, beside: x.sin() * beside.x)
    jac.tune(X, Open(X), effort="quick", budget_s=0.2)
    for factor in (1.0, 2.0, 3.0):
        compare(jac(X, Open(factor * X)), torch.diag_embed(X.cos() * factor * X))


def test_in_dims_hessians_parameters_training_and_unbatched_functions() -> None:
    weight = torch.randn(3, dtype=torch.float64)
    for in_dims in ("auto", (Open(0, None, None, None),)):
        J = estimated(lambda atoms: atoms.x * atoms.ids, in_dims=in_dims)(Open(X, weight))
        compare([J.x, J.ids], [torch.diag_embed(weight.expand(4, 3)), torch.diag_embed(X)])
    compare(estimated(lambda atoms: Open(atoms.x.sum(0)), in_dims=None)(Open(X)).x.x[0, :, 0], torch.ones(4).double())
    hessian = AutoHessian(lambda atoms: atoms.x.pow(3).sum(1), store=":memory:", on_miss="estimate")(Open(X))
    compare(hessian.x.x, torch.diag_embed(6 * X))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2).double()

        def forward(self, atoms: Open) -> Open:
            return Open(self.linear(atoms.x), atoms.ids)

    net = Net()
    J = AutoJacobian.of_parameters(net, store=":memory:", on_miss="estimate")(Open(X, IDS))
    compare(J.x["linear.bias"].detach(), torch.eye(2).double().expand(4, 2, 2))
    y, _, output = estimated(net, select="x").value_and_jacobian(Open(X))
    assert output.name == "atoms"
    compare(y, output.x)
    step = TrainingStep(net, lambda y, J: y.x.square().mean() + J.x.x.square().mean(), store=":memory:")
    assert step(Open(X)).dim() == 0
    assert net.linear.weight.grad is not None
    x = X.clone().requires_grad_()
    compare(jacobian_from(x.sin(), Slotted2(x)).x, torch.diag_embed(X.cos()))


@dataclasses.dataclass
class Slotted2:
    """One field alone."""

    x: Any


@settings(max_examples=15)
@given(
    nest=st.recursive(
        st.sampled_from(["tensor", "ids", "name", None, 3]),
        lambda inner: st.one_of(
            st.builds(Open, inner, inner), st.builds(Slotted, inner, inner), st.lists(inner, max_size=2),
            st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
        ),
        max_leaves=6,
    )
)  # fmt: skip
def test_any_nest_comes_back_with_each_derivative_in_its_place(nest: Any) -> None:
    count = 0

    def filled(part: Any) -> Any:
        nonlocal count
        if isinstance(part, str) and part == "tensor":
            count += 1
            return count * X
        if isinstance(part, (Open, Slotted)):
            return type(part)(filled(part.x), filled(part.ids))
        if isinstance(part, list):
            return [filled(one) for one in part]
        if isinstance(part, dict):
            return {name: filled(one) for name, one in part.items()}
        return IDS if part == "ids" else part

    def total(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.square() if part.is_floating_point() else 0.0
        held = [part.x, part.ids] if isinstance(part, (Open, Slotted)) else part
        inner = held.values() if isinstance(held, dict) else held if isinstance(held, list) else ()
        return sum(map(total, inner))

    def check(J: Any, part: Any) -> None:
        if isinstance(part, Tensor) and part.is_floating_point():
            compare(J, torch.diag_embed(2 * part))
        elif isinstance(part, (Open, Slotted)) and J is not None:
            assert type(J) is type(part)
            check([J.x, J.ids], [part.x, part.ids])
        elif isinstance(part, (list, dict)):
            assert type(J) is type(part) and len(J) == len(part)
            for key in part if isinstance(part, dict) else range(len(part)):
                check(J[key], part[key])
        else:
            assert J is None

    args = [X, filled(nest)]
    check(estimated(total)(args), args)


@dataclasses.dataclass
class Computing:
    x: Tensor
    norm: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.norm = self.x.norm(dim=1)


@dataclasses.dataclass
class Mapping(dict):  # type: ignore[type-arg]
    x: Any


def changed(**attributes: Any) -> Open:
    atoms = Open(X)
    for name, value in attributes.items():
        setattr(atoms, name, value)
    return atoms


def looped() -> Open:
    atoms = Open(X)
    atoms.more = [atoms]
    return atoms


BAD: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "a field that the class computes": (
        InputError, r"computes the field Computing.norm \(init=False\) itself.*Compute it inside func",
        lambda: estimated(lambda atoms: atoms.x * atoms.norm[:, None])(Computing(X)),
    ),
    "an attribute that is no field": (
        InputError, "Open holds 'note' besides its fields", lambda: estimated(lambda a: a.x)(changed(note=1)),
    ),
    "one that holds itself": (InputError, "Open holds itself", lambda: estimated(lambda a: a.x)(looped())),
    "one that is a dict too": (
        InputError, "Mapping is derived from dict", lambda: estimated(lambda a: a.x)(Mapping(X)),
    ),
    "one without tensors": (InputError, "but holds an Open", lambda: estimated(lambda a: X)(Open(1.0))),
    "an output with more": (OutputError, "output 0 of func is an Open", lambda: estimated(lambda x: changed(n=1))(X)),
    "a number in an output": (OutputError, "is a float", lambda: estimated(lambda x: Open(x, 0.5))(X)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_rebuilt_is_told(name: str) -> None:
    kind, text, provoke = BAD[name]
    with pytest.raises(kind, match=text):
        provoke()
    compare(estimated(lambda atoms: atoms.x * 2)(Computing2(X)).x, torch.diag_embed(2 * torch.ones_like(X)))


@dataclasses.dataclass
class Computing2:
    """A class that computes what has no derivative."""

    x: Tensor
    count: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.count = len(self.x)
