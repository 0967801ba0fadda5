"""The way from a call to a plan: observe, look up, probe, search, remember."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any

import torch

from autojac.autodiff.primitives import saved_tensors_apart
from autojac.core.autocast import outside_autocast
from autojac.core.call import Frame, describe
from autojac.core.options import Options, parse_bytes
from autojac.core.plan import Effort, Plan, effort_rank
from autojac.core.ranks import several, silent
from autojac.core.sandbox import without_graph, without_hooks
from autojac.core.signature import Signature, bucket, current_flags
from autojac.core.structure import UPDATES_BUFFERS, Structure
from autojac.core.time_limit import end_watch
from autojac.errors import (
    ModesDisagreeWarning,
    NoGraphWarning,
    PlanMissError,
    SearchError,
    StoreError,
    StructureChangedWarning,
    warn,
)
from autojac.graph.analysis import Outline
from autojac.graph.special_kernels import reachable_kernels
from autojac.guards.assignments import Snapshot
from autojac.guards.captures import Captures
from autojac.guards.compiled_functions import eagerly
from autojac.guards.function_state import FunctionState
from autojac.guards.process_state import as_found
from autojac.methods.base import Method, build, composable, registry
from autojac.planning.first_call import look
from autojac.planning.plan_repository import Keys, Stored
from autojac.planning.prepared_plan import Entry, Request, Seen, prepared
from autojac.planning.room import require_room
from autojac.planning.search.measure import available_bytes
from autojac.probe import Examined, examine, observe
from autojac.problem.empty_events import solid
from autojac.problem.problem import Compute, Problem, Result
from autojac.replay.replayer import Replaying
from autojac.replay.tracer import unfixed
from autojac.sparse.colorings import Colorings
from autojac.torch_internals import pytree

registry()  # found when autojac is imported, so that no first Jacobian waits for it
PROBE_BUDGET_S = {"estimate": 0.5, "quick": 1.0, "measure": 5.0, "exhaustive": 30.0}

_planning: ContextVar[bool] = ContextVar("planning", default=False)


@contextmanager
def nested() -> Iterator[bool]:
    """Mark that a plan is being made; tells whether another one was already."""
    token = _planning.set(True)
    inside = bool(token.old_value is not Token.MISSING and token.old_value)
    try:
        yield inside
    finally:
        _planning.reset(token)
        if not inside:
            end_watch()


def trained_by(captured: Captures, kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Return the tensors besides the inputs that a loss on a differentiable Jacobian trains."""
    given = [value for value in pytree.tree_leaves(kwargs) if isinstance(value, torch.Tensor)]
    return tuple(t for t in (*captured.tensors, *given) if t.requires_grad)


