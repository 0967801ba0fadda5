"""What couples with what: across the batch, between samples, and between coordinates inside a sample."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from autojac.core.pattern import Sparsity
from autojac.core.structure import Branches, Structure
from autojac.graph.analysis import GraphAnalysis
from autojac.probe.batch_axis_proof import Proof, prove
from autojac.probe.batched_arguments import SomeSamples, guess_batched, resolve_batched, some_samples
from autojac.probe.coupling import PairProbe
from autojac.probe.feature_pattern import check_declared, find_feature_pattern
from autojac.probe.flat_call import FlatCall, Roles
from autojac.probe.forward_vs_reverse import compare_modes, flat_elsewhere
from autojac.probe.sample_pairs import ProbePoint, time_one_call
from autojac.probe.side_effects import SideEffects, first_call, moving_with, observe

__all__ = [
    "FlatCall",
    "ProbeResult",
    "Roles",
    "SideEffects",
    "check_declared",
    "examine",
    "first_call",
    "guess_batched",
    "observe",
]

SEED = 0x0A070
HANG_S = 2.0
HANG_RATIO = 50.0
"""An evaluation at other values is given up after this many times the usual, and after `HANG_S` at the earliest."""


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        structure: what couples with what.
        batched: which leaves carry the batch.
        notice: a warning for the user, if any.
        analysis: what the graph of the call shows.
        cut: the outputs that move with the inputs and have no derivative: True where no entry has one, else False.
    """

    structure: Structure
    batched: tuple[bool, ...]
    notice: str | None = None
    analysis: GraphAnalysis | None = None
    cut: Mapping[int, bool] = field(default_factory=dict)


def examine(
    call: FlatCall,
    effects: SideEffects,
    roles: Roles,
    *,
    declared: Structure | None = None,
    budget_s: float = 1.0,
    analysis: GraphAnalysis | None = None,
) -> ProbeResult:
    """Probe a flat function at one point.

    Args:
        call: the function and the point.
        effects: what `observe` returned.
        roles: what is known of which leaves carry the batch.
        declared: coupling declared by the user; then nothing is probed for it.
        budget_s: seconds that each of the three pair layers may cost; beyond it, masks become fewer.
        analysis: what the graph of the call shows, with the leaves that are guessed to carry the batch.
    """
    with torch.no_grad():
        leaves = tuple(leaf.detach() for leaf in call.leaves)
    call = call._replace(leaves=leaves)
    where = _where(call, effects.values, roles, analysis)
    evidence_of_modes, notice, flat_outputs = compare_modes(where.compared, SEED)
    cut = _without_derivative(where.compared, effects.cut, flat_outputs)
    evidence = [effects.evidence, evidence_of_modes]
    result = partial(ProbeResult, batched=where.batched, notice=notice, analysis=analysis, cut=cut)
    values, differentiated = effects.values, call.differentiated
    branches: Branches = "perhaps" if analysis is None else analysis.branches
    if declared is not None:
        if declared.sparsity is not None:
            sizes = [value[0].numel() for value in values if len(value)]
            events = [
                leaves[p].numel() // (len(leaves[p]) if where.batched[p] else 1)
                for p in differentiated
                if leaves[p].numel()
            ]
            check_declared(declared.sparsity, len(values[0]), sum(sizes), sum(events))
        return result(_from_declaration(declared, effects, evidence, where.refusal is None, branches))
    generator = torch.Generator().manual_seed(SEED)
    point, structure = _coupling(call, values, where, analysis, generator, budget_s)
    structure = dataclasses.replace(
        structure,
        effects=effects.effects,
        kernels=effects.kernels,
        evidence=(*evidence, *structure.evidence),
        branches=branches,
    )
    return result(_add_features(structure, point, differentiated, generator, budget_s))


class _Where(NamedTuple):
    """Where a call is probed.

    Attributes:
        batched: which leaves carry the batch.
        refusal: why func can't be called on some of the samples; None if it can.
        proof: what the graph of the call proves.
        few: some of the samples, where nothing more is needed.
        compared: the call at which the modes are compared.
    """

    batched: tuple[bool, ...]
    refusal: str | None
    proof: Proof
    few: SomeSamples | None
    compared: FlatCall


