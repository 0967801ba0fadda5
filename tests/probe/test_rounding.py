"""Samples that meet in what cancels, as in inputs that are centred by the batch: rounding is no coupling.

And the other way round: no coupling that is there, however small or deep asleep, is taken for rounding.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import autojac
from autojac import AutoJacobian, StructureChangedWarning
from autojac.core.sandbox import Sandbox
from autojac.core.structure import Structure
from autojac.methods.base import registry
from autojac.probe.masks import index_masks
from autojac.probe.rounding import is_only_rounding
from autojac.probe.sample_pairs import ProbePoint
from harness import compare, keep_waiting_for_a_core, planned
from oracle import jacobian_blocks, jacobian_full
from programs import program

B, N, POINTS = 8, 3, 10
DTYPES = [torch.float32, torch.float64]


class Posterior(torch.nn.Module):
    """A Gaussian process's predictive mean, with distances as GPyTorch takes them: centred by the batch, expanded."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.points = torch.nn.Parameter(torch.randn(POINTS, N, dtype=dtype, generator=generator))
        self.alpha = torch.nn.Parameter(torch.randn(POINTS, 2, dtype=dtype, generator=generator))
        self.raw = torch.nn.Parameter(torch.zeros(1, N, dtype=dtype))
        self.one = torch.nn.Parameter(torch.ones((), dtype=dtype))
        self.zero = torch.nn.Parameter(torch.zeros((), dtype=dtype))

    def distances(self, x: Tensor, z: Tensor) -> Tensor:
        shift = x.mean(-2, keepdim=True)
        x, z = x - shift, z - shift
        x_norm, z_norm = x.pow(2).sum(-1, keepdim=True), z.pow(2).sum(-1, keepdim=True)
        left = torch.cat([-2.0 * x, x_norm, torch.ones_like(x_norm)], -1)
        right = torch.cat([z, torch.ones_like(z_norm), z_norm], -1)
        return left.matmul(right.transpose(-2, -1)).clamp_min(0)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.nn.functional.softplus(self.raw)
        d: Tensor = self.distances(x / scale, self.points / scale)
        return (d / -2).exp() @ self.alpha


class Read(Posterior):
    """It looks whether both sides are the same points, as GPyTorch does."""

    def distances(self, x: Tensor, z: Tensor) -> Tensor:
        return super().distances(x, x if torch.equal(x, z) else z)


class Expanded(Posterior):
    def distances(self, x: Tensor, z: Tensor) -> Tensor:
        shift = x.mean(0)
        x, z = x - shift, z - shift
        return (x * x).sum(1, keepdim=True) + (z * z).sum(1) - 2 * x @ z.T


class Pairwise(Posterior):
    def distances(self, x: Tensor, z: Tensor) -> Tensor:
        shift = x.mean(0)
        return torch.cdist(x - shift, z - shift) ** 2


class Differences(Posterior):
    def distances(self, x: Tensor, z: Tensor) -> Tensor:
        shift = x.mean(0)
        return ((x - shift)[:, None] - (z - shift)).pow(2).sum(-1)


CENTRED = [Posterior, Read, Expanded, Pairwise, Differences]

Coupling = Callable[[Posterior, Tensor], Tensor]


def slope(size: float) -> Coupling:
    return lambda model, x: size * x.mean(0)[:2]


