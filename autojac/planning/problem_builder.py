"""From a call to the problem that methods solve: described, inspected, probed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any

from autojac.core.call import CallLayout
from autojac.core.options import Options, parse_bytes
from autojac.core.plan import Effort
from autojac.core.signature import Signature
from autojac.core.structure import Structure
from autojac.errors import ModesDisagreeWarning, NoGraphWarning, warn
from autojac.graph.analysis import GraphAnalysis
from autojac.graph.special_kernels import reachable_kernels
from autojac.guards.captures import Captures
from autojac.guards.compiled_functions import eagerly
from autojac.guards.function_state import FunctionState
from autojac.planning.call import Call, CallKey
from autojac.planning.first_call import FirstCallReport, inspect_first_call
from autojac.planning.plan_repository import Keys, PlanRepository
from autojac.planning.search.memory import available_bytes
from autojac.probe import FlatCall, ProbeResult, Roles, examine, observe
from autojac.problem.machine import DEFAULT, Machine
from autojac.problem.problem import Problem
from autojac.sparse.colorings import Colorings

PROBE_BUDGET_S = {"estimate": 0.5, "quick": 1.0, "measure": 5.0, "exhaustive": 30.0}


class ProblemBuilder:
    """Describes calls of one function, probes what couples with what, and states the problem that methods solve.

    Args:
        func: the user's function.
        options: the options of its `AutoJacobian`.

    Attributes:
        repository: its plans and colorings that are stored.
        function_state: what it reads besides its arguments.
    """

    def __init__(self, func: Callable[..., Any], options: Options) -> None:
        self.func = func
        self.options = options
        self.repository = PlanRepository(func, options)
        self.function_state = FunctionState(func)
        self.colorings = Colorings(self.repository)
        self._batched_arguments: dict[str, dict[int, bool]] = {}

    def layout(self, captured: Captures, args: Sequence[Any]) -> CallLayout:
        """Return the layout of a call's arguments."""
        return CallLayout(eagerly(self.func) if captured.compiled else self.func, args, self.options)

    def describe(self, captured: Captures, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Describe a call that may need a plan."""
        layout = self.layout(captured, args)
        leaves, keywords = layout.leaves(args), layout.keywords(args, kwargs)
        return Call(args, kwargs, CallKey.of(args, kwargs, captured), layout, leaves, keywords, captured)

    def inspect(self, call: Call) -> FirstCallReport:
        """Call func once, without side effects that stay."""

        def keys(signature: Signature) -> Keys:
            # a first call may have changed the function's state, as lazy modules do
            unchanged = self.function_state.is_complete and self.function_state.is_unchanged()
            return self.repository.keys(signature, call.captured.digest if unchanged else "")

        def settable(ran: Sequence[CodeType]) -> Sequence[Any]:
            self.function_state.cover(ran)
            return self.function_state.present.guard.settable

        return inspect_first_call(call, self.options, keys, settable)

    def probe(self, call: Call, report: FirstCallReport, effort: Effort = "quick") -> ProbeResult:
        """Probe what couples with what."""
        layout = call.layout
        flat = FlatCall(report.fn, call.leaves, call.keywords, layout.differentiated, report.sandbox)
        kernels: tuple[str, ...] = ()
        if report.signature.differentiable:
            kernels = reachable_kernels(self.function_state.present.guard.codes, call.captured.modules)
        analysis = self.analyze(call, report, report.guess)
        recording = analysis.recording
        if analysis.branches:
            report.sandbox.widen()
        effects = observe(report.first, flat, kernels, None if isinstance(recording, str) else recording)
        roles = self._batched_arguments.setdefault(layout.context, {})
        result = examine(
            flat,
            effects,
            Roles(report.guess, layout.declared, roles),
            declared=self.options.declared,
            budget_s=PROBE_BUDGET_S[effort],
            analysis=analysis,
        )
        analysis.let_go()
        if report.signature.batch > 1:
            roles.update(enumerate(result.batched))
        self._warn(result)
        return result

    def problem(
        self,
        call: Call,
        report: FirstCallReport,
        structure: Structure,
        batched: Sequence[bool],
        analysis: GraphAnalysis | None = None,
        machine: Machine = DEFAULT,
    ) -> Problem:
        """State the problem that methods solve; those that cut a graph need to know what it looks like."""
        signature = report.signature
        limit = parse_bytes(self.options.memory_limit)
        return Problem(
            report.fn,
            call.layout.roles(call.leaves, batched),
            signature.outputs,
            signature.batch,
            signature.layout,
            structure,
            signature.differentiable,
            available_bytes(call.leaves[0].device) // 2 if limit is None else limit,
            pass_bytes=0 if analysis is None else analysis.pass_bytes,
            has_aux=call.layout.returns_more,
            analysis=analysis,
            colorings=self.colorings,
            function_state=self.function_state,
            originals=getattr(self.func, "__autojac_originals__", None),
            generators=tuple(report.sandbox.state),
            places=report.sandbox.places,
            of=self.options.of,
            symmetric=self.options.symmetric,
            machine=machine,
        )

    @staticmethod
    def analyze(call: Call, report: FirstCallReport, batched: Sequence[bool]) -> GraphAnalysis:
        """Return the graph of a call, to be recorded when it is first asked for."""
        return GraphAnalysis(
            (report.fn, call.leaves, call.keywords),
            call.layout.differentiated,
            batched,
            report.signature.batch,
            report.sandbox,
            call.captured,
        )

    def _warn(self, result: ProbeResult) -> None:
        """Warn of derivatives that the user may not expect."""
        if result.cut:
            parts = [f"{'' if whole else 'some entries of '}output {n}" for n, whole in sorted(result.cut.items())]
            verb = "moves" if all(result.cut.values()) else "move"
            message = (
                f"{' and '.join(parts)} of func {verb} with the inputs, but autograd finds no derivative there: the "
                "Jacobian is zero there, as torch's would be. Does func go through NumPy, .item(), .detach() or "
                "torch.tensor(...)? Compute that in torch operators, or return it as aux with has_aux=True if it needs "
                "no derivative"
            )
            warn(f"{self.repository.function_name}: {message}", NoGraphWarning)
        if result.notice is not None:
            warn(f"{self.repository.function_name}: {result.notice}", ModesDisagreeWarning)
