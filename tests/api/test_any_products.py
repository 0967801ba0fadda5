"""What is made of Jacobians, for any shapes, batch axes, nests and couplings, against the oracle's matrices."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from autojac import AutoJacobian
from harness import compare
from oracle import jacobian_full

COUPLINGS = ("none", "mean", "next", "first axis", "pairs")
NESTS = ("tensor", "pair", "dict with ids")
DAMPING = 0.5


@dataclass
class Func:
    """A smooth function of one or two inputs, the second shared by all samples or not.

    Attributes:
        outs: shape of each output of a sample.
        coupling: what a sample reads of the others.
        nest: of the outputs.
        dims: number of batch axes.
        has_aux: it returns its shapes besides.
    """

    outs: tuple[tuple[int, ...], ...]
    coupling: str
    nest: str
    dims: int = 1
    has_aux: bool = False

    def __call__(self, x: Tensor, w: Tensor | None = None) -> Any:
        lead = x.shape[: self.dims]
        flat = x.reshape(*lead, -1)
        if self.coupling == "mean":
            flat = flat + flat.sin().mean(tuple(range(self.dims)))
        elif self.coupling == "next":
            flat = flat + flat.roll(1, self.dims - 1) ** 2
        elif self.coupling == "first axis":
            flat = flat + flat.cumsum(0).cos()
        elif self.coupling == "pairs":
            first, last = flat[: len(x) // 2], flat[len(x) - len(x) // 2 :]
            flat = flat + torch.cat([last.square(), flat[len(first) : len(x) - len(last)], first.square()])
        ys = []
        for number, shape in enumerate(self.outs):
            steps = torch.arange(1.0, 1 + prod(shape) * flat.shape[-1], dtype=x.dtype).reshape(flat.shape[-1], -1)
            y = (flat @ (0.7 * steps + number).sin()).tanh()
            if w is not None:
                y = y * w.sum(-1, keepdim=True).cos()  # (*batch, 1) or (1,)
            ys.append(y.reshape(*lead, *shape))
        out = {"tensor": lambda: ys[0], "pair": lambda: tuple(ys),
               "dict with ids": lambda: {"ids": torch.arange(len(x)), **{str(k): y for k, y in enumerate(ys)}},
               }[self.nest]()  # fmt: skip
        return (out, tuple(x.shape)) if self.has_aux else out


@dataclass
class Case:
    """A call, and the Jacobian of all outputs in all inputs as a matrix (B·m, N), rows and columns sample by sample."""

    func: Func
    args: tuple[Tensor, ...]
    shared: bool

    @property
    def argnums(self) -> Any:
        return 0 if len(self.args) == 1 else (0, 1)

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.args[0].shape[: self.func.dims])

    @property
    def batch(self) -> int:
        return prod(self.lead)

    def outputs(self, *args: Tensor) -> Any:
        return self.func(*args)[0] if self.func.has_aux else self.func(*args)

    def without_aux(self, found: Any) -> Any:
        """What a method returns besides aux, which is right."""
        if not self.func.has_aux:
            return found
        assert found[1] == tuple(self.args[0].shape)
        return found[0]

    def whole(self) -> Tensor:
        """Columns and rows as `as_one_matrix` has them: output by output, input by input."""
        found = jacobian_full(lambda *args: self.floats(self.outputs(*args)), self.args, tuple(range(len(self.args))))
        return torch.cat([torch.cat([J.reshape(-1, x.numel()) for J, x in zip(row, self.args, strict=True)], 1)
                          for row in found])  # fmt: skip

    def blocks(self) -> Tensor:
        """Each sample's own matrix (B, m, n)."""
        rows = self.whole().split([self.batch * prod(shape) for shape in self.func.outs])
        parts = []
        for row in rows:
            columns, own = row.split([x.numel() for x in self.args], 1), []
            for number, part in enumerate(columns):
                J = part.reshape(self.batch, -1, part.shape[1])
                if number == 0 or not self.shared:
                    J = torch.stack([J[b].reshape(J.shape[1], self.batch, -1)[:, b] for b in range(self.batch)])
                own.append(J)
            parts.append(torch.cat(own, 2))
        return torch.cat(parts, 1)

    @staticmethod
    def floats(outputs: Any) -> tuple[Tensor, ...]:
        return tuple(y for y in pytree.tree_leaves(outputs) if y.is_floating_point())

    def vectors(self, like: Any, several: int) -> Any:
        lead = (several,) if several else ()
        return pytree.tree_map(lambda t: torch.randn(*lead, *t.shape).double() if t.is_floating_point() else t, like)


