"""Products, Gram matrices, norms and solves for any shapes, nests and couplings, against the oracle's matrices."""

from __future__ import annotations

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

COUPLINGS = ("none", "mean", "next", "pairs")
NESTS = ("tensor", "pair", "dict with ids")
DAMPING = 0.5


@dataclass
class Func:
    """A smooth function of one or two inputs, the second shared by all samples or not.

    Attributes:
        outs: shape of each output of a sample.
        coupling: what a sample reads of the others.
        nest: of the outputs.
    """

    outs: tuple[tuple[int, ...], ...]
    coupling: str
    nest: str

    def __call__(self, x: Tensor, w: Tensor | None = None) -> Any:
        flat = x.reshape(len(x), -1)
        if self.coupling == "mean":
            flat = flat + flat.sin().mean(0)
        elif self.coupling == "next":
            flat = flat + flat.roll(1, 0) ** 2
        elif self.coupling == "pairs":
            first, last = flat[: len(x) // 2], flat[-(len(x) // 2) :]
            flat = flat + torch.cat([last.square(), flat[len(first) : len(x) - len(last)], first.square()])
        ys = []
        for number, shape in enumerate(self.outs):
            steps = torch.arange(1.0, 1 + prod(shape) * flat.shape[1], dtype=x.dtype).reshape(flat.shape[1], -1)
            y = (flat @ (0.7 * steps + number).sin()).tanh()
            if w is not None:
                y = y * w.sum(-1, keepdim=True).cos()  # (B, 1) or (1,)
            ys.append(y.reshape(len(x), *shape))
        return {"tensor": lambda: ys[0], "pair": lambda: tuple(ys),
                "dict with ids": lambda: {"ids": torch.arange(len(x)), **{str(k): y for k, y in enumerate(ys)}},
                }[self.nest]()  # fmt: skip


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
    def batch(self) -> int:
        return len(self.args[0])

    def whole(self) -> Tensor:
        """Columns and rows as `as_one_matrix` has them: output by output, input by input."""
        found = jacobian_full(lambda *args: self.floats(self.func(*args)), self.args, tuple(range(len(self.args))))
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
def cases(draw: st.DrawFn) -> Case:
    shapes = st.lists(st.integers(1, 2), max_size=2).map(tuple)
    batch, nest = draw(st.integers(2, 4), "batch"), draw(st.sampled_from(NESTS), "outputs")
    outs = tuple(draw(shapes, "out") for _ in range(1 if nest == "tensor" else 2))
    torch.manual_seed(0)
    args = [torch.randn(batch, *draw(shapes, "in"), dtype=torch.float64)]
    shared = draw(st.booleans(), "a shared input")
    if draw(st.booleans(), "two inputs"):
        args.append(torch.randn(*((5,) if shared else (batch, 2)), dtype=torch.float64))
    return Case(Func(outs, draw(st.sampled_from(COUPLINGS), "coupling"), nest), tuple(args), shared)


def wrapped(case: Case, layout: Any = "blocks") -> AutoJacobian:
    in_dims = (0,) if len(case.args) == 1 else (0, None if case.shared else 0)
    return AutoJacobian(
        case.func, argnums=case.argnums, in_dims=in_dims, layout=layout, on_miss="estimate", store=":memory:"
    )


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


def flat_result(parts: Any, several: int, shapes: list[tuple[int, ...]]) -> Tensor:
    leaves = [t for t in pytree.tree_leaves(parts) if isinstance(t, Tensor)]
    return torch.cat([t.reshape(several or 1, *shape) for t, shape in zip(leaves, shapes, strict=True)], -1)


@settings(max_examples=8, deadline=None)
@given(case=cases(), several=st.sampled_from([0, 2]), whole=st.booleans())
def test_products(case: Case, several: int, whole: bool) -> None:
    jac = wrapped(case, "full" if whole else "blocks")
    v, u = case.vectors(inputs_of(case), several), case.vectors(case.func(*case.args), several)
    lead = () if whole else (case.batch,)
    matrix = case.whole() if whole else case.blocks()
    pushed = flat_result(jac.jvp(*case.args, v), several, [(*lead, -1)] * len(case.func.outs))
    compare(pushed, torch.einsum("...mn,k...n->k...m", matrix, columns_of(case, v, several, whole)))
    pulled = flat_result(jac.vjp(*case.args, u), several, [(*lead, -1)] * len(case.args))
    compare(pulled, torch.einsum("...mn,k...m->k...n", matrix, rows_of(case, u, several, whole)))


@settings(max_examples=8, deadline=None)
@given(case=cases(), whole=st.booleans())
def test_grams_norms_singular_values_and_steps(case: Case, whole: bool) -> None:
    jac = wrapped(case, "full" if whole else "blocks")
    matrix = case.whole() if whole else case.blocks()
    r = case.vectors(case.func(*case.args), 0)
    compare(jac.gram(*case.args), matrix.mT @ matrix, 1e-9)
    compare(jac.gram(*case.args, outer=True), matrix @ matrix.mT, 1e-9)
    compare(jac.norm(*case.args), matrix.square().sum((-2, -1)).sqrt())
    compare(jac.singular_values(*case.args), torch.linalg.svdvals(matrix), 1e-7)
    step = jac.solve(*case.args, r, damping=DAMPING)
    normal = matrix.mT @ matrix + DAMPING * torch.eye(matrix.shape[-1])
    right = -torch.linalg.solve(normal, (matrix.mT @ rows_of(case, r, 0, whole)[0][..., None]))[..., 0]
    shapes: list[tuple[int, ...]] = [(-1,) if whole else (case.batch, -1)] * len(case.args)
    compare(flat_result(step, 0, shapes)[0], right, 1e-8)


@settings(max_examples=6, deadline=None)
@given(case=cases(), layout=st.sampled_from(["blocks", "full", "sparse"]))
def test_operators_of_the_whole_batch(case: Case, layout: str) -> None:
    case = Case(Func(case.func.outs[:1], case.func.coupling, "tensor"), case.args[:1], False)
    operator, matrix = wrapped(case, layout).linear_operator(*case.args), case.whole()
    v, u = case.vectors(case.args[0], 0), case.vectors(case.func(*case.args), 0)
    compare((operator @ v).flatten(), matrix @ v.flatten())
    compare(operator.rmatvec(u).flatten(), matrix.T @ u.flatten())
    assert operator.shape == tuple(matrix.shape)
