"""Patterns are read from what a function holds: whatever Python changes there, the next Jacobian is right, unasked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian
from harness import Counted
from oracle import jacobian_full

Change = Callable[[], Any]
INDEX = torch.tensor([1, 0, 3, 2, 5, 4])


class Banded(nn.Module):
    """A constant matrix with zeros, an index, a number and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("band", torch.eye(6, dtype=torch.float64))
        self.index = INDEX.clone()
        self.shift = 1
        self.order = [1, 0, 3, 2, 5, 4]
        self.inner = nn.Sequential(Rolled(1))

    def forward(self, x: Tensor) -> Tensor:
        moved = x[:, self.index] + x[:, self.order] + torch.roll(x, self.shift, 1) * self.inner(x)
        return torch.tanh(x @ self.band) * moved


class Rolled(nn.Module):
    shift = 0

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(x, self.by + self.shift, 1)


def _data(model: Banded) -> None:
    model.band.data = torch.ones(6, 6, dtype=torch.float64)


CHANGES: dict[str, Callable[[Banded], Any]] = {
    "buffer written": lambda model: model.band.add_(0.1),
    "buffer replaced": lambda model: setattr(model, "band", torch.ones(6, 6, dtype=torch.float64)),
    "buffer's data replaced": _data,
    "index written": lambda model: model.index.copy_(INDEX.flip(0)),
    "index replaced": lambda model: setattr(model, "index", torch.zeros(6, dtype=torch.int64)),
    "number": lambda model: setattr(model, "shift", 3),
    "list": lambda model: model.order.reverse(),
    "list replaced": lambda model: setattr(model, "order", [0, 0, 1, 1, 2, 2]),
    "module replaced": lambda model: model.inner.__setitem__(0, Rolled(2)),
    "module appended": lambda model: model.inner.append(Rolled(2)),
    "attribute of a module inside": lambda model: setattr(model.inner[0], "by", 4),
    "hook": lambda model: model.inner.register_forward_hook(lambda module, args, y: y.flip(1)),
    "class attribute": lambda model: setattr(Rolled, "shift", 2),
    "method": lambda model: setattr(model.inner[0], "forward", lambda x: x.flip(1)),
}


def right(func: Callable[..., Any], x: Tensor, found: Tensor, **kwargs: Any) -> None:
    whole = jacobian_full(func, (x,), kwargs=kwargs)
    if found.layout == torch.sparse_csr:
        torch.testing.assert_close(found.to_dense(), whole.reshape(found.shape))
    else:
        torch.testing.assert_close(found, whole.diagonal(dim1=0, dim2=2).movedim(-1, 0))


@pytest.mark.by_day(4)
@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning")
@pytest.mark.parametrize("layout", ["blocks", "sparse"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_a_module_holds_is_looked_at_in_every_call(
    name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rolled, "shift", 0)
    model = Banded()
    x = torch.randn(3, 6, dtype=torch.float64)
    jac = AutoJacobian(model, layout=layout, store=":memory:", effort="estimate")
    for _ in range(4):  # past the second check, before the eighth call's
        right(model, x, jac(x))
    CHANGES[name](model)
    for _ in range(3):
        right(model, x, jac(x))
    CHANGES["number"](model)
    right(model, x, jac(x))


FACTOR = [1]


def helper(x: Tensor) -> Tensor:
    return torch.roll(x, FACTOR[0], 1)


@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning")
@pytest.mark.parametrize("layout", ["blocks", "sparse"])
def test_variables_and_globals_are_looked_at(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shift = 1

    def func(x: Tensor) -> Tensor:
        return x * torch.roll(x, shift, 1) * helper(x)

    x = torch.randn(3, 8, dtype=torch.float64)
    jac = AutoJacobian(func, layout=layout, store=":memory:", effort="estimate")
    for _ in range(4):
        right(func, x, jac(x))
    shift = 2
    right(func, x, jac(x))
    right(func, x, jac(x))
    monkeypatch.setitem(globals(), "FACTOR", [3])
    right(func, x, jac(x))
    monkeypatch.setitem(globals(), "helper", lambda x: x.flip(1))
    right(func, x, jac(x))


@pytest.mark.by_day(2)
@pytest.mark.parametrize("layout", ["blocks", "sparse"])
@pytest.mark.parametrize("keyword", [False, True])
def test_neighbours_may_change_with_every_call(layout: str, keyword: bool) -> None:
    def func(x: Tensor, near: Tensor) -> Tensor:
        return x * x[near].sum(-1, keepdim=True)

    x = torch.randn(8, 2, dtype=torch.float64)
    jac = AutoJacobian(func, layout=layout, store=":memory:", effort="estimate")
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        near = torch.randperm(8, generator=generator)
        found = jac(x, near=near) if keyword else jac(x, near)
        right(func, x, found, near=near)


def test_one_edge_among_many_classes_is_noticed() -> None:
    def func(x: Tensor, near: Tensor) -> Tensor:
        return x * x[near].sum(1)

    count = 60
    ring = (torch.arange(count)[:, None] + torch.arange(1, 14)) % count
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        near, x = ring.clone(), torch.randn(count, 2, dtype=torch.float64, generator=generator)
        jac = AutoJacobian(func, in_dims=(0, None), store=":memory:", effort="estimate")
        for _ in range(3):
            jac(x, near)
        row, step = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((0, count), (14, 46)))
        near[row, 0] = (row + step) % count
        right(func, x, jac(x, near), near=near)


def test_what_changes_all_the_time_is_checked_a_few_times_only() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * torch.roll(x, 1, 1)

    func = Counted(Counting())
    x = torch.randn(3, 8)
    jac = AutoJacobian(func, store=":memory:", effort="estimate", layout="sparse")
    for _ in range(64):
        jac(x)
    before = func.calls
    for _ in range(10):
        jac(x)
    # func keeps a count, which one more plain call in each leaves right
    assert func.calls == before + 20


@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning")
@pytest.mark.parametrize("layout", ["blocks", "full", "sparse"])
def test_an_index_that_func_exchanges_in_each_call_decides_the_next_one(layout: str) -> None:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near = INDEX.roll(1)

        def forward(self, x: Tensor) -> Tensor:
            y = x * x[self.near]
            self.near = self.near.roll(1)
            return y

    model, x = Turning(), torch.randn(6, 2, dtype=torch.float64)
    jac = AutoJacobian(model, layout=layout, store=":memory:", on_miss="estimate")
    for _ in range(9):  # past the check of the eighth call
        near = model.near
        whole = jacobian_full(lambda x, near=near: x * x[near], (x,))
        found = jac(x)
        assert torch.equal(model.near, near.roll(1))
        if layout == "blocks":
            whole = whole.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        found = found.to_dense() if layout == "sparse" else found
        torch.testing.assert_close(found.reshape(whole.shape), whole)
