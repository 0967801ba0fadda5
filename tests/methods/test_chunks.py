"""Chunks of any size give what all seeds at once give, and engines agree: as `chunk_size` of jacrev and jacfwd."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from autojac.methods.base import build
from autojac.problem.problem import Problem
from harness import compare, planned
from oracle import jacobian_blocks, jacobian_full

CHUNKS = (1, 2, 3, 4, 7, 10, 1000)
ENGINES = [("Pull", "vmap"), ("Pull", "batched"), ("Push", "vmap")]


def func(x: Tensor, y: Tensor) -> Any:
    """Several outputs of several ranks, of two inputs of which one is smaller."""
    return (x.sin() * y, x + y.exp()), {"square": x**2, "sum": x.sum(-1)}


def coupled(x: Tensor, y: Tensor) -> Any:
    """The same with samples that see each other."""
    return (x * x.mean(0), x + y.exp()), {"square": x**2, "sum": y.sum(-1) * x.prod(-1).cumsum(0)}


def unbatched(x: Tensor, y: Tensor) -> Any:
    """The same without a batch: one output is a scalar."""
    return (x.sin() * y, x + y.exp()), {"square": x**2, "sum": x.sum()}


KINDS = {
    "independent": (func, {}, (5, 3), (5, 1)),
    "coupled": (coupled, {}, (4, 2), (4, 1)),
    "unbatched": (unbatched, {"in_dims": None}, (5, 2), (1, 2)),
    "full": (func, {"layout": "full"}, (3, 3), (3, 1)),
    "coupled and full": (coupled, {"layout": "full"}, (4, 2), (4, 1)),
}


@functools.cache
def problem_of(kind: str) -> tuple[Any, Problem, Any]:
    """The request, the problem and the right answer, flat."""
    function, options, *shapes = KINDS[kind]
    torch.manual_seed(0)
    args = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    request, _, problem = planned(function, args, argnums=(0, 1), **options)
    whole = "in_dims" in options or options.get("layout") == "full"
    expected = (jacobian_full if whole else jacobian_blocks)(function, args, (0, 1))
    return request, problem, expected


@pytest.mark.by_day(4)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("method", "engine"), ENGINES)
@pytest.mark.parametrize("seeds", ["identity", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_chunk_gives_the_same(kind: str, seeds: str, method: str, engine: str, chunk: int) -> None:
    request, problem, expected = problem_of(kind)
    one = build({"method": method, "seeds": seeds, "engine": engine, "chunk": chunk})
    if seeds == "shared" and not problem.structure.independent:
        assert one.unsupported(problem) is not None
        return
    assert one.unsupported(problem) is None
    result = one.prepare(problem)(request.leaves, request.keywords)
    compare(request.layout.jacobian(result.jacobians), expected)
    compare(request.layout.value(result.values), request.layout.value(request.layout.fn(request.leaves, {})))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_every_chunk_of_samples_gives_the_same(mode: str, chunk: int) -> None:
    request, problem, expected = problem_of("independent")
    result = build({"method": "PerSample", "mode": mode, "chunk": chunk}).prepare(problem)(request.leaves, {})
    compare(request.layout.jacobian(result.jacobians), expected)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_graph_survives_chunks(chunk: int) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    _, _, problem = planned(lambda x: x.sin() * x.prod(1, keepdim=True), (x,))
    assert problem.differentiable
    whole, cut = (
        build({"method": "Pull", "seeds": "shared", "engine": "batched", "chunk": size}).prepare(problem)((x,), {})
        for size in (None, chunk)
    )
    gradients = [torch.autograd.grad(result.jacobians[0][0].pow(2).sum(), x)[0] for result in (whole, cut)]
    compare(*gradients)
