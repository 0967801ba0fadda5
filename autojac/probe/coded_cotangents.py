"""The sample graph of an opaque function, by index-coded cotangents.

A class of samples is probed by VJPs with cotangents r_b and code_b · r_b. Where exactly one sample b of the class
depends on sample c, the ratio of the gradients at c is code_b, which identifies b (by two digits in float32);
coordinates whose ratios disagree show that several do. Classes are random, such that no two of their samples are known
to depend on the same sample. A class without such collisions is complete at this point; the samples of the others are
divided into new classes. Passes grow with the number of neighbours and with the logarithm of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autojac.autodiff.pullback import Pullback
from autojac.autodiff.tolerance import balanced_noise
from autojac.core import work_clock
from autojac.probe.sample_pairs import GRADIENT_NOISE, ProbePoint, along

Ints = np.ndarray[Any, np.dtype[np.integer[Any]]]

FIRST_CLASSES = 4
"""Classes to begin with; they double as long as most gradients are of several samples."""
MOST_ROUNDS = 60
"""Rounds of new classes at a point, after which the graph is given up."""
DIGIT_NOISE = 128.0
"""A digit is read if it is off by less than this many eps of the largest."""
SLIGHT = 1e-5
"""Relative deviation of coordinates from one digit that is always allowed."""
READABLE = 0.1
"""Digits off by more than this can't be read."""
MOST_PAIRS = 2e7
"""Pairs of samples that depend on the same one, beyond which coloring them would take too long."""
SAMPLED = 3
"""Samples whose neighbours are counted first: if all depend on most others, there is no graph worth finding."""


