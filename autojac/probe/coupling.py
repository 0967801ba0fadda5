"""Which samples reach each other: by the pair layers first, then by what the graph of the call shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autojac.core.pattern import Sparsity
from autojac.core.ranks import several
from autojac.core.structure import Coupling, Structure
from autojac.graph.analysis import GraphAnalysis
from autojac.probe.batch_axis_proof import Proof, meeting, prove
from autojac.probe.cancelling import SLIGHT
from autojac.probe.rounding import only_rounding
from autojac.probe.sample_graph import sample_graph
from autojac.probe.sample_pairs import ProbePoint, Verdict, gradient_layer, masks_within, nan_layer, value_layer
from autojac.probe.values_only import EVALUATIONS, values_only

PATIENCE = 10.0
"""What clearing a function of false coupling may cost, in budgets of a layer: it saves that in every call."""


def coupled(
    subject: ProbePoint,
    outline: GraphAnalysis | None,
    values: Sequence[Tensor],
    refusal: str | None,
    weights: bool,
    cost: float,
    budget_s: float,
    generator: torch.Generator,
) -> Structure:
    """The coupling of a function's samples, with its evidence.

    Args:
        subject: the function and a point.
        outline: what the graph of the call shows, if there is one.
        values: func's outputs there.
        refusal: why func can't be called on some of the samples, as far as is known.
        weights: whether inputs without a batch are differentiated too.
        cost: seconds of one evaluation.
        budget_s: seconds that each of the three pair layers may cost.
        generator: of masks and other points.
    """
    if subject.batch < 2:
        return Structure("independent", evidence=("pairs: one sample has nothing to couple with",))
    masks, called = masks_within(subject, generator, budget_s / 3, cost)
    evidence = []
    verdicts: list[Verdict] = []
    if subject.inputs:
        layers: list[Callable[[], Verdict]] = [
            lambda: gradient_layer(subject, masks, called, generator),
            lambda: value_layer(subject, masks, called, generator, subject.inputs),
            lambda: nan_layer(subject, masks, called),
        ]
        for layer in layers:
            verdicts.append(layer())
            # what is sure need not be seen again where looking is dear
            if verdicts[-1].coupled and cost * len(masks) > budget_s / 3 and not _only_values(verdicts):
                break
        evidence += [verdict.evidence for verdict in verdicts]
    else:
        evidence.append("pairs: no input carries the batch")
    meet = any(verdict.coupled for verdict in verdicts)
    if subject.sides and not meet and refusal is None:
        side = value_layer(subject, masks, called, generator, subject.sides)
        evidence.append(side.evidence)
        if side.coupled:
            refusal = "an output depends on side inputs of other samples"
    evidence.append(f"slices: {refusal}" if refusal else "slices: func of some samples is those samples of func")
    said = {verdict.coupled for verdict in verdicts}
    if meet:
        moved = any(verdict.coupled for verdict in verdicts[:2])
        patience = PATIENCE * budget_s
        slight = moved and not weights and not several() and _slight(verdicts, subject)
        if slight and only_rounding(subject, masks, cost, generator, patience):
            evidence.append(
                "rounding: what reaches other samples vanishes with the precision, in float64 against float32, and "
                "ends where it cancels, as in inputs that are centred by the batch. Taken for independent, but not "
                "called on a part of the batch"
            )
            return Structure("independent", "observed", False, evidence=tuple(evidence), watched=True)
        shape = _shape(
            subject, outline, values, refusal, (masks, called), budget_s, generator, evidence, len(said) > 1, moved
        )
        # what NaN reaches may sleep for another reason, such as a weight that is zero
        awake = shape.coupling != "dense" or not _only_values(verdicts) or bool(verdicts[-1].coupled) or weights
        if awake or several() or cost * EVALUATIONS > patience or not values_only(subject, masks, generator, patience):
            return shape
        line = (
            "values: coupled, derivatives: not; wherever other samples move an output it jumps or is detached, as by a "
            "solver that stops by the whole batch. Taken for independent, but not called on a part of the batch"
        )
        return Structure("independent", "observed", False, evidence=(*shape.evidence, line), watched=True)
    # what is read of a weight by one sample depends on the others too where side inputs are coupled
    if outline is not None and weights and refusal is not None:
        alone, line = meeting(outline, subject, masks, called, generator)
        evidence.append(line)
        if alone:
            return Structure("statistics", "observed", False, None in said, evidence=tuple(evidence), watched=True)
    proof = Proof(False, "")
    if outline is not None and subject.inputs:
        proof = prove(outline, subject)
        evidence.append(proof.line)
    elif outline is not None:
        outline.close()
    return Structure(
        "independent",
        "proved" if proof.sound else "observed",
        refusal is None and not proof.meets,
        # values alone tell what is dead here: without them trust nothing for long
        suspect=bool(verdicts) and verdicts[1].coupled is None,
        evidence=tuple(evidence),
        watched=not proof.any_values,
    )


def _only_values(verdicts: Sequence[Verdict]) -> bool:
    """Check whether values of other samples move outputs, though no gradient of theirs was seen."""
    return len(verdicts) > 1 and verdicts[0].coupled is False and verdicts[1].coupled is True


def _slight(verdicts: Sequence[Verdict], subject: ProbePoint) -> bool:
    """Check whether the gradients that reach other samples, if any, are of the size of rounding."""
    leaves = [subject.leaves[position] for position in subject.inputs]
    return verdicts[0].share <= SLIGHT * min(torch.finfo(leaf.dtype).eps for leaf in leaves)


def _shape(
    subject: ProbePoint,
    outline: GraphAnalysis | None,
    values: Sequence[Tensor],
    refusal: str | None,
    masked: tuple[Sequence[Tensor], str],
    budget_s: float,
    generator: torch.Generator,
    evidence: list[str],
    split: bool,
    moved: bool,
) -> Structure:
    """How coupled samples are coupled.

    `split` if the layers are at odds; `moved` if a gradient or a value was seen to reach another sample, and not NaN
    alone: matrix products in half precision pad odd sizes with the next sample's numbers times zero.
    """
    coupling: Coupling = "dense"
    sparsity: Sparsity | None = None
    watched = False
    if outline is not None:
        alone, line = meeting(outline, subject, *masked, generator)
        coupling = "statistics" if alone else "dense"
        evidence.append(line)
        classes = _fewer_than(outline, subject, values) if alone else None
        if not alone or classes is not None:
            start = time.perf_counter()
            graph = sample_graph(outline, subject, generator, budget_s, classes)
            if graph.pattern is not None and graph.kind is not None:
                coupling, sparsity, watched = graph.kind, Sparsity(samples=graph.pattern), graph.watched
                if graph.followed and graph.edgeless and not moved:
                    coupling, sparsity, watched = "independent", None, True
                else:
                    refusal = refusal or "samples are coupled"
                # what each operator does holds whatever the layers did not see
                split = graph.suspect or (split and not graph.followed)
            if graph.pattern is not None or not alone:
                evidence.append(f"{graph.evidence} ({1e3 * (time.perf_counter() - start):.3g} ms)")
    return Structure(
        coupling, "observed", refusal is None, split, evidence=tuple(evidence), sparsity=sparsity, watched=watched
    )


def _fewer_than(outline: GraphAnalysis, subject: ProbePoint, values: Sequence[Tensor]) -> float | None:
    """The classes below which coloring samples takes fewer passes than shared statistics; None if it hardly can."""
    pools = [pool.size for pool in (outline.read_pool, outline.least_pool) if pool is not None]
    shared = min(pools, default=0)
    rows = sum(value[0].numel() for value in values)
    columns = sum(subject.leaves[position][0].numel() for position in subject.inputs)
    classes = (rows + shared) / max(min(rows, columns), 1)
    # what all samples share does not grow with their number; what neighbours or groups share does
    return classes if shared > subject.batch // 8 and classes > 2 else None
