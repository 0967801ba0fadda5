"""Cuts: exact Jacobians through a bottleneck, and exact blocks under batch statistics."""

from __future__ import annotations

import copy
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autojac import AutoJacobian, InputError, UnsupportedError
from autojac.api.low_rank_factors import LowRankJacobian
from autojac.graph.cuts.accumulation import products
from autojac.methods import bottleneck
from autojac.methods.base import Method
from autojac.methods.bottleneck import Bottleneck
from autojac.methods.statistics import Statistics
from harness import Counted, compare, planned, seeds_counted, supported
from oracle import jacobian_blocks, jacobian_full

EXACT = 1e-12


def layers(*sizes: int) -> nn.Sequential:
    made = [part for n, m in itertools.pairwise(sizes) for part in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*made[:-1]).double()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def refusal(kind: type[Method], func: Any, *args: Any) -> str:
    _, _, problem = planned(func, args)
    assert not list(kind.candidates(problem, 1))
    reason = kind().unsupported(problem)
    assert reason is not None
    return reason


NARROW = layers(8, 2, 8)


class Skip(nn.Module):
    """A skip that is narrow enough to join the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(12, 3).double(), nn.Linear(3, 10).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x).tanh()).sin() + x[:, :2].sum(1, keepdim=True)


class TwoHeads(nn.Module):
    """Two inputs meet in one code, from which two outputs come."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(9, 3).double()
        self.one, self.other = nn.Linear(3, 5).double(), nn.Linear(3, 4).double()

    def forward(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        code = self.down(torch.cat([x, z], -1)).tanh()
        return {"one": self.one(code), "other": (self.other(code) * code[:, :1]).view(-1, 2, 2)}


class Variational(nn.Module):
    """An encoder whose code is returned beside what it decodes to, and a time that joins on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.spread = layers(9, 5, 2), nn.Linear(9, 2).double()
        self.decoder = layers(3, 6, 9)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        code = self.encoder(x)
        return code, self.spread(x).exp(), self.decoder(torch.cat([code, t], 1))


class TwoDecoders(nn.Module):
    """One code, and of two outputs one has a narrower place of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.wide, self.narrow = layers(64, 32, 8), layers(8, 32, 64), layers(8, 64, 64, 1, 32, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(x).tanh()
        return self.wide(code), self.narrow(code)


class WideBeside(nn.Module):
    """No cut of both outputs is narrow, but one of the second output alone is."""

    def __init__(self) -> None:
        super().__init__()
        self.code = layers(24, 48, 2, 48, 24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), self.code(x)


class Tokens(nn.Module):
    """Samples of several tokens, which a narrow layer takes as one long batch, in rows by sample or by token."""

    def __init__(self, tokens_first: bool) -> None:
        super().__init__()
        self.tokens_first = tokens_first
        self.down, self.up = nn.Linear(6, 1).double(), nn.Linear(1, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.transpose(0, 1) if self.tokens_first else x
        code = self.down(tokens.reshape(-1, 6)).tanh()
        made = self.up(code).sin().view(tokens.shape)
        return made.transpose(0, 1) if self.tokens_first else made


def partly_constant(x: Tensor) -> Tensor:
    code = (x @ U).sin()
    with torch.no_grad():
        scale = (code * x.mean(1, keepdim=True)).cos()
    return (code * scale) @ U.T + x.detach()


def by_frequencies(x: Tensor) -> Tensor:
    """A path of complex numbers around the code."""
    return (x @ U).sin() @ U.T + torch.fft.irfft(torch.fft.rfft(x)[:, :1], 8)


U = torch.linspace(-1, 1, 16, dtype=torch.float64).view(8, 2)
BOTTLENECKS: dict[str, Callable[[], tuple[Any, tuple[Tensor, ...]]]] = {
    "autoencoder": lambda: (layers(10, 6, 2, 6, 10), (normal(4, 10),)),
    "skip that joins the cut": lambda: (Skip(), (normal(5, 12),)),
    "two inputs, two outputs": lambda: (TwoHeads(), (normal(5, 5), normal(5, 4))),
    "code used twice": lambda: (
        lambda x: torch.cat([(c := x[:, :5] @ W + x[:, 5:] @ W), c**2, c.exp()], 1),
        (normal(4, 10),),
    ),
    "code under a mask of the input": lambda: (
        lambda x: (x @ torch.ones(8, 2, dtype=x.dtype)).sin() @ torch.ones(2, 8, dtype=x.dtype) * (x > 0),
        (normal(4, 8),),
    ),
    "transposed code": lambda: (lambda x: (W.T[:, :2] @ x.T[:2]).sin().T @ W.T, (normal(4, 8),)),
    "in-place operators": lambda: (
        nn.Sequential(nn.Linear(8, 2), nn.ReLU(inplace=True), nn.Linear(2, 8), nn.ELU(inplace=True)).double(),
        (normal(6, 8),),
    ),
    "dropout": lambda: (nn.Sequential(nn.Linear(8, 2), nn.Dropout(0.5), nn.Linear(2, 8)).double(), (normal(6, 8),)),
    "outputs and an input in the cut": lambda: (Variational(), (normal(4, 9), normal(4, 1))),
    "a second cut": lambda: (TwoDecoders(), (normal(3, 64),)),
    "a cut of one output": lambda: (WideBeside(), (normal(4, 24),)),
    "one output twice": lambda: (lambda x: (y := NARROW(x), y), (normal(4, 8),)),
    "tokens in rows by sample": lambda: (Tokens(tokens_first=False), (normal(4, 3, 6),)),
    "tokens in rows by token": lambda: (Tokens(tokens_first=True), (normal(4, 3, 6),)),
    "no_grad parts": lambda: (partly_constant, (normal(4, 8),)),
    "eval BatchNorm": lambda: (
        nn.Sequential(nn.Linear(8, 2), nn.BatchNorm1d(2), nn.Linear(2, 8)).double().eval(),
        (normal(6, 8),),
    ),
}
W = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)


@pytest.mark.by_day(2)
@pytest.mark.filterwarnings("ignore:.*no_grad:autojac.ModesDisagreeWarning")
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "differentiable"])
@pytest.mark.parametrize("name", BOTTLENECKS)
def test_the_chain_rule_through_a_bottleneck_is_exact(name: str, grad: bool) -> None:
    func, args = BOTTLENECKS[name]()
    argnums = tuple(range(len(args))) if len(args) > 1 else 0
    state = torch.get_rng_state()
    expected = jacobian_blocks(func, args, argnums)
    torch.set_rng_state(state)
    if grad:
        args = tuple(x.requires_grad_() for x in args)
    with torch.set_grad_enabled(grad):
        results = supported(Bottleneck, func, args, argnums=argnums)
    assert len(results) >= 4
    for method, J in results:
        try:
            compare(J, expected, EXACT)
        except AssertionError as error:
            raise AssertionError(f"{method}: {error}") from error


