"""Molecules of unequal sizes in one packed batch: the sparse Hessian against a loop over the molecules."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

import autojac
from autojac.autodiff.tolerance import disagreement
from autojac.bench.results import BenchResult, Facts, Figure, Outcome, State
from autojac.bench.run import Settings
from autojac.planning.search import measure

MOLECULES = 40
FEWEST, MOST = 5, 12
"""Atoms of a molecule."""
ROUNDS = 7


class PackedEnergy:
    """Energies of pairs of atoms, Morse's and a repulsion, summed over each molecule and then over all.

    Args:
        sizes: numbers of atoms of the molecules, whose positions follow each other.
    """

    def __init__(self, sizes: Tensor) -> None:
        self.molecules = len(sizes)
        of_atoms = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        bonded = (of_atoms[:, None] == of_atoms) & ~torch.eye(len(of_atoms), dtype=torch.bool)
        self.first, self.second = torch.where(bonded)
        self.of_pairs = of_atoms[self.first]

    def __call__(self, positions: Tensor) -> Tensor:
        """Return the energy of all molecules, (), at positions (atoms, 3)."""
        distances = (positions[self.first] - positions[self.second]).norm(dim=1)
        energies = (1 - torch.exp(1.2 - distances)).square() + 0.1 / distances
        return torch.zeros_like(positions[: self.molecules, 0]).index_add(0, self.of_pairs, energies).sum()


def as_dense(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's sparse tensors are in beta
        return matrix.to_dense()


def packed_molecules(settings: Settings) -> BenchResult:
    """Race the Hessian of a packed batch against the Hessians of its molecules by `torch.func.hessian`, one by one."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(FEWEST, MOST + 1, (MOLECULES,), generator=generator)
    positions = torch.randn(int(sizes.sum()), 3, generator=generator, dtype=torch.float64)
    parts = positions.split(sizes.tolist())
    alone = [PackedEnergy(size[None]) for size in sizes]
    hessian = autojac.AutoHessian(PackedEnergy(sizes), in_dims=None, layout="sparse", **settings.planning())

    def loop() -> list[Tensor]:
        return [torch.func.hessian(energy)(part) for energy, part in zip(alone, parts, strict=True)]

    blocks = torch.block_diag(*(block.reshape(part.numel(), -1) for block, part in zip(loop(), parts, strict=True)))
    error = disagreement(as_dense(hessian(positions)), blocks)
    until = measure.clock.now() + settings.race_s
    runs = [loop, lambda: hessian(positions)]
    first, second = measure.time_interleaved(runs, positions.device, settings.shortest_s, ROUNDS, until)
    by_hand = Outcome("a loop over the molecules", "right").with_samples(first)
    state: State = "right" if error is None else "wrong"
    packed = Outcome("sparse", state, reason=None if error is None else f"off by {error:.2g}").with_samples(second)
    facts: Facts = {"atoms": len(positions), "plan": str(hessian.plan(positions))}
    return BenchResult("molecules", (packed, by_hand), (Figure.over(packed, by_hand, 1 / 11),), facts)
