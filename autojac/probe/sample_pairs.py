"""Layer 2 of the probe: does any sample's output depend on another sample's input?

For every bit of the sample index, one mask holds the samples whose bit is set and one the others. Two samples i ≠ j
differ in some bit, so with 2·⌈log2 B⌉ masks every ordered pair is separated by one of them: i inside, j outside.
Three ways of using a mask, each blind to functions that the others see:

* random cotangents on the samples inside: a gradient at a sample outside is coupling (blind where the derivative
  vanishes at this point);
* new values for the samples inside, at several scales: a changed output outside is coupling (finds what is dead
  here and alive elsewhere);
* NaN in the samples inside: NaN in an output outside is coupling (an upper bound, blind to nan_to_num and `where`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff.pullback import Pullback
from autojac.autodiff.seeds import noise
from autojac.autodiff.tolerance import balance, own_scale
from autojac.core import pytree, work_clock
from autojac.core.ranks import several
from autojac.core.sandbox import Sandbox
from autojac.core.time_limit import within
from autojac.probe.flat_call import FlatCall

SCALES = (1e-2, 1.0, 1e3)
GRADIENT_NOISE = 0.05
"""Gradients below this many eps of the largest of their coordinate are rounding: a global FFT or LU leaves some."""
VALUE_NOISE = 8.0
"""Changes of a value below this many eps of its own scale are rounding."""
FAR = 1e3
"""Inputs larger than this are moved in proportion to their size, which rounding would else swallow."""

Evaluate = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Verdict:
    """What one layer says.

    Attributes:
        coupled: None where the layer can't be applied.
        share: the gradient that was seen to leak, relative to the largest.
    """

    layer: str
    coupled: bool | None
    evidence: str
    share: float = 0.0


@dataclass(frozen=True)
class ProbePoint:
    """The function under probe.

    Attributes:
        fn: flat function of (leaves, kwargs).
        leaves: the call's tensors, detached.
        kwargs: the call's keyword arguments.
        inputs: indices of the differentiated leaves that carry the batch.
        sides: indices of the other leaves that carry the batch.
        batch: number of samples.
        sandbox: how to evaluate without side effects.
        limit_s: seconds after which an evaluation at other values is given up: a loop may never converge there.
    """

    fn: Any
    leaves: tuple[Tensor, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[int, ...]
    sides: tuple[int, ...]
    batch: int
    sandbox: Sandbox
    limit_s: float = math.inf

    def values(self, replaced: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs for other leaves; func sees grad mode and inputs as it does when it is differentiated.

        It may take gradients itself, of views of its inputs.
        """
        leaves = [replaced.get(position, leaf) for position, leaf in enumerate(self.leaves)]
        leaves = [x.detach().clone().requires_grad_() if i in self.inputs else x.detach() for i, x in enumerate(leaves)]
        # func may differentiate itself
        with self.sandbox(), torch.enable_grad():
            values = within(self.limit_s, lambda: tuple(self.fn(leaves, self.kwargs)))
        return tuple(value.detach() for value in values)

    def at_other_point(self, turn: int, scale: float, generator: torch.Generator) -> ProbePoint:
        """Return another point: what is read of other samples may depend on masks, indices and weights."""

        def move(tensor: Tensor) -> Tensor:
            return _start(tensor, turn, scale, generator)

        leaves = [move(leaf) for leaf in self.leaves]
        for position in self.sides:
            if turn == len(SCALES) - 1 and not leaves[position].is_floating_point():
                # other samples' indices, which are in range
                leaves[position] = leaves[position].flip(0)
        kwargs = pytree.tree_map_only(Tensor, move, self.kwargs)
        return dataclasses.replace(self, leaves=tuple(leaves), kwargs=kwargs)

    def with_inputs_moved(self, scale: float, generator: torch.Generator, mask: Tensor | None = None) -> ProbePoint:
        """Return the point with other inputs, by default of all samples; what is not differentiated stays."""
        leaves = list(self.leaves)
        for position in self.inputs:
            moved = leaves[position] + step(leaves[position], scale, generator)
            leaves[position] = moved if mask is None else torch.where(along(mask, moved), moved, leaves[position])
        return dataclasses.replace(self, leaves=tuple(leaves))

    def values_with_nan(self, mask: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs for NaN in the masked samples of the inputs."""
        leaves = {position: self.leaves[position] for position in self.inputs}
        return self.values({p: leaf.masked_fill(along(mask, leaf), math.nan) for p, leaf in leaves.items()})

    def pullback(self, inputs: Sequence[int] | None = None) -> Pullback:
        """Evaluate func once for pulls to some of the leaves, by default to those that carry the batch."""
        positions = self.inputs if inputs is None else inputs
        call = FlatCall(self.fn, self.leaves, self.kwargs, positions, self.sandbox)
        return Pullback(call.of_differentiated, [self.leaves[p] for p in positions], differentiable=False)


def time_one_call(point: ProbePoint) -> float:
    """Return the seconds of one evaluation; next to none among several ranks, where no clock may decide anything."""
    start = work_clock.clock.working_s()
    point.values({})
    return 1e-9 if several() else max(work_clock.clock.working_s() - start, 1e-7)


def gradient_layer(point: ProbePoint, masks: Sequence[Tensor], name: str, generator: torch.Generator) -> Verdict:
    """Pull random cotangents inside each mask; the gradient outside must vanish.

    `name` says in the evidence which masks these are, as it does in the other layers.
    """
    with point.sandbox():
        return cotangent_verdict(point.pullback(), [True] * len(point.inputs), masks, name, generator)


def cotangent_verdict(
    pullback: Pullback, carriers: Sequence[bool], masks: Sequence[Tensor], name: str, generator: torch.Generator
) -> Verdict:
    """Do what `gradient_layer` does on a graph that exists; inputs carry the batch where `carriers` says so."""
    layer = "random cotangents"
    values = pullback.recorded
    # zero times an infinite derivative is NaN in the sample itself: that says nothing of other samples
    blank = pullback.pull(values, [torch.zeros_like(value) for value in values])
    silent = [torch.isfinite(gradient) for gradient in blank]
    weights = balance(values)
    for passes, mask in enumerate(masks, 1):
        cotangents = [
            noise(value, generator) * weight * along(mask, value) for value, weight in zip(values, weights, strict=True)
        ]
        for gradient, usable, carries in zip(pullback.pull(values, cotangents), silent, carriers, strict=True):
            if not carries:
                continue
            size = torch.where(usable, gradient, 0).nan_to_num(0, 0, 0).abs()
            if not size.numel():
                continue
            # each coordinate of an input by its own scale
            largest, leak = size.amax(0), (size * along(~mask, size)).amax(0)
            if bool((leak > GRADIENT_NOISE * torch.finfo(size.dtype).eps * largest).any()):
                share = float((leak / largest).nan_to_num(0).amax())
                return Verdict(
                    layer,
                    True,
                    f"{layer}: coupled, a gradient of {share:.1g} of the largest leaks to "
                    f"other samples (pass {passes} of {name})",
                    share,
                )
    return Verdict(layer, False, f"{layer}: no sample reaches another ({name})")


def value_layer(
    point: ProbePoint,
    masks: Sequence[Tensor],
    name: str,
    generator: torch.Generator,
    leaves: Sequence[int],
    scales: Sequence[float] = SCALES,
) -> Verdict:
    """Put new values inside the mask; outputs outside must stay."""
    layer = "value taint" if leaves == point.inputs else "value taint of side inputs"
    refused = 0
    for turn, scale in enumerate(scales):
        there = point.at_other_point(turn, scale, generator)
        try:
            base = _try_values(there, {})
            if base is None:
                there, base = point, point.values({})
        except TimeoutError as error:
            return Verdict(layer, None, f"{layer}: not applicable, at other values func {error}")
        for mask in masks:
            moved = {position: _other_values(there.leaves[position], mask, scale, generator) for position in leaves}
            try:
                changed = _try_values(there, moved)
            except TimeoutError as error:
                return Verdict(layer, None, f"{layer}: not applicable, at other values func {error}")
            if changed is None:
                refused += 1
            elif _moved(changed, base, ~mask):
                return Verdict(layer, True, f"{layer}: coupled, outputs move when other samples change by {scale:g}")
    if refused == len(scales) * len(masks):
        return Verdict(layer, None, f"{layer}: not applicable, func refuses other values")
    sizes = ", ".join(f"{scale:g}" for scale in scales)
    return Verdict(layer, False, f"{layer}: no output moves at scales {sizes} ({name})")


def nan_layer(point: ProbePoint, masks: Sequence[Tensor], name: str, base: Sequence[Tensor] | None = None) -> Verdict:
    """Put NaN inside the mask; outputs outside must gain none. `base` are the outputs at the point, where known."""
    layer = "NaN taint"
    base = point.values({}) if base is None else base
    for mask in masks:
        try:
            changed = point.values_with_nan(mask)
        except Exception as error:  # factorizations and comparisons may refuse NaN
            return Verdict(layer, None, f"{layer}: not applicable, func raises {type(error).__name__} on NaN")
        for after, before in zip(changed, base, strict=True):
            if after.shape != before.shape or bool((after.isnan() & ~before.isnan())[~mask].any()):
                return Verdict(layer, True, f"{layer}: coupled, NaN spreads to other samples")
    return Verdict(layer, False, f"{layer}: NaN stays in its sample ({name})")


def along(samples: Tensor, like: Tensor) -> Tensor:
    """Shape what holds one number per sample, such as a mask, to broadcast over a tensor with the batch on axis 0."""
    return samples.to(like.device).view(-1, *[1] * (like.dim() - 1))


def _try_values(point: ProbePoint, replaced: Mapping[int, Tensor]) -> tuple[Tensor, ...] | None:
    """Return the outputs at other values; None where func refuses values that its user never passes."""
    try:
        return point.values(replaced)
    except TimeoutError:
        raise
    except Exception:
        return None


def step(leaf: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Return a random change of a float's values, of size `scale` or in proportion to values that are far larger."""
    far = (own_scale(leaf) / FAR).clamp(min=1) if leaf.numel() and leaf.dim() else 1.0
    return (scale * noise(leaf, generator) * far).to(leaf.dtype)


def _start(leaf: Tensor, turn: int, scale: float, generator: torch.Generator) -> Tensor:
    """Return another point to change samples at: noise for floats; a mask as it is, then none set, then all set.

    A float with infinities is a mask that is added.
    """
    leaf = leaf.detach()
    if leaf.layout != torch.strided:
        return leaf
    if leaf.is_floating_point():
        if turn and leaf.isinf().any():
            return torch.zeros_like(leaf)
        return leaf + step(leaf, scale, generator)
    if leaf.dtype == torch.bool and turn:
        return torch.full_like(leaf, turn == 2)
    return leaf


def _other_values(leaf: Tensor, mask: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Return a leaf with other values in the masked samples: noise, the opposite, or for integers each other's rows."""
    if leaf.is_floating_point():
        return torch.where(along(mask, leaf), leaf + step(leaf, scale, generator), leaf)
    if leaf.dtype == torch.bool:
        return leaf ^ along(mask, leaf)
    rows = torch.arange(len(leaf), device=leaf.device)
    inside = rows[mask]
    rows[mask] = inside[torch.randperm(len(inside), generator=generator).to(inside.device)]
    return leaf[rows]


def _moved(changed: Sequence[Tensor], base: Sequence[Tensor], rows: Tensor) -> bool:
    return any(
        after.shape != before.shape or bool(where_changed(after, before)[rows].any())
        for after, before in zip(changed, base, strict=True)
    )


def where_changed(after: Tensor, before: Tensor) -> Tensor:
    """Return where values moved by more than rounding, each by its own scale."""
    finite = torch.isfinite(before)
    rounding = VALUE_NOISE * torch.finfo(before.dtype).eps * own_scale(before)
    has_moved = torch.where(finite, after - before, 0).abs() > rounding
    return has_moved | (finite != torch.isfinite(after))