def widths(func: Any, *args: Any) -> dict[bool, list[int]]:
    """Elements of one sample in each cut of the chain rule with one cut, and with further ones."""
    _, _, problem = planned(func, args, argnums=tuple(range(len(args))))
    analysis = problem.analysis
    assert analysis is not None and analysis.flow is not None
    found = {recursive: analysis.chain(recursive=recursive) for recursive in (False, True)}
    return {
        recursive: [analysis.flow.width(product.cut) for product in products(chain.tree)]
        for recursive, chain in found.items()
        if chain is not None
    }


def test_ends_may_be_part_of_a_cut() -> None:
    # code 2, spread 2, t 1
    assert widths(Variational(), normal(4, 9), normal(4, 1))[False] == [5]


@pytest.mark.parametrize("sizes", [(20, 9, 2, 9, 20), (20, 3, 12, 2, 12, 4, 20), (20, 2, 12, 2, 12, 2, 20)], ids=str)
def test_a_chain_of_layers_is_cut_once_at_its_narrowest(sizes: tuple[int, ...]) -> None:
    assert widths(layers(*sizes), normal(3, 20)) == {False: [2]}


def test_a_second_cut_where_it_pays() -> None:
    assert widths(TwoDecoders(), normal(3, 64)) == {False: [8], True: [8, 1]}
    assert widths(WideBeside(), normal(4, 24)) == {True: [2]}


