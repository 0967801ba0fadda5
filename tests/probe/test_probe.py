"""What couples with what: true couplings are found, and independence is not taken for coupling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import autojac
from autojac.probe.masks import index_masks, split_masks
from harness import Counted
from scenarios import SCENARIOS, Scenario

KNOWN = [s for s in SCENARIOS if not s.traits & {"mutates_input", "dense_accepted", "hidden"}]


@pytest.mark.by_day(2)
@pytest.mark.parametrize("scenario", KNOWN, ids=str)
def test_the_verdict_is_the_true_coupling(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make(0, torch.float64)
    structure = autojac.probe(func, *args, argnums=scenario.argnums, **kwargs)
    assert structure.independent == (scenario.coupling == "independent"), structure.evidence
    assert structure.assurance == "observed" or structure.independent


@pytest.mark.parametrize(
    "func",
    [
        lambda x: x + (x.roll(1, 0) - 100).relu(),
        lambda x: torch.where(x > 50, x.roll(1, 0), x),
        lambda x: x + torch.nan_to_num(x.roll(1, 0)),
        lambda x: x + 1e-8 * x.amax(0),
        lambda x: torch.cat((x[:-1], x[-1:] + x[:1] ** 3)),
        lambda x: x.sort(0).values,
        lambda x: x * 0.5 ** x.shape[0] + x.mean(0) * 1e-6,
    ],
    ids=["dead ReLU", "where", "nan_to_num", "weak maximum", "one rare pair", "sort", "weak mean"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_coupling_that_hides_from_one_layer_is_found_by_another(func: Any, dtype: torch.dtype) -> None:
    x = torch.randn(37, 3, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert not autojac.probe(func, x).independent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rounding_is_not_coupling(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 5), nn.Softmax(-1)).to(dtype)
    x = torch.randn(129, 3).to(dtype)
    assert autojac.probe(model, x).independent
    if dtype != torch.bfloat16:
        matrix = torch.randn(3, 3, dtype=dtype)
        assert autojac.probe(lambda z: torch.linalg.solve(matrix, z.T).T, x).independent


@given(batch=st.integers(2, 300), data=st.data())
@settings(max_examples=25)
def test_one_coupled_pair_is_always_found(batch: int, data: st.DataObject) -> None:
    reads = data.draw(st.integers(0, batch - 1))
    source = data.draw(st.integers(0, batch - 1).filter(lambda i: i != reads))

    def func(x: Tensor) -> Tensor:
        own = torch.arange(len(x)) == reads
        return x.sin() + torch.where(own[:, None], x[source].cos(), 0)

    assert not autojac.probe(func, torch.randn(batch, 2)).independent


@given(batch=st.integers(2, 600))
@settings(max_examples=50)
def test_index_masks_separate_every_ordered_pair(batch: int) -> None:
    masks = torch.stack(index_masks(batch))
    assert len(masks) == 2 * (batch - 1).bit_length()
    separated = (masks[:, :, None] & ~masks[:, None, :]).any(0)
    assert bool((separated | torch.eye(batch, dtype=torch.bool)).all())


def test_splits_are_halves() -> None:
    masks = split_masks(101, 5, torch.Generator().manual_seed(0))
    assert [int(mask.sum()) for mask in masks] == [50] * 5


def unproved(x: Tensor) -> Tensor:
    """Independent, which no graph proves, since Python sees a number."""
    x.detach()[0, 0].item()
    return x.sin()


def test_passes_grow_with_the_logarithm_of_the_batch() -> None:
    counts = []
    for batch in (16, 256):
        func = Counted(unproved)
        autojac.probe(func, torch.randn(batch, 2))
        counts.append(func.calls)
    # three scales of values and one of NaN: four evaluations a mask, two masks a bit
    assert counts[1] - counts[0] == 4 * 2 * 4


def test_what_is_proved_is_tried_on_some_of_the_samples() -> None:
    counts = []
    for batch in (600, 6000):
        func = Counted(torch.sin)
        assert autojac.probe(func, torch.randn(batch, 2)).assurance == "proved"
        counts.append((func.calls, func.batches.count(batch)))
    assert counts == [(20, 2), (20, 2)]
    assert max(size for size in func.batches if size != batch) == 256


class Backward(torch.autograd.Function):
    """The identity, whose backward couples samples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent + cotangent.flip(0)


