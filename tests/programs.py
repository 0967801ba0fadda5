"""Random programs of operators on axes, indices and shapes, to be looked through for false proofs."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Step = Callable[[Tensor, Tensor], Any]
Make = Callable[[random.Random, Tensor, int], Step]


def _axis(r: random.Random, t: Tensor) -> int:
    return r.randrange(-t.dim(), t.dim())


def _along(op: Callable[[Tensor, int], Tensor]) -> Make:
    """An operator along one axis."""

    def make(r: random.Random, t: Tensor, batch: int) -> Step:
        axis = _axis(r, t)
        return lambda t, x: op(t, axis)

    return make


def _between(op: Callable[[Tensor, int, int], Tensor]) -> Make:
    """An operator of two axes."""

    def make(r: random.Random, t: Tensor, batch: int) -> Step:
        one, other = _axis(r, t), _axis(r, t)
        return lambda t, x: op(t, one, other)

    return make


def _plain(*ops: Step) -> Make:
    def make(r: random.Random, t: Tensor, batch: int) -> Step:
        return r.choice(ops)

    return make


def _reshape(r: random.Random, t: Tensor, batch: int) -> Step:
    shapes = [(-1,), (batch, -1), (-1, batch), (batch, batch, -1), (2, -1), (-1, 2), (batch, 2, -1), (2, batch, -1)]
    shape = r.choice([*shapes, (2, 2, -1), (-1, 2, 2), (batch, -1, 2), (1, batch, -1), (-1, batch, 1)])
    return lambda t, x: t.reshape(shape)


def _permute(r: random.Random, t: Tensor, batch: int) -> Step:
    order = r.sample(range(t.dim()), t.dim())
    return lambda t, x: t.permute(order)


def _expand(r: random.Random, t: Tensor, batch: int) -> Step:
    shape = [batch] * r.randrange(2) + [batch if size == 1 else size for size in t.shape]
    return lambda t, x: t.expand(shape)


def _pick(r: random.Random, t: Tensor, batch: int) -> Step:
    axis = _axis(r, t) % t.dim()
    index = torch.tensor([r.randrange(t.shape[axis]) for _ in range(r.choice([t.shape[axis], batch]))])
    return lambda t, x: t[(slice(None),) * axis + (index,)]


def _narrow(r: random.Random, t: Tensor, batch: int) -> Step:
    axis = _axis(r, t)
    start = r.randrange(t.shape[axis])
    length = r.randrange(1, t.shape[axis] - start + 1)
    return lambda t, x: t.narrow(axis, start, length)


def _pad(r: random.Random, t: Tensor, batch: int) -> Step:
    amounts = [r.choice([0, 0, 1, -1]) for _ in range(2 * t.dim())]
    return lambda t, x: F.pad(t, amounts)


def _product(r: random.Random, t: Tensor, batch: int) -> Step:
    w = torch.randn(batch, batch, dtype=t.dtype)
    ops: list[Step] = [lambda t, x: t @ x, lambda t, x: x @ t, lambda t, x: t @ t.mT, lambda t, x: t.mT @ t]
    return r.choice([*ops, lambda t, x: t @ w, lambda t, x: w @ t, lambda t, x: F.linear(t, w)])


def _einsum(r: random.Random, t: Tensor, batch: int) -> Step:
    pattern = r.choice(["ij,kj->ik", "ij,jk->ik", "ij,ij->ij", "ij,ik->ijk", "ij,jk->ijk", "ij,ij->i", "ij,ji->i"])
    return lambda t, x: torch.einsum(pattern, t, x)


def _algebra(r: random.Random, t: Tensor, batch: int) -> Step:
    def gram(t: Tensor) -> Tensor:
        return t @ t.mT + 3 * torch.eye(t.shape[-2], dtype=t.dtype)

    ops: list[Step] = [lambda t, x: torch.linalg.inv(gram(t)), lambda t, x: torch.linalg.solve(gram(t), t)]
    return r.choice([*ops, lambda t, x: torch.linalg.det(gram(t)), lambda t, x: torch.linalg.solve(gram(t), x)])


def _norm(r: random.Random, t: Tensor, batch: int) -> Step:
    axes = r.randrange(1, t.dim() + 1)
    return lambda t, x: F.layer_norm(t, t.shape[-axes:])


def _convolution(r: random.Random, t: Tensor, batch: int) -> Step:
    w = torch.randn(2, t.shape[-2], 2, dtype=t.dtype)
    return lambda t, x: F.conv1d(t, w, padding=1)


def _scatter(r: random.Random, t: Tensor, batch: int) -> Step:
    axis = _axis(r, t)
    return lambda t, x: torch.zeros_like(t).scatter_add(axis, t.abs().long() % t.shape[axis], t)


def _put(r: random.Random, t: Tensor, batch: int) -> Step:
    axis, size = _axis(r, t) % t.dim(), 2
    shape = (size,) if r.random() < 0.5 else (size, 2)
    index = [None] * axis + [torch.randint(t.shape[axis], shape)]
    other = r.randrange(t.dim())

    def step(t: Tensor, x: Tensor) -> Tensor:
        taken = t.transpose(axis, other) if t.shape[axis] == t.shape[other] else t
        return torch.ops.aten.index_put(
            torch.zeros_like(t), index, taken[tuple(slice(None) if i is None else i for i in index)]
        )

    return step


def _written(t: Tensor, x: Tensor) -> Tensor:
    y = t.clone()
    y.transpose_(0, -1)
    return y.mul_(x)


def _copied(t: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(t).copy_(t.transpose(0, -1))


MAKERS: dict[str, Make] = {
    **{"reshape": _reshape, "permute": _permute, "expand": _expand, "index": _pick, "narrow": _narrow, "pad": _pad},
    **{"product": _product, "einsum": _einsum, "linalg": _algebra, "layer_norm": _norm, "conv1d": _convolution},
    **{"scatter": _scatter, "index_put": _put},
    "index_add": _along(lambda t, a: torch.zeros_like(t).index_add(a, torch.arange(t.shape[a]).flip(0), t)),
    "transpose": _between(Tensor.transpose),
    "movedim": _between(lambda t, a, b: t.movedim(a, b)),
    "diagonal": _between(lambda t, a, b: t.diagonal(0, a, b)),
    "outer": _between(lambda t, a, b: t.unsqueeze(a) - t.unsqueeze(b)),
    "plus transposed": _between(lambda t, a, b: t + t.transpose(a, b)),
    "amax": _between(lambda t, a, b: t.amax(tuple({a % t.dim(), b % t.dim()}), keepdim=a < 0)),
    "flip": _along(lambda t, a: t.flip(a)),
    "roll": _along(lambda t, a: t.roll(1, a)),
    "cumsum": _along(lambda t, a: t.cumsum(a)),
    "softmax": _along(lambda t, a: t.softmax(a)),
    "logsumexp": _along(lambda t, a: t - t.logsumexp(a, keepdim=True)),
    "sort": _along(lambda t, a: t.sort(a).values),
    "topk": _along(lambda t, a: t.topk(1, a).values),
    "sum": _along(lambda t, a: t.sum(a, keepdim=a < 0)),
    "var": _along(lambda t, a: t.var(a, unbiased=False, keepdim=a < 0)),
    "argmax": _along(lambda t, a: t * t.argmax(a, keepdim=True)),
    "unsqueeze": _along(lambda t, a: t.unsqueeze(a)),
    "select": _along(lambda t, a: t.select(a, -1)),
    "unbind": _along(lambda t, a: sum(t.unbind(a), torch.zeros((), dtype=t.dtype))),
    "chunk": _along(lambda t, a: t.chunk(2, a)[0]),
    "cat": _along(lambda t, a: torch.cat([t, 2 * t], a)),
    "stack": _along(lambda t, a: torch.stack([t, t.sin()], a)),
    "repeat_interleave": _along(lambda t, a: t.repeat_interleave(2, a)),
    "gather": _along(lambda t, a: t.gather(a, t.abs().long() % t.shape[a])),
    "argsort": _along(lambda t, a: torch.take_along_dim(t, t.argsort(a), a)),
    "fft": _along(lambda t, a: torch.fft.fft(t, dim=a).real),
    "unfold": _along(lambda t, a: t.unfold(a, min(2, t.shape[a]), 1)),
    "glu": _along(F.glu),
    "squeeze": _plain(lambda t, x: t.squeeze(), lambda t, x: t.squeeze(0)),
    "with x": _plain(lambda t, x: t + x, lambda t, x: t * x.mT, lambda t, x: torch.where(x > 0, t, t.flip(-1))),
    "roll of all": _plain(lambda t, x: t.roll(1), lambda t, x: t.repeat(2, *[1] * (t.dim() - 1))),
    "stacks": _plain(lambda t, x: torch.bmm(t, t), lambda t, x: torch.bmm(t[None], x[None])),
    "distances": _plain(torch.cdist, lambda t, x: torch.cdist(t, t)),
    "diag_embed": _plain(lambda t, x: t.diag_embed(), lambda t, x: t.triu()),
    "images": _plain(lambda t, x: F.avg_pool2d(t, 2), lambda t, x: F.pixel_shuffle(t, 2)),
    "pooling": _plain(lambda t, x: F.avg_pool1d(t, 2), lambda t, x: F.adaptive_avg_pool1d(t, 2)),
    "norms": _plain(lambda t, x: F.group_norm(t, 1), lambda t, x: F.instance_norm(t)),
    "table": _plain(lambda t, x: F.embedding(t.abs().long() % len(x), x)),
    "in place": _plain(_written, _copied, lambda t, x: t.clone().add_(t.flip(0))),
}


def program(r: random.Random, batch: int) -> tuple[Callable[[Tensor], Tensor], Tensor, list[str]] | None:
    """A function of (batch, …) with the batch in front of its result, its argument, and what it is made of."""
    sizes = r.choice([(batch,), (batch,), (2 * batch,), (batch, 2), (2, batch), (batch, batch)])
    x = torch.randn(batch, *sizes, dtype=torch.float64)
    steps: list[Step] = []
    names: list[str] = []

    def func(x: Tensor) -> Tensor:
        t = x
        for step in steps:
            t = step(t, x)
        return t

    t = x
    for _ in range(r.randrange(1, 6)):
        name = r.choice(sorted(MAKERS))
        try:
            step = MAKERS[name](r, t, batch)
            following = step(t, x)
        except (RuntimeError, IndexError, ValueError, AssertionError, TypeError):
            continue
        if 0 < following.numel() <= 4096 and following.dim():
            steps.append(step)
            names.append(name)
            t = following
    if t.shape[0] != batch:
        if batch in t.shape:
            axis = t.shape.index(batch)
            steps.append(lambda t, x: t.movedim(axis, 0))
        elif t.numel() % batch == 0:
            steps.append(lambda t, x: t.reshape(batch, -1))
        else:
            return None
    return func, x, names
