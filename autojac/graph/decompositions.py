"""Operators that a recording writes down as several: batch norm and softmax, with what samples share as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from autojac.graph.ir import Operation, Value
from autojac.graph.operators import BATCH_NORMS

aten = torch.ops.aten


class Writer(Protocol):
    """What a decomposition needs of a recorder."""

    shapes: dict[int, tuple[int, ...]]
    operations: list[Operation]
    marks: dict[int, str]

    def refuse(self, reason: str) -> None: ...
    def to_value(self, value: Any) -> Any: ...
    def number(self, tensor: Tensor) -> int: ...
    def symbol(self, shape: Sequence[int], dtype: torch.dtype) -> int: ...


def decompose(writer: Writer, name: str, func: Any, args: Any, kwargs: Any) -> tuple[bool, Any]:
    """Check whether an operator is written down as several, and what it returned; it runs once, as it is."""
    if name in BATCH_NORMS:
        return True, _batch_norm(writer, name, func, args, kwargs)
    if name in ("_softmax", "_log_softmax") and args[1] % max(args[0].dim(), 1) == 0 and not args[2]:
        return True, _softmax(writer, name, func, args)
    return False, None


def _batch_norm(writer: Writer, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Batch norm as mean, variance and rescaling; the operator itself moves the running statistics."""
    x, weight, bias = args[:3]
    tracked = name != "_native_batch_norm_legit" or func._overloadname != "no_stats"
    means, variances = args[3:5] if tracked else (None, None)
    eps = args[-1]
    training = args[5] if tracked and name != "_batch_norm_with_update" else True
    if kwargs:
        writer.refuse(f"func calls {name} with keyword arguments")
    source, parameters = writer.to_value(x), [writer.to_value(part) for part in (weight, bias)]
    running = [] if training else [writer.to_value(part) for part in (means, variances)]
    made = func(*args, **kwargs)
    detached = not torch.is_grad_enabled()
    whole, dtype = tuple(x.shape), x.dtype
    narrow = (1, x.shape[1], *[1] * (x.dim() - 2))

    def emit(target: Any, *given: Any, shape: Sequence[int] = whole, **named: Any) -> Value:
        index = writer.symbol(shape, named.get("dtype", dtype))
        writer.operations.append(Operation(target, given, named, (index,), False, detached))
        return Value(index)

    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
        source = emit(aten._to_copy.default, source, dtype=dtype)
        parameters = [
            part and emit(aten._to_copy.default, part, shape=writer.shapes[part.number], dtype=dtype)
            for part in parameters
        ]
    if training:
        axes = [0, *range(2, x.dim())]
        mean = emit(aten.mean.dim, source, axes, True, shape=narrow)
        centered = emit(aten.sub.Tensor, source, mean)
        square = emit(aten.mul.Tensor, centered, centered)
        variance = emit(aten.mean.dim, square, axes, True, shape=narrow)
        writer.marks[variance.number] = "var"
    else:
        mean, variance = (emit(aten.view.default, part, list(narrow), shape=narrow) for part in running)
        centered = emit(aten.sub.Tensor, source, mean)
    scale = emit(aten.rsqrt.default, emit(aten.add.Tensor, variance, eps, shape=narrow), shape=narrow)
    writer.marks |= {mean.number: "mean", scale.number: "1/deviation"}
    result = emit(aten.mul.Tensor, centered, scale)
    for part, combine in zip(parameters, (aten.mul.Tensor, aten.add.Tensor), strict=True):
        if part is not None:
            result = emit(combine, result, emit(aten.view.default, part, list(narrow), shape=narrow))
    if x.dtype != dtype:
        result = emit(aten._to_copy.default, result, dtype=x.dtype)
    writer.operations.append(Operation(aten.alias.default, (result,), {}, (writer.number(made[0]),), False, detached))
    return made


def _softmax(writer: Writer, name: str, func: Any, args: Any) -> Any:
    """Compute a softmax along the first axis, where the batch may be, with its normalizer as a tensor of its own."""
    x = writer.to_value(args[0])
    made = func(*args)
    detached = not torch.is_grad_enabled()
    whole, dtype = tuple(args[0].shape), args[0].dtype
    normaliser, shifted = writer.symbol((1, *whole[1:]), dtype), writer.symbol(whole, dtype)
    last = aten.exp.default if name == "_softmax" else aten.alias.default
    writer.operations += [
        Operation(aten.logsumexp.default, (x, [0], True), {}, (normaliser,), False, detached),
        Operation(aten.sub.Tensor, (x, Value(normaliser)), {}, (shifted,), False, detached),
        Operation(last, (Value(shifted),), {}, (writer.number(made),), False, detached),
    ]
    return made
