"""`autojac.verify` of coupled functions: a wrong number is found in whichever sample it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import autojac
from harness import Counted
from oracle import jacobian_blocks

COUPLED: dict[str, Callable[[Tensor], Tensor]] = {
    "centered": lambda x: torch.tanh(x - 0.3 * x.mean(0)),
    "neighbour": lambda x: x.sin() * x.roll(1, 0),
    "attention": lambda x: (x @ x.mT).softmax(1) @ x,
    "batch norm": nn.BatchNorm1d(3).double(),
}
LAYOUTS = ["blocks", "diagonal"]


def right(func: Callable[[Tensor], Tensor], x: Tensor, layout: str) -> Tensor:
    blocks = jacobian_blocks(func, (x,))
    return blocks.diagonal(dim1=1, dim2=2).clone() if layout == "diagonal" else blocks


def refused(wrong: Tensor, func: Callable[[Tensor], Tensor], x: Tensor, layout: str) -> bool:
    try:
        autojac.verify(wrong, func, x, layout=layout)
    except autojac.VerificationError as error:
        return "off by" in str(error)
    return False


@pytest.mark.by_day(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [16, 64, 128])
@pytest.mark.parametrize("name", ["centered", "attention"])
def test_one_wrong_sample_is_found_in_a_large_batch(name: str, batch: int, layout: str) -> None:
    func, x = COUPLED[name], torch.randn(batch, 3, dtype=torch.float64)
    J = right(func, x, layout)
    autojac.verify(J, func, x, layout=layout)
    for sample in (0, *torch.randint(batch, (2,)).tolist(), batch - 1):
        wrong = J.clone()
        wrong[sample] *= 2
        assert refused(wrong, func, x, layout), sample


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", COUPLED)
def test_one_entry_a_little_off_is_found_in_a_small_batch(name: str, layout: str) -> None:
    func = COUPLED[name]
    for _ in range(5):
        x = torch.randn(6, 3, dtype=torch.float64)
        J = right(func, x, layout)
        autojac.verify(J, func, x, layout=layout)
        J.view(-1)[J.abs().argmax()] *= 1.05
        assert refused(J, func, x, layout)


def test_every_sample_of_a_shared_inputs_jacobian_is_seen() -> None:
    x, w = torch.randn(32, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def func(w: Tensor, x: Tensor) -> Tensor:
        return (x * w).sin()

    J = autojac.AutoJacobian(func, in_dims=(None, 0), on_miss="estimate", store=":memory:")(w, x)
    autojac.verify(J, func, w, x, in_dims=(None, 0))
    for sample in range(0, 32, 5):
        wrong = J.clone()
        wrong[sample] *= 2
        with pytest.raises(autojac.VerificationError, match="off by"):
            autojac.verify(wrong, func, w, x, in_dims=(None, 0))


def test_func_is_not_evaluated_for_every_sample() -> None:
    func = Counted(COUPLED["centered"])
    x = torch.randn(64, 3, dtype=torch.float64)
    J = right(COUPLED["centered"], x, "blocks")
    autojac.verify(J, func, x)
    assert func.calls < 16
