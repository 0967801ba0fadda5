"""The Jacobian of what was computed already: reverse mode through an existing graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from autojac.autodiff.open_modes import transforming
from autojac.autodiff.pullback import Pullback
from autojac.core.autocast import outside_autocast
from autojac.core.batch_axes import AUTO, Axis, batch_axes
from autojac.core.options import Options, parse_bytes
from autojac.core.sandbox import Sandbox
from autojac.core.signature import Leaf, Signature
from autojac.core.structure import Structure
from autojac.errors import (
    AutojacError,
    InputError,
    OptionError,
    SearchError,
    StructureChangedWarning,
    UnsupportedError,
    kind_of,
    warn,
)
from autojac.guards.compiled_functions import opaque
from autojac.methods.pull import Pull
from autojac.planning.search.memory import available_bytes
from autojac.probe.masks import index_masks, split_masks
from autojac.probe.sample_pairs import cotangent_verdict
from autojac.probe.side_effects import check_outputs
from autojac.problem.layouts import require_layout
from autojac.problem.problem import Problem, Result, empty_rows
from autojac.problem.reference import Reference
from autojac.torch_internals import pytree

FEWEST_MASKS = 6
"""Passes spent on the coupling at least; more only where the Jacobian itself takes more."""


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
    options = Options.checked({"layout": layout, "in_dims": in_dims, "coupling": coupling})
    if layout == "sparse":
        raise OptionError(
            "a graph alone does not show which entries are zero everywhere: layout='sparse' needs the function. Use "
            "AutoJacobian(func, layout='sparse')"
        )
    limit = parse_bytes(memory_limit)
    values, out_spec = pytree.tree_flatten(outputs)
    sources, in_spec = pytree.tree_flatten(inputs)
    _require_graph(values, sources)
    axes = batch_axes((inputs,), (in_dims,))
    unbatched = all(axis is None for axis in axes)
    if unbatched:
        values = [value.unsqueeze(0) for value in values]
        options = Options.checked({"layout": "blocks" if layout == "full" else layout, "coupling": coupling})
    batch = check_outputs(values)
    batched = tuple(_carries(x, axis, batch) for x, axis in zip(sources, axes, strict=True))
    leaves = tuple(
        Leaf(tuple(x.shape), str(x.dtype).removeprefix("torch."), str(x.device), has, True)
        for x, has in zip(sources, batched, strict=True)
    )
    events = tuple(tuple(value.shape[1:]) for value in values)
    require_layout(Signature(leaves, events, batch, "", options.layout, create_graph, ()))
    # methods see the outputs that have elements
    solid = [index for index, value in enumerate(values) if value.numel()] or list(range(len(values)))
    pullback = Pullback.of_graph([values[index] for index in solid], sources, create_graph)
    structure = options.declared or Structure("independent")
    room = available_bytes(sources[0].device) // 2 if limit is None else limit
    whole = Problem(_no_func, leaves, events, batch, options.layout, structure, create_graph, room)
    problem = dataclasses.replace(whole, outputs=tuple(events[index] for index in solid))
    try:
        with outside_autocast():
            if not allow_unused:
                _require_used(Pullback.of_graph(values, sources, False))
            result = _compute(problem, pullback, probing=options.declared is None)
        if not retain_graph:
            pullback.free()
    except AutojacError:
        raise
    except RuntimeError as error:
        raise InputError(f"no gradient can be pulled through this graph: {_advice(error)}") from error
    hollow = dataclasses.replace(whole, outputs=tuple(event for event in events if 0 in event))
    found, zeros = iter(result.jacobians), iter(empty_rows(hollow, sources))
    every = [next(found if index in solid else zeros) for index in range(len(values))]
    rows = [pytree.tree_unflatten([J[0] if unbatched else J for J in row], in_spec) for row in every]
    return pytree.tree_unflatten(rows, out_spec)


def _compute(problem: Problem, pullback: Pullback, probing: bool) -> Result:
    carriers = [leaf.batched for leaf in problem.leaves]
    if 0 in (problem.batch, problem.out_size) or not any(x.numel() for x in pullback.inputs):
        return Result(pullback.outputs, empty_rows(problem, pullback.inputs))
    if probing and problem.batch > 1 and any(carriers):
        exact = index_masks(problem.batch)
        generator = torch.Generator().manual_seed(0)
        allowed = max(FEWEST_MASKS, problem.out_size)
        masks = exact if len(exact) <= allowed else split_masks(problem.batch, allowed, generator)
        masks = [mask.to(pullback.inputs[0].device) for mask in masks]
        if cotangent_verdict(pullback, carriers, masks, f"{len(masks)} masks", generator).coupled:
            problem = _dense(problem)
    reasons = []
    while True:
        reference = Reference(problem, pullback.inputs, {}, Sandbox(()), pullback=pullback)
        for method in _methods(problem):
            try:
                result = method.of_graph(problem, pullback)
                wrong = reference.check(result)
            except Exception as error:  # is_grads_batched needs a vmap rule of every operator
                wrong = f"{type(error).__name__}: {error}"
            if wrong is None:
                return result
            reasons.append(f"{method}: {wrong}")
        if not problem.structure.independent:
            raise SearchError(
                f"no method agrees with plain VJPs of this graph ({'; '.join(reasons)}). Let backwards of custom "
                "autograd Functions run any number of times, or wrap the function: AutoJacobian(func)(x)"
            )
        if not probing:
            message = (
                "the samples were declared independent, but are not. This Jacobian was computed again and is right. "
                "Pass coupling='auto' or 'dense'"
            )
            warn(message, StructureChangedWarning)
        problem = _dense(problem)


def _dense(problem: Problem) -> Problem:
    return dataclasses.replace(problem, structure=problem.structure.refuted("the graph couples samples"))


def _methods(problem: Problem) -> Sequence[Pull]:
    """Return those that need no func, the most promising first; the plain loop needs no rule of any operator."""
    fitting = [m for m in Pull.candidates(problem, 0) if m.runs_func_plainly and m.unsupported(problem) is None]
    allowed = [m for m in fitting if problem.result_bytes + m.workspace(problem) <= problem.memory_limit]
    ranked = sorted(allowed, key=lambda method: method.cost(problem))
    return [*ranked, *(method for method in fitting if method.engine == "loop" and method not in ranked)]


def _require_graph(values: Sequence[Any], sources: Sequence[Any]) -> None:
    if transforming():
        raise UnsupportedError(
            "jacobian_from expects plain tensors with a graph, but a torch.func transform is under way. Wrap the "
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


def _require_used(pullback: Pullback) -> None:
    unused = pullback.unused()
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
