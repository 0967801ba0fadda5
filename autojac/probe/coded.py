"""The sample graph of an opaque function, by index-coded cotangents.

Two VJPs with cotangents r_b and code_b · r_b on a class of samples: where exactly one of them reaches sample c, the
gradients there are in the ratio code_b, whose two digits name it; coordinates that disagree betray several. What is
known is colored so that no two samples of a class are known to reach the same one, and the classes are drawn anew each
round. A round without anything that is unknown or mixed up shows that nothing is missing at this point. Passes grow
with the number of neighbours and with the logarithm of the batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autojac.autodiff import Pullback
from autojac.probe.pairs import GRADIENT_NOISE, Subject
from autojac.seeds import noise

Ints = np.ndarray[Any, np.dtype[np.integer[Any]]]

FIRST_CLASSES = 4
MOST_ROUNDS = 60
DIGIT_NOISE = 128.0
"""A digit is read if it is off by less than this many eps of the largest."""
READABLE = 0.1
SAMPLED = 3


@dataclass
class Coded:
    """What coded cotangents have found, at any number of points.

    Attributes:
        known: boolean (batch, batch) SciPy matrix: sample b's output depends on sample c's input.
        passes: VJPs so far.
        refusal: why there is no graph; empty as long as there may be one.
    """

    subject: Subject
    generator: torch.Generator
    deadline: float
    known: Any = None
    passes: int = 0
    refusal: str = ""

    def __post_init__(self) -> None:
        import scipy.sparse

        batch = self.subject.batch
        self.known = scipy.sparse.identity(batch, dtype=bool, format="csr")
        self.random = np.random.default_rng(int(torch.randint(2**31, (), generator=self.generator)))
        self.base = max(math.isqrt(max(batch - 1, 0)) + 1, 2)
        self.wide = FIRST_CLASSES

    def complete_at(self, leaves: Sequence[Tensor]) -> int | None:
        """Add what is missing at a point; how many entries that was, None if it can't be told (see `refusal`)."""
        subject = self.subject

        def bound(*inputs: Tensor) -> tuple[Tensor, ...]:
            merged = list(leaves)
            for position, tensor in zip(subject.inputs, inputs, strict=True):
                merged[position] = tensor
            return tuple(subject.fn(merged, subject.kwargs))

        with subject.quiet():
            pullback = Pullback(bound, [leaves[position] for position in subject.inputs], differentiable=False)
            values = [value.detach() for value in pullback.recorded]
            weights = [noise(value, self.generator) for value in values]
            before = self.known.nnz
            if not self._sparse(pullback, values, weights):
                return None
            for _ in range(MOST_ROUNDS):
                settled = self._round(pullback, values, weights)
                if self.refusal:
                    return None
                if settled:
                    return int(self.known.nnz - before)
        self.refusal = f"{self.passes} index-coded probes did not separate the neighbours"
        return None

    def _pull(self, pullback: Pullback, values: Sequence[Tensor], weights: Sequence[Tensor], rows: Tensor) -> Tensor:
        """The gradient of every sample, (batch, n), for cotangents scaled by `rows`."""
        self.passes += 1
        scaled = [
            weight * rows.to(weight.device, weight.dtype).view(-1, *[1] * (weight.dim() - 1)) for weight in weights
        ]
        pulled = pullback.pull(values and pullback.recorded, scaled)
        return torch.cat([gradient.reshape(self.subject.batch, -1) for gradient in pulled], 1).cpu()

    def _sparse(self, pullback: Pullback, values: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
        """Whether some samples at random depend on few others."""
        batch = self.subject.batch
        few = []
        for row in self.random.choice(batch, min(SAMPLED, batch), replace=False):
            only = torch.zeros(batch)
            only[int(row)] = 1
            reached = self._pull(pullback, values, weights, only)
            if not torch.isfinite(reached).all():
                self.refusal = "derivatives are not finite"
                return False
            few.append(int(_alive(reached).sum()))
        if min(few) > batch // 2:
            self.refusal = f"a sample depends on {min(few)} of {batch}"
            return False
        return True

    def _round(self, pullback: Pullback, values: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
        """One probe of every class; whether nothing was found that was not known."""
        import scipy.sparse

        batch = self.subject.batch
        colors = spread_colors(self.known, self.wide, self.random)
        owners: list[Ints] = []
        reached: list[Ints] = []
        mixed = clear = 0
        for color in range(int(colors.max()) + 1):
            if time.perf_counter() > self.deadline:
                self.refusal = f"out of time after {self.passes} index-coded probes"
                return False
            members = torch.from_numpy(colors == color)
            if not members.any():
                continue
            owner, alive, single = self._decoded(pullback, values, weights, members)
            if self.refusal:
                return False
            own = np.flatnonzero(single)
            mixed += int((alive & ~single).sum())
            clear += len(own)
            owners.append(owner[own])
            reached.append(own)
        rows, columns = np.concatenate(owners or [np.zeros(0, int)]), np.concatenate(reached or [np.zeros(0, int)])
        found = scipy.sparse.coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(batch, batch)).tocsr()
        before = self.known.nnz
        self.known = (self.known + found).tocsr()
        if mixed > clear:
            self.wide = min(2 * self.wide, batch)
        return mixed == 0 and self.known.nnz == before

    def _decoded(
        self, pullback: Pullback, values: Sequence[Tensor], weights: Sequence[Tensor], members: Tensor
    ) -> tuple[Any, Any, Any]:
        """For each sample the one of the class that reaches it; whether any does; whether it is one alone."""
        index = torch.arange(self.subject.batch)
        codes = (index // self.base + 1, index % self.base + 1)
        plain = self._pull(pullback, values, weights, members)
        if not torch.isfinite(plain).all():
            self.refusal = "derivatives are not finite"
            return None, None, None
        allowed = DIGIT_NOISE * torch.finfo(plain.dtype).eps * self.base
        if allowed > READABLE:
            self.refusal = f"{plain.dtype} is too coarse for index-coded probes of {self.subject.batch} samples"
            return None, None, None
        alive = _alive(plain)
        size, top = plain.abs().max(1)
        divisor = torch.where(alive, plain.gather(1, top[:, None])[:, 0], 1)
        single, owner = alive.clone(), torch.zeros_like(index)
        for code, place in zip(codes, (self.base, 1), strict=True):
            coded = self._pull(pullback, values, weights, members * code)
            ratio = coded.gather(1, top[:, None])[:, 0] / divisor
            digit = ratio.round()
            apart = (coded - digit[:, None] * plain).abs().amax(1)
            single &= (apart <= allowed * size) & (digit >= 1) & (digit <= self.base)
            owner += (digit.nan_to_num(1).long() - 1) * place
        owner = owner.clamp(0, self.subject.batch - 1)
        single &= members[owner]
        return owner.numpy(), alive.numpy(), single.numpy()


def _alive(gradient: Tensor) -> Tensor:
    """The samples with a gradient beyond rounding."""
    size = gradient.abs()
    if not size.numel():
        return torch.zeros(len(size), dtype=torch.bool)
    return size.amax(1) > GRADIENT_NOISE * torch.finfo(size.dtype).eps * size.amax()


def spread_colors(known: Any, wide: int, random: np.random.Generator) -> Ints:
    """Random colors of the rows, two of which share none where they have an entry in one column.

    Independent sets of random priority color themselves at once (Jones and Plassmann, 1993); among the first `wide`
    colors each row takes any that is free, so that what is not known is spread too.

    Args:
        known: boolean matrix.
        wide: number of colors to spread over; more are used where these do not do.
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
        taken = (place[one] >= 0) & (colors[other] >= 0)
        score[place[one[taken]], colors[other[taken]]] = -np.inf
        colors[chosen] = score.argmax(1)
    return colors
