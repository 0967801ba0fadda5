"""Do samples meet in values alone? A solver that stops by the whole batch moves every output, and no derivative.

New values in some samples moved outputs of others, while random cotangents saw no gradient. Coupling that merely sleeps
at this point, such as a threshold, looks the same. So cotangents are tried wherever the outputs moved, and the movement
is followed: the way between the two points is halved towards the largest change again and again. Coupling with a
derivative shows it on that way, at the latest where the interval lies inside of what moves the output; a jump between
two numbers of iterations, or what func detaches, never does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from autojac.autodiff.tolerance import balanced_noise, own_scale
from autojac.core.time_limit import within
from autojac.probe.masks import FEWEST_SPLITS, split_masks
from autojac.probe.sample_pairs import SCALES, ProbePoint, along, cotangent_verdict, where_changed

HALVINGS = 16
"""Thresholds narrower than this power of a half of the change of an input are taken for jumps."""
EVALUATIONS = len(SCALES) * (1 + FEWEST_SPLITS + HALVINGS)
"""Evaluations of func, each with gradients, at most."""


class Derivative(Exception):
    """Other samples have a derivative at some point, or may have one."""


def couples_values_only(
    point: ProbePoint, masks: Sequence[Tensor], generator: torch.Generator, budget_s: float
) -> bool:
    """Check that outputs have no derivative in other samples' inputs wherever these move them.

    Args:
        point: the function, at arguments where no gradient leaks.
        masks: samples to change.
        generator: of other values and points.
        budget_s: seconds after which the answer is no.
    """
    if len(masks) > FEWEST_SPLITS:
        device = masks[0].device
        masks = [mask.to(device) for mask in split_masks(point.batch, FEWEST_SPLITS, generator)]

    def check() -> None:
        for turn, scale in enumerate(SCALES):
            _require_no_derivative(point.at_other_point(turn, scale, generator), masks, scale, generator)

    try:
        within(budget_s, check)
    except (Exception, TimeoutError):  # also whatever func raises
        return False
    return True


def _require_no_derivative(
    there: ProbePoint, masks: Sequence[Tensor], scale: float, generator: torch.Generator
) -> None:
    """Raise `Derivative` if one is seen where other samples change by `scale`."""
    base = _values(there, masks, generator)
    worst, way = 0.0, None
    for mask in masks:
        moved = there.with_inputs_moved(scale, generator, mask)
        values = _values(moved, [mask, ~mask], generator)
        for output, (after, before) in enumerate(zip(values, base, strict=True)):
            if after.shape != before.shape:
                raise Derivative
            outside = ~along(mask, after) & where_changed(after, before)
            size = torch.where(outside, (after - before).abs() / own_scale(before).to(after.dtype), 0).flatten()
            if size.numel() and not float(size.amax()) <= worst:
                worst, place = float(size.amax()), int(size.argmax())
                ends = float(before.flatten()[place]), float(after.flatten()[place])
                way = moved, output, place, ends, mask
    if way is not None:
        _follow(there, *way, generator)


def _follow(
    start: ProbePoint,
    stop: ProbePoint,
    output: int,
    place: int,
    ends: tuple[float, float],
    mask: Tensor,
    generator: torch.Generator,
) -> None:
    """Halve the way between two points towards the larger change of one output; raise `Derivative` if one is seen."""
    low, high = ends
    for _ in range(HALVINGS):
        middle = dataclasses.replace(
            start,
            leaves=tuple(
                (a + b) / 2 if position in start.inputs else a
                for position, (a, b) in enumerate(zip(start.leaves, stop.leaves, strict=True))
            ),
        )
        value = float(_values(middle, [mask, ~mask], generator)[output].flatten()[place])
        if abs(value - low) > abs(high - value):
            stop, high = middle, value
        else:
            start, low = middle, value


def _values(there: ProbePoint, masks: Sequence[Tensor], generator: torch.Generator) -> Sequence[Tensor]:
    """Return the outputs at a point; raise `Derivative` unless gradients are finite there and stay in their samples."""
    with there.sandbox():
        pullback = within(there.limit_s, there.pullback)
        values = pullback.recorded
        whole = pullback.pull(values, balanced_noise(values, generator))
        finite = all(bool(part.isfinite().all()) for part in (*values, *whole))
        if not finite or cotangent_verdict(pullback, [True] * len(there.inputs), masks, "", generator).coupled:
            raise Derivative
    return pullback.outputs
