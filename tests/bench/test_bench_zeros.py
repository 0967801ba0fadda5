"""What zeros save is measured against the best that knows of none."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from autojac.bench.baselines import WAYS
from autojac.bench.molecules import packed_molecules
from autojac.bench.points import points
from autojac.bench.results import BenchResult, ratio
from autojac.bench.run import Settings
from autojac.bench.workloads import convolution
from autojac.bench.zeros import as_blocks, layouts, reaction

SETTINGS = Settings(effort="estimate", rounds=3, budget_s=0.2, shortest_s=1e-5, race_s=0.5)


@pytest.fixture(scope="module")
def layouts_raced() -> BenchResult:
    with torch.no_grad():
        return layouts(convolution("conv", 16, 32, channels=2), SETTINGS, 1.0, 1.0)


@pytest.mark.parametrize("name", ["sparse over", "blocks over"])
def test_layouts_are_raced_against_the_best_that_knows_no_zeros(layouts_raced: BenchResult, name: str) -> None:
    (figure,) = (figure for figure in layouts_raced.figures if figure.what.startswith(name))
    base = figure.what.removeprefix(f"{name} ")
    outcomes = {outcome.name: outcome for outcome in layouts_raced.outcomes}
    assert base in (*(way.name for way in WAYS), "autojac without zeros")
    raced = [outcomes[each] for each in ("blocks", "sparse", base)]
    assert {outcome.state for outcome in raced} == {"right"}
    assert figure.value == pytest.approx(ratio(outcomes[name.split(maxsplit=1)[0]], outcomes[base]))
    assert "Colored" in str(layouts_raced.facts["plan, sparse"])
    assert "Colored" not in str(layouts_raced.facts["plan, without zeros"])
    assert layouts_raced.facts["colors of rows"] == 5


def test_a_wrong_sparse_jacobian_is_not_taken_for_blocks() -> None:
    like = torch.zeros(2, 2, 2)
    own = torch.block_diag(torch.ones(2, 2), 2 * torch.eye(2)).to_sparse_csr()
    right = torch.stack([torch.ones(2, 2), 2 * torch.eye(2)])
    assert torch.equal(as_blocks(own, like), right)
    with pytest.raises(ValueError, match="between samples"):
        as_blocks(torch.ones(4, 4).to_sparse_csr(), like)


def test_brusselator_is_compared_with_passes_of_its_colors() -> None:
    with torch.no_grad():
        found = reaction(SETTINGS, size=6, rounds=3)
    assert found.facts["entries"] == 6 * 2 * 36
    assert 6 <= float(found.facts["colors of columns"]) <= 10
    assert {"func", "detection", "coloring", "JVPs", "VJPs", "sparse"} == {outcome.name for outcome in found.outcomes}
    assert [figure.bound for figure in found.figures[1:]] == [3.0, 3.0]


def test_packed_molecules_are_compared_with_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autojac.bench.molecules.MOLECULES", 3)
    found = packed_molecules(SETTINGS)
    assert [outcome.state for outcome in found.outcomes] == ["right", "right"]
    assert "Colored" in str(found.facts["plan"])
    assert found.figures[0].bound == 1 / 11


@pytest.mark.nightly
def test_points_are_measured_in_processes_of_their_own() -> None:
    found = points(dataclasses.replace(SETTINGS, effort="quick"), counts=(300, 600))
    assert [outcome.state for outcome in found.outcomes] == ["right"] * 4
    assert found.figures[0].what == "blocks over a VJP"
    assert float(found.facts["colors, 600 points"]) >= 4
    assert "Colored" in str(found.facts["plan, 600 points"])
    assert found.figures[-1].bound == pytest.approx(2.4)
    assert all(figure.value > 0 for figure in found.figures)
