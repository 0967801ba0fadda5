"""A batch that runs over several axes: as right as the flattened one, whatever couples along either axis."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import autojac
from autojac import AutoHessian, AutoJacobian, Derivatives, InputError, OptionError, OutputError, TrainingStep
from harness import Counted, compare
from oracle import jacobian_blocks, jacobian_full


def over(func: Callable[..., Any], batch_dims: int = 2, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, batch_dims=batch_dims, **{"on_miss": "estimate", "store": ":memory:", **options})


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def flat(func: Callable[..., Any], lead: tuple[int, ...], carries: list[bool]) -> Callable[..., Any]:
    """The same function of a flattened batch, made by hand."""

    def of_flat(*args: Tensor) -> Any:
        own = [x.reshape(*lead, *x.shape[1:]) if has else x for x, has in zip(args, carries, strict=True)]
        return pytree.tree_map_only(Tensor, lambda y: y.reshape(prod(lead), *y.shape[len(lead) :]), func(*own))

    return of_flat


def blocks(func: Callable[..., Any], args: tuple[Tensor, ...], dims: int = 2, **chosen: Any) -> Any:
    """The oracle's blocks with all batch axes: (*batch, *out, *in)."""
    lead = tuple(args[0].shape[:dims])
    carries = [x.shape[:dims] == lead for x in args]
    own = tuple(x.flatten(0, dims - 1) if has else x for x, has in zip(args, carries, strict=True))
    shared = [number for number, has in enumerate(carries) if not has]
    found = jacobian_blocks(flat(func, lead, carries), own, shared=shared, **chosen)
    return pytree.tree_map_only(Tensor, lambda J: J.unflatten(0, lead), found)


torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)).double()
QKV = nn.Linear(2, 6).double()
EMBEDDING, WEIGHT = doubles(4, 2), doubles(2, 3)


def attention(x: Tensor) -> Tensor:
    assert x.dim() == 3  # as modules for sequences check
    q, k, v = QKV(x).chunk(3, -1)
    return (q @ k.mT).softmax(-1) @ v


KEEPS_APART: dict[str, Callable[[Tensor], Any]] = {
    "network": NET,
    "flattened inside": lambda x: NET(x.reshape(-1, 2)).reshape(*x.shape[:2], 3),
    "transposed inside": lambda x: (x.transpose(0, 1) * 2).sin().transpose(0, 1),
    "its place counts": lambda x: NET(x * EMBEDDING[: x.shape[1]]),
    "scalars": lambda x: x.square().sum(-1),
    "two outputs": lambda x: {"a": x.sin(), "b": x.prod(-1)},
}
COUPLED: dict[str, Callable[[Tensor], Any]] = {
    "attention": attention,
    "cumulated": lambda x: x.cumsum(1).sin(),
    "along the first": lambda x: x - x.mean(0),
    "over both": lambda x: x * x.mean((0, 1)),
    "neighbors": lambda x: x.roll(1, 1).sin() * x,
    "channels": nn.Conv1d(4, 4, 1).double(),
}
EVERY = KEEPS_APART | COUPLED


@pytest.mark.parametrize("name", EVERY)
def test_blocks_are_right_and_only_what_keeps_the_axes_apart_is_proved(name: str) -> None:
    x, func = doubles(3, 4, 2), EVERY[name]
    jac = over(func)
    with torch.no_grad():
        y, J = jac.value_and_jacobian(x)
        compare(y, func(x))
        compare([J, jac(x)], [blocks(func, (x,))] * 2)
        structure = jac.plan(x).structure
    if name in KEEPS_APART:
        assert (structure.coupling, structure.assurance) == ("independent", "proved")
        assert structure.sliceable == (name != "its place counts")
    else:
        assert structure.coupling != "independent"
        assert structure.assurance == "observed"


