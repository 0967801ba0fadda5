"""How far two right answers may differ in a dtype: the one place for numerical comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autojac.autodiff import seeds

FLOOR = 1e-3
"""Share of the whole tensor's scale that every sample is granted, against cancellation in tiny entries."""
NOISE_MARGIN = 16.0
"""Tolerance in multiples of the rounding that a function itself shows."""
MOST_NOISE = 0.1
"""The largest relative tolerance that rounding excuses."""
DRAWS = 8
"""How often rounding is measured in few elements where no derivative stands out: it may cancel by chance."""
FEW = 64
"""Elements of derivatives from which on one draw shows how large rounding is."""
OFFSET = 1e-2
"""Share of a value's own size below which its deviation from other samples' is not taken for its scale."""


def own_scale(values: Tensor, *, centered: bool = False) -> Tensor:
    """Return the scale of each element: its own size, or the median of its coordinate's over the samples if larger.

    One scale for a whole tensor would hide small coordinates next to large ones, and all samples next to an outlier.

    Args:
        values: (B, *event).
        centered: measure the deviation from the median sample, as derivatives know no offset.

    Returns:
        Positive and finite, of the same shape, in float32 or float64.
    """
    values = values.detach().to(torch.promote_types(values.dtype, torch.float32)).nan_to_num(0, 0, 0)
    if not values.numel():
        return torch.ones_like(values)
    size = values.abs()
    if centered:
        size = torch.maximum((values - values.median(0).values).abs(), OFFSET * size)
    typical = size.median(0).values
    typical = torch.where(typical > 0, typical, size.mean(0))
    # a coordinate that is zero everywhere takes that of the others
    live = typical[typical > 0]
    middle = live.median() if live.numel() else typical.new_ones(())
    return torch.maximum(size, torch.where(typical > 0, typical, middle))


def balance(values: Sequence[Tensor]) -> list[Tensor]:
    """Return weights for cotangents, by which every output coordinate counts alike, whatever its scale."""
    scales = [own_scale(value, centered=True) for value in values]
    medians = [scale.median().cpu().double() for scale in scales if scale.numel()]
    middle = float(torch.stack(medians).median()) if medians else 1.0
    weights = []
    for value, scale in zip(values, scales, strict=True):
        limits = torch.finfo(value.dtype)
        weight = (middle / scale).clamp(limits.tiny, min(limits.eps**-2, limits.max ** (1 / 3)))
        weights.append(weight.to(value.dtype))
    return weights


def balanced_noise(values: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Return random cotangents for several outputs, scaled by `balance`."""
    weights = balance(values)
    return [seeds.noise(value.detach(), generator) * w for value, w in zip(values, weights, strict=True)]


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference below which two ways of computing one number agree.

    eps to the power 0.6: 4e-10 in float64, 7e-5 in float32, 1.6e-2 in float16, 5.4e-2 in bfloat16. Rounding grows with
    depth and width, so eps itself is too strict, and a fixed multiple of it is useless in half precision.
    """
    return float(torch.finfo(dtype).eps ** 0.6)


def rounding_floor(values: Tensor, inputs: Tensor) -> float:
    """Return the derivative that rounding alone can fake: a few eps of max|y| / max|x|.

    It matters where the true derivative vanishes by cancellation, as for sin² + cos².
    """
    if not values.numel() or not inputs.numel():
        return 0.0
    height, width = (float(t.detach().nan_to_num(0, 0, 0).abs().amax()) for t in (values, inputs))
    return 16 * torch.finfo(values.dtype).eps * height / width if width else 0.0


def own_rounding(
    pull: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]],
    values: Sequence[Tensor],
    generator: torch.Generator,
) -> list[tuple[float, float]]:
    """Return by how much a function's VJPs fail to be linear in the cotangent, for each input, by `balanced_noise`.

    Args:
        pull: maps outputs and cotangents to gradients.
        values: the outputs.
        generator: of random cotangents.

    Returns:
        The difference to grant, and a factor of one or more on the tolerance.
    """
    gaps: list[float] = []
    for _ in range(DRAWS):
        one, other = (balanced_noise(values, generator) for _ in range(2))
        both = [a + b for a, b in zip(one, other, strict=True)]
        pulled = list(zip(*(pull(values, cotangents) for cotangents in (one, other, both)), strict=True))
        differences = [largest(a + b - together) for a, b, together in pulled]
        gaps = [max(pair) for pair in zip(gaps or differences, differences, strict=True)]
        sizes = [largest(together) for _, _, together in pulled]
        stands_out = any(MOST_NOISE * size > NOISE_MARGIN * gap for gap, size in zip(gaps, sizes, strict=True))
        if stands_out or sum(together.numel() for *_, together in pulled) > FEW:
            break
    granted = []
    for gap, size, (*_, together) in zip(gaps, sizes, pulled, strict=True):
        relative = min(NOISE_MARGIN * gap / size, MOST_NOISE) if size > 0 else 0.0
        granted.append((NOISE_MARGIN * gap, max(relative / tolerance(together.dtype), 1.0)))
    return granted


