"""The pattern inside a sample holds every entry that is nonzero anywhere, and few others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import autojac
from autojac.bench.workloads import WORKLOADS
from autojac.core.pattern import Pattern, Sparsity
from autojac.errors import OptionError
from autojac.probe import check_declared
from harness import Counted
from oracle import jacobian_full

Func = Callable[..., Any]


def line_of(structure: autojac.Structure) -> str:
    return next(line for line in structure.evidence if line.startswith("features:"))


def pattern_of(func: Func, *args: Tensor, **kwargs: Any) -> Pattern:
    structure = autojac.probe(func, *args, **kwargs)
    assert structure.sparsity is not None, structure.evidence
    assert structure.sparsity.features is not None
    return structure.sparsity.features


def true_pattern(func: Func, args: tuple[Tensor, ...], argnums: Any = 0, batched: bool = True) -> np.ndarray[Any, Any]:
    """Which entries are nonzero at this point, over all pairs of samples: (m, n)."""
    argnums = (argnums,) if isinstance(argnums, int) else argnums
    outputs = pytree.tree_leaves(func(*(x.clone().requires_grad_() for x in args)))
    rows = pytree.tree_leaves(jacobian_full(func, args, argnums))
    grid = []
    for place, y in enumerate(outputs):
        line = []
        for number, argnum in enumerate(argnums):
            own, x = rows[place * len(argnums) + number], args[argnum]
            if batched:
                b, m, n = len(y), y[0].numel(), x[0].numel()
                line.append((own.reshape(b, m, len(x), n) != 0).any(2).any(0))
            else:
                line.append(own.reshape(y.numel(), x.numel()) != 0)
        grid.append(torch.cat(line, 1))
    return torch.cat(grid).numpy()


def brusselator(size: int) -> Func:
    """Right-hand side of the 2-D Brusselator on a periodic grid, two species."""

    def laplacian(z: Tensor) -> Tensor:
        return z.roll(1, 0) + z.roll(-1, 0) + z.roll(1, 1) + z.roll(-1, 1) - 4 * z

    def func(state: Tensor) -> Tensor:
        u, v = state.reshape(2, size, size)
        du = 1 + u * u * v - 4.4 * u + 10 * laplacian(u)
        dv = 3.4 * u - u * u * v + 10 * laplacian(v)
        return torch.stack([du, dv]).reshape(-1)

    return func


def band(size: int, width: int) -> Tensor:
    return torch.ones(size, size).triu(-width).tril(width)


def diffsquare(x: Tensor) -> Tensor:
    return x.diff(dim=-1) ** 2


def diffcube(x: Tensor) -> Tensor:
    return x.diff(n=2, dim=-1) ** 3


@pytest.mark.parametrize(("name", "count"), [("burgers", 1536), ("conv1d", 1274)])
def test_patterns_of_workloads_are_exact(name: str, count: int) -> None:
    func, x = WORKLOADS[name].make()
    assert pattern_of(func, x).count == count


@pytest.mark.parametrize("size", [6, 32])
def test_brusselator_is_found_in_few_evaluations(size: int) -> None:
    func = Counted(brusselator(size))
    x = torch.rand(2 * size * size)
    structure = autojac.probe(func, x, in_dims=None)
    assert structure.sparsity is not None
    # five points of the stencil, and the other species at the same one
    assert structure.sparsity.features is not None
    assert structure.sparsity.features.count == 6 * 2 * size * size
    assert func.calls <= 30


def test_brusselator_is_exact() -> None:
    func, x = brusselator(6), torch.rand(72, dtype=torch.float64) + 0.5
    assert np.array_equal(pattern_of(func, x, in_dims=None).scipy().toarray() > 0, true_pattern(func, (x,), 0, False))


A5, A10, A20 = (band(64, width) for width in (5, 10, 20))
LEFT, RIGHT = (torch.rand(12, 12) < 0.15 for _ in range(2))
TABLE = torch.tensor([0, 3, 3, 5, 1, 7])

EXACT: dict[str, tuple[Func, tuple[int, ...]]] = {
    "diffsquare": (diffsquare, (3, 8)),
    "diffcube": (diffcube, (3, 8)),
    "band of 5": (lambda x: x.square() @ A5.T, (2, 64)),
    "band of 10": (lambda x: x.square() @ A10.T, (2, 64)),
    "sparse matrix": (lambda x: (A5.to_sparse() @ x.square().T).T, (2, 64)),
    "iterated products": (lambda x: ((x @ LEFT.float()).sin() @ RIGHT.float()).cos(), (2, 12)),
    "heat equation": (lambda x: F.pad(x, (1, 1))[:, 2:] - 2 * x + F.pad(x, (1, 1))[:, :-2], (2, 9)),
    "gather": (lambda x: x.gather(1, TABLE.expand(3, 6)) * x[:, TABLE], (3, 8)),
    "scatter_add": (lambda x: torch.zeros(3, 8).scatter_add(1, TABLE.expand(3, 6), x.sin()), (3, 6)),
    "index_add": (lambda x: torch.zeros(3, 8).index_add(1, TABLE, x.sin()), (3, 6)),
    "masked weights": (lambda x: F.linear(x, torch.ones(9, 9) * torch.eye(9).roll(1, 0)), (3, 9)),
    "patches": (lambda x: F.conv2d(x, torch.ones(2, 1, 3, 3), stride=3), (2, 1, 9, 9)),
    "five-point kernel": (
        lambda x: F.conv2d(x, torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None], padding=1),
        (2, 1, 6, 6),
    ),
    "transposed convolution": (lambda x: F.conv_transpose1d(x, torch.ones(1, 1, 3), stride=2), (2, 1, 6)),
    "grouped convolution": (lambda x: F.conv1d(x, torch.ones(4, 1, 3), groups=4), (2, 4, 6)),
    "average pooling": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), (2, 1, 8, 8)),
    "blocks": (lambda x: x.reshape(2, 5, 3).softmax(-1).reshape(2, 15), (2, 15)),
    "norms": (lambda x: F.layer_norm(x, (3,)), (2, 5, 3)),
    "not square": (lambda x: x[:, ::2] * x[:, 1::2], (3, 14)),
    "batch as long as the sample": (lambda x: x * x.roll(1, 1), (7, 7)),
    "batch of 1": (lambda x: x * x.roll(1, 1), (1, 7)),
    "empty rows and columns": (lambda x: torch.cat([torch.zeros(3, 2), x[:, 3:].exp()], 1), (3, 7)),
    "zero": (lambda x: x[:, :4].detach().round(), (3, 5)),
    "through its own gradient": (
        lambda x: torch.autograd.grad((x[:, 1:] ** 2 * x[:, :-1] ** 2).sum(), x, create_graph=True)[0],
        (3, 8),
    ),
    "detached": (lambda x: x + x.roll(1, 1).detach(), (3, 6)),
    "coupled samples": (lambda x: x * x.roll(1, 0) - x.mean(0), (4, 6)),
}


@pytest.mark.by_day(2)
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("ignore::autojac.errors.ModesDisagreeWarning")
def test_patterns_are_exact(name: str) -> None:
    func, shape = EXACT[name]
    x = torch.rand(shape) + 0.5
    found = pattern_of(func, x).scipy().toarray() > 0
    if name == "zero":
        assert not found.any()
        return
    truth = np.zeros(found.shape, dtype=bool)
    for _ in range(3):
        truth |= true_pattern(func, (torch.rand(shape, dtype=torch.float32) + 0.5,))
    assert np.array_equal(found, truth)


def test_wide_bands_are_not_worth_it_in_small_samples() -> None:
    structure = autojac.probe(lambda x: x.square() @ A20.T, torch.rand(2, 64))
    assert structure.sparsity is None
    assert "dense" in line_of(structure)


def test_several_inputs_and_outputs_of_any_shape() -> None:
    def func(a: Tensor, b: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"one": a.flatten(1)[:, :4] * b.sum(-1) * scale, "two": (a * a).transpose(1, 2)}

    args = (torch.rand(3, 2, 5), torch.rand(3, 4, 2), torch.rand(3, 1))
    found = pattern_of(func, *args, argnums=(0, 1))
    assert found.shape == (4 + 10, 10 + 8)
    assert np.array_equal(found.scipy().toarray() > 0, true_pattern(func, args, (0, 1)))


def test_an_input_that_all_samples_share_counts_as_a_whole() -> None:
    def func(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    args = (torch.rand(4, 9), torch.rand(9))
    found = pattern_of(func, *args, argnums=(0, 1), in_dims=(0, None))
    assert np.array_equal(found.scipy().toarray() > 0, np.hstack([np.eye(9), np.eye(9)]) > 0)


# what is zero at most points, or at this one, may be nonzero at others
DEAD: dict[str, tuple[Func, int]] = {
    "relu": (lambda x: x + (x.roll(1, 1) - 100).relu(), 2),
    "where": (lambda x: torch.where(x > 50, x.roll(1, 1), x), 2),
    "clamp": (lambda x: x + x.roll(1, 1).clamp(10, 20), 2),
    "nan_to_num": (lambda x: x + torch.nan_to_num(x.roll(1, 1)), 2),
    "max": (lambda x: torch.maximum(x, x.roll(1, 1) - 100), 2),
    "max pooling": (lambda x: F.max_pool1d(x[:, None], 3, 1, 1)[:, 0], 3),
    "minimum of slices": (lambda x: torch.stack([x, x.roll(1, 1), x.roll(2, 1)]).amin(0), 3),
}


@pytest.mark.parametrize("name", DEAD)
def test_what_is_dead_at_this_point_is_in(name: str) -> None:
    func, per_row = DEAD[name]
    found = pattern_of(func, torch.rand(3, 12))
    truth = sum(np.roll(np.eye(12), shift, 0) for shift in ((0, 1) if per_row == 2 else (-1, 0, 1)))
    if name == "minimum of slices":
        truth = sum(np.roll(np.eye(12), shift, 0) for shift in (0, 1, 2))
    if name == "max pooling":
        truth[0, -1] = truth[-1, 0] = 0
    assert np.array_equal(found.scipy().toarray() > 0, truth > 0)


DENSE: dict[str, Func] = {
    "MLP": nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)),
    "zero weights that are trained": nn.Sequential(nn.Linear(8, 8)),
    "frozen zero weights": nn.Linear(8, 8).requires_grad_(False),
    "sort": lambda x: x.sort(-1).values,
    "index by the data": lambda x: x.gather(1, x.argsort(-1)),
    "entry by the data": lambda x: x.gather(1, x.argmax(-1, keepdim=True)).expand(-1, 8),
    "indexed by the data": lambda x: x[torch.arange(len(x))[:, None], x.argsort(-1)],
    "Fourier": lambda x: torch.fft.rfft(x).abs(),
    "fill": lambda x: torch.cdist(x[:, None], x[:, None].sin()).expand(-1, -1, 8),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_functions_have_no_pattern(name: str) -> None:
    func = DENSE[name]
    if "zero weights" in name:
        with torch.no_grad():
            (func[0] if isinstance(func, nn.Sequential) else func).weight.copy_(torch.eye(8))
    structure = autojac.probe(func, torch.randn(4, 8))
    assert structure.sparsity is None
    assert "dense" in line_of(structure)


def test_an_index_among_the_arguments_may_be_another_next_time() -> None:
    def func(x: Tensor, index: Tensor) -> Tensor:
        return x[:, index]

    index = torch.randperm(8)
    assert autojac.probe(func, torch.randn(4, 8), index, in_dims=(0, None)).sparsity is None
    assert autojac.probe(func, torch.randn(4, 8), index=index).sparsity is None
    assert pattern_of(lambda x: func(x, index), torch.randn(4, 8)).count == 8


def test_a_drawn_index_may_be_another_next_time() -> None:
    def func(x: Tensor) -> Tensor:
        return x[:, torch.randperm(8)]

    x = torch.randn(4, 8)
    jac = autojac.AutoJacobian(func, randomness="different", on_miss="estimate", store=":memory:")
    jac(x)
    structure = jac.plan(x).structure
    assert structure.sparsity is None
    assert "dense" in line_of(structure)


def test_branches_on_data_are_tried_at_several_points() -> None:
    def func(x: Tensor) -> Tensor:
        return x * x.roll(1) if x.abs().max() > 10 else x.sin()

    structure = autojac.probe(func, torch.rand(12), in_dims=None)
    assert structure.sparsity is not None
    assert structure.sparsity.features is not None
    assert structure.sparsity.features.count == 24
    assert "looks at its data" in line_of(structure)


class Stencil(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.roll(1, -1)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return v * x.roll(1, -1) + (v * x).roll(-1, -1)


def circular(x: Tensor) -> Tensor:
    wide = F.pad(x[:, None], (1, 0), mode="circular")[:, 0]
    return wide[:, 1:] * wide[:, :-1]


OPAQUE: dict[str, tuple[Func, tuple[int, ...], Any]] = {
    "batched": (Stencil.apply, (4, 16), 0),
    "without a batch": (Stencil.apply, (16,), None),
    "coupled samples": (lambda x: Stencil.apply(x) * x.roll(1, 0), (4, 16), 0),
    "with a shape": (lambda x: Stencil.apply(x.transpose(1, 2)), (4, 4, 4), 0),
    "written in place": (circular, (4, 16), 0),
}


@pytest.mark.parametrize("name", OPAQUE)
@pytest.mark.filterwarnings("ignore::autojac.errors.ModesDisagreeWarning")
def test_what_can_not_be_recorded_is_found_by_nan(name: str) -> None:
    func, shape, in_dims = OPAQUE[name]
    x = torch.rand(shape) + 0.5
    structure = autojac.probe(func, x, in_dims=in_dims)
    assert "by NaN" in line_of(structure)
    assert structure.sparsity is not None
    assert structure.sparsity.features is not None
    found = structure.sparsity.features.scipy().toarray() > 0
    assert np.array_equal(found, true_pattern(func, (x,), 0, in_dims is not None))
    assert not structure.suspect


class Blind(torch.autograd.Function):
    """x₀ is read by all, where NaN does not show it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x + x[:, :1].nan_to_num(0).sin()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        first = (v * x[:, :1].cos()).sum(1, keepdim=True)
        return v + F.pad(first, (0, x.shape[1] - 1))


