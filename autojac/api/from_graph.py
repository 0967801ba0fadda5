"""The Jacobian of outputs that exist already: reverse mode through their graph."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from autojac.api.graph_plans import by_known_plan, by_new_plan
from autojac.autodiff.graph_shape import graph_shape
from autojac.autodiff.open_modes import transforming
from autojac.autodiff.pullback import Pullback
from autojac.core import pytree
from autojac.core.autocast import outside_autocast
from autojac.core.batch_axes import AUTO, Axis, batch_axes
from autojac.core.options import Options, parse_bytes
from autojac.core.signature import Leaf, Signature
from autojac.core.structure import Structure
from autojac.errors import AutojacError, InputError, OptionError, UnsupportedError, kind_of
from autojac.guards.compiled_functions import opaque
from autojac.probe.side_effects import check_outputs
from autojac.problem.layouts import require_layout
from autojac.problem.problem import Problem, Result, empty_rows


@opaque
def jacobian_from(
    outputs: Any,
    inputs: Any,
    *,
    layout: str = "blocks",
    in_dims: Any = AUTO,
    coupling: Any = "auto",
    create_graph: bool = False,
    retain_graph: bool = True,
    allow_unused: bool = False,
    memory_limit: int | str | None = None,
) -> Any:
    """Return the Jacobian of outputs that were computed already with respect to tensors that they were computed from.

    Reverse mode through the graph as it is: func is neither needed nor called. What couples with what is probed on that
    graph, and the result is checked against plain VJPs before it is returned.

    In a loop the later calls only pull the rows: what was found is remembered for graphs of the same operators, integer
    arguments and shapes. Where these operators prove that samples are independent, calls 2, 4, 8, ... are checked, each
    by one VJP more; where they prove nothing, as a custom Function does, every call is.

        >>> import torch
        >>> from autojac import jacobian_from
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> x = torch.rand(64, 2, requires_grad=True)
        >>> jacobian_from(net(x), x, create_graph=True).shape
        torch.Size([64, 1, 2])

    Args:
        outputs: a tensor (B, *out) or a nest of them.
        inputs: tensors that require grad, leaves or not: one, or a nest. Some output must depend on each; those that
            do not have zeros there.
        layout: `"blocks"` (B, *out, *in), `"full"` (B, *out, B, *in) or `"diagonal"` (B, n).
        in_dims: for each input 0, or None where all samples share it, which gives (B, *out, *in). `"auto"` takes
            tensors with B rows for batched, but not a `torch.nn.Parameter`. All None: no batch, J is (*out, *in).
        coupling: `"auto"` probes; `"independent"` or `"dense"` declares, and is still verified.
        create_graph: make the Jacobian differentiable.
        retain_graph: keep the graph, since the outputs are usually needed further, unlike in `torch.autograd.grad`;
            False frees it.
        allow_unused: return zeros for inputs that no output depends on, instead of raising as `torch.autograd.grad`
            does.
        memory_limit: bytes, or a size such as `"8GiB"`, that the passes may take.

    Returns:
        J, nested as `torch.func.jacrev` nests it: outputs outside, inputs inside.

    Raises:
        InputError: if there is no graph from the inputs to the outputs, or it has been freed, or no output depends on
            one of the inputs.
        OutputError: if an output is no real floating-point tensor with the batch on axis 0.
        OptionError: for a value that is not accepted.

    Warns:
        StructureChangedWarning: the samples were declared independent and are not; the result is right.
    """
    options = _options(layout, in_dims, coupling)
    limit = parse_bytes(memory_limit)
    values, out_spec = _flatten(outputs)
    sources, in_spec = _flatten(inputs)
    _require_graph(values, sources)
    axes = (AUTO,) * len(sources) if in_dims == AUTO else batch_axes((inputs,), (in_dims,))
    unbatched = all(axis is None for axis in axes)
    if unbatched:
        values = [value.unsqueeze(0) for value in values]
        options = _options("blocks" if layout == "full" else layout, AUTO, coupling)
    batch = check_outputs(values)
    carriers = tuple([_carries(x, axis, batch) for x, axis in zip(sources, axes, strict=True)])
    shape = graph_shape(values, sources)
    if not allow_unused:
        _require_used(shape.unused)
    is_known = isinstance(coupling, str)
    tensors = tuple([(x.shape, x.dtype, x.device) for x in (*values, *sources)])
    # a structure in full may hold arrays, which are not worth comparing
    key = (shape.key, tensors, carriers, options.layout, coupling, create_graph, limit) if is_known else None
    solid = _with_elements(values)
    pullback = Pullback.of_graph([values[index] for index in solid], sources, create_graph)
    every: Sequence[Sequence[Tensor]]
    try:
        with outside_autocast():
            result = by_known_plan(key, pullback)
            if result is None or len(solid) < len(values):
                problem = _problem(values, sources, carriers, options, create_graph, limit)
                result = result or by_new_plan(key, _part(problem, solid), pullback, shape, options.declared is None)
                every = _with_empty(problem, result, solid, sources)
            else:
                every = result.jacobians
        if not retain_graph:
            pullback.free()
    except AutojacError:
        raise
    except RuntimeError as error:
        raise InputError(f"no gradient can be pulled through this graph: {_advice(error)}") from error
    rows = [_nest([J[0] if unbatched else J for J in row], in_spec) for row in every]
    return _nest(rows, out_spec)


def _flatten(nest: Any) -> tuple[list[Any], pytree.TreeSpec | None]:
    """Return the leaves of a nest and how they nest; None for a single tensor, as most calls have it."""
    return ([nest], None) if isinstance(nest, Tensor) else pytree.tree_flatten(nest)


def _nest(leaves: Sequence[Any], spec: pytree.TreeSpec | None) -> Any:
    return leaves[0] if spec is None else pytree.tree_unflatten(leaves, spec)


def _problem(
    values: Sequence[Tensor],
    sources: Sequence[Tensor],
    carriers: Sequence[bool],
    options: Options,
    create_graph: bool,
    limit: int | None,
) -> Problem:
    """Return the problem of the Jacobian of all outputs."""
    leaves = tuple(
        Leaf(tuple(x.shape), str(x.dtype).removeprefix("torch."), str(x.device), has, True)
        for x, has in zip(sources, carriers, strict=True)
    )
    events, batch = tuple(tuple(value.shape[1:]) for value in values), len(values[0])
    require_layout(Signature(leaves, events, batch, "", options.layout, create_graph, ()))
    structure = options.declared or Structure("independent")
    return Problem(_no_func, leaves, events, batch, options.layout, structure, create_graph, limit or 0)


def _with_elements(values: Sequence[Tensor]) -> Sequence[int]:
    """Return the numbers of the outputs that methods get: those with elements, if there are any."""
    return [index for index, value in enumerate(values) if value.numel()] or range(len(values))


def _part(problem: Problem, chosen: Sequence[int]) -> Problem:
    """Return the problem of some of the outputs."""
    return dataclasses.replace(problem, outputs=tuple(problem.outputs[index] for index in chosen))


def _with_empty(
    problem: Problem, result: Result, solid: Sequence[int], sources: Sequence[Tensor]
) -> Sequence[Sequence[Tensor]]:
    """Return Jacobians of all outputs, from those of the outputs with elements."""
    others = [index for index in range(len(problem.outputs)) if index not in solid]
    rows = dict(zip(others, empty_rows(_part(problem, others), sources), strict=True))
    rows |= dict(zip(solid, result.jacobians, strict=True))
    return [rows[index] for index in range(len(problem.outputs))]


def _options(layout: Any, in_dims: Any, coupling: Any) -> Options:
    if in_dims == AUTO and isinstance(layout, str) and isinstance(coupling, str):
        options = _automatic(layout, coupling)
    else:
        options = Options.from_keywords({"layout": layout, "in_dims": in_dims, "coupling": coupling})
    if layout == "sparse":
        raise OptionError(
            "a graph alone does not show which entries are zero everywhere: layout='sparse' needs the function. Use "
            "AutoJacobian(func, layout='sparse')"
        )
    return options


@functools.lru_cache(64)
def _automatic(layout: str, coupling: str) -> Options:
    """Check the options that most calls pass, once."""
    return Options.from_keywords({"layout": layout, "in_dims": AUTO, "coupling": coupling})


def _require_graph(values: Sequence[Any], sources: Sequence[Any]) -> None:
    if transforming():
        raise UnsupportedError(
            "jacobian_from expects plain tensors with a graph, but a torch.func transform is active. Wrap the "
            "function instead: AutoJacobian(func)(x)"
        )
    if not sources:
        raise InputError(
            "a tensor or a nest of tensors was expected as inputs, got an empty one. Pass those to differentiate in"
        )
    for position, x in enumerate(sources):
        if not isinstance(x, Tensor):
            raise InputError(f"input {position} is {kind_of(x)}; a tensor was expected. Leave it out of inputs")
        if not x.is_floating_point():
            raise InputError(
                f"input {position} is {x.dtype}, which has no real derivative; a floating-point tensor was expected. "
                "In place of a complex one pass the real tensor that torch.view_as_complex made it from"
            )
        if not x.requires_grad:
            raise InputError(
                f"input {position} does not require grad, so no graph leads to it. Call x.requires_grad_() before the "
                "outputs are computed, or wrap the function: AutoJacobian(func)(x)"
            )
    if not any(isinstance(value, Tensor) and value.requires_grad for value in values):
        raise InputError(
            "outputs with a graph were expected, but none requires grad. Compute them with grad mode on and without "
            "detach(), from inputs that require grad"
        )


def _require_used(unused: Sequence[int]) -> None:
    if unused:
        inputs = f"input{'s' if len(unused) > 1 else ''} {', '.join(map(str, unused))}"
        raise InputError(
            f"no output depends on {inputs}: the graph was expected to lead there. Compute the outputs from the very "
            "tensor that is passed, not from a copy or view of it made before or after; or pass allow_unused=True for "
            "zeros"
        )


def _carries(x: Tensor, axis: Axis, batch: int) -> bool:
    """Check whether axis 0 of an input runs over samples."""
    if axis == AUTO:
        return x.dim() > 0 and len(x) == batch and not isinstance(x, torch.nn.Parameter)
    if axis is None:
        return False
    if axis != 0 or len(x) != batch:
        raise OptionError(
            f"in_dims says that axis {axis} of an input of shape {tuple(x.shape)} runs over the {batch} samples of the "
            "outputs. In a graph that exists already the batch must be on axis 0, of inputs and outputs"
        )
    return True


def _advice(error: RuntimeError) -> str:
    reason = str(error)
    if "second time" in reason:
        return (
            "it has been freed by an earlier backward() or jacobian_from(retain_graph=False). Keep it there with "
            "retain_graph=True, or compute the outputs again"
        )
    return reason


def _no_func(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> NoReturn:
    raise UnsupportedError("this Jacobian is of a graph; there is no function to call")
