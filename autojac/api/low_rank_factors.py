"""A Jacobian under batch statistics as factors: block diagonal plus low rank, never formed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autojac.autodiff.pullback import Pullback
from autojac.autodiff.tolerance import balanced_noise, disagreement
from autojac.core.autocast import outside_autocast
from autojac.errors import InputError, UnsupportedError, VerificationError
from autojac.graph.analysis import RecordAndCut
from autojac.graph.batch_axis.propagation import BatchFlow
from autojac.graph.cuts.shared_tensors import SharedTensors
from autojac.graph.ir import Graph
from autojac.methods.statistics import Statistics
from autojac.problem.problem import Problem


class LowRankJacobian(NamedTuple):
    """The whole batch's Jacobian: J[b, :, c, :] = D[b] if b = c else 0, plus the sum over k of U[b, ..., k] V[k, c].

    Attributes:
        D: (B, *out, *in), each sample's own part.
        U: (B, *out, k), the derivative of each sample in the k shared numbers.
        V: (k, B, *in), the derivative of these in each sample.
    """

    D: Tensor
    U: Tensor
    V: Tensor

    def __matmul__(self, tangent: Tensor) -> Tensor:
        """Return J times a tangent (B, *in), (B, *out), in as many steps as the factors have entries.

        Raises:
            InputError: for a tangent of another size.
        """
        with outside_autocast():
            return self._times(tangent)

    def _times(self, tangent: Tensor) -> Tensor:
        out, k = self.U.shape[:-1], len(self.V)
        batch, m, n = out[0], prod(out[1:]), prod(self.V.shape[2:])
        if tangent.numel() != batch * n:
            raise InputError(
                f"a tangent of shape {(batch, *self.V.shape[2:])} was expected, got {tuple(tangent.shape)}. Pass one "
                "vector per sample, shaped as the input is"
            )
        flat = tangent.reshape(batch, n)
        local = (self.D.reshape(batch, m, n) @ flat[..., None]).reshape(out)
        shared = self.V.reshape(k, batch * n) @ flat.reshape(-1)
        return local + self.U @ shared


def prepare_factors(problem: Problem) -> Callable[[Sequence[Tensor], Mapping[str, Any]], LowRankJacobian]:
    """Return a function that computes the factors for one kind of call, whose samples meet in shared statistics.

    Raises:
        InputError: if there are several outputs or inputs, or an input without a batch.
    """
    require_one(problem)

    def find(flow: BatchFlow, inputs: Sequence[int]) -> tuple[Statistics, SharedTensors] | None:
        for method in (Statistics("copies", "batched"), Statistics("mixed", "batched")):
            shared = method.find_shared(flow, inputs, problem.differentiable)
            if shared is not None:
                return method, shared
        return None

    batched = [leaf.batched for leaf in problem.leaves]
    cutter = RecordAndCut(problem.fn, problem.inputs, batched, problem.batch, find, problem.differentiable)

    def compute(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> LowRankJacobian:
        recording, cut = cutter(leaves, kwargs)
        if cut is None or recording.graph is None:
            why = recording.reason or "samples meet elsewhere than in tensors that all of them share"
            raise UnsupportedError(f"this Jacobian has no factors: {why}. Ask for the blocks or for layout='full'")
        method, shared = cut
        try:
            factors = _multiply_out(method, problem, recording.graph, shared, leaves)
        except RuntimeError:  # an operator without a vmap rule
            slow = dataclasses.replace(method, engine="loop")
            factors = _multiply_out(slow, problem, recording.graph, shared, leaves)
        _check(factors, Pullback.of_graph(recording.values, recording.inputs, problem.differentiable))
        return factors if problem.differentiable else LowRankJacobian(*(part.detach() for part in factors))

    return compute


def require_one(problem: Problem) -> None:
    """Raise `InputError` unless there is one output and one input, with a batch."""
    if len(problem.outputs) != 1 or len(problem.inputs) != 1 or problem.shared_input:
        raise InputError(
            f"factors need one output and one input, both with the batch, but func has {len(problem.outputs)} and "
            f"{len(problem.inputs)}{', shared by the samples' * problem.shared_input}. Wrap a function "
            "that has one of each"
        )


def without_sharing(problem: Problem, blocks: Tensor) -> LowRankJacobian:
    """Return the factors of independent samples: nothing is shared."""
    require_one(problem)
    leaf = problem.leaves[problem.inputs[0]]
    return LowRankJacobian(
        blocks, blocks.new_zeros(problem.batch, *problem.outputs[0], 0), blocks.new_zeros(0, *leaf.shape)
    )


def _multiply_out(
    way: Statistics, problem: Problem, graph: Graph, shared: SharedTensors, leaves: Sequence[Tensor]
) -> LowRankJacobian:
    blocks, through = way.sharing(problem, graph, shared, leaves).pieces()
    pieces = list(through)
    diagonal = blocks[0][0]
    if not pieces:
        return without_sharing(problem, diagonal)
    left_factors = torch.cat([left[0] for left, _ in pieces]).permute(1, 2, 0)
    right_factors = torch.cat([right[0] for _, right in pieces])
    left_factors = left_factors.reshape(problem.batch, *problem.outputs[0], left_factors.shape[-1])
    return LowRankJacobian(diagonal, left_factors.to(diagonal.dtype), right_factors)


def _check(factors: LowRankJacobian, pullback: Pullback) -> None:
    """Check uᵀJ against a VJP, as no plan is checked for factors."""
    value = pullback.recorded[0]
    (u,) = balanced_noise([value], torch.Generator().manual_seed(0))
    expected = pullback(0, u)[0].detach()
    rows = u.reshape(len(u), -1)
    D, U, V = (part.detach() for part in factors)
    local = torch.einsum("bm,bmn->bn", rows, D.reshape(*rows.shape, -1))
    through = torch.einsum("bm,bmk->k", rows, U.reshape(*rows.shape, -1)) @ V.reshape(len(V), local.numel())
    actual = local + through.view_as(local)
    scale = expected.detach().abs().amax().expand(len(actual), 1) + local.abs()
    error = disagreement(actual.to(expected.dtype), expected.reshape(actual.shape), scale)
    if error is not None:
        raise VerificationError(
            f"the factors are off by {error:.1g} relative to a plain VJP, which is a fault of autojac's: please report "
            "it. Ask for the blocks or for layout='full'"
        )
