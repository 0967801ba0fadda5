"""A Jacobian in parts is the Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian, InputError, UnsupportedError
from harness import Counted, compare
from oracle import jacobian_blocks, jacobian_full

MIX = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def estimated(func: Any, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


def plain(x: Tensor) -> Tensor:
    return (x @ MIX).sin()


def centred(x: Tensor) -> Tensor:
    return plain(x - x.mean(0))


def paired(x: Tensor) -> Tensor:
    return plain(x) * x[[1, 0, 3, 2, 5, 4, 6]].sum(1, keepdim=True)


def attended(x: Tensor) -> Tensor:
    return (x @ x.T).softmax(1) @ plain(x)


COUPLINGS = [plain, centred, paired, attended]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, 3, dtype=torch.float64)


def joined(parts: Any) -> Tensor:
    parts = list(parts)
    assert [start for start, _ in parts] == [0, 3, 6]
    return torch.cat([J for _, J in parts])


@pytest.mark.parametrize("func", COUPLINGS)
def test_parts_of_every_layout(func: Callable[[Tensor], Tensor], x: Tensor, tmp_path: Path) -> None:
    J, full = jacobian_blocks(func, (x,)), jacobian_full(func, (x,))
    compare(joined(estimated(func).chunks(x, bytes=3 * 72)), J)
    compare(joined(estimated(func, layout="full").chunks(x, bytes=3 * 504)), full)
    compare(joined(estimated(func, layout="diagonal").chunks(x, bytes=72)), J.diagonal(dim1=1, dim2=2))
    out = np.memmap(tmp_path / "J", np.float64, "w+", shape=(7, 3, 3))
    assert estimated(func).chunks(x, bytes=200, out=out) is out
    compare(torch.from_numpy(np.array(np.memmap(tmp_path / "J", np.float64, "r", shape=(7, 3, 3)))), J)


def test_independent_samples_are_computed_apart(x: Tensor) -> None:
    func = Counted(plain)
    jac = estimated(func, verify="never")
    list(jac.chunks(x, bytes=72))
    func.batches.clear()
    list(jac.chunks(x, bytes=72))
    # a method may run the seeds of one sample as a batch
    assert len(func.batches) == 7
    assert max(func.batches) <= 3


@pytest.mark.parametrize("couple", [False, True], ids=["apart", "coupled"])
def test_nests_shared_inputs_and_axes(couple: bool, x: Tensor) -> None:
    def func(nest: dict[str, Tensor], w: Tensor, shift: Tensor) -> tuple[dict[str, Tensor], int]:
        y = (nest["a"].T @ w).sin() * shift
        return {"y": y - couple * y.mean(0), "z": y.sum(1)}, 5

    options = {"argnums": (1, 0), "in_dims": ({"a": 1}, None, 0), "has_aux": True}
    args = ({"a": x.T}, MIX, x.exp())
    J, _ = estimated(func, **options)(*args)
    parts = list(estimated(func, **options).chunks(*args, bytes=500))
    assert len(parts) > 2
    for name in ("y", "z"):
        compare(torch.cat([part[name][0] for _, part in parts]), J[name][0])
        compare(torch.cat([part[name][1]["a"] for _, part in parts]), J[name][1]["a"])
    out = {name: (torch.zeros_like(w), {"a": torch.zeros_like(nest["a"])}) for name, (w, nest) in J.items()}
    compare(estimated(func, **options).chunks(*args, bytes=500, out=out), J)


def test_parts_of_parameters_train(x: Tensor) -> None:
    net = nn.Linear(3, 2).double()
    jac = AutoJacobian.of_parameters(nn.Sequential(net, nn.Tanh()), on_miss="estimate", store=":memory:")
    J = jac(x)
    parts = [part["0.weight"] for _, part in jac.chunks(x, bytes=500)]
    assert len(parts) > 2
    compare(torch.cat(parts), J["0.weight"])
    both = [torch.autograd.grad(t.square().sum(), net.weight) for t in (torch.cat(parts), J["0.weight"])]
    compare(*both)


def test_bad_input_is_said_at_once(x: Tensor, tmp_path: Path) -> None:
    jac = estimated(plain)
    np.memmap(tmp_path / "J", np.float64, "w+", shape=(7, 3, 3))
    for out, got in (
        (np.memmap(tmp_path / "J", np.float64, "r", shape=(7, 3, 3)), "read-only"),
        (torch.zeros(7, 3, 3, dtype=x.dtype, requires_grad=True), "requires grad"),
        (torch.zeros(7, 3, 3), "got float32"),
        (7, "got an int"),
    ):
        with pytest.raises(InputError, match=got):
            jac.chunks(x, out=out)
    with pytest.raises(UnsupportedError, match="updates buffers"):
        estimated(nn.BatchNorm1d(3).double()).chunks(x)
