"""The memory of one pass, told by the graph of a call, beside what torch's profiler counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autojac.autodiff.pullback import Pullback
from autojac.graph.recorder import record
from autojac.planning.search.memory import peak_bytes


def attention(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.T, -1) @ x


NETWORKS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "elementwise": (torch.sin, (1000, 3)),
    "tanh": (nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 6)), (200, 6)),
    "layer norm": (nn.Sequential(nn.Linear(8, 90), nn.SiLU(), nn.LayerNorm(90), nn.Linear(90, 2)), (200, 8)),
    "batch norm": (nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8)), (300, 8)),
    "convolution": (nn.Sequential(nn.Conv1d(1, 8, 5, padding=2), nn.GELU(), nn.Conv1d(8, 1, 5)), (20, 1, 200)),
    "attention": (attention, (100, 3)),
    "views": (lambda u: u - 0.1 * u * (u.roll(-1, 1) - u.roll(1, 1)), (64, 100)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pass_takes_what_its_graph_tells(name: str) -> None:
    func, shape = NETWORKS[name]
    x = torch.randn(shape)
    recording = record(lambda leaves, kwargs: (func(leaves[0]),), [x], {}, (0,), named=True)

    def one_pass() -> None:
        pullback = Pullback(lambda x: (func(x),), [x], differentiable=False)
        pullback(0, torch.ones_like(pullback.outputs[0]), last=True)

    one_pass()
    measured = peak_bytes(one_pass, x.device)
    assert measured is not None
    assert 0.6 * measured < recording.pass_bytes() < 1.5 * measured


def test_nothing_is_told_of_what_has_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autojac.graph.recorder.MOST_OPERATIONS", 0)
    recording = record(lambda leaves, kwargs: (leaves[0].sin().cos(),), [torch.ones(3, 2)], {}, (0,), named=True)
    assert recording.graph is None
    assert recording.pass_bytes() == 0