@pytest.mark.by_day(3)
@pytest.mark.parametrize("name", ["network", "attention", "two outputs"])
@pytest.mark.parametrize("layout", ["full", "sparse", "diagonal"])
def test_every_layout_is_that_of_the_flattened_batch_with_its_axes(name: str, layout: Any) -> None:
    x, func = doubles(2, 3, 2), EVERY[name]
    if layout == "diagonal":
        func = lambda x: EVERY[name](x)["a"] if name == "two outputs" else EVERY[name](x)[..., :2]  # noqa: E731
    full = jacobian_full(func, (x,))
    with torch.no_grad():
        found = over(func, layout=layout)(x)
    if layout == "full":
        compare(found, full)
    elif layout == "sparse":
        rows = pytree.tree_map_only(Tensor, lambda J: J.reshape(-1, x.numel()), full)
        compare(pytree.tree_map_only(Tensor, Tensor.to_dense, found), rows)
    else:
        compare(found, blocks(func, (x,)).diagonal(dim1=-2, dim2=-1))


def test_two_splits_of_as_many_samples_are_each_right() -> None:
    jac = over(lambda x: x.cumsum(1).sin() * x)
    for lead in [(2, 4), (4, 2), (8, 1), (1, 8), (2, 4)]:
        x = doubles(*lead, 2)
        with torch.no_grad():
            compare(jac(x), blocks(jac.func, (x,)))


def test_plans_of_one_store_are_never_taken_from_another_split(tmp_path: Any) -> None:
    func = lambda x: x * EMBEDDING[: x.shape[1]].sum(0) + x.cumsum(1)  # noqa: E731
    for lead in [(4, 2), (2, 4)]:
        x = doubles(*lead, 2)
        with torch.no_grad():
            compare(over(func, store=str(tmp_path / "plans.db"))(x), blocks(func, (x,)))


def test_a_last_batch_of_fewer_rows_takes_the_plan_of_the_others() -> None:
    store = autojac.PlanStore(":memory:")
    jac = over(NET, store=store)
    for lead, plans in [((8, 4), 1), ((7, 4), 1), ((8, 3), 2)]:
        jac(doubles(*lead, 2))
        assert len(store.listing()) == plans


def mixed(x: Tensor, mask: Tensor, w: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    return (x * mask[..., None]) @ w + context[:, None], x.sin()


@pytest.mark.parametrize("in_dims", ["auto", (0, 0, None, None)])
def test_masks_weights_and_what_a_row_shares_go_along(in_dims: Any) -> None:
    args = doubles(3, 4, 2), torch.rand(3, 4) > 0.5, WEIGHT, doubles(3, 3)
    jac = over(mixed, argnums=(0, 2), in_dims=in_dims)
    with torch.no_grad():
        compare(jac(*args), blocks(mixed, args, argnums=(0, 2)))
        full = over(mixed, argnums=(0, 2), in_dims=in_dims, layout="full")(*args)
        wanted = jacobian_full(mixed, args, (0, 2))
        for row, right in zip(full, wanted, strict=True):
            compare(row[0], right[0])
            compare(row[1], right[1])


def test_nests_ids_keywords_aux_and_select_go_along() -> None:
    def of_nest(nest: dict[str, Any], scale: float, *, mask: Tensor) -> tuple[Any, Any]:
        y = nest["x"] * scale * mask[..., None]
        return {"y": y, "ids": nest["ids"], "note": None}, nest["x"].shape

    x, ids, mask = doubles(2, 3, 2), torch.arange(6).reshape(2, 3), torch.rand(2, 3) > 0.5
    jac = over(of_nest, has_aux=True)
    y, J, aux = jac.value_and_jacobian({"x": x, "ids": ids, "name": "a"}, 2.0, mask=mask)
    assert aux == (2, 3, 2)
    assert torch.equal(y["ids"], ids)
    assert y["note"] is J["ids"] is J["y"]["ids"] is None
    compare(J["y"]["x"], torch.diag_embed((2.0 * mask[..., None]).expand(2, 3, 2).double()))
    J, whole = over(lambda x: {"a": x.sin(), "b": x.shape}, select="a")(x)
    compare(J, torch.diag_embed(x.cos()))
    assert whole["b"] == x.shape
    compare(whole["a"], x.sin())


@dataclass
class Coupled:
    """A function that couples along one batch axis, or along none."""

    dims: int
    along: int | None
    scalar: bool

    def __call__(self, x: Tensor) -> Tensor:
        y = x.sin() * x
        if self.along is not None:
            y = y + x.cumsum(self.along)
        return y.flatten(self.dims).sum(-1) if self.scalar else y


@settings(max_examples=6)
@given(data=st.data())
def test_any_shapes(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3), "batch axes")
    lead = tuple(data.draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims), "batch"))
    event = tuple(data.draw(st.lists(st.integers(1, 2), max_size=2), "in"))
    coupled = data.draw(st.sampled_from([None, *range(dims)]), "coupled along")
    scalar = data.draw(st.booleans(), "a number per sample")

    func = Coupled(dims, coupled, scalar and len(event) > 0)
    x = doubles(*lead, *event)
    with torch.no_grad():
        J = over(func, dims)(x)
        compare(J, blocks(func, (x,), dims))
        compare(over(func, dims, layout="full")(x), jacobian_full(func, (x,)))


