"""What is recorded of a call: the same numbers, the same derivatives, or a sentence why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autojac.graph.recorder import FunctionRecording, record
from scenarios import SCENARIOS, Scenario

SAFE = [scenario for scenario in SCENARIOS if "mutates_input" not in scenario.traits]
REFUSED = {
    "writes into torch.zeros": "written in place before",
    "in place on its own copy": "written in place before",
    "custom Function of the old style": "custom autograd Function Cube",
    "gradient reversal": "custom autograd Function ReverseGradient",
}


def recorded(func: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[FunctionRecording, list[Tensor]]:
    flat, spec = pytree.tree_flatten(args)
    places = [place for place, value in enumerate(flat) if isinstance(value, Tensor)]

    def fn(leaves: Sequence[Tensor], kwargs: Any) -> Any:
        whole = list(flat)
        for place, leaf in zip(places, leaves, strict=True):
            whole[place] = leaf
        return pytree.tree_leaves(func(*pytree.tree_unflatten(whole, spec), **kwargs))

    leaves = [flat[place] for place in places]
    floats = [position for position, leaf in enumerate(leaves) if leaf.is_floating_point()]
    return record(fn, leaves, kwargs, floats), leaves


def replayed(recording: FunctionRecording, leaves: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    assert recording.graph is not None, recording.reason
    graph = recording.graph
    given = [leaf.detach().requires_grad_() if leaf.is_floating_point() else leaf for leaf in leaves]
    outputs = graph.run(graph.outputs, dict(zip(graph.inputs, given, strict=True)))
    return outputs, [x for x in given if x.is_floating_point()]


@pytest.mark.by_day(3)
@pytest.mark.parametrize("scenario", SAFE, ids=str)
def test_a_replay_has_the_values_and_gradients_of_the_call(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make(0)
    recording, leaves = recorded(func, *args, **kwargs)
    if recording.graph is None:
        assert REFUSED.get(scenario.name, "") in recording.reason
        assert recording.reason
        return
    assert scenario.name not in REFUSED
    outputs, inputs = replayed(recording, leaves)
    for own, true in zip(outputs, recording.values, strict=True):
        torch.testing.assert_close(own, true, rtol=1e-12, atol=1e-14, equal_nan=True)
        assert own.requires_grad == true.requires_grad
        if true.requires_grad:
            cotangent = torch.randn_like(true)
            ours = torch.autograd.grad(own, inputs, cotangent, allow_unused=True, retain_graph=True)
            theirs = torch.autograd.grad(true, recording.inputs, cotangent, allow_unused=True, retain_graph=True)
            for one, other in zip(ours, theirs, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, equal_nan=True)


def test_most_scenarios_are_recorded() -> None:
    graphs = [recorded(func, *args, **kwargs)[0].graph for func, args, kwargs in (s.make(0) for s in SAFE[::4])]
    assert sum(graph is None for graph in graphs) < 0.08 * len(graphs)


class Noted(torch.autograd.Function):
    """Keeps its argument and returns nothing that matters, as checkpoints did up to torch 2.11."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty(0).detach()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        raise AssertionError


def test_a_custom_function_that_no_output_depends_on_is_no_obstacle() -> None:
    def func(x: Tensor) -> Tensor:
        Noted.apply(x)
        return x.sin()

    x = torch.randn(3, 2, dtype=torch.float64)
    graph = recorded(func, x)[0].graph
    assert graph is not None
    assert [operation.name for operation in graph.operations] == ["sin"]
    assert recorded(lambda x: x.sin() + Noted.apply(x).sum(), x)[0].graph is None


def test_running_statistics_move_once_and_a_replay_leaves_them() -> None:
    net, twin = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double() for _ in range(2))
    twin.load_state_dict(net.state_dict())
    x = torch.randn(6, 3, dtype=torch.float64)
    recording, leaves = recorded(net, x)
    twin(x)
    replayed(recording, leaves)
    for own, true in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(own, true)


def test_batch_norm_in_half_precision_is_computed_in_float32() -> None:
    net = nn.BatchNorm1d(4).half()
    x = 10 + torch.randn(64, 4).half()
    recording, leaves = recorded(net, x)
    outputs, _ = replayed(recording, leaves)
    assert outputs[0].dtype == torch.float16
    true = nn.BatchNorm1d(4).double()(x.double())
    torch.testing.assert_close(outputs[0].double(), true, rtol=1e-3, atol=1e-3)


def counter_that_is_read() -> Callable[[Tensor], Tensor]:
    calls = torch.zeros(())

    def func(x: Tensor) -> Tensor:
        calls.add_(1)
        return x * calls

    return func


def hooked(x: Tensor) -> Tensor:
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda gradient: 2 * gradient)
    return y.cos()


@pytest.mark.parametrize(
    ("func", "reason"),
    [
        (counter_that_is_read(), "written in place before"),
        (hooked, "hangs a hook"),
        (lambda x: torch.randn_like(x) * nn.functional.rrelu(x, training=True), "draws random numbers"),
        (
            lambda x: x.mul(2).unsqueeze(0)[0].add_(1).sin() * torch.stack([x.sin() for _ in range(5000)])[0],
            "more than",
        ),
    ],
    ids=["counter that is read", "hook", "random operator", "too long"],
)
def test_what_cannot_be_recorded_is_said_in_a_sentence(func: Any, reason: str) -> None:
    recording, _ = recorded(func, torch.randn(4, 3))
    assert recording.graph is None
    assert reason in recording.reason
    assert len(recording.values) == 1


def powers_in_place(x: Tensor) -> Tensor:
    y = x.square().add(1).float_power_(0.5).to(x.dtype)
    return y.pow_(-0.5) + (x * x).add(1).pow_(x).floor_divide_(0.5)


def test_an_operator_in_place_is_replaced_by_what_takes_the_same_arguments() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    outputs, _ = replayed(*recorded(powers_in_place, x))
    torch.testing.assert_close(outputs[0].detach(), powers_in_place(x))


def test_graphs_of_one_structure_have_one_key() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    keys = [recorded(net, torch.randn(5, 3))[0].graph.key for _ in range(2)]  # type: ignore[union-attr]
    assert keys[0] == keys[1]

    def branching(x: Tensor) -> Tensor:
        return x.sin() if x.sum().item() > 0 else x.cos()

    one, other = (recorded(branching, sign * torch.ones(2, 2))[0].graph for sign in (1, -1))
    assert one is not None and other is not None
    assert one.reads_data
    assert one.key != other.key
