"""Which samples to change at a time, so that every pair of samples is separated."""

from __future__ import annotations

import torch
from torch import Tensor

from autojac.probe.sample_pairs import ProbePoint

FEWEST_SPLITS = 6
"""Random half-splits that are tried whatever they cost: an ordered pair escapes all of them in 18 % of cases."""


def index_masks(batch: int) -> list[Tensor]:
    """Return boolean masks (B,), two for each bit of the sample index."""
    index = torch.arange(batch)
    bits = max(batch - 1, 0).bit_length()
    return [mask for bit in range(bits) for mask in ((index >> bit) & 1 == 1, (index >> bit) & 1 == 0)]


def split_masks(batch: int, count: int, generator: torch.Generator) -> list[Tensor]:
    """Return `count` random half-splits of the batch: each ordered pair is separated by a quarter of them."""
    return [torch.randperm(batch, generator=generator) < batch // 2 for _ in range(count)]


def masks_within(
    point: ProbePoint, generator: torch.Generator, budget_s: float, cost: float
) -> tuple[list[Tensor], str]:
    """Return the masks that a layer can afford at the cost of one evaluation, and their name in the evidence."""
    device = point.leaves[0].device
    exact = index_masks(point.batch)
    affordable = int(budget_s / cost)
    if affordable >= len(exact):
        return [mask.to(device) for mask in exact], f"all pairs of {point.batch} samples in {len(exact)} masks"
    count = max(FEWEST_SPLITS, affordable)
    chosen = split_masks(point.batch, count, generator)
    return [mask.to(device) for mask in chosen], f"{count} random half-splits of {point.batch} samples"