@st.composite
def cases(draw: st.DrawFn, square: bool = False) -> Case:
    shapes = st.lists(st.integers(1, 2), max_size=2).map(tuple)
    lead = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda sizes: prod(sizes) < 9), "batch")
    nest = "tensor" if square else draw(st.sampled_from(NESTS), "outputs")
    event = draw(shapes, "in")
    outs = (event,) if square else tuple(draw(shapes, "out") for _ in range(1 if nest == "tensor" else 2))
    torch.manual_seed(0)
    args = [torch.randn(*lead, *event, dtype=torch.float64)]
    shared = draw(st.booleans(), "a shared input")
    if not square and draw(st.booleans(), "two inputs"):
        args.append(torch.randn(*((5,) if shared else (*lead, 2)), dtype=torch.float64))
    coupling, has_aux = draw(st.sampled_from(COUPLINGS), "coupling"), draw(st.booleans(), "aux")
    return Case(Func(outs, coupling, nest, len(lead), has_aux), tuple(args), shared)


def wrapped(case: Case, layout: Any = "blocks", **options: Any) -> AutoJacobian:
    """A wrapper that times nothing, or a copy of it, which is one."""
    in_dims = (0,) if len(case.args) == 1 else (0, None if case.shared else 0)
    return AutoJacobian(
        case.func, argnums=case.argnums, in_dims=in_dims, layout=layout, batch_dims=case.func.dims,
        has_aux=case.func.has_aux, on_miss="estimate", store=":memory:", **options,
    )  # fmt: skip


def inputs_of(case: Case) -> Any:
    return case.args[0] if len(case.args) == 1 else case.args


def columns_of(case: Case, vectors: Any, several: int, whole: bool) -> Tensor:
    """Vectors shaped as the inputs as (k, N), or (k, B, n) for blocks."""
    flat = []
    for number, v in enumerate(pytree.tree_leaves(vectors)):
        own = v.reshape(several or 1, *((-1,) if whole or (number and case.shared) else (case.batch, -1)))
        flat.append(own if whole or own.dim() == 3 else own[:, None].expand(-1, case.batch, -1))
    return torch.cat(flat, -1)


def rows_of(case: Case, vectors: Any, several: int, whole: bool) -> Tensor:
    """Vectors shaped as the outputs as (k, B·m), or (k, B, m) for blocks."""
    shape = (-1,) if whole else (case.batch, -1)
    return torch.cat([u.reshape(several or 1, *shape) for u in case.floats(vectors)], -1)


def flat_result(case: Case, parts: Any, several: int, whole: bool) -> Tensor:
    """A result with the batch axes, or one of the whole batch, as (k, B, n) or (k, n)."""
    leaves, lead = [t for t in pytree.tree_leaves(parts) if isinstance(t, Tensor)], (several,) if several else ()
    if not whole:
        assert all(t.shape[: len(lead) + case.func.dims] == (*lead, *case.lead) for t in leaves)
    return torch.cat([t.reshape(several or 1, *(() if whole else (case.batch,)), -1) for t in leaves], -1)


@settings(max_examples=8)
@given(case=cases(), several=st.sampled_from([0, 2]), whole=st.booleans())
def test_products(case: Case, several: int, whole: bool) -> None:
    jac = wrapped(case, "full" if whole else "blocks")
    v, u = case.vectors(inputs_of(case), several), case.vectors(case.outputs(*case.args), several)
    matrix = case.whole() if whole else case.blocks()
    pushed = flat_result(case, case.without_aux(jac.jvp(*case.args, v)), several, whole)
    compare(pushed, torch.einsum("...mn,k...n->k...m", matrix, columns_of(case, v, several, whole)))
    pulled = flat_result(case, case.without_aux(jac.vjp(*case.args, u)), several, whole)
    compare(pulled, torch.einsum("...mn,k...m->k...n", matrix, rows_of(case, u, several, whole)))


@settings(max_examples=8)
@given(case=cases(), whole=st.booleans())
def test_grams_norms_singular_values_and_steps(case: Case, whole: bool) -> None:
    jac = wrapped(case, "full" if whole else "blocks")
    matrix, own = case.whole() if whole else case.blocks(), case.without_aux
    lead = () if whole else case.lead
    r = case.vectors(case.outputs(*case.args), 0)
    compare(own(jac.gram(*case.args)), (matrix.mT @ matrix).reshape(*lead, *matrix.shape[-1:] * 2), 1e-9)
    compare(own(jac.gram(*case.args, outer=True)), (matrix @ matrix.mT).reshape(*lead, *matrix.shape[-2:-1] * 2), 1e-9)
    compare(own(jac.norm(*case.args)), matrix.square().sum((-2, -1)).sqrt().reshape(lead))
    compare(own(jac.singular_values(*case.args)), torch.linalg.svdvals(matrix).reshape(*lead, -1), 1e-7)
    step = own(jac.solve(*case.args, r, damping=DAMPING))
    normal = matrix.mT @ matrix + DAMPING * torch.eye(matrix.shape[-1])
    right = -torch.linalg.solve(normal, (matrix.mT @ rows_of(case, r, 0, whole)[0][..., None]))[..., 0]
    compare(flat_result(case, step, 0, whole)[0], right, 1e-8)