def lasting(trained: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Those that a call does not overwrite: what an earlier call has computed there has no gradient any more."""
    overwritten = {id(tensor) for tensor in written if tensor.grad_fn is not None}
    return tuple(tensor for tensor in trained if id(tensor) not in overwritten)


class Planner:
    """Finds or makes the plan for a call of one function.

    Args:
        func: the user's function.
        options: the options of its `AutoJacobian`.
    """

    def __init__(self, func: Callable[..., Any], options: Options) -> None:
        self.func = func
        self.options = options
        self.stored = Stored(func, options)
        self.colorings = Colorings(self.stored)
        self.function_state = FunctionState(func)
        self.roles: dict[str, dict[int, bool]] = {}
        self.neighbours: dict[Signature, tuple[int, Plan]] = {}

    def request(self, captured: Captures, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Request:
        """A call, described: its frame, its tensors and what else counts for the choice of a plan."""
        frame = Frame(eagerly(self.func) if captured.compiled else self.func, args, self.options)
        leaves = frame.leaves(args)
        trained = trained_by(captured, kwargs)
        differentiable = torch.is_grad_enabled() and bool(trained or any(leaf.requires_grad for leaf in leaves))
        kinds = str([(name, describe(value)) for name, value in kwargs.items()])
        kwargs = frame.keywords(args, kwargs)
        return Request(frame, leaves, kwargs, current_flags(captured.modules), differentiable, trained, kinds, captured)

    def entry(self, request: Request, captured: Captures, effort: Effort | None = None, budget_s: float | None = None,
              force: bool = False) -> Entry:  # fmt: skip
        """The plan for a call, from the store, a neighbouring shape, or a search.

        Args:
            request: the call.
            captured: what func reaches.
            effort: of a search; the options' own by default.
            budget_s: seconds for a search; the options' own by default.
            force: search even if a plan is known.
        """
        request = request.apart()
        with (
            outside_autocast(),
            without_hooks(request.trained),
            saved_tensors_apart(),
            as_found(),
            silent(captured.modules),
            nested() as inside,
        ):
            return self._entry(request, captured, effort, budget_s, force, inside)

    def _entry(
        self,
        request: Request,
        captured: Captures,
        effort: Effort | None,
        budget_s: float | None,
        force: bool,
        inside: bool,
    ) -> Entry:
        seen = look(request, captured, self.options, functools.partial(self._keys, captured))
        if seen.empty:
            return self._empty(request, seen)
        if inside or several():
            # func calls another AutoJacobian, and this is its turn within the other's search: times would say nothing;
            # to several ranks they would say different things, and these would evaluate func unequally often
            effort = "estimate"
        wanted = effort or ("estimate" if self.options.on_miss == "estimate" else self.options.effort)
        if not force:
            known = self._neighbour(seen.signature) or self._stored(seen.keys, wanted)
            ready = known and self._ready(request, seen, known)
            if ready:
                return ready
            if self.options.on_miss == "error":
                shapes = ", ".join(f"{leaf.shape} {leaf.dtype}" for leaf in seen.signature.leaves)
                raise PlanMissError(
                    f"no plan is stored for arguments {shapes} in {self.stored.description}, and on_miss='error' "
                    "forbids making one. Tune ahead with jac.tune(x) or the command `autojac tune`"
                )
        start = time.perf_counter()
        found = self.examine(request, seen, wanted)
        return self._search(request, seen, found, wanted, budget_s, start)

    def _keys(self, captured: Captures, signature: Signature) -> Keys:
        # a first call may have set what the function computes with, as lazy modules do
        unchanged = self.function_state.is_complete and self.function_state.is_unchanged()
        return self.stored.keys(signature, captured.digest if unchanged else "")

    def examine(self, request: Request, seen: Seen, effort: Effort = "quick") -> Examined:
        """Probe what couples with what."""
        frame, options = request.frame, self.options
        call = (seen.fn, request.leaves, request.kwargs)
        reached: tuple[str, ...] = ()
        if seen.signature.differentiable:
            reached = reachable_kernels(self.function_state.present.guard.codes, request.captured.modules)
        manners = observe(seen.first, *call, frame.differentiated, seen.quiet, reached)
        known = self.roles.setdefault(frame.context, {})
        found = examine(
            *call,
            manners,
            seen.guess,
            frame.differentiated,
            seen.quiet,
            fixed=frame.declared,
            known=known,
            declared=options.declared,
            outlined=lambda batched: self.outline(request, seen, batched),
            budget_s=PROBE_BUDGET_S[effort],
        )
        if seen.signature.batch > 1:
            known.update(enumerate(found.batched))
        if found.cut:
            parts = [f"{'' if whole else 'some entries of '}output {n}" for n, whole in sorted(found.cut.items())]
            verb = "moves" if all(found.cut.values()) else "move"
            message = (
                f"{' and '.join(parts)} of func {verb} with the inputs, but autograd finds no derivative there: the "
                "Jacobian is zero there, as torch's would be. Does func go through NumPy, .item(), .detach() or "
                "torch.tensor(...)? Compute that in torch operators, or return it as aux with has_aux=True if it needs "
                "no derivative"
            )
            warn(f"{self.stored.function_name}: {message}", NoGraphWarning)
        if found.notice is not None:
            warn(f"{self.stored.function_name}: {found.notice}", ModesDisagreeWarning)
        return found

    def problem(
        self,
        request: Request,
        seen: Seen,
        structure: Structure,
        batched: Sequence[bool],
        outline: Outline | None = None,
    ) -> Problem:
        """The problem that methods solve; those that cut a graph need to know what it looks like."""
        signature = seen.signature
        limit = parse_bytes(self.options.memory_limit)
        return Problem(
            seen.fn,
            request.frame.roles(request.leaves, batched),
            signature.outputs,
            signature.batch,
            signature.layout,
            structure,
            signature.differentiable,
            available_bytes(request.leaves[0].device) // 2 if limit is None else limit,
            has_aux=request.frame.has_aux,
            outline=outline,
            colorings=self.colorings,
            function_state=self.function_state,
            originals=getattr(self.func, "__autojac_originals__", None),
            generators=tuple(seen.quiet.state),
            places=seen.quiet.places,
        )

    @staticmethod
    def outline(request: Request, seen: Seen, batched: Sequence[bool]) -> Outline:
        """The graph of a call, to be recorded when it is first asked for."""
        frame = request.frame
        return Outline(
            (seen.fn, request.leaves, request.kwargs),
            frame.differentiated,
            batched,
            seen.signature.batch,
            seen.quiet,
            request.captured,
        )

    def recover(self, entry: Entry, request: Request, captured: Captures, reason: str, structure: bool = True) -> Entry:
        """A plan for a signature whose own was just caught being wrong.

        The structure is probed again at this input. Where that still sees no coupling the guard is believed, unless it
        found J right and the gradient through it wrong, which says nothing of the `structure`.
        """
        with nested(), as_found(), silent(captured.modules):
            return self._recovered(entry, request.apart(), captured, reason, structure)

    def _recovered(self, entry: Entry, request: Request, captured: Captures, reason: str, structure: bool) -> Entry:
        start = time.perf_counter()
        if entry.keys is not None:
            self.stored.refute(entry.keys, reason)
        self.neighbours.clear()
        with outside_autocast():
            seen = look(request, captured, self.options, self.stored.keys)
            found = self.examine(request, seen)
            same = found.structure.sparsity == entry.problem.structure.sparsity is not None
            if structure and (found.structure.independent or same):
                found = dataclasses.replace(found, structure=found.structure.refuted(f"guard: {reason}"))
            return self._search(request, seen, found, "estimate", None, start)

    def _neighbour(self, signature: Signature) -> Plan | None:
        """The plan of a batch of the same bucket or of a larger one: the last partial batch never searches."""
        known = self.neighbours.get(signature.without_batch())
        if known is None or bucket(signature.batch) > bucket(known[0]):
            return None
        if known[1].structure.samples is not None and signature.batch != known[0]:
            return None  # a graph of samples belongs to its batch
        return dataclasses.replace(known[1], source="neighbour")

    def _stored(self, keys: Keys, wanted: Effort) -> Plan | None:
        plan = self.stored.find(keys)
        if plan is None or (self.options.on_miss != "error" and effort_rank(plan.effort) < effort_rank(wanted)):
            return None
        return plan

    def _ready(self, request: Request, seen: Seen, plan: Plan) -> Entry | None:
        """A known plan, prepared for this call; None if its method does not apply here."""
        if len(plan.batched) != len(seen.signature.leaves):
            return None
        outline = self.outline(request, seen, plan.batched)
        if not set(seen.first.effects) <= set(plan.structure.effects):
            return None  # it may have been chosen for what func then did not do
        problem = self.problem(request, seen, plan.structure, plan.batched, outline)
        if not plan.structure.fits(problem.batch, problem.out_size, problem.in_size):
            return None
        try:
            method = build(plan.method)
        except StoreError:
            return None  # made by another version of autojac
        if method.unsupported(solid(problem)) is not None:
            return None
        self._remember(seen.signature, plan)
        return self._made(request, seen, problem, plan, method)

    def _search(
        self, request: Request, seen: Seen, found: Examined, effort: Effort, budget_s: float | None, start: float
    ) -> Entry:
        # rich and Optuna load only when something is tuned
        from autojac.planning.progress import reporter
        from autojac.planning.search.optimize import search

        structure = found.structure
        problem = self.problem(request, seen, structure, found.batched, found.outline)
        require_room(problem)
        hints = self.stored.hints(seen.keys)
        budget = self.options.budget_s if budget_s is None else budget_s
        trained = lasting(request.trained, seen.quiet.captured)
        call = (request.leaves, request.kwargs, trained, seen.quiet)
        with reporter(effort) as progress:
            try:
                try:
                    won = search(solid(problem), *call, effort, budget, hints, progress)
                except SearchError as error:
                    if structure.sparsity is None:
                        raise
                    # a sparse matrix holds what its pattern has: where that misses an entry no method can be right
                    structure = structure.without_patterns(f"patterns: they miss entries ({error})")
                    problem = self.problem(request, seen, structure, found.batched, found.outline)
                    won = search(solid(problem), *call, effort, budget, hints, progress)
                    if structure.assurance == "declared":
                        message = "the declared pattern misses entries, and was left aside. This Jacobian is right"
                        warn(f"{self.stored.function_name}: {message}", StructureChangedWarning)
            except SearchError as error:
                if self.options.declared is None:
                    raise
                raise SearchError(_declared_wrongly(self.options, error)) from error
        plan = Plan(
            won.method.spec(),
            structure,
            found.batched,
            effort,
            won.seconds,
            won.default_seconds,
            won.memory_bytes,
            time.perf_counter() - start,
            "estimate" if effort == "estimate" else "search",
            won.trials,
        )
        if won.verified:
            self.stored.save(seen.keys, plan)
            self._remember(seen.signature, plan)
        entry = self._made(request, seen, problem, plan, won.method)
        entry.fresh, entry.provisional = won.verified, not won.verified
        return entry

    def _made(self, request: Request, seen: Seen, problem: Problem, plan: Plan, method: Method) -> Entry:
        compute = prepared(request.frame, problem, method)
        if problem.outline is not None:
            problem.outline.close()
        writes = seen.quiet.captured or UPDATES_BUFFERS in problem.structure.effects
        if writes and not problem.differentiable and not isinstance(compute, Replaying):
            compute = _leaving_numbers(compute, seen.quiet.captured, seen.quiet.places)
        entry = Entry(request.frame, problem, plan, compute, seen.signature, seen.quiet, seen.keys)
        entry.pushes = problem.differentiable and method.pushes
        structure = problem.structure
        reads_pattern = structure.sparsity is not None and (method.trusts_zeros or problem.layout == "sparse")
        if structure.assumes and (structure.watched or reads_pattern):
            entry.contents_decide = True
            self.function_state.watch_tensors()
            entry.hold(request.captured)
        if structure.assumes and any(isinstance(v, float) for v in pytree.tree_leaves(request.kwargs)):
            entry.numbers = set()
        # ranks must evaluate func equally often, whatever their guards see
        fixed = not (unfixed(request.kwargs) or entry.contents_decide or entry.pushes or several())
        entry.proved = fixed and structure.assurance == "proved"
        return entry

    def _remember(self, signature: Signature, plan: Plan) -> None:
        key = signature.without_batch()
        if key not in self.neighbours or self.neighbours[key][0] <= signature.batch:
            self.neighbours[key] = (signature.batch, plan)

    def _empty(self, request: Request, seen: Seen) -> Entry:
        """Nothing to differentiate: a Jacobian without elements."""
        structure = Structure("independent", evidence=("empty: there is nothing to probe",))
        problem = self.problem(request, seen, structure, seen.guess)
        method = composable(problem)
        plan = Plan(method.spec(), structure, seen.guess, "estimate", source="estimate")
        compute = prepared(request.frame, problem, method)
        return Entry(request.frame, problem, plan, compute, seen.signature, seen.quiet, next_check=math.inf)


def _declared_wrongly(options: Options, error: SearchError) -> str:
    kind = repr(options.coupling) if isinstance(options.coupling, str) else "Structure(...)"
    return (
        f"coupling={kind} was declared for func, and no method that relies on it gives the right Jacobian here. Let "
        f"autojac find out by coupling='auto', or declare what holds for every input ({error})"
    )


def _leaving_numbers(compute: Compute, written: Sequence[torch.Tensor], places: Sequence[Any]) -> Compute:
    """A computation after which what func writes or sets holds no graph, as after a call of func that records none."""

    def computed(leaves: Sequence[torch.Tensor], kwargs: Mapping[str, Any]) -> Result:
        plain = [tensor for tensor in written if not tensor.requires_grad]
        held = Snapshot(places)
        try:
            return compute(leaves, kwargs)
        finally:
            without_graph(plain)
            held.without_graph()

    return computed
