"""Whether forward and reverse mode agree; where they don't, which of them a finite difference confirms.

Reverse mode's answer is the one that is returned: it is what autograd gives, and what a custom backward, `detach` or a
`no_grad` region means. But a difference may as well be a wrong formula, so the user is warned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from autojac.autodiff.primitives import push_dual_plainly
from autojac.autodiff.pullback import Pullback
from autojac.autodiff.seeds import noise
from autojac.autodiff.tolerance import balanced_noise, own_rounding, rounding_floor, tolerance
from autojac.probe.flat_call import FlatCall

MARGIN = 10.0
"""What is a disagreement, in multiples of the tolerance: each mode rounds in its own order."""
ROUNDED = 1e-3
"""A difference that shrinks to less than this share in float64 is rounding; one of formulas stays as it is."""
SMALLER = 0.1
"""Factor on a point and on noise around it that gives another point, at which less is saturated."""
SIDES = 0.1
"""A finite difference takes a side if it is this much nearer to one than to the other."""


def compare_modes(call: FlatCall, seed: int) -> tuple[str, str | None, dict[int, Tensor]]:
    """Compare uᵀJv by both modes, for a random u and v.

    Args:
        call: the function and the point.
        seed: of u and v.

    Returns:
        A line of evidence; what to warn the user of, None unless the difference casts doubt on reverse mode; and for
        each output that has any, a mask of the elements whose derivatives are exactly zero in both modes.
    """
    generator = torch.Generator().manual_seed(seed)
    points = [call.leaves[position].detach() for position in call.differentiated]
    directions = [noise(point, generator) for point in points]
    try:
        values, tangents = _push(call, points, directions)
    except Exception as error:  # an operator or a custom Function without a forward formula
        return f"modes: not compared, forward mode raises {type(error).__name__}", None, {}
    cotangents = balanced_noise(values, generator)
    # all pulls inside the block: leaving it restores buffers, and that changes what the graph has saved
    with call.sandbox():
        pullback = Pullback(call.of_differentiated, points, differentiable=False)
        gradients = pullback.pull(pullback.recorded, cotangents)
        if not all(bool(part.isfinite().all()) for part in (*values, *tangents, *gradients)):
            return "modes: not compared, something is not finite here", None, {}
        zero = {output: tangent.detach() == 0 for output, tangent in enumerate(tangents)}
        flat = {o: mask for o, mask in zero.items() if bool(mask.any()) and _is_flat(pullback, o, mask, generator)}
        forward, size = _product(cotangents, tangents)
        reverse, other_size = _product(gradients, directions)
        gap, allowed = abs(forward - reverse), MARGIN * max(size, other_size)
        allowed *= max(tolerance(tensor.dtype) for tensor in (*values, *points))
        if gap > allowed:
            # func may compute in a lower precision than its output's: only now is it worth finding out
            allowed *= max(factor for _, factor in own_rounding(pullback.pull, pullback.recorded, generator))
    if gap <= allowed:
        return "modes: forward and reverse mode agree along a random direction", None, flat
    double = _gap_in_double(call, points, directions, cotangents)
    is_rounding = (
        double < ROUNDED * gap if math.isfinite(double) else gap < _rounding(values, points, cotangents, directions)
    )
    if is_rounding:
        return "modes: forward and reverse mode differ by rounding alone", None, flat
    difference, kind = _finite_difference(call, points, directions, cotangents)
    return *_disagreement(difference, kind, forward, reverse), flat


def _disagreement(difference: float, kind: str, forward: float, reverse: float) -> tuple[str, str | None]:
    """Return evidence that the modes disagree, and a warning unless a finite difference confirms reverse mode.

    Args:
        difference, kind: the derivative along a direction by a finite difference, and the dtype of that.
        forward, reverse: the same by either mode.
    """
    sides = {"forward": abs(difference - forward), "reverse": abs(difference - reverse)}
    nearer, farther = sorted(sides, key=lambda mode: sides[mode])
    clear = sides[nearer] < SIDES * sides[farther]
    verdict = f"agrees with {nearer} mode" if clear else f"agrees with neither ({difference:.3g})"
    line = (
        f"forward and reverse mode disagree: along a random direction {forward:.3g} and {reverse:.3g}. "
        f"A finite difference in {kind} {verdict}"
    )
    advice = (
        "The Jacobian is reverse mode's, as autograd gives it. If func has a no_grad region or a Function with a "
        "gradient of its own, that is what it asks for; else one of torch's formulas is wrong"
    )
    is_confirmed = clear and nearer == "reverse"
    return f"modes: {line}", None if is_confirmed else f"{line}. {advice}"


def _is_flat(pullback: Pullback, output: int, elements: Tensor, generator: torch.Generator) -> bool:
    """Check whether a random cotangent of some elements of an output gives nothing but zeros."""
    cotangent = torch.where(elements, noise(pullback.recorded[output].detach(), generator), 0)
    return not any(bool(one.any()) for one in pullback(output, cotangent))


def flat_elsewhere(call: FlatCall, elements: Mapping[int, Tensor], seed: int) -> dict[int, Tensor]:
    """Return which of the elements have no derivative at a smaller point either: one that is saturated here has.

    Args:
        call, seed: as of `compare_modes`.
        elements: for each output of interest a mask of its shape. Outputs without any such element are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    points = [
        SMALLER * (call.leaves[position].detach() + noise(call.leaves[position], generator))
        for position in call.differentiated
    ]
    try:
        _, tangents = _push(call, points, [noise(point, generator) for point in points])
        flat = {output: mask & (tangents[output].detach() == 0) for output, mask in elements.items()}
    except Exception:  # func may refuse another point, or return another shape there, which says nothing
        return dict(elements)
    return {output: mask for output, mask in flat.items() if bool(mask.any())}


