"""Simplified graphs compute what was recorded, for other inputs as well, in fewer steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from autojac.methods.base import build
from autojac.replay import tracer
from autojac.replay.codegen import emit
from autojac.replay.overwriting import find_overwritable
from autojac.replay.passes import passes, simplify
from autojac.replay.passes.node_facts import has_entries, layout_of, shares
from autojac.replay.tape import Tape
from harness import compare, planned

aten = torch.ops.aten
NAMES = sorted(passes())
Step = tuple[str, int, int, int]
Pool = list[Tensor]
SEED = torch.eye(4, dtype=torch.float64)
"""A tensor that no operator of a program has made and that none writes into."""


def fresh(value: Tensor) -> Tensor:
    return value.sin().clone()


def matrix(value: Tensor) -> Tensor:
    return value.reshape(1, -1) if value.dim() < 2 else value.flatten(0, -2)


def one_hot(a: int, b: int, size: int) -> Tensor:
    """Seeds of many kinds: the same for all rows, one after the other, sample by sample, some of them, not one-hot."""
    eye = torch.eye(size, dtype=torch.float64)
    kinds = (
        lambda: eye[a % size].expand(2 + b % 3, size),
        lambda: eye.view(size, 1, size).expand(size, 1 + b % 3, size).reshape(-1, size),
        lambda: eye.expand(1 + b % 3, size, size).reshape(-1, size),
        lambda: eye[a % size :],
        lambda: eye.flip(0),
        lambda: 2.0 * eye,
        lambda: eye,
        lambda: torch.ones(2, size, dtype=torch.float64),
    )
    return kinds[a % len(kinds)]()


def seeded(x: Tensor, a: int, b: int) -> Tensor:
    m = matrix(x)
    return one_hot(a, b, m.size(0)) @ m if a % 2 else m @ one_hot(b, a, m.size(1)).T


def batched(x: Tensor, a: int, b: int) -> Tensor:
    m = matrix(x)[:4]
    seeds, many = SEED[:, : m.size(0)][: m.size(0)], m.size(0)
    if a % 3 == 0:
        return torch.bmm(seeds.view(many, 1, many).expand(many, 2 + b % 2, many), m.expand(many, *m.shape))
    if a % 3 == 1:
        return torch.bmm(seeds.expand(3, many, many), torch.stack([m, 2 * m, m.cos()]))
    return torch.bmm(m.expand(2, *m.shape), m.T.expand(2, *m.T.shape))


def written(x: Tensor, a: int, b: int) -> Tensor:
    """In place into an intermediate result, through a view, before and after it is read."""
    own = x.clone()
    before = own * 2
    part = own.select(0, a % own.size(0)) if own.dim() else own
    part.add_(1 + b % 3)
    return own + before if b % 2 else own


def assembled(x: Tensor, a: int, b: int) -> Tensor:
    room = x.new_empty(2 + a % 2, *x.shape) if b % 2 else x.new_zeros(2 + a % 2, *x.shape)
    for place in range(room.size(0)):
        room[place : place + 1].copy_((x + place).unsqueeze(0))
    return room


def diagonal(x: Tensor, a: int, b: int) -> Tensor:
    if not x.dim():
        return x
    many = x.size(-1)
    eye = torch.eye(many, dtype=torch.float64)
    rows = x.reshape(-1, many)
    return (eye.view(many, 1, many) * rows if a % 2 else eye * rows.unsqueeze(1)) * (1 if b % 2 else 2)


def pulled(x: Tensor, a: int, b: int) -> Tensor:
    """What a method does: seeds that are pulled back all at once, or one by one."""
    m = matrix(x).cos()
    weight = (m.T @ m)[: 1 + a % 3]
    many = weight.size(0)
    pull = torch.func.vjp(lambda v: nn.functional.linear(v, weight, weight[:, 0]).tanh(), m)[1]
    seeds = torch.eye(many, dtype=x.dtype).view(many, 1, many).expand(many, m.size(0), many)
    if b % 2:
        return torch.stack([pull(seed)[0] for seed in seeds], 1)
    return torch.vmap(lambda seed: pull(seed)[0])(seeds).movedim(0, 1)


def pushed(x: Tensor, a: int, b: int) -> Tensor:
    m = matrix(x).cos()
    weight = (m.T @ m)[: 1 + a % 3]
    many = m.size(1)
    seeds = torch.eye(many, dtype=x.dtype).view(many, 1, many).expand(many, m.size(0), many)

    def push(seed: Tensor) -> Tensor:
        tangent: Tensor = torch.func.jvp(lambda v: nn.functional.linear(v, weight, weight[:, 0]).sin(), (m,), (seed,))[
            1
        ]
        return tangent

    return torch.vmap(push, chunk_size=1 if b % 2 else None)(seeds)


ACTIVATIONS = (
    nn.functional.silu,
    nn.functional.gelu,
    nn.functional.mish,
    nn.functional.softplus,
    nn.functional.elu,
    nn.functional.logsigmoid,
)


def activated(x: Tensor, a: int, b: int) -> Tensor:
    """Cotangents that meet one slope, all at once or one by one."""
    activation = ACTIVATIONS[a % len(ACTIVATIONS)]
    pull = torch.func.vjp(activation, x)[1]
    cotangents = torch.stack([x.cos(), 2 * x, x])
    if b % 2 or activation is nn.functional.mish:  # which torch can't batch
        return torch.stack([pull(one)[0] for one in cotangents])
    return torch.vmap(lambda one: pull(one)[0])(cotangents)


def paired(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    try:
        torch.broadcast_shapes(x.shape, y.shape)
    except RuntimeError:
        return x, x
    return x, y


def sloped(x: Tensor, y: Tensor, a: int) -> Tensor:
    """What a derivative of a derivative adds up: a product with a number in it."""
    inner = aten.mul.Scalar(x.cos(), -2) * y.tanh() if a % 2 else (x.cos() * -2.0)
    return y.sin() + x.tanh() * inner if a % 3 else inner * x.tanh() + y.sin()


def permuted(x: Tensor, a: int) -> Tensor:
    axes = list(range(x.dim()))
    first = a % max(1, len(axes))
    return x.permute([*axes[first:], *axes[:first]])


UNARY: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "sin": lambda x, a, b: x.sin(),
    "tanh": lambda x, a, b: x.tanh(),
    "relu": lambda x, a, b: x.relu(),
    "once": lambda x, a, b: x * 1.0,
    "plus zero": lambda x, a, b: x + 0,
    "ones": lambda x, a, b: x * torch.ones(x.shape, dtype=x.dtype),
    "zeros": lambda x, a, b: x + torch.zeros(2, *x.shape, dtype=x.dtype),
    "nothing": lambda x, a, b: x * torch.zeros(x.shape, dtype=x.dtype),
    "kept": lambda x, a, b: x * torch.tensor(1.0 + a, dtype=x.dtype),
    "clone": lambda x, a, b: x.clone(),
    "contiguous": lambda x, a, b: x.contiguous(),
    "detach": lambda x, a, b: x.detach(),
    "t": lambda x, a, b: matrix(x).t().t() if b % 2 else matrix(x).t(),
    "permute": lambda x, a, b: permuted(x, a),
    "unsqueeze": lambda x, a, b: x.unsqueeze(a % (x.dim() + 1)),
    "squeeze": lambda x, a, b: x.squeeze(),
    "flatten": lambda x, a, b: x.flatten(),
    "matrix": lambda x, a, b: matrix(x),
    "pairs": lambda x, a, b: x.reshape(2, -1) if x.numel() % 2 == 0 else x,
    "expand": lambda x, a, b: x.expand(1 + a % 3, *x.shape),
    "middle": lambda x, a, b: x.unsqueeze(0).expand(2, *x.shape).transpose(0, -1),
    "select": lambda x, a, b: x.select(b % x.dim(), a % x.size(b % x.dim())) if x.dim() else x,
    "slice": lambda x, a, b: x[a % x.size(0) :] if x.dim() else x,
    "strided": lambda x, a, b: x[..., ::2] if x.dim() else x,
    "split": lambda x, a, b: x.split(1 + a % 2, 0)[-1] if x.dim() else x,
    "unbind": lambda x, a, b: x.unbind(0)[0] * x.unbind(0)[-1] if x.dim() else x,
    "placed": lambda x, a, b: x.clone().as_strided((max(1, x.numel() // 2),), (1,), 0),
    "sum": lambda x, a, b: x.sum(a % x.dim(), keepdim=bool(b % 2)) if x.dim() else x,
    "amax": lambda x, a, b: x.amax(a % x.dim()) if x.dim() else x,
    "softmax": lambda x, a, b: x.softmax(-1) if x.dim() else x,
    "normed": lambda x, a, b: nn.functional.layer_norm(x, x.shape[-1:]) if x.dim() else x,
    "stack": lambda x, a, b: torch.stack([x, x.cos()], a % (x.dim() + 1)),
    "cat": lambda x, a, b: torch.cat(
        [x.unsqueeze(a % (x.dim() + 1)), x.cos().unsqueeze(a % (x.dim() + 1))], a % (x.dim() + 1)
    ),
    "rows": lambda x, a, b: torch.cat([x.unsqueeze(0), x.cos().unsqueeze(0)]).movedim(0, a % (x.dim() + 1)),
    "seeded": seeded,
    "batched": batched,
    "written": written,
    "assembled": assembled,
    "diagonal": diagonal,
    "pulled": pulled,
    "pushed": pushed,
    "activated": activated,
    "skipped": lambda x, a, b: (x.cos() + x.sin() @ (matrix(x).T @ matrix(x)).tanh()).tanh() if x.dim() > 1 else x,
    "scaled": lambda x, a, b: torch.stack([x.cos(), 2 * x]) * x * x.sin() if a % 2 else (x * x.expand(2, *x.shape)) * x,
    "scattered": lambda x, a, b: (
        x.new_zeros(5, *x.shape[1:]).index_copy(0, torch.arange(x.size(0)) + 1, x)
        if x.dim() > 0 and x.size(0) < 5
        else x
    ),
    "arange": lambda x, a, b: x + torch.arange(x.size(-1), dtype=x.dtype) if x.dim() else x,
    "index": lambda x, a, b: x[torch.arange(x.size(0)).flip(0)] if x.dim() else x,
    "noise": lambda x, a, b: x + torch.rand_like(x),
    "dropout": lambda x, a, b: nn.functional.dropout(x, 0.5),
    "empty like": lambda x, a, b: torch.zeros_like(x).add_(x.cos()),
    # bounded, since a sine of what is large is all rounding
    "biased": lambda x, a, b: (matrix(x)[:, 0] + matrix(x) @ matrix(x).T).tanh(),
    "vector": lambda x, a, b: (matrix(x)[0] + (matrix(x) @ matrix(x).T @ matrix(x)).unsqueeze(1)).tanh(),
}
BINARY: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "add": lambda x, y, a: torch.add(*paired(x, y)),
    "mul": lambda x, y, a: torch.mul(*paired(x, y)),
    "sub": lambda x, y, a: torch.sub(*paired(x, y), alpha=1 + a % 2),
    "slope": lambda x, y, a: sloped(*paired(x, y), a),
    "tanh_backward": lambda x, y, a: aten.tanh_backward(*paired(x, y.tanh())),
    "where": lambda x, y, a: torch.where(paired(x, y)[1] > 0, *paired(x, y)),
    "mm": lambda x, y, a: (matrix(x) @ (matrix(y) if matrix(y).size(0) == matrix(x).size(1) else matrix(x).T)).tanh(),
    "into": lambda x, y, a: fresh(x).copy_(
        y if torch.broadcast_shapes(x.shape, paired(x, y)[1].shape) == x.shape and y.shape == x.shape else x
    ),
}


def ran(program: Sequence[Step], inputs: Sequence[Tensor], held: Sequence[Tensor], half: Callable[[], None]) -> Pool:
    """Run a program: each step takes tensors that are there by then and adds one."""
    pool = [*inputs, *held]
    torch.manual_seed(0)
    for place, (name, a, b, c) in enumerate(program):
        if place == len(program) // 2:
            half()
        x, y = pool[-1 - a % min(3, len(pool))], pool[b % len(pool)]
        if name == "hold":
            held[0].mul_(0.5).add_(x.mean())
            made = held[0] * 2
        elif name in UNARY:
            made = UNARY[name](x, b, c)
        else:
            made = BINARY[name](x, y, c)
        pool.append(made if 0 < made.numel() <= 600 and made.dim() <= 5 else x)
    return [*pool[-2:], pool[len(inputs) + len(held) + len(program) // 3]]


def recorded(program: Sequence[Step]) -> tuple[Tape, list[fx.Node], list[fx.Node]]:
    inputs, held = drawn(1)
    tape = Tape(inputs, held, 2**30)

    def half() -> None:
        tape.phase = 1

    with torch.no_grad(), tape:
        outputs = ran(program, inputs, held, half)
    assert not tape.reason
    nodes = [tape.node(y) for y in outputs]
    output = tape.graph.output(tuple(nodes))
    output.meta = {"role": "output", "order": len(tape.graph.nodes), "writes": frozenset(), "draws": False}
    for node in tape.graph.nodes:
        if node.meta["role"] == "unknown":
            node.meta["role"] = "constant"
    return tape, [tape.node(x) for x in inputs], [tape.node(x) for x in held]


def drawn(seed: int) -> tuple[Pool, Pool]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 2), (2,), (4, 1, 2)), ((2, 3), (4,))
    inputs, held = (
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in group] for group in shapes
    )
    return inputs, held


def checked(program: Sequence[Step], left_out: Sequence[str]) -> None:
    tape, inputs, held = recorded(program)
    graph = tape.graph
    simplify(graph, left_out)
    graph.lint()
    *_, last = graph.nodes
    outputs: Any = last.args[0]
    for node in graph.nodes:
        if node.op == "call_function":
            assert all(source.meta["phase"] <= node.meta["phase"] for source in node.all_input_nodes)
            assert {"role", "value", "storage", "order", "phase", "writes", "draws"} <= set(node.meta)
    operators = [node for node in graph.nodes if node.op == "call_function"]
    described(graph, dict(zip((*inputs, *held), (x for group in drawn(1) for x in group), strict=True)))
    run = emit([*inputs, *held], outputs, operators, below=True)
    for seed in (1, 2):
        ours, theirs = drawn(seed), drawn(seed)
        with torch.no_grad():
            expected = ran(program, *theirs, lambda: None)
            drawn_after = torch.rand(1)
            torch.manual_seed(0)
            found = run(*ours[0], *ours[1])
            # what draws is not left out
            assert torch.equal(torch.rand(1), drawn_after)
        for one, other in zip((*found, *ours[0], *ours[1]), (*expected, *theirs[0], *theirs[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, equal_nan=True)
            assert one.is_contiguous() or not other.is_contiguous()


def described(graph: fx.Graph, known: dict[fx.Node, Any]) -> None:
    """What nodes say of themselves is so: how they lie in memory, and what else is there."""
    for node in graph.nodes:
        if node.op == "placeholder":
            known.setdefault(node, node.meta["value"])
        if node.op != "call_function":
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        with torch.no_grad():
            known[node] = made = node.target(*args, **kwargs)
        said = node.meta["value"]
        if isinstance(made, Tensor) and isinstance(said, Tensor) and not node.meta["writes"]:
            # without elements strides say nothing
            assert layout_of(made) == layout_of(said) or (made.shape == said.shape and not made.numel()), node
            for source in node.all_input_nodes:
                if has_entries(node) and has_entries(source) and known[source].numel():
                    together = made.untyped_storage()._cdata == known[source].untyped_storage()._cdata
                    assert together == (node.meta["storage"] == source.meta["storage"]), node


steps = st.tuples(st.sampled_from([*UNARY, *BINARY, "hold"]), *(st.integers(0, 7) for _ in range(3)))
programs = st.lists(steps, min_size=1, max_size=14)


@settings(max_examples=80)
@given(programs)
def test_all_passes_leave_the_results_as_they_are(program: list[Step]) -> None:
    checked(program, ())


@pytest.mark.by_day(4)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(programs)
def test_each_pass_alone_leaves_the_results_as_they_are(name: str, program: list[Step]) -> None:
    checked(program, [other for other in NAMES if other != name])


@pytest.mark.by_day(2, 1)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(programs)
def test_all_passes_but_one_leave_the_results_as_they_are(name: str, program: list[Step]) -> None:
    checked(program, [name])


def test_the_step_of_an_axis_that_is_spread_later_counts() -> None:
    program: list[Step] = [("pairs", 0, 0, 0), ("pulled", 0, 0, 0), ("unsqueeze", 1, 1, 0), ("add", 2, 2, 0)]
    program[2:2], program[-1:-1] = [("sin", 0, 0, 0)], [("sin", 0, 0, 0)] * 2
    for left_out in ((), ("unbatch_loops",)):
        checked(program, left_out)


def simplified(func: Callable[..., Any], *inputs: Tensor) -> tuple[fx.Graph, Callable[..., tuple[Tensor, ...]]]:
    """The graph of a function and what runs it."""
    tape = Tape(inputs, (), 2**30)
    with torch.no_grad(), tape:
        made = func(*inputs)
    output = tape.graph.output(tuple(tape.node(y) for y in made))
    output.meta = {"role": "output", "order": len(tape.graph.nodes), "writes": frozenset(), "draws": False}
    given = [tape.node(x) for x in inputs]
    simplify(tape.graph)
    operators = [node for node in tape.graph.nodes if node.op == "call_function"]
    return tape.graph, emit(given, output.args[0], operators, below=True)  # type: ignore[arg-type]


def left(graph: fx.Graph) -> list[str]:
    return [str(node.target).removeprefix("aten.") for node in graph.nodes if node.op == "call_function"]


def test_a_pass_that_there_is_not_can_not_be_left_out() -> None:
    with pytest.raises(KeyError, match="nothing like it"):
        simplify(fx.Graph(), ["nothing like it"])


def test_equal_operators_run_once_and_like_ones_each() -> None:
    def func(x: Tensor) -> tuple[Tensor, ...]:
        return (
            x + 2,
            x + 2.0,
            x + 2,
            x * 0.0,
            x * -0.0,
            (x > 0) + 1,
            (x > 0) + True,
        )

    x = torch.tensor([1, -2])
    graph, run = simplified(func, x)
    for one, other in zip(run(x), func(x), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert torch.equal(one.signbit(), other.signbit())
    assert sorted(left(graph)) == ["add.Tensor"] * 4 + ["gt.Scalar"] + ["mul.Tensor"] * 2


def test_what_draws_is_not_merged_and_not_left_out() -> None:
    graph, run = simplified(lambda x: (torch.rand_like(x), torch.rand_like(x)), torch.zeros(3))
    assert left(graph) == ["rand_like.default"] * 2
    one, other = run(torch.zeros(3))
    assert not torch.equal(one, other)


def test_parts_without_entries_are_not_put_together() -> None:
    def func(x: Tensor) -> tuple[Tensor, ...]:
        cache = x.new_empty(0)
        return torch.cat([cache, x], 1).sin(), torch.cat([x.cos(), cache, x.exp()], -1), torch.cat([cache, x.cos()])

    x = torch.randn(2, 1, 3)
    graph, run = simplified(func, x)
    assert all(len(node.all_input_nodes) == 2 for node in graph.nodes if node.target is torch.ops.aten.cat.default)
    for found, expected in zip(run(x), func(x), strict=True):
        assert torch.equal(found, expected)


def test_what_is_not_finite_stays_so() -> None:
    def func(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        zeros = torch.zeros(2, 2)
        return x * 0, x * torch.zeros(2), x + torch.zeros(2), x * 1, x - x, zeros @ w, w @ zeros, w * zeros

    x, w = torch.tensor([[float("inf"), 1.0], [float("nan"), -0.0]]), torch.full((2, 2), float("inf"))
    _, run = simplified(func, torch.ones(2, 2), torch.ones(2, 2))
    for one, other in zip(run(x, w), func(x, w), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_rows_in_the_place_of_products_with_seeds_are_finite_where_the_factor_is() -> None:
    def func(w: Tensor) -> tuple[Tensor, ...]:
        seeds = torch.eye(2).view(2, 1, 2).expand(2, 3, 2)
        return (torch.bmm(seeds, w.expand(2, 2, 2)),)

    w = torch.tensor([[float("inf"), 1.0], [2.0, 3.0]])
    graph, run = simplified(func, torch.ones(2, 2))
    (found,) = run(w)
    assert not any("mm" in name for name in left(graph))
    torch.testing.assert_close(found, w.unsqueeze(1).expand(2, 3, 2))


def test_tangents_that_do_not_exist_are_not_multiplied_and_zeros_of_the_function_are() -> None:
    def func(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        pushed = torch.func.jvp(lambda v: nn.functional.linear(v, w, w[0]), (x,), (x.sin(),))[1]
        return pushed, x @ torch.zeros(()).expand(2, 2)

    x, w = torch.tensor([[float("inf"), 1.0], [2.0, 3.0]]), torch.ones(2, 2)
    graph, run = simplified(func, torch.ones(2, 2), w)
    finite = x.clone()
    finite[0, 0] = 0.5
    for one, other in zip(run(finite, w), func(finite, w), strict=True):
        torch.testing.assert_close(one, other)
    assert left(graph).count("mm.default") == 2
    assert run(x, w)[1].isnan().any()


def test_constants_are_not_held_in_place_of_what_is_written_later() -> None:
    def func(x: Tensor) -> tuple[Tensor, ...]:
        room = torch.zeros(3)
        before = room + 1
        seen = x + room
        room.copy_(x)
        room[1:].mul_(2)
        return before, seen, room, torch.ones(3).add_(1) * x

    _, run = simplified(func, torch.ones(3))
    x = torch.tensor([1.0, 2.0, 3.0])
    for _ in range(2):
        for one, other in zip(run(x), func(x), strict=True):
            torch.testing.assert_close(one, other)


def network(*widths: int) -> nn.Module:
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4), nn.Softmax(-1))


MADE: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "two layers": (lambda: network(2, 16, 2), (64, 2)),
    "three layers": (lambda: network(6, 128, 128, 6), (64, 6)),
    "many samples": (lambda: network(3, 64, 64, 3), (1024, 3)),
    "sine": (lambda: torch.sin, (1024, 3)),
    "convolution": (convolutional, (32, 1, 8)),
    "normalization": (normed, (64, 4)),
}
KINDS: dict[str, dict[str, Any]] = {
    "pull": {"method": "Pull", "seeds": "shared", "engine": "vmap"},
    "pull in a loop": {"method": "Pull", "seeds": "shared", "engine": "loop"},
    "pull batched": {"method": "Pull", "seeds": "shared", "engine": "batched"},
    "reverse": {"method": "PerSample", "mode": "reverse"},
    "forward": {"method": "PerSample", "mode": "forward"},
    "push": {"method": "Push", "seeds": "shared", "engine": "vmap"},
    "push in a loop": {"method": "Push", "seeds": "shared", "engine": "loop"},
}
LEFT: dict[str, tuple[int, ...]] = {
    "two layers": (11, 12, 11, 10, 13, 12, 12),
    "three layers": (18, 39, 18, 18, 20, 19, 39),
    "many samples": (18, 24, 18, 18, 20, 19, 24),
    "sine": (3, 6, 3, 3, 6, 3, 6),
    "convolution": (12, 21, 17, 12, 13, 12, 39),
    "normalization": (31, 35, 43, 39, 53, 40, 98),
}
"""How many operators are left at most, in the order of `KINDS`."""
CASES = [(made, kind, most) for made, counts in LEFT.items() for kind, most in zip(KINDS, counts, strict=True)]


@pytest.mark.by_day(4)
@pytest.mark.parametrize(("made", "kind", "most"), CASES, ids=[f"{made}, {kind}" for made, kind, _ in CASES])
def test_few_operators_are_left(made: str, kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[fx.Graph] = []

    def kept(graph: fx.Graph, without: Any = ()) -> None:
        # a new layout, a slope apart from what it multiplies, and products of weights take more operators and less time
        simplify(graph, {*without, "column_major", "row_major", "activation_slopes", "row_scalings"})
        graphs.append(graph)

    monkeypatch.setattr(tracer, "simplify", kept)
    # torch's comparisons load modules that register kinds of nests, after which programs are recorded again
    compare(torch.zeros(1), torch.zeros(1))
    make, shape = MADE[made]
    torch.manual_seed(0)
    func = make()
    if isinstance(func, nn.Module):
        func.requires_grad_(False)
    x = torch.randn(shape)
    problem = planned(func, (x,))[2]
    with torch.no_grad():
        inner, replay = (
            build(spec).prepare(problem) for spec in (KINDS[kind], {"method": "Replay", "inner": KINDS[kind]})
        )
        for given in (x, torch.randn(shape)):
            compare(replay([given], {}).jacobians, inner([given], {}).jacobians, 1e-5)
    assert graphs, problem.function_state.lines()  # type: ignore[union-attr]
    (graph,) = graphs
    assert len(left(graph)) <= most


def test_a_factor_of_few_columns_is_laid_out_by_columns() -> None:
    w = torch.randn(64, 3, dtype=torch.float64)
    x = torch.randn(512, 64, dtype=torch.float64)
    for factor, copies in ((w, 1), (w.T.contiguous().T, 0), (torch.randn(64, 64, dtype=torch.float64), 0)):
        graph, run = simplified(lambda x, w: (x @ w, (2 * x) @ w), x, factor)
        assert left(graph).count("clone.default") == copies
        for one, other in zip(run(-x, factor), (-x @ factor, -2 * x @ factor), strict=True):
            torch.testing.assert_close(one, other)


def test_a_product_of_few_columns_with_a_transpose_is_transposed_itself() -> None:
    def func(x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return ((2 * g).T @ (3 * x), (2 * g).T.contiguous() @ (3 * x))

    x, g = torch.randn(512, 3, dtype=torch.float64), torch.randn(512, 64, dtype=torch.float64)
    graph, run = simplified(func, x, g)
    products = [node for node in graph.nodes if node.target is aten.mm.default]
    assert [tuple(node.meta["value"].shape) for node in products] == [(3, 64)]
    # that of the result, whose layout stays as it is
    assert [node.meta["value"].numel() for node in graph.nodes if node.target is aten.clone.default] == [64 * 3]
    for one, other in zip(run(x + 1, g - 1), func(x + 1, g - 1), strict=True):
        compare(one, other)
        assert one.stride() == other.stride()


def test_small_factors_are_laid_out_as_the_rows_of_their_results() -> None:
    def func(w: Tensor, slope: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        across = w.T.reshape(8, 1, 64)
        product = across * slope
        return product.reshape(-1, 64).contiguous() @ w, rows * across, w.T * 2, across * slope[:1]

    inputs = [torch.randn(shape, dtype=torch.float64) for shape in ((64, 8), (128, 64), (8, 128, 64))]
    graph, run = simplified(func, *inputs)
    assert not any(
        node.target in (aten.clone.default, aten.reshape.default)
        and node.meta["value"].numel() > 64 * 8
        and not any(shares(node.meta["value"], source) for source in node.all_input_nodes)
        for node in graph.nodes
    )
    read = [node.all_input_nodes for node in graph.nodes if node.target is aten.mul.Tensor]
    large = [sources for sources in read if any(source.meta["value"].numel() > 64 * 8 for source in sources)]
    assert len(large) == 2
    assert all(source.meta["value"].is_contiguous() for sources in large for source in sources)
    # one copy for both, and none for what is small
    assert left(graph).count("clone.default") <= 2
    given = [value + 1 for value in inputs]
    for one, other in zip(run(*given), func(*given), strict=True):
        compare(one, other)


def test_what_is_repeated_once_is_not_repeated() -> None:
    graph, run = simplified(lambda x: (x.cos().repeat(1, 1).sin(), x.sin().repeat(1, 2).cos()), torch.randn(3, 4))
    assert left(graph).count("repeat.default") == 1
    x = torch.randn(3, 4)
    compare(run(x), (x.cos().sin(), x.sin().repeat(1, 2).cos()))


def test_what_is_reshaped_alike_is_reshaped_once_or_not_at_all() -> None:
    def func(x: Tensor, y: Tensor) -> tuple[Tensor]:
        a, b, grid = x.cos(), y.sin(), (4, 2, 3)
        inside = a.view(grid) * b.view(grid) * torch.full((), 3.0, dtype=x.dtype).expand(grid)
        return ((inside + b.view(grid)).view(8, 3),)

    def partly(x: Tensor, y: Tensor) -> tuple[Tensor]:
        return ((x.cos().view(4, 2, 3) * y.sin().view(2, 4, 3).transpose(0, 1)).view(8, 3),)

    inputs = [torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    graph, run = simplified(func, *inputs)
    assert not [operator for operator in left(graph) if operator.startswith("view")]
    compare(run(*inputs), func(*inputs))
    _, run = simplified(partly, *inputs)
    compare(run(*inputs), partly(*inputs))


def test_equal_terms_are_added_by_a_number() -> None:
    def doubled(x: Tensor, y: Tensor, b: Tensor) -> tuple[Tensor]:
        wide = y.expand(4, 5, 3)
        return (x * wide + wide * x,)

    def collected(x: Tensor, y: Tensor, b: Tensor) -> tuple[Tensor]:
        return (torch.addcmul(torch.addcmul(b, x, x + 1, value=0.5), x + 1, x, value=-2),)

    def needed(x: Tensor, y: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        product = x * b
        return product, torch.addcmul(product, x, b)

    shapes = ((4, 5, 3), (5, 3), (4, 5, 3))
    inputs = [torch.randn(s, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) for s in shapes]
    for func, operators in (
        (doubled, ["mul.Scalar", "mul.Tensor"]),
        (collected, ["add.Tensor", "addcmul.default"]),
        (needed, ["mul.Tensor", "addcmul.default"]),
    ):
        graph, run = simplified(func, *inputs)
        assert left(graph) == operators
        compare(run(*inputs), func(*inputs))
        if func is doubled:
            (scaled,) = [node for node in graph.nodes if node.target is aten.mul.Scalar]
            assert scaled.meta["value"].shape == (5, 3)


def test_a_product_with_a_number_and_a_sum_are_one_operator() -> None:
    def slope(x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor]:
        return (y.cos() + x * (aten.mul.Scalar(y.sin(), -2) * h),)

    inputs = [torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    graph, run = simplified(slope, *inputs)
    assert [node.target for node in graph.nodes if node.op == "call_function"].count(aten.mul.Tensor) == 1
    assert [node.kwargs["value"] for node in graph.nodes if node.target is aten.addcmul.default] == [-2]
    compare(run(*inputs), slope(*inputs))
    # what is broadcast, or read elsewhere too, stays
    kept, run = simplified(lambda x, y, h: (y[0] + x * h,), *inputs)
    assert not [node for node in kept.nodes if node.target is aten.addcmul.default]
    compare(run(*inputs)[0], inputs[1][0] + inputs[0] * inputs[2])


def test_a_slope_is_computed_once_for_all_that_is_multiplied_by_it() -> None:
    z = torch.randn(8, 3, dtype=torch.float64)
    seeds = torch.randn(5, 8, 3, dtype=torch.float64)

    def all_at_once(z: Tensor, seeds: Tensor) -> tuple[Tensor]:
        return (torch.vmap(torch.func.vjp(nn.functional.gelu, z)[1])(seeds)[0],)

    def one_by_one(z: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
        pull = torch.func.vjp(nn.functional.silu, z)[1]
        return tuple(pull(seed)[0] for seed in seeds)

    for func, slope in ((all_at_once, "gelu_backward.default"), (one_by_one, "silu_backward.default")):
        graph, run = simplified(func, z, seeds)
        (node,) = (node for node in graph.nodes if str(node.target).endswith(slope))
        assert node.meta["value"].shape == z.shape
        compare(run(-z, seeds), func(-z, seeds))
    # a single one stays as it is
    graph, run = simplified(lambda z, seeds: one_by_one(z, seeds[:1]), z, seeds)
    assert "mul.Tensor" not in left(graph)


def test_products_of_factors_keep_their_order_since_another_one_may_overflow() -> None:
    def product(seeds: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor]:
        return (seeds * s * t,)

    seeds, s, t = torch.tensor([[[0.0]], [[1e-30]], [[1e30]]]).expand(3, 8, 3), torch.randn(8, 3), torch.randn(8, 3)
    _, run = simplified(product, torch.randn(3, 8, 3), s, t)
    for scale in (1e25, 1e-25):
        scaled = seeds.clone(), scale * s, scale * t
        assert torch.equal(run(*scaled)[0], product(*scaled)[0])


@pytest.mark.parametrize("number", [1e-30, 1e30])
def test_extreme_numbers_are_multiplied_where_they_stand(number: float) -> None:
    def func(b: Tensor, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor]:
        return (b + x * number * y * z,)

    inputs = [torch.randn(8, 3) for _ in range(4)]
    _, run = simplified(func, *inputs)
    b, x, y, z = inputs
    given = b, x / number**0.9, y / number**0.5, z * number**0.4
    assert torch.isfinite(func(*given)[0]).all()
    compare(run(*given), func(*given), 1e-5)


def test_a_loop_over_entries_and_rows_is_not_one_over_columns() -> None:
    def chosen(which: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (torch.stack([torch.where(which[row], x[row], y[row]) for row in range(3)]),)

    x, y = torch.randn(3, 3), torch.randn(3, 3)
    # these numbers alone would not tell
    _, run = simplified(chosen, torch.ones(3, dtype=torch.bool), x, y)
    which = torch.tensor([True, False, True])
    assert torch.equal(run(which, x, y)[0], chosen(which, x, y)[0])


def test_stacks_are_multiplied_by_one_operator() -> None:
    x, w = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    graph, run = simplified(lambda x, w: (x.cos() @ w,), x, w)
    assert left(graph) == ["cos.default", "matmul.default"]
    compare(run(-x, w), (x.cos() @ w,))
    # what does not lie row by row is copied, and rows that others read too are there anyway
    graph, run = simplified(lambda x, w: (x.cos().transpose(0, 1) @ w,), x, w)
    assert "matmul.default" not in left(graph)
    compare(run(-x, w), (x.cos().transpose(0, 1) @ w,))


def test_what_a_layer_skips_is_added_to_its_product() -> None:
    def residual(x: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        for _ in range(2):
            x = x + (x * v.tanh()) @ w
        return (x,)

    x, v, w = torch.randn(64, 32, 8), torch.randn(32, 8), torch.randn(8, 8)
    graph, run = simplified(residual, x, v, w)
    assert left(graph).count("addmm.default") == 2 and "add.Tensor" not in left(graph)
    compare(run(-x, v, w), residual(-x, v, w), 1e-4)
    assert overwrites(residual, x.double(), v.double(), w.double()) == 1
    # small ones are not worth it, and what is repeated along an axis would have to be copied
    graph, _ = simplified(residual, x[:2], v, w)
    assert "addmm.default" not in left(graph)
    graph, _ = simplified(lambda x, v, w: (v + (x * v.tanh()) @ w,), x, v, w)
    assert "addmm.default" not in left(graph)


def one_by_one(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor]:
    y = (x @ w.T).tanh()
    return (torch.stack([aten.tanh_backward(row, y) @ w for row in v], 1),)


def all_at_once(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor]:
    y = (x @ w.T).sigmoid()
    rows = aten.sigmoid_backward(v.unsqueeze(1).expand(len(v), *y.shape), y).reshape(-1, len(w)) @ w
    return (rows.view(len(v), len(x), -1).permute(1, 0, 2),)


@pytest.mark.parametrize("func", [one_by_one, all_at_once])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_jacobian_of_two_layers_is_one_product(func: Callable[..., tuple[Tensor]], rows: int) -> None:
    x, w, v = (torch.randn(shape, dtype=torch.float64) for shape in ((512, 4), (32, 4), (rows, 32)))
    graph, run = simplified(func, x, w, v)
    shapes = [tuple(node.meta["value"].shape) for node in graph.nodes if node.target is aten.mm.default]
    assert shapes == [(512, 32), (512, 4 * rows)]
    compare(run(-x, 2 * w, v + 1), func(-x, 2 * w, v + 1), 1e-9)


@pytest.mark.parametrize("rows", [1, 3])
def test_factors_of_any_size_keep_products_of_weights_in_range(rows: int) -> None:
    def by_factors(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor]:
        made = (v.unsqueeze(1) * x.exp()).reshape(-1, len(w)) @ w
        return (made.view(len(v), len(x), -1).permute(1, 0, 2),)

    x, w, v = torch.rand(512, 32), torch.rand(32, 4) + 1, torch.rand(rows, 32) + 1
    _, run = simplified(by_factors, x, w, v)
    given = 70 + x, 1e-24 * w, 1e-24 * v  # as a shared argument may change after it was recorded
    compare(run(*given), by_factors(*given), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_not_multiplied_first(dtype: torch.dtype) -> None:
    x, w, v = (torch.randn(shape).to(dtype) for shape in ((512, 4), (32, 4), (3, 32)))
    graph, _ = simplified(all_at_once, x, w, v)
    shapes = [tuple(node.meta["value"].shape) for node in graph.nodes if node.target is aten.mm.default]
    assert (512, 12) not in shapes


@pytest.mark.parametrize(
    ("func", "at"),
    [
        # twice the cotangent, a product of the arguments alone, and the slope alone leave the range of float16
        (lambda g, x: (g * x + g * x,), (40000.0, 0.1)),
        (lambda g, x: (x + 0.01 * g * x * g.reciprocal(),), (300.0, 300.0)),
        (lambda g, x: tuple(aten.silu_backward(c, x) for c in (g, g / 2)), (7000.0, -18.0)),
        (lambda g, x: tuple(aten.softplus_backward(c, x, 1, 20) for c in (g, g / 2)), (7000.0, -18.0)),
        (lambda g, x: tuple(aten.gelu_backward(c, x) for c in (g, g / 2)), (7000.0, -5.5)),
    ],
)
def test_what_is_multiplied_in_half_precision_keeps_its_order(
    func: Callable[..., tuple[Tensor, ...]], at: tuple[float, float]
) -> None:
    g, x = torch.rand(2, 4, 5).half() + 0.5
    _, run = simplified(func, g, x)
    given = torch.full_like(g, at[0]), torch.full_like(x, at[1])  # arguments may grow after they were recorded
    for found, right in zip(run(*given), func(*given), strict=True):
        assert torch.isfinite(right).all()
        torch.testing.assert_close(found, right, rtol=2e-3, atol=0)


def test_rows_that_samples_have_for_themselves_are_not_taken_for_one() -> None:
    x, w = torch.randn(512, 4, dtype=torch.float64), torch.randn(32, 4, dtype=torch.float64)
    for own in ((512, 32), (512, 1)):
        v = torch.randn(own, dtype=torch.float64)
        func = lambda x, w, v: (aten.tanh_backward(v, (x @ w.T).tanh()) @ w,)  # noqa: E731
        _, run = simplified(func, x, w, v)
        compare(run(-x, w, v + 1), func(-x, w, v + 1), 1e-9)
    # few samples, or small ones
    graph, _ = simplified(one_by_one, x[:6], w, torch.randn(3, 32, dtype=torch.float64))
    assert "cat.default" not in left(graph)


def overwrites(func: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> int:
    """How many results are written over arguments; the program is compared with the function for other inputs."""
    graph, run = simplified(func, *inputs)
    for sign in (1, -1):
        given = [sign * x for x in inputs]
        before = [x.clone() for x in given]
        compare(run(*given), func(*given))
        # nothing that was handed over is written into, and a second run finds what the first one did
        compare(given, before)
        compare(run(*given), func(*given))
    *nodes, output = (node for node in graph.nodes if node.op != "placeholder")
    return len(find_overwritable(nodes, output.args[0]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("func", "count"),
    [
        (lambda x: ((x.sin() * 3).tanh(),), 2),
        # what was given, read later, returned, shown by a view that is read later or returned
        (lambda x: (x.tanh(),), 0),
        (lambda x: ((y := x.sin()).tanh() * y,), 1),
        (lambda x: ((y := x.sin()), y.tanh()), 0),
        (lambda x: ((y := x.sin()).tanh(), y[1:]), 0),
        (lambda x: ((y := x.sin()).tanh(), y.unbind(0)[0]), 0),
        # another shape, a transpose of the same memory, its own square
        (lambda x: (x.sin()[:1] * x,), 0),
        (lambda x: ((y := x.sin()) * y.T,), 0),
        (lambda x: ((y := x.sin()) * y,), 1),
        # sums of products, into the sum; scattered into fresh memory
        (lambda x: (torch.addmm(x.sin(), x, x),), 1),
        (lambda x: (torch.addmm(x[0], x.sin(), x),), 0),
        # it is read while the result is written
        (lambda x: (torch.baddbmm(y := x.sin()[None], y, y),), 0),
        (lambda x: (x.new_zeros(6, 4).index_copy(0, torch.arange(4), x),), 1),
        (lambda x: (torch.ops.aten.tanh_backward(x, x.sin()),), 1),
    ],
)
def test_results_are_written_over_what_nothing_needs_any_more(
    func: Callable[..., tuple[Tensor, ...]], count: int
) -> None:
    assert overwrites(func, torch.randn(4, 4, dtype=torch.float64)) == count
