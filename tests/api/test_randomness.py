"""Functions that draw: one mask for all candidates, and the random state ends where one call would leave it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian, OptionError, RandomnessError
from autojac.methods.base import registry
from harness import compare, planned
from oracle import jacobian_blocks


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 2)).double()


def noisy(x: Tensor) -> Tensor:
    return (x + torch.randn_like(x)).sin() * torch.rand(len(x), 1, dtype=x.dtype)


def one_by_one(func: Any, x: Tensor) -> Tensor:
    """Blocks of samples that each start from the present random state."""
    state, found = torch.get_rng_state(), []
    for b in range(len(x)):
        torch.set_rng_state(state)
        found.append(jacobian_blocks(func, (x[b : b + 1],)))
    return torch.cat(found)


def after_one_call(func: Any, x: Tensor) -> Tensor:
    state = torch.get_rng_state()
    func(x)
    end = torch.get_rng_state()
    torch.set_rng_state(state)
    return end


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64)


@pytest.mark.parametrize("func", [network(), noisy], ids=["dropout", "noise"])
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_every_candidate_draws_alike(func: Any, randomness: str, x: Tensor) -> None:
    with torch.no_grad():
        request, _, problem = planned(func, (x,), randomness=randomness)
        expected = jacobian_blocks(func, (x,)) if randomness == "different" else one_by_one(func, x)
        end, start, kinds = (
            after_one_call(func, x if randomness == "different" else x[:1]),
            torch.get_rng_state(),
            set(),
        )
        for kind in registry().values():
            for method in kind.candidates(problem, 1):
                if "Compiled" in repr(method) or method.unsupported(problem) is not None:
                    continue
                torch.set_rng_state(start)
                result = method.prepare_call(problem)(request.leaves, {})
                compare(result.jacobians[0][0], expected)
                assert torch.equal(torch.get_rng_state(), end), method
                kinds.add(type(method).__name__)
    wanted = {"Pull", "Push", "Replay"} if randomness == "different" else {"Pull", "Push", "PerSample", "Replicate"}
    # noise that is added keeps the coordinates apart
    assert kinds == wanted | ({"ColoredPull", "ColoredPush"} if func is noisy else set())


@pytest.mark.parametrize("on_miss", ["estimate", "tune"])
def test_draws_differ_from_call_to_call_and_equal_a_plain_calls(on_miss: str, x: Tensor) -> None:
    net = network()
    jac = AutoJacobian(net, store=":memory:", on_miss=on_miss, randomness="different", budget_s=1.0)
    seen = []
    for _ in range(3):
        expected, end, state = jacobian_blocks(net, (x,)), after_one_call(net, x), torch.get_rng_state()
        y, J = jac.value_and_jacobian(x)
        assert torch.equal(torch.get_rng_state(), end)
        compare(J.detach(), expected)
        torch.set_rng_state(state)
        compare(y.detach(), net(x).detach())
        seen.append(J.detach())
    assert not torch.equal(seen[0], seen[1])


def test_the_same_for_every_sample_as_torch_vmap_does_it(x: Tensor) -> None:
    net = network()
    jac = AutoJacobian(net, store=":memory:", on_miss="estimate", randomness="same")
    state = torch.get_rng_state()
    rows = x[:1].expand(4, 3)
    J = jac(rows).detach()
    compare(J, J[:1].expand_as(J).contiguous())
    torch.set_rng_state(state)
    single = torch.func.jacrev(lambda row: net(row[None])[0])
    compare(torch.vmap(single, randomness="same")(rows).detach(), J)


def test_a_function_that_draws_nothing_pays_nothing(x: Tensor) -> None:
    calls = []
    jac = AutoJacobian(
        lambda x: calls.append(len(x)) or x.sin(), store=":memory:", on_miss="estimate", randomness="same"
    )
    compare(jac(x), torch.diag_embed(x.cos()))
    assert 1 not in calls


def test_drawing_is_refused_unless_asked_for(x: Tensor) -> None:
    with pytest.raises(RandomnessError, match="randomness='different'"):
        AutoJacobian(noisy, store=":memory:")(x)
    with pytest.raises(OptionError, match="exclude each other"):
        AutoJacobian(noisy, randomness="same", has_aux=True)
    draws_with_aux = AutoJacobian(
        lambda x: (noisy(x), x.sum()), store=":memory:", on_miss="estimate", randomness="different", has_aux=True
    )
    expected = jacobian_blocks(noisy, (x,))
    J, aux = draws_with_aux(x)
    compare((J, aux), (expected, x.sum()))
