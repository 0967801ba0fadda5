"""Checks on their own: the structure of a function, and whether a Jacobian is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from autojac.api.flat_calls import CallsOverBatchAxes, FlattenedCall, has_several_axes
from autojac.core.autocast import outside_autocast
from autojac.core.nests import tensor_leaves
from autojac.core.options import Options
from autojac.core.pattern import Pattern
from autojac.core.ranks import silent
from autojac.core.structure import Structure
from autojac.errors import VerificationError
from autojac.guards.captures import captures
from autojac.guards.compiled_functions import opaque
from autojac.planning.call import Call
from autojac.planning.problem_builder import ProblemBuilder
from autojac.problem.compared_parts import Extent
from autojac.problem.problem import Problem, Result
from autojac.problem.reference import Reference
from autojac.sparse.csr import Entries


@opaque
def probe(func: Callable[..., Any], *args: Any, argnums: int | tuple[int, ...] = 0, in_dims: Any = "auto",
          batch_dims: int = 1, **kwargs: Any) -> Structure:  # fmt: skip
    """Return what couples with what across the batch of a function, probed without side effects.

    Args:
        func: a function or module of tensors with the batch on axis 0.
        args, kwargs: one call; its values are one of the points at which func is probed.
        argnums, in_dims, batch_dims: as in `AutoJacobian`; the structure is of the flattened batch.

    Returns:
        The structure, with a line of evidence for each layer of the probe.
    """
    options = Options.from_keywords({"argnums": argnums, "in_dims": in_dims, "randomness": "different"})
    builder, call, _ = _describe(func, args, kwargs, options, batch_dims)
    with outside_autocast(), silent(call.captured.modules):
        return builder.probe(call, builder.inspect(call)).structure


@opaque
def verify(jacobian: Any, func: Callable[..., Any], *args: Any, probes: int = 4, layout: str = "blocks",
           argnums: int | tuple[int, ...] = 0, in_dims: Any = "auto", batch_dims: int = 1,
           **kwargs: Any) -> None:  # fmt: skip
    """Check a Jacobian, whoever computed it, against plain VJPs of the function.

    Random projections of the whole batch are tried first: they see every block of independent samples, at the price of
    one VJP, or of one for each coordinate of a diagonal. Where they differ the samples may be coupled, whose blocks are
    not the whole Jacobian: then every sample is compared on its own, by one VJP for each block, or for each entry of a
    diagonal.

    Args:
        jacobian: what `AutoJacobian(func, ...)` returns for these arguments.
        func, args, kwargs: the call.
        probes: how many single rows of each output's Jacobian to compare besides, drawn at random.
        layout, argnums, in_dims, batch_dims: as in `AutoJacobian`.

    Raises:
        VerificationError: if the Jacobian is wrong, with what differs.
    """
    options = {"argnums": argnums, "in_dims": in_dims, "layout": layout, "randomness": "different"}
    builder, call, flattened = _describe(func, args, kwargs, Options.from_keywords(options), batch_dims)
    if flattened is not None:
        jacobian = flattened.flat_jacobian(jacobian, layout)
    call = call.without_grad()
    with silent(call.captured.modules):
        wrong = _wrong(jacobian, builder, call, probes)
    if wrong is not None:
        raise VerificationError(
            f"the Jacobian is wrong: {wrong}. If it is meant to be right, pass the function, arguments, layout, "
            "argnums, in_dims and batch_dims that it was computed with"
        )


def _describe(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Options, batch_dims: int
) -> tuple[ProblemBuilder, Call, FlattenedCall | None]:
    """Return a call with one batch axis, and how several axes were flattened to it."""
    flattened = None
    if has_several_axes(batch_dims):
        flattened = CallsOverBatchAxes(lambda *made: made, func, batch_dims, options).flat(args)
        (func, in_dims), args = flattened.wrapper, flattened.args
        options = options.replace(in_dims=in_dims)
    builder = ProblemBuilder(func, options)
    return builder, builder.describe(captures(func), args, kwargs), flattened


def _wrong(jacobian: Any, builder: ProblemBuilder, call: Call, probes: int) -> str | None:
    """Return why a Jacobian is wrong, as a sentence; None if it agrees."""
    layout, keywords = builder.options.layout, call.keywords
    report = builder.inspect(call)
    structure = Structure("independent", "declared", effects=report.first.effects)
    independent = builder.problem(call, report, structure, report.guess)
    flat = tensor_leaves(jacobian)
    wanted = len(independent.inputs) * len(independent.outputs)
    if len(flat) != wanted:
        raise VerificationError(
            f"one Jacobian per output and input was expected, {wanted} in all, got {len(flat)}. Pass them in the nest "
            "that AutoJacobian returns, with the argnums that they were computed with"
        )
    result = Result(report.first.values, call.layout.unnest(jacobian))
    if layout == "sparse":
        independent = dataclasses.replace(independent, known_entries=_entries_of(independent, result))
        values = tuple(tuple(matrix.values() for matrix in row) for row in result.jacobians)
        result = result._replace(jacobians=values)
    extent = Extent(rows=probes + 2, every=True)
    reference = Reference(independent, call.leaves, keywords, report.sandbox, extent=extent)
    with report.sandbox():
        wrong = reference.check(result)
        coupled = wrong is not None and layout in ("blocks", "diagonal") and reference.check_shapes(result) is None
    if coupled:
        dense = dataclasses.replace(independent, structure=dataclasses.replace(structure, coupling="dense"))
        reference = Reference(dense, call.leaves, keywords, report.sandbox, extent=extent)
        with report.sandbox():
            wrong = reference.check(result)
    return wrong


def _entries_of(problem: Problem, result: Result) -> dict[tuple[int, int], Entries]:
    """Return the entries that sparse Jacobians hold, whatever is known about the function."""
    entries = {}
    for output, row in enumerate(result.jacobians):
        for position, matrix in zip(problem.inputs, row, strict=True):
            samples, features = (pattern.shape for pattern in problem.patterns(output, position))
            wanted = (samples[0] * features[0], samples[1] * features[1])
            if matrix.layout != torch.sparse_csr or tuple(matrix.shape) != wanted:
                got = f"one stored as {matrix.layout} of shape {tuple(matrix.shape)}"
                raise VerificationError(
                    f"a sparse CSR Jacobian of shape {wanted} was expected, got {got}. Pass the layout that it has"
                )
            starts, columns = (part.cpu().numpy() for part in (matrix.crow_indices(), matrix.col_indices()))
            entries[output, position] = Entries(Pattern(wanted, starts, columns))
    return entries
