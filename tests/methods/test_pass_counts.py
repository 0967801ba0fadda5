"""How many seeds are pulled and pushed under batch statistics: counted, not only claimed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autojac.core.sandbox import Sandbox
from autojac.methods.statistics import Statistics
from autojac.methods.support import shared_statistics
from harness import Counted, compare, planned, seeds_counted
from oracle import jacobian_blocks

W = torch.linspace(-1, 1, 12, dtype=torch.float64)


def linear_attention(x: Tensor) -> Tensor:
    query, key = F.softplus(x @ W.view(3, 4)), F.softplus(x @ W.view(3, 4).flip(0))
    return query @ (key.T @ x) / (query @ key.sum(0))[:, None]


def whitened(x: Tensor) -> Tensor:
    centered = x - x.mean(0)
    return centered @ torch.linalg.inv(centered.T @ centered / len(x) + torch.eye(3, dtype=x.dtype))


def wide(x: Tensor) -> Tensor:
    return (x @ W.view(3, 4)).repeat(1, 8).sin() * x.amax(0).sum()


# rows m, columns n, shared numbers read, and the least there are
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, int, int, int]]] = {
    "minus the mean": (lambda x: x - x.mean(0), (3, 3, 3, 3)),
    "max pooling": (lambda x: x * x.amax(0), (3, 3, 3, 3)),
    "one temperature": (lambda x: (x / x.std()).softmax(-1), (3, 3, 1, 1)),
    "normaliser over the batch": (lambda x: x - x.logsumexp(0), (3, 3, 3, 3)),
    "contrastive normaliser": (lambda x: x - x.exp().sum().log(), (3, 3, 1, 1)),
    "softmax over the batch": (lambda x: x.softmax(0) * x, (3, 3, 3, 3)),
    "linear attention": (linear_attention, (3, 3, 16, 16)),
    "whitening": (whitened, (3, 3, 12, 12)),
    "BatchNorm": (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double(), (2, 3, 8, 8)),
    "many rows": (wide, (32, 3, 1, 1)),
    "means of many from few": (lambda x: (x.sin()[:, :1] + W) * (x.mean() * W).exp(), (12, 3, 12, 1)),
}


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds of every pull and push."""
    return seeds_counted(monkeypatch, shared_statistics)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_passes_are_those_of_the_cheaper_sides(name: str, seeds: list[int]) -> None:
    function, (m, n, read, least) = FUNCTIONS[name]
    func, x = Counted(function), torch.randn(17, 3, dtype=torch.float64)
    request, seen, problem = planned(func, (x,))
    expected = jacobian_blocks(function, (x,))
    wanted = {"copies": m + read, "mixed": m + 2 * least, "push": n + 2 * least}
    for method in Statistics.candidates(problem, 1):
        seeds.clear()
        calls = func.calls
        with Sandbox(seen.sandbox.captured, seen.sandbox.state)():
            J = method.prepare(problem)(request.leaves, {}).jacobians[0][0]
        compare(J.detach(), expected, 1e-11)
        assert sum(seeds) == wanted[method.local] == method.passes(problem)
        assert func.calls == calls + 1


def test_the_side_that_costs_least_is_estimated_first() -> None:
    def first(function: Callable[[Tensor], Tensor]) -> Statistics:
        problem = planned(function, (torch.randn(4000, 3),))[2]
        return min((m for m in Statistics.candidates(problem, 0)), key=lambda method: method.cost(problem))

    assert first(lambda x: (x @ W.float().view(3, 4)).repeat(1, 64).sin() * x.mean(0).sum()).local == "push"
    assert first(lambda x: x.sin().sum(1) * x.mean(0).sum()).local == "copies"
