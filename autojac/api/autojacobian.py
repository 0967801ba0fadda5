"""The one composer: wrap a function, and every call uses the plan that was tuned and is checked for it."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Never, Unpack

import torch
from torch import Tensor

from autojac.api.derived import Derived
from autojac.api.low_rank_factors import Factors, factored, require_one, without_sharing
from autojac.autodiff.primitives import hooked, saved_tensors_apart, transforming
from autojac.core.autocast import outside_autocast
from autojac.core.call import Frame, describe, recording
from autojac.core.module_function import ModuleFunction, module_function
from autojac.core.options import OnMiss, Options, OptionValues, Randomness, Verify, check_budget
from autojac.core.plan import Effort, Plan, effort_rank
from autojac.core.ranks import silent
from autojac.core.sandbox import GENERATORS, Quiet, restore_random_state, without_hooks
from autojac.core.signature import Layout, current_flags
from autojac.core.structure import UPDATES_BUFFERS, Coupling, Structure
from autojac.errors import (
    InputError,
    NoGraphWarning,
    OptionError,
    StructureChangedWarning,
    UnsupportedError,
    kind_of,
    warn,
)
from autojac.graph.operators import custom_functions
from autojac.guards.captures import Captures, captures, survey
from autojac.guards.compiled_functions import eagerly, opaque_methods, original
from autojac.guards.run_monitor import RunMonitor
from autojac.methods.base import composable
from autojac.planning.explain import explanation
from autojac.planning.fast_path import Again, again, never
from autojac.planning.planner import Planner, lasting, trained_by
from autojac.planning.prepared_plan import UNCHANGED, Entry, Noticed, prepared
from autojac.problem.compression import colored
from autojac.problem.problem import Result
from autojac.problem.reference import Reference
from autojac.replay.replayer import Replaying

if TYPE_CHECKING:
    from autojac.store import PlanStore

_requires_grad = operator.attrgetter("requires_grad")


def require_function(func: Any) -> None:
    """Raise `InputError` unless `func` can be called with tensors."""
    if isinstance(func, type) and issubclass(func, torch.nn.Module):
        name = func.__name__
        raise InputError(f"an instance of a module was expected, got the class {name}. Create it first: {name}(...)")
    if not callable(func):
        raise InputError(f"a function or module was expected, got {kind_of(func)}")


@opaque_methods
class AutoJacobian(Derived):
    """Exact batched Jacobians of a function, by the cheapest method measured on the device at hand.

    `func` takes the whole batch: x of shape (B, *in) gives y of shape (B, *out). Calling the wrapper as one would call
    `func` gives the Jacobian; its first call for new shapes probes what couples with what across the batch, searches,
    and remembers.

    Args:
        func: a function or `torch.nn.Module` of tensors.
        argnums: int or tuple; positional arguments to differentiate, as in `torch.func.jacrev`.
        in_dims: where each positional argument carries the batch: an int, None (shared by all samples), or a tuple of
            these or of nests of them, as in `torch.vmap`; `"auto"` infers it and checks the guess. All None: a function
            without a batch, J is (*out, *in).
        layout: `"blocks"` (B, *out, *in), exact whatever the coupling, `"full"` (B, *out, B, *in), `"sparse"`, one
            2-D sparse CSR tensor (B·m, B·n) that is never dense on the way, or `"diagonal"` (B, n), for as many
            outputs as inputs in a sample.
        has_aux: func returns (y, aux); aux comes back untouched.
        effort: `"estimate"`, `"quick"`, `"measure"` or `"exhaustive"`: how hard to search.
        on_miss: `"tune"`, `"estimate"` or `"error"`: what to do for a call that no plan is known for.
        budget_s: seconds that a search may take.
        memory_limit: bytes, or a size such as `"8GiB"`, that a method may take.
        randomness: `"error"` refuses functions that draw random numbers; `"different"` differentiates what one plain
            call from the current random state would draw; with `"same"` every sample sees the draw that it would see
            as a batch of one, as in `torch.vmap`.
        coupling: `"auto"` probes; `"independent"`, `"statistics"`, `"dense"` or a `Structure` declares, and is still
            verified.
        verify: `"auto"` checks at the first use, then ever more rarely; `"always"` or `"never"`.
        store: a `PlanStore`, a path or a URL; by default `AUTOJAC_STORE` or the user's cache directory.
        version: bump to forget what was stored for this function.

    Raises:
        OptionError: for an unknown option or a value that is not accepted.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        *,
        argnums: int | tuple[int, ...] = 0,
        in_dims: Any = "auto",
        layout: Layout = "blocks",
        has_aux: bool = False,
        effort: Effort = "quick",
        on_miss: OnMiss = "tune",
        budget_s: float | None = None,
        memory_limit: int | str | None = None,
        randomness: Randomness = "error",
        coupling: Literal["auto"] | Coupling | Structure = "auto",
        verify: Verify = "auto",
        store: PlanStore | str | PathLike[str] | None = None,
        version: str = "",
        **unknown: Never,
    ) -> None:
        options = dict(locals())
        options = {name: options[name] for name in Options.names()} | options["unknown"]
        require_function(func)
        self.__setstate__({"func": func, "options": Options.checked(options)})

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: the function and the options; plans are found again where they are stored."""
        return {"func": self.func, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a compiled function stays its owner's: what it was compiled from is differentiated
        self.func: Callable[..., Any] = original(state["func"])
        self.options: Options = state["options"]
        self._planner = Planner(self.func, self.options)
        self._entries: dict[Any, Entry] = {}
        self._others = {}
        self._captured: Captures | None = None
        self._again: Again = never
        self._replays = self._told = False
        self._observes = self.options.verify != "never"
        # a module is neither called nor looked at while another thread has put its parameters aside
        module_lock = self.func.lock if isinstance(self.func, ModuleFunction) else None
        self._alone: AbstractContextManager[Any] = nullcontext() if module_lock is None else module_lock
        self._lock: AbstractContextManager[Any] = threading.RLock() if module_lock is None else module_lock

    def __repr__(self) -> str:
        count = len(self._entries)
        return f"AutoJacobian({self._planner.stored.function_name}, {count} plan{'' if count == 1 else 's'} in use)"

    def __autojac_reach__(self) -> dict[str, Any]:
        """What another wrapper's fingerprint sees of this one: the plans found here change no result."""
        chosen = {name: getattr(self.options, name) for name in ("argnums", "in_dims", "layout", "has_aux")}
        return {"func": self.func, **chosen}

    @staticmethod
    def of_parameters(
        module: torch.nn.Module, *, in_dims: Any = "auto", **options: Unpack[OptionValues]
    ) -> AutoJacobian:
        """Each sample's Jacobian in a module's parameters, e.g. for a neural tangent kernel.

        The wrapper is called as the module is, and returns a dict: name of the parameter → (B, *out, *param), inside
        the nest of the outputs. Tied parameters appear once, those that don't require grad are left out.

        Args:
            module: called with the whole batch.
            in_dims: where each of the module's own arguments carries the batch, as in `AutoJacobian`.
            options: all other options of `AutoJacobian` but `argnums`.

        Raises:
            InputError: if it is no module or a scripted one, or when called if no parameter requires grad.
            OptionError: for an unknown option or a value that is not accepted.
        """
        if "argnums" in options:
            raise OptionError("of_parameters differentiates in the parameters; for arguments wrap the module itself")
        own = tuple(in_dims) if isinstance(in_dims, list) else in_dims
        return AutoJacobian(module_function(module), in_dims=(None, own), **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The Jacobian of func at these arguments.

        Returns:
            J of shape (B, *out, *in), (B, *out, B, *in) for `layout="full"`, a CSR matrix (B·m, B·n) for `"sparse"`;
            nested as `torch.func.jacrev` nests it where there are several outputs or inputs. With `has_aux=True` the
            pair (J, aux).

        Raises:
            InputError, OutputError, MutationError, RandomnessError: where there is no such Jacobian.
            SearchError: if no method is right within the limits.
        """
        if not kwargs:
            found = self._again(args)
            if found is not None:
                return found[1]
        entry, result = self._run(self._given(args), kwargs)
        jacobian = entry.frame.jacobian(entry.finished(result))
        return (jacobian, result.aux) if self.options.has_aux else jacobian

    def value_and_jacobian(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """func's value, with its graph, and the Jacobian; func runs no more often than for the Jacobian alone.

        Returns:
            (y, J), or (y, J, aux) for `has_aux=True`.
        """
        if not kwargs:
            found = self._again(args)
            if found is not None:
                return found
        entry, result = self._run(self._given(args), kwargs)
        value, jacobian = entry.frame.value(result.values), entry.frame.jacobian(entry.finished(result))
        return (value, jacobian, result.aux) if self.options.has_aux else (value, jacobian)

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for such a call; made now if there is none."""
        with recording(self._given(args), kwargs) as call:
            return self._entry(self._key(*call), *call).plan

    def tune(self, *args: Any, effort: Effort | None = None, budget_s: float | None = None, **kwargs: Any) -> Plan:
        """Search for the best plan for such a call, and remember it.

        Args:
            args, kwargs: the call.
            effort: `"quick"`, `"measure"` or `"exhaustive"`; the wrapper's own by default.
            budget_s: seconds the search may take, overshot by one candidate's run at most.

        Among several ranks of a process group nothing is timed and the effort is `"estimate"`: ranks that decide by
        their clocks evaluate func unequally often, and wait for each other for ever if it communicates.
        """
        check_budget(budget_s)
        effort = self.options.effort if effort is None else effort
        effort_rank(effort)
        with self._lock, recording(self._given(args), kwargs) as call:
            key = self._key(*call)
            request = self._planner.request(self._reach(), *call)
            entry = self._planner.entry(request, self._reach(), effort, budget_s, force=True)
            self._keep(key, entry)
        return entry.plan

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """For people: the plan, what was probed, every candidate with its time and memory or why it was rejected."""
        with recording(self._given(args), kwargs) as call:
            entry = self._entry(self._key(*call), *call)
        trials = entry.plan.trials or (self._planner.stored.trials(entry.keys) if entry.keys else ())
        problem = entry.problem
        lines = problem.outline.lines(problem.out_size, problem.in_size) if problem.outline is not None else []
        lines += colored(problem)
        lines += problem.function_state.lines() if problem.function_state is not None else []
        return explanation(self._planner.stored.function_name, entry.signature, entry.plan, trials, lines)

    def _given(self, args: Sequence[Any]) -> Sequence[Any]:
        """The arguments of func, from those of a call."""
        return self.func.arguments(args) if isinstance(self.func, ModuleFunction) else args

    def _run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Entry, Result]:
        with self._alone:
            return self._run_now(args, kwargs)

    def _run_now(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Entry, Result]:
        if torch.is_inference_mode_enabled():
            with recording(args, kwargs) as call:
                return self._run_now(*call)
        if transforming():
            return self._composed(args, kwargs)
        function_state = self._planner.function_state
        state, moved = function_state.observe() if self._observes else (None, False)
        if moved or (self._replays and not function_state.is_unchanged()):
            # what func holds may be others now, which require grad
            self._captured = None
        key = self._key(args, kwargs) if self._entries else None
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entry(key, args, kwargs)
            key = self._key(args, kwargs)
        frame = entry.frame
        leaves = frame.leaves(args)
        if kwargs or frame.constants:
            kwargs = frame.keywords(args, kwargs)
        entry.calls += 1
        noticed = UNCHANGED if entry.unchecked else entry.changed(leaves, kwargs, state, self._reach)
        if noticed.what or entry.calls >= entry.next_check or (kwargs and entry.unfamiliar(kwargs)):
            entry, result = self._checked(key, entry, leaves, args, kwargs, noticed)
            entry.states.add(-1 if state is None else state)
            self._absorb(entry)
            return entry, result
        compute = entry.usable if hooked() else entry.compute
        found: Result | None = None
        try:
            with outside_autocast():
                found = compute(leaves, kwargs)
        except RuntimeError as error:  # func may have returned other shapes, or the plan fails: both are looked into
            if entry.unchecked or type(error).__module__ == "torch.utils.checkpoint":
                raise
        if found is None or not entry.fits(found):
            entry, found = self._checked(key, entry, leaves, args, kwargs, UNCHANGED)
        elif not kwargs:
            if entry.again is None:
                entry.again = again(entry, args)
            self._again = entry.again
        self._absorb(entry)
        return entry, found

    def _absorb(self, entry: Entry) -> None:
        """Take what func has changed by itself for no change; asked until it is seen to change nothing."""
        function_state = self._planner.function_state
        if function_state.is_new and entry.observed:
            entry.absorb(function_state.absorb())

    def _factors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Factors:
        with recording(args, kwargs) as call:
            entry = self._entry(self._key(*call), *call)
            if entry.problem.structure.independent:
                entry, result = self._run(*call)
                require_one(entry.problem)
                return without_sharing(entry.problem, result.jacobians[0][0])
            if entry.factored is None:
                entry.factored = factored(entry.problem)
            with outside_autocast():
                factors: Factors = entry.factored(entry.frame.leaves(call[0]), entry.frame.keywords(*call))
            return factors

    def _composed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Entry, Result]:
        """Inside a caller's transform: torch.func's own VJP, since not every plan composes with every transform.

        Nothing can be probed, timed or checked there, where tensors stand for many or carry tangents.
        """
        if self.options.layout == "sparse":
            raise UnsupportedError(
                "a torch.func transform or forward mode is under way, in which torch makes no sparse "
                "matrices. Wrap the function with layout='blocks' or 'full' for use there"
            )
        reach = captures(self.func)
        frame = Frame(eagerly(self.func) if reach.compiled else self.func, args, self.options)
        leaves = frame.leaves(args)
        # a structure holds for one kind of call: other flags or keywords may couple what these do not
        named = tuple([(name, describe(value)) for name, value in kwargs.items()])
        flags = current_flags(reach.modules)
        for (_, known_named, _, _, known_flags), entry in self._entries.items():
            problem = entry.problem
            shapes = [leaf.event_shape for leaf in problem.leaves]
            same = known_named == named and known_flags == flags and entry.frame.context == frame.context
            if same and len(leaves) == len(shapes) and not entry.provisional:
                events = [tuple(x.shape[leaf.batched :]) for x, leaf in zip(leaves, problem.leaves, strict=True)]
                if events == shapes:
                    batch = next(len(x) for x, leaf in zip(leaves, problem.leaves, strict=True) if leaf.batched)
                    composed = dataclasses.replace(problem.resized(batch), differentiable=True)
                    kwargs = entry.frame.keywords(args, kwargs)
                    compute = prepared(entry.frame, composed, composable(composed))
                    with outside_autocast():
                        return entry, compute(leaves, kwargs)
        raise UnsupportedError(
            "a torch.func transform or forward mode is under way, in which nothing can be probed. Call "
            "jac(x) or jac.tune(x) once outside of it, with tensors of these shapes, and then again inside"
        )

    def _key(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        captured = self._captured or self._reach()
        grad = torch.is_grad_enabled()
        kinds = tuple(
            [(x.shape, x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else describe(x) for x in args]
        )
        named = tuple([(name, describe(value)) for name, value in kwargs.items()]) if kwargs else ()
        trains = grad and any(map(_requires_grad, captured.tensors))
        return kinds, named, grad, trains, current_flags(captured.modules)

    def _reach(self) -> Captures:
        with self._alone:
            if self._captured is None:
                self._captured = captures(self.func)
            return self._captured

    def _reach_now(self) -> Captures:
        """What func reaches now; what it reached before, where the guard has seen everything unchanged in this call."""
        listed = self._observes and self._planner.function_state.is_complete
        return self._reach() if listed else captures(self.func)

    def _entry(self, key: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Entry:
        entry = self._entries.get(key)
        if entry is not None:
            return entry
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                # what func holds may be others than the key was made from
                found = survey(self.func, self.options.version)
                self._captured = dataclasses.replace(found, digest="")  # which may be another at the next call
                key = self._key(args, kwargs)
                entry = self._entries.get(key)
            if entry is None:
                entry = self._planner.entry(self._planner.request(found, args, kwargs), found)
                self._keep(key, entry)
        return entry

    def _keep(self, key: Any, entry: Entry) -> None:
        if self.options.verify == "never" and not entry.provisional:
            entry.next_check, entry.unchecked, entry.numbers = math.inf, True, None
        before = self._entries.get(key)
        if before is not None:
            # whoever still has it checks its next call, and so takes the long way to what is in use now
            before.next_check = 0
        self._entries[key] = entry
        self._again = never
        self._replays = self._replays or isinstance(entry.compute, Replaying)
        self._observes = self._observes or entry.observed

    def _checked(
        self,
        key: Any,
        entry: Entry,
        leaves: Sequence[Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        noticed: Noticed,
    ) -> tuple[Entry, Result]:
        """Compute, and hold the result against a VJP of func itself; recompute by a safe method if it is wrong.

        `noticed` is what was seen to have changed. Arguments are free to, and nobody is warned.
        """
        written = self._writable() if UPDATES_BUFFERS in entry.problem.structure.effects else ()
        # what has changed may draw now
        before = entry.quiet.now(GENERATORS if noticed.what == "function" else None, written)
        restore = before.saved()
        # what a search has just found was checked with its gradient
        trains = entry.problem.differentiable and not hooked() and not (entry.fresh and entry.calls == 1)
        problem = dataclasses.replace(entry.problem, differentiable=trains)
        own = tuple(x.detach().requires_grad_(x.requires_grad) for x in leaves)
        modules = self._reach().modules
        trained = lasting(trained_by(self._reach_now(), kwargs), entry.mutable) if trains else ()
        # what no guard can list, such as a clock, is seen while func runs
        function_state = self._planner.function_state
        monitor = RunMonitor(function_state.present.guard.codes) if entry.may_rest else nullcontext()
        with silent(modules), monitor:
            reference = Reference(
                problem,
                own,
                kwargs,
                before,
                rows=1,
                seed=entry.calls,
                thorough=bool(noticed.what),
                trained=trained,
            )
        if entry.provisional and reference.says:
            return self._planned_again(key, leaves, args, kwargs)
        result: Result | None = None
        through = False
        gradient = functools.partial(self._gradient_error, entry, reference, own, kwargs, before)
        moves = bool(entry.mutable or UPDATES_BUFFERS in entry.problem.structure.effects)
        try:
            # no evaluation may come after the one that is returned: its graph may hold what func writes into
            with saved_tensors_apart():
                early = gradient() if trains and moves else None
            result = entry.run(leaves, kwargs)
            with saved_tensors_apart():
                wrong = reference.check(result)
                through = wrong is None and trains
                if through:
                    wrong = early if moves else gradient()
        except Exception as error:  # func itself has just run: memory, a compiler or a transform failed the plan
            if type(error).__module__ == "torch.utils.checkpoint":
                raise  # it stops a recomputation that has saved what it needs
            wrong = f"it raises {type(error).__name__}: {error}"
        if not reference.says:
            # no verdict: the next call is checked in the place of this one
            entry.next_check = min(entry.next_check, entry.calls + 1)
            if result is None:
                restore()
                restore_random_state(before.state)
                result = entry.plainly(leaves, kwargs)
            return entry, result
        if wrong is None and result is not None:
            if noticed.what == "function":
                self._captured = self._reach_now()
                if entry.contents_decide:
                    entry.hold(self._captured)
            if not entry.last_check and entry.problem.differentiable:
                self._tell_untrained(reference, result, kwargs)
            entry.checked(self.options.verify, isinstance(monitor, RunMonitor) and not monitor.reason)
            if reference.decides:
                entry.watch.accept(noticed.contents)
                entry.doubtful = False
            elif entry.problem.structure.assumes:
                # derivatives as small as rounding confirm no pattern: the next call is checked as well
                entry.next_check = min(entry.next_check, entry.calls + 1)
                entry.doubtful = entry.doubtful or bool(noticed.what)
            if entry.doubtful:
                with silent(modules):
                    restore()
                    restore_random_state(before.state)
                    whole = entry.assuming_nothing()
                    return whole, whole.run(leaves, kwargs)
            return entry, result
        # the wrong run does not count; put back now, what func writes into stays as the graph of the next run saves it
        # but for what the forward of data-parallel modules has told the other ranks
        with silent(modules):
            restore()
            restore_random_state(before.state)
            with self._lock:
                request = self._planner.request(self._reach(), args, kwargs)
                last = entry.last_check
                entry = self._planner.recover(entry, request, self._reach(), str(wrong), structure=not through)
                self._keep(key, entry)
                entry.watch.accept(entry.contents(leaves, kwargs))
            if noticed.what == "arguments":
                with silent(modules):
                    return entry, entry.run(leaves, kwargs)
            since = f"calls since call {last} went unchecked" if last else "it was its first use in this process"
            since = "func has changed, which was noticed at once" if noticed.what else since
            warn(
                f"the plan for {self._planner.stored.function_name} does not hold ({since}): {wrong}. This Jacobian "
                f"was computed again and is right. Now in use: {entry.plan}",
                StructureChangedWarning,
            )
            with silent(modules):
                return entry, entry.run(leaves, kwargs)

    def _writable(self) -> list[Tensor]:
        """What func may write into now, buffers that were put in the place of others included."""
        return [tensor for tensor in self._reach_now().tensors if not tensor.requires_grad]

    def _gradient_error(
        self, entry: Entry, reference: Reference, leaves: Sequence[Tensor], kwargs: Mapping[str, Any], before: Quiet
    ) -> str | None:
        """Say why the gradient through J is wrong, by a run of its own: the graph that the caller gets is not used."""
        with before(), without_hooks(reference.trained), silent(self._reach().modules):
            return reference.check_gradient(entry.run(leaves, kwargs))

    def _tell_untrained(self, reference: Reference, result: Result, kwargs: Mapping[str, Any]) -> None:
        """Warn, once, where parameters train and the Jacobian has no graph to them: a backward of func's makes none."""
        if self._told or any(jacobian.requires_grad for row in result.jacobians for jacobian in row):
            return
        functions = sorted(custom_functions(reference.pullback.recorded))
        if functions and trained_by(self._reach_now(), kwargs):
            self._told = True
            warn(
                f"{self._planner.stored.function_name}: the Jacobian carries no graph, so a loss on it trains no "
                f"parameter: the backward of {', '.join(functions)} can't be differentiated. Write that backward in "
                "differentiable operators, without once_differentiable, detach or no_grad; call jac under "
                "torch.no_grad() if J is not to be trained",
                NoGraphWarning,
            )

    def _planned_again(
        self, key: Any, leaves: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Entry, Result]:
        """Plan where something can be verified, after a plan that was made where nothing could."""
        with self._lock:
            entry = self._planner.entry(self._planner.request(self._reach(), args, kwargs), self._reach())
            self._keep(key, entry)
        entry.calls = 1
        if entry.provisional:
            return entry, entry.run(leaves, kwargs)
        return self._checked(key, entry, leaves, args, kwargs, UNCHANGED)
