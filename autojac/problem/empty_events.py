"""Outputs and inputs without elements: no method sees them, and every Jacobian has its part for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.problem.problem import Compute, Flat, Problem, Result, empty_rows


class NonEmptyOutputs:
    """A flat function of which only some outputs are seen, and of the others the dtype."""

    def __init__(self, fn: Flat, outputs: Sequence[int]) -> None:
        self.fn = fn
        self.outputs = outputs
        self.dtypes: tuple[torch.dtype, ...] = ()

    def __call__(self, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        values = self.fn(leaves, kwargs)
        self.dtypes = tuple(value.dtype for value in values)
        return tuple(values[index] for index in self.outputs)


def without_empty_parts(problem: Problem) -> Problem:
    """Return the problem without its empty outputs and inputs: what methods and the search solve."""
    outputs = _with_elements(problem)
    leaves = tuple(
        dataclasses.replace(leaf, differentiated=leaf.differentiated and seeds.size(leaf.event_shape) > 0)
        for leaf in problem.leaves
    )
    if len(outputs) == len(problem.outputs) and leaves == problem.leaves:
        return problem
    events = tuple(problem.outputs[index] for index in outputs)
    return dataclasses.replace(
        problem, fn=NonEmptyOutputs(problem.fn, outputs), leaves=leaves, outputs=events, analysis=None
    )


def with_empty_parts(problem: Problem, prepare: Callable[[Problem], Compute]) -> Compute:
    """Return a computation of the whole problem, by a method that sees what has elements."""
    inner = without_empty_parts(problem)
    if not (problem.batch and inner.out_size and inner.in_size):
        return _zeros_alone(problem)
    if inner is problem:
        return prepare(problem)
    compute, fn = prepare(inner), inner.fn
    assert isinstance(fn, NonEmptyOutputs)
    outputs = _with_elements(problem)

    def compute_all(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        result = compute(leaves, kwargs)
        values = dict(zip(outputs, result.values, strict=True))
        jacobians = {
            (index, position): jacobian
            for index, row in zip(outputs, result.jacobians, strict=True)
            for position, jacobian in zip(inner.inputs, row, strict=True)
        }
        for index, event in enumerate(problem.outputs):
            if index not in values:
                like, dtype = result.values[0], fn.dtypes[index]
                values[index] = like.new_empty((problem.batch, *event), dtype=dtype)
            for position in problem.inputs:
                if (index, position) not in jacobians:
                    jacobians[index, position] = leaves[position].new_zeros(problem.jacobian_shape(index, position))
        order = range(len(problem.outputs))
        return result._replace(
            values=tuple(values[index] for index in order),
            jacobians=tuple(tuple(jacobians[index, position] for position in problem.inputs) for index in order),
        )

    return compute_all


def _with_elements(problem: Problem) -> list[int]:
    return [index for index, event in enumerate(problem.outputs) if seeds.size(event)]


def _zeros_alone(problem: Problem) -> Compute:
    """Return the Jacobian of a problem without elements."""

    def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        values = problem.fn(leaves, kwargs)
        return Result(
            values if problem.differentiable else tuple(value.detach() for value in values), empty_rows(problem, leaves)
        )

    return compute