@pytest.mark.parametrize(
    ("func", "x", "again", "passes"),
    [
        (layers(10, 6, 2, 6, 10), normal(4, 10), False, [2, 2]),
        (TwoDecoders(), normal(3, 64), False, [8, 8]),
        # one pull and one push through the narrower decoder, eight pushes through the other one
        (TwoDecoders(), normal(3, 64), True, [1, 1, 8, 8]),
        (WideBeside(), normal(4, 24), True, [2, 2, 24]),
    ],
    ids=["one", "one of two", "two of two", "one output's"],
)
def test_passes_are_as_few_as_the_cuts_are_wide(
    func: Any, x: Tensor, again: bool, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = seeds_counted(monkeypatch, bottleneck)
    request, _, problem = planned(Counted(func), (x,))
    with torch.no_grad():
        compute = Bottleneck(cuts="several" if again else "one").prepare(problem)
        evaluations = Counted(problem.fn)
        compute(request.leaves, {})
    assert sorted(counted) == passes
    assert evaluations.calls == 0


def test_errors_in_float32_are_as_small_as_plain_rows_make_them() -> None:
    net, x = layers(32, 16, 4, 16, 32).float(), torch.randn(8, 32)
    expected = jacobian_blocks(net, (x,), to_double=True)
    for method, J in supported(Bottleneck, net, (x,)):
        assert J.dtype == torch.float32, method
        assert (J.detach().double() - expected).abs().max() <= 1e-5 * expected.abs().max(), method


class Scaled(nn.Module):
    """A Python number, which a graph holds, and dropout, whose draws are constants of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Dropout(0.5), nn.Linear(2, 8)).double()
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


def test_a_cut_is_never_stale() -> None:
    func, x = Scaled(), normal(5, 8)
    with torch.no_grad():
        _, _, problem = planned(func, (x,))
        compute = next(Bottleneck.candidates(problem, 1)).prepare(problem)

        def check(leaf: Tensor, seed: int) -> None:
            torch.manual_seed(seed)
            expected = jacobian_blocks(func, (leaf,))
            torch.manual_seed(seed)
            compare(compute((leaf,), {}).jacobians[0][0], expected, EXACT)

        check(x, 0)
        check(x + 1, 1)
        func.net[0].weight.mul_(1.5)
        func.net[3].weight = nn.Parameter(func.net[3].weight.flip(0))
        check(x, 2)
        func.scale = 3.0
        check(x, 3)
        func.net.insert(1, nn.Sigmoid())
        check(x, 4)
        func.scale = -0.0
        check(x, 5)


class Between(nn.Module):
    """Two BatchNorms and a skip around them."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.two = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False))

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() + self.two(self.one(x))


class Context(nn.Module):
    """Mean- and max-pooled context, as in DeepSets."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.head = nn.Linear(3, 4), nn.Linear(11, 2)

    def forward(self, x: Tensor) -> Tensor:
        code = self.encode(x).tanh()
        context = torch.cat([code.mean(0), code.amax(0)]).expand(len(x), 8)
        return self.head(torch.cat([x, context], -1))


def linear_attention(x: Tensor) -> Tensor:
    query, key = nn.functional.softplus(x @ M), nn.functional.softplus(x @ M.flip(0))
    return query @ (key.T @ x.sin()) / (query @ key.sum(0))[:, None]


M = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2)
STATISTICS: dict[str, Callable[[int], tuple[Any, tuple[Tensor, ...]]]] = {
    "minus the mean": lambda B: (lambda x: x - x.mean(0), (normal(B, 3),)),
    "scalar samples": lambda B: (lambda x: x * x.mean(), (normal(B),)),
    "whitening": lambda B: (lambda x: (x - x.mean(0)) / x.std(0), (normal(B, 3),)),
    "norm of the batch": lambda B: (lambda x: x / x.norm(), (normal(B, 3),)),
    "softmax over the batch": lambda B: (lambda x: x.softmax(0) * x, (normal(B, 3),)),
    "batch temperature": lambda B: (lambda x: (x / x.std()).softmax(-1), (normal(B, 3),)),
    "contrastive normaliser": lambda B: (lambda x: x - x.exp().sum().log(), (normal(B, 3),)),
    "whitening by the covariance": lambda B: (
        lambda x: x @ torch.linalg.inv(x.T @ x / len(x) + torch.eye(3, dtype=x.dtype)),
        (normal(B, 3),),
    ),
    "pooled context": lambda B: (Context().double(), (normal(B, 3),)),
    "linear attention": lambda B: (linear_attention, (normal(B, 3),)),
    "two BatchNorms and a skip": lambda B: (Between().double(), (normal(B, 4),)),
    "BatchNorm2d": lambda B: (
        nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh()).double(),
        (normal(B, 1, 3, 3),),
    ),
    "in-place operators": lambda B: (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ELU(inplace=True), nn.Linear(4, 3)).double(),
        (normal(B, 3),),
    ),
    "shared tensor used twice": lambda B: (
        lambda x: (s := x.mean(0)) * x + (x * s).sin() @ s[:, None],
        (normal(B, 3),),
    ),
    "two inputs, two outputs": lambda B: (
        lambda x, z: (x - z.mean(0), (x.mean(0) * z).sum(-1)),
        (normal(B, 3), normal(B, 3)),
    ),
}


@pytest.mark.by_day(4)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "differentiable"])
@pytest.mark.parametrize("name", STATISTICS)
def test_blocks_under_batch_statistics_are_exact(name: str, grad: bool) -> None:
    func, args = STATISTICS[name](19)
    argnums = tuple(range(len(args))) if len(args) > 1 else 0
    expected = jacobian_blocks(func, args, argnums)
    whole = jacobian_full(func, args, argnums)
    if grad:
        args = tuple(x.requires_grad_() for x in args)
    with torch.set_grad_enabled(grad):
        blocks = supported(Statistics, func, args, argnums=argnums)
        full = supported(Statistics, func, args, argnums=argnums, layout="full")
    assert len(blocks) == len(full) >= 4
    for results, right in ((blocks, expected), (full, whole)):
        for method, J in results:
            try:
                compare(J, right, EXACT)
            except AssertionError as error:
                raise AssertionError(f"{method}: {error}") from error


@given(batch=st.integers(2, 40), n=st.integers(1, 5), hidden=st.integers(1, 5), m=st.integers(1, 5), deep=st.booleans())
@settings(max_examples=10)
def test_batch_norm_networks_of_any_shape_are_exact(batch: int, n: int, hidden: int, m: int, deep: bool) -> None:
    middle: list[nn.Module] = [nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.SiLU()] if deep else []
    net = nn.Sequential(nn.Linear(n, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), *middle, nn.Linear(hidden, m)).double()
    x = normal(batch, n)
    expected = jacobian_blocks(copy.deepcopy(net), (x,))
    # where the batch is tiny or a variance nearly vanishes, rounding grows with the entries of the whole Jacobian
    compare(AutoJacobian(net, on_miss="estimate", store=":memory:")(x).detach(), expected, 1e-8)


def test_dropout_under_batch_norm_is_that_of_the_call() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    x = normal(12, 3)
    state = torch.get_rng_state()
    expected = jacobian_blocks(net, (x,))
    torch.set_rng_state(state)
    results = supported(Statistics, net, (x,))
    assert results
    for _, J in results:
        compare(J.detach(), expected, EXACT)


def test_two_samples_under_batch_norm() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 8)).double()
    x = normal(2, 3)
    for _, J in supported(Statistics, net, (x,)):
        compare(J.detach(), jacobian_blocks(net, (x,)), 1e-9)


def test_running_statistics_move_once_a_call() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    twin = copy.deepcopy(net)
    jac = AutoJacobian(net, on_miss="estimate", store=":memory:")
    x = normal(512, 3)
    for _ in range(3):
        jac(x)
        twin(x)
        for own, true in zip(net.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(own, true)
    assert "Statistics" in str(jac.plan(x))


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "differentiable"])
def test_weights_may_change_between_calls(grad: bool) -> None:
    for net, x in ((layers(10, 6, 2, 6, 10), normal(4, 10)), (Between().double(), normal(16, 4))):
        kind = Bottleneck if isinstance(net, nn.Sequential) else Statistics
        with torch.set_grad_enabled(grad):
            request, _, problem = planned(net, (x,))
            compute = next(iter(kind.candidates(problem, 0))).prepare(problem)
            for _ in range(2):
                compare(compute(request.leaves, {}).jacobians[0][0], jacobian_blocks(net, (x,)), EXACT)
                with torch.no_grad():
                    for parameter in net.parameters():
                        parameter.mul_(1.3)
            for module in net.modules():
                if isinstance(module, nn.Linear):
                    module.weight = nn.Parameter(module.weight.detach().flip(0))
            compare(compute(request.leaves, {}).jacobians[0][0], jacobian_blocks(net, (x,)), EXACT)


@pytest.mark.parametrize("kind", [Bottleneck, Statistics], ids=lambda kind: kind.__name__)
def test_a_loss_on_the_jacobian_trains_the_weights(kind: Any) -> None:
    net, x = (layers(8, 2, 8), normal(4, 8)) if kind is Bottleneck else (Between().double(), normal(16, 4))
    x.requires_grad_()

    def gradients(J: Tensor) -> Any:
        return torch.autograd.grad(J.pow(3).sum(), [x, *net.parameters()], allow_unused=True)

    rows = [
        torch.autograd.grad(y[i], x, create_graph=True)[0][b] for b, y in enumerate(net(x)) for i in range(y.shape[-1])
    ]
    expected = gradients(torch.stack(rows))
    request, _, problem = planned(net, (x,))
    for method in kind.candidates(problem, 1):
        found = gradients(method.prepare(problem)(request.leaves, {}).jacobians[0][0])
        for one, other in zip(found, expected, strict=True):
            blank = torch.zeros(())
            torch.testing.assert_close(one if one is not None else blank, other if other is not None else blank)


@pytest.mark.parametrize(
    ("func", "shape", "reason"),
    [
        (torch.sin, (5, 8), "nothing between"),
        (lambda x: x @ torch.ones(8, 20, dtype=x.dtype), (5, 8), "nothing between"),
        (lambda x: NARROW(x) + x, (5, 8), "nothing between"),
        (by_frequencies, (5, 8), "nothing between"),
        (lambda x: x - x.mean(0), (5, 8), "coupled"),
        (lambda x: x[:, :3].sin(), (5, 3), "fewer than"),
    ],
    ids=["elementwise", "cut is the input", "skip of the input itself", "complex numbers", "coupled", "small"],
)
def test_a_cut_without_gain_is_not_offered(func: Any, shape: tuple[int, ...], reason: str) -> None:
    assert reason in refusal(Bottleneck, func, normal(*shape))


@pytest.mark.parametrize(
    ("func", "reason"),
    [
        (lambda x: x - x.mean(0) + x.roll(1, 0), "statistics"),
        (lambda x: x * x.roll(1, 0), "statistics"),
        (lambda x: (x @ x.T).softmax(-1) @ x, "statistics"),
        (torch.sin, "statistics"),
    ],
    ids=["statistics and neighbours", "neighbours", "attention", "independent"],
)
def test_other_couplings_are_left_to_other_methods(func: Any, reason: str) -> None:
    x = normal(7, 3)
    assert reason in refusal(Statistics, func, x)
    jac = AutoJacobian(func, on_miss="estimate", store=":memory:")
    compare(jac(x), jacobian_blocks(func, (x,)), EXACT)


def test_a_branch_that_was_not_planned_for_is_right_all_the_same() -> None:
    net = layers(8, 2, 8)

    def func(x: Tensor) -> Tensor:
        return net(x) if x.sum().item() > 0 else x.sin() * x

    def coupled(x: Tensor) -> Tensor:
        return x - x.mean(0) if x.sum().item() > 0 else x * x.roll(1, 0)

    for function, kind in ((func, Bottleneck), (coupled, Statistics)):
        x = normal(9, 8).abs()
        _, _, problem = planned(function, (x,))
        for method in kind.candidates(problem, 1):
            compute = method.prepare(problem)
            for point in (x, -x, x):
                J = compute((point,), {}).jacobians[0][0]
                compare(J.detach(), jacobian_blocks(function, (point,)), EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_under_autocast(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    code = nn.Sequential(nn.Linear(16, 2), nn.Tanh(), nn.Linear(2, 16))
    for kind, model, x in ((Statistics, net, torch.randn(32, 6)), (Bottleneck, code, torch.randn(8, 16))):
        expected = jacobian_blocks(model, (x,), to_double=True).float()
        with torch.autocast("cpu", dtype=dtype):
            results = supported(kind, model, (x,))
        assert results
        for _, J in results:
            assert J.dtype == torch.float32
            assert (J - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", [name for name in STATISTICS if name != "two inputs, two outputs"])
def test_factors_multiply_out_to_the_whole_jacobian(name: str) -> None:
    func, (x,) = STATISTICS[name](9)
    whole = jacobian_full(func, (x,))
    with torch.no_grad():
        jac = AutoJacobian(func, on_miss="estimate", store=":memory:")
        for _ in range(2):
            D, U, V = factors = jac.factors(x)
    event, rank = whole.shape[1 : whole.dim() - x.dim()], len(V)
    assert D.shape == (9, *event, *x.shape[1:])
    low = torch.einsum("bmk,kcn->bmcn", U.reshape(9, -1, rank), V.reshape(rank, 9, -1))
    own = torch.einsum("bmn,bc->bmcn", D.reshape(*low.shape[:2], -1), torch.eye(9, dtype=x.dtype))
    compare((low + own).reshape(whole.shape), whole, EXACT)
    tangent = torch.randn_like(x)
    compare(factors @ tangent, torch.tensordot(whole, tangent, x.dim()), EXACT)


def test_factors_of_independent_samples_and_of_none() -> None:
    x = normal(5, 3)
    D, U, V = AutoJacobian(torch.sin, on_miss="estimate", store=":memory:").factors(x)
    compare(D, x.cos().diag_embed(), EXACT)
    assert U.shape == (5, 3, 0) and V.shape == (0, 5, 3)
    v = normal(5, 3)
    compare(LowRankJacobian(D, U, V) @ v, x.cos() * v, EXACT)
    with pytest.raises(InputError, match=r"shape \(5, 3\) was expected, got \(15, 2\)"):
        LowRankJacobian(D, U, V) @ normal(15, 2)
    nobody = normal(0, 3)
    compare(LowRankJacobian(D[:0], U[:0], V[:, :0]) @ nobody, nobody, EXACT)
    with pytest.raises(UnsupportedError, match="no factors"):
        AutoJacobian(lambda x: x.roll(1, 0), on_miss="estimate", store=":memory:").factors(x)
    with pytest.raises(InputError, match="one output and one input"):
        AutoJacobian(lambda x: (x, x - x.mean(0)), on_miss="estimate", store=":memory:").factors(x)


def test_factors_move_running_statistics_once_and_are_differentiable() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).double()
    twin, x = copy.deepcopy(net), normal(6, 3).requires_grad_()
    D, U, V = AutoJacobian(net, on_miss="estimate", store=":memory:").factors(x)
    twin(x)
    for own, true in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(own, true)
    own = torch.autograd.grad((D + torch.einsum("bmk,kbn->bmn", U, V)).pow(2).sum(), x)[0]
    rows = [torch.autograd.grad(y[i], x, create_graph=True)[0][b] for b, y in enumerate(net(x)) for i in range(4)]
    torch.testing.assert_close(own, torch.autograd.grad(torch.stack(rows).pow(2).sum(), x)[0])


SCRIPT = """
import dataclasses, sys
import torch
from torch import nn
from autojac import AutoJacobian
from autojac.methods.bottleneck import Bottleneck
from autojac.methods.statistics import Statistics
torch.manual_seed(0)
for method, net, x in (
    (Bottleneck(), nn.Sequential(nn.Linear(20, 2), nn.Tanh(), nn.Linear(2, 20)), torch.randn(64, 20)),
    (Statistics(), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()), torch.randn(64, 4)),
):
    jac = AutoJacobian(net, on_miss=sys.argv[1])
    with torch.no_grad():
        J = jac(x)
        plan = jac.plan(x)
        print(plan.method["method"], plan.source, plan.structure.coupling)
        if plan.source != "store":
            ((_, prepared),) = jac._plans.items()
            made = dataclasses.replace(plan, method=method.spec(), effort="quick")
            jac._plans.planner.repository.save(prepared.keys, made)
