"""Functions that read values of tensors in Python: replayed while they would read the same, right when they do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import autojac
from autojac.methods.base import build
from autojac.replay.outcomes import MOST_MISSES, Score
from autojac.replay.replayer import CALLS_A_TRACE
from harness import compare, forced, in_use, planned
from oracle import jacobian_blocks

LOOP = {"method": "Pull", "seeds": "shared", "engine": "loop"}
GATE = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))


def replay(inner: dict[str, Any]) -> dict[str, Any]:
    return {"method": "Replay", "inner": inner}


def mixed(x: Tensor) -> Tensor:
    """Every output from every input of its sample: a pattern with zeros would be checked at each new input."""
    return x.cumsum(-1) + x.flip(-1)


def branch(x: Tensor) -> Tensor:
    return mixed(x.sin() if x.sum() > 0 else x.cos() * x)


def branch_on_a_parameter(x: Tensor) -> Tensor:
    return mixed(x.sin() if (GATE > 0) & (x[0, 0] > 0) else x.cos() * x)


def masked(x: Tensor) -> Tensor:
    y = x.cos()
    inside = x > 0
    y[inside] = x[inside] ** 2
    return mixed(y)


def tally(x: Tensor) -> Tensor:
    return mixed(x.sin()) * int((x > 0).sum())


def same_points(x: Tensor) -> Tensor:
    return mixed(x.sin() if torch.equal(x, x.abs()) else x.cos())


def listed(x: Tensor) -> Tensor:
    axes = torch.arange(1, x.dim()).tolist()
    return mixed(x.sin() if all((x > 0).flatten().tolist()) else x.cos()) * x.sum(axes, keepdim=True)


def guarded_by_an_error(x: Tensor) -> Tensor:
    if not torch.all(x > -100):
        raise ValueError("out of range")
    return mixed(x.sin())


FUNCS = [branch, branch_on_a_parameter, masked, tally, same_points, listed, guarded_by_an_error]


@pytest.mark.parametrize("func", FUNCS)
def test_each_way_is_right_and_the_recorded_one_is_replayed(func: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([[0.3, 0.7], [0.2, 1.1], [0.9, 0.4]], dtype=torch.float64)
    jac = forced(func, (x,), replay(LOOP), verify="never", coupling="independent")
    # torch may load something at the first one of all, which counts as a change
    compare(jac(x), jacobian_blocks(func, (x,), 0))
    jac(x)
    compute: Any = in_use(jac).compute
    before = compute.traces
    for step in range(4):
        compare(jac(x + step), jacobian_blocks(func, (x + step,), 0))
    assert compute.traces == before
    assert compute._eager is None
    for other in (-x, x * torch.tensor([1.0, -1.0], dtype=torch.float64), x):
        compare(jac(other), jacobian_blocks(func, (other,), 0))


@given(st.lists(st.floats(-1, 1), min_size=6, max_size=6))
def test_masks_of_any_size(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64).view(3, 2)
    compare(MASKED(x), jacobian_blocks(masked, (x,), 0))


MASKED = forced(masked, (torch.ones(3, 2, dtype=torch.float64),), replay(LOOP), verify="never", coupling="independent")


def test_a_program_that_rarely_holds_is_given_up_for_a_while() -> None:
    x = torch.tensor([[0.3, 0.7], [0.2, 1.1]], dtype=torch.float64)
    jac = forced(branch, (x,), replay(LOOP), verify="never", coupling="independent")
    jac(x)
    compute: Any = in_use(jac).compute
    for _ in range(MOST_MISSES):
        assert compute.bound is not None
        compare(jac(-x), jacobian_blocks(branch, (-x,), 0))
    assert compute.bound is None
    assert "given up" in jac.explain(x)
    for _ in range(CALLS_A_TRACE + 1):
        jac(-x)
    # the way of the calls since then
    assert compute.bound is not None
    assert compute.traces == 2
    compare(jac(-x), jacobian_blocks(branch, (-x,), 0))


def test_the_rest_grows_and_hits_count() -> None:
    score, calls = Score(), 0
    for rest in (10, 20, 40):
        for turn in range(MOST_MISSES):
            calls += 1
            assert score.miss(calls, 10) is (turn == MOST_MISSES - 1)
        assert score.rests_until == calls + rest
        calls = score.rests_until
    calls += 1000
    assert not any(score.miss(calls + more, 10) for more in range(MOST_MISSES))


def test_a_way_that_couples_samples_is_noticed_when_it_is_first_taken() -> None:
    def func(x: Tensor) -> Tensor:
        return mixed(x.sin() if (x.sum() > 0) else x.cos() * x.sum(0))

    x = 1e4 + torch.rand(4, 2, dtype=torch.float64)
    jac = forced(func, (x,), replay(LOOP))
    for step in range(6):
        jac(x + step)
    assert in_use(jac).problem.structure.independent
    with pytest.warns(autojac.StructureChangedWarning):
        J = jac(-x)
    compare(J, jacobian_blocks(func, (-x,), 0))


@pytest.mark.parametrize("by_mask", [False, True], ids=["branch", "mask"])
def test_a_loss_on_either_way_trains(by_mask: bool) -> None:
    layer = nn.Linear(2, 2).double()

    def func(x: Tensor) -> Tensor:
        y = layer(x)
        if by_mask:
            outside, inside = y.cos(), x > 0
            outside[inside] = y[inside].sin() ** 2
            return outside + y * y
        return y.sin() if (x.sum() > 0) else y.cos()

    x = torch.tensor([[0.3, 0.7], [0.2, 1.1]], dtype=torch.float64)
    jac = forced(func, (x,), replay(LOOP), coupling="independent")
    for at in (x, x + 1, -x, x):
        point = at.detach().requires_grad_()
        expected = torch.stack([torch.autograd.grad(c.sum(), point, create_graph=True)[0] for c in func(point).T], 1)
        right = torch.autograd.grad(expected.square().sum(), layer.parameters())
        compare(torch.autograd.grad(jac(point).square().sum(), layer.parameters()), right)
    assert any("operators left" in line for line in in_use(jac).problem.function_state.traces)


LSTM, GRU, RNN = (kind(2, 2, batch_first=True).double() for kind in (nn.LSTM, nn.GRU, nn.RNN))
F = nn.functional


def lengths_of(x: Tensor) -> Tensor:
    return 1 + (x[:, 1:, 0] > 0).sum(1)


def packed(x: Tensor, lengths: Tensor | None = None) -> Any:
    lengths = lengths_of(x) if lengths is None else lengths
    return nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)


def padded(x: Tensor) -> Tensor:
    return nn.utils.rnn.pad_packed_sequence(packed(x.sin()), batch_first=True, total_length=x.shape[1])[0].sum(1)


def alignment(x: Tensor, lengths: Tensor) -> Tensor:
    lines = x.log_softmax(-1).transpose(0, 1)
    targets = torch.ones(len(x), 2, dtype=torch.long)
    return F.ctc_loss(lines, targets, lengths, lengths.clamp(max=2), reduction="none", zero_infinity=True)[:, None]


def split_in_two(x: Tensor, at: Tensor) -> Tensor:
    first, second = x.tensor_split(at.view(1), 1)
    return torch.cat([first.sin(), second.cos()], 1).sum(1)


def inferred(x: Tensor, places: Tensor) -> Tensor:
    return x.sin().sum(1) * torch.sparse_coo_tensor(places[None], torch.ones(len(places))).shape[0]


READ_IN_C: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor_split": lambda x: split_in_two(x, lengths_of(x).max()),
    "tensor_split by keyword": lambda x: torch.cat(
        [
            (k + 1) * p.sin()
            for k, p in enumerate(torch.tensor_split(x, tensor_indices_or_sections=lengths_of(x), dim=1))
        ],
        1,
    ).sum(1),
    "tensor_split by its overload": lambda x: torch.cat(
        [(k + 1) * part.sin() for k, part in enumerate(torch.ops.aten.tensor_split(x, lengths_of(x).max().view(1), 1))],
        1,
    ).sum(1),
    "lstm": lambda x: LSTM(packed(x))[1][0][0],
    "gru": lambda x: GRU(packed(x))[1][0],
    "rnn": lambda x: RNN(packed(x))[1][0],
    "packed": lambda x: x.sin().sum(1) * packed(x).data.shape[0],
    "padded": padded,
    "ctc_loss": lambda x: alignment(x, lengths_of(x)),
    "size of a sparse tensor": lambda x: inferred(x, lengths_of(x)),
    "indices": lambda x: x.sin().sum(1) * x.detach()[0].relu().to_sparse().indices().shape[1],
    "entries": lambda x: x.sin().sum(1) * x.detach()[0].relu().to_sparse()._nnz(),
    "csr": lambda x: x.sin().sum(1) * x.detach()[0].relu().to_sparse_csr().values().shape[0],
    "csr columns": lambda x: x.sin().sum(1) * x.detach()[0].relu().to_sparse_csr().col_indices().shape[0],
    "coalesced": lambda x: (
        x.sin().sum(1)
        * torch.sparse_coo_tensor(lengths_of(x)[None], torch.ones(len(x)), (5,)).coalesce().values().shape[0]
    ),
    "repeat_interleave": lambda x: x.sin().sum(1) * len(torch.arange(len(x)).repeat_interleave(lengths_of(x))),
    "bincount": lambda x: x.sin().sum(1) * len(lengths_of(x).bincount()),
    "one_hot": lambda x: x.sin().sum(1) * F.one_hot(lengths_of(x)).shape[1],
    "nested": lambda x: (
        x.sin().sum(1) * torch.nested.nested_tensor([x.detach()[0, : lengths_of(x)[0]]]).to_padded_tensor(0).shape[1]
    ),
}
"""What torch reads to choose operators or shapes, where no operator says so."""


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", READ_IN_C)
def test_what_torch_reads_in_c_is_noticed(name: str) -> None:
    func = READ_IN_C[name]
    torch.manual_seed(0)
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    jac = forced(func, (x,), replay(LOOP), verify="never", coupling="independent")
    for at in (x, 1.1 * x, x.flip(1), x.abs(), -x.abs(), x.flip(0), x):
        compare(jac(at), jacobian_blocks(func, (at,), 0))
    assert autojac.probe(func, x).assurance == "observed"


HELD = torch.tensor([2, 4, 3])
READ_OF_ITS_OWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tensor_split": lambda x, lengths: split_in_two(x, lengths[0]),
    "gru": lambda x, lengths: GRU(packed(x, lengths))[1][0],
    "ctc_loss": alignment,
    "size of a sparse tensor": inferred,
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", READ_OF_ITS_OWN)
@pytest.mark.parametrize("held", [True, False])
def test_what_is_read_of_a_held_tensor_or_an_argument_is_compared(name: str, held: bool) -> None:
    lengths = HELD.clone()
    func: Any = READ_OF_ITS_OWN[name]
    called: Any = (lambda x: func(x, lengths)) if held else func
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(3, 4, 2)
    rest = () if held else (lengths,)
    jac = forced(called, (x, *rest), replay(LOOP), verify="never", coupling="independent")
    for turn in range(4):
        compare(jac(x + turn, *rest), jacobian_blocks(called, (x + turn, *rest), 0))
        if turn == 2:
            lengths.copy_(HELD.flip(0) - 1)
    assert any("operators left" in line for line in in_use(jac).problem.function_state.traces)


class _Backward(torch.autograd.Function):
    """Branches in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g if (g.sum() != 1e9) else g


