"""Find out what couples with what across the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autojac.outline import Outline
from autojac.probe.features import check_declared, feature_pattern
from autojac.probe.manners import Manners, first_call, observe
from autojac.probe.modes import compare_modes
from autojac.probe.pairs import Subject, gradient_layer, masks_within, nan_layer, price, value_layer
from autojac.probe.proof import meeting, prove
from autojac.probe.roles import guess_batched, resolve_batched
from autojac.probe.samples import sample_graph
from autojac.quiet import Quiet
from autojac.sparsity import Sparsity
from autojac.structure import Assurance, Coupling, Structure

__all__ = ["Examined", "Manners", "check_declared", "examine", "first_call", "guess_batched", "observe"]

SEED = 0x0A070
HANG_S = 2.0
HANG_RATIO = 50.0
"""An evaluation at other values is given up after this many times the usual, and after `HANG_S` at the earliest."""


@dataclass(frozen=True)
class Examined:
    """What a probe found.

    Attributes:
        structure: what couples with what.
        batched: which leaves carry the batch.
        notice: what the user must be told besides.
        outline: what the graph of the call shows.
    """

    structure: Structure
    batched: tuple[bool, ...]
    notice: str | None = None
    outline: Outline | None = None


def examine(
    fn: Any,
    leaves: Sequence[Tensor],
    kwargs: Mapping[str, Any],
    manners: Manners,
    guess: tuple[bool, ...],
    differentiated: Sequence[int],
    quiet: Quiet,
    *,
    fixed: Sequence[bool],
    declared: Structure | None = None,
    budget_s: float = 1.0,
    outlined: Callable[[Sequence[bool]], Outline] | None = None,
) -> Examined:
    """Probe a flat function at one point.

    Args:
        fn: maps (leaves, kwargs) to a tuple of tensors.
        leaves, kwargs: the point.
        manners: what `observe` saw.
        guess: which leaves carry the batch.
        differentiated: indices of the leaves to differentiate.
        quiet: how to evaluate without a trace.
        fixed: for each leaf, whether the user declared if it carries the batch.
        declared: coupling declared by the user; then nothing is probed for it.
        outlined: makes the outline of the call, once it is known which leaves carry the batch.
        budget_s: seconds that each of the three pair layers may cost; beyond it, masks become fewer.
    """
    values = manners.values
    outline: Outline | None = None
    with torch.no_grad():
        held = tuple(leaf.detach() for leaf in leaves)
    settled = [True] * len(held) if declared is not None else fixed
    batched, refusal = resolve_batched(fn, held, kwargs, values, guess, settled, differentiated, quiet)
    compared, notice = compare_modes(fn, leaves, kwargs, differentiated, quiet, SEED)
    evidence = [manners.evidence, compared]
    if outlined is not None:
        outline = outlined(batched)
    inputs = tuple(position for position in differentiated if batched[position])
    sides = tuple(position for position, has in enumerate(batched) if has and position not in differentiated)
    if declared is not None:
        line = f"coupling: declared {declared.coupling} by the user"
        structure = Structure(
            declared.coupling,
            "declared",
            declared.sliceable and refusal is None,
            False,
            manners.effects,
            manners.kernels,
            (*declared.evidence, *evidence, line),
            declared.sparsity,
            declared.watched,
        )
        return Examined(structure, batched, notice, outline)
    batch = len(values[0])
    subject = Subject(fn, held, kwargs, inputs, sides, batch, quiet)
    generator = torch.Generator().manual_seed(SEED)
    cost = price(subject)
    subject = dataclasses.replace(subject, limit_s=max(HANG_RATIO * cost, HANG_S))
    if batch < 2:
        evidence.append("pairs: one sample has nothing to couple with")
        structure = Structure("independent", effects=manners.effects, kernels=manners.kernels, evidence=tuple(evidence))
        return Examined(_featured(structure, subject, differentiated, generator, budget_s), batched, notice, outline)

    masks, called = masks_within(subject, generator, budget_s / 3, cost)
    verdicts = []
    if inputs:
        verdicts = [
            gradient_layer(subject, masks, called, generator),
            value_layer(subject, masks, called, generator, inputs),
            nan_layer(subject, masks, called),
        ]
        evidence += [verdict.evidence for verdict in verdicts]
    else:
        evidence.append("pairs: no input carries the batch")
    coupled = any(verdict.coupled for verdict in verdicts)
    if sides and not coupled and refusal is None:
        side = value_layer(subject, masks, called, generator, sides)
        evidence.append(side.evidence)
        if side.coupled:
            refusal = "an output depends on side inputs of other samples"
    evidence.append(f"slices: {refusal}" if refusal else "slices: func of some samples is those samples of func")
    coupling: Coupling = "dense" if coupled else "independent"
    assurance: Assurance = "observed"
    sparsity: Sparsity | None = None
    watched = False
    split = len({verdict.coupled for verdict in verdicts}) > 1
    if outline is not None and coupled:
        alone, line = meeting(outline, subject, masks, called, generator)
        coupling = "statistics" if alone else "dense"
        evidence.append(line)
        classes = _fewer_than(outline, subject, values) if alone else None
        if not alone or classes is not None:
            graph = sample_graph(outline, subject, generator, budget_s, classes)
            if graph.pattern is not None and graph.kind is not None:
                coupling, sparsity = graph.kind, Sparsity(samples=graph.pattern)
                watched = graph.follows_arguments
                refusal = refusal or "samples are coupled"
                # what each operator does holds whatever the layers did not see
                split = graph.suspect or (split and not graph.followed)
            if sparsity is not None or not alone:
                evidence.append(graph.evidence)
    elif outline is not None and inputs:
        proved, line = prove(outline, subject)
        assurance = "proved" if proved else "observed"
        evidence.append(line)
    elif outline is not None:
        outline.close()
    said = {verdict.coupled for verdict in verdicts}
    structure = Structure(
        coupling,
        assurance,
        refusal is None,
        # values alone tell what is dead here: without them, or with layers at odds, trust nothing for long
        suspect=split if coupled else None in said and verdicts[1].coupled is None,
        effects=manners.effects,
        kernels=manners.kernels,
        evidence=tuple(evidence),
        sparsity=sparsity,
        watched=watched,
    )
    return Examined(_featured(structure, subject, differentiated, generator, budget_s), batched, notice, outline)


def _featured(
    structure: Structure,
    subject: Subject,
    differentiated: Sequence[int],
    generator: torch.Generator,
    budget_s: float,
) -> Structure:
    """The structure with the pattern inside a sample, where it saves something."""
    found = feature_pattern(
        subject,
        differentiated,
        generator,
        sliceable=structure.sliceable and structure.independent and subject.batch > 1,
        draws=structure.draws,
        budget_s=budget_s,
    )
    # what is known of pairs stays last
    *first, last = structure.evidence
    evidence = (*first, found.evidence, last) if found.evidence else structure.evidence
    if found.pattern is None:
        return dataclasses.replace(structure, evidence=evidence)
    return dataclasses.replace(
        structure,
        evidence=evidence,
        sparsity=Sparsity(structure.samples, found.pattern),
        suspect=structure.suspect or not found.agreed,
    )


def _fewer_than(outline: Outline, subject: Subject, values: Sequence[Tensor]) -> float | None:
    """The classes below which coloring samples takes fewer passes than shared statistics; None if it hardly can."""
    pools = [pool.size for pool in (outline.read_pool, outline.least_pool) if pool is not None]
    shared = min(pools, default=0)
    rows = sum(value[0].numel() for value in values)
    columns = sum(subject.leaves[position][0].numel() for position in subject.inputs)
    classes = (rows + shared) / max(min(rows, columns), 1)
    # what all samples share does not grow with their number; what neighbours or groups share does
    return classes if shared > subject.batch // 8 and classes > 2 else None