def test_a_batch_without_samples_has_a_jacobian_without_entries() -> None:
    for lead in [(0, 4), (3, 0)]:
        assert over(NET)(doubles(*lead, 2)).shape == (*lead, 3, 2)


def test_products_take_and_return_the_batch_axes() -> None:
    x, func = doubles(2, 3, 2), NET
    jac, J = over(func), blocks(func, (x,))
    v, u = doubles(2, 3, 2), doubles(2, 3, 3)
    with torch.no_grad():
        compare(jac.jvp(x, v), torch.einsum("abmn,abn->abm", J, v))
        compare(jac.jvp(x, torch.stack([v, 2 * v])), torch.einsum("abmn,kabn->kabm", J, torch.stack([v, 2 * v])))
        compare(jac.vjp(x, u), torch.einsum("abmn,abm->abn", J, u))
        compare(jac.vjp(x, torch.stack([u, u])), torch.einsum("abmn,kabm->kabn", J, torch.stack([u, u])))
        compare(jac.gram(x), J.mT @ J)
        compare(jac.gram(x, outer=True), J @ J.mT)
        compare(jac.norm(x), J.square().sum((-2, -1)).sqrt())
        compare(jac.singular_values(x), torch.linalg.svdvals(J))
        step = jac.solve(x, u, damping=torch.full((2, 3), 0.5))
        normal = J.mT @ J + 0.5 * torch.eye(2)
        compare(step, -torch.linalg.solve(normal, (J.mT @ u[..., None]))[..., 0], 1e-8)
        compare(jac.ntk(x), torch.einsum("abmn,cdkn->abcdmk", J, J))
        compare(jac.gradient_norms(x, u), torch.einsum("abmn,abm->abn", J, u).norm(dim=-1))
        compare(jac.ggn_product(x, v, loss=lambda y: y.square().sum() / 2), torch.einsum("abmn,abmk,abk->abn", J, J, v))
        assert jac.linear_operator(x).shape == (18, 12)
        starts = [(start, part.shape) for start, part in jac.chunks(x, bytes=4 * 6 * 8)]
        assert starts == [(0, (4, 3, 2)), (4, (2, 3, 2))]


def of_a_table(x: Tensor, table: dict[str, Tensor], mask: Tensor) -> Tensor:
    return (x * mask[..., None]).cumsum(1) @ table["w"] + table["row"][:, None]


TABLE = {"w": WEIGHT, "row": doubles(3, 3)}
MASK = torch.tensor([[True, False, True, True], [True, True, False, True], [True] * 4])