"""


@pytest.mark.nightly
def test_a_stored_cut_serves_another_process() -> None:
    def run(on_miss: str) -> list[list[str]]:
        command = [sys.executable, "-W", "error", "-c", SCRIPT, on_miss]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        return [line.split() for line in done.stdout.splitlines()]

    assert [line[1] for line in run("estimate")] == ["estimate", "estimate"]
    assert run("error") == [["Bottleneck", "store", "independent"], ["Statistics", "store", "statistics"]]


def test_explain_draws_the_cut() -> None:
    with torch.no_grad():
        code = AutoJacobian(layers(20, 8, 2, 8, 20), on_miss="estimate", store=":memory:").explain(normal(6, 20))
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).double()
        shared = AutoJacobian(net, on_miss="estimate", store=":memory:").explain(normal(32, 3))
    assert "cut: " in code and "(6, 2)" in code
    assert "2 + 2 passes instead of 20" in code
    with torch.no_grad():
        several = AutoJacobian(TwoDecoders(), on_miss="estimate", store=":memory:").explain(normal(6, 64))
    assert re.search(
        r"every path from input \(6, 64\) to output 1 \(6, 64\) runs through .*tanh \(6, 1\): 1 \+ 1 passes", several
    )
    assert "BatchNorm1d at 1: mean (1, 4)" in shared
    assert "4 + 8 passes instead of 128" in shared