def _push(
    call: FlatCall, points: Sequence[Tensor], directions: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    # func may ask whether its input requires grad: every evaluation says that it does
    inputs = [point.clone(memory_format=torch.contiguous_format).requires_grad_() for point in points]
    with call.sandbox(), torch.enable_grad():
        return push_dual_plainly(call.of_differentiated, inputs, directions)


def _rounding(
    values: Sequence[Tensor], points: Sequence[Tensor], cotangents: Sequence[Tensor], directions: Sequence[Tensor]
) -> float:
    """Return how much of uᵀJv may be rounding on the function's own scale, where the derivative cancels to zero."""
    floors = (
        [rounding_floor(y, x) * float(v.abs().amax()) for x, v in zip(points, directions, strict=True)] for y in values
    )
    return sum(sum(floor) * float(u.double().norm()) for floor, u in zip(floors, cotangents, strict=True))


def _gap_in_double(
    call: FlatCall, points: Sequence[Tensor], directions: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> float:
    """Return how far the modes are apart in float64, where func takes that."""
    if all(point.dtype == torch.float64 for point in points):
        return float("inf")
    points, directions, cotangents = ([t.double() for t in some] for some in (points, directions, cotangents))
    try:
        _, tangents = _push(call, points, directions)
        with call.sandbox():
            pullback = Pullback(call.of_differentiated, points, differentiable=False)
            gradients = pullback.pull(
                pullback.recorded, [u.to(y.dtype) for u, y in zip(cotangents, pullback.recorded, strict=True)]
            )
    except Exception:  # weights of another dtype
        return float("inf")
    return abs(_product(cotangents, tangents)[0] - _product(gradients, directions)[0])


def _finite_difference(
    call: FlatCall, points: Sequence[Tensor], directions: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[float, str]:
    """Return uᵀJv by a central difference, in float64 where func takes that, and the dtype's name."""
    for dtype in (torch.float64, points[0].dtype):
        step = torch.finfo(dtype).eps ** (1 / 3) * max(1.0, *(float(p.abs().amax()) for p in points if p.numel()))
        outputs = []
        try:
            for sign in (1, -1):
                displaced = [p.to(dtype) + sign * step * v.to(dtype) for p, v in zip(points, directions, strict=True)]
                inputs = [x.requires_grad_() for x in displaced]
                with call.sandbox(), torch.enable_grad():
                    outputs.append([y.detach() for y in call.of_differentiated(*inputs)])
        except Exception:  # weights of another dtype
            continue
        slopes = [(a.double() - b.double()) / (2 * step) for a, b in zip(*outputs, strict=True)]
        return _product(cotangents, slopes)[0], str(dtype).removeprefix("torch.")
    return float("nan"), "any dtype"


def _product(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[float, float]:
    """Return the inner product, and the sum of the terms' sizes."""
    terms = [a.detach().double() * b.detach().double() for a, b in zip(left, right, strict=True)]
    return sum(float(term.sum()) for term in terms), sum(float(term.abs().sum()) for term in terms)
