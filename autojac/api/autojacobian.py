"""`AutoJacobian`: a function's Jacobians, each call by a plan that was tuned for it and is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Never, Unpack

import torch

from autojac.api.flat_calls import BatchAxesChoice, CallsOverBatchAxes
from autojac.api.low_rank_factors import LowRankJacobian, prepare_factors, require_one, without_sharing
from autojac.api.method_plans import MethodPlans
from autojac.api.over_batch_axes import OverBatchAxes
from autojac.autodiff.derivative_terms import Terms
from autojac.core.autocast import outside_autocast
from autojac.core.call import outside_inference_mode
from autojac.core.module_function import ModuleFunction, module_function
from autojac.core.options import OnMiss, Options, OptionValues, Randomness, Verify
from autojac.core.plan import Effort
from autojac.core.product_functions import SelectedOutput
from autojac.core.selection import Select, require_selection
from autojac.core.signature import Layout
from autojac.core.structure import Coupling, Structure
from autojac.errors import InputError, OptionError, kind_of
from autojac.guards.compiled_functions import opaque_methods, original
from autojac.planning.plans_in_use import PlansInUse
from autojac.planning.prepared_plan import PreparedPlan
from autojac.planning.run_call import leaving_in_arguments, run_call
from autojac.problem.problem import Result

if TYPE_CHECKING:
    from autojac.store import PlanStore


def require_function(func: Any) -> None:
    """Raise `InputError` unless `func` can be called with tensors."""
    if isinstance(func, type) and issubclass(func, torch.nn.Module):
        name = func.__name__
        raise InputError(f"an instance of a module was expected, got the class {name}. Create it first: {name}(...)")
    if not callable(func):
        raise InputError(
            f"a function or module was expected, got {kind_of(func)}. Pass one that maps tensors (B, ...) to "
            "tensors (B, ...)"
        )


@opaque_methods
class AutoJacobian(MethodPlans, BatchAxesChoice):
    """Exact batched Jacobians of a function, by the cheapest method measured on the device at hand.

    `func` takes the whole batch: x of shape (B, *in) gives y of shape (B, *out). Calling the wrapper as one would call
    `func` gives the Jacobian. The first call for new shapes probes what couples with what across the batch; faster
    methods are searched for while the wrapper is used, or ahead of time by `tune`, and remembered.

    Args:
        func: a function or `torch.nn.Module` of tensors.
        argnums: int or tuple; positional arguments to differentiate, as in `torch.func.jacrev`.
        in_dims: where each positional argument carries the batch: an int, None (shared by all samples), or a tuple of
            these or of nests of them, as in `torch.vmap`; `"auto"` infers it and checks the guess. All None: a function
            without a batch, J is (*out, *in).
        batch_dims: number of batch axes, which come first: with 2 an input (B1, B2, *in) gives (B1, B2, *out, *in), at
            the price of the flattened batch. func sees the axes as they are, and may couple samples along any. Every
            tensor that has the axes carries the batch unless in_dims, of 0 and None, says otherwise.
        layout: `"blocks"` (B, *out, *in), exact whatever the coupling, `"full"` (B, *out, B, *in), `"sparse"`, one
            2-D sparse CSR tensor (B·m, B·n) that is never dense on the way, or `"diagonal"` (B, n), for as many
            outputs as inputs in a sample.
        has_aux: func returns (y, aux); aux comes back untouched.
        select: what of func's output is differentiated, whatever else it holds: a path of keys, attributes and
            positions, such as `"logits"` or `"states.0"`, or a function of the output. The whole output comes back as
            aux does.
        effort: `"estimate"`, `"quick"`, `"measure"` or `"exhaustive"`: how hard to search.
        on_miss: what to do for a call that no plan is known for. `"online"` answers at once by the cost model's choice
            and searches a step at a time while the wrapper is used, at most a fifth on top of what its calls cost;
            `"tune"` searches first; `"estimate"` never searches; `"error"` raises `PlanMissError`.
        budget_s: seconds that a search may take, over all calls where it goes on online.
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
        select: Select | None = None,
        effort: Effort = "quick",
        on_miss: OnMiss = "online",
        budget_s: float | None = None,
        memory_limit: int | str | None = None,
        randomness: Randomness = "error",
        coupling: Literal["auto"] | Coupling | Structure = "auto",
        verify: Verify = "auto",
        store: PlanStore | str | PathLike[str] | None = None,
        version: str = "",
        batch_dims: int = 1,
        **unknown: Never,
    ) -> None:
        options = dict(locals())
        options = {name: options[name] for name in Options.names()} | options["unknown"]
        require_function(func)
        if select is not None:
            require_selection(select, has_aux)
            func, options["has_aux"] = SelectedOutput(original(func), select), True
        self.__setstate__({"func": func, "options": Options.from_keywords(options), "batch_dims": batch_dims})

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: the function and the options; stored plans are found again."""
        return {"func": self.func, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # of a compiled function the original is differentiated
        self.func: Callable[..., Any] = original(state["func"])
        self.options: Options = state["options"]
        self._plans = PlansInUse(self.func, self.options)
        self._others = {}
        self._products = {}
        self._call_shapes = {}

    def __repr__(self) -> str:
        count, name = len(self._plans), self._plans.planner.repository.function_name
        return f"AutoJacobian({name}, {count} plan{'' if count == 1 else 's'} in use)"

    def __autojac_reach__(self) -> dict[str, Any]:
        """Return what another wrapper's fingerprint sees of this one; its plans change no result."""
        chosen = {name: getattr(self.options, name) for name in ("argnums", "in_dims", "layout", "has_aux")}
        return {"func": self.func, **chosen}

    @staticmethod
    def of_parameters(
        module: torch.nn.Module,
        *,
        names: str | Sequence[str] | None = None,
        select: Select | None = None,
        in_dims: Any = "auto",
        batch_dims: int = 1,
        **options: Unpack[OptionValues],
    ) -> AutoJacobian:
        """Return each sample's Jacobian in a module's parameters, e.g. for a neural tangent kernel.

        The wrapper is called as the module is, and returns a dict: name of the parameter → (B, *out, *param), inside
        the nest of the outputs. Tied parameters appear once, those that don't require grad are left out.

        Args:
            module: called with the whole batch.
            names: a parameter's name, or a pattern such as `"*.weight"`, or several: differentiate in these alone.
            select: what of the module's output is differentiated, as in `AutoJacobian`.
            in_dims, batch_dims: of the module's own arguments, as in `AutoJacobian`.
            options: all other options of `AutoJacobian` but `argnums`.

        Raises:
            InputError: if it is no module or a scripted one, or `names` match nothing; when called if no parameter
                requires grad, or one is complex.
            OptionError: for an unknown option or a value that is not accepted.
        """
        if "argnums" in options:
            raise OptionError(
                "of_parameters differentiates in all parameters that require grad, and takes no argnums. Leave it out, "
                "or wrap the module itself, AutoJacobian(module, argnums=...), for derivatives in its arguments"
            )
        own = tuple(in_dims) if isinstance(in_dims, list) else in_dims
        function = module_function(module, names)
        if select is not None:
            require_selection(select, options.get("has_aux", False))
            function.select, options["has_aux"] = select, True
        return AutoJacobian(function, in_dims=(None, own), batch_dims=batch_dims, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the Jacobian of func at these arguments.

        Returns:
            J of shape (B, *out, *in), (B, *out, B, *in) for `layout="full"`, a CSR matrix (B·m, B·n) for `"sparse"`;
            nested as `torch.func.jacrev` nests it where there are several outputs or inputs. A nest that is
            differentiated may hold ids, masks, strings and None besides: there J holds None. Dataclasses are nests,
            registered or not, and come back as their own types, past `__init__`. With `has_aux=True` the pair (J,
            aux). Values and Jacobians are plain tensors, also of tensors of a class of their own. What func sets in
            nests and objects among its arguments is left there as by one plain call.

        Raises:
            InputError, OutputError, MutationError, RandomnessError: where there is no such Jacobian.
            SearchError: if no method is right within the limits.
        """
        if not kwargs:
            served = self._plans.fast_path(args)
            if served is not None:
                return served[1]
        plan, result = self._run(self._func_args(args, kwargs), kwargs)
        jacobian = plan.jacobian(result)
        return (jacobian, result.aux) if self.options.has_aux else jacobian

    def value_and_jacobian(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return func's value, with its graph, and the Jacobian; func runs no more often than for the Jacobian alone.

        What an output holds besides floating-point tensors (ids, None, strings) comes back in the value, with None in
        its place in J; func may run once more for it.

        Returns:
            (y, J), or (y, J, aux) for `has_aux=True`.
        """
        if not kwargs:
            served = self._plans.fast_path(args)
            if served is not None:
                return served
        plan, result = self._run(self._func_args(args, kwargs), kwargs)
        value, jacobian = plan.layout.value(result.values, result.rest), plan.jacobian(result)
        return (value, jacobian, result.aux) if self.options.has_aux else (value, jacobian)

    def _func_args(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        return self.func.arguments(args, kwargs) if isinstance(self.func, ModuleFunction) else args

    def _run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[PreparedPlan, Result]:
        return run_call(self._plans, args, kwargs)

    def _factors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LowRankJacobian:
        with outside_inference_mode(args, kwargs) as call:
            plan, described = self._plans.look_up(*call)
            if plan.problem.structure.independent:
                plan, result = self._run(*call)
                require_one(plan.problem)
                return without_sharing(plan.problem, result.jacobians[0][0])
            if plan.factors is None:
                plan.factors = prepare_factors(plan.problem)
            with leaving_in_arguments(plan, described), outside_autocast():
                factors: LowRankJacobian = plan.factors(described.leaves, described.keywords)
            return factors


@opaque_methods
class _JacobianOverBatchAxes(OverBatchAxes, AutoJacobian):
    """An `AutoJacobian` for several batch axes."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "batch_dims": self._calls.batch_dims}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.func = original(state["func"])
        self.options = state["options"]
        self._calls = CallsOverBatchAxes(self._of_one_axis, self.func, state["batch_dims"], self.options)

    def __autojac_reach__(self) -> dict[str, Any]:
        return {**super().__autojac_reach__(), "batch_dims": self._calls.batch_dims}

    def _of_one_axis(self, func: Callable[..., Any], in_dims: Any) -> AutoJacobian:
        return jacobian_of(func, self.options.replace(in_dims=in_dims))


AutoJacobian.over_batch_axes = _JacobianOverBatchAxes


def jacobian_of(func: Callable[..., Any], options: Options, terms: Terms = ()) -> AutoJacobian:
    """Return a wrapper with options that are checked already.

    Args:
        func, options: as of `AutoJacobian`.
        terms: derivatives by columns to plan and compute instead of the Jacobian, stacked on the last axis.
    """
    wrapper = AutoJacobian.__new__(AutoJacobian)
    wrapper.__setstate__({"func": func, "options": options.replace(of=terms)})
    return wrapper
