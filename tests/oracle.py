"""Jacobians the slow and obvious way: one plain VJP per row, nothing batched, nothing of autojac.

torch's own transforms are silently wrong for some operators, so they are no reference; a single row of
`torch.autograd.grad` agrees with finite differences wherever the function is smooth.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

ArgNums = int | tuple[int, ...]


def jacobian_full(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: ArgNums = 0,
    *,
    kwargs: Mapping[str, Any] | None = None,
    to_double: bool = False,
) -> Any:
    """Every derivative of every output: (*y.shape, *x.shape) for each pair of output and input.

    Args:
        func: function of the whole batch; called once.
        args: its positional arguments; those in `argnums` are pytrees of tensors.
        argnums: which of them to differentiate.
        kwargs: its keyword arguments.
        to_double: compute in float64, on copies. Tensors that a plain function has captured are out of reach.

    Returns:
        The outputs' nest, in it a tuple over `argnums` if that is one, in it the argument's nest.
    """
    return _jacobian(func, args, argnums, kwargs, to_double, lambda argnum: False)


def jacobian_blocks(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: ArgNums = 0,
    *,
    shared: Collection[int] = (),
    kwargs: Mapping[str, Any] | None = None,
    to_double: bool = False,
) -> Any:
    """Each sample's own Jacobian: (B, *out, *in), or (B, *out, *arg) for the arguments in `shared`.

    Arguments and nesting are those of `jacobian_full` otherwise.
    """
    return _jacobian(func, args, argnums, kwargs, to_double, lambda argnum: argnum not in shared)


def _jacobian(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: ArgNums,
    kwargs: Mapping[str, Any] | None,
    to_double: bool,
    own_sample: Callable[[int], bool],
) -> Any:
    wanted = [number % len(args) for number in ((argnums,) if isinstance(argnums, int) else argnums)]
    kwargs = dict(kwargs or {})
    if to_double:
        func, (args, kwargs) = _double_function(func), pytree.tree_map(_double, (args, kwargs))
    # the caller's random state is where one call of func would start, and it stays there
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        leaves = [pytree.tree_map_only(Tensor, _leaf if k in wanted else Tensor.detach, x) for k, x in enumerate(args)]
        # copies that are no leaves: a function may write into its arguments
        given, kwargs = pytree.tree_map_only(Tensor, torch.clone, (leaves, kwargs))
        outputs = func(*given, **kwargs)

        def nest(y: Tensor) -> Any:
            rows = {k: functools.partial(_rows, y, own_sample=own_sample(k)) for k in wanted}
            per_argument = [pytree.tree_map(rows[k], leaves[k]) for k in wanted]
            return per_argument[0] if isinstance(argnums, int) else tuple(per_argument)

        return pytree.tree_map(nest, outputs)


def _rows(y: Tensor, x: Tensor, own_sample: bool) -> Tensor:
    """dy/dx a row at a time; with `own_sample`, of each row only the part that belongs to its own sample."""
    rows = [_row(scalar, x) for scalar in y.reshape(-1)]
    if own_sample:
        per_sample = y[0].numel() if len(y) else 0
        rows = [row[i // per_sample] for i, row in enumerate(rows)]
    event = x.shape[1:] if own_sample else x.shape
    return torch.stack(rows).reshape((*y.shape, *event)) if rows else x.new_zeros((*y.shape, *event))


def _row(scalar: Tensor, x: Tensor) -> Tensor:
    if not scalar.requires_grad:
        return torch.zeros_like(x)
    (row,) = torch.autograd.grad(scalar, x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if row is None else row


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _double_function(func: Callable[..., Any]) -> Callable[..., Any]:
    return copy.deepcopy(func).double() if isinstance(func, nn.Module) else func


def derivative(func: Callable[[Tensor], Tensor], x: Tensor, columns: tuple[int, ...]) -> Tensor:
    """The derivative of each sample's outputs by columns of its own input, (B, *out): one plain VJP a number and order.

    Args:
        func: maps (B, *in) to (B, *out).
        x: where.
        columns: by which, one for each order.
    """
    source = x.detach().clone().requires_grad_()
    values = func(source)
    rows = []
    for number, element in enumerate(values.flatten()):
        value, sample = element, number // (values.numel() // len(x))
        for column in columns:
            found = None
            if value.requires_grad:
                (found,) = torch.autograd.grad(value, source, create_graph=True, allow_unused=True)
            value = torch.zeros_like(value) if found is None else found[sample].flatten()[column]
        rows.append(value)
    return torch.stack(rows).reshape(values.shape)
