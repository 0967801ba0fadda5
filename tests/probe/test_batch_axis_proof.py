"""Proofs of independence: most common models have one, no coupled function has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac import AutoJacobian
from provable import COUPLED, INDEPENDENT
from scenarios import SCENARIOS, Scenario


def test_there_are_enough_of_both() -> None:
    assert len(INDEPENDENT) >= 50
    assert len(COUPLED) >= 50


def test_most_common_models_are_proved() -> None:
    missed = {}
    for name, build in INDEPENDENT.items():
        structure = autojac.probe(*build())
        assert structure.independent, name
        if structure.assurance != "proved":
            missed[name] = structure.evidence[-1]
    assert len(missed) <= len(INDEPENDENT) // 10, missed


@pytest.mark.filterwarnings("ignore::autojac.errors.ModesDisagreeWarning")
@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.filterwarnings("ignore:.*some entries of output 0 of func move:autojac.NoGraphWarning")
def test_nothing_coupled_is_proved(name: str) -> None:
    structure = autojac.probe(*COUPLED[name](), in_dims=0)
    assert structure.assurance == "observed"
    assert any(line.startswith(("proof: none", "statistics:")) for line in structure.evidence)


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s.coupling == "dense"], ids=str)
def test_no_coupled_scenario_is_proved(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make(0)
    assert autojac.probe(func, *args, argnums=scenario.argnums, **kwargs).assurance == "observed"


def test_a_proof_is_checked_as_often_as_an_observation() -> None:
    net = nn.Linear(3, 2)

    class Scaled:
        """State of its own: no proof."""

        scale = 1.0

        def __init__(self) -> None:
            self.shift = 0.0

        def __call__(self, x: Tensor) -> Tensor:
            return net(x) * self.scale + self.shift

    func = Scaled()
    x = torch.randn(5, 3)
    checks = {}
    for name, one in (("proved", net), ("observed", func)):
        jac = AutoJacobian(one, on_miss="estimate", store=":memory:")
        for _ in range(5):
            jac(x)
        assert jac.plan(x).structure.assurance == name
        checks[name] = jac._entries[jac._key((x,), {})].next_check
    assert checks["proved"] == checks["observed"] == 8


def test_state_that_python_may_change_takes_the_proof_back() -> None:
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.on = False

        def forward(self, x: Tensor) -> Tensor:
            return x.roll(1, 0) if self.on else x.sin()

    structure = autojac.probe(Switched(), torch.randn(5, 3))
    assert structure.independent
    assert structure.assurance == "observed"
    assert "attribute on of Switched" in structure.evidence[-1]


def test_a_float_among_the_arguments_takes_the_proof_back() -> None:
    def func(x: Tensor, scale: float) -> Tensor:
        return x.sin() if scale < 1 else x.roll(1, 0)

    for args, kwargs in (((torch.randn(5, 3), 0.5), {}), ((torch.randn(5, 3),), {"scale": 0.5})):
        structure = autojac.probe(func, *args, **kwargs)
        assert structure.independent
        assert structure.assurance == "observed"


def test_a_process_group_is_left_alone(tmp_path: Any) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    assert not torch.distributed.is_initialized()
    assert autojac.probe(nn.Linear(3, 2), torch.randn(5, 3)).assurance == "proved"
    assert not torch.distributed.is_initialized()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        assert autojac.probe(nn.Linear(3, 2), torch.randn(5, 3)).assurance == "proved"
        assert torch.distributed.group.WORLD is group
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        assert total == 1
    finally:
        torch.distributed.destroy_process_group()