@pytest.mark.parametrize("argnums", [0, (0, 1)])
@pytest.mark.parametrize("layout", ["blocks", "full", "sparse"])
def test_probe_and_verify_take_the_same_arguments(layout: str, argnums: Any) -> None:
    args = doubles(3, 4, 2), TABLE, MASK
    chosen: dict[str, Any] = {"argnums": argnums, "in_dims": (0, None, 0), "batch_dims": 2}
    with torch.no_grad():
        J = AutoJacobian(of_a_table, layout=layout, on_miss="estimate", store=":memory:", **chosen)(*args)  # type: ignore[arg-type]
    autojac.verify(J, of_a_table, *args, layout=layout, **chosen)
    for part in pytree.tree_leaves(J):
        values = part.values() if layout == "sparse" else part
        before, at = values.clone(), values.abs().argmax()
        values.view(-1)[at] *= 1.1
        with pytest.raises(autojac.VerificationError, match="off by"):
            autojac.verify(J, of_a_table, *args, layout=layout, **chosen)
        values.copy_(before)
    structure = autojac.probe(of_a_table, *args, **chosen)
    assert structure.coupling == "grouped"
    with torch.no_grad():
        assert over(of_a_table, argnums=argnums, in_dims=(0, None, 0)).plan(*args).structure.coupling == "grouped"


def test_what_probe_proves_is_of_the_flattened_batch() -> None:
    for func, coupling in [(NET, "independent"), (lambda x: x - x.mean(1, keepdim=True), "grouped")]:
        assert autojac.probe(func, doubles(3, 4, 2), batch_dims=2).coupling == coupling


def test_a_kernel_pairs_calls_of_different_sizes_and_arguments() -> None:
    x, y, func = doubles(2, 3, 2), doubles(4, 1, 2), NET
    with torch.no_grad():
        jac = over(func)
        compare(jac.ntk(x, y), torch.einsum("abmn,cdkn->abcdmk", blocks(func, (x,)), blocks(func, (y,))))
        # of the second call all samples share the weights
        both = over(lambda x, w: x.sin() * w)
        left, right = (x, doubles(2, 3, 2)), (y, doubles(2))
        J, K = (blocks(both.func, args) for args in (left, right))
        compare(both.ntk(left, right), torch.einsum("abmn,cdkn->abcdmk", J, K))
        small = over(func, memory_limit=900)
        compare(small.ntk(x, y), jac.ntk(x, y))


def test_what_is_made_of_square_jacobians_has_the_batch_axes() -> None:
    func = lambda x: x.sin() + x.roll(1, -1).square()  # noqa: E731
    x = doubles(2, 3, 2)
    jac, J, full = over(func), blocks(func, (x,)), jacobian_full(func, (x,)).reshape(12, 12)
    with torch.no_grad():
        compare(jac.inverse(x), J.inverse(), 1e-8)
        compare(jac.trace(x), J.diagonal(dim1=-2, dim2=-1).sum(-1))
        compare(tuple(jac.slogdet(x)), tuple(torch.linalg.slogdet(J)))
        whole = over(func, layout="full")
        compare(whole.inverse(x), full.inverse().reshape(2, 3, 2, 2, 3, 2), 1e-8)
        compare(whole.norm(x), full.norm())
        compare(whole.gram(x), full.T @ full)
        compare(whole.vjp(x, x), (x.flatten() @ full).reshape(2, 3, 2))
        compare(whole.solve(x, x), -torch.linalg.solve(full, x.flatten()).reshape(2, 3, 2), 1e-8)


