"""The arguments of products with a Jacobian: where samples are, and vectors of the right shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autojac.autodiff.pullback import Pullback
from autojac.core import pytree
from autojac.core.batch_axes import AUTO
from autojac.core.call import outside_inference_mode
from autojac.core.module_function import ModuleFunction
from autojac.core.nests import is_differentiable
from autojac.core.pattern import Sparsity
from autojac.core.structure import KEEPS, Structure
from autojac.errors import InputError, UnsupportedError, kind_of, plural
from autojac.planning.call import Call
from autojac.planning.first_call import FirstCallReport
from autojac.planning.isolation import isolate_planning
from autojac.planning.plans_in_use import PlansInUse


class VectorNest(NamedTuple):
    """Where the vectors of a product are in what is passed.

    Attributes:
        spec: of the nest; None for one tensor.
        places: of the vectors among its leaves; the others belong to what has no derivative, whatever they are.
    """

    spec: pytree.TreeSpec | None
    places: tuple[int, ...]

    def flat(self, vectors: Any) -> list[Any]:
        """Return the vectors alone."""
        if self.spec is None:
            return [vectors]
        every = pytree.flatten_up_to(self.spec, vectors)
        return [every[number] for number in self.places]


class CallShapes(NamedTuple):
    """The facts of a call from which the shapes of products follow.

    Attributes:
        batch: number of samples; None for a function without a batch.
        axes: for each tensor argument the axis that runs over samples; None where all share it.
        differentiated: positions of the differentiated ones among these, as `argnums` orders them.
        inputs: shape of each of these, without samples.
        outputs: shape of each output of a sample.
        nest: of func's outputs; None where it returns one tensor.
        kept: which of the leaves of this nest are these outputs; None where all are.
        effects: what a call does besides returning a value.
        item_bytes: of an entry.
        device: of the inputs.
        is_blind: func reads its parameters directly, not as arguments, so that nothing can replace them.
        is_sliceable: samples are independent, and func of some of them is those samples of func; False without a probe.
    """

    batch: int | None
    axes: tuple[int | None, ...]
    differentiated: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    nest: pytree.TreeSpec | None
    kept: tuple[bool, ...] | None
    effects: tuple[str, ...]
    item_bytes: int
    device: torch.device
    is_blind: bool
    is_sliceable: bool

    @property
    def lead(self) -> tuple[int, ...]:
        """The number of samples as the first axis of each output; empty without a batch."""
        return () if self.batch is None else (self.batch,)

    @property
    def outputs_nest(self) -> VectorNest:
        """Where cotangents are in their nest."""
        kept = self.kept or (True,) * len(self.outputs)
        return VectorNest(self.nest, tuple(number for number, has in enumerate(kept) if has))

    def nested_outputs(self, flat: Sequence[Any]) -> Any:
        """Return values for the outputs in their nest."""
        if self.nest is None:
            return flat[0]
        values = iter(flat)
        leaves = list(flat) if self.kept is None else [next(values) if has else None for has in self.kept]
        return pytree.tree_unflatten(leaves, self.nest)

    @property
    def is_repeatable(self) -> bool:
        """Whether several calls have no more effects than one."""
        return not set(self.effects) - {KEEPS}

    def require_repeatable(self, what: str) -> None:
        """Raise `UnsupportedError` if several calls have more effects than one."""
        if not self.is_repeatable:
            effects = [effect for effect in self.effects if effect != KEEPS]
            raise UnsupportedError(
                f"{what} evaluates func several times, which was expected to have no effects, but it "
                f"{' and '.join(effects)}. Put the model into eval mode, or raise memory_limit"
            )


def call_shapes(plans: PlansInUse, args: Sequence[Any], kwargs: Mapping[str, Any], probing: bool) -> CallShapes:
    """Return the shapes of a call; what is not declared is probed as for a Jacobian.

    Args:
        plans: of the function.
        args, kwargs: the call.
        probing: probe the coupling in any case.
    """
    planner = plans.planner
    with outside_inference_mode(args, kwargs) as arguments, plans.lock:
        call = plans.describe(*arguments)
        trained, call = call.trained, call.without_grad().detach()
        with isolate_planning(call, trained):
            report = planner.builder.inspect(call)
            layout = call.layout
            undeclared = len(layout.axes) > 1 and AUTO in layout.axes
            probe = planner.builder.probe(call, report) if (probing or undeclared) and not report.is_empty else None
            batched = report.guess if probe is None else probe.batched
            blind = isinstance(plans.func, ModuleFunction) and _reads_past(plans.func, call, report)
    if layout.unbatched:
        axes: tuple[int | None, ...] = (None,) * len(layout.axes)
    else:
        axes = tuple(axis if has else None for axis, has in zip(layout.sources, batched, strict=True))
    order = tuple(layout.order)
    roles = layout.roles(call.leaves, layout.batched_leaves(batched))
    return CallShapes(
        None if layout.unbatched else report.signature.batch,
        axes,
        order,
        tuple(roles[position].shape[1:] if layout.unbatched else roles[position].event_shape for position in order),
        report.signature.outputs,
        layout.out_spec,
        layout.out_kept,
        report.first.effects,
        max(call.leaves[position].element_size() for position in order),
        call.leaves[order[0]].device,
        blind,
        probe is not None and probe.structure.independent and probe.structure.sliceable,
    )


def _reads_past(func: ModuleFunction, call: Call, report: FirstCallReport) -> bool:
    """Check whether outputs depend on a module's own parameters although others replace them."""
    with report.sandbox(), torch.enable_grad():
        values = [y for y in report.fn([leaf.detach() for leaf in call.leaves], call.keywords) if y.requires_grad]
    own = func.__autojac_originals__()
    return len(Pullback.of_graph(values, own, False).unused_inputs()) < len(own)


