"""Functions of tensors without values, of classes of their own, and of tensors that they write into and keep."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

import autojac
from autojac import AutoJacobian
from autojac.planning.search import memory
from harness import compare, forced
from oracle import jacobian_blocks, jacobian_full

LOOP = {"method": "Pull", "seeds": "identity", "engine": "loop"}
METHODS = [
    LOOP,
    {"method": "PerSample", "mode": "reverse"},
    {"method": "Push", "seeds": "shared", "engine": "loop"},
    {"method": "Replay", "inner": LOOP},
]
SEARCHES: dict[str, dict[str, Any]] = {"estimate": {"on_miss": "estimate"}, "quick": {"budget_s": 0.5}}


def points() -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64)


def network(normalized: bool) -> nn.Module:
    layers = [nn.Linear(3, 4), *([nn.BatchNorm1d(4)] if normalized else []), nn.Tanh(), nn.Linear(4, 2)]
    return nn.Sequential(*layers).double().eval()


@pytest.mark.by_day(4)
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_an_ensemble_whose_skeleton_is_on_meta(normalized: bool, trained: bool) -> None:
    nets = [network(normalized) for _ in range(3)]
    parameters, buffers = stack_module_state(nets)
    if not trained:
        parameters = {name: parameter.detach() for name, parameter in parameters.items()}
    skeleton = copy.deepcopy(nets[0]).to("meta")

    def ensemble(x: Tensor) -> Tensor:
        def one(parameters: Any, buffers: Any) -> Tensor:
            return functional_call(skeleton, (parameters, buffers), (x,))

        return torch.vmap(one, out_dims=1)(parameters, buffers)

    x = points()
    right = torch.stack([jacobian_blocks(net, (x,), 0) for net in nets], 1).detach()
    jacs = [AutoJacobian(ensemble, store=":memory:", **options) for options in SEARCHES.values()]
    jacs += [forced(ensemble, (x,), method) for method in METHODS]
    for jac in jacs:
        for _ in range(2):
            compare(jac(x).detach(), right)
        assert jac(x).requires_grad == trained
        assert not [line for line in jac._plans.planner.function_state.lines() if "meta" in line.lower()]
    with torch.no_grad():
        parameters["0.weight"].mul_(2)
    right = jacobian_blocks(ensemble, (x,), 0).detach()
    for jac in jacs:
        compare(jac(x).detach(), right)


class Group(Tensor):
    """A tensor that multiplies as a group's elements do, as PyPose's LieTensor."""

    def __mul__(self, other: Any) -> Any:
        raise NotImplementedError("a Group can only be multiplied by a Group")

    __rmul__ = __add__ = __sub__ = __mul__


GROUPS: dict[str, Callable[[Tensor], Any]] = {
    "an output": lambda x: x.sin().as_subclass(Group),
    "in a nest": lambda x: {"a": x.sin().as_subclass(Group), "b": x.cos()},
    "all the way": lambda x: x.as_subclass(Group).sin().exp(),
    "coupled": lambda x: (x - x.mean(0)).as_subclass(Group),
}


@pytest.mark.by_day(4)
@pytest.mark.parametrize("name", GROUPS)
def test_outputs_of_a_class_with_an_arithmetic_of_its_own(name: str) -> None:
    func, x = GROUPS[name], points()

    def plain(x: Tensor) -> Any:
        found = func(x)
        if isinstance(found, dict):
            return {key: value.as_subclass(Tensor) for key, value in found.items()}
        return found.as_subclass(Tensor)

    right, value = jacobian_blocks(plain, (x,), 0), plain(x)
    jacs = [AutoJacobian(func, store=":memory:", **options) for options in SEARCHES.values()]
    jacs += [forced(func, (x,), method) for method in METHODS if name != "coupled" or method.get("seeds") == "identity"]
    for jac in jacs:
        for _ in range(2):
            y, jacobian = jac.value_and_jacobian(x)
            compare(jacobian, right)
            compare(y, value)
        z = x.clone().requires_grad_()
        assert all(J.requires_grad for J in torch.utils._pytree.tree_leaves(jac(z))) or name == "coupled"


class Keeps(nn.Module):
    """Writes its input into a tensor that it holds, which has its graph from then on."""

    def __init__(self, weight: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, dtype=torch.float64)) if weight else None
        self.held = torch.zeros(5, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.held[:] = x if self.weight is None else x * self.weight
        return self.held.sin() * 2


@pytest.mark.by_day(2)
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("search", SEARCHES)
def test_a_tensor_that_func_writes_its_input_into(search: str, weight: bool) -> None:
    func, x = Keeps(weight), points()
    jac = AutoJacobian(func, store=":memory:", **SEARCHES[search])
    for scale in (1, 2, 3):
        compare(jac(scale * x).detach(), jacobian_blocks(copy_of(func), (scale * x,), 0))
        assert weight or not func.held.requires_grad
    for scale in (1, 2, 3):
        z = (scale * x).requires_grad_()
        # torch's backward() itself would go on into the graph of the call before
        (ours,) = torch.autograd.grad(jac(z).square().sum(), z)
        w = (scale * x).requires_grad_()
        factor = 1 if func.weight is None else func.weight.detach()
        compare(ours, torch.autograd.grad((2 * factor * (w * factor).cos()).square().sum(), w)[0])
    # the user's own training left a graph there
    torch.autograd.grad(func(x.requires_grad_()).sum(), x)
    compare(jac(x.detach()).detach(), jacobian_blocks(copy_of(func), (x.detach(),), 0))


def copy_of(func: Keeps) -> Keeps:
    """The same function with a tensor of its own."""
    other = Keeps(func.weight is not None)
    other.load_state_dict(func.state_dict())
    return other


def test_a_measurement_of_memory_that_raises_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = memory.peak_bytes

    def failing(run: Any, device: torch.device) -> int | None:
        calls.append(1)
        if len(calls) % 2:
            raise RuntimeError("trying to backward through the graph a second time")
        return real(run, device)

    monkeypatch.setattr(memory, "peak_bytes", failing)
    x = points()
    jac = AutoJacobian(torch.sin, on_miss="tune", budget_s=0.5, store=":memory:")
    compare(jac(x), torch.diag_embed(x.cos()))
    assert len(calls) > 1


class Freed(torch.autograd.Function):
    """A sine whose backward gives back what it has saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.detach()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        found = cotangent * ctx.kept.cos()
        del ctx.kept
        return found