def value_rounding(near: Callable[[int], Sequence[Tensor]], values: Sequence[Tensor]) -> list[Tensor]:
    """Return how far rounding may move each sample of a function's outputs: as that of its inputs does.

    Of the two directions the one counts that moves a sample less: only one of them leads across a jump, as of `floor`.

    Args:
        near: gives the values where each input is moved by so many of its roundings, up or down.
        values: the outputs, (B, *event) each.

    Returns:
        The difference to grant, (B,) for each output: a sample's own, or the median of all if that is larger.
    """
    draws = DRAWS // 2 if sum(value.numel() for value in values) <= FEW else 1
    largest_gaps: list[Tensor] = []
    for sign in (1, -1):
        moved = [near(sign * (draw + 1)) for draw in range(draws)]
        sides = [
            torch.stack([_rows(one - value) for one in every]).amax(0)
            for value, every in zip(values, zip(*moved, strict=True), strict=True)
        ]
        largest_gaps = [torch.minimum(*pair) for pair in zip(largest_gaps or sides, sides, strict=True)]
    return [NOISE_MARGIN * torch.maximum(gap, gap.median()) if gap.numel() else gap for gap in largest_gaps]


def _rows(difference: Tensor) -> Tensor:
    """Return the largest finite magnitude of each sample."""
    return difference.detach().nan_to_num(0, 0, 0).abs().reshape(len(difference), -1).amax(1)


def largest(tensor: Tensor) -> float:
    """Return the largest finite magnitude of a tensor; zero if it is empty."""
    return float(tensor.detach().nan_to_num(0, 0, 0).abs().amax()) if tensor.numel() else 0.0


def disagreement(
    actual: Tensor, expected: Tensor, scale: Tensor | None = None, floor: float | Tensor = 0.0, slack: float = 1.0
) -> float | None:
    """Return the largest relative error of `actual` where it exceeds the tolerance of its dtype, else None.

    Axis 0 runs over samples (or rows), each with a scale of its own.

    Args:
        actual: values to judge.
        expected: the reference, same shape.
        scale: magnitude of the terms behind each entry; the entries of `expected` by default.
        floor: absolute difference that is always granted, or one for each sample.
        slack: factor on the tolerance, for functions that compute in a lower precision than their output's.

    Returns:
        None if they agree; `inf` if one is finite where the other is not.
    """
    if not expected.numel():
        return None
    actual, expected = actual.detach(), expected.detach()
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)):
        return float("inf")
    magnitude = torch.where(finite, expected if scale is None else scale.detach(), 0).abs().nan_to_num(0, 0)
    rows = magnitude.reshape(len(magnitude), -1).amax(1)
    allowed = (rows + FLOOR * rows.amax()) * tolerance(expected.dtype) * slack + floor
    error = torch.where(finite, actual - expected, 0).abs().reshape(len(rows), -1).amax(1)
    if not bool((error > allowed).any()):
        return None
    worst = error / torch.where(allowed > 0, allowed, torch.finfo(expected.dtype).tiny)
    return float(worst.amax()) * tolerance(expected.dtype)
