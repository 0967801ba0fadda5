"""Operators on arrays within each sample: transforms, indices, windows, reductions, special functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scenarios.base import Draw, Scenario, traits
from scenarios.maths import one_hot_rows

ROWS = 4


def low_pass(draw: Draw) -> Any:
    gain = draw.uniform(4)
    return lambda x: torch.fft.irfft(torch.fft.rfft(x) * gain, n=6), (draw.normal(ROWS, 6),)


def spectrum(x: Tensor) -> Tensor:
    return torch.view_as_real(torch.fft.fft(x))


def spectrum_jacobian(_: Any, x: Tensor) -> Tensor:
    n = x.shape[-1]
    return torch.view_as_real(torch.fft.fft(torch.eye(n, dtype=x.dtype))).mT.expand(len(x), n, 2, n)


def wave(x: Tensor) -> Tensor:
    """A complex function of a complex number, both as pairs of reals."""
    return torch.view_as_real(torch.view_as_complex(x.contiguous()) ** 2)


def wave_jacobian(_: Any, x: Tensor) -> Tensor:
    re, im = x.unbind(-1)
    own = 2 * torch.stack([torch.stack([re, -im], -1), torch.stack([im, re], -1)], -2)
    return torch.einsum("bipq,ij->bipjq", own, torch.eye(x.shape[1], dtype=x.dtype))


def scattered(x: Tensor, index: Tensor) -> Tensor:
    return torch.zeros(len(x), 3, dtype=x.dtype).scatter_add(1, index, x**2)


def scattered_jacobian(_: Any, x: Tensor, index: Tensor) -> Tensor:
    return one_hot_rows(index, 3, x).mT * 2 * x[:, None]


def messages(draw: Draw) -> Any:
    """One step of a graph network on a graph that all samples share."""
    source, target = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 2, 3, 0, 2])

    def func(x: Tensor) -> Tensor:
        return x + torch.zeros_like(x).index_add(1, target, x[:, source].sin())

    return func, (draw.normal(ROWS, 4, 2),)


def looked_up(draw: Draw) -> Any:
    table = draw.normal(7, 3)
    return lambda x, tokens: (x * F.embedding(tokens, table).sum(1)).tanh(), (
        draw.normal(ROWS, 3),
        draw.integers(7, ROWS, 2),
    )


def warped(draw: Draw) -> Any:
    image = draw.normal(1, 1, 4, 4)

    def func(shift: Tensor) -> Tensor:
        grid = 0.5 * torch.tanh(shift)[:, None]
        return F.grid_sample(image.expand(len(shift), 1, 4, 4), grid, align_corners=True).flatten(1)

    return func, (draw.normal(ROWS, 3, 2),)


def huber(x: Tensor, target: Tensor) -> Tensor:
    return F.huber_loss(x, target, reduction="none").sum(-1)


def special(x: Tensor) -> Tensor:
    return torch.stack([x.erf(), x.lgamma(), torch.special.i0e(x), torch.xlogy(x, x), torch.special.ndtri(x / 9)], -1)


def interpolated(x: Tensor) -> Tensor:
    """Linear between fixed knots, by a search among them."""
    knots, values = x.new_tensor([-9.0, -1.0, 0.0, 1.0, 9.0]), x.new_tensor([0.0, 2.0, 1.0, 3.0, 4.0])
    right = torch.searchsorted(knots, x.detach().contiguous())
    left = right - 1
    part = (x - knots[left]) / (knots[right] - knots[left])
    return values[left] + part * (values[right] - values[left])


def overlap_add(x: Tensor) -> Tensor:
    return F.fold((x**2).mT, (1, 7), (1, 3), stride=(1, 2)).flatten(1)


def without_own(x: Tensor) -> Tensor:
    """Products of all the other entries."""
    others = x[:, None].expand(-1, x.shape[-1], -1) * (1 - torch.eye(x.shape[-1], dtype=x.dtype))
    return (others + torch.eye(x.shape[-1], dtype=x.dtype)).prod(-1)


def arrowhead(x: Tensor) -> Tensor:
    """The first coordinate with all, each other one with the first and itself."""
    return torch.cat(((x**2).sum(-1, keepdim=True), x[:, 1:] * x[:, :1]), -1)


def arrowhead_jacobian(_: Any, x: Tensor) -> Tensor:
    own = torch.diag_embed(torch.cat((2 * x[:, :1], x[:, :1].expand(-1, x.shape[1] - 1)), -1))
    first_row = torch.nn.functional.pad(2 * x[:, None, 1:], (1, 0, 0, x.shape[1] - 1))
    first_column = torch.nn.functional.pad(x[:, 1:, None], (0, x.shape[1] - 1, 1, 0))
    return own + first_row + first_column


SCENARIOS = [
    Scenario("arrowhead", lambda d: (arrowhead, (d.normal(ROWS, 12),)), jacobian=arrowhead_jacobian),
    Scenario("low-pass filter by rfft and irfft", low_pass),
    Scenario(
        "Fourier coefficients, seen as reals",
        lambda d: (spectrum, (d.normal(ROWS, 5),)),
        jacobian=spectrum_jacobian,
    ),
    Scenario(
        "complex square, seen as reals",
        lambda d: (wave, (d.normal(ROWS, 3, 2),)),
        jacobian=wave_jacobian,
    ),
    Scenario(
        "scatter by a side input",
        lambda d: (scattered, (d.normal(ROWS, 5), d.integers(3, ROWS, 5))),
        jacobian=scattered_jacobian,
        traits=traits("masked"),
    ),
    Scenario("messages on a graph", messages),
    Scenario("embedding bag on the side", looked_up, traits=traits("masked")),
    Scenario(
        "median in a sample",
        lambda d: (lambda x: x.median(-1, keepdim=True).values, (d.normal(ROWS, 5),)),
        jacobian=lambda _, x: one_hot_rows(x.median(-1, keepdim=True).indices, 5, x),
    ),
    Scenario(
        "cumprod in a sample",
        lambda d: (lambda x: x.cumprod(-1), (d.normal(ROWS, 4),)),
        jacobian=lambda _, x: (x.cumprod(-1)[:, :, None] / x[:, None]).tril(),
    ),
    Scenario(
        "logcumsumexp in a sample",
        lambda d: (lambda x: x.logcumsumexp(-1), (d.normal(ROWS, 4),)),
        jacobian=lambda _, x: (x[:, None] - x.logcumsumexp(-1)[..., None]).exp().tril(),
    ),
    Scenario(
        "clamp",
        lambda d: (lambda x: x.clamp(-0.5, 0.5), (d.normal(ROWS, 4),)),
        jacobian=lambda _, x: (x.abs() < 0.5).to(x.dtype).diag_embed(),
    ),
    Scenario(
        "Huber loss a sample",
        lambda d: (huber, (2 * d.normal(ROWS, 4), d.normal(ROWS, 4))),
        jacobian=lambda _, x, target: (x - target).clamp(-1, 1),
    ),
    Scenario("special functions", lambda d: (special, (0.5 + d.uniform(ROWS, 2),))),
    Scenario(
        "interpolation between knots",
        lambda d: (interpolated, (d.normal(ROWS, 4),)),
    ),
    Scenario("overlapping windows by unfold", lambda d: (lambda x: x.unfold(-1, 3, 2).sin(), (d.normal(ROWS, 7),))),
    Scenario("overlap and add by fold", lambda d: (overlap_add, (d.normal(ROWS, 3, 3),))),
    Scenario("image warped by grid_sample", warped, traits=traits("no_forward_ad")),
    Scenario(
        "reflected border",
        lambda d: (lambda x: F.pad(x**2, (2, 1), mode="reflect"), (d.normal(ROWS, 4),)),
        jacobian=lambda _, x: F.pad((2 * x).diag_embed().mT, (2, 1), mode="reflect").mT,
    ),
    Scenario("products of the others", lambda d: (without_own, (d.normal(ROWS, 3),))),
    Scenario(
        "einsum of three",
        lambda d: (lambda x: torch.einsum("bi,bj,bk->bijk", x, x, x), (d.normal(ROWS, 2),)),
    ),
]