def _where(call: FlatCall, values: Sequence[Tensor], roles: Roles, analysis: GraphAnalysis | None) -> _Where:
    """Determine which leaves carry the batch, and whether some of the samples are enough."""
    batched, refusal, few = roles.guess, None, None
    proof = Proof(False, "") if analysis is None else prove(analysis)
    if proof.any_values and len(values[0]) > 1:
        few = some_samples(call, values, batched)
    if few is None:
        batched, refusal = resolve_batched(call, values, roles)
        if analysis is not None:
            analysis.assign(batched)
            proof = prove(analysis)
        if proof.any_values and len(values[0]) > 1:
            few = some_samples(call, values, batched, keywords=refusal is not None)
            if few is None and refusal is None:
                refusal = "func of a few of its samples differs from those samples of func"
    # a backward that the user wrote may do anything to any sample
    custom = analysis is not None and analysis.has_custom_backward
    return _Where(batched, refusal, proof, few, call if few is None or custom else few.call)


def _coupling(
    call: FlatCall,
    values: Sequence[Tensor],
    where: _Where,
    analysis: GraphAnalysis | None,
    generator: torch.Generator,
    budget_s: float,
) -> tuple[ProbePoint, Structure]:
    """Return the point at which features are probed, and what couples with what across the batch."""
    batched, refusal, proof, few, _ = where
    inputs = tuple(position for position in call.differentiated if batched[position])
    sides = tuple(position for position, has in enumerate(batched) if has and position not in call.differentiated)
    whole = ProbePoint(call.fn, tuple(call.leaves), call.kwargs, inputs, sides, len(values[0]), call.sandbox)
    weights = len(inputs) < len(call.differentiated)
    point, values_there = whole, values
    if few is not None and len(few.values[0]) > 1:
        limit = max(HANG_RATIO * few.seconds, HANG_S)
        point = dataclasses.replace(
            whole, leaves=tuple(few.call.leaves), kwargs=few.call.kwargs, batch=len(few.values[0]), limit_s=limit
        )
        values_there = few.values
    if proof.any_values and whole.batch > 1:
        pairs = PairProbe(point, analysis, values_there, weights, 0.0, budget_s, generator, proof)
        structure = pairs.by_proof(refusal, whole)
        if structure is not None:
            return point, structure
        proof = Proof(False, "proof: none, numbers contradict it", meets=proof.meets)
    cost = time_one_call(whole)
    whole = dataclasses.replace(whole, limit_s=max(HANG_RATIO * cost, HANG_S))
    pairs = PairProbe(whole, analysis, values, weights, cost, budget_s, generator, proof)
    return whole, pairs.structure(refusal)


def _without_derivative(call: FlatCall, outputs: Sequence[int], flat: Mapping[int, Tensor]) -> dict[int, bool]:
    """Return the outputs that move with the inputs and have no derivative: True where no entry has one, else False.

    Args:
        call: the function and the point.
        outputs: those without a graph, which move.
        flat: for other outputs a mask of the elements whose derivatives are zero in both modes.
    """
    flat = {output: mask for output, mask in flat.items() if output not in outputs}
    moving = moving_with(*call, flat) if flat else ()
    if moving:
        flat = flat_elsewhere(call, {output: flat[output] for output in moving}, SEED)
        moving = moving_with(*call, flat) if flat else ()
    return dict.fromkeys(outputs, True) | {output: bool(flat[output].all()) for output in moving}


def _from_declaration(
    declared: Structure, effects: SideEffects, evidence: Sequence[str], sliceable: bool, branches: Branches
) -> Structure:
    """Return the structure that the user declares, with what was seen of the function."""
    return Structure(
        declared.coupling,
        "declared",
        declared.sliceable and sliceable,
        False,
        effects.effects,
        effects.kernels,
        (*declared.evidence, *evidence, f"coupling: declared {declared.coupling} by the user"),
        declared.sparsity,
        # nothing is proved of what the user promises
        declared.depends_on_arguments or declared.assumes,
        branches,
    )


def _add_features(
    structure: Structure,
    point: ProbePoint,
    differentiated: Sequence[int],
    generator: torch.Generator,
    budget_s: float,
) -> Structure:
    """Return the structure with the pattern inside a sample, where it saves something."""
    start = time.perf_counter()
    features = find_feature_pattern(
        point,
        differentiated,
        generator,
        sliceable=structure.sliceable and structure.independent and point.batch > 1,
        draws=structure.draws,
        budget_s=budget_s,
    )
    # the line on pairs stays last
    *first, last = structure.evidence
    line = f"{features.evidence} ({1e3 * (time.perf_counter() - start):.3g} ms)"
    evidence = (*first, line, last) if features.evidence else structure.evidence
    if features.pattern is None:
        return dataclasses.replace(structure, evidence=evidence)
    return dataclasses.replace(
        structure,
        evidence=evidence,
        sparsity=Sparsity(structure.samples, features.pattern),
        suspect=structure.suspect or not features.agreed,
        depends_on_arguments=structure.depends_on_arguments or features.depends_on_arguments,
    )
