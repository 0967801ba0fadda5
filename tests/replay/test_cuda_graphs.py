"""CUDA graphs: what is read where it is, what is copied, and when one is captured again.

A CPU has none: there a capture is a function that runs the program again, on the same memory and into the same memory.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac.methods.base import build
from autojac.methods.cuda_graph import CudaGraph
from autojac.replay import cuda_graphs
from autojac.replay.codegen import Run
from autojac.replay.cuda_graphs import MOST_MOVES, STEADY_REPLAYS, RecordedKernels, capture_on_first_call
from autojac.replay.trace import ProgramInputs
from harness import compare, forced, planned
from oracle import jacobian_blocks

METHOD = {
    "method": "CudaGraph",
    "inner": {"method": "Replay", "inner": {"method": "Pull", "seeds": "shared", "engine": "loop"}},
}


def rerun(run: Run, arguments: Sequence[Tensor]) -> RecordedKernels:
    """Record a program as a CUDA graph would, on a CPU."""
    outputs = run(*arguments)

    @torch.no_grad()
    def replay() -> None:
        for output, made in zip(outputs, run(*arguments), strict=True):
            output.copy_(made)

    return RecordedKernels(replay, outputs)


@dataclass
class Recorder:
    """Records kernels, and notes which memory they read."""

    device: str
    captures: list[list[tuple[int, int]]] = field(default_factory=list)

    def __call__(self, run: Run, arguments: Sequence[Tensor]) -> RecordedKernels:
        self.captures.append([(argument.data_ptr(), argument.nbytes) for argument in arguments])
        return rerun(run, arguments) if self.device == "cpu" else RECORD(run, arguments)

    def copied_bytes(self, *held: Tensor) -> int:
        """How many bytes a call copies into the memory that the last capture reads, besides that of some tensors."""
        places = [tensor.data_ptr() for tensor in held]
        return sum(size for place, size in self.captures[-1] if place not in places)


RECORD = cuda_graphs.record_kernels


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder(request.param)
    monkeypatch.setattr(cuda_graphs, "record_kernels", made)
    monkeypatch.setattr(CudaGraph, "unsupported", lambda self, problem: None)
    return made


class Scaled(nn.Module):
    """A weight whose memory is not contiguous, and a buffer."""

    scale: Tensor

    def __init__(self, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, dtype=torch.float64, device=device).t())
        self.register_buffer("scale", torch.rand(2, dtype=torch.float64, device=device))
        self.counts = False

    def forward(self, x: Tensor) -> Tensor:
        if self.counts:
            self.scale.add_(1.0)
        return (x @ self.weight).sin() * self.scale


def at(device: str) -> Tensor:
    return torch.randn(4, 3, dtype=torch.float64, device=device)


def right(jac: autojac.AutoJacobian, model: nn.Module, x: Tensor) -> None:
    compare(jac(x), jacobian_blocks(model, (x,), 0))


@torch.no_grad()
def test_only_the_arguments_of_a_call_are_copied(recorder: Recorder) -> None:
    model, x = Scaled(recorder.device), at(recorder.device)
    jac = forced(model, (x,), METHOD, verify="never")
    calls = []
    for factor in (1.0, 2.0, -1.0):
        calls.append((jac(factor * x), copy.deepcopy(model), factor * x))
        # as an optimizer and a running average do
        model.weight.mul_(1.5)
        model.weight.data.add_(0.1)
        model.scale.sub_(0.25)
    assert len(recorder.captures) == 1
    assert recorder.copied_bytes(model.weight, model.scale) == x.nbytes
    for J, then, x in calls:
        compare(J, jacobian_blocks(then, (x,), 0))


def test_a_backward_reads_what_func_holds_where_it_is(recorder: Recorder) -> None:
    model, x = Scaled(recorder.device), at(recorder.device)
    jac = forced(model, (x,), METHOD, verify="never")
    calls = []
    for factor in (1.0, -2.0):
        found = torch.autograd.grad(jac(factor * x).square().sum(), model.weight)
        calls.append((found, copy.deepcopy(model), factor * x))
        with torch.no_grad():
            model.weight.mul_(1.5)
    # forward, backward through J, and backward through the values
    assert len(recorder.captures) == 3
    for capture in recorder.captures:
        assert {model.weight.data_ptr(), model.scale.data_ptr()} <= {place for place, _ in capture}
    for found, then, x in calls:
        J = torch.func.vmap(torch.func.jacrev(then))(x)
        compare(found, torch.autograd.grad(J.square().sum(), then.weight))


@torch.no_grad()
def test_results_are_copies(recorder: Recorder) -> None:
    model, x = Scaled(recorder.device), at(recorder.device)
    jac = forced(model, (x,), METHOD, verify="never")
    kept = jac(x)
    expected = kept.clone()
    jac(3 * x)
    compare(kept, expected)


@torch.no_grad()
def test_other_memory_is_captured_again(recorder: Recorder) -> None:
    model, x = Scaled(recorder.device), at(recorder.device)
    jac = forced(model, (x,), METHOD, verify="never")
    right(jac, model, x)
    model.weight.data = 2 * model.weight.data
    for _ in range(3):
        right(jac, model, x)
    assert len(recorder.captures) == 2
    assert recorder.copied_bytes(model.weight, model.scale) == x.nbytes


@torch.no_grad()
def test_what_has_other_memory_in_every_call_is_copied(recorder: Recorder) -> None:
    model, x = Scaled(recorder.device), at(recorder.device)
    jac = forced(model, (x,), METHOD, verify="never")
    kept = []
    for _ in range(3 * MOST_MOVES):
        right(jac, model, x)
        kept.append(model.weight.data)  # else the next one may get the same memory
        model.weight.data = 1.5 * model.weight.data
    assert len(recorder.captures) == 1 + MOST_MOVES
    assert recorder.copied_bytes(model.scale) == x.nbytes + model.weight.nbytes


@torch.no_grad()
def test_what_has_other_memory_now_and_then_is_not_copied(recorder: Recorder) -> None:
    weights = [torch.full((2,), float(turn), device=recorder.device) for turn in range(2 * MOST_MOVES)]
    x = torch.ones(2, device=recorder.device)
    program = capture_on_first_call(lambda x, w: (x + w,), ProgramInputs(captured=range(1, 2), written=False))
    for w in weights:
        for _ in range(STEADY_REPLAYS + 1):
            compare(program(x, w)[0], x + w)
    assert len(recorder.captures) == len(weights)
    assert recorder.copied_bytes(weights[-1]) == x.nbytes


@torch.no_grad()
def test_another_tensor_in_the_same_memory_is_read_there(recorder: Recorder) -> None:
    x, w = (torch.ones(6, device=recorder.device) for _ in range(2))
    program = capture_on_first_call(lambda x, w: (x + w,), ProgramInputs(captured=range(1, 2), written=False))
    program(x, w)
    compare(program(x, w.mul_(3).view(6))[0], torch.full_like(x, 4.0))
    assert len(recorder.captures) == 1
    # the same address, and other numbers
    for other in (w[::2], w[:3]):
        compare(program(x[:3], other)[0], torch.full_like(x[:3], 4.0))
    assert len(recorder.captures) == 3


@torch.no_grad()
def test_a_held_tensor_may_be_the_argument_too(recorder: Recorder) -> None:
    x = at(recorder.device)

    def func(y: Tensor) -> Tensor:
        return (y * x.sum(0)).cumsum(1)

    jac = forced(func, (x,), METHOD, verify="never")
    for _ in range(2):
        compare(jac(x), jacobian_blocks(lambda y: (y * x.detach().sum(0)).cumsum(1), (x.clone(),), 0))
        x.mul_(0.5)
    assert len(recorder.captures) == 1
    assert recorder.copied_bytes(x) == x.nbytes


@torch.no_grad()
def test_no_output_of_a_capture_lies_in_held_memory(recorder: Recorder) -> None:
    x, w = at(recorder.device), at(recorder.device)
    program = capture_on_first_call(lambda x, w: (w.t(), x * w), ProgramInputs(captured=range(1, 2), written=False))
    for _ in range(2):
        view, product = program(x, w)
        compare((view, product), (w.t(), x * w))
        assert view.untyped_storage().data_ptr() != w.untyped_storage().data_ptr()
        w.mul_(2.0)
    assert program.kernels is not None  # type: ignore[attr-defined]
    for output in program.kernels.outputs:  # type: ignore[attr-defined]
        assert output.untyped_storage().data_ptr() != w.untyped_storage().data_ptr()


@torch.no_grad()
def test_what_writes_into_a_held_tensor_is_not_captured(recorder: Recorder) -> None:
    model, x = Scaled(recorder.device), at(recorder.device)
    jac = forced(model, (x,), METHOD, verify="never")
    right(jac, model, x)
    captures, before = len(recorder.captures), model.scale.clone()
    model.counts = True
    jac(x)
    jac(x)
    compare(model.scale, before + 2)
    assert len(recorder.captures) == captures
    assert "a capture takes several runs" in str(jac.explain(x))


def test_a_cuda_graph_takes_a_cuda_device() -> None:
    _, _, problem = planned(nn.Linear(3, 2).double(), (torch.randn(4, 3, dtype=torch.float64),))
    reason = build(METHOD).unsupported(problem)
    assert reason is not None
    assert "CUDA device" in reason
