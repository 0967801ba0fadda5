"""What a graph proves by itself, without the layers of the probe that look at numbers: never more than is true."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autojac.graph.analysis import flow_of
from autojac.graph.batch_axis.propagation import UNFORESEEN
from autojac.graph.recorder import record
from autojac.planning.problem_builder import ProblemBuilder
from autojac.probe.batch_axis_proof import confirm, prove
from autojac.probe.sample_pairs import ProbePoint
from harness import compare, forced, planned
from oracle import jacobian_full
from programs import program
from provable import COUPLED, INDEPENDENT


def proved(func: Any, x: Tensor) -> tuple[bool, str]:
    request, seen, problem = planned(func, (x,), in_dims=0)
    analysis = ProblemBuilder.analyze(request, seen, [True])
    point = ProbePoint(seen.fn, request.leaves, {}, (0,), (), problem.batch, seen.sandbox)
    return confirm(prove(analysis), analysis, point)[:2]


@pytest.mark.by_day(2)
@pytest.mark.filterwarnings("ignore::autojac.errors.ModesDisagreeWarning")
@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.filterwarnings("ignore:.*some entries of output 0 of func move:autojac.NoGraphWarning")
def test_no_graph_of_a_coupled_function_is_a_proof(name: str) -> None:
    sound, line = proved(*COUPLED[name]())
    assert not sound
    assert UNFORESEEN not in line


def test_graphs_of_independent_models_are() -> None:
    found = [name for name, build in INDEPENDENT.items() if proved(*build())[0]]
    assert len(found) >= 50


def dead(x: Tensor, other: Tensor) -> Tensor:
    """Coupled where no probe looks."""
    return torch.where(x > 1e6, other, x)


class Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.roll(1, 0)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent.roll(-1, 0)


class Wrapped(Tensor):
    """A subclass that runs operators out of sight."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made: Wrapped = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Wrapped(func(*(arg.inner if isinstance(arg, Wrapped) else arg for arg in args), **(kwargs or {})))


HOLD = torch.zeros(4, 4)


