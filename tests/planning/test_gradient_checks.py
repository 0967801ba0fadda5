"""The gradient through J is checked wherever J is, and not in the search alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autojac import AutoJacobian, StructureChangedWarning
from autojac.problem.problem import Result
from autojac.problem.reference import Reference
from harness import compare, forced, planned

PUSH = {"method": "Push", "seeds": "shared", "engine": "loop", "chunk": None}
FORWARD = [
    PUSH,
    {**PUSH, "engine": "vmap"},
    {"method": "PerSample", "mode": "forward", "chunk": None},
    {"method": "Replicate", "mode": "forward"},
]
# under another name than its own, by which it would be ruled out as something that may run
NORMS = {"layer": torch.nn.functional.layer_norm}


class LaterNormed(torch.nn.Module):
    """A network that comes to normalize its features when it is told to: forward mode is right until then."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(2, 6).double()
        self.state = {"normed": False}

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        return (NORMS["layer"](h, (6,)) if self.state["normed"] else h).tanh()


def gradients(jacobian: Tensor, net: LaterNormed, x: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 2, jacobian.numel(), dtype=jacobian.dtype).view_as(jacobian)
    return list(torch.autograd.grad((jacobian * weight).sum(), [x, net.lin.weight], retain_graph=True))


def expected(net: LaterNormed, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    y = net(x)
    rows = [torch.autograd.grad(y[:, k].sum(), x, create_graph=True)[0] for k in range(y.shape[1])]
    jacobian = torch.stack(rows, 1)
    return jacobian, gradients(jacobian, net, x)


def off(jacobian: Tensor, net: LaterNormed, x: Tensor) -> float:
    right, pulled = expected(net, x)
    pairs = zip([jacobian, *gradients(jacobian, net, x)], [right, *pulled], strict=True)
    return max(float(((one - other).abs().amax() / other.abs().amax()).detach()) for one, other in pairs)


@pytest.mark.parametrize("method", FORWARD, ids=str)
def test_a_scheduled_check_sees_a_wrong_gradient(method: dict[str, Any]) -> None:
    net = LaterNormed()
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2).requires_grad_()
    jac = forced(net, (x,), method)
    for _ in range(4):
        assert off(jac(x), net, x) < 1e-12
    assert jac.plan(x).method == method
    net.state["normed"] = True
    with pytest.warns(StructureChangedWarning, match="gradient through J"):
        jacobians = [jac(x) for _ in range(4)]
    # at the latest the eighth call is checked, and what it returns is right already
    assert off(jacobians[-1], net, x) < 1e-12
    assert off(jac(x), net, x) < 1e-12
    # what couples with what was not in doubt
    assert jac.plan(x).structure.independent


@pytest.mark.parametrize("method", FORWARD, ids=str)
def test_a_replay_that_is_recorded_again_is_right_at_once(method: dict[str, Any]) -> None:
    net = LaterNormed()
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2).requires_grad_()
    jac = forced(net, (x,), {"method": "Replay", "inner": method})
    for _ in range(3):
        assert off(jac(x), net, x) < 1e-12
    net.state["normed"] = True
    with pytest.warns(StructureChangedWarning, match="gradient through J"):
        assert off(jac(x), net, x) < 1e-12
    assert off(jac(x), net, x) < 1e-12


def test_a_stored_plan_is_checked_with_its_gradient_at_its_first_use() -> None:
    net = LaterNormed()
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2).requires_grad_()
    jac = forced(net, (x,), PUSH)
    jac.plan(x)
    net.state["normed"] = True
    with pytest.warns(StructureChangedWarning, match="gradient through J"):
        assert off(jac(x), net, x) < 1e-12


def test_a_check_uses_nothing_up_and_fires_no_hook() -> None:
    fired: list[str] = []

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            fired.append("caller")
            return grad

    net = LaterNormed()
    jac = forced(net, (torch.zeros(4, 2, dtype=torch.float64, requires_grad=True),), PUSH, verify="always")
    net.lin.weight.register_hook(lambda grad: fired.append("weight"))
    source = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2).requires_grad_()
    x = Once.apply(source)
    jacobian = jac(x)
    assert fired == []
    jacobian.sum().backward()
    assert sorted(fired) == ["caller", "weight"]


def test_functions_without_a_second_derivative_are_served() -> None:
    net = torch.nn.Linear(2, 3).double()

    def distances(x: Tensor) -> Tensor:
        return torch.cdist(net(x)[:, None], torch.ones(2, 3, dtype=torch.float64))[:, 0]

    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2).requires_grad_()
    jac = forced(distances, (x,), {"method": "Pull", "seeds": "shared", "engine": "loop", "chunk": None})
    for _ in range(5):
        assert jac(x).shape == (4, 2, 2)


def large(wrong_row: float = 0.0, wrong_graph: float = 0.0) -> tuple[Reference, Result]:
    """A reference that pulls rows through their own samples, and a result with something wrong at the last sample."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh()).double()
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(12, 2).requires_grad_()
    request, report, problem = planned(net, (x,))
    assert problem.structure.assurance == "proved"
    reference = Reference(problem, request.leaves, {}, report.sandbox, trained=request.trained)
    y = net(x)
    J = torch.stack([torch.autograd.grad(y[:, k].sum(), x, create_graph=True)[0] for k in range(3)], 1)
    last = torch.zeros_like(J)
    last[-1, -1] = 1
    J = J + wrong_row * last + wrong_graph * last * (J - J.detach())
    return reference, Result((y,), ((J,),))


def test_rows_of_a_large_batch_are_pulled_through_their_own_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autojac.problem.reference.LARGE_BATCH", 12)
    reference, right = large()
    alone = [reference.parts.rows[place][2][0] for place in (0, -1)]
    assert [row.nonzero()[:, 0].unique().tolist() for row in alone] == [[0], [11]]
    assert reference.check(right) is None
    assert reference.check_gradient(right) is None
    reference, wrong = large(wrong_row=1e-3)
    assert "row 35 of output 0" in str(reference.check(wrong))
    reference, wrong = large(wrong_graph=1e-3)
    assert reference.check(wrong) is None
    assert "the gradient through J" in str(reference.check_gradient(wrong))


def test_a_large_batch_is_projected_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autojac.problem.reference.LARGE_BATCH", 12)
    reference, right = large()
    ((J,),) = right.jacobians
    moved = J.detach().clone()
    moved[5, 1] += 1e-3  # in no row that is compared
    assert not any(row // 3 == 5 for _, row, _ in reference.parts.rows)
    assert "a random projection of the whole batch" in str(reference.check(Result(right.values, ((moved,),))))


@pytest.mark.parametrize("limit", [3, 100, 5000])
@pytest.mark.parametrize("kind", ["differs", "raises"])
def test_functions_of_large_batches_that_take_another_way_for_small_ones(limit: int, kind: str) -> None:
    def func(x: Tensor) -> Tensor:
        if len(x) < limit and kind == "raises":
            raise ValueError("too few samples")
        return x.sin() * (1.0 if len(x) < limit else 2.0)

    x = torch.randn(20_000, 2, dtype=torch.float64)
    jac = AutoJacobian(func, store=":memory:", verify="always")
    for scale in (1, 2):
        compare(jac(scale * x), torch.diag_embed(2 * (scale * x).cos()))
