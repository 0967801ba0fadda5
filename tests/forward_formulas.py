"""Check forward mode's derivative against reverse mode's, for every operator that torch has samples of.

Run as a script, in a process of its own: torch's samples set flags of the process. Prints JSON: for each of torch's
entries named (all by default) how many samples were compared, how many had a wrong derivative of a right forward mode,
and the operators of `FORWARD_ONCE` in each of those.
"""

from __future__ import annotations

import json
import sys
import time
import types
import unittest
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from autojac.graph.special_kernels import special_kernels

Function = Callable[..., tuple[Tensor, ...]]
SECONDS = 4.0
"""Spent on one entry at most."""
CLOSE = 1e-6
STEP = 1e-6


def entries() -> list[Any]:
    """torch's own samples of inputs; they ask for a package that only torch's own tests need."""
    stub: Any = types.ModuleType("expecttest")
    stub.TestCase, stub.assert_expected_inline = unittest.TestCase, None
    sys.modules.setdefault("expecttest", stub)
    from torch.testing._internal.common_methods_invocations import op_db  # noqa: PLC0415

    return list(op_db)


def bound(entry: Any, sample: Any) -> tuple[Function, list[Tensor]] | None:
    """An entry as a function of the tensors of a sample that it is differentiated in."""
    flat, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        given = list(flat)
        for place, x in zip(places, inputs, strict=True):
            given[place] = x
        first, args, kwargs = pytree.tree_unflatten(given, spec)
        made = pytree.tree_leaves(entry.op(first, *args, **kwargs))
        return tuple(y for y in made if isinstance(y, Tensor) and y.dtype == torch.float64)

    return (function, [flat[place].detach().requires_grad_() for place in places]) if places else None


def noises(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in like]


def gradients(scalar: Any, xs: Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(scalar, Tensor) or not scalar.requires_grad:
        return [torch.zeros_like(x) for x in xs]
    return list(torch.autograd.grad(scalar, xs, create_graph=True, allow_unused=True, materialize_grads=True))


def pulled(function: Function, xs: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor]) -> Tensor:
    """u J v by reverse mode."""
    values = function(*xs)
    slopes = gradients(sum((y * u).sum() for y, u in zip(values, us, strict=True)), xs)
    return torch.stack([(slope * v).sum() for slope, v in zip(slopes, vs, strict=True)]).sum()


def pushed(function: Function, xs: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor]) -> Tensor:
    """u J v by forward mode."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, v) for x, v in zip(xs, vs, strict=True)]
        tangents = [forward_ad.unpack_dual(y).tangent for y in function(*duals)]
        parts = [(t * u).sum() for t, u in zip(tangents, us, strict=True) if t is not None]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)


def near(one: Sequence[Tensor], other: Sequence[Tensor], close: float) -> bool:
    ours, right = (torch.cat([x.detach().flatten() for x in xs]) for xs in (one, other))
    both = torch.isfinite(ours) & torch.isfinite(right)
    scale = float(torch.where(both, right, 0).abs().amax()) if both.numel() else 0.0
    return bool((torch.where(both, ours - right, 0).abs() <= close * (scale + 1e-3)).all())


def verdict(function: Function, xs: Sequence[Tensor]) -> bool | None:
    """Whether a right forward mode has a wrong derivative; None where that can't be told."""
    values = function(*xs)
    if not values or not any(y.requires_grad for y in values):
        return None
    us, vs = noises(values, 1), noises(xs, 2)
    reverse, forward = pulled(function, xs, us, vs), pushed(function, xs, us, vs)
    right, found = gradients(reverse, xs), gradients(forward, xs)
    if not near([forward], [reverse], CLOSE):
        return None  # what a check of J itself sees
    if near(found, right, CLOSE):
        return False
    # reverse mode has the word only where finite differences confirm it
    ws = noises(xs, 3)
    ends = [pulled(function, [(x + h * w).detach().requires_grad_() for x, w in zip(xs, ws, strict=True)], us, vs)
            for h in (STEP, -STEP)]  # fmt: skip
    slope = (ends[0] - ends[1]) / (2 * STEP)
    ours, other = (torch.stack([(g * w).sum() for g, w in zip(gs, ws, strict=True)]).sum() for gs in (right, found))
    return True if near([ours], [slope], 1e-3) and not near([other], [slope], 1e-3) else None


def looked_at(entry: Any) -> dict[str, Any]:
    start, wrong, compared = time.monotonic(), list[list[str]](), 0
    right = list[list[str]]()
    for sample in entry.sample_inputs("cpu", torch.float64, requires_grad=True):
        if time.monotonic() > start + SECONDS:
            break
        case = bound(entry, sample)
        try:
            found = None if case is None else verdict(*case)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            continue  # one of the modes has no formula
        if case is None or found is None:
            continue
        compared += 1
        (wrong if found else right).append(sorted(special_kernels(case[0](*case[1]))))
    return {"compared": compared, "wrong": wrong, "right": right}


def main(names: Sequence[str]) -> None:
    report = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in entries():
            name = f"{entry.name}.{entry.variant_test_name}" if entry.variant_test_name else entry.name
            if (names and name not in names) or torch.float64 not in entry.supported_dtypes("cpu"):
                continue
            try:
                report[name] = looked_at(entry)
            except Exception as error:  # samples that this machine can't make
                report[name] = {"compared": 0, "wrong": [], "right": [], "error": str(error)[:200]}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
