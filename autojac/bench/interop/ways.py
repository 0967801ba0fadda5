"""Torch's ways to a batched Jacobian as users write them, with a graph where grad mode is on, and the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autojac.bench.baselines import DEFAULT, Run, sample_by_sample
from autojac.bench.interop.case import Func


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Have attention computed, where grad mode is on, by the kernel that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH) if torch.is_grad_enabled() else nullcontext():
        yield


def rows(func: Func, x: Tensor, pull: Callable[[Tensor, Tensor, bool], Tensor]) -> Tensor:
    """Return what `pull` makes of output and input, with a graph where grad mode is on."""
    differentiable = torch.is_grad_enabled()
    with second_derivatives(), torch.enable_grad():
        x = x.detach().requires_grad_()
        return pull(func(x), x, differentiable)


def pull_in_loop(y: Tensor, x: Tensor, differentiable: bool) -> Tensor:
    """Return one VJP for each coordinate of the sum over samples."""
    sums = y.sum(0).flatten().unbind()
    found = [torch.autograd.grad(s, x, retain_graph=True, create_graph=differentiable)[0] for s in sums]
    return torch.stack(found, 1).view(*y.shape, *x.shape[1:])


def pull_batched(y: Tensor, x: Tensor, differentiable: bool) -> Tensor:
    """Return all coordinates of the sum over samples, in one pass."""
    sums = y.sum(0).flatten()
    seeds = torch.eye(len(sums), dtype=y.dtype, device=y.device)
    (found,) = torch.autograd.grad(sums, x, seeds, create_graph=differentiable, is_grads_batched=True)
    return found.movedim(0, 1).reshape(*y.shape, *x.shape[1:])


def row_by_row(y: Tensor, x: Tensor, differentiable: bool) -> Tensor:
    """Return one VJP per coordinate of each sample, of which the sample's own part is kept: right whatever couples."""
    flat = y.flatten().unbind()
    each = len(flat) // len(y)
    found = [
        torch.autograd.grad(scalar, x, retain_graph=True, create_graph=differentiable)[0][at // each]
        for at, scalar in enumerate(flat)
    ]
    return torch.stack(found).view(*y.shape, *x.shape[1:])


def transform_each_sample(transform: Callable[..., Callable[..., Any]]) -> Callable[[Func], Run]:
    """Return one of torch's transforms, sample by sample."""
    prepare = sample_by_sample(transform)

    def prepared(func: Func) -> Run:
        compute = prepare(func)

        def run(x: Tensor) -> Tensor:
            with second_derivatives():
                return compute(x)

        return run

    return prepared


WAYS: dict[str, Callable[[Func], Run]] = {
    DEFAULT: transform_each_sample(torch.func.jacrev),
    "vmap(jacfwd)": transform_each_sample(torch.func.jacfwd),
    "loop of VJPs": lambda func: lambda x: rows(func, x, pull_in_loop),
    "is_grads_batched": lambda func: lambda x: rows(func, x, pull_batched),
}
EXACT = "every row"
"""The way that is right whatever couples, raced where no other is."""


def exact(func: Func) -> Run:
    return lambda x: rows(func, x, row_by_row)


def loss_gradient(jacobian: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradient of a loss of J, its mean square, in all parameters."""
    found = torch.autograd.grad(jacobian.square().mean(), list(parameters), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])
