"""Torch's own ways to a batched Jacobian, written as their users write them, and the truth to check them against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from autojac.autodiff.primitives import load_forward_rules
from autojac.bench.workloads import Func, Workload, move_to

ROWS_LIMIT = 4096
"""Rows of the whole batch's Jacobian that a way may pull one by one: seconds per call."""
BYTES_LIMIT = 2**30
"""Bytes that a way may hold at a time, predicted."""
REFERENCE_BYTES = 2**27

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Way:
    """One of torch's ways.

    Attributes:
        name: as the table's columns call it.
        what: what a user writes.
        prepare: from the function to what computes (B, *out, *in) at a point.
        too_large: why a workload is out of its reach, if it is.
    """

    name: str
    what: str
    prepare: Callable[[Func], Callable[[Tensor], Any]]
    too_large: Callable[[Workload], str | None] = lambda workload: None


def blocks_of(whole: Tensor, x: Tensor) -> Tensor:
    """Return the blocks (B, *out, *in) of a whole batch's Jacobian (B, *out, B, *in)."""
    return whole.diagonal(dim1=0, dim2=whole.dim() - x.dim()).movedim(-1, 0)


def whole_batch(vectorize: bool) -> Callable[[Func], Run]:
    return lambda func: lambda x: blocks_of(differentiate(func, x, vectorize), x)


def of_the_sum(vectorize: bool) -> Callable[[Func], Run]:
    """Return the forum's trick: rows of the sum over samples are rows of every sample, if samples are independent."""
    return lambda func: lambda x: differentiate(lambda z: func(z).sum(0), x, vectorize).movedim(-x.dim(), 0)


def differentiate(func: Func, x: Tensor, vectorize: bool) -> Tensor:
    J: Any = jacobian(func, x, vectorize=vectorize)
    assert isinstance(J, Tensor)
    return J


def loop_on_the_sum(func: Func) -> Run:
    def run(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = func(x)
            sums = y.sum(0).flatten().unbind()
            last = len(sums) - 1
            rows = [torch.autograd.grad(s, x, retain_graph=i < last)[0] for i, s in enumerate(sums)]
        return torch.stack(rows, 1).view(*y.shape, *x.shape[1:])

    return run


def sample_by_sample(transform: Callable[..., Callable[..., Any]]) -> Callable[[Func], Run]:
    def prepare(func: Func) -> Run:
        load_forward_rules()
        run: Run = torch.func.vmap(transform(lambda sample: func(sample.unsqueeze(0)).squeeze(0)))
        return run

    return prepare


def in_parameters(transform: Callable[..., Callable[..., Any]]) -> Callable[[Func], Callable[[Tensor], Any]]:
    """Return a transform of `functional_call` in all parameters, sample by sample: a dict name → (B, *out, *param)."""

    def prepare(func: Func) -> Callable[[Tensor], Any]:
        assert isinstance(func, nn.Module)

        def of_sample(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(func, parameters, (sample.unsqueeze(0),)).squeeze(0)
            return out

        load_forward_rules()
        each = torch.func.vmap(transform(of_sample), in_dims=(None, 0))
        return lambda x: each({name: p.detach() for name, p in func.named_parameters()}, x)

    return prepare


def parameter_loop(func: Func) -> Callable[[Tensor], dict[str, Tensor]]:
    """Return the loop over all entries of the output, one VJP each: a dict name → (B, *out, *param)."""
    assert isinstance(func, nn.Module)
    parameters = dict(func.named_parameters())

    def run(x: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            y = func(x)
            rows = [torch.autograd.grad(y_i, list(parameters.values()), retain_graph=True) for y_i in y.flatten()]
        stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        return {name: J.view(*y.shape, *J.shape[1:]) for name, J in zip(parameters, stacked, strict=True)}

    return run


def many_rows(workload: Workload) -> str | None:
    rows = workload.batch * workload.m
    if rows > ROWS_LIMIT:
        return f"{rows} passes for one Jacobian"
    return too_many_bytes(4 * rows * workload.batch * workload.n)


def many_rows_at_once(workload: Workload) -> str | None:
    return too_many_bytes(4 * workload.batch * workload.m * workload.batch * (workload.n + 2 * workload.width))


def too_many_bytes(needed: int) -> str | None:
    return f"needs about {needed / 2**30:.3g} GiB" if needed > BYTES_LIMIT else None


DEFAULT = "vmap(jacrev)"
"""What torch's documentation recommends for a batch: the way that ratios refer to."""

WAYS: tuple[Way, ...] = (
    Way("jacobian", "torch.autograd.functional.jacobian(func, x), blocks taken out", whole_batch(False), many_rows),
    Way("jacobian vec", "the same with vectorize=True", whole_batch(True), many_rows_at_once),
    Way("Σ jacobian", "functional.jacobian of func(x).sum(0)", of_the_sum(False)),
    Way("Σ jacobian vec", "the same with vectorize=True", of_the_sum(True)),
    Way("Σ loop", "torch.autograd.grad of func(x).sum(0)[j] for each j", loop_on_the_sum),
    Way(DEFAULT, "torch.func.vmap(jacrev(func of one sample))(x)", sample_by_sample(torch.func.jacrev)),
    Way("vmap(jacfwd)", "torch.func.vmap(jacfwd(func of one sample))(x)", sample_by_sample(torch.func.jacfwd)),
)
PARAMETER_WAYS: tuple[Way, ...] = (
    Way(DEFAULT, "torch.func.vmap(jacrev(functional_call))(parameters, x)", in_parameters(torch.func.jacrev)),
    Way("loop of VJPs", "torch.autograd.grad of each entry of func(x)", parameter_loop, many_rows),
)


def reference(workload: Workload, func: Func, x: Tensor) -> Tensor:
    """Return the Jacobian in float64, by plain VJPs, rounded to x's dtype: (B, m, n), or (B, m, parameters).

    Coupled samples take every row of the whole batch, many at a time; of independent ones the sum will do.
    """
    exact, point = move_to(func, x.device, torch.float64), x.double()
    if workload.kind == "parameters":
        return flat_parameters(parameter_loop(exact)(point)).to(x.dtype)
    if workload.kind != "coupled":
        return loop_on_the_sum(exact)(point).to(x.dtype)
    row_bytes = 8 * workload.batch * (workload.n + 2 * workload.width)
    chunk = max(1, REFERENCE_BYTES // row_bytes)
    blocks = []
    with torch.enable_grad():
        point = point.detach().requires_grad_()
        rows = exact(point).flatten()
        for start in range(0, len(rows), chunk):
            seeds = torch.zeros(min(chunk, len(rows) - start), len(rows), dtype=rows.dtype, device=rows.device)
            seeds.diagonal(offset=start).fill_(1)
            (pulled,) = torch.autograd.grad(rows, point, seeds, retain_graph=True, is_grads_batched=True)
            index = torch.arange(len(seeds), device=x.device)
            blocks.append(pulled[index, (start + index) // workload.m])
    return torch.cat(blocks).view(workload.batch, workload.m, workload.n).to(x.dtype)


def flat_parameters(J: dict[str, Tensor]) -> Tensor:
    """Return a Jacobian in parameters by name, (B, m, *param) each, as one tensor (B, m, parameters)."""
    return torch.cat([part.flatten(2) for part in J.values()], 2)