def test_parameters_of_a_sequence_model() -> None:
    x, u = doubles(2, 3, 2), doubles(2, 3, 3)
    jac = AutoJacobian.of_parameters(NET, batch_dims=2, store=":memory:", on_miss="estimate")
    named = dict(NET.named_parameters())

    def of_weights(*weights: Tensor) -> Tensor:
        return torch.func.functional_call(NET, dict(zip(named, weights, strict=True)), x)

    right = jacobian_full(of_weights, tuple(named.values()), tuple(range(len(named))))
    J = jac(x)
    assert list(J) == list(named)
    for found, wanted in zip(J.values(), right, strict=True):
        compare(found.detach(), wanted)
    pulled = jac.vjp(x, u)
    compare(pulled["0.bias"].detach(), torch.einsum("abmp,abm->abp", J["0.bias"], u).detach())
    v = {name: torch.ones_like(p) for name, p in named.items()}
    compare(jac.jvp(x, v).detach(), sum(J[name].flatten(3).sum(-1) for name in J).detach())  # type: ignore[union-attr]
    product = jac.ggn_product(x, v)
    assert {name: p.shape for name, p in product.items()} == {name: p.shape for name, p in named.items()}
    assert jac.ntk(x).shape == (2, 3, 2, 3, 3, 3)


def test_second_derivatives_and_derivatives_by_columns() -> None:
    def cubic(x: Tensor) -> Tensor:
        assert x.dim() == 3
        return x[..., 0] ** 3 * x[..., 1]

    x, v = doubles(2, 3, 2), doubles(2, 3, 2)
    a, b = x.unbind(-1)
    right = torch.stack([torch.stack([6 * a * b, 3 * a**2], -1), torch.stack([3 * a**2, 0 * a], -1)], -2)
    hessian = AutoHessian(cubic, batch_dims=2, store=":memory:", on_miss="estimate")
    compare(hessian(x), right)
    compare(hessian.diagonal(x), right.diagonal(dim1=-2, dim2=-1))
    compare(hessian.laplacian(x), 6 * a * b)
    compare(hessian.hvp(x, v), torch.einsum("abmn,abn->abm", right, v))
    assert repr(hessian).startswith("AutoHessian(")
    derivatives = Derivatives(cubic, ((), (0,), (0, 1)), batch_dims=2, store=":memory:", on_miss="estimate")
    for found, wanted in zip(derivatives(x), (cubic(x), 3 * a**2 * b, 3 * a**2), strict=True):
        compare(found, wanted)
    assert "batch_dims=2" in repr(derivatives)


@pytest.mark.parametrize("kind", ["jacobian", pytest.param("hessian", marks=pytest.mark.by_day(3)), "derivatives"])
def test_training_steps_take_them(kind: str) -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    options: Any = {"batch_dims": 2, "store": ":memory:", "on_miss": "estimate"}
    source: Any = {
        "jacobian": lambda: AutoJacobian(net, **options),
        "hessian": lambda: AutoHessian(net, **options),
        "derivatives": lambda: Derivatives(net, ((0,), (1,)), **options),
    }[kind]()
    x = doubles(2, 3, 2)

    def loss(*parts: Tensor) -> Tensor:
        assert all(part.shape[:2] == (2, 3) for part in parts)
        return sum(part.square().mean() for part in parts)  # type: ignore[return-value]

    step = TrainingStep(source, loss)
    value = step(x)
    found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    parts = source.value_and_jacobian(x) if kind == "jacobian" else source(x)
    expected = loss(*(parts if isinstance(parts, tuple) else (parts,)))
    expected.backward()
    compare(value, expected.detach())
    compare(found, [p.grad for p in net.parameters() if p.grad is not None])


def test_training_goes_through_it_and_the_input_may_be_a_view_or_require_grad() -> None:
    x = doubles(4, 3, 2).transpose(0, 1).requires_grad_()
    J = over(lambda x: x**3)(x)
    (found,) = torch.autograd.grad(J.sum(), x)
    compare(found, (6 * x).detach())


def test_a_call_evaluates_func_as_often_as_the_flattened_batch_does() -> None:
    x, counts = doubles(3, 4, 2), []
    for flattened in (False, True):
        func = Counted(lambda x: x.sin())
        jac = AutoJacobian(func, store=":memory:", on_miss="estimate") if flattened else over(func)
        given = x.flatten(0, 1) if flattened else x
        with torch.no_grad():
            jac(given)
            before = func.calls
            for _ in range(10):
                jac(given)
        counts.append(func.calls - before)
    assert counts[0] == counts[1]