def test_what_nan_does_not_show_is_added_and_said() -> None:
    x = torch.rand(3, 40)
    structure = autojac.probe(Blind.apply, x)
    assert "were added" in line_of(structure)
    found = structure.sparsity
    if found is not None:
        assert structure.suspect
        assert found.features is not None
        assert not (true_pattern(Blind.apply, (x,)) & ~(found.features.scipy().toarray() > 0))[:, 0].all()


def test_a_declared_pattern_must_fit_the_call() -> None:
    csr = scipy.sparse.eye_array(6, format="csr")
    check_declared(Sparsity(features=Pattern.of(csr)), batch=4, m=6, n=6)
    check_declared(Sparsity(samples=Pattern.of(csr)), batch=6, m=2, n=3)
    with pytest.raises(OptionError, match=r"features of shape \(6, 6\), but this call needs \(5, 6\)"):
        check_declared(Sparsity(features=Pattern.of(csr)), batch=4, m=5, n=6)
    with pytest.raises(OptionError, match=r"samples of shape \(6, 6\), but this call needs \(4, 4\)"):
        check_declared(Sparsity(samples=Pattern.of(csr)), batch=4, m=6, n=6)


def _neighbours(x: Tensor) -> Tensor:
    return x * x.roll(1, -1)


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": torch.sin,
    "roll": lambda x: x.roll(1, -1),
    "flip": lambda x: x.flip(-1),
    "neighbours": _neighbours,
    "half": lambda x: x[..., : (x.shape[-1] + 1) // 2],
    "every other": lambda x: x[..., ::2],
    "pad": lambda x: F.pad(x, (1, 0)),
    "twice": lambda x: torch.cat([x, x * 2], -1),
    "fold": lambda x: x.reshape(*x.shape[:-1], -1, 2).transpose(-1, -2) if x.shape[-1] % 2 == 0 else x,
    "flat": lambda x: x.flatten(1),
    "pairs": lambda x: x.flatten(1)[:, :, None].expand(-1, -1, 2).sin() * torch.tensor([1.0, 0.0]),
    "sum": lambda x: x.sum(-1, keepdim=True) if x.dim() > 2 else x,
    "softmax": lambda x: x.softmax(-1) if x.dim() > 2 else x,
    "pool": lambda x: F.max_pool1d(x.flatten(1)[:, None], 2)[:, 0] if x[0].numel() > 1 else x,
    "smooth": lambda x: F.conv1d(x.flatten(1)[:, None], torch.ones(1, 1, 3), padding=1)[:, 0],
    "relu": F.relu,
    "where": lambda x: torch.where(x > 0.5, x, x.flip(-1)),
    "pick": lambda x: x[..., [0, -1, 0]],
    "triangle": lambda x: (x.flatten(1)[:, :3, None] * x.flatten(1)[:, None, :3]).tril(),
    "matrix": lambda x: x @ torch.eye(x.shape[-1]).roll(1, 0),
}


@settings(max_examples=60)
@given(
    names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6),
    batch=st.integers(1, 3),
    size=st.integers(2, 7),
    seed=st.integers(0, 99),
)
def test_random_programs_lie_within_their_pattern(names: list[str], batch: int, size: int, seed: int) -> None:
    def func(x: Tensor) -> Tensor:
        for name in names:
            x = STEPS[name](x)
        return x

    generator = torch.Generator().manual_seed(seed)
    points = [torch.randn(batch, size, generator=generator) for _ in range(3)]
    structure = autojac.probe(func, points[0])
    assert not structure.suspect
    if structure.sparsity is None:
        return
    assert structure.sparsity.features is not None
    found = structure.sparsity.features.scipy().toarray() > 0
    for point in points:
        with torch.no_grad():
            m = func(point)[0].numel()
        assert found.shape == (m, size)
        rows = jacobian_full(func, (point,)).reshape(batch, m, batch, size)
        assert not ((rows != 0).any(2).any(0).numpy() & ~found).any()