@settings(max_examples=6)
@given(case=cases(), layout=st.sampled_from(["blocks", "full", "sparse"]))
def test_operators_of_the_whole_batch(case: Case, layout: str) -> None:
    case = Case(dataclasses.replace(case.func, outs=case.func.outs[:1], nest="tensor"), case.args[:1], False)
    operator, matrix = wrapped(case, layout).linear_operator(*case.args), case.whole()
    v, u = case.vectors(case.args[0], 0), case.vectors(case.outputs(*case.args), 0)
    flat = case.func.dims - 1
    compare((operator @ v.flatten(0, flat)).flatten(), matrix @ v.flatten())
    compare(operator.rmatvec(u.flatten(0, flat)).flatten(), matrix.T @ u.flatten())
    assert operator.shape == tuple(matrix.shape)


@settings(max_examples=8)
@given(case=cases(), limit=st.sampled_from([None, "2KiB"]))
def test_training_products_in_parts_or_not(case: Case, limit: str | None) -> None:
    jac, matrix, J = wrapped(case, memory_limit=limit), case.whole(), case.blocks()
    v, u = case.vectors(inputs_of(case), 0), case.vectors(case.outputs(*case.args), 0)
    along = columns_of(case, v, 0, True)[0]
    product = pytree.tree_leaves(jac.ggn_product(*case.args, v, loss=half_squares))
    compare(torch.cat([part.flatten() for part in product]), matrix.T @ (matrix @ along), 1e-9)
    norms = torch.einsum("bmn,bm->bn", J, rows_of(case, u, 0, False)[0]).norm(dim=1)
    compare(jac.gradient_norms(*case.args, u), norms.reshape(case.lead))
    pairs = torch.einsum("bmn,ckn->bcmk", J, J)
    compare(jac.ntk(case.args), pairs.reshape(*case.lead, *case.lead, *pairs.shape[2:]))


def half_squares(outputs: Any) -> Tensor:
    return sum((y.square().sum() for y in Case.floats(outputs)), torch.zeros((), dtype=torch.float64)) / 2


@settings(max_examples=8)
@given(case=cases(), layout=st.sampled_from(["blocks", "full", "diagonal"]), size=st.integers(1, 700))
def test_chunks(case: Case, layout: str, size: int) -> None:
    """Parts are of the flattened batch."""
    if layout == "diagonal":
        case = Case(dataclasses.replace(case.func, outs=(tuple(case.args[0].shape[case.func.dims :]),), nest="tensor"),
                    case.args[:1], False)  # fmt: skip
    jac = wrapped(case, layout)
    whole = pytree.tree_leaves(case.without_aux(jac(*case.args)))
    parts, reached = [], 0
    for start, part in jac.chunks(*case.args, bytes=size):
        assert start == reached
        parts.append([t for t in pytree.tree_leaves(part) if t is not None])
        reached += len(parts[-1][0])
    for number, J in enumerate(t for t in whole if isinstance(t, Tensor)):
        compare(torch.cat([part[number] for part in parts]).reshape(J.shape), J)


@settings(max_examples=8)
@given(case=cases(square=True), whole=st.booleans())
def test_what_is_made_of_square_jacobians(case: Case, whole: bool) -> None:
    jac = wrapped(case, "full" if whole else "blocks")
    matrix, lead, own = case.whole() if whole else case.blocks(), () if whole else case.lead, case.without_aux
    event = tuple(case.args[0].shape[case.func.dims :])
    compare(own(jac.trace(*case.args)), case.blocks().diagonal(dim1=1, dim2=2).sum(-1).reshape(case.lead))
    if float(torch.linalg.cond(matrix).max()) < 1e6:  # of singular ones, rounding decides
        right = torch.linalg.slogdet(matrix)
        compare(tuple(own(jac.slogdet(*case.args))), [part.reshape(lead) for part in right], 1e-8)
        shape = (*case.lead, *event) * 2 if whole else (*lead, *event, *event)
        compare(own(jac.inverse(*case.args)), matrix.inverse().reshape(shape), 1e-6)
    if case.func.coupling in ("none", "mean"):
        factors, v = jac.factors(*case.args), case.vectors(case.args[0], 0)
        compare((factors @ v.flatten(0, case.func.dims - 1)).flatten(), case.whole() @ v.flatten())


@settings(max_examples=6)
@given(case=cases(), layout=st.sampled_from(["blocks", "full"]), used=st.booleans(), pickled=st.booleans())
def test_copies_of_wrappers(case: Case, layout: str, used: bool, pickled: bool) -> None:
    jac, u = wrapped(case, layout), case.vectors(case.outputs(*case.args), 0)
    right = [pytree.tree_leaves(case.without_aux(found)) for found in (jac(*case.args), jac.vjp(*case.args, u))]
    original = jac if used else wrapped(case, layout)
    again = pickle.loads(pickle.dumps(original)) if pickled else copy.deepcopy(original)
    assert type(again) is type(jac)
    for found, wanted in zip((again(*case.args), again.vjp(*case.args, u), jac(*case.args)), (*right, right[0]),
                             strict=True):  # fmt: skip
        compare([t for t in pytree.tree_leaves(case.without_aux(found)) if t is not None],
                [t for t in wanted if t is not None])  # fmt: skip
