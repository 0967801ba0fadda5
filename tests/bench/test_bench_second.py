"""Second derivatives, steps and products are right before they are compared with the same by hand."""

from __future__ import annotations

import functools

import pytest
import torch

from autojac.bench import second
from autojac.bench.jacobians import OVER_BEST
from autojac.bench.run import Settings

SETTINGS = Settings(effort="estimate", rounds=3, budget_s=0.2, shortest_s=1e-5, race_s=0.05)
SMALL = {
    "chain-hessian": functools.partial(second.chain_hessian, size=12),
    "marquardt-step": functools.partial(second.marquardt_step, camera=(6, 2, 5)),
    "laplacian": functools.partial(second.laplacian, sizes=(4, 8, 8, 1), batch=5),
    "laplacian-trained": functools.partial(second.trained_laplacian, sizes=(4, 8, 8, 1), batch=5),
    **{name: case for name, case in second.CASES.items() if name.startswith("jacobian-from")},
    **{kind: functools.partial(second.product, kind=kind, workload="mlp-2-16-2") for kind in ("jvp", "vjp")},
    **{kind: functools.partial(second.product, kind=kind, workload="mlp-2-16-2") for kind in ("gram", "norm")},
}


@pytest.mark.parametrize("name", SMALL)
def test_all_ways_are_right(name: str) -> None:
    result = SMALL[name](SETTINGS)
    assert {outcome.state for outcome in result.outcomes} == {"right"}, result.outcomes
    assert result.outcomes[0].name == "autojac"
    figure = result.figure(OVER_BEST)
    assert figure is not None
    assert figure.value > 0
    assert figure.bound is not None


def test_there_is_a_case_of_each_kind() -> None:
    assert set(second.CASES) == set(SMALL)


def test_passes_of_a_chain_are_counted() -> None:
    passes = second.chain_hessian(SETTINGS, size=12).figures[0]
    assert (passes.what, passes.value, passes.bound) == ("passes", 3, 6)


def test_a_laplacian_is_the_trace_of_the_hessian() -> None:
    _, func, x = second.scalar_network((3, 4, 1), 2)
    whole = torch.autograd.functional.hessian(lambda z: func(z).sum(), x).diagonal(dim1=0, dim2=2)
    expected = whole.diagonal(dim1=0, dim2=1).sum(-1)
    for value in second.laplacian_ways(func, x).values():
        torch.testing.assert_close(value(), expected)
