"""Plans for graphs that exist already: made once for each shape of a graph, and checked while they are used."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from autojac.autodiff.graph_shape import GraphShape
from autojac.autodiff.pullback import Pullback
from autojac.autodiff.seeds import SharedSeeds
from autojac.core.sandbox import Sandbox
from autojac.errors import SearchError, StructureChangedWarning, warn
from autojac.methods.pull import Pull
from autojac.planning.check_schedule import CheckSchedule
from autojac.planning.search.memory import available_bytes
from autojac.probe.batch_axis_proof import backward_keeps_apart
from autojac.probe.masks import index_masks, split_masks
from autojac.probe.sample_pairs import cotangent_verdict
from autojac.problem.compared_parts import Extent
from autojac.problem.problem import Problem, Result, empty_rows
from autojac.problem.reference import EXTENT, Reference

FEWEST_MASKS = 6
"""Passes spent on the coupling at least; more only where the Jacobian itself takes more."""
MOST_NODES = 100_000
"""Nodes of all graphs that are remembered, together; those longest unused go first."""


@dataclass
class GraphPlan:
    """How Jacobians of graphs of one shape are computed.

    Attributes:
        problem: with the coupling that was found.
        method: one that agreed with plain VJPs.
        is_proved: whether the method is right for all graphs of this shape: it assumes nothing, or the operators of a
            backward pass keep samples apart, whatever the graph has saved. Hooks on tensors inside are no part of
            the shape: so it is checked, if rarely, all the same. Others are checked by one VJP in each call.
        schedule: of checks.
        seeds: reused by later calls.
    """

    problem: Problem
    method: Pull
    is_proved: bool
    schedule: CheckSchedule = field(default_factory=CheckSchedule)
    seeds: SharedSeeds = field(default_factory=SharedSeeds)

    def run(self, pullback: Pullback) -> Result | None:
        """Return the Jacobian of a graph of this shape; None if the plan does not hold for it."""
        self.schedule.calls += 1
        try:
            # a later call can't train through seeds of inference mode
            seeds = None if torch.is_inference_mode_enabled() else self.seeds
            result = self.method.of_graph(self.problem, pullback, seeds)
        except Exception:  # memory, or a hook: making a new plan reports what can't be done
            return None
        if self.is_proved and not self.schedule.is_due({}):
            return result
        reference = _reference(self.problem, pullback, Extent(rows=0, seed=self.schedule.calls))
        wrong = reference.check(result)
        if wrong is None:
            self._accept(reference)
            return result
        last = self.schedule.last_check
        if self.is_proved and last < self.schedule.calls - 1:
            warn(
                f"a graph of a shape that was met before couples samples otherwise (calls since call {last} went "
                f"unchecked): {wrong}. This Jacobian was computed again and is right. A hook on a tensor inside may "
                "mix samples: declare coupling='dense'",
                StructureChangedWarning,
            )
        return None

    def _accept(self, reference: Reference) -> None:
        """Note that a check has passed."""
        if reference.says:
            self.schedule.schedule_next_check(every_call=False, may_fail=True)
        else:  # nothing was finite
            self.schedule.check_next_call()


class GraphPlans:
    """The plans of this process, by keys of all that decides them, for a bounded number of nodes."""

    def __init__(self) -> None:
        self._plans: OrderedDict[Hashable, tuple[GraphPlan, int]] = OrderedDict()
        self._latest: tuple[GraphPlan, int] | None = None
        self._nodes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._plans)

    def find(self, key: Hashable) -> GraphPlan | None:
        """Return the plan for a key, and mark it as used last."""
        with self._lock:
            entry = self._plans.get(key)
            if entry is None:
                return None
            # hashing a key takes long, and a loop asks for the same one
            if entry is not self._latest:
                self._plans.move_to_end(key)
                self._latest = entry
            return entry[0]

    def keep(self, key: Hashable, plan: GraphPlan, nodes: int) -> None:
        """Remember a plan, instead of an earlier one for the key."""
        with self._lock:
            before = self._plans.pop(key, None)
            self._nodes += nodes - (before[1] if before else 0)
            self._plans[key] = self._latest = plan, nodes
            while self._nodes > MOST_NODES:
                _, (_, fewer) = self._plans.popitem(last=False)
                self._nodes -= fewer

    def clear(self) -> None:
        """Forget all plans."""
        with self._lock:
            self._plans.clear()
            self._latest, self._nodes = None, 0


known_graphs = GraphPlans()
"""Of all threads."""


def by_known_plan(key: Hashable, pullback: Pullback) -> Result | None:
    """Return the Jacobian of a graph by the plan for such graphs; None if there is none that holds."""
    plan = known_graphs.find(key)
    return None if plan is None else plan.run(pullback)


def by_new_plan(key: Hashable, problem: Problem, pullback: Pullback, shape: GraphShape, probing: bool) -> Result:
    """Return the Jacobian of a graph by a new plan, and remember the plan.

    Args:
        key: what it is remembered by; None for nothing.
        problem: with a memory limit of 0 where none was given.
        pullback: of the graph.
        shape: of the graph.
        probing: find what couples with what.
    """
    if 0 in (problem.batch, problem.out_size) or not any(x.numel() for x in pullback.inputs):
        return Result(pullback.outputs, empty_rows(problem, pullback.inputs))
    if not problem.memory_limit:
        problem = dataclasses.replace(problem, memory_limit=available_bytes(pullback.inputs[0].device) // 2)
    plan, result = _make(problem, pullback, shape, probing)
    if key is not None:
        known_graphs.keep(key, plan, shape.nodes)
    return result


def _make(problem: Problem, pullback: Pullback, shape: GraphShape, probing: bool) -> tuple[GraphPlan, Result]:
    """Find what couples with what and a method that is right; return the Jacobian as well."""
    carriers = [leaf.batched for leaf in problem.leaves]
    if probing and problem.batch > 1 and any(carriers) and _couples(problem, pullback, carriers):
        problem = _dense(problem)
    reasons = []
    while True:
        reference = _reference(problem, pullback, EXTENT)
        for method in _methods(problem):
            try:
                result = method.of_graph(problem, pullback)
                wrong = reference.check(result)
            except Exception as error:  # is_grads_batched needs a vmap rule of every operator
                wrong = f"{type(error).__name__}: {error}"
            if wrong is None:
                is_proved = method.seeds == "identity" or problem.batch == 1
                if not is_proved and not shape.is_opaque:
                    is_proved = backward_keeps_apart(pullback, carriers, problem.batch)
                plan = GraphPlan(problem, method, is_proved, CheckSchedule(calls=1))
                plan._accept(reference)
                return plan, result
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


def _couples(problem: Problem, pullback: Pullback, carriers: Sequence[bool]) -> bool:
    """Check whether a cotangent on some samples is seen to have a gradient at others."""
    exact = index_masks(problem.batch)
    generator = torch.Generator().manual_seed(0)
    allowed = max(FEWEST_MASKS, problem.out_size)
    masks = exact if len(exact) <= allowed else split_masks(problem.batch, allowed, generator)
    masks = [mask.to(pullback.inputs[0].device) for mask in masks]
    return cotangent_verdict(pullback, carriers, masks, f"{len(masks)} masks", generator).coupled is True


def _reference(problem: Problem, pullback: Pullback, extent: Extent) -> Reference:
    return Reference(problem, pullback.inputs, {}, Sandbox(()), extent=extent, pullback=pullback)


def _dense(problem: Problem) -> Problem:
    return dataclasses.replace(problem, structure=problem.structure.refute("the graph couples samples"))


def _methods(problem: Problem) -> Sequence[Pull]:
    """Return the methods that need no func, the most promising first; the plain loop needs no operator's vmap rule."""
    usable = [m for m in Pull.candidates(problem, 0) if m.runs_func_plainly and m.unsupported(problem) is None]
    within_limit = [m for m in usable if problem.result_bytes + m.workspace(problem) <= problem.memory_limit]
    ranked = sorted(within_limit, key=lambda method: method.cost(problem))
    return [*ranked, *(method for method in usable if method.engine == "loop" and method not in ranked)]