def eps(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps


def sized(model: Posterior, x: Tensor) -> Tensor:
    """A step of one bit, as a number."""
    return (torch.nextafter(x[:, :2], x[:, :2] + 1) - x[:, :2]).detach() * x.mean()


def in_float32(model: Posterior, x: Tensor) -> Tensor:
    return 1e-7 * x.mean(0)[:2] if x.dtype == torch.float32 else torch.zeros(2, dtype=x.dtype)


COUPLINGS: dict[str, Coupling] = {
    **{f"small as {size:g}": slope(size) for size in (1e-5, 1e-7, 1e-8, 1e-10, 1e-13, 1e-17, 1e-25)},
    "of the size of eps": lambda model, x: eps(x) * x.mean(0)[:2],
    "of the size of one bit": sized,
    "multiplied": lambda model, x: x[:, :2] * (1e-8 * x.mean()),
    "only some reach some": lambda model, x: torch.cat([torch.zeros_like(x[:-1, :2]), 1e-8 * x[:1, :2]]),
    "threshold": lambda model, x: (x.mean(0)[:2] - 1e9).relu(),
    "threshold of one feature": lambda model, x: (x.mean(0) - torch.tensor([1e9, 0, 0], dtype=x.dtype)).relu()[:1],
    "threshold before": lambda model, x: (x - 1e9).relu().mean(0)[:2],
    "threshold of one feature before": lambda model, x: (x - torch.tensor([1e9, 0, 0])).relu().mean(0)[:1].to(x.dtype),
    "clamped": lambda model, x: x.mean(0)[:2].clamp(1e8, 2e8),
    "selected": lambda model, x: torch.where(x.mean(0)[:2] > 1e9, x.mean(0)[:2], 0),
    "selected by the sample": lambda model, x: torch.where(x[:, :2] > 1e9, x.mean(0)[:2], 0),
    "masked": lambda model, x: x.mean(0)[:2].masked_fill(x[:, :2] < 1e9, 0),
    "times zero": lambda model, x: 0.0 * x.mean(0)[:2],
    "times a tensor of zeros": lambda model, x: torch.zeros(2, dtype=x.dtype) * x.mean(0)[:2],
    "through a matrix of zeros": lambda model, x: x.mean(0, keepdim=True) @ torch.zeros(N, 2, dtype=x.dtype),
    "times a parameter of zero": lambda model, x: model.zero * x.mean(0)[:2],
    "times one less one": lambda model, x: (model.one - 1) * x.mean(0)[:2],
    "of weights that may move": lambda model, x: x.mean(0)[:2] - model.one * x.mean(0)[:2],
    "gate of the sample": lambda model, x: (x[:, :2] - 1e9).relu() * x.mean(0)[:2],
    "saturated": lambda model, x: 0.01 * torch.sigmoid(x.mean(0)[:2] * 1e-3 - 1e3),
    "added to nothing": lambda model, x: torch.add(torch.zeros(2, dtype=x.dtype), x.mean(0)[:2], alpha=0.0),
}


class Shifted(Posterior):
    """What cancels would, but for a number that is slightly off on one side."""

    off: Any = 0.0

    def distances(self, x: Tensor, z: Tensor) -> Tensor:
        shift = x.mean(0)
        return torch.cdist(x - shift, z - shift * (1 + self.off)) ** 2


def found(func: Callable[[Tensor], Tensor], x: Tensor) -> Structure:
    return autojac.probe(func, x)


def test_a_busy_machine_clears_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Posterior(torch.float32), torch.randn(B, N, generator=torch.Generator().manual_seed(0))
    keep_waiting_for_a_core(monkeypatch)
    structure = found(model, x)
    assert structure.independent and any(line.startswith("rounding:") for line in structure.evidence)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CENTRED)
