"""`jacobian_from`: the Jacobian of a graph that exists already."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import autojac
from autojac import InputError, StructureChangedWarning, jacobian_from
from autojac.api import graph_plans
from harness import compare
from oracle import jacobian_blocks, jacobian_full
from scenarios import SCENARIOS, Scenario

USABLE = [s for s in SCENARIOS if not s.traits & {"mutates_input", "random"}]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def attention(x: Tensor) -> Tensor:
    return (x @ x.T).softmax(1) @ x


@pytest.mark.by_day(3)
@pytest.mark.parametrize(
    ("scenario", "layout"),
    [(s, "blocks") for s in USABLE] + [(s, "full") for s in USABLE if s.coupling == "dense"],
    ids=str,
)
def test_every_scenario_equals_the_oracle(scenario: Scenario, layout: str) -> None:
    func, args, kwargs = scenario.make(0, torch.float64)
    wanted = (scenario.argnums,) if isinstance(scenario.argnums, int) else scenario.argnums
    if layout == "full" and set(wanted) & set(scenario.shared):
        return
    oracles = {"blocks": jacobian_blocks, "full": jacobian_full}
    shared = {"shared": scenario.shared} if layout == "blocks" else {}
    expected = oracles[layout](func, args, scenario.argnums, kwargs=kwargs, **shared)
    func, args, kwargs = scenario.make(0, torch.float64)
    with torch.enable_grad():
        leaves = pytree.tree_map(lambda x: x.detach().clone().requires_grad_(), [args[k] for k in wanted])
        given_args = list(args)
        for k, x in zip(wanted, leaves, strict=True):
            given_args[k] = pytree.tree_map(torch.clone, x)
        outputs = func(*given_args, **kwargs)
    inputs: Any = leaves[0] if isinstance(scenario.argnums, int) else tuple(leaves)
    dims: Any = None if wanted[0] in scenario.shared else 0
    if not isinstance(scenario.argnums, int):
        dims = tuple(None if k in scenario.shared else 0 for k in wanted)
    if pytree.tree_all(lambda d: d is None, dims):
        dims = "auto"  # all None would mean that there is no batch
    if not any(isinstance(y, Tensor) and y.requires_grad for y in pytree.tree_leaves(outputs)):
        with pytest.raises(InputError, match="outputs with a graph were expected"):
            jacobian_from(outputs, inputs)
        return
    compare(jacobian_from(outputs, inputs, layout=layout, in_dims=dims, allow_unused=True), expected)


@pytest.mark.parametrize("create", [False, True])
def test_a_graph_is_kept_unless_it_is_to_be_freed(create: bool) -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double(), leaf(5, 3)
    y = net(x)
    first = jacobian_from(y, x, create_graph=create)
    y.sum().backward(retain_graph=True)
    compare(jacobian_from(y, x, retain_graph=False), first.detach())
    with pytest.raises(InputError, match=r"freed .* retain_graph=True"):
        jacobian_from(y, x)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_a_differentiable_jacobian_trains_what_lies_before() -> None:
    w, x = leaf(3), leaf(5, 3)
    h = x * w
    J = jacobian_from(h.sin(), h, create_graph=True)
    compare(J.detach(), torch.diag_embed(h.detach().cos()))
    J.square().sum().backward()
    expected = torch.autograd.grad((x * w).cos().square().sum(), (w, x))
    compare((w.grad, x.grad), expected)
    assert not jacobian_from((x * w).sin(), x).requires_grad


def test_outputs_and_inputs_nest_outputs_outside() -> None:
    x1, x2, unused = leaf(6, 3), leaf(6, 2), leaf(6, 4)
    outputs = {"a": x1.sin(), "b": (x2.sum(1) * x1.prod(1), torch.ones(6, 2))}
    with pytest.raises(InputError, match=r"no output depends on input 2: .* allow_unused=True"):
        jacobian_from(outputs, [x1, {"rest": (x2, unused)}])
    J = jacobian_from(outputs, [x1, {"rest": (x2, unused)}], allow_unused=True)
    assert J["b"][0][1]["rest"][0].shape == (6, 2)
    compare(J["a"][0], torch.diag_embed(x1.detach().cos()))
    assert not J["a"][1]["rest"][1].any() and J["a"][1]["rest"][1].shape == (6, 3, 4)
    assert not any(part.any() for part in pytree.tree_leaves(J["b"][1]))


def test_parameters_belong_to_all_samples() -> None:
    net, x = nn.Linear(5, 5).double(), leaf(5, 5)  # as many samples as rows of the weight
    J = jacobian_from(net(x).sin(), (x, net.weight))
    assert J[1].shape == (5, 5, 5, 5)
    compare(J, jacobian_blocks(lambda x, w: (x @ w.T + net.bias.detach()).sin(), (x, net.weight), (0, 1), shared=(1,)))


def test_without_a_batch() -> None:
    x = leaf(4)
    compare(jacobian_from((x.sin(), x.sum()), x, in_dims=None), (torch.diag(x.detach().cos()), torch.ones(4).double()))


def test_a_wrong_declaration_is_caught() -> None:
    x = leaf(6, 3)
    with pytest.warns(StructureChangedWarning, match="declared independent"):
        J = jacobian_from(attention(x), x, coupling="independent")
    compare(J, jacobian_blocks(attention, (x,)))


@given(
    batch=st.integers(2, 9),
    source=st.integers(0, 8),
    target=st.integers(0, 8),
    layout=st.sampled_from(["blocks", "diagonal"]),
)
def test_one_coupled_pair_is_found(batch: int, source: int, target: int, layout: str) -> None:
    source, target = source % batch, target % batch
    x, reach = leaf(batch, 3), torch.zeros(batch, batch, dtype=torch.float64)
    reach[target, source] = 1e-6

    def func(x: Tensor) -> Tensor:
        return x.sin() + reach @ x.flip(1) ** 2

    expected = jacobian_blocks(func, (x,))
    compare(
        jacobian_from(func(x), x, layout=layout),
        expected.diagonal(dim1=1, dim2=2) if layout == "diagonal" else expected,
    )


def test_work_is_batched_but_for_functions_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = []
    original = graph_plans.Pull.of_graph
    monkeypatch.setattr(
        graph_plans.Pull, "of_graph", lambda self, *rest: methods.append(self.engine) or original(self, *rest)
    )
    x = leaf(4, 40)
    jacobian_from(x.sin() @ torch.randn(40, 40).double(), x)
    assert methods == ["batched"]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: (leaf(3, 2).detach().sin(), leaf(3, 2)), InputError, "outputs with a graph were expected"),
        (lambda: (leaf(3, 2).sin(), torch.ones(3, 2)), InputError, "does not require grad"),
        (lambda: (leaf(3, 2).sin(), 1.0), InputError, "a tensor was expected"),
        (lambda: (leaf(3, 2).sin(), []), InputError, "got an empty one"),
        (lambda: (leaf(3, 2).sum(), leaf(3, 2)), autojac.OutputError, "scalar"),
        (lambda: (torch.view_as_complex(leaf(3, 2)), leaf(3, 2)), autojac.OutputError, "view_as_real"),
    ],
)
def test_what_cannot_be_is_said(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        jacobian_from(*make())
    with pytest.raises(autojac.OptionError, match="axis 1"):
        x = leaf(2, 3)
        jacobian_from(x.T.sin(), x, in_dims=1)


@pytest.mark.parametrize("coupling", ["auto", "dense"])
def test_outputs_and_inputs_without_elements(coupling: str) -> None:
    def func(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :0] * 1, x.sin() + z.sum(1, keepdim=True)

    args = (leaf(4, 3), leaf(4, 0))
    compare(jacobian_from(func(*args), args, coupling=coupling), jacobian_blocks(func, args, (0, 1)))