def test_memory_that_a_tensor_shares_is_asked_for_again() -> None:
    one = torch.ones(2)
    other = one.view(2)

    def func(x: Tensor) -> Tensor:
        return mixed(x.sin() if one.is_set_to(other) else x.cos())

    x = torch.rand(3, 2, dtype=torch.float64)
    jac = forced(func, (x,), replay(LOOP), verify="never", coupling="independent")
    for memory in (None, torch.ones(2), one):
        if memory is not None:
            other.data = memory
        for _ in range(2):
            compare(jac(x), jacobian_blocks(func, (x,), 0))


NEVER = {
    "a number with decimals": (lambda x: x * (2.0 if x.sum().item() > 0 else 3.0), False, "in Python"),
    "beside random numbers": (
        lambda x: torch.rand_like(x) * x if (x.sum() > -9) else x,
        False,
        "in Python|drawn|draws",
    ),
    "in the backward of J": (_Backward.apply, True, "in Python"),
}


@pytest.mark.parametrize("name", NEVER)
def test_what_stays_unrecorded_says_so(name: str) -> None:
    func, trained, reason = NEVER[name]
    x = torch.rand(3, 2, dtype=torch.float64, requires_grad=trained)
    with torch.set_grad_enabled(trained):
        _, _, problem = planned(func, (x,))
        method = build(replay(LOOP))
        with pytest.raises(autojac.UnsupportedError, match=reason):
            method.prepare_call(dataclasses.replace(problem, trial=True))((x,), {})
