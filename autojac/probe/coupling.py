"""Which samples reach each other: by the pair layers first, then by what the graph of the call shows."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autojac.core.pattern import Sparsity
from autojac.core.ranks import several
from autojac.core.structure import Assurance, Coupling, Structure
from autojac.errors import plural
from autojac.graph.analysis import GraphAnalysis
from autojac.probe.batch_axis_proof import Proof, confirm, meet_in_shared_tensors
from autojac.probe.cancelling import SLIGHT
from autojac.probe.masks import masks_within, split_masks
from autojac.probe.rounding import is_only_rounding
from autojac.probe.sample_graph import find_sample_graph
from autojac.probe.sample_pairs import SCALES, ProbePoint, Verdict, gradient_layer, nan_layer, value_layer
from autojac.probe.values_only import EVALUATIONS, couples_values_only

SMALL_SHARE = 1e-2
"""Gradients at other samples below this share of the largest may come of step sizes; attention's are larger."""
PATIENCE = 10.0
"""What showing that a coupling is false may cost, in budgets of a layer: it saves time in every call."""


@dataclass(frozen=True)
class PairProbe:
    """Finds out which samples reach each other.

    Attributes:
        point: the function, and where it is probed.
        analysis: what the graph of the call shows, if there is one.
        values: func's outputs there.
        weights: whether inputs without a batch are differentiated too.
        cost: seconds of one evaluation.
        budget_s: seconds that each of the three pair layers may cost.
        generator: of masks and other points.
        proof: what the graph proves.
    """

    point: ProbePoint
    analysis: GraphAnalysis | None
    values: Sequence[Tensor]
    weights: bool
    cost: float
    budget_s: float
    generator: torch.Generator
    proof: Proof

    @functools.cached_property
    def masks(self) -> tuple[list[Tensor], str]:
        """The masks that a layer can afford, and their name in the evidence."""
        return masks_within(self.point, self.generator, self.budget_s / 3, self.cost)

    def structure(self, refusal: str | None) -> Structure:
        """Return the coupling of the samples, with its evidence.

        Args:
            refusal: why func can't be called on some of the samples, as far as is known.
        """
        if self.point.batch < 2:
            lines = ("pairs: one sample has nothing to couple with", self.proof.line)
            assurance: Assurance = "proved" if self.proof.sound else "observed"
            return Structure("independent", assurance, evidence=tuple(filter(None, lines)))
        verdicts = self._verdicts()
        evidence = [verdict.evidence for verdict in verdicts] or ["pairs: no input carries the batch"]
        meet = any(verdict.coupled for verdict in verdicts)
        if self.point.sides and not meet and refusal is None:
            side = value_layer(self.point, *self.masks, self.generator, self.point.sides)
            evidence.append(side.evidence)
            if side.coupled:
                refusal = "an output depends on side inputs of other samples"
        evidence.append(_say_if_sliceable(refusal))
        if meet:
            return self._of_coupled(verdicts, refusal, evidence)
        return self._of_independent(verdicts, refusal, evidence)

    def by_proof(self, refusal: str | None, whole: ProbePoint) -> Structure | None:
        """Return the structure that the proof shows, once numbers agree with it here; None where they contradict it.

        What the operators prove holds for every pair, so one half-split of the samples is enough to see that the
        numbers are those of the operators.

        Args:
            refusal: why func can't be called on some of the samples, as far as is known.
            whole: the call, of which this point may be a part.
        """
        point, analysis, generator = self.point, self.analysis, self.generator
        if not self.proof.any_values or analysis is None or (self.weights and refusal is not None):
            return None
        mask = split_masks(point.batch, 1, generator)[0].to(point.leaves[0].device)
        name = f"one half-split of {point.batch} samples"
        scales = SCALES if point.batch < whole.batch else SCALES[1:2]
        layers: list[Callable[[], Verdict]] = [
            lambda: gradient_layer(point, [mask, ~mask], name, generator),
            lambda: value_layer(point, [mask], name, generator, point.inputs, scales),
            lambda: nan_layer(point, [~mask], name, self.values),
        ]
        verdicts = [layer() for layer in layers] if point.inputs else []
        evidence = [verdict.evidence for verdict in verdicts] or ["pairs: no input carries the batch"]
        if point.sides:
            side = value_layer(point, [mask], name, generator, point.sides, scales)
            evidence.append(side.evidence)
            if side.coupled:
                return None
        if any(verdict.coupled for verdict in verdicts):
            return None
        evidence.append(_say_if_sliceable(refusal))
        proof = confirm(self.proof, analysis, *((point,) if point is whole else (point, whole)))
        return self._independent(verdicts, refusal, evidence, proof)

    def _verdicts(self) -> list[Verdict]:
        """Return what the pair layers say."""
        point, (masks, name), generator = self.point, self.masks, self.generator
        layers: list[Callable[[], Verdict]] = [
            lambda: gradient_layer(point, masks, name, generator),
            lambda: value_layer(point, masks, name, generator, point.inputs),
            lambda: nan_layer(point, masks, name),
        ]
        verdicts: list[Verdict] = []
        for layer in layers if point.inputs else ():
            verdicts.append(layer())
            # where evaluations are expensive, one layer that is certain is enough
            if verdicts[-1].coupled and self.cost * len(masks) > self.budget_s / 3 and not _only_values(verdicts):
                break
        return verdicts

    def _of_coupled(self, verdicts: Sequence[Verdict], refusal: str | None, evidence: list[str]) -> Structure:
        """Return the structure where a layer saw samples reach each other."""
        point, (masks, _), patience = self.point, self.masks, PATIENCE * self.budget_s
        moves = any(verdict.coupled for verdict in verdicts[:2])
        slight = moves and not self.weights and not several() and _slight(verdicts, point)
        if slight and is_only_rounding(point, masks, self.cost, self.generator, patience):
            evidence.append(
                "rounding: what reaches other samples vanishes with the precision, in float64 against float32, and "
                "ends where it cancels, as in inputs that are centred by the batch. Taken for independent, but not "
                "called on a part of the batch"
            )
            return Structure("independent", "observed", False, evidence=tuple(evidence), depends_on_arguments=True)
        shape = self._shape(verdicts, refusal, evidence, moves)
        # what NaN reaches may sleep for another reason, such as a weight that is zero
        awake = shape.coupling != "dense" or not _only_values(verdicts) or bool(verdicts[-1].coupled) or self.weights
        if awake or several() or self.cost * EVALUATIONS > patience:
            return self._add_hint(shape, verdicts)
        if not couples_values_only(point, masks, self.generator, patience):
            return self._add_hint(shape, verdicts)
        line = (
            "values: coupled, derivatives: not; wherever other samples move an output it jumps or is detached, as by a "
            "solver that stops by the whole batch. Taken for independent, but not called on a part of the batch"
        )
        return Structure("independent", "observed", False, evidence=(*shape.evidence, line), depends_on_arguments=True)

    def _add_hint(self, shape: Structure, verdicts: Sequence[Verdict]) -> Structure:
        """Return the structure with what declaring independence would assume and save, where a loop may look coupled.

        A loop that stops, or sizes its steps, by the whole batch moves every sample by the others.
        """
        flow = None if self.analysis is None else self.analysis.flow
        only_values, share = _only_values(verdicts), verdicts[0].share
        is_loop = only_values or (flow is not None and flow.graph.reads_data and 0 < share < SMALL_SHARE)
        if shape.coupling not in ("dense", "statistics") or self.weights or not is_loop:
            return shape
        rows = sum(value[0].numel() for value in self.values)
        dense = self.point.batch * rows
        saves = f"takes {plural(rows, 'VJP')}, where a dense Jacobian takes {dense}, and is checked while it runs"
        if only_values:
            line = (
                "hint: other samples move outputs, and no gradient of theirs was seen, as where a loop stops or sizes "
                f"its steps by the whole batch. If that is all, coupling='independent' {saves}; it assumes that no "
                "derivative ever reaches another sample"
            )
        else:
            line = (
                f"hint: func looks at its data, and what reaches other samples is {share:.1g} of the largest gradient, "
                "as where a loop sizes its steps by the whole batch. Exact derivatives hold that too. To leave it out, "
                f"detach what decides (error.detach()); coupling='independent' then {saves}"
            )
        return replace(shape, evidence=(*shape.evidence, line))

    def _of_independent(self, verdicts: Sequence[Verdict], refusal: str | None, evidence: list[str]) -> Structure:
        """Return the structure where no layer saw a sample reach another."""
        # what is read of a weight by one sample depends on the others too where side inputs are coupled
        if self.analysis is not None and self.weights and refusal is not None:
            alone, line = meet_in_shared_tensors(self.analysis, self.point, *self.masks, self.generator)
            evidence.append(line)
            if alone:
                split = any(verdict.coupled is None for verdict in verdicts)
                return Structure(
                    "statistics", "observed", False, split, evidence=tuple(evidence), depends_on_arguments=True
                )
        proof = self.proof if self.analysis is None else confirm(self.proof, self.analysis, self.point)
        return self._independent(verdicts, refusal, evidence, proof)

    def _independent(
        self, verdicts: Sequence[Verdict], refusal: str | None, evidence: list[str], proof: Proof
    ) -> Structure:
        """Return the structure of independent samples."""
        if not self.point.inputs:
            proof = Proof(False, "")
        elif proof.line:
            evidence.append(proof.line)
        return Structure(
            "independent",
            "proved" if proof.sound else "observed",
            refusal is None and not proof.meets,
            # values alone tell what is dead here: without them trust nothing for long
            suspect=bool(verdicts) and verdicts[1].coupled is None,
            evidence=tuple(evidence),
            depends_on_arguments=not proof.any_values,
        )

    def _shape(self, verdicts: Sequence[Verdict], refusal: str | None, evidence: list[str], moves: bool) -> Structure:
        """Return how coupled samples are coupled.

        `moves` if a gradient or a value was seen to reach another sample, and not NaN alone: matrix products in half
        precision pad odd sizes with the next sample's numbers times zero.
        """
        coupling: Coupling = "dense"
        sparsity: Sparsity | None = None
        # the layers are at odds
        split = len({verdict.coupled for verdict in verdicts}) > 1
        depends = False
        if self.analysis is not None:
            alone, line = meet_in_shared_tensors(self.analysis, self.point, *self.masks, self.generator)
            coupling = "statistics" if alone else "dense"
            evidence.append(line)
            classes = _fewer_than(self.analysis, self.point, self.values) if alone else None
            if not alone or classes is not None:
                start = time.perf_counter()
                graph = find_sample_graph(self.analysis, self.point, self.generator, self.budget_s, classes)
                if graph.pattern is not None and graph.kind is not None:
                    coupling, depends = graph.kind, graph.depends_on_arguments
                    sparsity = Sparsity(samples=graph.pattern)
                    if graph.followed and graph.edgeless and not moves:
                        coupling, sparsity, depends = "independent", None, True
                    else:
                        refusal = refusal or "samples are coupled"
                    # what each operator does holds whatever the layers did not see
                    split = graph.suspect or (split and not graph.followed)
                if graph.pattern is not None or not alone:
                    evidence.append(f"{graph.evidence} ({1e3 * (time.perf_counter() - start):.3g} ms)")
        return Structure(
            coupling,
            "observed",
            refusal is None,
            split,
            evidence=tuple(evidence),
            sparsity=sparsity,
            depends_on_arguments=depends,
        )