def test_what_cancels_couples_no_derivatives(kind: type[Posterior], dtype: torch.dtype) -> None:
    model = kind(dtype)
    for seed in range(1):
        x = torch.randn(B, N, dtype=dtype, generator=torch.Generator().manual_seed(seed))
        structure = found(model, x)
        assert structure.independent and not structure.sliceable and structure.assurance == "observed"
        assert structure.depends_on_arguments and any(line.startswith("rounding:") for line in structure.evidence)


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_jacobian_is_right_and_no_part_of_the_batch_is_called(dtype: torch.dtype) -> None:
    model, x = Posterior(dtype), torch.randn(B, N, dtype=dtype)
    _, _, problem = planned(model, (x,))
    for method in (cls for name, cls in registry().items() if name in ("BatchChunk", "PerSample", "Replicate")):
        assert all(made.unsupported(problem) for made in method.candidates(problem, 2))
    rtol = 1e-4 if dtype == torch.float32 else 1e-9
    precise = Posterior(torch.float64)
    precise.load_state_dict(model.state_dict())
    jac = AutoJacobian(model, on_miss="estimate", store=":memory:")
    assert "rounding: " in jac.explain(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            y = torch.randn_like(x)
            compare(jac(y).double(), jacobian_blocks(precise, (y.double(),)), rtol=rtol)


@pytest.mark.by_day(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", COUPLINGS)
def test_no_coupling_beside_it_is_taken_for_rounding(kind: str, dtype: torch.dtype) -> None:
    model, x = Expanded(dtype), torch.randn(B, N, dtype=dtype)
    assert not found(lambda x: model(x) + COUPLINGS[kind](model, x), x).independent
    assert not found(lambda x: 1e6 * model(x) + COUPLINGS[kind](model, x), x).independent


def test_one_of_a_single_precision_is_found() -> None:
    model, x = Expanded(torch.float32), torch.randn(B, N)
    assert not found(lambda x: model(x) + in_float32(model, x), x).independent


@pytest.mark.by_day(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("off", [256, 1e5, 1e8])
def test_what_cancels_but_for_little_does_not(dtype: torch.dtype, off: float) -> None:
    model, x = Shifted(dtype), torch.randn(B, N, dtype=dtype)
    assert found(model, x).independent
    model.off = off * torch.finfo(dtype).eps
    assert not found(model, x).independent
    # a weight that happens to be what makes it cancel
    model.off = model.zero.detach()
    assert not found(model, x).independent


def test_a_round_trip_through_a_lower_precision_stays_coupled() -> None:
    model, x = Expanded(torch.float32), torch.randn(B, N, dtype=torch.float64)
    assert not found(lambda x: model(x.float()).double(), x).independent


def test_an_operator_that_differs_between_precisions_stays_coupled() -> None:
    @torch.library.custom_op("autojac_tests::off", mutates_args=())
    def off(shift: Tensor) -> Tensor:
        return shift * (1 + 1e-7 if shift.dtype == torch.float32 else 1)

    off.register_autograd(lambda ctx, g: g * (1 + 1e-7 if g.dtype == torch.float32 else 1))
    model, x = Shifted(torch.float32), torch.randn(B, N)

    def func(x: Tensor) -> Tensor:
        shift = x.mean(0)
        y: Tensor = (-0.1 * torch.cdist(x - shift, model.points - off(shift)) ** 2).exp() @ model.alpha
        return y

    assert not found(func, x).independent


def test_hooks_and_functions_of_their_own_stay_coupled() -> None:
    model, x = Expanded(torch.float32), torch.randn(B, N)

    def hooked(x: Tensor) -> Tensor:
        h = x * 1
        h.register_hook(lambda g: g + 1e-8 * g.mean(0))
        y: Tensor = model(h)
        return y

    class Leaky(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            return g + 1e-8 * g.mean(0)

    assert not found(hooked, x).independent
    assert not found(lambda x: model(Leaky.apply(x)), x).independent


def test_values_may_cancel_where_derivatives_do_not() -> None:
    model, x = Posterior(torch.float32), torch.randn(B, N)

    def func(x: Tensor) -> Tensor:
        shift = x.mean(0)
        return torch.cdist(x - shift, model.points - shift.detach()) @ model.alpha

    assert not found(func, x).independent
    assert not found(lambda x: model(x + 1e-8 * (x.mean(0) - x.mean(0).detach())), x).independent


READ: dict[str, Coupling] = {
    "as a number": lambda model, x: x[:, :2] * (1 + 1e-3 * float(x.detach().mean().nan_to_num())),
    "as a constant": lambda model, x: torch.tensor(x.detach().nan_to_num().mean(0)[:2].tolist()) * x[:, :2],
    "by a branch": lambda model, x: x.roll(1, 0)[:, :2] if float(x.detach().mean().nan_to_num()) > 0.5 else x[:, :2],
}


@pytest.mark.parametrize("kind", READ)
def test_what_python_reads_of_other_samples_is_no_rounding(kind: str) -> None:
    model, x = Read(torch.float32), torch.randn(B, N)
    structure = found(lambda x: model(x) + READ[kind](model, x), x)
    assert not any(line.startswith("rounding:") for line in structure.evidence)


def test_the_guard_looks_on() -> None:
    model, x, on = Expanded(torch.float64), torch.randn(B, N, dtype=torch.float64), [False]

    def func(x: Tensor) -> Tensor:
        return model(x) + (x.mean(0)[:2] if on[0] else 0)

    jac = AutoJacobian(func, on_miss="estimate", store=":memory:", verify="always")
    jac(x)
    on[0] = True
    with pytest.warns(StructureChangedWarning, match="does not hold"):
        J = jac(x)
    compare(J, jacobian_full(func, (x,)) if J.dim() == 4 else jacobian_blocks(func, (x,)), rtol=1e-8)


@pytest.mark.parametrize("mode", ["alone", "added", "times"])
def test_no_program_of_which_a_derivative_reaches_another_sample_is_cleared(mode: str) -> None:
    batch, counts = 4, {True: 0, False: 0}
    for seed in range(30):
        torch.manual_seed(seed)
        made = program(random.Random(seed), batch)
        if made is None:
            continue
        body, x, names = made
        x = x.detach()
        points, alpha = torch.randn(5, x[0].numel(), dtype=x.dtype), torch.randn(5, dtype=x.dtype)

        def func(x: Tensor, body: Any = body, points: Tensor = points, alpha: Tensor = alpha) -> Tensor:
            h, y = x.flatten(1), body(x)
            shift = h.mean(0)
            kernel = (-0.05 * ((h - shift)[:, None] - (points - shift)).pow(2).sum(-1)).exp() @ alpha
            kernel = kernel.reshape(-1, *[1] * (y.dim() - 1))
            found: Tensor = y if mode == "alone" else kernel + 1e-9 * y if mode == "added" else kernel * y
            return found

        point = ProbePoint(lambda leaves, _, func=func: (func(leaves[0]),), (x,), {}, (0,), (), batch, Sandbox([]))
        cleared = is_only_rounding(point, index_masks(batch), 1e-9, torch.Generator().manual_seed(seed), 100.0)
        counts[cleared] += 1
        for scale in (0.1, 1.0, 10.0) if cleared else ():
            J = jacobian_full(func, ((x + scale * torch.randn_like(x)),))
            J = J.reshape(batch, -1, batch, x[0].numel()).abs().amax((1, 3))
            assert float((J * (1 - torch.eye(batch))).max()) <= 1e-13 * float(J.max()), names
    assert min(counts.values()) >= 3


def test_nothing_of_it_runs_where_nothing_is_slight(monkeypatch: pytest.MonkeyPatch) -> None:
    autojac.probe(torch.sin, torch.randn(B, N))
    monkeypatch.setattr(sys.modules["autojac.probe.coupling"], "is_only_rounding", None)
    x = torch.randn(B, N)
    for func in (torch.sin, lambda x: x - x.mean(0), lambda x: x.roll(1, 0), lambda x: x + 1e-3 * x.mean()):
        autojac.probe(func, x)
    norm = torch.nn.BatchNorm1d(N)
    autojac.probe(norm, x)
