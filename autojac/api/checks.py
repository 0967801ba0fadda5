"""Checks on their own: the structure of a function, and whether a Jacobian is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from autojac.core.autocast import outside_autocast
from autojac.core.options import Options
from autojac.core.pattern import Pattern
from autojac.core.ranks import silent
from autojac.core.structure import Structure
from autojac.errors import VerificationError
from autojac.guards.captures import Captures, captures
from autojac.guards.compiled_functions import opaque
from autojac.planning.first_call import look
from autojac.planning.planner import Planner
from autojac.planning.prepared_plan import Request
from autojac.problem.problem import Problem, Result
from autojac.problem.reference import Reference
from autojac.sparse.csr import Entries
from autojac.torch_internals import pytree


@opaque
def probe(func: Callable[..., Any], *args: Any, argnums: int | tuple[int, ...] = 0, in_dims: Any = "auto",
          **kwargs: Any) -> Structure:  # fmt: skip
    """What couples with what across the batch of a function, found without leaving a trace.

    Args:
        func: a function or module of tensors with the batch on axis 0.
        args, kwargs: one call; its values are one of the points at which func is probed.
        argnums, in_dims: as in `AutoJacobian`.

    Returns:
        The structure, with a line of evidence for each layer of the probe.
    """
    planner = Planner(func, Options.checked({"argnums": argnums, "in_dims": in_dims, "randomness": "different"}))
    captured = captures(func)
    request = planner.request(captured, args, kwargs)
    with outside_autocast(), silent(captured.modules):
        seen = look(request, captured, planner.options, planner.stored.keys)
        return planner.examine(request, seen).structure


@opaque
def verify(jacobian: Any, func: Callable[..., Any], *args: Any, probes: int = 4, layout: str = "blocks",
           argnums: int | tuple[int, ...] = 0, in_dims: Any = "auto", **kwargs: Any) -> None:  # fmt: skip
    """Check a Jacobian, whoever computed it, against plain VJPs of the function.

    Random projections of the whole batch are tried first: they see every block of independent samples, at the price of
    one VJP, or of one for each coordinate of a diagonal. Where they differ the samples may be coupled, whose blocks are
    not the whole Jacobian: then every sample is compared on its own, by one VJP for each block, or for each entry of a
    diagonal.

    Args:
        jacobian: what `AutoJacobian(func, ...)` returns for these arguments.
        func, args, kwargs: the call.
        probes: how many single rows of each output's Jacobian to compare besides, drawn at random.
        layout, argnums, in_dims: as in `AutoJacobian`.

    Raises:
        VerificationError: if the Jacobian is wrong, with what differs.
    """
    given = {"argnums": argnums, "in_dims": in_dims, "layout": layout, "randomness": "different"}
    planner = Planner(func, Options.checked(given))
    captured = captures(func)
    request = dataclasses.replace(planner.request(captured, args, kwargs), differentiable=False)
    with silent(captured.modules):
        wrong = _wrong(jacobian, planner, captured, request, probes)
    if wrong is not None:
        raise VerificationError(f"the Jacobian is wrong: {wrong}")


def _wrong(jacobian: Any, planner: Planner, captured: Captures, request: Request, probes: int) -> str | None:
    """Return why a Jacobian is wrong, as a sentence; None if it agrees."""
    layout, kwargs = planner.options.layout, request.kwargs
    seen = look(request, captured, planner.options, planner.stored.keys)
    structure = Structure("independent", "declared", effects=seen.first.effects)
    independent = planner.problem(request, seen, structure, seen.guess)
    flat = pytree.tree_leaves(jacobian)
    wanted = len(independent.inputs) * len(independent.outputs)
    if len(flat) != wanted:
        raise VerificationError(f"{wanted} Jacobians were expected, one an output and input; {len(flat)} came")
    result = Result(seen.first.values, request.frame.unnested(jacobian))
    if layout == "sparse":
        held = _held(independent, result)
        independent = dataclasses.replace(independent, held=held)
        values = tuple(tuple(matrix.values() for matrix in row) for row in result.jacobians)
        result = result._replace(jacobians=values)
    reference = Reference(independent, request.leaves, kwargs, seen.quiet, rows=probes + 2, every=True)
    with seen.quiet():
        wrong = reference.check(result)
        coupled = wrong is not None and layout in ("blocks", "diagonal") and reference.check_shapes(result) is None
    if coupled:
        dense = dataclasses.replace(independent, structure=dataclasses.replace(structure, coupling="dense"))
        reference = Reference(dense, request.leaves, kwargs, seen.quiet, rows=probes + 2, every=True)
        with seen.quiet():
            wrong = reference.check(result)
    return wrong


def _held(problem: Problem, result: Result) -> dict[tuple[int, int], Entries]:
    """The entries that sparse Jacobians hold, whatever is known of the function."""
    held = {}
    for output, row in enumerate(result.jacobians):
        for position, matrix in zip(problem.inputs, row, strict=True):
            samples, features = (pattern.shape for pattern in problem.patterns(output, position))
            wanted = (samples[0] * features[0], samples[1] * features[1])
            if matrix.layout != torch.sparse_csr or tuple(matrix.shape) != wanted:
                came = f"one stored as {matrix.layout} of shape {tuple(matrix.shape)}"
                raise VerificationError(f"a sparse CSR Jacobian of shape {wanted} was expected, got {came}")
            starts, columns = (part.cpu().numpy() for part in (matrix.crow_indices(), matrix.col_indices()))
            held[output, position] = Entries(Pattern(wanted, starts, columns))
    return held