class ProductVectors(NamedTuple):
    """The vectors of a product, checked.

    Attributes:
        steps: zeros, which come first along tangents.
        nest: where the vectors are in what is passed.
        several: there are several.
        in_dims: of steps and vectors.
        axes: of the differentiated tensors, along tangents.
    """

    steps: tuple[Tensor, ...]
    nest: VectorNest
    several: bool
    in_dims: tuple[int | None, ...]
    axes: tuple[int | None, ...] = ()


def tangents(shapes: CallShapes, like: Any, vectors: Any, whole: bool) -> ProductVectors:
    """Check the vectors that a Jacobian is multiplied with, `like` what is differentiated."""
    leaves, spec = pytree.tree_flatten(like)
    places = tuple(number for number, value in enumerate(leaves) if is_differentiable(value))
    flat = [leaves[number] for number in places]
    nest = VectorNest(None if isinstance(like, Tensor) else spec, places)
    several, given = checked_vectors(vectors, nest, [tuple(x.shape) for x in flat], "v")
    axes = tuple(None if whole else shapes.axes[position] for position in shapes.differentiated)
    count = given[0].shape[:several]
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in flat])
    steps: list[Tensor] = []
    step_dims: list[int | None] = []
    for per_sample in sorted({axis is not None for axis in axes}, reverse=True):
        with torch.inference_mode(False):
            steps.append(flat[0].new_zeros((*shapes.lead[:per_sample], *count), dtype=dtype))
        step_dims.append(0 if per_sample else None)
    dims = [None if axis is None else axis + several for axis in axes]
    return ProductVectors(tuple(steps), nest, several, (*step_dims, *dims), axes)


def cotangents(shapes: CallShapes, vectors: Any, whole: bool) -> ProductVectors:
    """Check the vectors that multiply a Jacobian from the left."""
    wanted = [(*shapes.lead, *shape) for shape in shapes.outputs]
    several, given = checked_vectors(vectors, shapes.outputs_nest, wanted, "u")
    dims = (None if whole else int(several),) * len(given)
    return ProductVectors((), shapes.outputs_nest, several, dims)


def checked_vectors(
    vectors: Any, nest: VectorNest, wanted: Sequence[tuple[int, ...]], name: str, several: bool = True
) -> tuple[bool, list[Tensor]]:
    """Return whether several vectors were passed, and their tensors."""
    what = "what is differentiated" if name == "v" else "func's outputs"
    try:
        flat = nest.flat(vectors)
    except ValueError as error:
        raise InputError(
            f"{name} was expected in the nest of {what}, {plural(len(wanted), 'tensor')}, got {kind_of(vectors)} that "
            f"differs: {str(error).rstrip('.')}. Pass one tensor for each of them, nested alike"
        ) from error
    for tensor in flat:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = str(tensor.dtype) if isinstance(tensor, Tensor) else kind_of(tensor)
            raise InputError(f"{name} was expected to hold floating-point tensors, got {got}. Convert it")
    more = ", or (k, ...) with several vectors along a first axis" if several else ""
    several = several and len(flat) > 0 and flat[0].dim() == len(wanted[0]) + 1
    count = flat[0].shape[:several]
    for tensor, shape in zip(flat, wanted, strict=True):
        if tuple(tensor.shape) != (*count, *shape):
            raise InputError(
                f"{name} was expected in the shape {shape} of {what}{more}, got {tuple(tensor.shape)}. Pass one vector "
                "per sample, or expand it"
            )
    return several, flat


def nested_axes(args: Sequence[Any], axes: Sequence[int | None]) -> tuple[Any, ...]:
    """Return the axes of tensor arguments in the nests of the arguments, as `in_dims` has them."""
    rest = iter(axes)
    return tuple(pytree.tree_map(lambda value: next(rest) if isinstance(value, Tensor) else None, arg) for arg in args)


def of_samples(coupling: Any) -> Any:
    """Return what was declared of samples, without the patterns inside them, which a product does not share."""
    if not isinstance(coupling, Structure) or coupling.sparsity is None:
        return coupling
    samples = coupling.samples
    return dataclasses.replace(coupling, sparsity=None if samples is None else Sparsity(samples=samples))
