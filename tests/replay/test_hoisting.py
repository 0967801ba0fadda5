"""What is hoisted follows the tensors that it was computed from."""

from __future__ import annotations

import torch
from torch import Tensor

from autojac.replay.hoisting import Hoist, hoisted_inputs


def test_views_are_made_again_for_other_memory_and_results_for_other_numbers() -> None:
    a, b, c = (torch.randn(3, 2) for _ in range(3))

    def views(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return a.t(), b.t()

    def results(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return (2 * c,)

    inputs = hoisted_inputs(Hoist(views, results, memory=(0, 1), sources=(2,)), (a, b, c))

    def right() -> bool:
        return all(map(torch.equal, inputs(), (a, b, c, a.t(), b.t(), 2 * c)))

    first = inputs()
    assert right() and inputs() is first
    a.mul_(2)
    assert right() and inputs() is first
    for tensor in (a, b):
        tensor.data = tensor + 1
        assert right()
        assert inputs() is inputs()
    c.data.mul_(3)
    assert right()
    assert inputs() is inputs()
    c[0, 0] = torch.nan
    assert inputs() is not inputs()
