"""What func does where values of its data send it is left as by one plain call, whichever way the first call took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autojac import AutoJacobian, PlanStore
from harness import compare, forced, in_use
from oracle import jacobian_blocks

WEIGHT = torch.tensor([[0.3, 0.1, 0.0], [0.2, 0.4, 0.1], [0.1, 0.0, 0.5]], dtype=torch.float64)
METHODS = {
    "pull": {"method": "Pull", "seeds": "shared", "engine": "batched"},
    "push": {"method": "Push", "seeds": "shared", "engine": "loop"},
    "replayed push": {"method": "Replay", "inner": {"method": "Push", "seeds": "shared", "engine": "loop"}},
}
ODD: dict[str, tuple[Callable[[Tensor], bool], Callable[[Tensor], Tensor]]] = {
    "sum": (lambda x: not bool(x.sum() > 0), torch.neg),
    "outliers": (lambda x: bool(x.abs().max() > 10), lambda x: 40 * x),
    "nan": (lambda x: bool(x.isnan().any()), lambda x: torch.nan * x),
}


class Counter(torch.nn.Module):
    """Counts odd batches in a buffer, an attribute and a list."""

    def __init__(self, is_odd: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.register_buffer("odd", torch.zeros((), dtype=torch.float64))
        self.is_odd = is_odd
        self.calls = 0
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.is_odd(x):
            self.odd += 1
            self.calls += 1
            self.seen.append(len(x))
        return (x @ WEIGHT).sin()


def check_counts(jac: AutoJacobian, counter: Counter, odd: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    count = 0
    for call in range(8):
        x = torch.rand(4, 3, dtype=torch.float64) + 0.1
        count += is_odd if (is_odd := call % 3 == 2) else 0
        jac(odd(x) if is_odd else x)
        assert (float(counter.odd), counter.calls, counter.seen) == (count, count, [4] * count)


@pytest.mark.parametrize("options", [{"effort": "estimate"}, {"on_miss": "estimate", "verify": "always"}], ids=str)
@pytest.mark.parametrize("kind", ODD)
def test_a_branch_that_probes_take_leaves_nothing(kind: str, options: dict[str, Any]) -> None:
    is_odd, odd = ODD[kind]
    counter = Counter(is_odd)
    check_counts(AutoJacobian(counter, store=":memory:", **options), counter, odd)


# a plan by a transform, in which no buffer can be written, is replaced when the branch is met
@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning")
@pytest.mark.parametrize("options", [{"on_miss": "tune"}, {"effort": "estimate"}], ids=str)
def test_a_stored_plan_and_a_search_leave_nothing_either(options: dict[str, Any]) -> None:
    is_odd, odd = ODD["sum"]
    store = PlanStore(":memory:")
    for _ in range(2):
        counter = Counter(is_odd)
        check_counts(AutoJacobian(counter, store=store, verify="always", budget_s=0.3, **options), counter, odd)


@pytest.mark.parametrize("method", METHODS)
def test_a_branch_is_counted_once_however_often_a_method_runs_func(method: str) -> None:
    is_odd, odd = ODD["sum"]
    counter = Counter(is_odd)
    example = torch.rand(4, 3, dtype=torch.float64) + 0.1
    jac = forced(counter, (example,), METHODS[method], effort="estimate")
    check_counts(jac, counter, odd)
    assert in_use(jac).plan.method == METHODS[method]


def test_no_method_runs_a_part_of_the_batch_where_values_decide() -> None:
    def scaled(x: Tensor) -> Tensor:
        return x.sin() * (2 if bool(x.sum() > 0) else 3)

    x = torch.rand(4, 3, dtype=torch.float64)
    tried = AutoJacobian(scaled, store=":memory:", on_miss="tune", effort="quick", budget_s=0.5).tune(x)
    assert tried.structure.branches == "by values"
    names = {trial.method["method"] for trial in tried.trials}
    assert "Pull" in names
    assert not names & {"Replicate", "BatchChunk", "PerSample"}


def test_one_sample_is_not_tiled_before_it_is_proved_to_be_independent() -> None:
    def centred(x: Tensor) -> Tensor:
        y = (x @ WEIGHT).tanh()
        return y * y.sum(0) if bool(x.sum() > 0) else y

    jac = AutoJacobian(centred, store=":memory:", effort="estimate")
    for sign in (-1, 1, -1, 1):
        x = sign * torch.rand(1, 3, dtype=torch.float64)
        compare(jac(x), jacobian_blocks(centred, (x,)))
    assert in_use(jac).plan.method["method"] != "Replicate"


@pytest.mark.parametrize("verify", ["auto", "always", "never"])
def test_what_a_later_call_will_raise_is_not_raised_by_this_one(verify: str) -> None:
    spent = torch.zeros(2)

    def limited(x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            spent.add_(1)
            if spent[0] == 3:
                raise ValueError("the budget is used up")
        return x.sin()

    jac = AutoJacobian(limited, store=":memory:", effort="estimate", verify=verify)  # type: ignore[arg-type]
    for sign, count in ((-1, 0), (-1, 0), (1, 1), (1, 2), (-1, 2)):
        x = sign * torch.rand(4, 3, dtype=torch.float64)
        compare(jac(x), torch.diag_embed(x.cos()))
        assert spent.tolist() == [count, count]
    with pytest.raises(ValueError, match="used up"):
        jac(torch.rand(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("verify", ["auto", "always", "never"])
def test_tensors_that_func_holds_can_still_be_resized(verify: str) -> None:
    log = torch.zeros(1)

    def logged(x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            log.resize_(log.numel() + 1)
            log[-1] = 1
        return x.sin()

    jac = AutoJacobian(logged, store=":memory:", effort="estimate", verify=verify)  # type: ignore[arg-type]
    for call in range(8):
        jac((1 if call % 3 == 2 else -1) * torch.rand(4, 3, dtype=torch.float64))
        assert log.untyped_storage().resizable()
        assert log.tolist() == [0.0] + [1.0] * ((call + 1) // 3)
