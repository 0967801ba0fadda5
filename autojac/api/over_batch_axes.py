"""Wrappers of functions whose batch runs over several axes: each call goes to one that sees a single batch axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import Tensor

from autojac.api.flat_calls import CallsOverBatchAxes, FlattenedCall
from autojac.api.kernels import tangent_kernel
from autojac.api.products import LAST, apart_from_own, without_last
from autojac.core.batch_grid import split_axis
from autojac.core.options import OnMiss, Options
from autojac.core.plan import Effort, Plan
from autojac.planning.plan_repository import function_name


class PlansOverBatchAxes:
    """The methods of all wrappers for several batch axes that forward to the wrapper with a single one."""

    func: Callable[..., Any]
    _calls: CallsOverBatchAxes

    def __repr__(self) -> str:
        kind = next(base for base in type(self).__mro__ if vars(base).get("over_batch_axes") is type(self))
        return f"{kind.__name__}({function_name(self.func)}, batch_dims={self._calls.batch_dims})"

    def _flat_call(
        self, of: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[FlattenedCall, tuple[Any, ...], bool]:
        """Return a call with one batch axis, the arguments of a method of its wrapper, and whether several vectors."""
        if of is None or of not in LAST:
            call = self._calls.flat(args)
            return call, call.args, False
        inputs, vectors = without_last(args, of)
        call = self._calls.flat(inputs)
        if LAST[of] == "v":
            flat, several = call.tangents(vectors)
        else:
            flat, several = call.cotangents(vectors, kwargs, LAST[of], several=of == "vjp")
        return call, (*call.args, flat), several

    def plan(self, *args: Any, of: Any = None, **kwargs: Any) -> Plan:
        call, flat_args, keywords = self._call_behind(of, args, kwargs)
        plan: Plan = call.wrapper.plan(*flat_args, **keywords)
        return plan

    def tune(
        self, *args: Any, of: Any = None, effort: Effort | None = None, budget_s: float | None = None, **kwargs: Any
    ) -> Plan:
        call, flat_args, keywords = self._call_behind(of, args, kwargs)
        plan: Plan = call.wrapper.tune(*flat_args, effort=effort, budget_s=budget_s, **keywords)
        return plan

    def explain(self, *args: Any, of: Any = None, **kwargs: Any) -> str:
        call, flat_args, keywords = self._call_behind(of, args, kwargs)
        text: str = call.wrapper.explain(*flat_args, **keywords)
        return text

    def _call_behind(
        self, of: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[FlattenedCall, tuple[Any, ...], dict[str, Any]]:
        """Return a call with one batch axis, and the arguments and keywords of `plan`, `tune` and `explain` for it."""
        keywords, others = apart_from_own(of, kwargs)
        call, flat_args, _ = self._flat_call(of, args, others)
        if keywords.get("loss") is not None:
            keywords["loss"] = call.loss(keywords["loss"])
        return call, flat_args, {**others, **keywords, **({} if of is None else {"of": of})}


class PlannedOverBatchAxes(PlansOverBatchAxes):
    """A wrapper for several batch axes whose plans are those of `planned`, an `AutoJacobian` or like one."""

    planned: Any
    _of_one_axis: Callable[[Callable[..., Any], Any], Any]

    def __init__(self, *args: Any, batch_dims: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._calls = self._calls_over(batch_dims)

    def _calls_over(self, batch_dims: int) -> CallsOverBatchAxes:
        return CallsOverBatchAxes(self._of_one_axis, self.func, batch_dims, self.planned.options)

    def _replace_on_miss(self, on_miss: OnMiss) -> Self:
        wrapper: Self = super()._replace_on_miss(on_miss)  # type: ignore[misc]
        wrapper._calls = wrapper._calls_over(self._calls.batch_dims)
        return wrapper

    def __autojac_reach__(self) -> dict[str, Any]:
        return {**super().__autojac_reach__(), "batch_dims": self._calls.batch_dims}  # type: ignore[misc]


class OverBatchAxes(PlansOverBatchAxes):
    """The methods of a wrapper for several batch axes: those for a single axis, on flattened calls.

    What is a matrix of the whole batch stays one of the flattened batch: sparse Jacobians, `factors`, operators, and
    the Gram matrices of `layout="full"`. `chunks` counts samples as the flattened batch does.
    """

    options: Options

    def __autojac_needs_no_check__(self) -> bool:
        """Check whether no plan in use is ever checked again."""
        wrappers = self._calls.wrappers
        return bool(wrappers) and all(wrapper.__autojac_needs_no_check__() for wrapper in wrappers)

    @property
    def _is_one_matrix(self) -> bool:
        return self.options.layout in ("full", "sparse")

    def _change(self, result: Any, change: Callable[[Any], Any]) -> Any:
        """Return a changed result, with its aux as it is."""
        return (change(result[0]), result[1]) if self.options.has_aux else change(result)

    def _call_flat(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], whole: bool, **more: Any) -> Any:
        """Return what a method of the flattened batch gives, per sample unless it is of the `whole` batch."""
        call = self._calls.flat(args)
        result = getattr(call.wrapper, name)(*call.args, **more, **kwargs)
        return result if whole else self._change(result, call.lead)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._calls.flat(args)
        return self._change(call.wrapper(*call.args, **kwargs), lambda J: call.jacobian(J, self.options.layout))

    def value_and_jacobian(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        call = self._calls.flat(args)
        value, jacobian, *aux = call.wrapper.value_and_jacobian(*call.args, **kwargs)
        return (call.value(value), call.jacobian(jacobian, self.options.layout), *aux)

    def inverse(self, *args: Any, **kwargs: Any) -> Any:
        if self.options.layout != "full":
            return self._call_flat("inverse", args, kwargs, False)
        call = self._calls.flat(args)

        def split(inverse: Tensor) -> Any:
            # (B, *in, B, *out), or (*in, B, *out) for an input that all samples share
            inverse = split_axis(inverse, inverse.dim() - len(call.shapes(kwargs).outputs[0]) - 1, call.sizes)
            return inverse if call.inputs[:1] in ((), (None,)) else call.lead(inverse)

        return self._change(call.wrapper.inverse(*call.args, **kwargs), split)

    def slogdet(self, *args: Any, **kwargs: Any) -> Any:
        return self._call_flat("slogdet", args, kwargs, self.options.layout == "full")

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        return self._call_flat("trace", args, kwargs, False)

    def factors(self, *args: Any, **kwargs: Any) -> Any:
        call = self._calls.flat(args)
        return call.wrapper.factors(*call.args, **kwargs)

    def linear_operator(self, *args: Any, **kwargs: Any) -> Any:
        call = self._calls.flat(args)
        return call.wrapper.linear_operator(*call.args, **kwargs)

    def chunks(self, *args: Any, bytes: int | str = "1GiB", out: Any = None, **kwargs: Any) -> Any:
        call = self._calls.flat(args)
        return call.wrapper.chunks(*call.args, bytes=bytes, out=out, **kwargs)

    def gram(self, *args: Any, outer: bool = False, **kwargs: Any) -> Any:
        return self._call_flat("gram", args, kwargs, self._is_one_matrix, outer=outer)

    def norm(self, *args: Any, **kwargs: Any) -> Any:
        return self._call_flat("norm", args, kwargs, self._is_one_matrix)

    def singular_values(self, *args: Any, **kwargs: Any) -> Any:
        return self._call_flat("singular_values", args, kwargs, self._is_one_matrix)

    def jvp(self, *args: Any, **kwargs: Any) -> Any:
        call, flat_args, several = self._flat_call("jvp", args, kwargs)
        return self._change(call.wrapper.jvp(*flat_args, **kwargs), lambda jvps: call.lead(jvps, int(several)))

    def vjp(self, *args: Any, **kwargs: Any) -> Any:
        call, flat_args, several = self._flat_call("vjp", args, kwargs)
        per_sample = not self._is_one_matrix
        return self._change(call.wrapper.vjp(*flat_args, **kwargs), lambda u: call.like_inputs(u, several, per_sample))

    def solve(self, *args: Any, damping: float | Tensor = 0.0, **kwargs: Any) -> Any:
        call, flat_args, _ = self._flat_call("solve", args, kwargs)
        if isinstance(damping, Tensor) and damping.shape == call.sizes and not self._is_one_matrix:
            damping = damping.flatten()
        result = call.wrapper.solve(*flat_args, damping=damping, **kwargs)
        return self._change(result, lambda step: call.like_inputs(step, shared=not self._is_one_matrix))

    def ntk(self, x: Any, y: Any = None, **kwargs: Any) -> Tensor:
        calls = [self._calls.flat(each if isinstance(each, tuple) else (each,)) for each in (x, y) if each is not None]
        pairs = tangent_kernel([(call.wrapper, call.args) for call in calls], kwargs)
        kernel: Tensor = calls[0].lead(calls[-1].lead(pairs, 1))
        return kernel

    def ggn_product(self, *args: Any, loss: Callable[[Any], Tensor] | None = None, **kwargs: Any) -> Any:
        call, flat_args, several = self._flat_call("ggn_product", args, kwargs)
        product = call.wrapper.ggn_product(*flat_args, loss=None if loss is None else call.loss(loss), **kwargs)
        return call.like_inputs(product, several, shared=False)

    def gradient_norms(self, *args: Any, **kwargs: Any) -> Tensor:
        call, flat_args, _ = self._flat_call("gradient_norms", args, kwargs)
        norms: Tensor = call.lead(call.wrapper.gradient_norms(*flat_args, **kwargs))
        return norms
