"""Tensors of a cut are called by the modules in whose code they are made, and nobody else notices."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from autojac import AutoJacobian
from autojac.graph.recorder import record


class MeanPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        self.context = MeanPool()
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        return self.head(h * self.context(h))


def explained(func: nn.Module, x: Tensor) -> str:
    with torch.no_grad():
        return AutoJacobian(func, on_miss="estimate", store=":memory:").explain(x)


def test_shared_tensors_are_called_by_their_modules() -> None:
    text = explained(Net(), torch.randn(32, 3))
    assert "samples meet in 8 shared numbers alone: MeanPool at context: mean (8,)" in text
    assert "2 + 8 passes instead of 64" in text
    deep = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()))
    assert "BatchNorm1d at 1.0: mean (1, 4), var (1, 4)" in explained(deep, torch.randn(32, 3))


def test_bottlenecks_are_too() -> None:
    net = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 20))
    text = explained(net, torch.randn(6, 20))
    assert "every path runs through Linear at 2: addmm (6, 2)" in text or "Tanh at 3: tanh (6, 2)" in text


def test_weights_put_in_the_place_of_a_module_s_own_change_no_names() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with torch.no_grad():
        text = AutoJacobian.of_parameters(net, on_miss="estimate", store=":memory:").explain(torch.randn(200, 3))
    assert "BatchNorm1d at 1: mean (1, 4), var (1, 4)" in text


def test_other_threads_and_hooks_are_left_alone() -> None:
    net, other = Net(), Net()
    running, done = threading.Event(), threading.Event()

    def elsewhere() -> None:
        running.wait(60)
        other(torch.randn(4, 3))
        done.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()

    def func(x: Tensor) -> Tensor:
        y = net(x)
        running.set()
        assert done.wait(60)
        return y.sin()

    x = torch.randn(4, 3)
    hooks = [dict(vars(torch_module)[name]) for name in ("_global_forward_hooks", "_global_forward_pre_hooks")]
    recording = record(lambda leaves, kwargs: (func(leaves[0]),), [x], {}, [0], named=True)
    thread.join()
    assert recording.graph is not None
    assert {id(module) for module in net.modules()} >= set(recording.owners.values()) - {0}
    made = {operation.name: recording.owners[operation.outputs[0] or 0] for operation in recording.graph.operations}
    assert made["mean"] == id(net.context)
    assert made["tanh"] == id(net.encoder[1])
    assert made["mul"] == id(net)
    assert made["sin"] == 0
    assert hooks == [dict(vars(torch_module)[name]) for name in ("_global_forward_hooks", "_global_forward_pre_hooks")]
