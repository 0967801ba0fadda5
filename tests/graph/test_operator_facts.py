"""The table of operator facts: every name exists, and no fact claims less dependence than brute force finds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autojac.graph.batch_axis.propagation import propagate_batch_axis
from autojac.graph.batch_axis.rules import RULES
from autojac.graph.batch_axis.states import BatchAxis
from autojac.graph.dependence.propagation import propagate
from autojac.graph.ir import Graph
from autojac.graph.operator_facts import OPERATORS, ROWS
from autojac.graph.operator_kinds import Axes, Kind
from autojac.graph.recorder import record

aten = torch.ops.aten
Function = Callable[[Tensor], Any]
POINTS = 3


def constant(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5


def square(x: Tensor) -> Tensor:
    """A stack of well-conditioned symmetric matrices, each made of its own entries alone."""
    return x @ x.mT + 3 * torch.eye(x.shape[-2], dtype=x.dtype)


ROWS_READ = torch.tensor([2, 0, 1, 2])
MASK = torch.tensor([True, False, True])[:, None, None].expand(3, 4, 5)
SPARSE = torch.tensor([[0.0, 1, 0], [2, 0, 0]], dtype=torch.float64).to_sparse()
CUBE, MATRIX, IMAGE, VOLUME = (3, 4, 5), (3, 4), (2, 4, 4, 3), (2, 2, 3, 4, 2)
POOLED = constant(2, 4, 8, 6)
ANY: dict[str, Function] = {
    "neg": lambda x: -x,
    "mul": lambda x: x * torch.tensor([1.0, 0, 2, 0, 3], dtype=x.dtype),
    "masked_fill": lambda x: x.masked_fill(MASK, 2.0),
    "where": lambda x: torch.where(MASK, x, x.flip(2)),
    "nan_to_num": torch.nan_to_num,
    "fmax": lambda x: aten.fmax(x, constant(4, 1)),
    "lerp": lambda x: x.lerp(constant(4, 5), 0.3),
    "addcmul": lambda x: aten.addcmul(x, x, constant(5)),
    "sub": lambda x: x - x[:, :1],
    "pow": lambda x: x**2,
    "clamp": lambda x: x.clamp(-1, 1),
    "clone": torch.clone,
    "_to_copy": lambda x: x.to(torch.float32).double(),
    "view_as_complex": lambda x: torch.view_as_real(torch.view_as_complex(x[..., :2].contiguous()) ** 2),
    "view": lambda x: x.contiguous().view(6, 10),
    "permute": lambda x: x.permute(2, 0, 1),
    "transpose": lambda x: x.transpose(0, 2),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "expand": lambda x: x.unsqueeze(1).expand(3, 2, 4, 5),
    "repeat": lambda x: x.repeat(2, 1, 2),
    "diagonal": lambda x: x.diagonal(0, 1, 2),
    "diag_embed": lambda x: x.diag_embed(0, 0, 2),
    "unfold": lambda x: x.unfold(2, 3, 2),
    "select": lambda x: x.select(1, 2),
    "slice": lambda x: x[:, 1:3],
    "cat": lambda x: torch.cat([x, x.flip(0)], 1),
    "stack": lambda x: torch.stack([x, x.flip(0)], 1),
    "constant_pad_nd": lambda x: aten.constant_pad_nd(x, [1, 2], 3.0),
    "split": lambda x: x.split(2, 1)[1],
    "split_with_sizes": lambda x: x.split([1, 3], 1)[1],
    "unbind": lambda x: x.unbind(2)[1],
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 2),
    "tril": torch.tril,
    "triu": torch.triu,
    "slice_scatter": lambda x: aten.slice_scatter(constant(3, 4, 5), x[:, 1:3], 1, 0, 2),
    "select_scatter": lambda x: x.select_scatter(x[:, 0], 1, 2),
    "diagonal_scatter": lambda x: aten.diagonal_scatter(x, x[:, 0, :4], 0, 1, 2),
    "slice_backward": lambda x: aten.slice_backward(x, [3, 9, 5], 1, 2, 6, 1),
    "select_backward": lambda x: aten.select_backward(x, [3, 4, 2, 5], 2, 1),
    "unfold_backward": lambda x: aten.unfold_backward(x, [3, 11], 1, 5, 2),
    "glu_backward": lambda x: aten.glu_backward(x, constant(3, 8, 5), 1),
    "_prelu_kernel_backward": lambda x: aten._prelu_kernel_backward(x, constant(3, 4, 5) - 1, constant(4, 1))[0],
    "index_select": lambda x: x.index_select(0, ROWS_READ),
    "gather": lambda x: x.gather(1, torch.tensor([[[3, 0, 1, 2, 2]], [[0, 0, 0, 1, 1]], [[3, 3, 3, 2, 0]]])),
    "take": lambda x: x.take(torch.tensor([[7, 0], [59, 3]])),
    "index": lambda x: x[:, ROWS_READ],
    "masked_select": lambda x: x.masked_select(MASK),
    "scatter": lambda x: x.scatter(0, torch.tensor([[[2, 0, 1, 1, 0]]]), x[1:2, 1:2]),
    "scatter_add": lambda x: x.scatter_add(0, torch.tensor([[[2, 0, 1, 1, 0]]]), x[1:2, 1:2]),
    "scatter_reduce": lambda x: x.scatter_reduce(0, torch.tensor([[[2, 0, 1, 1, 0]]]), x[1:2, 1:2], "sum"),
    "index_add": lambda x: x.index_add(0, torch.tensor([1, 0, 0]), x.flip(0)),
    "index_copy": lambda x: x.index_copy(0, torch.tensor([1]), x[2:]),
    "index_reduce": lambda x: x.index_reduce(0, torch.tensor([1, 0, 0]), x, "mean"),
    "index_put": lambda x: x.index_put((torch.tensor([1, 2]),), x[:2]),
    "masked_scatter": lambda x: x.masked_scatter(MASK, x.flip(0)),
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean((0, 2), keepdim=True),
    "var_mean": lambda x: torch.var_mean(x, 2),
    "logsumexp": lambda x: x.logsumexp(1),
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, 2, 1),
    "prod": lambda x: x.prod(1),
    "amax": lambda x: x.amax(2),
    "max": lambda x: x.max(1)[0],
    "median": lambda x: x.median(1)[0],
    "kthvalue": lambda x: x.kthvalue(2, 1)[0],
    "aminmax": lambda x: torch.aminmax(x, dim=1)[1],
    "cumsum": lambda x: x.cumsum(1),
    "cumprod": lambda x: x.cumprod(0),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "cummax": lambda x: x.cummax(1)[0],
    "_softmax": lambda x: x.softmax(1),
    "_safe_softmax": lambda x: aten._safe_softmax(x, 1),
    "_log_softmax": lambda x: x.log_softmax(2),
    "sort": lambda x: x.sort(1)[0],
    "topk": lambda x: x.topk(2, 2)[0],
    "glu": lambda x: aten.glu(x, 1),
    "_fft_r2c": lambda x: torch.view_as_real(torch.fft.rfft(x, dim=1)),
    "_softmax_backward_data": lambda x: aten._softmax_backward_data(x, constant(*x.shape), 1, x.dtype),
    "linalg_cross": lambda x: torch.linalg.cross(x, x.flip(1), dim=0),
    "linalg_inv_ex": lambda x: torch.linalg.inv(square(x)),
    "linalg_cholesky_ex": lambda x: torch.linalg.cholesky(square(x)),
    "_linalg_det": lambda x: torch.linalg.det(square(x)),
    "_linalg_slogdet": lambda x: torch.linalg.slogdet(square(x))[1],
    "_linalg_eigh": lambda x: torch.linalg.eigvalsh(square(x)),
    "linalg_lu_factor_ex": lambda x: torch.linalg.lu_factor(square(x))[0],
    "linalg_matrix_exp": lambda x: torch.linalg.matrix_exp(square(x) / 9),
    "_linalg_solve_ex": lambda x: torch.linalg.solve(square(x), x),
    "bmm": lambda x: torch.bmm(x, constant(3, 5, 2)),
    "baddbmm": lambda x: torch.baddbmm(x[:, :, :2], x, constant(3, 5, 2)),
    "native_layer_norm": lambda x: torch.layer_norm(x, [5], constant(5)),
    "native_group_norm": lambda x: torch.group_norm(x, 2, constant(4)),
    "native_layer_norm_backward": lambda x: aten.native_layer_norm_backward(
        *(x, constant(3, 4, 5), [5], constant(3, 4, 1), constant(3, 4, 1), constant(5), None, [True, False, False])
    )[0],
    "native_group_norm_backward": lambda x: aten.native_group_norm_backward(
        *(x, constant(*x.shape), constant(len(x), 1), constant(len(x), 1)),
        *(None, len(x), x.shape[1], x.shape[2], 1, [True, False, False]),
    )[0],
    "native_batch_norm_backward": lambda x: aten.native_batch_norm_backward(
        *(x, constant(*x.shape), None, None, None),
        *(constant(x.shape[1]), constant(x.shape[1]), True, 1e-5, [True, False, False]),
    )[0],
    "_cdist_forward": lambda x: aten._cdist_forward(x, constant(3, 2, 5), 2.0, None),
    "reflection_pad1d": lambda x: aten.reflection_pad1d(x, [1, 2]),
    "replication_pad1d": lambda x: aten.replication_pad1d(x, [1, 2]),
    "upsample_nearest1d": lambda x: aten.upsample_nearest1d(x, [8]),
    "upsample_linear1d": lambda x: aten.upsample_linear1d(x, [8], False),
}
"""Called on a tensor of shape (3, 4, 5)."""
MATRICES: dict[str, Function] = {
    "t": torch.t,
    "mm": lambda x: x @ torch.tensor([[1.0, 0], [0, 2], [0, 0], [3, 0]], dtype=x.dtype),
    "addmm": lambda x: torch.addmm(x[:, :2], x, constant(4, 2)),
    "mv": lambda x: torch.mv(x, constant(4)),
    "addmv": lambda x: torch.addmv(x[:, 0], x, constant(4)),
    "dot": lambda x: torch.dot(x[:, 0], constant(3)),
    "_sparse_addmm": lambda x: aten._sparse_addmm(x[:2], SPARSE, x),
    "embedding": lambda x: torch.embedding(x, ROWS_READ),
    "_euclidean_dist": lambda x: aten._euclidean_dist(x, x.flip(0) + 3),
}
"""Called on a tensor of shape (3, 4)."""
IMAGES: dict[str, Function] = {
    "convolution": lambda x: torch.conv2d(x, constant(6, 2, 2, 3), padding=1, groups=2),
    "avg_pool2d": lambda x: aten.avg_pool2d(x, [2, 3], [1, 2], [1, 1]),
    "max_pool2d_with_indices": lambda x: aten.max_pool2d_with_indices(x, [2], [2])[0],
    "_adaptive_avg_pool2d": lambda x: aten._adaptive_avg_pool2d(x, [3, 2]),
    "adaptive_max_pool2d": lambda x: aten.adaptive_max_pool2d(x, [3, 5])[0],
    "reflection_pad2d": lambda x: aten.reflection_pad2d(x, [1, 2, 0, 1]),
    "replication_pad2d": lambda x: aten.replication_pad2d(x, [1, 2, 0, 1]),
    "upsample_nearest2d": lambda x: aten.upsample_nearest2d(x, [9, 5]),
    "upsample_bilinear2d": lambda x: aten.upsample_bilinear2d(x, [8, 7], False),
    "upsample_bicubic2d": lambda x: aten.upsample_bicubic2d(x, [8, 7], False),
    "pixel_shuffle": lambda x: torch.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: torch.pixel_unshuffle(x[..., :2], 2),
    "im2col": lambda x: aten.im2col(x, [2, 2], [1, 1], [0, 0], [2, 1]),
    "col2im": lambda x: aten.col2im(x.reshape(2, 4, 12), [4, 5], [2, 2], [1, 1], [0, 0], [1, 1]),
    "grid_sampler_2d": lambda x: aten.grid_sampler_2d(x, constant(2, 3, 3, 2) - 1, 0, 0, False),
    "convolution_backward": lambda x: aten.convolution_backward(
        *(x, constant(2, 3, 5, 5), constant(4, 3, 2, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        [True, False, False],
    )[0],
    "avg_pool2d_backward": lambda x: aten.avg_pool2d_backward(
        x, constant(2, 4, 8, 6), [2, 2], [2, 2], [0, 0], False, True, None
    ),
    "max_pool2d_with_indices_backward": lambda x: aten.max_pool2d_with_indices_backward(
        *(x, POOLED, [2, 2], [2, 2], [0, 0], [1, 1], False, aten.max_pool2d_with_indices(POOLED, [2, 2])[1])
    ),
    "_adaptive_avg_pool2d_backward": lambda x: aten._adaptive_avg_pool2d_backward(x, POOLED),
    "upsample_nearest2d_backward": lambda x: aten.upsample_nearest2d_backward(x, [4, 3], [2, 4, 2, 2]),
    "upsample_bilinear2d_backward": lambda x: aten.upsample_bilinear2d_backward(x, [4, 3], [2, 4, 2, 2], False),
    "_scaled_dot_product_flash_attention_for_cpu": lambda x: aten._scaled_dot_product_flash_attention_for_cpu(
        x, x.flip(2), x.flip(3)
    )[0],
}
"""Called on a tensor of shape (2, 4, 4, 3)."""
VOLUMES: dict[str, Function] = {
    "avg_pool3d": lambda x: aten.avg_pool3d(x, [2, 2, 2], [1, 2, 2]),
    "max_pool3d_with_indices": lambda x: aten.max_pool3d_with_indices(x, [2, 2, 2])[0],
    "_adaptive_avg_pool3d": lambda x: aten._adaptive_avg_pool3d(x, [2, 3, 1]),
    "adaptive_max_pool3d": lambda x: aten.adaptive_max_pool3d(x, [2, 3, 1])[0],
    "reflection_pad3d": lambda x: aten.reflection_pad3d(x, [1, 1, 0, 1, 1, 0]),
    "replication_pad3d": lambda x: aten.replication_pad3d(x, [1, 1, 0, 1, 1, 0]),
    "upsample_nearest3d": lambda x: aten.upsample_nearest3d(x, [4, 3, 5]),
    "upsample_trilinear3d": lambda x: aten.upsample_trilinear3d(x, [3, 6, 4], True),
    "grid_sampler_3d": lambda x: aten.grid_sampler_3d(x, constant(2, 2, 2, 2, 3) - 1, 0, 0, False),
}
"""Called on a tensor of shape (2, 2, 3, 4, 2)."""
CASES: dict[str, tuple[tuple[int, ...], Function]] = {
    **{name: (CUBE, function) for name, function in ANY.items()},
    **{name: (MATRIX, function) for name, function in MATRICES.items()},
    **{name: (IMAGE, function) for name, function in IMAGES.items()},
    **{name: (VOLUME, function) for name, function in VOLUMES.items()},
}


def recorded(function: Function, x: Tensor) -> Graph:
    graph = record(lambda leaves, kwargs: (_first(function(leaves[0])),), [x], {}, (0,)).graph
    assert graph is not None
    return graph


def _first(made: Any) -> Tensor:
    return made if isinstance(made, Tensor) else made[0]


@functools.cache
def truly(function: Function, shape: tuple[int, ...]) -> Tensor:
    """Where the Jacobian is other than zero at one of some random points, (outputs, inputs)."""
    found = []
    for seed in range(POINTS):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
        found.append(_truly_at(function, x))
    return torch.stack(found).any(0)


def _truly_at(function: Function, x: Tensor) -> Tensor:
    y = _first(function(x))
    try:
        rows = [torch.autograd.grad(part, x, retain_graph=True)[0].reshape(-1) for part in y.reshape(-1)]
    except RuntimeError as error:
        if "derivative for aten::" not in str(error):
            raise
        # torch 2.11 does not differentiate aminmax
        steps = 1e-6 * torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
        rows = [(_first(function(x.detach() + step)) - y.detach()).reshape(-1) for step in steps]
        return torch.stack(rows, 1) != 0
    return torch.stack(rows) != 0


def told(graph: Graph, shape: tuple[int, ...], follow_values: bool = False) -> Tensor:
    """Where the graph's output may depend on its argument, (outputs, inputs)."""
    count = int(torch.tensor(shape).prod())
    numbers = torch.arange(count).reshape(shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (sets,) = propagate(graph, [x], [numbers], count, follow_values=follow_values).outputs()
    return torch.from_numpy(sets.rows(graph.shapes[graph.outputs[0]]).toarray())


def test_every_name_exists_in_torch() -> None:
    assert [name for name in OPERATORS if not hasattr(aten, name)] == []


def test_no_operator_has_two_rows() -> None:
    assert len(OPERATORS) == sum(len(names.split()) for names, _ in ROWS)


def test_what_has_a_rule_of_its_own_and_its_row_agree() -> None:
    assert {key for key in RULES if isinstance(key, str)} == {n for n, f in OPERATORS.items() if f.axes is Axes.OWN}
    assert {key for key in RULES if isinstance(key, Axes)} == set(Axes) - {Axes.OWN, Axes.UNKNOWN}


def test_arguments_that_rows_name_are_in_the_schemas() -> None:
    for name, facts in OPERATORS.items():
        packet = getattr(aten, name)
        known = {a.name for overload in packet.overloads() for a in getattr(packet, overload)._schema.arguments}
        along = [facts.along] if isinstance(facts.along, str) else []
        roles = [*facts.selectors, *facts.fillers, *(facts.factors or ()), *along]
        assert {part for part in (*roles, facts.source, facts.addend, facts.batch_size) if part} <= known, name


def test_each_kind_has_a_case() -> None:
    kinds = {OPERATORS[name].kind for name in CASES}
    assert kinds >= set(Kind) - {Kind.FACTORY, Kind.SIZES}
    assert {OPERATORS[name].axes for name in CASES} == set(Axes)


@pytest.mark.by_day(2)
@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta")
@pytest.mark.parametrize("name", CASES)
def test_dependence_holds_every_entry_of_the_jacobian(name: str) -> None:
    shape, function = CASES[name]
    graph = recorded(function, torch.randn(shape, dtype=torch.float64))
    assert name in {operation.name for operation in graph.operations} or name.endswith("softmax")
    missed = truly(function, shape) & ~told(graph, shape)
    assert not bool(missed.any())
    # what has a derivative has a value
    assert not bool((truly(function, shape) & ~told(graph, shape, follow_values=True)).any())


@pytest.mark.by_day(2)
@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta")
@pytest.mark.parametrize("name", CASES)
def test_the_batch_is_where_the_rules_say(name: str) -> None:
    shape, function = CASES[name]
    for axis, batch in enumerate(shape):
        front = (batch, *shape[:axis], *shape[axis + 1 :])
        moved: Function = lambda x, axis=axis: function(x.movedim(0, axis))  # type: ignore[misc]  # noqa: E731
        x = torch.randn(front, dtype=torch.float64)
        graph = recorded(moved, x)
        flow = propagate_batch_axis(graph, batch, [True])
        state = flow.states[graph.outputs[0]]
        out = graph.shapes[graph.outputs[0]]
        # (outputs, samples)
        reads = truly(function, shape).unflatten(1, shape).movedim(axis + 1, 1).flatten(2).any(-1)
        if isinstance(state, BatchAxis) and graph.outputs[0] in flow.pure:
            slices = torch.arange(out[state.axis]) // state.inner % batch
            owner = slices.reshape(-1, *[1] * (len(out) - 1 - state.axis)).expand(out).reshape(-1)
            assert not bool((reads & (owner[:, None] != torch.arange(batch))).any()), (axis, state)
        if out and out[0] == batch:
            own = torch.arange(batch).reshape(batch, *[1] * (x.dim() - 1))
            samples = propagate(graph, [x], [own], batch, follow_values=True).samples()
            assert samples is not None
            missed = reads.reshape(batch, -1, batch).any(1) & ~torch.from_numpy(samples.toarray())
            assert not bool(missed.any()), axis


@pytest.mark.parametrize(
    "name", ["reflection_pad3d", "replication_pad3d", "upsample_trilinear3d", "upsample_nearest3d"]
)
def test_volumes_keep_the_batch_in_front(name: str) -> None:
    shape, function = CASES[name]
    graph = recorded(function, torch.randn(shape, dtype=torch.float64))
    assert propagate_batch_axis(graph, shape[0], [True]).independent


def test_padding_with_ones_does_not_count_as_zero() -> None:
    weight = torch.nn.Parameter(constant(3))
    mask = torch.tensor([1.0, 0, 1], dtype=torch.float64)
    function: Function = lambda x: x * torch.nn.functional.pad(mask * weight, (1, 1), value=1.0)  # noqa: E731
    graph = recorded(function, torch.randn(2, 5, dtype=torch.float64))
    found = told(graph, (2, 5))
    assert not bool((truly(function, (2, 5)) & ~found).any())
    assert found.sum() == 8


LAYOUTS: dict[str, Function] = {
    "turned": lambda x: x.mT.contiguous().mT,
    "repeated in front": lambda x: x[:1].expand_as(x),
    "repeated behind": lambda x: x[..., :1].expand_as(x),
    "every other entry": lambda x: torch.stack([x, x + 1], -1)[..., 0],
}
LAYOUT_CASES = {name: case for name, case in CASES.items() if OPERATORS[name].any_layout} | {
    "mish_backward": (CUBE, lambda x: aten.mish_backward(x, x.flip(0))),
    "hardswish_backward": (CUBE, lambda x: aten.hardswish_backward(x.flip(0), x)),
    "hardsigmoid_backward": (CUBE, lambda x: aten.hardsigmoid_backward(x.flip(0), x)),
    "any": (CUBE, lambda x: (x > 0).any(1)),
    "all": (CUBE, lambda x: (x > 0).all(1)),
    "amin": (CUBE, lambda x: x.amin((0, 1))),
    "reshape": (CUBE, lambda x: aten.reshape(x, [5, 12])),
}


def test_each_operator_that_takes_any_layout_has_a_case() -> None:
    assert LAYOUT_CASES.keys() == {name for name, facts in OPERATORS.items() if facts.any_layout}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_layouts_make_no_difference(name: str, layout: str) -> None:
    shape, function = LAYOUT_CASES[name]
    x = LAYOUTS[layout](torch.randn(shape, dtype=torch.float64))
    torch.testing.assert_close(_first(function(x)), _first(function(x.contiguous())))


def test_fresh_memory_holds_nothing_of_what_it_is_made_like() -> None:
    x, y = torch.randn(2, 3), torch.full((2, 3), torch.nan)
    names = {name for name, facts in OPERATORS.items() if facts.kind is Kind.FACTORY}
    for name in sorted(name for name in names if "empty" not in name):
        arguments: Any = ([2, 3],) if name.startswith("new_") or name in ("zeros", "ones", "full") else ()
        arguments += (7.0,) if "full" in name else ()
        made = [
            getattr(aten, name)(
                *([] if name in ("zeros", "ones", "full") else [z]), *([x] if name[0] == "_" else []), *arguments
            )
            for z in (x, y)
        ]
        assert torch.equal(*made), name
        assert not {made[0].untyped_storage()._cdata} & {x.untyped_storage()._cdata, made[1].untyped_storage()._cdata}