def _say_if_sliceable(refusal: str | None) -> str:
    """Say whether func can be called on some of the samples."""
    return f"slices: {refusal}" if refusal else "slices: func of some samples is those samples of func"


def _only_values(verdicts: Sequence[Verdict]) -> bool:
    """Check whether values of other samples move outputs, though no gradient of theirs was seen."""
    return len(verdicts) > 1 and verdicts[0].coupled is False and verdicts[1].coupled is True


def _slight(verdicts: Sequence[Verdict], point: ProbePoint) -> bool:
    """Check whether the gradients that reach other samples, if any, are of the size of rounding."""
    leaves = [point.leaves[position] for position in point.inputs]
    return verdicts[0].share <= SLIGHT * min(torch.finfo(leaf.dtype).eps for leaf in leaves)


def _fewer_than(analysis: GraphAnalysis, point: ProbePoint, values: Sequence[Tensor]) -> float | None:
    """Return below how many classes coloring samples takes fewer passes than shared statistics, if it can."""
    pools = [pool.size for pool in (analysis.read_pool, analysis.least_pool) if pool is not None]
    shared = min(pools, default=0)
    rows = sum(value[0].numel() for value in values)
    columns = sum(point.leaves[position][0].numel() for position in point.inputs)
    classes = (rows + shared) / max(min(rows, columns), 1)
    # what all samples share does not grow with their number; what neighbours or groups share does
    return classes if shared > point.batch // 8 and classes > 2 else None