@dataclass
class CodedCotangents:
    """The sample graph that coded cotangents show, accumulated over any number of points.

    Attributes:
        known: boolean (batch, batch) SciPy matrix: sample b's output depends on sample c's input.
        passes: VJPs so far.
        refusal: why there is no graph; empty as long as there may be one.
    """

    point: ProbePoint
    generator: torch.Generator
    deadline: float
    known: Any = None
    passes: int = 0
    refusal: str = ""

    def __post_init__(self) -> None:
        import scipy.sparse

        batch = self.point.batch
        self.known = scipy.sparse.identity(batch, dtype=bool, format="csr")
        self.random = np.random.default_rng(int(torch.randint(2**31, (), generator=self.generator)))
        self.wide = FIRST_CLASSES

    def complete_at(self, point: ProbePoint) -> int | None:
        """Add what is missing at a point; return how many entries that was, None if that fails (see `refusal`)."""
        with point.sandbox():
            pullback = point.pullback()
            weights = balanced_noise(pullback.recorded, self.generator)
            before = self.known.nnz
            if not self.passes and not self._sparse(pullback, weights):
                return None
            rows: Ints = np.arange(point.batch)
            wide = self.wide
            for _ in range(MOST_ROUNDS):
                rows, wide = self._round(pullback, weights, rows, wide)
                if self.refusal:
                    return None
                if not len(rows):
                    return int(self.known.nnz - before)
        self.refusal = f"{self.passes} index-coded probes did not separate the neighbours"
        return None

    def _pull(self, pullback: Pullback, weights: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Return the gradient of every sample, (batch, n), for cotangents scaled by `rows`."""
        self.passes += 1
        cotangents = [weight * along(rows, weight).to(weight.dtype) for weight in weights]
        gradients = pullback.pull(pullback.recorded, cotangents)
        return torch.cat([gradient.reshape(self.point.batch, -1) for gradient in gradients], 1).cpu()

    def _sparse(self, pullback: Pullback, weights: Sequence[Tensor]) -> bool:
        """Check whether some samples at random depend on few others."""
        batch = self.point.batch
        few = []
        for row in self.random.choice(batch, min(SAMPLED, batch), replace=False):
            only = torch.zeros(batch)
            only[int(row)] = 1
            reached = self._pull(pullback, weights, only)
            if not torch.isfinite(reached).all():
                self.refusal = "derivatives are not finite"
                return False
            few.append(int(_alive(reached).sum()))
        if min(few) > batch // 2:
            self.refusal = f"a sample depends on {min(few)} of {batch}"
            return False
        return True

    def _round(self, pullback: Pullback, weights: Sequence[Tensor], rows: Ints, wide: int) -> tuple[Ints, int]:
        """Probe samples in classes; return those of mixed-up classes, and how many classes to try next."""
        import scipy.sparse

        batch = self.point.batch
        among = self.known[rows]
        columns = np.bincount(among.indices, minlength=batch).astype(float)
        if self.known.nnz > batch * max(batch // 2, 1) + batch or (columns**2).sum() > MOST_PAIRS:
            self.refusal = "too many depend on one sample"
            return rows, wide
        colors = spread_colors(among, wide, self.random)
        owners: list[Ints] = [np.zeros(0, int)]
        reached: list[Ints] = [np.zeros(0, int)]
        open_classes = []
        mixed_up = clear = 0
        for color in np.unique(colors):
            if work_clock.clock.working_s() > self.deadline:
                self.refusal = f"out of time after {self.passes} index-coded probes"
                return rows, wide
            members = torch.zeros(batch, dtype=torch.bool)
            members[torch.from_numpy(rows[colors == color])] = True
            owner, alive, single = self._decode(pullback, weights, members)
            if self.refusal:
                return rows, wide
            readable = np.flatnonzero(single)
            several = int((alive & ~single).sum())
            mixed_up, clear = mixed_up + several, clear + len(readable)
            if several:
                open_classes.append(color)
            owners.append(owner[readable])
            reached.append(readable)
        pair = np.concatenate(owners), np.concatenate(reached)
        pattern = scipy.sparse.coo_array((np.ones(len(pair[0]), bool), pair), shape=(batch, batch)).tocsr()
        self.known = (self.known + pattern).tocsr()
        if mixed_up > clear:
            self.wide = wide = min(2 * wide, batch)
        else:
            wide = min(wide, 2 * len(open_classes) + 1)
        return rows[np.isin(colors, open_classes)], wide

    def _decode(self, pullback: Pullback, weights: Sequence[Tensor], members: Tensor) -> tuple[Any, Any, Any]:
        """Return for each sample which one of the class reaches it, whether any does, and whether only one."""
        batch = self.point.batch
        plain = self._pull(pullback, weights, members)
        if not torch.isfinite(plain).all():
            self.refusal = "derivatives are not finite"
            return None, None, None
        noisy = DIGIT_NOISE * torch.finfo(plain.dtype).eps
        digits = 1 if noisy * batch < READABLE / 100 else 2
        base = batch if digits == 1 else math.isqrt(batch - 1) + 1
        allowed = max(noisy * base, SLIGHT)
        if allowed > READABLE:
            self.refusal = f"{plain.dtype} is too coarse for index-coded probes of {batch} samples"
            return None, None, None
        alive = _alive(plain)
        size, top = plain.abs().max(1)
        divisor = torch.where(alive, plain.gather(1, top[:, None])[:, 0], 1)
        index = torch.arange(batch)
        single, owner = alive.clone(), torch.zeros_like(index)
        for place in [base**k for k in range(digits)]:
            coded = self._pull(pullback, weights, members * (index // place % base + 1))
            digit = (coded.gather(1, top[:, None])[:, 0] / divisor).round()
            apart = (coded - digit[:, None] * plain).abs().amax(1)
            single &= (apart <= allowed * size) & (digit >= 1) & (digit <= base)
            owner += (digit.nan_to_num(1).long() - 1) * place
        owner = owner.clamp(0, batch - 1)
        single &= members[owner]
        return owner.numpy(), alive.numpy(), single.numpy()


def _alive(gradient: Tensor) -> Tensor:
    """Return the samples with a gradient beyond rounding."""
    size = gradient.abs()
    if not size.numel():
        return torch.zeros(len(size), dtype=torch.bool)
    # each coordinate by its own scale
    return (size > GRADIENT_NOISE * torch.finfo(size.dtype).eps * size.amax(0)).any(1)


def spread_colors(known: Any, wide: int, random: np.random.Generator) -> Ints:
    """Color the rows at random, so that no two with an entry in one column share a color.

    Independent sets of random priority color themselves in one pass (Jones and Plassmann, 1993); among the first `wide`
    colors each row takes any that is free, so that what is not known is spread too.

    Args:
        known: boolean matrix.
        wide: number of colors to spread over; more are used where these do not suffice.
        random: where the choices come from.

    Returns:
        A color for each row.
    """
    batch = known.shape[0]
    near = known @ known.T
    one, other = near.nonzero()
    apart = one != other
    one, other = one[apart], other[apart]
    colors = np.full(batch, -1)
    priority = random.permutation(batch)
    while (colors < 0).any():
        open_edges = (colors[one] < 0) & (colors[other] < 0) & (priority[other] > priority[one])
        ready = colors < 0
        ready[one[open_edges]] = False
        chosen = np.flatnonzero(ready)
        width = max(wide, int(colors.max()) + 2)
        score = random.random((len(chosen), width))
        score[:, wide:] = -np.arange(1, width - wide + 1)
        place = np.full(batch, -1)
        place[chosen] = np.arange(len(chosen))
        is_colored = (place[one] >= 0) & (colors[other] >= 0)
        score[place[one[is_colored]], colors[other[is_colored]]] = -np.inf
        colors[chosen] = score.argmax(1)
    return colors