@pytest.mark.filterwarnings("ignore::autojac.errors.ModesDisagreeWarning")
@pytest.mark.parametrize("batch", [2, 5, 700])
def test_numbers_that_contradict_a_proof_are_believed(batch: int) -> None:
    structure = autojac.probe(Backward.apply, torch.randn(batch, 2))
    assert not structure.independent


@pytest.mark.parametrize("batch", [2, 3, 9, 300])
def test_a_captured_tensor_of_the_batch_forbids_slicing_and_no_proof(batch: int) -> None:
    weights = torch.randn(batch, 1)
    structure = autojac.probe(lambda x: (weights * x).tanh(), torch.randn(batch, 2))
    assert structure.assurance == "proved"
    assert not structure.sliceable


@pytest.mark.parametrize("batch", [9, 300])
def test_keyword_arguments_of_the_batch_forbid_slicing_and_no_proof(batch: int) -> None:
    func = Counted(lambda x, scale: (scale * x).tanh())
    structure = autojac.probe(func, torch.randn(batch, 2), scale=torch.randn(batch, 1))
    assert structure.assurance == "proved"
    assert not structure.sliceable
    assert func.batches.count(batch) <= 12


def test_a_branch_on_the_size_of_the_batch_is_no_matter_of_its_parts() -> None:
    def func(x: Tensor) -> Tensor:
        return x - x.mean(0) if len(x) > 100 else x.sin()

    assert not autojac.probe(func, torch.randn(700, 2)).independent
    assert autojac.probe(func, torch.randn(90, 2)).assurance == "proved"
    large = autojac.probe(lambda x: x.sin() if len(x) > 400 else x - x.mean(0), torch.randn(700, 2))
    assert large.assurance == "proved"
    assert not large.sliceable


def test_side_inputs_of_other_samples_forbid_slicing() -> None:
    x, mask = torch.randn(12, 3), torch.ones(12, 1, dtype=torch.bool)
    structure = autojac.probe(lambda x, mask: x * mask.any(0), x, mask)
    assert structure.independent
    assert not structure.sliceable
    assert any("side inputs" in line for line in structure.evidence)


def test_coupling_that_only_another_mask_lets_through_is_found() -> None:
    def attention(x: Tensor, allowed: Tensor) -> Tensor:
        return (x @ x.T).masked_fill(~allowed, -torch.inf).softmax(1) @ x

    assert not autojac.probe(attention, torch.randn(9, 3), torch.eye(9, dtype=torch.bool)).independent


def test_probing_leaves_no_trace() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    x = torch.randn(16, 3)
    state = torch.get_rng_state()
    structure = autojac.probe(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert set(structure.effects) == {"updates buffers", "draws random numbers"}
    assert model.training


def test_large_batches_are_split_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autojac.planning.problem_builder.PROBE_BUDGET_S", {"quick": 0.0})
    structure = autojac.probe(lambda x: x - x.mean(0), torch.randn(4096, 2))
    assert not structure.independent
    structure = autojac.probe(unproved, torch.randn(4096, 2))
    assert structure.independent
    assert any("6 random half-splits of 4096 samples" in line for line in structure.evidence)


def test_a_function_may_take_gradients_of_views_of_its_input() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def residual(xt: Tensor) -> Tensor:
        xt = xt if xt.requires_grad else xt.detach().requires_grad_()
        x, t = xt[:, :1], xt.view(-1, 2)[:, 1:]
        slopes = torch.autograd.grad(net(torch.cat([x, t], 1)).sum(), (x, t), create_graph=True)
        return torch.cat(slopes, 1)

    for x in (torch.randn(5, 2).double(), torch.randn(5, 2).double().requires_grad_()):
        assert autojac.probe(residual, x).independent