class Overwritten(torch.autograd.Function):
    """A sine whose gradient is taken in forward, and scaled in place in backward, as residual flows save memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.detach().cos())
        return x.sin()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(cotangent)


@pytest.mark.by_day(2)
@pytest.mark.parametrize("function", [Freed, Overwritten])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("layout", ["blocks", "full"])
def test_a_backward_that_runs_only_once(function: Any, coupled: bool, layout: str) -> None:
    def func(x: Tensor) -> Tensor:
        return function.apply(x - x.mean(0) if coupled else x).cumsum(1)

    def plain(x: Tensor) -> Tensor:
        return (x - x.mean(0) if coupled else x).sin().cumsum(1)

    x = points()
    right = (jacobian_blocks if layout == "blocks" else jacobian_full)(plain, (x,), 0)
    jacs = [AutoJacobian(func, layout=layout, store=":memory:", **options) for options in SEARCHES.values()]
    for jac in [*jacs, forced(func, (x,), LOOP, layout=layout)]:
        for scale in (1, 1, 2):
            wanted = right if scale == 1 else jacobian_blocks(plain, (2 * x,), 0)
            if scale == 1 or layout == "blocks":
                compare(jac(scale * x), wanted)


def test_a_backward_that_raises_by_itself_raises() -> None:
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sin()

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            raise ValueError("no derivative today")

    with pytest.raises(ValueError, match="no derivative today"):
        AutoJacobian(Refuses.apply, on_miss="estimate", store=":memory:")(points())


def test_a_backward_that_runs_only_once_behind_moving_buffers_is_refused_by_name() -> None:
    norm = nn.BatchNorm1d(3).double()

    def func(x: Tensor) -> Tensor:
        return Freed.apply(norm(x))  # type: ignore[no-any-return]

    with pytest.raises(autojac.UnsupportedError, match=r"second backward.*eval mode"):
        AutoJacobian(func, on_miss="estimate", store=":memory:")(points())
    norm.eval()
    compare(
        AutoJacobian(func, on_miss="estimate", store=":memory:")(points() * 0 + 1),
        jacobian_blocks(lambda x: norm(x).sin(), (points() * 0 + 1,), 0),
    )