def test_a_wrapper_is_pickled_and_wrapped_and_says_what_it_is() -> None:
    x = doubles(2, 3, 2)
    jac = over(NET, store=None)
    again = pickle.loads(pickle.dumps(jac))
    assert isinstance(again, AutoJacobian)
    assert "batch_dims=2" in repr(again)
    hessians = over(over(lambda x: x.square().sum(-1)))(x)
    compare(hessians, 2 * torch.eye(2, dtype=torch.float64).expand(2, 3, 2, 2))
    nested = over(over(nn.Sequential(NET, nn.Flatten(2), nn.Linear(3, 1), nn.Flatten(1)).double()))
    for _ in range(3):
        assert nested(x).shape == (2, 3, 2, 2)
    assert over(NET).tune(x, effort="estimate").method
    assert "proof" in over(NET).explain(x)


class Own(AutoJacobian):
    """A user's own kind."""


def ragged() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        return torch.nested.nested_tensor([doubles(2, 2), doubles(3, 2)])


BAD: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "zero": (OptionError, "1 or more, got 0", lambda: over(NET, 0)),
    "negative": (OptionError, "1 or more, got -2", lambda: over(NET, -2)),
    "bool": (OptionError, "1 or more, got True", lambda: over(NET, True)),
    "text": (OptionError, "1 or more, got '2'", lambda: over(NET, "2")),  # type: ignore[arg-type]
    "float": (OptionError, "1 or more, got 1.0", lambda: over(NET, 1.0)),  # type: ignore[arg-type]
    "derived": (OptionError, "derived from it", lambda: Own(NET, batch_dims=2)),
    "other axis": (OptionError, "in_dims of 0, None and 'auto'", lambda: over(NET, in_dims=1)),
    "fewer axes": (InputError, r"2 batch axes in front, got \(5,\)", lambda: over(NET)(doubles(5))),
    "declared": (InputError, r"got \(3,\)", lambda: over(torch.mul, in_dims=0)(doubles(3, 2), doubles(3))),
    "all shared": (InputError, "2 batch axes in front", lambda: over(NET, in_dims=None)(doubles(3, 4, 2))),
    "sparse": (InputError, "dense tensor with batch axes", lambda: over(NET)(doubles(3, 4).to_sparse())),
    "nested": (InputError, "nested tensor", lambda: over(NET)(ragged())),
    "sizes": (
        InputError,
        r"theirs are \[\(3, 4\), \(3, 5\)\]",
        lambda: over(torch.mul, in_dims=0)(doubles(3, 4, 2), doubles(3, 5, 2)),
    ),
    "output": (
        OutputError,
        r"the batch axes \(3, 4\) in front, got shape \(3, 2\)",
        lambda: over(lambda x: x.sum(1))(doubles(3, 4, 2)),
    ),
    "argnums": (
        OptionError,
        "argument 3, but the call has 1 positional",
        lambda: over(NET, argnums=3)(doubles(3, 4, 2)),
    ),
    "v": (InputError, r"in the shape \(3, 4, 2\)", lambda: over(NET).jvp(doubles(3, 4, 2), doubles(12, 2))),
    "u": (InputError, r"in the shape \(3, 4, 3\)", lambda: over(NET).vjp(doubles(3, 4, 2), doubles(12, 3))),
    "r": (InputError, r"in the shape \(3, 4, 3\)", lambda: over(NET).solve(doubles(3, 4, 2), doubles(12, 3))),
    "probe": (OptionError, "1 or more, got 0", lambda: autojac.probe(NET, doubles(3, 4, 2), batch_dims=0)),
    "verify": (
        autojac.VerificationError,
        r"\(3, 4\) in front and before the input's own was expected, got \(3, 4, 3, 2\)",
        lambda: autojac.verify(doubles(3, 4, 3, 2), NET, doubles(3, 4, 2), batch_dims=2, layout="full"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told(name: str) -> None:
    kind, text, provoke = BAD[name]
    with pytest.raises(kind, match=text):
        provoke()