def in_a_thread(x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return dead(x, pool.submit(lambda: x.detach().roll(1, 0)).result())


def swapped(x: Tensor) -> Tensor:
    other, shifted = torch.zeros(4, 4), x.detach().roll(1, 0).clone()
    torch.utils.swap_tensors(other, shifted)
    return dead(x, other)


def reassigned(x: Tensor) -> Tensor:
    weight = nn.Parameter(torch.zeros(4, 4))
    weight.data = x.detach().roll(1, 0)
    return dead(x, weight)


def filled(x: Tensor) -> Tensor:
    other = torch.zeros_like(x, requires_grad=False)
    other.map_(x.detach().roll(1, 0), lambda old, new: new)  # type: ignore[attr-defined]
    return dead(x, other)


def kept(x: Tensor) -> Tensor:
    HOLD.copy_(x.detach().roll(1, 0))
    return dead(x, HOLD)


def resized(x: Tensor) -> Tensor:
    other = torch.empty(0)
    other.set_(x.detach().untyped_storage(), 0, x.shape, x.stride()[::-1])  # type: ignore[call-overload]
    return dead(x, other)


def added_elsewhere(x: Tensor) -> Tensor:
    other = [torch.zeros(4, 4)]
    torch._foreach_copy_(other, [x.detach().roll(1, 0)])
    return dead(x, other[0])


HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: dead(x, x.roll(1, 0)),
    "custom Function": lambda x: dead(x, Shifted.apply(x)),
    "thread": in_a_thread,
    "deep copy": lambda x: dead(x, copy.deepcopy(x.detach().roll(1, 0))),
    "pickle": lambda x: dead(x, pickle.loads(pickle.dumps(x.detach().roll(1, 0)))),
    "dlpack": lambda x: dead(x, torch.from_dlpack(x.detach()).roll(1, 0)),
    "dlpack capsule": lambda x: dead(x, torch.utils.dlpack.from_dlpack(torch._C._to_dlpack(x.detach())).roll(1, 0)),
    "data": lambda x: dead(x, x.data.roll(1, 0)),
    "NumPy": lambda x: dead(x, torch.from_numpy(x.detach().numpy()).roll(1, 0)),
    "parameter": lambda x: dead(x, nn.Parameter(x.detach().roll(1, 0))),
    "subclass": lambda x: dead(x, Wrapped(x.detach()).roll(1, 0).inner),
    "swapped tensors": swapped,
    "reassigned memory": reassigned,
    "map_": filled,
    "written into what is kept": kept,
    "set_": resized,
    "foreach": added_elsewhere,
    "printed": lambda x: x.roll(1, 0) if "nan" in repr(x) else x,
    "allclose": lambda x: x.roll(1, 0) if torch.allclose(x, torch.zeros(())) else x,
    "mask that decides a shape": lambda x: x.roll(1, 0) if len(x[x > 1e6]) else x,
    "unique": lambda x: x.roll(1, 0) if len(x.detach().unique()) < 3 else x,
    "contained": lambda x: x.roll(1, 0) if 1e6 in x.detach() else x,
    "count as a shift": lambda x: x.roll(int((x.detach() > 1e6).sum()), 0),
    "index that data move": lambda x: x[(torch.arange(4) + (x.detach()[:, 0] > 1e6)) % 4],
    "vmap over features": torch.vmap(lambda c: dead(c, c.roll(1, 0)), in_dims=1, out_dims=1),
    "sparse matrix": lambda x: dead(x, torch.eye(4).roll(1, 0).to_sparse() @ x),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_coupling_that_hides_is_not_proved_away(name: str) -> None:
    sound, line = proved(HIDDEN[name], torch.randn(4, 4))
    assert not sound, line
    assert line.startswith("proof: none")


@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning")
@pytest.mark.filterwarnings("ignore::autojac.errors.ModesDisagreeWarning")
@pytest.mark.parametrize("name", HIDDEN)
def test_coupling_that_hides_is_replayed_right_or_not_at_all(name: str) -> None:
    func, x = HIDDEN[name], torch.randn(4, 4)
    method = {"method": "Replay", "inner": {"method": "Pull", "seeds": "identity", "engine": "loop"}}
    jac = forced(func, (x,), method, coupling="dense", layout="full", verify="never")
    waking = x.clone()
    waking[1, 0] = 2e6  # where what is dead elsewhere lives
    for point in (x, 2 * x, waking, x, torch.zeros_like(x), waking):
        value, J = jac.value_and_jacobian(point)
        compare(value, func(point), 1e-6)
        compare(J, jacobian_full(func, (point,)), 1e-5)


@given(r=st.randoms(use_true_random=False), batch=st.sampled_from([2, 3, 4, 6]))
@settings(max_examples=400)
def test_random_programs_are_proved_only_if_their_samples_are_apart(r: random.Random, batch: int) -> None:
    """Operators on axes, indices and shapes, with every size equal to the batch that can be."""
    made = program(r, batch)
    if made is None:
        return
    func, x, names = made
    recording = record(lambda leaves, kwargs: (func(leaves[0]),), [x], {}, [0])
    if recording.graph is None:
        return
    flow = flow_of(recording.graph, [True], batch)
    assert not any(UNFORESEEN in loss for loss in flow.losses.values()), (names, flow.losses)
    if flow.independent and not flow.graph.reads_data:
        assert apart(func, x), names


def apart(func: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether no row moves when another sample does, at two scales."""
    for scale in (1.0, 30.0):
        point = x + scale * torch.randn_like(x)
        base = func(point)
        for sample in range(len(x)):
            moved = point.clone()
            moved[sample] += 10 * torch.randn_like(moved[sample])
            others = torch.arange(len(x)) != sample
            if not torch.allclose(func(moved)[others], base[others], rtol=1e-9, atol=1e-12, equal_nan=True):
                return False
    return True
